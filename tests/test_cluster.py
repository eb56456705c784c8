"""--ray: the machines of a cluster do together what one process does, to the byte.

The cluster is a real one of two nodes, see tests/ray_machines.py.
"""

import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray_machines import COMMAND, PATIENCE, TwoMachines, two_machines
from shards import encode, json_lines, pair, picture, tree, write_shard

from medtune.records import convert_pairs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHARDS = 5
ROWS = 30  # of a shard, seconds of work: in the middle of one a machine is killed


@pytest.fixture(scope="module")
def whole_cluster():
    with two_machines() as machines:
        yield machines


@pytest.fixture
def cluster(whole_cluster) -> TwoMachines:
    """Both machines are on, whatever an earlier test did to them."""
    for number, machine in enumerate(whole_cluster.machines):
        if machine.process is None:
            whole_cluster.turn_on(number)
    return whole_cluster


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=2 * PATIENCE)
    return process.returncode, out, err


def said(err: str) -> list[str]:
    """What the command itself says, without bars of progress."""
    return [line for line in err.splitlines() if line.startswith("medtune:")]


def make_shards(folder: Path, rows: int = ROWS) -> Path:
    """Shards of patients whose pictures must be made anew, with a row that is bad."""
    folder.mkdir()
    for shard in range(SHARDS):
        written = []
        for number in range(shard * rows, (shard + 1) * rows):
            # another picture each time, and large enough to take a while
            drawn = picture(number, size=(512, 256)).convert("P")
            written.append(pair(number, image=encode(drawn, "PNG"), group=f"p{number // 4}"))
        if shard == 2:
            written[3]["image"] = b"no picture"
        write_shard(folder / f"part-{shard}.parquet", written)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("source") / "shards")


def cut_off(shard: Path) -> bytes:
    """Take the end of a shard, as a download that broke off lacks it; give the whole."""
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    return content


def writes_below(machine, folder: Path) -> bool:
    """Whether a process of a machine has a file of a folder open."""
    for process in machine.processes():
        try:
            names = [file.path for file in process.open_files()]
        except psutil.Error:
            continue
        if any(Path(name).is_relative_to(folder) for name in names):
            return True
    return False


def wait_until(ready, process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_machine_is_lost_in_the_middle_of_a_shard(cluster, shards, tmp_path):
    broken = tmp_path / "shards"
    shutil.copytree(shards, broken)
    cut_off(broken / "part-4.parquet")
    out = tmp_path / "out"
    process = cluster.run("convert", broken, out, "--seed", 3, "--ray", cluster.address)
    second = cluster.machines[1]
    wait_until(lambda: writes_below(second, out / ".convert" / "parts"), process)
    second.kill()
    code, printed, err = ended(process)
    # as without a cluster, the command ends with the name of the shard that cannot be read
    assert code == 1 and "part-4.parquet cannot be read" in said(err)[-1], err

    alone = tmp_path / "alone"
    report = convert_pairs(broken, alone, seed=3)
    assert json.loads(printed) == report
    assert tree(out) == tree(alone)
    # a shard that cannot be opened is one row that says so; the rest is there
    reasons = [entry["reason"] for entry in json_lines(out / "rejected.jsonl")]
    assert "part-4.parquet is cut off" in reasons[-1] and len(reasons) == 2
    assert report["pairs"] == 4 * ROWS - 1


def test_a_shard_that_fails_is_named_and_the_rest_is_done(cluster, shards, tmp_path):
    out = tmp_path / "out"
    options = ("--text-only", tmp_path / "talk.jsonl", "--share", 0.3)
    (tmp_path / "talk.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": "Hello"}, answer]}) + "\n"
            for answer in [{"role": "assistant", "content": f"Word {n}"} for n in range(40)]
        )
    )
    command = ("convert", shards, out, *options, "--ray", cluster.address)
    code, printed, err = ended(cluster.run(*command, "--strict"))
    (line,) = said(err)
    assert (code, printed) == (1, "")
    bad = 2 * ROWS + 3
    reason = f"part-2.parquet (row {bad}, id 'id-{bad:05d}': image"
    assert f"1 of 5 shards were not converted: {reason}" in line
    done = out / ".convert" / "parts"
    names = sorted(path.name for path in done.iterdir())
    assert names == [f"{shard * ROWS:012d}" for shard in (0, 1, 3, 4)]

    # without --strict the row alone is left out; what was done is not done again
    pictures = {
        name: (out / "images" / name).stat()
        for name in ("id-00000.png", f"id-{5 * ROWS - 1:05d}.png")
    }
    assert ended(cluster.run(*command))[0] == 0
    for name, before in pictures.items():
        assert (out / "images" / name).stat().st_mtime_ns == before.st_mtime_ns
    convert_pairs(shards, tmp_path / "alone", text_only=tmp_path / "talk.jsonl", share=0.3)
    assert tree(out) == tree(tmp_path / "alone")


# Prints a hash of each of some pictures. Without a PATH no audit looks for text in pictures, which takes
# a second for each.
CELLS = """
import hashlib, sys
from medtune.audit import fingerprint_on_cluster
marked = fingerprint_on_cluster(sys.argv[1], ray=sys.argv[2])
for cell in marked.cells([70, 0, 31]):
    print(hashlib.sha256(cell["bytes"]).hexdigest())
"""


