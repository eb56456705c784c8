"""Read the numbers of a caption, English or Chinese, so that two captions can be compared.

"14 mm", "1.4 cm", 14毫米 and 1.4厘米 are one number; "two nodules" and 两个结节, "third ventricle" and
第三脑室, "4%" and 百分之四 are, too.

A number is *demanded* where it says something: digits, and words with what they count. It is
*permitted* wherever it may stand for a demanded one of the other text: 双侧 permits a 2, and "a" a 1.
"""

import itertools
import re
import unicodedata
from dataclasses import dataclass, field
from fractions import Fraction

# A value and its unit; lengths in mm, volumes in ml, areas in mm2. The unit "" is none.
Quantity = tuple[Fraction, str]

# what is written -> (our unit, factor)
_UNITS = {
    "mm": ("mm", Fraction(1)),
    "millimeters?": ("mm", Fraction(1)),
    "millimetres?": ("mm", Fraction(1)),
    "毫米": ("mm", Fraction(1)),
    "cm": ("mm", Fraction(10)),
    "centimeters?": ("mm", Fraction(10)),
    "centimetres?": ("mm", Fraction(10)),
    "厘米": ("mm", Fraction(10)),
    "公分": ("mm", Fraction(10)),
    "(?:mm2|square millimet(?:er|re)s?|平方毫米)": ("mm2", Fraction(1)),
    "(?:cm2|square centimet(?:er|re)s?|平方厘米)": ("mm2", Fraction(100)),
    "(?:ml|cc|cm3|millilit(?:er|re)s?|cubic centimet(?:er|re)s?|毫升|立方厘米)": (
        "ml",
        Fraction(1),
    ),
    "(?:l|lit(?:er|re)s?|升)": ("ml", Fraction(1000)),
    "(?:%|percent|per cent)": ("%", Fraction(1)),
    "(?:hu|hounsfield units?|亨氏单位|亨斯菲尔德单位)": ("hu", Fraction(1)),
    "(?:years?|yrs?|岁|年)": ("year", Fraction(1)),
    "(?:months?|个月|月)": ("month", Fraction(1)),
    "(?:weeks?|周|星期)": ("week", Fraction(1)),
    "(?:days?|天|日)": ("day", Fraction(1)),
    "(?:hours?|小时)": ("hour", Fraction(1)),
    "(?:minutes?|分钟)": ("minute", Fraction(1)),
}
# A date has them in Chinese and not in English, so that they may be missing.
_SOFT_UNITS = ("year", "month", "week", "day")

# The longest first, since `re` takes the first that fits.
_UNIT_PATTERNS = [
    # in 2cm×3cm the sign × is an x by now
    (re.compile(rf"[ -]?{written}(?![a-wyz0-9]|x(?! ?\d))"), unit)
    for written, unit in sorted(_UNITS.items(), key=lambda entry: -len(entry[0]))
]

# no number of a caption is longer, and Python refuses to read some thousand digits
_NUMBER = r"\d{1,30}(?:\.\d{1,30})?"
# digits, and what they are a part of: "1/3" is one number
_DIGITS = re.compile(rf"{_NUMBER}(?: ?/ ?{_NUMBER})?")
# before two numbers with a stroke that are no fraction
_NAMES_VERTEBRAE = re.compile("[a-z腰胸颈骶椎第]$")
# between two numbers of one unit: "32 x 28 mm", "3-5 cm", 3至5厘米
_LINK = re.compile(r" ?(?:x|×|\*|-|~|to|by|and|or|至|到|或|和|、|,) ?")
# numbers behind which the unit of the first one is looked for
_LONGEST_CHAIN = 6
# characters before a number that say what kind it is
_LOOK_BACK = 40

