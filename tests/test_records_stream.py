"""Records made of shards while they are read: the same as converted ones, each once, none lost."""

import csv
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import CHANGED, CHINESE, pair, write_shard
from test_pairs_hub import Hub, serve_hub
from torchdata.stateful_dataloader import StatefulDataLoader

from medtune.audit import split_by_group
from medtune.records import (
    SPLITS,
    RecordStream,
    ShardIndex,
    convert_pairs,
    count_rejected,
    index_shards,
    names_shards,
    read_records,
)

UNDECODED = datasets.List(datasets.Image(decode=False))
SIZES = (37, 5, 80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three shards of unequal size, in row groups of 16, with pictures that are made anew."""
    folder = tmp_path_factory.mktemp("shards")
    numbers = itertools.count()
    changed = iter(CHANGED.values())
    for shard, size in enumerate(SIZES):
        rows = []
        for _ in range(size):
            number = next(numbers)
            row = pair(
                number, group=f"patient-{number // 3}", roi=[0.1, 0.2] if number % 2 else None
            )
            if number % 15 == 0:
                row["image"] = next(changed, row["image"])
            if number % 7 == 0:
                row["question"] = f"Is this number {number}?"
            rows.append(row)
        # a column that no row of a shard has would be missing
        rows[0].setdefault("question", None)
        write_shard(folder / f"part-{shard}.parquet", rows, row_group_size=16)
    return folder


@pytest.fixture(scope="module")
def table(folder, tmp_path_factory) -> Path:
    """The splits by patient, as `medtune audit --write` writes them."""
    pairs = [pq.read_table(file, columns=["id", "group"]) for file in sorted(folder.glob("*"))]
    ids = [name for part in pairs for name in part["id"].to_pylist()]
    groups = [group for part in pairs for group in part["group"].to_pylist()]
    file = tmp_path_factory.mktemp("splits") / "splits.csv"
    with open(file, "w", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(["id", "split", "group"])
        writer.writerows(zip(ids, split_by_group(groups, seed=5), groups, strict=True))
    return file


def ids_of(records) -> list[str]:
    return [record["id"] for record in records]


def with_bytes(records: datasets.Dataset) -> list[dict]:
    """Records of a converted folder, with the bytes of their pictures instead of the names."""
    rows = []
    for row in records.cast_column("images", UNDECODED):
        pictures = [Path(picture["path"]).read_bytes() for picture in row["images"]]
        rows.append(row | {"images": [{"bytes": data, "path": None} for data in pictures]})
    return rows


# ---- the same records


ASKED = {
    "plain": {},
    "drawn": {"questions": ["What is it?", "Where is it?<image>"], "seed": 3},
    "system": {"system_prompt": "Answer as a radiologist.", "jpeg_quality": 80},
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("with_table", [True, False])
def test_the_records_are_those_of_convert(folder, table, tmp_path, name, with_table):
    asked = ASKED[name]
    splits = table if with_table else None
    convert_pairs(folder, tmp_path / "out", splits=splits, **asked)
    index = index_shards(folder, splits=splits, seed=asked.get("seed", 0))
    total = 0
    for split in SPLITS:
        stream = RecordStream(index, split, **asked)
        expected = read_records(tmp_path / "out", split)
        assert list(stream.records(decode=False)) == with_bytes(expected)
        assert stream.features == expected.features
        # decoded as a trainer sees them
        first = next(iter(stream.records()))
        assert first["images"][0].tobytes() == expected[0]["images"][0].tobytes()
        total += len(stream)
    assert total == sum(SIZES) == index.rows


def test_chinese_captions(tmp_path):
    rows = [pair(number, caption_zh=CHINESE.format(number)) for number in range(3)]
    write_shard(tmp_path / "a.parquet", rows)
    stream = RecordStream(index_shards(tmp_path / "a.parquet"), "train", language="zh")
    convert_pairs(tmp_path / "a.parquet", tmp_path / "out", language="zh")
    assert list(stream.records(decode=False)) == with_bytes(read_records(tmp_path / "out"))


def test_a_pattern_names_shards(folder):
    some = index_shards(folder / "part-[12].parquet")
    assert some.rows == sum(SIZES[1:])
    assert names_shards(folder) and names_shards(str(folder / "part-*.parquet"))
    assert not names_shards("some/folder/of/records") and not names_shards("records")


def test_a_converted_folder_is_no_folder_of_shards(folder, tmp_path):
    convert_pairs(folder / "part-1.parquet", tmp_path / "out")
    shutil.copy(folder / "part-1.parquet", tmp_path / "out")
    assert not names_shards(tmp_path / "out")


# ---- each once, in an order that the seed decides


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", [None, 7])
def test_ranks_and_processes_share_the_records(folder, table, ranks, workers, seed):
    stream = RecordStream(index_shards(folder, splits=table), "train")
    seen = []
    for rank in range(ranks):
        batches = list(loader_of(stream, rank=rank, ranks=ranks, workers=workers, seed=seed))
        assert stream.batches(4, ranks) - 1 <= len(batches) <= stream.batches(4, ranks)
        seen += itertools.chain.from_iterable(batches)
    assert sorted(seen) == sorted(ids_of(stream.records(decode=False)))


def loader_of(stream, *, rank=0, ranks=1, workers=0, seed=7, epoch=0) -> StatefulDataLoader:
    """A loader of the ids of one rank."""
    share = {"rank": rank, "ranks": ranks, "workers": max(workers, 1)}
    windows = stream.windows(buffer=12, seed=seed, epoch=epoch, batch_size=4, **share)
    records = stream.records(windows, seed=seed, epoch=epoch, decode=False)
    return StatefulDataLoader(records, batch_size=4, collate_fn=ids_of, num_workers=workers)


@settings(deadline=None, max_examples=100)
@given(
    groups=st.lists(
        st.lists(st.sampled_from([0, 0, 0, 1, 255]), max_size=30), min_size=1, max_size=8
    ),
    ranks=st.integers(1, 4),
    workers=st.integers(1, 3),
    batch_size=st.integers(1, 5),
    buffer=st.integers(1, 20),
    seed=st.none() | st.integers(0, 5),
)
def test_windows_part_the_rows(groups, ranks, workers, batch_size, buffer, seed):
    groups[0].append(0)
    codes = np.array(list(itertools.chain.from_iterable(groups)), np.uint8)
    index = ShardIndex(
        files=["a.parquet"],
        file_of=np.zeros(len(groups), int),
        number_in_file=np.arange(len(groups)),
        starts=np.concatenate([[0], np.cumsum([len(group) for group in groups])]),
        codes=codes,
        types={"image": datasets.Image()},
        reasons=Counter(),
        digest="",
    )
    stream = RecordStream(index, "train")
    seen = []
    uneven = 0
    for rank in range(ranks):
        windows = stream.windows(
            buffer=buffer, seed=seed, batch_size=batch_size, rank=rank, ranks=ranks, workers=workers
        )
        batches = 0
        for window in windows:
            rows = []
            for piece in window.slices:
                chosen = index.chosen_in(piece.group, 0)
                inside = chosen[(chosen >= piece.start) & (chosen < piece.stop)]
                rows += list(index.starts[piece.group] + inside)
            assert len(rows) == window.rows <= max(buffer, batch_size)
            uneven += window.rows % batch_size > 0
            batches += -(-window.rows // batch_size)
            seen += rows
        assert stream.batches(batch_size, ranks) - 1 <= batches <= stream.batches(batch_size, ranks)
    assert sorted(seen) == list(np.flatnonzero(codes == 0))
    assert uneven <= 1


def test_seed_and_epoch_decide_the_order(folder):
    stream = RecordStream(index_shards(folder), "train")
    orders = {}
    for seed, epoch in [(7, 0), (7, 1), (8, 0)]:
        orders[seed, epoch] = list(loader_of(stream, seed=seed, epoch=epoch))
    assert orders[7, 0] == list(loader_of(stream))
    assert len({json.dumps(order) for order in orders.values()}) == 3
    # a window holds rows of several row groups, and mixes them
    first = [int(name.split("-")[1]) for name in itertools.chain(*orders[7, 0][:3])]
    assert first != sorted(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_goes_on_with_the_next_batch(folder, workers):
    stream = RecordStream(index_shards(folder), "train")
    loader = loader_of(stream, workers=workers)
    batches = []
    states = []
    for batch in loader:
        batches.append(batch)
        # as it stands in a checkpoint
        states.append(json.loads(json.dumps(loader.state_dict())))
    for done in (1, 2, 3, 7, len(batches) - 1):
        again = loader_of(RecordStream(index_shards(folder), "train"), workers=workers)
        again.load_state_dict(states[done - 1])
        assert list(again) == batches[done:]


# ---- what cannot be used is named and counted


@pytest.fixture
def spoilt(folder, tmp_path) -> Path:
    """The shards and some that are worse, in a folder of their own."""
    place = tmp_path / "shards"
    shutil.copytree(folder, place)
    return place


def spoil(file: Path, place: str, **rows) -> None:
    """Change some rows of a shard: the keyword's number is the row."""
    table = pq.read_table(file).to_pylist()
    for row, value in rows.items():
        table[int(row[1:])][place] = value
    for row in table:
        row["image"] = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
    write_shard(file, table, row_group_size=16)


def test_bad_rows_are_left_out_and_listed(spoilt, tmp_path, capsys):
    spoil(spoilt / "part-0.parquet", "image", _3=b"no picture", _20=b"")
    spoil(spoilt / "part-2.parquet", "caption", _9=" ")
    left_out = tmp_path / "left out"
    stream = RecordStream(index_shards(spoilt, split_by="none"), "train", rejected=left_out)
    records = list(stream.records(decode=False))
    report = convert_pairs(spoilt, tmp_path / "out", split_by="none")
    assert records == with_bytes(read_records(tmp_path / "out"))
    assert count_rejected(left_out) == report["reasons"] == {"image": 2, "caption": 1}
    # read once more, they are not counted twice
    assert len(list(stream.records(decode=False))) == len(records)
    assert count_rejected(left_out).total() == 3
    told = capsys.readouterr().err
    assert "'id-00003' is left out: image: " in told and str(left_out) in told
    assert "no picture" not in told


def test_ids_that_repeat_across_shards(spoilt):
    spoil(spoilt / "part-2.parquet", "id", _50="id-00001", _51="id-00002")
    index = index_shards(spoilt, split_by="none")
    assert index.reasons == {"id": 2}
    ids = ids_of(RecordStream(index, "train").records(decode=False))
    assert len(ids) == len(set(ids)) == sum(SIZES) - 2


def test_a_shard_that_cannot_be_opened_or_lacks_a_column(spoilt, capsys):
    whole = (spoilt / "part-1.parquet").read_bytes()
    (spoilt / "part-3.parquet").write_bytes(whole[:-100])
    pq.write_table(
        pq.read_table(spoilt / "part-1.parquet").drop(["caption"]), spoilt / "part-4.parquet"
    )
    index = index_shards(spoilt)
    # of the one its five rows are known, of the other nothing
    assert index.rows == sum(SIZES) and index.reasons == {"shard": 1 + 5}
    told = capsys.readouterr().err
    assert "part-3.parquet is cut off, fetch it again" in told
    assert "part-4.parquet has not the columns image (bytes), id and caption" in told


def test_a_shard_that_breaks_off_inside(spoilt, tmp_path):
    file = spoilt / "part-2.parquet"
    data = bytearray(file.read_bytes())
    # the pictures of the last 16 rows, which the footer still promises
    group = pq.read_metadata(file).row_group(4)
    columns = [group.column(number) for number in range(group.num_columns)]
    [pictures] = [column for column in columns if column.path_in_schema == "image.bytes"]
    begin = pictures.dictionary_page_offset or pictures.data_page_offset
    data[begin : begin + 40] = bytes(40)
    file.write_bytes(data)
    index = index_shards(spoilt, split_by="none")
    stream = RecordStream(index, "train", rejected=tmp_path / "left out", most_rejected=0.2)
    records = list(stream.records(decode=False))
    assert len(records) == sum(SIZES) - 16
    assert count_rejected(tmp_path / "left out") == {"shard": 16}


def test_more_than_a_tenth_ends_it(spoilt):
    rows = {f"_{row}": b"no picture" for row in range(0, 80, 5)}
    spoil(spoilt / "part-2.parquet", "image", **rows)
    stream = RecordStream(index_shards(spoilt, split_by="none"), "train")
    with pytest.raises(ValueError, match=r"13 of 122 rows cannot be trained on \(13 image\), more"):
        list(stream.records(decode=False))
    patient = RecordStream(index_shards(spoilt, split_by="none"), "train", most_rejected=0.2)
    assert len(list(patient.records(decode=False))) == 122 - 16


def test_rows_that_the_table_does_not_know(folder, table, tmp_path):
    lines = table.read_text().splitlines()
    few = tmp_path / "few.csv"
    few.write_text("\n".join(lines[:-5]) + "\n")
    assert index_shards(folder, splits=few).reasons == {"split": 5}
    few.write_text("\n".join(lines[:-20]) + "\n")
    with pytest.raises(ValueError, match=r"20 of 122 rows .*20 split.*most_rejected=0.1"):
        index_shards(folder, splits=few)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,part\na,train\n", "has no columns id and split"),
        ("id,split\nid-00000,trian\n", "'trian' is none of train, validation, test"),
        ("id,split\nid-00000,train\nid-00001,test\nid-00000,test\n", "line 4: the id stands above"),
        ("id,split\nother,train\n", "a split for none of the ids"),
        ("", "is no CSV"),
    ],
)
def test_a_table_that_says_nothing_is_refused(folder, tmp_path, text, message):
    file = tmp_path / "splits.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        index_shards(folder, splits=file)
    assert "\n" not in str(raised.value)