def test_audit_names_a_bad_shard_and_goes_on_with_it_alone(cluster, shards, tmp_path, monkeypatch):
    monkeypatch.setitem(cluster.environment, "MEDTUNE_SALT", "a secret")
    source = tmp_path / "shards"
    shutil.copytree(shards, source)
    # the bad row would end every audit
    (source / "part-2.parquet").unlink()
    # two look-alikes of two patients, in two shards
    for shard, form in ((5, "PNG"), (6, "JPEG")):
        rows = [
            pair(1000 + shard, image=encode(picture(7, size=(512, 256)), form), group=f"q{shard}")
        ]
        write_shard(source / f"test-{shard}.parquet", rows)
    whole = cut_off(source / "part-3.parquet")
    keep = tmp_path / "keep"

    def audit(name: str, *words) -> tuple[int, str, list[str]]:
        table = tmp_path / f"{name}.csv"
        process = cluster.run_program(
            "import os; os.environ['PATH'] = ''; " + COMMAND,
            *("audit", source, "--split-by", "patient", "--write", table),
            *("--fingerprints", tmp_path / name, *words),
        )
        code, printed, err = ended(process)
        return code, printed, said(err)

    code, printed, lines = audit("keep", "--ray", cluster.address)
    assert (code, printed) == (1, "") and not (tmp_path / "keep.csv").exists()
    assert "1 of 6 shards could not be read: part-3.parquet (" in lines[-1]
    done = {file.name: file.stat().st_mtime_ns for file in (keep / "shards").iterdir()}
    assert len(done) == 5

    (source / "part-3.parquet").write_bytes(whole)
    together = audit("keep", "--ray", cluster.address)
    assert together[0] == 0
    assert together == audit("alone")
    assert (tmp_path / "keep.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()
    assert tree(keep) == tree(tmp_path / "alone")
    # what looks alike stays together, over shards and patients
    lines = (tmp_path / "keep.csv").read_text().splitlines()
    places = {line.split(",")[0]: line.split(",")[1:] for line in lines}
    assert places["id-01005"] == places["id-01006"]
    # a few pictures can be had again, such as those that are searched for text
    code, printed, err = ended(cluster.run_program(CELLS, source, cluster.address))
    assert code == 0, err
    files = [pq.read_table(file)["image"].to_pylist() for file in sorted(source.iterdir())]
    wanted = [sum(files, [])[row]["bytes"] for row in (70, 0, 31)]
    assert printed.split() == [hashlib.sha256(content).hexdigest() for content in wanted]


def test_answers_of_two_machines_stand_in_the_file_once(cluster, tiny_vlm, sample_path, tmp_path):
    convert_pairs(some_of(sample_path, tmp_path / "pairs"), tmp_path / "data", split_by="none")
    command = ("evaluate", tmp_path / "data", "--split", "train", "--model", tiny_vlm)
    command += ("--batch-size", 2, "--max-new-tokens", 16, "--score", "finding")
    out = tmp_path / "together.jsonl"
    process = cluster.run(*command, "--out", out, "--ray", cluster.address)
    wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 4, process)
    cluster.machines[1].kill()
    code, printed, err = ended(process)
    assert code == 0, err

    alone = tmp_path / "alone.jsonl"
    assert ended(cluster.run(*command, "--out", alone))[:2] == (0, printed)
    assert untimed(out) == untimed(alone)
    beside = [file.with_suffix(".settings.json").read_bytes() for file in (out, alone)]
    assert beside[0] == beside[1]
    # a file that one process has begun is finished by the cluster
    begun = alone.read_bytes().splitlines(keepends=True)[:5]
    alone.write_bytes(b"".join(begun))
    assert ended(cluster.run(*command, "--out", alone, "--ray", cluster.address))[0] == 0
    assert alone.read_bytes().startswith(b"".join(begun)) and untimed(out) == untimed(alone)


def some_of(sample: Path, folder: Path) -> Path:
    """Some pairs of the sample, as a shard."""
    folder.mkdir()
    rows = next(pq.ParquetFile(sample).iter_batches(14, columns=["image", "id", "caption"]))
    pq.write_table(pa.Table.from_batches([rows]), folder / "some.parquet")
    return folder


def untimed(file: Path) -> dict[str, dict]:
    """The answers by id, without the seconds that each took; none stands there twice."""
    answers = json_lines(file)
    by_id = {answer["id"]: answer | {"seconds": 0} for answer in answers}
    assert len(by_id) == len(answers)
    return by_id


def test_what_cannot_be_shared_is_one_line(tmp_path, shards):
    for options, message in [
        ({"pictures_per_sample": 2}, "ray=127.0.0.1:1 makes records of one picture"),
        ({}, "no cluster can be joined at ray=127.0.0.1:1"),
    ]:
        with pytest.raises((ValueError, OSError), match=message) as told:
            convert_pairs(shards, tmp_path / "out", ray="127.0.0.1:1", **options)
        assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="ray=there takes parquet shards"):
        convert_pairs("sample", tmp_path / "other", ray="there", split_by="none")