_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen twenty"
)
_VALUE_OF_WORD = {word: value for value, word in enumerate(_WORDS.split(), 1)}
_TENS = "thirty forty fifty sixty seventy eighty ninety"
_VALUE_OF_WORD |= {word: 10 * value for value, word in enumerate(_TENS.split(), 3)}
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_VALUE_OF_ORDINAL = {word: value for value, word in enumerate(_ORDINALS.split(), 1)}
# They do not say a number, but a number may be a translation of them.
_PERMITTING = {
    r"\b(?:a|an|single|solitary|once|mono\w*|uni\w*|unilateral|same|another|each|per)\b": 1,
    r"\b(?:both|bilateral\w*|double|dual|pair\w*|twice|bi\w+|couple|either|each)\b": 2,
    r"\b(?:triple|tri\w+)\b": 3,
    r"\b(?:quad\w+|tetra\w+)\b": 4,
}
_ENGLISH_WORD = re.compile(
    rf"\b({'|'.join(sorted([*_VALUE_OF_WORD, *_VALUE_OF_ORDINAL], key=len, reverse=True))})(s?)\b"
)
_PERMITTING_PATTERNS = [(re.compile(words), value) for words, value in _PERMITTING.items()]
_PART_OF_WHOLE = re.compile(r" (?:third|quarter|fourth|fifth|half)")
# the same up to here: "a fifth", "three fifths"
_PARTS_HERE = re.compile(r"\b(?:a|an|one|two|three|four) [a-z]+$")
_HALF = re.compile(r"\bhal(?:f|ves)\b|半")

_CHINESE_DIGITS = {"零": 0, "〇": 0, "一": 1, "二": 2, "两": 2, "双": 2, "三": 3, "四": 4, "五": 5}
_CHINESE_DIGITS |= {"六": 6, "七": 7, "八": 8, "九": 9}
_CHINESE_NUMBER = re.compile(
    "[零〇一二两双三四五六七八九十百]{1,12}(?:点[零〇一二三四五六七八九]{1,12})?"
)
# behind a numeral that says a number: what is counted, or a grade
_COUNTERS = re.compile("[个枚处条段支根块颗片节级期型度类次例幅张层]|肋|岁")
_FRACTION = re.compile(
    "([一二三四五六七八九十百]{1,12})分之"
    "([一二三四五六七八九十百]{1,12}(?:点[一二三四五六七八九零]{1,12})?)"
)
# 百分之4, 百分之四点五
_PER_CENT = re.compile(rf"百分之({_NUMBER}|{_CHINESE_NUMBER.pattern})")

# "grade III", "stage IV", III级: only behind or before such words, for "I" and "V" are words too
_ROMAN = re.compile(
    r"\b(?:grade|stage|type|class|category|degree|zone|phase|segment|level) ([ivx]{1,5})\b"
    r"|(?<![a-z0-9])([ivx]{1,5}) ?[级期型度类区段]"
)
_ROMAN_VALUES = {"i": 1, "v": 5, "x": 10}

# "1,4 cm", but not "1,400 ml" and not 1, 2
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


@dataclass
class Numbers:
    """The numbers of one text.

    Attributes
    ----------
    demanded : each with all that it can mean: "third" is 3 or 1/3.
    permitted : all that may stand for a number of the other text.
    """

    demanded: list[frozenset[Quantity]] = field(default_factory=list)
    permitted: set[Quantity] = field(default_factory=set)

    def demand(self, *meanings: Quantity) -> None:
        """Add a number that says something."""
        self.demanded.append(frozenset(meanings))
        self.permitted.update(meanings)

    def lacks(self, number: frozenset[Quantity]) -> bool:
        """Tell whether nothing here can be a number of another text."""
        return not any(self._has(quantity) for quantity in number)

    def _has(self, quantity: Quantity) -> bool:
        if quantity in self.permitted:
            return True
        value, unit = quantity
        if unit in _SOFT_UNITS:
            return (value, "") in self.permitted
        if unit == "":
            return any((value, soft) in self.permitted for soft in _SOFT_UNITS)
        return False


