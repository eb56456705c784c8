"""Find duplicates, split by patient, and prove that a split does not leak.

Near-duplicates are found by a perceptual hash of 256 bits: the low frequencies of the grey picture, above or below
their median. It is taken of the whole picture and of 16 slightly trimmed views, so that a cut border is seen through.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from .data import picture_bytes, to_rgb

if TYPE_CHECKING:
    import numpy as np

MAX_DISTANCE = 20  # see near_duplicates
SPLITS = ("train", "validation", "test")
SIDE, LOW = 128, 16  # pixels of the thumbnail's side; frequencies kept along it
TRIMS = ((0, 0), (0.01, 0.01), (0.02, 0.02), (0.03, 0.03), (0.045, 0.045), (0.02, 0), (0, 0.02), (0.04, 0), (0, 0.04))
VIEWS = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 0), (6, 0), (7, 0), (8, 0), (0, 5), (0, 6), (0, 7), (0, 8),
         (5, 5), (5, 6), (6, 5), (6, 6))  # fmt: skip  # trims of rows and columns: none, all sides, one side, a corner


class Fingerprints(NamedTuple):
    """What the audit keeps of each picture, 1.7 KB."""

    digests: list[str | None]  # SHA-256 of the bytes, None when the picture cannot be read
    hashes: np.ndarray  # (n, 17, 4) uint64: 256 bits of the whole picture, then of each trimmed view
    features: np.ndarray  # (n, 256) float32: the low frequencies as a unit vector; a dot product is a likeness
    unreadable: list[int]


def fingerprint(dataset: Iterable[dict], *, workers: int = 2) -> Fingerprints:
    """Read every picture once and keep what the other functions need; memory does not grow with the pictures' size.

    Parameters
    ----------
    dataset : a Dataset, an IterableDataset, or any rows with an `image` that `medtune.data.picture_bytes` takes.
    workers : threads; Pillow decodes outside Python's lock.

    Examples
    --------
    >>> fingerprint([{"image": b"no picture"}]).unreadable
    [0]
    """

    import numpy as np
    from threadpoolctl import threadpool_limits

    results, total = [], len(dataset) if hasattr(dataset, "__len__") else None
    cells = iter(tqdm(_cells(dataset), "Reading pictures", total, delay=2))
    # One BLAS thread in each of ours: on a busy machine they would wait for each other, 40 times slower.
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        # never more pictures in memory than these
        while block := list(pool.map(_fingerprint, itertools.islice(cells, 16 * workers))):
            results += block
    digests = [digest for digest, _, _ in results]
    hashes = np.array([bits for _, bits, _ in results], np.uint64).reshape(-1, len(VIEWS), 4)
    features = np.array([feature for _, _, feature in results], np.float32).reshape(-1, LOW * LOW)
    return Fingerprints(digests, hashes, features, [row for row, digest in enumerate(digests) if digest is None])


def _cells(dataset: Iterable[dict]) -> Iterator[Any]:
    if hasattr(dataset, "cast_column"):
        from datasets import Image

        dataset = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
    return (row["image"] for row in dataset)


def _fingerprint(cell: Any) -> tuple:
    import numpy as np
    from PIL import Image

    try:
        data = picture_bytes(cell)
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data))
        if image.format == "JPEG" and image.mode in ("L", "RGB") and "exif" not in image.info:
            image.draft("L", (SIDE, SIDE))  # decoded at a fraction of its size, many times faster
        else:
            image = to_rgb(image)
        filter_ = Image.Resampling.BOX if min(image.size) >= SIDE else Image.Resampling.BILINEAR
        small = np.asarray(image.convert("L").resize((SIDE, SIDE), filter_), np.float32)
    except Exception:  # decoders raise many kinds
        return None, np.zeros((len(VIEWS), 4)), np.zeros(LOW * LOW)
    rows, columns = zip(*VIEWS, strict=True)
    spectra = (_waves() @ small @ _waves().T).reshape(len(TRIMS), LOW, len(TRIMS), LOW)[rows, :, columns]
    spectra = spectra.reshape(len(VIEWS), LOW * LOW)
    bits = np.packbits(spectra > np.median(spectra, axis=1, keepdims=True), axis=1).view(np.uint64)
    feature = spectra[0] * (np.arange(LOW * LOW) > 0)  # the mean brightness says nothing
    return hashlib.sha256(data).hexdigest(), bits, feature / (np.linalg.norm(feature) or 1)


@functools.cache
def _waves() -> np.ndarray:
    """Cosine waves over each trimmed axis, (9 * 16, 128): two products with them give the spectra of all views."""

    import numpy as np

    before, after = np.array(TRIMS).T[:, :, None, None]
    edges = (np.arange(SIDE + 1) / SIDE - before) / (1 - before - after)  # (9, 1, 129)
    waves = np.cos(np.pi * np.arange(LOW)[:, None] * (edges[..., :-1] + edges[..., 1:]) / 2) * np.diff(edges.clip(0, 1))
    waves[:, 0] *= 0.5**0.5
    return waves.reshape(-1, SIDE).astype(np.float32)


# --- duplicates ---------------------------------------------------------------------------------------------------


def exact_duplicates(
    dataset: Iterable[dict], *, pixels: bool = False, fingerprints: Fingerprints | None = None
) -> list[list[int]]:
    """List the rows that hold the same file, or with `pixels` the same RGB pixels, whatever the file format.

    Examples
    --------
    >>> import io, PIL.Image
    >>> PIL.Image.new("L", (9, 9), 7).save(png := io.BytesIO(), "PNG")
    >>> exact_duplicates([{"image": png.getvalue()}, {"image": png.getvalue()}])
    [[0, 1]]
    """

    from PIL import Image

    marks = fingerprints or fingerprint(dataset)
    keys: list[Any] = list(marks.digests)
    if pixels:  # the same pixels have nearly the same hash, so only near-duplicates need to be decoded in full
        likely = {row for *rows, _ in near_duplicates(dataset, fingerprints=marks) for row in rows}
        for row, cell in enumerate(_cells(dataset)):
            if row in likely:
                image = to_rgb(Image.open(io.BytesIO(picture_bytes(cell))))
                keys[row] = image.size, hashlib.sha256(image.tobytes()).digest()
    return _alike(keys, 2)


def duplicate_captions(dataset: Any) -> list[list[int]]:
    """List the rows whose captions are the same but for case and white space.

    Examples
    --------
    >>> duplicate_captions({"caption": ["A liver.", "a  liver. ", "A lung."]})
    [[0, 1]]
    """
    return _alike(_plain_captions(dataset), 2)


def _plain_captions(dataset: Any) -> list[str | None]:
    return [" ".join((caption or "").casefold().split()) or None for caption in dataset["caption"]]


def _alike(keys: Iterable, least: int = 1) -> list[list[int]]:
    """List the rows of each key that `least` rows or more have; rows with the key None are left out."""
    rows = defaultdict(list)
    for row, key in enumerate(keys):
        if key is not None:
            rows[key].append(row)
    return [same for same in rows.values() if len(same) >= least]


def near_duplicates(
    dataset: Iterable[dict], *, max_distance: int = MAX_DISTANCE, fingerprints: Fingerprints | None = None
) -> list[tuple[int, int, int]]:
    """List pairs of rows (i, j, distance), i < j, whose pictures are nearly the same.

    The distance counts the bits, of 256, in which one picture's hash differs from the other's or from that of one of
    its trimmed views. On chest X-rays two patients are 60 or more apart, two films of one patient 48 or more; the same
    film saved again, rescaled, brightened or trimmed by up to 5% is within 20. Neighbouring slices of a CT (2.5 mm)
    often are, slices 7.5 mm apart are not. A file that is there more than 32 times is listed against its first row.

    Not all pairs are compared: of the 16 words of two hashes that differ in less than 32 bits, one word differs in at
    most one bit (multi-index hashing, Norouzi et al. 2012, https://arxiv.org/abs/1307.2982). Twice the pictures still
    take four times as long in the end: go through a set of many millions in parts that belong together.
    """

    import numpy as np

    marks = fingerprints or fingerprint(dataset)
    read = zip(marks.digests, marks.hashes, strict=True)
    classes = _alike(digest and bits.tobytes() for digest, bits in read)  # rows with one fingerprint take part once
    first = np.array([rows[0] for rows in classes], dtype=np.int64)
    a, b, bits = _join(marks.hashes[first, 0], marks.hashes[first].reshape(-1, 4), max_distance)
    closest = {(c, c): 0 for c in range(len(classes))}
    for low, high, distance in zip(np.minimum(a, b).tolist(), np.maximum(a, b).tolist(), bits.tolist(), strict=True):
        closest[low, high] = min(distance, closest.get((low, high), distance))
    found = []
    for (low, high), distance in closest.items():
        left, right = classes[low], classes[high]
        many = len(left) * len(right) > 1024
        ends = {(min(i, j), max(i, j)) for i in left for j in right if not many or i == left[0] or j == right[0]}
        found += [(i, j, distance) for i, j in ends if i != j]
    return sorted(found)


def _join(left: np.ndarray, right: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find (row of left, picture of right, distance) up to the limit; right holds all views of each picture in turn."""

    import numpy as np

    flips = limit // 16
    masks = [sum(1 << bit for bit in bits) for k in range(flips + 1) for bits in itertools.combinations(range(16), k)]
    words, table = left.view(np.uint16).reshape(-1, 16), right.view(np.uint16).reshape(-1, 16)
    found = [np.zeros((3, 0), np.int64)]

    def keep(i, j, band=0):
        bits = np.bitwise_count(left[i] ^ right[j]).sum(1, dtype=np.int64)
        near = (bits <= limit) & (i != j // len(VIEWS))
        i, j, bits = i[near], j[near], bits[near]
        new = (np.bitwise_count(words[i, :band] ^ table[j, :band]) > flips).all(1)  # not met in an earlier word
        found.append(np.stack([i, j // len(VIEWS), bits])[:, new])

    if flips > 2 or len(left) < 500:  # few pictures or a loose limit: compare all, block by block
        for i, j in itertools.product(range(0, len(left), 512), range(0, len(right), 4096)):
            keep(*(x.ravel() for x in np.mgrid[i : min(i + 512, len(left)), j : min(j + 4096, len(right))]))
        return tuple(np.concatenate(found, axis=1))
    for band, mask in tqdm([*itertools.product(range(16), masks)], "Comparing pictures", delay=2):
        if mask == 0:
            order = np.argsort(table[:, band], kind="stable")
            starts = np.searchsorted(table[order, band], np.arange(65_537))
        key = (words[:, band] ^ np.uint16(mask)).astype(np.int64)
        count = starts[key + 1] - starts[key]
        total = np.cumsum(count)
        cuts = np.searchsorted(total, np.arange(0, total[-1] + 1, 1 << 21)).tolist()  # bounds the memory
        for begin, end in zip(cuts, [*cuts[1:], len(left)], strict=True):
            n = count[begin:end]
            j = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n - starts[key[begin:end]], n)
            keep(np.repeat(np.arange(begin, end), n), order[j], band)
    return tuple(np.concatenate(found, axis=1))


# --- groups and splits --------------------------------------------------------------------------------------------


def assign_groups(
    dataset: Any, *, column: str | None = None, id_pattern: str | None = None,
    pairs: Iterable[tuple[int, int, int]] | None = None, fingerprints: Fingerprints | None = None,
) -> list[str]:  # fmt: skip
    r"""Say for each row which pictures must stay on one side of a split: patient, series or look-alikes.

    Parameters
    ----------
    column : column that names the patient or series (default: `group`, where the data have it, as DICOM series do); a
        row without a value is a group of its own.
    id_pattern : regular expression; its first parenthesis in the `id` is the group, such as r"^(patient\d+)_".
    pairs : near-duplicate pairs; groups that they connect become one. With neither column nor pattern the groups are
        the clusters of near-duplicates, looked for when `pairs` is not given.

    Raises
    ------
    ValueError : no such column, a bad pattern, or an id that it does not match.

    Examples
    --------
    >>> import datasets
    >>> assign_groups(datasets.Dataset.from_dict({"id": ["p1_a", "p2_a", "p1_b"]}), id_pattern=r"(p\d+)_")
    ['p1', 'p2', 'p1']
    """

    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if column is None and id_pattern is None and "group" in dataset.column_names and any(dataset["group"]):
        column = "group"
    if column:
        if column not in dataset.column_names:
            raise ValueError(f"no column {column!r} to group by (there are: {', '.join(dataset.column_names)})")
        names = [f"row-{row}" if value in (None, "") else str(value) for row, value in enumerate(dataset[column])]
    elif id_pattern:
        ids = list(dataset["id"])
        try:
            found = [re.search(id_pattern, name or "") for name in ids]
        except re.error as error:
            raise ValueError(f"id_pattern {id_pattern!r} is no regular expression: {error}") from None
        if None in found:
            bad = found.count(None), ids[found.index(None)]
            raise ValueError(f"id_pattern {id_pattern!r} does not match {bad[0]} of {len(ids)} ids, first {bad[1]!r}")
        names = [match[1] if match.re.groups else match[0] for match in found]
    else:
        names = [f"cluster-{row:05d}" for row in range(len(dataset))]
        pairs = near_duplicates(dataset, fingerprints=fingerprints) if pairs is None else pairs
    linked = np.array([(i, j) for i, j, *_ in pairs or ()], int).reshape(-1, 2)
    _, codes = np.unique(names, return_inverse=True)
    graph = coo_array((np.ones(len(linked)), codes[linked].T), shape=(len(names), len(names)))
    component = connected_components(graph, directed=False)[1][codes].tolist()
    first: dict[int, str] = {}
    return [first.setdefault(part, name) for part, name in zip(component, names, strict=True)]


def split_by_group(
    groups: Sequence[str], *, shares: Sequence[float] = (0.8, 0.1, 0.1), stratify: Sequence | None = None,
    seed: int = 0, names: Sequence[str] = SPLITS,
) -> list[str]:  # fmt: skip
    """Give every row a split so that no group is cut, shares come out as near as the groups allow, and none is empty.

    Groups are dealt out in random order, each to the split that lacks most of its kind; of several such deals the one
    nearest to the shares is kept. The result depends on groups, `stratify` and seed, not on the order of the rows.

    Parameters
    ----------
    groups : one group a row, from `assign_groups`.
    shares : how much of the rows each split should get; they need not sum to 1; 0 leaves a split empty.
    stratify : one value a row, such as the modality; every split gets its share of each value, where groups allow.

    Raises
    ------
    ValueError : fewer groups than splits, or shares that make no sense.

    Examples
    --------
    >>> split_by_group(["p1", "p1", "p2", "p3"], shares=(2, 1, 1))
    ['train', 'train', 'validation', 'test']
    """

    import numpy as np

    groups, kinds = list(groups), [str(kind) for kind in stratify] if stratify is not None else [""] * len(groups)
    used = [s for s, share in enumerate(shares) if share > 0]
    if len(shares) > len(names) or min(shares) < 0 or not used:
        raise ValueError(f"shares {tuple(shares)} must be at most {len(names)} numbers from 0, and not all 0")
    if len({*groups}) < len(used):
        raise ValueError(f"{len({*groups})} group(s) cannot fill {len(used)} splits uncut: give finer groups")
    rows, columns = Counter(zip(groups, kinds, strict=True)), sorted({*kinds})
    table = {group: np.array([float(rows[group, kind]) for kind in columns]) for group in sorted({*groups})}
    total = sum(table.values())
    chance, best, best_cost = random.Random(seed), {}, np.inf
    for _ in range(max(1, min(50, 20_000 // len(table)))):
        lacking = np.array(shares)[used, None] / sum(shares) * total
        deal: dict[str, int] = {}
        for group in chance.sample(list(table), len(table)):
            deal[group] = int(np.argmax((lacking / total) @ table[group]))
            lacking[deal[group]] -= table[group]
        for split in {*range(len(used))} - {*deal.values()}:  # fill it with the smallest group of the fullest split
            donor = Counter(deal.values()).most_common(1)[0][0]
            group = min((g for g in deal if deal[g] == donor), key=lambda g: table[g].sum())
            lacking[[donor, split]] += [table[group], -table[group]]
            deal[group] = split
        cost = float((np.abs(lacking) / total).sum())
        if cost < best_cost - 1e-9:
            best, best_cost = deal, cost
    return [names[used[best[group]]] for group in groups]


def audit_split(
    dataset: Any, groups: Sequence[str], splits: Sequence[str | None], *, max_distance: int = MAX_DISTANCE,
    fingerprints: Fingerprints | None = None, raise_on_leak: bool = True, seed: int = 0,
) -> dict:  # fmt: skip
    """Count what crosses a split, and fail unless it is nothing.

    Parameters
    ----------
    splits : one split a row; None for rows that stand in none, such as the gap between two blocks of slices.
    raise_on_leak : False gives the report whatever it says, for display.
    seed : of the random split with the same sizes that the report puts beside this one.

    Returns
    -------
    dict : the sizes of the splits; `groups_crossing`, `near_duplicates_crossing`, `exact_duplicates_crossing` (all must
        be 0); `captions_crossing`, captions that stand on both sides (no fault, but a warning about scores);
        `held_out_leaked`, the share of rows outside train with a group-mate or near-duplicate in it; the first 100
        `leaking_pairs` (i, j, distance); and the same counts for a `random_split`.

    Raises
    ------
    ValueError : a group or near-duplicate pair crosses, or a picture cannot be read and so cannot be cleared.
    """
    groups, splits = list(groups), list(splits)
    if not len(groups) == len(splits) == len(dataset):
        raise ValueError(f"{len(dataset)} rows, {len(groups)} groups and {len(splits)} splits: one a row is needed")
    marks = fingerprints or fingerprint(dataset)
    pairs = near_duplicates(dataset, max_distance=max_distance, fingerprints=marks)
    keys = {"groups": groups, "exact_duplicates": marks.digests, "captions": _plain_captions(dataset)}
    placed = [split for split in splits if split]
    drawn = iter(random.Random(seed).sample(placed, len(placed)))
    shuffled = [split and next(drawn) for split in splits]
    counts, crossing = _leaks(splits, keys, pairs)
    if raise_on_leak and marks.unreadable:
        raise ValueError(f"{len(marks.unreadable)} pictures cannot be read, so they cannot be cleared (first: row "
                         f"{marks.unreadable[0]}): take them out, see medtune.data.reject_reason")  # fmt: skip
    if raise_on_leak and (crossing or counts["groups_crossing"] or counts["exact_duplicates_crossing"]):
        what = f"{counts['groups_crossing']} groups and {len(crossing)} near-duplicate pairs cross it"
        first = ", first rows {} and {} at distance {}".format(*crossing[0]) if crossing else ""
        remedy = "join groups with assign_groups(..., pairs=near_duplicates(...)) and split again"
        raise ValueError(f"the split leaks: {what}{first}; {remedy}")
    members = dict.fromkeys(zip(groups, splits, strict=True))
    report = {"rows": dict(Counter(split or "unassigned" for split in splits))}
    report |= {"groups": dict(Counter(split for _, split in members if split)), "unreadable": len(marks.unreadable)}
    report |= {"near_duplicates": len(pairs), "max_distance": max_distance, **counts, "leaking_pairs": crossing[:100]}
    return report | {"random_split": _leaks(shuffled, keys, pairs)[0]}


def _leaks(splits: list[str | None], keys: dict[str, list], pairs: list[tuple]) -> tuple[dict, list[tuple]]:
    counts, reached = {}, set()  # reached: rows with something of theirs in train
    for name, values in keys.items():
        classes = [(rows, {splits[row] for row in rows if splits[row]}) for rows in _alike(values)]
        counts[f"{name}_crossing"] = sum(len(sides) > 1 for _, sides in classes)
        if name != "captions":
            reached |= {row for rows, sides in classes if "train" in sides for row in rows}
    crossing = [(i, j, d) for i, j, d in pairs if splits[i] and splits[j] and splits[i] != splits[j]]
    reached |= {row for i, j, _ in crossing for row, other in ((i, j), (j, i)) if splits[other] == "train"}
    held_out = {row for row, split in enumerate(splits) if split and split != "train"}
    counts["near_duplicates_crossing"] = len(crossing)
    return counts | {"held_out_leaked": round(len(held_out & reached) / (len(held_out) or 1), 4)}, crossing


# --- what a model must beat ---------------------------------------------------------------------------------------


def nearest_caption_copier(train, test, *, fingerprints: tuple[Fingerprints, Fingerprints] | None = None) -> list[str]:
    """Answer each test picture with the caption of the training picture that looks most like it.

    Likeness is the cosine of the two pictures' low frequencies. It knows nothing of medicine: what it scores on a split
    is what copying scores, and on a split that leaks that is a lot.
    """

    import numpy as np

    known, asked = fingerprints or (fingerprint(train), fingerprint(test))
    captions = list(train["caption"])
    blocks = (asked.features[i : i + 256] @ known.features.T for i in range(0, len(asked.features), 256))
    return [captions[row] for block in blocks for row in np.argmax(block, axis=1).tolist()]


def most_frequent_caption(train: Any) -> str:
    """Give the training caption that occurs most often, the first of them if several do.

    Examples
    --------
    >>> most_frequent_caption({"caption": ["A lung.", "A liver.", "A liver."]})
    'A liver.'
    """
    return Counter(train["caption"]).most_common(1)[0][0]
