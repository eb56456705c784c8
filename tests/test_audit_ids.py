"""Ids that stand in several rows of a set of shards."""

import collections
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtune.audit import repeated_ids


def write(folder, columns: list[dict]) -> None:
    """Write one shard for each set of columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, values in enumerate(columns):
        pq.write_table(pa.table(values), folder / f"{number:03d}.parquet")


def test_ids_repeat_across_many_small_shards_and_within_one(tmp_path):
    columns = []
    for shard in range(60):
        columns.append({"id": [f"{shard}-{row}" for row in range(40)], "caption": ["a"] * 40})
    columns[3]["id"][5] = columns[57]["id"][0] = "twice"
    columns[9]["id"][1] = columns[9]["id"][2] = columns[9]["id"][3] = "thrice here"
    write(tmp_path, columns)
    found = repeated_ids(tmp_path)
    assert (found.rows, found.ids, found.across, found.later_rows) == (2400, 2, 1, 3)
    assert found.shards == {3: 1, 9: 3, 57: 1}
    [line] = found.warnings()
    assert "shards 3, 9, 57" in line and "take 3 rows out" in line
    assert "twice" not in line.replace("there twice", "")


def test_a_clean_set_says_nothing(tmp_path):
    write(tmp_path, [{"id": ["a"]}, {"id": ["b"]}])
    found = repeated_ids(tmp_path)
    assert found.ids == 0 and found.warnings() == []


def test_numbers_are_the_texts_that_look_like_them(tmp_path):
    write(tmp_path, [{"id": [7, 8]}, {"id": ["7", "x"]}, {"id": pa.array([8], pa.int32())}])
    found = repeated_ids(tmp_path)
    assert (found.ids, found.across, found.shards) == (2, 2, {0: 2, 1: 1, 2: 1})


def test_shards_and_rows_without_ids_are_told(tmp_path):
    write(tmp_path, [{"id": ["a", None, None]}, {"caption": ["b"]}, {"id": ["a"]}])
    found = repeated_ids(tmp_path)
    assert (found.rows, found.ids, found.without_ids, found.nameless_rows) == (5, 1, [1], 2)
    assert len(found.warnings()) == 3

    write(tmp_path / "other", [{"caption": ["a", "b"]}])
    found = repeated_ids(tmp_path / "other")
    assert (found.rows, found.ids, found.without_ids) == (2, 0, [0])


def test_another_column_a_list_of_files_and_odd_names(tmp_path):
    folder = tmp_path / "set [1] * it's"
    write(folder, [{'na"me': ["a", "b"]}, {'na"me': ["b"]}])
    files = [folder / "001.parquet", folder / "000.parquet"]
    found = repeated_ids(files, column='na"me')
    assert (found.ids, found.shards) == (1, {0: 1, 1: 1})
    assert repeated_ids(files[1], column='na"me').ids == 0


def test_what_cannot_be_read_is_named(tmp_path):
    write(tmp_path, [{"id": ["a"]}, {"id": ["b"]}])
    bad = tmp_path / "001.parquet"
    bad.write_bytes(bad.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"001\.parquet cannot be read") as error:
        repeated_ids(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has no parquet file"):
        repeated_ids([])
    with pytest.raises(ValueError, match=r"no file gone\.parquet"):
        repeated_ids(tmp_path / "gone.parquet")


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.text(min_size=1, max_size=2), min_size=1, max_size=6), min_size=1),
    st.integers(0, 99),
)
def test_counts_are_those_of_a_counter(tmp_path_factory, shards, seed):
    folder = tmp_path_factory.mktemp("shards")
    shards = shards[:5]
    random.Random(seed).shuffle(shards)
    write(folder, [{"id": ids} for ids in shards])
    times = collections.Counter(name for ids in shards for name in ids)
    repeated = {name for name, count in times.items() if count > 1}
    found = repeated_ids(folder)
    assert found.ids == len(repeated)
    assert found.later_rows == sum(times[name] - 1 for name in repeated)
    assert found.across == sum(sum(name in ids for ids in shards) > 1 for name in repeated)
    in_shards = {number: sum(name in repeated for name in ids) for number, ids in enumerate(shards)}
    assert found.shards == {number: count for number, count in in_shards.items() if count}