def compare_numbers(a: str, b: str) -> tuple[list[str], list[str]]:
    """List the numbers that only one of two texts has.

    A comma before three digits is one of thousands. Another between digits can be a decimal comma
    or one of a list: the texts agree if they do in any reading.

    Parameters
    ----------
    a, b : str
        Texts, in any of the two languages.

    Returns
    -------
    tuple of two lists of str
        The numbers of `a` that `b` lacks, and of `b` that `a` lacks, such as "14 mm".

    Examples
    --------
    >>> compare_numbers("A 1.4 cm cyst, 3-5 mm wide.", "囊肿约14毫米，宽3至6毫米。")
    (['5 mm'], ['6 mm'])
    """
    first: tuple[list[str], list[str]] | None = None
    for one, other in itertools.product(_readings(a), _readings(b)):
        lost = [_show(number) for number in one.demanded if other.lacks(number)]
        added = [_show(number) for number in other.demanded if one.lacks(number)]
        if not lost and not added:
            return [], []
        first = first or (lost, added)
    assert first is not None  # there is one reading at least
    return first


def _show(number: frozenset[Quantity]) -> str:
    """Write a number as a reader expects it."""
    value, unit = max(number)
    whole = f"{float(value):g}" if value.denominator in (1, 2, 4, 5, 10, 20, 25, 50, 100) else value
    return f"{whole}{unit}" if unit == "%" else f"{whole} {unit}".strip()


