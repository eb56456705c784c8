"""From pictures with a drawn box and a caption to what three tasks learn from.

A source such as MedTrinity has a picture, a caption and, in the picture, a green outline. The heads
need the box itself, the name of what it frames, and the words of the caption that carry the
diagnosis; and the outline must go, or the box head would learn to find green lines.
"""

import io
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from PIL import Image
from tqdm.auto import tqdm

from medtune.boxes import Outline, erase_box, find_boxes, find_outlines, iou
from medtune.captions import Caption, extract_with_llm, parse_caption
from medtune.pairs import picture_bytes, reject_reason, to_rgb

from .records import check_box

# What a row may be asked to have.
FIELDS = ("roi", "structure", "target_diag")
# What is read from captions; these are fields of `Caption`, too.
WORDS = ("structure", "target_diag", "modality")

# Reasons to leave a row out; those of `reject_reason` begin with the column instead.
NO_BOX = "no drawn box"
SEVERAL_BOXES = "several drawn boxes, and the caption speaks of one region"
STILL_DRAWN = "the drawn line could not be erased"
MISSING = {
    "roi": NO_BOX,
    "structure": "the caption names no structure",
    "target_diag": "the caption has no words that carry a diagnosis",
}

# A decoy that overlaps the true box more than this says nearly what the box says.
_MOST_OVERLAP = 0.5
# So often another box is drawn until one fits the picture as a decoy.
_TRIES = 20

_BOX = datasets.List(datasets.Value("float64"))


@dataclass
class _Seen:
    """What one row turned out to be.

    Parameters
    ----------
    box : the region, None where there is none.
    outlines : the lines that are drawn, the largest first.
    words : structure, target_diag and modality, each None where nobody says it.
    read_by : who read the caption, None where nobody did.
    reason : why the row is left out, None where it is not.
    """

    box: list[float] | None = None
    outlines: list[Outline] = field(default_factory=list)
    words: dict[str, str | None] = field(default_factory=dict)
    read_by: str | None = None
    reason: str | None = None


