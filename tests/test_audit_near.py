"""Hashes of pictures, and the search for those that are close."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from look_alikes import scan, trimmed
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medtune.audit import near_pairs, picture_hash
from medtune.audit.near import VIEWS


def near_pairs_one_by_one(hashes: np.ndarray, limit: int) -> list[tuple[int, int, int]]:
    """Find what `near_pairs` finds by comparing every whole picture with every view."""
    whole = hashes[:, 0]
    differing = whole[:, None, None] ^ hashes[None]  # (n, n, 17, 4)
    one_way = np.bitwise_count(differing).sum(axis=-1).min(axis=-1)  # (n, n)
    distance = np.minimum(one_way, one_way.T)
    pairs = []
    for i, j in np.argwhere(distance <= limit).tolist():
        if i < j:
            pairs.append((i, j, int(distance[i, j])))
    return pairs


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    limit=st.sampled_from([0, 7, 15, 20, 31, 47, 60]),
    n=st.sampled_from([3, 520]),
)
def test_index_finds_what_comparing_all_finds(seed, limit, n):
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, (40, 4), dtype=np.uint64)
    views = centres[rng.integers(0, 40, n * len(VIEWS))]
    # flip random bits, so that all distances around the limit occur
    for _ in range(int(rng.integers(0, 40))):
        rows = rng.integers(0, len(views), len(views) // 2)
        words = rng.integers(0, 4, len(rows))
        bits = rng.integers(0, 64, len(rows), dtype=np.uint64)
        views[rows, words] ^= np.uint64(1) << bits
    hashes = views.reshape(n, len(VIEWS), 4)
    assert near_pairs(hashes, limit) == near_pairs_one_by_one(hashes, limit)


def test_pictures_are_hashed_one_by_one():
    picture = scan(0)
    pictures = [
        picture,
        scan(1),
        trimmed(picture, 0.03, 0.03, 0.03, 0.03),
        picture.resize((99, 99)),
    ]
    hashes = [picture_hash(each) for each in pictures]
    assert hashes[0].shape == (len(VIEWS), 4) and hashes[0].dtype == np.uint64
    assert {(i, j) for i, j, _ in near_pairs(hashes)} == {(0, 2), (0, 3), (2, 3)}
    assert near_pairs([]) == []


def test_progress_sees_every_word_of_the_index():
    rounds = []

    def watch(words):
        for word in words:
            rounds.append(word)
            yield word

    hashes = np.random.default_rng(0).integers(0, 2**64, (500, 17, 4), dtype=np.uint64)
    hashes[7] = hashes[3] ^ np.uint64(1)
    assert near_pairs(hashes, progress=watch) == [(3, 7, 4)]
    assert rounds == [*range(16)]


# --- the index of large sets ----------------------------------------------------------------------


def random_hashes(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 2**64, (n, len(VIEWS), 4), dtype=np.uint64)


def flip_bits(rng: np.random.Generator, code: np.ndarray, count: int) -> np.ndarray:
    """Flip so many bits of one hash (4,)."""
    bits = np.unpackbits(code.view(np.uint8))
    bits[rng.permutation(256)[:count]] ^= 1
    return np.packbits(bits).view(np.uint64)


def crowd(rng: np.random.Generator, n: int) -> np.ndarray:
    """Pictures of which each view differs in at most 6 bits from one hash: 12 from each other."""
    codes = np.empty((n, len(VIEWS), 4), np.uint64)
    codes[:] = rng.integers(0, 2**64, 4, dtype=np.uint64)
    pictures, views = np.indices((n, len(VIEWS)))
    for _ in range(6):
        words = rng.integers(0, 4, pictures.shape)
        codes[pictures, views, words] ^= np.uint64(1) << rng.integers(
            0, 64, pictures.shape, dtype=np.uint64
        )
    return codes


@pytest.mark.parametrize("seed", [0, 1])
def test_the_index_finds_copies_that_only_one_view_shows(seed):
    rng = np.random.default_rng(seed)
    hashes = random_hashes(rng, 3000)
    distances = rng.integers(0, 21, 500)
    distances[:200] = 20  # the hardest that are asked for
    for copy, distance in enumerate(distances):
        view = rng.integers(0, len(VIEWS))
        hashes[2500 + copy, view] = flip_bits(rng, hashes[copy, 0], distance)
    found = set(near_pairs(hashes, exact=False))
    right = set(near_pairs(hashes, exact=True))
    assert right == {(row, 2500 + row, int(distance)) for row, distance in enumerate(distances)}
    assert found <= right
    assert len(found) >= 0.99 * len(right)


def test_the_index_agrees_on_pictures():
    pictures = [scan(seed, (64, 64)) for seed in range(500)]
    changed = [trimmed(picture, 0.02, 0.02, 0.02, 0.02) for picture in pictures[:40]]
    hashes = [picture_hash(picture) for picture in [*pictures, *changed]]
    found = near_pairs(hashes, exact=False)
    assert found == near_pairs(hashes, exact=True)
    assert len(found) >= 39


@pytest.mark.parametrize("exact", [True, False, None])
def test_sets_of_few_and_of_equal_pictures(exact):
    rng = np.random.default_rng(0)
    assert near_pairs(random_hashes(rng, 0), exact=exact) == []
    assert near_pairs(random_hashes(rng, 1), exact=exact) == []
    two = random_hashes(rng, 2)
    assert near_pairs(two, exact=exact) == []
    two[1, 5] = two[0, 0]
    assert near_pairs(two, exact=exact) == [(0, 1, 0)]
    equal = np.repeat(random_hashes(rng, 1), 700, axis=0)
    assert near_pairs(equal, exact=exact) == [(0, row, 0) for row in range(1, 700)]


@pytest.mark.slow
def test_a_crowd_is_held_together_by_few_pairs():
    rng = np.random.default_rng(0)
    size = 800
    hashes = np.concatenate([random_hashes(rng, 300), crowd(rng, size)])
    hashes[10, 3] = hashes[4, 0]  # a pair outside of the crowd is kept
    order = rng.permutation(len(hashes))
    hashes = hashes[order]
    pairs = near_pairs(hashes)
    assert len(pairs) < 64 * size < size * (size - 1) / 2
    assert all(distance <= 20 for _, _, distance in pairs)

    ends = np.array([(i, j) for i, j, _ in pairs]).T
    graph = coo_array((np.ones(ends.shape[1]), ends), shape=(len(hashes), len(hashes)))
    parts, part = connected_components(graph, directed=False)
    assert parts == 1 + 300 - 1  # the crowd, the pair, and 298 alone
    assert len(set(part[order >= 300])) == 1
    [four] = np.flatnonzero(order == 4)
    [ten] = np.flatnonzero(order == 10)
    assert (min(four, ten), max(four, ten), 0) in pairs


def test_hashes_may_be_mapped_from_a_file(tmp_path):
    rng = np.random.default_rng(0)
    hashes = random_hashes(rng, 600)
    hashes[599, 2] = hashes[7, 0]
    hashes.tofile(tmp_path / "hashes.bin")
    mapped = np.memmap(tmp_path / "hashes.bin", np.uint64, "r").reshape(hashes.shape)
    assert near_pairs(mapped, exact=False) == [(7, 599, 0)]
