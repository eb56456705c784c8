"""Find pictures that are nearly the same: hash each one, then look for hashes that are close.

Needs numpy 2, pillow and scipy.

The hash has 256 bits, one for each low frequency of the grey picture: is it above or below the
median of them all? Saving again, rescaling and brightening hardly change that. A cut border does,
for every structure moves. So the hash is also taken of 16 slightly trimmed views, and two pictures
are alike when the whole of one is close to any view of the other.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree

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

# Pictures below which comparing all of them is faster than an index.
_SMALL_SET = 500

# Pictures up to which no look-alike is missed: above, the exact search takes minutes, then days.
_EXACT_SET = 20_000

# Views that share a word with whole pictures, above which a set is as slow as a large one.
_MANY_CANDIDATES = 1 << 25

# Pairs that are measured in one go: bounds the memory to some hundred MB.
_CANDIDATES_AT_ONCE = 1 << 21

# Pictures whose views are looked up in one go, 9 MB of them.
_PICTURES_AT_ONCE = 1 << 14

# Pairs of equal pictures above which only those with the first are listed.
_MANY_COPIES = 1024

# Links above which a picture keeps so many of its nearest, and those that connect.
_MANY_LINKS = 1 << 18
_LINKS_OF_PICTURE = 32

# Links that wait until they are looked through.
_WAITING_LINKS = 1 << 22

# A distance from 0 to 256.
_DISTANCE_BITS = 9

# The large index: each round cuts the 32 bytes of a hash, in another order, into ten keys.
_ROUNDS = 4
_KEYS_OF_ROUND = 10
_KEY_BYTES = 3

# Pictures under one key above which a view is compared only with its neighbours among them.
_CROWD = 32


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
    exact: bool | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[tuple[int, int, int]]:
    """List pairs (i, j, distance), i < j, of pictures that are nearly the same.

    The distance counts the bits, of 256, in which one picture's hash differs from the other's or
    from that of one of its trimmed views. On chest X-rays two patients are 60 or more apart, two
    films of one patient 48 or more; the same film saved again, rescaled, brightened or trimmed by
    up to 5% is within 20. Neighbouring slices of a CT (2.5 mm) often are, slices 7.5 mm apart are
    not. A picture that is there more than 32 times is listed against its first row only. Of more
    than 260,000 pairs, each picture keeps those with the 32 that are most like it and those
    without which a chain of look-alikes would break: what belongs together stays together.

    Up to 20,000 pictures, unless thousands of them look the same, none is missed: of the 16 words
    of two hashes that differ in less than 32 bits, one word differs in at most one bit (multi-index
    hashing, Norouzi et al. 2012, https://arxiv.org/abs/1307.2982). That takes four times as long
    for twice the pictures. Other sets are compared only where three of the 32 bytes are equal (of
    less than 4 million pictures fewer bits), in 40 choices of three (locality sensitive hashing):
    the time grows with the pictures, and of pairs that differ in 20 bits, drawn at random, 99.4 in
    100 are found, of nearer ones more. `docs/scale.md` has what was measured.

    Parameters
    ----------
    hashes : (n, 17, 4) uint64, or a list of what `picture_hash` gave; may be mapped from a file.
    max_distance : bits that may differ, 0 to 256; more than 20 are always searched exactly, and
        from 48 on all pairs are compared, which is slow.
    exact : True misses none in a large set either, False always takes the faster way; by default
        the set decides.
    progress : wraps the rounds of the search, such as `tqdm`.

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
    if max_distance > MAX_DISTANCE:
        exact = True
    classes = _Classes.of(hashes)
    search = _Search(
        hashes=hashes,
        rows=classes.first_rows,
        whole=np.ascontiguousarray(hashes[classes.first_rows, 0]),
        limit=max_distance,
    )
    links = _close_classes(search, exact, progress)
    return sorted(_pairs_of_rows(links, classes))


@dataclass(frozen=True)
class _Classes:
    """Rows whose bits are all equal are one class: copies of a file take part only once.

    Attributes
    ----------
    first_rows : (classes,) the first row of each class, ascending.
    by_class : (n,) all rows, class by class, ascending in each.
    starts : (classes + 1,) where each class begins in `by_class`.
    """

    first_rows: np.ndarray
    by_class: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, hashes: np.ndarray) -> "_Classes":
        # 64 bits stand for the 4,352 of a row. Among 25 million rows the chance that two others
        # have the same is one in 60,000.
        keys = np.fromiter((hash(bits.tobytes()) for bits in hashes), np.int64, len(hashes))
        _, first_rows, numbers = np.unique(keys, return_index=True, return_inverse=True)
        # from the order of the keys, which is another in each process, to that of the rows
        order = np.argsort(first_rows)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        numbers = place[numbers]
        starts = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=len(order)))])
        return cls(first_rows[order], np.argsort(numbers, kind="stable"), starts)

    def rows(self, number: int) -> list[int]:
        """Give the rows of a class."""
        return self.by_class[self.starts[number] : self.starts[number + 1]].tolist()

    @property
    def repeated(self) -> np.ndarray:
        """Say of each class whether it has more than one row."""
        return np.diff(self.starts) > 1


