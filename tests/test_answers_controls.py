"""medtune.answers.controls: nobody is shown a picture of the own structure, where that can be."""

from collections import Counter

import pytest
import tiny_qwen
from hypothesis import given
from hypothesis import strategies as st

from medtune.answers import shuffle_pictures


@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=40), st.integers(0, 99))
def test_shuffled_pictures_are_of_another_structure(structures, seed):
    rows = [{"structure": name} for name in structures]
    donors = shuffle_pictures(rows, seed)
    assert sorted(donors) == list(range(len(rows)))
    assert all(row != donor for row, donor in enumerate(donors))
    same = 0
    for row, donor in enumerate(donors):
        same += structures[row] == structures[donor]
    most_frequent = max(Counter(structures).values())
    fewest_possible = max(0, 2 * most_frequent - len(rows))
    assert same == fewest_possible


def test_shuffle_is_seeded_and_goes_by_caption():
    records = tiny_qwen.make_records()
    first = shuffle_pictures(records, seed=1)
    assert first == shuffle_pictures(records, seed=1) != shuffle_pictures(records, seed=2)
    # the captions of the records repeat after four
    for row, donor in enumerate(shuffle_pictures(records)):
        assert row % 4 != donor % 4
    with pytest.raises(ValueError, match="at least two"):
        shuffle_pictures(records[:1])