def add_regions(  # noqa: PLR0913 - each is a setting that a user may want to change alone
    pairs: datasets.Dataset,
    *,
    required: Sequence[str] = ("roi",),
    several: str = "drop",
    erase: bool = True,
    decoys: int = 3,
    endpoint: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Add box, structure, diagnosis and modality to pairs whose pictures have a drawn green box.

    A `roi`, `structure` or `modality` that the source knows itself stays as it is.

    Parameters
    ----------
    pairs : datasets.Dataset
        Rows with `image`, `id` and `caption`, as `medtune.pairs.load_pairs` gives them.
    required : sequence of str
        Which of roi, structure and target_diag a row must have to be kept.
    several : str, default "drop"
        What becomes of a picture with several drawn boxes: "drop", because the caption does not say
        which of them it means, or "largest", as published.
    erase : bool, default True
        Paint over the lines. If False they stay, and a model may learn to find them.
    decoys : int, default 3
        How many boxes of other pictures leave the same trace in a picture whose line is erased. The
        trace then does not say which box was there; see `medtune.boxes.erase_box`.
    endpoint : mapping, optional
        `base_url`, `model` and more for `medtune.captions.extract_with_llm`, to read captions by a
        language model on your machine. Without it, and where its answers stay wrong, rules read
        them.
    seed : int, default 0
        Chooses the decoys.

    Returns
    -------
    datasets.Dataset
        The kept rows with `roi`, `structure`, `target_diag`, `modality` and `decoys`, the boxes
        that were drawn and erased beside the true one.
    dict
        `rows`, `kept` and `dropped`: how many there were, are, and were left out for which reason;
        `left_out`: id, row and reason of each of these; `without`: how many of the kept rows lack
        a field; `boxes`: how many boxes come from a drawn line and how many from the source;
        `erased`: in how many pictures a line was erased; `read_by`: how many captions were read by
        rules and how many by the language model.

    Raises
    ------
    ValueError
        A setting is wrong, or no row is left; the message says why rows were left out.
    OSError
        The endpoint fails.

    Examples
    --------
    >>> from medtune.boxes import draw_box
    >>> plain = Image.new("RGB", (200, 200), "gray")
    >>> caption = "The region of interest shows the liver. A cyst is seen within it."
    >>> rows = {
    ...     "image": [draw_box(plain, (0.1, 0.2, 0.5, 0.6)), plain],
    ...     "id": ["a", "b"],
    ...     "caption": [caption, caption],
    ... }
    >>> pairs = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    >>> found, report = add_regions(pairs)
    >>> found[0]["roi"], found[0]["structure"], found[0]["target_diag"]
    ([0.1, 0.2, 0.5, 0.6], 'liver', 'A cyst is seen within it.')
    >>> report["dropped"]
    {'no drawn box': 1}
    """
    _check_settings(required, several, decoys)
    # undecoded, so that a picture that cannot be read is a row that is left out and not an error
    raw = pairs.cast_column("image", datasets.Image(decode=False))
    seen = []
    for row in tqdm(raw, desc="finding boxes", disable=len(raw) < 500):
        seen.append(_look(row, several))
    _read_captions(raw, seen, endpoint)
    _leave_out_incomplete(seen, required)
    kept = _numbers_kept(seen)
    if kept:
        raw = _write_rows(
            raw.select(kept), [seen[number] for number in kept], decoys if erase else None, seed
        )
        still_drawn = list(raw["still_drawn"])
        for number, drawn in zip(kept, still_drawn, strict=True):
            if drawn:
                seen[number].reason = STILL_DRAWN
        raw = raw.select([i for i, drawn in enumerate(still_drawn) if not drawn])
        raw = raw.remove_columns("still_drawn")
    report = _report(pairs, seen, erase=erase)
    if not report["kept"]:
        raise ValueError(f"no row is left of {len(pairs)}: {report['dropped']}")
    return raw.cast_column("image", datasets.Image()), report


def _numbers_kept(seen: Sequence[_Seen]) -> list[int]:
    return [number for number, one in enumerate(seen) if one.reason is None]


def _check_settings(required: Sequence[str], several: str, decoys: int) -> None:
    unknown = sorted(set(required) - set(FIELDS))
    if unknown:
        raise ValueError(f"required={unknown}: there are {', '.join(FIELDS)}")
    if several not in ("drop", "largest"):
        raise ValueError(f"several={several}: choose drop or largest")
    if decoys < 0:
        raise ValueError(f"decoys={decoys}: must be 0 or more")


# ------------------------------------------------------------ what is drawn


def _open(row: Mapping[str, Any]) -> Image.Image:
    """Open the picture of a row that is fine; a JPEG stays one, so that its tables are known."""
    image = Image.open(io.BytesIO(picture_bytes(row["image"])))
    upright = image.getexif().get(0x0112, 1) == 1
    if image.format == "JPEG" and image.mode in ("RGB", "L") and upright:
        return image
    return to_rgb(image)


def _look(row: Mapping[str, Any], several: str) -> _Seen:
    """Find the region of a row: the one that the source knows, else the one that is drawn."""
    reason = reject_reason(dict(row))
    if reason:
        return _Seen(reason=reason)
    try:
        known = check_box(row.get("roi"), "it")
    except ValueError as error:
        return _Seen(reason=f"roi: {error}")
    outlines = find_outlines(_open(row))
    if known:
        return _Seen(known, outlines)
    if len(outlines) > 1 and several == "drop":
        return _Seen(outlines=outlines, reason=SEVERAL_BOXES)
    box = list(outlines[0].box) if outlines else None
    return _Seen(box, outlines)


# ------------------------------------------------------------ what is said


def _read_captions(
    raw: datasets.Dataset, seen: Sequence[_Seen], endpoint: Mapping[str, Any] | None
) -> None:
    """Read the captions of the rows that are still in, and note what they say, and who read them.

    What the source says itself counts before it.
    """
    # without the pictures, which nobody needs to read words
    rows = raw.remove_columns("image")
    numbers = _numbers_kept(seen)
    by_llm: list[Caption | None] = [None] * len(numbers)
    if endpoint:
        texts = [rows[number]["caption"] for number in numbers]
        # what stays wrong is read by rules, and counted
        by_llm = extract_with_llm(texts, **{"strict": False, **endpoint})
    for number, answer in zip(numbers, by_llm, strict=True):
        row = rows[number]
        caption = answer or parse_caption(row["caption"])
        seen[number].read_by = "language model" if answer else "rules"
        for name in WORDS:
            seen[number].words[name] = row.get(name) or getattr(caption, name)


def _leave_out_incomplete(seen: Sequence[_Seen], required: Sequence[str]) -> None:
    """Note the reason where a row lacks what is required."""
    for one in seen:
        for name in required:
            value = one.box if name == "roi" else one.words.get(name)
            if one.reason is None and value is None:
                one.reason = MISSING[name]


# ------------------------------------------------------------ what is written


def _write_rows(
    raw: datasets.Dataset, seen: Sequence[_Seen], decoys: int | None, seed: int
) -> datasets.Dataset:
    """Give rows their new columns, and erase their lines with so many decoys; None leaves them."""
    pool = [one.box for one in seen if one.box]

    def write(row: dict[str, Any], number: int) -> dict[str, Any]:
        one = seen[number]
        new = {"roi": one.box, "decoys": [], "still_drawn": False, **one.words}
        if decoys is None or not one.outlines:
            return new
        if "has_box" in row:
            new["has_box"] = False
        image = _open(row)
        beside = _choose_decoys(image, one, pool, decoys, random.Random(f"{seed} {number}"))
        erased = _erase(image, one.outlines, beside)
        file = io.BytesIO()
        erased.save(file, "PNG")
        new["image"] = {"bytes": file.getvalue(), "path": None}
        new["decoys"] = beside
        new["still_drawn"] = bool(find_boxes(erased))
        return new

    features = raw.features.copy()
    features["roi"] = _BOX
    features["decoys"] = datasets.List(_BOX)
    features["still_drawn"] = datasets.Value("bool")
    for name in WORDS:
        features[name] = datasets.Value("string")
    return raw.map(write, with_indices=True, features=features)


def _choose_decoys(
    image: Image.Image,
    one: _Seen,
    pool: Sequence[list[float]],
    count: int,
    rng: random.Random,
) -> list[list[float]]:
    """Draw boxes of other pictures that fit this one and are not nearly its own."""
    width = max(outline.width for outline in one.outlines)
    true = one.box or one.outlines[0].box
    chosen: list[list[float]] = []
    for _ in range(_TRIES * count):
        if len(chosen) == count:
            break
        box = rng.choice(pool)
        thinnest = min((box[2] - box[0]) * image.width, (box[3] - box[1]) * image.height)
        far = all(iou(box, other) < _MOST_OVERLAP for other in (true, *chosen))
        if far and thinnest >= 2 * width + 1:
            chosen.append(box)
    return chosen


def _erase(
    image: Image.Image, outlines: Sequence[Outline], decoys: Sequence[Sequence[float]]
) -> Image.Image:
    """Erase all lines of a picture, and as many that were never there."""
    first, *others = outlines
    width = max(outline.width for outline in outlines)
    also = [outline.box for outline in others]
    return erase_box(image, first.box, width=width, decoys=[*also, *decoys])


# ------------------------------------------------------------ what is reported


def _report(pairs: datasets.Dataset, seen: Sequence[_Seen], *, erase: bool) -> dict[str, Any]:
    """Count what was kept, and name what was not."""
    names = list(pairs["id"])
    left_out = []
    for number, one in enumerate(seen):
        if one.reason:
            left_out.append({"id": names[number], "row": number, "reason": one.reason})
    kinds = Counter(_kind(entry["reason"]) for entry in left_out)

    numbers = _numbers_kept(seen)
    kept = [seen[number] for number in numbers]
    without = {"roi": sum(one.box is None for one in kept)}
    for name in WORDS:
        without[name] = sum(one.words[name] is None for one in kept)
    from_source = 0
    if "roi" in pairs.column_names:
        given = list(pairs["roi"])
        from_source = sum(bool(given[number]) for number in numbers)
    with_line = sum(bool(one.outlines) for one in kept)
    return {
        "rows": len(pairs),
        "kept": len(kept),
        "dropped": dict(kinds.most_common()),
        "left_out": left_out,
        "without": without,
        "boxes": {
            "of a drawn line": len(kept) - without["roi"] - from_source,
            "of the source": from_source,
        },
        "erased": with_line if erase else 0,
        "read_by": dict(Counter(one.read_by for one in kept)),
    }


def _kind(reason: str) -> str:
    """Shorten a reason of `reject_reason`, which tells details of a row, to its column."""
    if reason in (NO_BOX, SEVERAL_BOXES, STILL_DRAWN, *MISSING.values()):
        return reason
    return f"{reason.split(':')[0]} cannot be used"
