"""Find pictures that are nearly the same: hash each one, then look for hashes that are close.

Needs numpy 2 and pillow.

The hash has 256 bits, one for each low frequency of the grey picture: is it above or below the
median of them all? Saving again, rescaling and brightening hardly change that. A cut border does,
for every structure moves. So the hash is also taken of 16 slightly trimmed views, and two pictures
are alike when the whole of one is close to any view of the other.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_DISTANCE = 20
"""Bits, of 256, in which two pictures that are nearly the same may differ (see `near_pairs`)."""

SIDE = 128
"""Pixels of the thumbnail's side."""

LOW = 16
"""Frequencies that are kept along each axis; the lowest is the mean."""

# What a trim cuts off one axis, as shares of its length: before and after.
TRIMS = (
    (0, 0),
    (0.01, 0.01),
    (0.02, 0.02),
    (0.03, 0.03),
    (0.045, 0.045),
    (0.02, 0),
    (0, 0.02),
    (0.04, 0),
    (0, 0.04),
)

# Each view is a trim of the rows and a trim of the columns, as numbers in TRIMS.
VIEWS = (
    (0, 0),  # the whole picture
    (1, 1), (2, 2), (3, 3), (4, 4),  # all four sides trimmed
    (5, 0), (6, 0), (7, 0), (8, 0),  # the top or the bottom
    (0, 5), (0, 6), (0, 7), (0, 8),  # the left or the right side
    (5, 5), (5, 6), (6, 5), (6, 6),  # a corner
)  # fmt: skip

BITS = LOW * LOW
"""Bits of a hash, which are held as four numbers of 64 bits."""

WORD_BITS = 16
WORDS = BITS // WORD_BITS

_SMALL_SET = 500  # pictures below which comparing all of them is faster than an index
_CANDIDATES_AT_ONCE = (
    1 << 21
)  # pairs that are measured in one go: bounds the memory to some hundred MB
_MANY_COPIES = 1024  # pairs of equal pictures above which only those with the first are listed


def picture_hash(image: Image.Image) -> np.ndarray:
    """Hash a picture so that nearly the same pictures get nearly the same bits.

    Parameters
    ----------
    image : an upright picture of 8 bits a channel; transparency and EXIF rotation are not looked
        at, and deeper pictures must be brought to 8 bits first.

    Returns
    -------
    numpy.ndarray : (17, 4) uint64, the 256 bits of the whole picture and of its 16 trimmed views.

    Examples
    --------
    >>> from PIL import Image
    >>> picture = Image.effect_mandelbrot((200, 200), (-2, -1, 1, 1.2), 50)
    >>> pictures = [picture, picture.rotate(90), picture.resize((150, 150))]
    >>> hashes = [picture_hash(each) for each in pictures]
    >>> hashes[0].shape
    (17, 4)
    >>> [(i, j) for i, j, distance in near_pairs(hashes)]
    [(0, 2)]
    """
    return hash_views(view_spectra(thumbnail(image)))


def thumbnail(image: Image.Image) -> np.ndarray:
    """Shrink a picture to (128, 128) float32 grey values, 0 to 255, whatever its proportions."""
    # BOX averages whole blocks, which is fast, but it would leave blocks in what must be enlarged.
    large = min(image.size) >= SIDE
    kernel = Image.Resampling.BOX if large else Image.Resampling.BILINEAR
    return np.asarray(image.convert("L").resize((SIDE, SIDE), kernel), np.float32)


def view_spectra(small: np.ndarray) -> np.ndarray:
    """Give the low frequencies of each view of a thumbnail, as (17, 256) float32.

    Nothing is cut out: a cosine wave that is stretched over the trimmed part alone says the same.
    """
    waves = _trimmed_waves()  # (9 * 16, 128)
    # Two products give each trim of the rows with each trim of the columns: 81 spectra, of which
    # the views are 17. That is still faster than 17 pairs of small products.
    spectra = (waves @ small @ waves.T).reshape(len(TRIMS), LOW, len(TRIMS), LOW)
    row_trims = [rows for rows, _ in VIEWS]
    column_trims = [columns for _, columns in VIEWS]
    return spectra[row_trims, :, column_trims].reshape(len(VIEWS), BITS)


@functools.cache
def _trimmed_waves() -> np.ndarray:
    """Make the cosine waves of each trim of an axis, (9 * 16, 128) float32."""
    before, after = np.array(TRIMS).T[:, :, None, None]  # (9, 1, 1) each
    # where each pixel's edges lie in the trimmed axis, which reaches from 0 to 1
    edges = (np.arange(SIDE + 1) / SIDE - before) / (1 - before - after)  # (9, 1, 129)
    middles = (edges[..., :-1] + edges[..., 1:]) / 2  # (9, 1, 128)
    shares = np.diff(edges.clip(0, 1))  # what of each pixel is left; 0 for those trimmed off
    frequencies = np.arange(LOW)[:, None]  # (16, 1)
    waves = np.cos(np.pi * frequencies * middles) * shares  # (9, 16, 128)
    waves[:, 0] *= 0.5**0.5  # the usual weight of the mean in an orthonormal cosine transform
    return waves.reshape(-1, SIDE).astype(np.float32)


