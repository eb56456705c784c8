"""Set the answers about the slices of a series beside the one report that a doctor wrote."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

from medtune.captions import entities


def compare_with_report(answers: Iterable[str], report: str) -> list[dict[str, str]]:
    """List each finding that an answer or the report names: in which slices, and in the report?

    Findings are read by the rules that score captions. What is not said of any slice, and what only
    the answers say, stands there as well.

    Parameters
    ----------
    answers : about the slices of a series, in their order; they are counted from 1.
    report : text about the whole series.

    Returns
    -------
    list of dict : `finding`, the `slices` of which it is said, as "3, 7-9", how many `of` all these
        are, and what the `report` does: "says it", "denies it" or "is silent". First what the report
        says.

    Examples
    --------
    >>> answers = ["A cyst is seen.", "A cyst is seen.", "No ascites.", "A mass is seen."]
    >>> for row in compare_with_report(answers, "Hepatic cyst, gallstones. No mass."):
    ...     print(*row.values(), sep=" | ")
    cyst | 1-2 | 2 of 4 | says it
    stone | - | 0 of 4 | says it
    mass | 4 | 1 of 4 | denies it
    """
    said: dict[str, list[int]] = defaultdict(list)
    count = 0
    for number, answer in enumerate(answers, 1):
        count = number
        affirmed, _ = _findings(answer)
        for finding in affirmed:
            said[finding].append(number)
    in_report, denied = _findings(report)
    rows = []
    for finding in sorted({*said, *in_report}):
        does = "is silent"
        if finding in in_report:
            does = "says it"
        elif finding in denied:
            does = "denies it"
        rows.append(
            {
                "finding": finding,
                "slices": _ranges(said.get(finding, [])),
                "of": f"{len(said.get(finding, []))} of {count}",
                "report": does,
            }
        )
    order = ["says it", "denies it", "is silent"]
    return sorted(rows, key=lambda row: order.index(row["report"]))


def _findings(text: str) -> tuple[set[str], set[str]]:
    """Return the findings that a text affirms, and those that it only denies."""
    affirmed = set()
    denied = set()
    for kind, value, negated in entities(text):
        if kind == "finding":
            (denied if negated else affirmed).add(value)
    return affirmed, denied - affirmed


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers short.

    Examples
    --------
    >>> _ranges([3, 7, 8, 9]), _ranges([])
    ('3, 7-9', '-')
    """
    if not numbers:
        return "-"
    starts = [numbers[0]]
    ends = []
    for one, following in pairwise(numbers):
        if following != one + 1:
            ends.append(one)
            starts.append(following)
    ends.append(numbers[-1])
    parts = []
    for start, end in zip(starts, ends, strict=True):
        parts.append(str(start) if start == end else f"{start}-{end}")
    return ", ".join(parts)