def _readings(text: str) -> list[Numbers]:
    """Read the numbers of a text in each way in which its commas can be meant."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"[‐-―−]", "-", text)
    text = re.sub("×", "x", text)
    text = re.sub(r"(?<=[a-z]{2})-(?=[a-z])", " ", text)  # "three-dimensional"
    without_thousands = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    ways = [_COMMA.sub(".", without_thousands), _COMMA.sub(", ", without_thousands)]
    return [_read(way) for way in dict.fromkeys(ways)]


def _read(text: str) -> Numbers:
    """Read the numbers of a text in lower case."""
    numbers = Numbers()
    text = _read_per_cent(text, numbers)
    _read_digits(text, numbers)
    _read_roman(text, numbers)
    _read_english(text, numbers)
    _read_chinese(text, numbers)
    return numbers


def _unit_at(text: str, position: int) -> tuple[str, Fraction] | None:
    """Read the unit that stands at a position, if one does."""
    for pattern, unit in _UNIT_PATTERNS:
        if pattern.match(text, position):
            return unit
    return None


def _unit_behind(text: str, end: int) -> tuple[str, Fraction]:
    """Read the unit of a number that ends here; in "32 x 28 mm" it stands behind the last one."""
    unit = _unit_at(text, end)
    for _ in range(_LONGEST_CHAIN):
        if unit is not None:
            break
        link = _LINK.match(text, end)
        if link is None:
            break
        number = _DIGITS.match(text, link.end()) or _CHINESE_NUMBER.match(text, link.end())
        if number is None:
            break
        end = number.end()
        unit = _unit_at(text, end)
    return unit or ("", Fraction(1))


def _before(text: str, position: int) -> str:
    """Return the words right before a position, without the space behind them."""
    return text[max(0, position - _LOOK_BACK) : position].rstrip()


def _read_per_cent(text: str, numbers: Numbers) -> str:
    """Read 百分之四, and take it out of the text."""
    for match in _PER_CENT.finditer(text):
        written = match[1]
        digits = written[0].isascii()
        numbers.demand((Fraction(written) if digits else _chinese_value(written), "%"))
    return _PER_CENT.sub(lambda match: " " * len(match[0]), text)


def _read_digits(text: str, numbers: Numbers) -> None:
    for match in _DIGITS.finditer(text):
        before = _before(text, match.start())
        parts = [Fraction(part) for part in re.findall(_NUMBER, match[0])]
        unit, factor = _unit_behind(text, match.end())
        if len(parts) == 2:
            _demand_fraction(parts[0], parts[1], before, numbers)
            continue
        value = parts[0] * factor
        if _is_negative(text, match.start(), before):
            value = -value
        if re.match("d(?![a-z])", text[match.end() :]):
            numbers.permitted.add((value, ""))  # "3D" is 三维
            continue
        numbers.demand((value, unit))


def _demand_fraction(above: Fraction, below: Fraction, before: str, numbers: Numbers) -> None:
    """Read "1/3" as a third, and "C3/4", 腰4/5 as two numbers: they are C3-4 in other hands."""
    if below and not _NAMES_VERTEBRAE.search(before):
        numbers.demand((above / below, ""))
        return
    numbers.demand((above, ""))
    numbers.demand((below, ""))


def _is_negative(text: str, start: int, before: str) -> bool:
    """Tell a minus from a hyphen and from the dash of a range: "-50 HU", "COVID-19", "3 -5"."""
    if before.endswith("负"):
        return True
    if text[max(0, start - 1) : start] != "-":
        return False
    ahead = before[:-1].rstrip()
    return not ahead or not (ahead[-1].isalnum() or ahead[-1] == "%")


def _read_roman(text: str, numbers: Numbers) -> None:
    for match in _ROMAN.finditer(text):
        values = [_ROMAN_VALUES[letter] for letter in match[1] or match[2]]
        total = 0
        for value, following in itertools.zip_longest(values, values[1:], fillvalue=0):
            total += -value if value < following else value
        numbers.demand((Fraction(total), ""))


def _read_english(text: str, numbers: Numbers) -> None:
    for match in _ENGLISH_WORD.finditer(text):
        if match[1] in _VALUE_OF_ORDINAL:
            _read_ordinal(text, match, numbers)
        elif not _PART_OF_WHOLE.match(text, match.end()):  # "one third": the third says it
            value = Fraction(_VALUE_OF_WORD[match[1]])
            unit, factor = _unit_behind(text, match.end())
            numbers.permitted.add((value, ""))
            if unit or value > 1:
                numbers.demand((value * factor, unit))
    for pattern, value in _PERMITTING_PATTERNS:
        if pattern.search(text):
            numbers.permitted.add((Fraction(value), ""))
    if _HALF.search(text):
        numbers.permitted.update({(Fraction(1, 2), ""), (Fraction(50), "%")})
    if "quarter" in text:
        numbers.permitted.update({(Fraction(1, 4), ""), (Fraction(3, 4), "")})


def _read_ordinal(text: str, match: re.Match[str], numbers: Numbers) -> None:
    """Read "third": the third of a row, or a part of a whole."""
    value = Fraction(_VALUE_OF_ORDINAL[match[1]])
    meanings = [(value, "")]
    if value == 3 or _PARTS_HERE.search(_before(text, match.end())):
        meanings += [(count / value, "") for count in range(1, min(int(value), 5))]
    # "first" and "second" also tell an order
    if value > 2:
        numbers.demand(*meanings)
    numbers.permitted.update(meanings)


def _read_chinese(text: str, numbers: Numbers) -> None:
    for match in _FRACTION.finditer(text):
        below = _chinese_value(match[1])
        above = _chinese_value(match[2])
        if below:
            numbers.demand((above / below, ""))
    rest = _FRACTION.sub(lambda match: " " * len(match[0]), text)
    for match in _CHINESE_NUMBER.finditer(rest):
        value = _chinese_value(match[0])
        unit, factor = _unit_behind(rest, match.end())
        numbers.permitted.add((value, ""))
        ordinal = _before(rest, match.start()).endswith("第")
        counted = _COUNTERS.match(rest, match.end()) is not None
        if unit and not ordinal:
            numbers.demand((value * factor, unit))
        elif value > 1 and (ordinal or counted):
            numbers.demand((value, ""))


def _chinese_value(numeral: str) -> Fraction:
    """Give the value of a numeral below 1,000, such as 十二, 二十, 一百零五 or 三点五."""
    whole, _, decimals = numeral.partition("点")
    total = digit = 0
    for sign in whole:
        if sign == "百":
            total += 100 * (digit or 1)
            digit = 0
        elif sign == "十":
            total += 10 * (digit or 1)
            digit = 0
        else:
            digit = _CHINESE_DIGITS[sign]
    value = Fraction(total + digit)
    for place, sign in enumerate(decimals, 1):
        value += Fraction(_CHINESE_DIGITS[sign], 10**place)
    return value
