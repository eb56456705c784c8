"""Hashes of pictures, and the search for those that are close."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from look_alikes import scan, trimmed

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