def _pairs_of_rows(links: np.ndarray, classes: _Classes) -> list[tuple[int, int, int]]:
    """Turn links of classes, (n, 3), into pairs of rows with their distance."""
    repeated = classes.repeated
    single = ~repeated[links[:, :2]].any(axis=1)
    # the first rows ascend with the classes, so that the lower one stays in front
    one, other, distances = links[single].T
    columns = [classes.first_rows[one], classes.first_rows[other], distances]
    pairs = list(zip(*(column.tolist() for column in columns), strict=True))

    for low, high, distance in links[~single].tolist():
        for i, j in _row_pairs(classes.rows(low), classes.rows(high)):
            pairs.append((i, j, distance))
    for number in np.flatnonzero(repeated).tolist():
        rows = classes.rows(number)
        for i, j in _row_pairs(rows, rows):
            pairs.append((i, j, 0))
    return pairs


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
    """What is compared with what. A picture's number is its place in `rows`.

    Attributes
    ----------
    hashes : (all rows, 17, 4) uint64, where the views are read from.
    rows : (n,) the rows of `hashes` that take part.
    whole : (n, 4) uint64, the hash of each whole picture.
    limit : bits in which a whole picture and a view may differ.
    """

    hashes: np.ndarray
    rows: np.ndarray
    whole: np.ndarray
    limit: int

    @property
    def flips(self) -> int:
        """Of 16 words that differ in `limit` bits together, one differs in at most this many."""
        return self.limit // WORDS

    def views(self, begin: int, end: int) -> np.ndarray:
        """Read the hashes of the views of some pictures, (pictures * 17, 4)."""
        return self.hashes[self.rows[begin:end]].reshape(-1, BITS // 64)


@dataclass(frozen=True)
class _Candidates:
    """Whole pictures and views that may be close.

    Attributes
    ----------
    wholes : (n,) the numbers of the whole pictures.
    places : (n,) each one's view, as a place in `views`.
    views : (pictures * 17, 4) hashes of the views of pictures that follow one another.
    first : the number of the picture with which `views` begins.
    """

    wholes: np.ndarray
    places: np.ndarray
    views: np.ndarray
    first: int


def _close_classes(search: _Search, exact: bool | None, progress: Callable) -> np.ndarray:
    """Find pairs that are close, (found, 3) int64: number, higher number, distance."""
    # With three flips a word the index would be longer than comparing all.
    if len(search.whole) < _SMALL_SET or search.flips > 2:
        candidates = _all_candidates(search)
    elif exact or (exact is None and _is_easy(search)):
        candidates = _word_candidates(search, progress)
    else:
        candidates = _key_candidates(search, progress)

    links = _Links(len(search.whole))
    for some in candidates:
        links.add(_measure(search, some))
    return links.all()


def _is_easy(search: _Search) -> bool:
    """Say whether the exact search takes seconds."""
    if len(search.whole) > _EXACT_SET:
        return False
    view_words = search.views(0, len(search.rows)).view(np.uint16).reshape(-1, WORDS)
    whole_words = search.whole.view(np.uint16).reshape(-1, WORDS)
    candidates = 0
    for word in range(WORDS):
        found = np.bincount(view_words[:, word], minlength=1 << WORD_BITS)
        candidates += int(found[whole_words[:, word]].sum())
    return candidates <= _MANY_CANDIDATES


def _measure(search: _Search, some: _Candidates) -> np.ndarray:
    """Keep of the candidates those that are close, (found, 3); none is of a picture with itself."""
    pictures = some.first + some.places // len(VIEWS)
    others = np.flatnonzero(some.wholes != pictures)
    wholes = some.wholes[others]
    pictures = pictures[others]
    differing = search.whole[wholes] ^ some.views[some.places[others]]  # (others, 4)
    distances = np.bitwise_count(differing).sum(axis=1, dtype=np.int64)
    near = np.flatnonzero(distances <= search.limit)
    low = np.minimum(wholes[near], pictures[near])
    high = np.maximum(wholes[near], pictures[near])
    return np.stack([low, high, distances[near]], axis=1)


@dataclass
class _Links:
    """The pairs found so far, in bounded memory.

    A pair is one number, so that sorting is fast: low * pictures + high, then 9 bits of distance.

    Attributes
    ----------
    pictures : how many there are.
    kept : each pair once, with its smallest distance, ascending.
    new : what came since, where a pair may stand several times.
    waiting : how many stand in `new`.
    too_many : there were once more than `_MANY_LINKS`, so that not all are kept.
    """

    pictures: int
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    new: list[np.ndarray] = field(default_factory=list)
    waiting: int = 0
    too_many: bool = False

    def add(self, links: np.ndarray) -> None:
        """Take more in, (n, 3): number, higher number, distance."""
        low, high, distance = links.T.astype(np.uint64)
        pairs = low * np.uint64(self.pictures) + high
        # the same pair comes from several views: those of one block go at once
        packed = _first_of_pairs(pairs << np.uint64(_DISTANCE_BITS) | distance)
        self.new.append(packed)
        self.waiting += len(packed)
        # as many again as are kept: looking through all of them each time would take far longer
        if self.waiting > max(_WAITING_LINKS, len(self.kept)):
            self._tidy()

    def all(self) -> np.ndarray:
        """Give what is kept in the end, (n, 3)."""
        self._tidy()
        return self._unpacked()

    def _tidy(self) -> None:
        self.kept = _first_of_pairs(np.concatenate([self.kept, *self.new]))
        self.new = []
        self.waiting = 0
        self.too_many = self.too_many or len(self.kept) > _MANY_LINKS
        if self.too_many:
            self.kept = self.kept[_worth_keeping(self._unpacked(), self.pictures)]

    def _unpacked(self) -> np.ndarray:
        distance = self.kept & np.uint64((1 << _DISTANCE_BITS) - 1)
        low, high = np.divmod(self.kept >> np.uint64(_DISTANCE_BITS), np.uint64(self.pictures))
        return np.stack([low, high, distance], axis=1).astype(np.int64)


def _first_of_pairs(packed: np.ndarray) -> np.ndarray:
    """Keep each pair once, with its smallest distance: it is found from either side."""
    packed = np.sort(packed)
    pairs = packed >> np.uint64(_DISTANCE_BITS)
    first = np.ones(len(packed), bool)
    first[1:] = pairs[1:] != pairs[:-1]
    return packed[first]


def _worth_keeping(links: np.ndarray, pictures: int) -> np.ndarray:
    """Choose each picture's nearest links, and those without which a chain of them would break.

    Thinning again with more links gives what thinning once would have given: a link that is not
    among the nearest of some is not among those of more, and what it connected stays connected.

    Parameters
    ----------
    links : (n, 3) number, higher number, distance; ascending, each pair once.
    pictures : how many there are.
    """
    keep = _in_forest(links, pictures)
    for end in (0, 1):
        keep |= _is_near(links, pictures, end)
    return keep


def _is_near(links: np.ndarray, pictures: int, end: int) -> np.ndarray:
    """Say which links are among the nearest of the picture at this end of them."""
    own = links[:, end].astype(np.uint64)
    other = links[:, 1 - end].astype(np.uint64)
    distance = links[:, 2].astype(np.uint64)
    # one number to sort by, as in `_Links`: the picture, then how near, then the other one
    key = (own << np.uint64(_DISTANCE_BITS) | distance) * np.uint64(pictures) + other
    order = np.argsort(key)
    own = own[order]
    begins = np.ones(len(own), bool)
    begins[1:] = own[1:] != own[:-1]
    place = np.arange(len(own))
    first = np.maximum.accumulate(np.where(begins, place, 0))  # where each picture's links begin
    near = np.empty(len(own), bool)
    near[order] = place - first < _LINKS_OF_PICTURE
    return near


def _in_forest(links: np.ndarray, pictures: int) -> np.ndarray:
    """Say which links are enough to hold together what all of them do."""
    # scipy takes a weight of 0 for no link at all
    weights = (links[:, 2] + 1).astype(np.float64)
    graph = coo_array((weights, links[:, :2].T), shape=(pictures, pictures)).tocsr()
    forest = minimum_spanning_tree(graph).tocoo()
    chosen = forest.row.astype(np.int64) * pictures + forest.col
    keep = np.zeros(len(links), bool)
    keep[np.searchsorted(links[:, 0] * pictures + links[:, 1], chosen)] = True
    return keep


# --- candidates: all, by words, by keys -----------------------------------------------------------


def _all_candidates(search: _Search) -> Iterator[_Candidates]:
    """Yield every whole picture with every view, block by block."""
    pictures = len(search.whole)
    for begin in range(0, pictures, 256):
        views = search.views(begin, begin + 256)
        for row in range(0, pictures, 512):
            wholes, places = np.mgrid[row : min(row + 512, pictures), 0 : len(views)]
            yield _Candidates(wholes.ravel(), places.ravel(), views, begin)


def _word_candidates(search: _Search, progress: Callable) -> Iterator[_Candidates]:
    """Yield the wholes and the views of which a word differs in at most `flips` bits."""
    masks = _flip_masks(search.flips)
    views = search.views(0, len(search.rows))
    view_words = views.view(np.uint16).reshape(-1, WORDS)
    whole_words = search.whole.view(np.uint16).reshape(-1, WORDS)
    for word in progress(range(WORDS)):
        # The index of this word: the views in the order of their word, and where each of the
        # 65,536 values begins in that order.
        words = view_words[:, word]
        order = np.argsort(words, kind="stable")
        starts = np.searchsorted(words[order], np.arange((1 << WORD_BITS) + 1))
        for mask in masks:
            wanted = (whole_words[:, word] ^ np.uint16(mask)).astype(np.int64)
            begins = starts[wanted]
            for asking, places in _expand(begins, starts[wanted + 1] - begins):
                yield _Candidates(asking, order[places], views, 0)


def _flip_masks(flips: int) -> list[int]:
    """List the words with at most `flips` bits set, that with none first."""
    masks = []
    for count in range(flips + 1):
        for bits in itertools.combinations(range(WORD_BITS), count):
            masks.append(sum(1 << bit for bit in bits))
    return masks


def _key_candidates(search: _Search, progress: Callable) -> Iterator[_Candidates]:
    """Yield the wholes and the views that have the same key, for one choice of key after another.

    The views are read anew for each key, so that only one index is in memory at a time.
    """
    for chosen in progress(_key_choices()):
        index = _KeyIndex.of(search.whole, chosen)
        for begin in range(0, len(search.rows), _PICTURES_AT_ONCE):
            views = search.views(begin, begin + _PICTURES_AT_ONCE)
            for asking, places in _expand(*index.look_up(views)):
                yield _Candidates(index.order[places], asking, views, begin)


def _key_choices() -> list[np.ndarray]:
    """Choose the bytes of each key: three, and five more that order what has the same three."""
    chance = np.random.default_rng(0)
    choices = []
    for _ in range(_ROUNDS):
        # Keys of one round share no byte, so that flipped bits which spoil one leave the others.
        order = chance.permutation(BITS // 8)
        for number in range(_KEYS_OF_ROUND):
            choices.append(np.roll(order, -_KEY_BYTES * number)[:8])
    return choices


def _long_keys(hashes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Read 8 chosen bytes of each hash as one number of 64 bits, the first byte the highest."""
    taken = np.ascontiguousarray(hashes.view(np.uint8)[:, chosen])
    return taken.view(">u8").ravel().astype(np.uint64)


def _short_keys(hashes: np.ndarray, chosen: np.ndarray, bits: int) -> np.ndarray:
    """Read the first bits of the chosen bytes alone, at most 32."""
    taken = np.ascontiguousarray(hashes.view(np.uint8)[:, chosen[:4]])
    return taken.view(">u4").ravel() >> np.uint32(32 - bits)


@dataclass(frozen=True)
class _KeyIndex:
    """Whole pictures in the order of a key.

    Attributes
    ----------
    chosen : the 8 bytes of a hash that are read, the key first.
    order : (n,) the pictures in the order of these bytes.
    long_keys : (n,) those bytes, in that order.
    bits : the first bits of these bytes that are the key.
    starts : (2 ** bits + 1,) where each key begins in `order`.
    """

    chosen: np.ndarray
    order: np.ndarray
    long_keys: np.ndarray
    bits: int
    starts: np.ndarray

    @classmethod
    def of(cls, whole: np.ndarray, chosen: np.ndarray) -> "_KeyIndex":
        long_keys = _long_keys(whole, chosen)
        order = np.argsort(long_keys, kind="stable").astype(np.int32)
        # Twice to four times as many keys as pictures: of a random key there is then none or one.
        bits = min(8 * _KEY_BYTES, len(whole).bit_length() + 1)
        counts = np.bincount(_short_keys(whole, chosen, bits), minlength=1 << bits)
        starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts.astype(np.int32), dtype=np.int32, out=starts[1:])
        return cls(chosen, order, long_keys[order], bits, starts)

    def look_up(self, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Say for each view where what has its key begins in `order`, and how many there are.

        Of a crowd, such as thousands of black pictures, each view gets the part that agrees with it
        in most of the following bytes: the work stays in proportion, and its neighbours' links
        connect the crowd.
        """
        keys = _short_keys(views, self.chosen, self.bits)
        begins = self.starts[keys]
        counts = self.starts[keys + 1] - begins
        crowded = np.flatnonzero(counts > _CROWD)
        if len(crowded):
            long_keys = _long_keys(views[crowded], self.chosen)
            place = np.searchsorted(self.long_keys, long_keys) - _CROWD // 2
            last = begins[crowded] + counts[crowded] - _CROWD
            begins[crowded] = np.clip(place, begins[crowded], last)
            counts[crowded] = _CROWD
        return begins, counts


def _expand(begins: np.ndarray, counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each asking number with each place from its begin on, in blocks, as (asking, places).

    Parameters
    ----------
    begins, counts : (n,) the first place that each asks for, and how many.
    """
    asking = np.flatnonzero(counts)
    begins = begins[asking]
    counts = counts[asking]
    for first, last in _blocks(counts):
        found = counts[first:last]
        # Each one's places follow one another. So one long count is made, and moved for each by
        # where its places begin minus where it begins in the count.
        moved = begins[first:last] - (np.cumsum(found) - found)
        places = np.arange(found.sum()) + np.repeat(moved, found)
        yield np.repeat(asking[first:last], found), places


def _blocks(counts: np.ndarray) -> list[tuple[int, int]]:
    """Cut into blocks (begin, end) that have about as many candidates as fit in memory."""
    if not len(counts):
        return []
    total = np.cumsum(counts)
    steps = np.arange(0, total[-1] + 1, _CANDIDATES_AT_ONCE)
    cuts = np.searchsorted(total, steps).tolist()
    return list(itertools.pairwise([*cuts, len(counts)]))