def test_ids_that_look_like_numbers_keep_their_zeros(tmp_path):
    rows = [pair(number) | {"id": f"{number:03}"} for number in range(4)]
    write_shard(tmp_path / "part.parquet", rows, row_group_size=4)
    (tmp_path / "splits.csv").write_text("id,split\n000,train\n001,train\n002,test\n3,test\n")
    index = index_shards(tmp_path / "part.parquet", splits=tmp_path / "splits.csv", most_rejected=1)
    assert [record["id"] for record in RecordStream(index, "train").records()] == ["000", "001"]
    assert [record["id"] for record in RecordStream(index, "test").records()] == ["002"]


def test_what_is_not_there(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="names no parquet file"):
        index_shards(tmp_path / "*.parquet")
    with pytest.raises(ValueError, match="no row of the shards is of the split validation"):
        RecordStream(index_shards(folder, split_by="none"), "validation")
    with pytest.raises(ValueError, match="language=fr"):
        RecordStream(index_shards(folder), "train", language="fr")


def test_the_first_records_stand_in_memory(folder):
    stream = RecordStream(index_shards(folder), "train")
    few = stream.first(6, seed=1)
    assert len(few) == 6 and few.features == stream.features
    assert few["id"] == stream.first(6, seed=1)["id"] != stream.first(6)["id"]
    assert len(stream.first(1000)) == len(stream)