def hash_views(spectra: np.ndarray) -> np.ndarray:
    """Turn spectra (17, 256) into bits, above the median or not: (17, 4) uint64."""
    bits = spectra > np.median(spectra, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)


def likeness_feature(spectra: np.ndarray) -> np.ndarray:
    """Give the whole picture's spectrum as a vector of length 1, (256,) float32, without the mean.

    A dot product of two such vectors is a cosine, 1 for pictures that look the same. A picture of
    one grey alone has the vector 0.
    """
    feature = spectra[0].copy()
    feature[0] = 0  # the mean brightness says nothing about what is shown
    return feature / (np.linalg.norm(feature) or 1)


# --- the search -----------------------------------------------------------------------------------


def near_pairs(
    hashes: np.ndarray | Sequence[np.ndarray],
    max_distance: int = MAX_DISTANCE,
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[tuple[int, int, int]]:
    """List pairs (i, j, distance), i < j, of pictures that are nearly the same.

    The distance counts the bits, of 256, in which one picture's hash differs from the other's or
    from that of one of its trimmed views. On chest X-rays two patients are 60 or more apart, two
    films of one patient 48 or more; the same film saved again, rescaled, brightened or trimmed by
    up to 5% is within 20. Neighbouring slices of a CT (2.5 mm) often are, slices 7.5 mm apart are
    not. A picture that is there more than 32 times is listed against its first row only.

    Not all pairs are compared: of the 16 words of two hashes that differ in less than 32 bits, one
    word differs in at most one bit (multi-index hashing, Norouzi et al. 2012,
    https://arxiv.org/abs/1307.2982). Twice the pictures still take four times as long in the end:
    go through a set of many millions in parts that belong together.

    Parameters
    ----------
    hashes : (n, 17, 4) uint64, or a list of what `picture_hash` gave.
    max_distance : bits that may differ, 0 to 256; from 48 on all pairs are compared, which is slow.
    progress : wraps the 16 rounds of the search, such as `tqdm`.

    Raises
    ------
    ValueError : the hashes have another shape.

    Examples
    --------
    >>> import numpy as np
    >>> hashes = np.zeros((2, 17, 4), np.uint64)
    >>> hashes[1] = 0b111
    >>> near_pairs(hashes)
    [(0, 1, 12)]
    """
    hashes = np.asarray(hashes, np.uint64).reshape(-1, len(VIEWS), BITS // 64)
    classes = _equal_rows(hashes)
    pairs = []
    for (low, high), distance in _class_distances(hashes, classes, max_distance, progress).items():
        for i, j in _row_pairs(classes[low], classes[high]):
            pairs.append((i, j, distance))
    return sorted(pairs)


def _equal_rows(hashes: np.ndarray) -> list[list[int]]:
    """Put rows whose bits are all equal into one class: copies of a file take part only once."""
    rows = defaultdict(list)
    for row, bits in enumerate(hashes):
        rows[bits.tobytes()].append(row)
    return list(rows.values())


def _class_distances(
    hashes: np.ndarray, classes: list[list[int]], limit: int, progress: Callable
) -> dict[tuple[int, int], int]:
    """Give the distance of each pair of classes (low, high) within the limit.

    A class is at distance 0 from itself.
    """
    first_rows = np.array([rows[0] for rows in classes], dtype=np.int64)
    views = hashes[first_rows]  # (classes, 17, 4)
    search = _Search(whole=views[:, 0].copy(), views=views.reshape(-1, BITS // 64), limit=limit)
    one, other, distances = _close_views(search, progress)
    lows = np.minimum(one, other).tolist()
    highs = np.maximum(one, other).tolist()

    closest = {(number, number): 0 for number in range(len(classes))}
    # a pair comes back once for every view that is close, from either side: the nearest counts
    for low, high, distance in zip(lows, highs, distances.tolist(), strict=True):
        closest[low, high] = min(distance, closest.get((low, high), distance))
    return closest


def _row_pairs(left: list[int], right: list[int]) -> set[tuple[int, int]]:
    """Pair the rows of two classes (or of one with itself), each pair once and in order.

    Many equal pictures would give a square of pairs; then only those with a first row are listed,
    which is enough to keep them all together.
    """
    if len(left) * len(right) <= _MANY_COPIES:
        listed = itertools.product(left, right)
    else:
        listed = [(left[0], j) for j in right] + [(i, right[0]) for i in left]
    pairs = set()
    for i, j in listed:
        if i != j:
            pairs.add((min(i, j), max(i, j)))
    return pairs


@dataclass(frozen=True)
class _Search:
    """What is compared with what.

    Attributes
    ----------
    whole : (n, 4) uint64, the hash of each whole picture.
    views : (n * 17, 4) uint64, the hashes of all views, picture by picture.
    limit : bits in which a whole picture and a view may differ.
    """

    whole: np.ndarray
    views: np.ndarray
    limit: int

    @property
    def flips(self) -> int:
        """Of 16 words that differ in `limit` bits together, one differs in at most this many."""
        return self.limit // WORDS

    @property
    def whole_words(self) -> np.ndarray:
        """The same bits as `whole`, as (n, 16) words of 16 bits."""
        return self.whole.view(np.uint16).reshape(-1, WORDS)

    @property
    def view_words(self) -> np.ndarray:
        """The same bits as `views`, as (n * 17, 16) words of 16 bits."""
        return self.views.view(np.uint16).reshape(-1, WORDS)


# Rows of `whole` and rows of `views` that may be close, (n,) each, and the word that says so.
_Candidates = tuple[np.ndarray, np.ndarray, int]


def _close_views(search: _Search, progress: Callable) -> np.ndarray:
    """Find which whole pictures are close to a view of another.

    Returns (3, found) int64: the whole picture, the picture that has the view, the distance.
    """
    # With three flips a word the index would be longer than comparing all.
    if search.flips > 2 or len(search.whole) < _SMALL_SET:
        candidates = _all_candidates(search)
    else:
        candidates = _indexed_candidates(search, progress)

    found = [np.zeros((3, 0), np.int64)]
    for rows, views, word in candidates:
        found.append(_measure(search, rows, views, word))
    return np.concatenate(found, axis=1)


def _measure(search: _Search, rows: np.ndarray, views: np.ndarray, word: int) -> np.ndarray:
    """Keep of the candidates those that are close, as (3, kept).

    Left out are a picture with its own views, and pairs that a word before `word` has found.
    """
    differing = search.whole[rows] ^ search.views[views]  # (candidates, 4)
    distances = np.bitwise_count(differing).sum(axis=1, dtype=np.int64)
    pictures = views // len(VIEWS)
    near = (distances <= search.limit) & (rows != pictures)
    rows = rows[near]
    views = views[near]

    before = search.whole_words[rows, :word] ^ search.view_words[views, :word]  # (near, word)
    new = (np.bitwise_count(before) > search.flips).all(axis=1)
    return np.stack([rows, pictures[near], distances[near]])[:, new]


def _all_candidates(search: _Search) -> Iterator[_Candidates]:
    """Yield every row of `whole` with every row of `views`, block by block."""
    rows = len(search.whole)
    views = len(search.views)
    for row, view in itertools.product(range(0, rows, 512), range(0, views, 4096)):
        block = np.mgrid[row : min(row + 512, rows), view : min(view + 4096, views)]
        yield block[0].ravel(), block[1].ravel(), 0


def _indexed_candidates(search: _Search, progress: Callable) -> Iterator[_Candidates]:
    """Yield the rows of `whole` and `views` of which a word differs in at most `flips` bits."""
    masks = _flip_masks(search.flips)
    for word in progress(range(WORDS)):
        # The index of this word: the views in the order of their word, and where each of the
        # 65,536 values begins in that order.
        words = search.view_words[:, word]
        order = np.argsort(words, kind="stable")
        starts = np.searchsorted(words[order], np.arange((1 << WORD_BITS) + 1))
        for mask in masks:
            wanted = (search.whole_words[:, word] ^ np.uint16(mask)).astype(np.int64)
            for rows, views in _look_up(wanted, order, starts):
                yield rows, views, word


def _flip_masks(flips: int) -> list[int]:
    """List the words with at most `flips` bits set, that with none first."""
    masks = []
    for count in range(flips + 1):
        for bits in itertools.combinations(range(WORD_BITS), count):
            masks.append(sum(1 << bit for bit in bits))
    return masks


def _look_up(
    wanted: np.ndarray, order: np.ndarray, starts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each row with each view that has the word it wants, in blocks, as (rows, views).

    Parameters
    ----------
    wanted : (n,) the word that each row looks for.
    order, starts : the views with word w are `order[starts[w]:starts[w + 1]]`.
    """
    counts = starts[wanted + 1] - starts[wanted]  # (n,) how many views each row finds
    for begin, end in _blocks(counts):
        found = counts[begin:end]
        # Each row's places in `order` follow one another. So one long count is made, and moved for
        # each row by where its run begins in `order` minus where it begins in the count.
        moved = starts[wanted[begin:end]] - (np.cumsum(found) - found)
        places = np.arange(found.sum()) + np.repeat(moved, found)
        yield np.repeat(np.arange(begin, end), found), order[places]


def _blocks(counts: np.ndarray) -> list[tuple[int, int]]:
    """Cut the rows into blocks (begin, end) that have about as many candidates as fit in memory."""
    total = np.cumsum(counts)
    steps = np.arange(0, total[-1] + 1, _CANDIDATES_AT_ONCE)
    cuts = np.searchsorted(total, steps).tolist()
    return list(itertools.pairwise([*cuts, len(counts)]))
