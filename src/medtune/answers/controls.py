"""Control pictures: a model that looks at its picture answers otherwise when it is shown another.

`grey_picture` and `no_picture` are for the `image_transform` of `generate_answers`,
`shuffle_pictures` for its `pictures_from`.
"""

import random
from collections import Counter
from typing import Any

from PIL import Image

from .prompts import prompt_of, undecoded


def grey_picture(image: Image.Image) -> Image.Image:
    """Return an even grey picture of the same size.

    Examples
    --------
    >>> grey_picture(Image.new("RGB", (40, 30))).getpixel((0, 0))
    (128, 128, 128)
    """
    return Image.new("RGB", image.size, (128, 128, 128))


def no_picture(image: Image.Image) -> None:
    """Show no picture: the question alone is asked."""


def shuffle_pictures(dataset: Any, seed: int = 0) -> list[int]:
    """Choose for each sample another row whose pictures it is shown, to give as `pictures_from`.

    Each row's pictures are shown once, and none to its own row: a derangement. No sample gets a
    picture of its own structure (column `structure`, else of its own caption), unless more than
    half of all samples share it: then as few as possible do.

    Parameters
    ----------
    dataset : `datasets.Dataset` or list of dicts, records or pairs.
    seed : the same seed gives the same rows again.

    Returns
    -------
    list of int : for each row, in order, the number of the row whose pictures it is shown.

    Raises
    ------
    ValueError : fewer than two samples.

    Examples
    --------
    >>> rows = [{"structure": name} for name in ("liver", "liver", "spleen", "spleen")]
    >>> sorted(shuffle_pictures(rows)[:2])
    [2, 3]
    """
    structures = [row.get("structure") or prompt_of(row).reference for row in undecoded(dataset)]
    total = len(structures)
    if total < 2:
        raise ValueError("shuffle_pictures needs at least two samples")
    rng = random.Random(seed)
    counts = Counter(structures)
    donors = _far_rows(structures, counts, rng)

    def allowed(row: int, donor: int) -> bool:
        other_structure = structures[row] != structures[donor] or len(counts) == 1
        return row != donor and other_structure

    # so far neighbours get neighbours: random exchanges that keep the rule mix them
    for _ in range(20 * total):
        first = rng.randrange(total)
        second = rng.randrange(total)
        if allowed(first, donors[second]) and allowed(second, donors[first]):
            donors[first], donors[second] = donors[second], donors[first]
    return [donors[row] for row in range(total)]


def _far_rows(structures: list[str], counts: Counter, rng: random.Random) -> dict[int, int]:
    """Give each row a donor of another structure, wherever that can be.

    The rows are sorted so that those of a structure stand together, the largest structure first. A
    step as long as the largest structure leads out of each.
    """
    total = len(structures)
    ties = [rng.random() for _ in structures]
    rows = sorted(
        range(total), key=lambda row: (-counts[structures[row]], structures[row], ties[row])
    )
    largest = counts[structures[rows[0]]]
    step = largest % total or 1  # with one structure alone, the next row has to do
    donors = {}
    for place, row in enumerate(rows):
        donors[row] = rows[(place + step) % total]
    return donors