# ---- a set on the hub


READ_THE_HUB = """
import json
from torchdata.stateful_dataloader import StatefulDataLoader
from medtune.records import RecordStream, index_shards

stream = RecordStream(index_shards("org/pairs:25M_demo"), "train")

def open_loader(workers):
    windows = stream.windows(buffer=4, seed=1, batch_size=2, workers=max(workers, 1))
    records = stream.records(windows, seed=1, decode=False)
    return StatefulDataLoader(
        records, 2, collate_fn=lambda rows: [row["id"] for row in rows], num_workers=workers
    )

for workers in (0, 2):
    loader = open_loader(workers)
    batches = []
    states = []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    again = open_loader(workers)
    again.load_state_dict(states[1])
    print(json.dumps([batches, list(again)]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_set_on_the_hub_is_read_as_it_lies_there(tmp_path):
    for shard in range(2):
        rows = [pair(number) for number in range(shard * 5, shard * 5 + 5)]
        write_shard(tmp_path / f"{shard}.parquet", rows, row_group_size=2)
    configs = [{"config_name": "25M_demo", "data_files": "data/train-*"}]
    files = {"README.md": f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()}
    for shard in range(2):
        name = f"data/train-0000{shard}-of-00002.parquet"
        files[name] = (tmp_path / f"{shard}.parquet").read_bytes()

    class OneSet(Hub):
        """The hub of tests/test_pairs_hub.py with these files."""

    OneSet.files = files
    server, environment = serve_hub(OneSet, tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ_THE_HUB],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    for line in done.stdout.splitlines():
        batches, again = json.loads(line)
        assert sorted(itertools.chain(*batches)) == [f"id-{number:05d}" for number in range(10)]
        assert again == batches[2:]
    assert len(done.stdout.splitlines()) == 2
