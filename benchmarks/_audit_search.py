"""The search for look-alikes among random fingerprints: recall, time and memory at any size."""

import contextlib
import importlib.metadata
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from _harness import Stopwatch, peak_memory_mb

from medtune.audit.near import BITS, MAX_DISTANCE, VIEWS, near_pairs

# In how many of the 256 bits a trimmed view differs from its whole picture: the median of 6,650 real
# ones is 16 to 70, by view. A word that is the AND of k random ones has 64 / 2**k bits.
ANDS_OF_VIEWS = (0, 4, 3, 2, 2, 4, 4, 3, 3, 4, 4, 3, 3, 3, 3, 3, 3)
# Fingerprints that are made in one go.
BLOCK = 50_000
# Of so many fingerprints one is a planted copy.
EVERY = 100


@dataclass(frozen=True)
class Planted:
    """Random fingerprints with copies.

    Parameters
    ----------
    hashes : (n, 17, 4) uint64.
    pairs : rows (i, j), i < j, of each copy and what it is a copy of.
    """

    hashes: np.ndarray
    pairs: set[tuple[int, int]]


@dataclass(frozen=True)
class Search:
    """What one search took and found.

    Parameters
    ----------
    pictures : how many fingerprints were compared.
    distance : bits in which each planted copy differs in one view; it differs more in the others.
    exact : the exact search.
    cpu_seconds, wall_seconds : of the search alone.
    peak_mb : of the process, with the fingerprints, which take 0.544 KB a picture.
    planted, found, others : copies, those that were found, and pairs that nobody planted.
    """

    pictures: int
    distance: int
    exact: bool
    cpu_seconds: float
    wall_seconds: float
    peak_mb: int
    planted: int
    found: int
    others: int


def random_words(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, 2**64, shape, dtype=np.uint64)


def sparse_words(rng: np.random.Generator, shape: tuple[int, ...], ands: int) -> np.ndarray:
    """Draw words of which one bit in 2**ands is set."""
    words = random_words(rng, shape)
    for _ in range(ands - 1):
        words &= random_words(rng, shape)
    return words


def flip_bits(rng: np.random.Generator, hashes: np.ndarray, distance: int) -> np.ndarray:
    """Flip exactly so many bits of each hash, drawn at random: (n, 4) to (n, 4)."""
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    chosen = np.argsort(rng.random(bits.shape), axis=1)[:, :distance]
    np.put_along_axis(bits, chosen, 1 - np.take_along_axis(bits, chosen, axis=1), axis=1)
    return np.packbits(bits, axis=1).view(np.uint64)


def make_fingerprints(pictures: int, distance: int, seed: int = 0) -> Planted:
    """Make random fingerprints of which one in a hundred is close to another in one view only."""
    rng = np.random.default_rng(seed)
    hashes = np.empty((pictures, len(VIEWS), BITS // 64), np.uint64)
    for begin in range(0, pictures, BLOCK):
        block = hashes[begin : begin + BLOCK]
        whole = random_words(rng, (len(block), BITS // 64))
        block[:, 0] = whole
        for view in range(1, len(VIEWS)):
            block[:, view] = whole ^ sparse_words(rng, whole.shape, ANDS_OF_VIEWS[view])

    copies = pictures // EVERY
    rows = rng.permutation(pictures)[: 2 * copies]
    originals = rows[:copies]
    copied = rows[copies:]
    hashes[copied] = random_words(rng, (copies, len(VIEWS), BITS // 64))
    views = rng.integers(0, len(VIEWS), copies)
    hashes[copied, views] = flip_bits(rng, hashes[originals, 0], distance)
    pairs = set()
    for one, other in zip(originals.tolist(), copied.tolist(), strict=True):
        pairs.add((min(one, other), max(one, other)))
    return Planted(hashes, pairs)


def search(pictures: int, distance: int = MAX_DISTANCE, exact: bool = False) -> dict:
    """Search once, and say on the way how far it is."""
    planted = make_fingerprints(pictures, distance)
    started = time.perf_counter()

    def tell(rounds):
        rounds = list(rounds)
        for number, each in enumerate(rounds, start=1):
            yield each
            spent = time.perf_counter() - started
            print(f"{pictures:,}: {number} of {len(rounds)} rounds, {spent:.0f} s", flush=True)

    watch = Stopwatch()
    pairs = near_pairs(planted.hashes, exact=exact, progress=tell)
    spent = watch.read()
    found = {(one, other) for one, other, _ in pairs}
    return asdict(
        Search(
            pictures=pictures,
            distance=distance,
            exact=exact,
            cpu_seconds=round(spent.cpu, 1),
            wall_seconds=round(spent.wall, 1),
            peak_mb=int(peak_memory_mb()),
            planted=len(planted.pairs),
            found=len(found & planted.pairs),
            others=len(found - planted.pairs),
        )
    )


# What is measured: fingerprints, distance of the planted copies, and how they are looked for. Each
# copy differs in so many bits in one view only, which is the hardest that the rule still asks for.
MEASURES = (
    ("100000", "20", "exact"),
    ("100000", "20", "index"),
    ("200000", "20", "index"),
    ("1000000", "20", "index"),
    ("5000000", "20", "index"),
)

# Indexes of faiss, and how many fingerprints they hold.
RIVALS = (
    ("IndexBinaryFlat", "100000"),
    ("IndexBinaryMultiHash 16 x 16 bits, 1 flip", "100000"),
    ("IndexBinaryMultiHash 12 x 21 bits", "100000"),
    ("IndexBinaryMultiHash 12 x 21 bits", "1000000"),
    ("IndexBinaryHash 24 bits, 3 flips", "100000"),
    ("IndexBinaryIVF 1000 lists, 20 probed", "100000"),
)
QUERIES = 2_000
# Pictures of the full set that the recipes dream of.
FULL_SET = 25_000_000


def exponent_of(index: Sequence[dict]) -> float | None:
    """Give the power of the number of pictures with which the CPU time of the index grows."""
    if len(index) < 2:
        return None
    small = index[0]
    large = index[-1]
    longer = math.log(large["cpu_seconds"] / small["cpu_seconds"])
    return round(longer / math.log(large["pictures"] / small["pictures"]), 3)


def summary_of(searches: Sequence[dict], reading: Sequence[dict]) -> dict:
    """Say how the time grows, and what it would be for 25 million pictures: extrapolated."""
    index = [each for each in searches if not each["exact"] and each["pictures"] >= 200_000]
    exponent = exponent_of(index)
    extrapolated = {}
    if exponent is not None:
        largest = index[-1]
        times = FULL_SET / largest["pictures"]
        extrapolated["search_cpu_hours"] = largest["cpu_seconds"] * times**exponent / 3600
    if reading:
        largest = reading[-1]
        each = largest["cpu_seconds"] / largest["pictures"]
        extrapolated["reading_cpu_hours"] = each * FULL_SET / 3600
    rounded = {name: round(hours, 2) for name, hours in extrapolated.items()}
    return {"exponent_of_cpu_seconds": exponent, "extrapolated_to_25_million": rounded}


def versions() -> dict[str, str]:
    """Name the versions that the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("numpy", "scipy", "faiss-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def make_rival(name: str, hashes: np.ndarray):
    """Build an index of faiss of whole pictures (n, 4)."""
    import faiss

    faiss.omp_set_num_threads(1)
    if name == "IndexBinaryFlat":
        index = faiss.IndexBinaryFlat(BITS)
    elif name == "IndexBinaryMultiHash 16 x 16 bits, 1 flip":
        index = faiss.IndexBinaryMultiHash(BITS, 16, 16)
        index.nflip = 1
    elif name == "IndexBinaryMultiHash 12 x 21 bits":
        index = faiss.IndexBinaryMultiHash(BITS, 12, 21)
    elif name == "IndexBinaryHash 24 bits, 3 flips":
        index = faiss.IndexBinaryHash(BITS, 24)
        index.nflip = 3
    elif name == "IndexBinaryIVF 1000 lists, 20 probed":
        lists = faiss.IndexBinaryFlat(BITS)
        index = faiss.IndexBinaryIVF(lists, BITS, 1000)
        # without this, python would free the lists that the index still reads
        index.own_lists = lists
        index.cp.niter = 4
        index.nprobe = 20
        index.train(hashes[:40_000].view(np.uint8))
    else:
        raise ValueError(f"no index is called {name!r}")
    index.add(hashes.view(np.uint8))
    return index


def measure_rival(name: str, pictures: int) -> dict:
    """Look up planted copies at the course's distance, and extrapolate to all views."""
    rng = np.random.default_rng(0)
    hashes = random_words(rng, (pictures, BITS // 64))
    watch = Stopwatch()
    index = make_rival(name, hashes)
    building = watch.read().cpu
    originals = rng.integers(0, pictures, QUERIES)
    copies = flip_bits(rng, hashes[originals], MAX_DISTANCE)
    watch = Stopwatch()
    # faiss gives what is nearer than the radius
    limits, _, found = index.range_search(copies.view(np.uint8), MAX_DISTANCE + 1)
    spent = watch.read().cpu
    asking = np.repeat(np.arange(QUERIES), np.diff(limits.astype(np.int64)))
    hits = len(set(asking[found == originals[asking]].tolist()))
    return {
        "index": name,
        "pictures": pictures,
        "building_cpu_seconds": round(building, 1),
        "microseconds_a_view": round(spent / QUERIES * 1e6, 1),
        "all_views_cpu_seconds": round(spent / QUERIES * pictures * len(VIEWS)),
        "recall": hits / QUERIES,
        "peak_mb": int(peak_memory_mb()),
    }
