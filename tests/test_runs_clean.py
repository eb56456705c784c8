"""What a run left goes, and nothing else does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import filelock
import pytest
from PIL import Image

from medtune.pairs import load_pairs
from medtune.records import convert_pairs, read_records
from medtune.runs import clean


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of `datasets` for this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "clone"
    (root / "notebooks").mkdir(parents=True)
    (root / "papermill_runs").mkdir()
    return root


def pairs(folder: Path, ids: str) -> Path:
    """A parquet file with a pair for each letter."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "id": list(ids),
        "image": [Image.effect_noise((24, 16), 20 + ord(one)).convert("RGB") for one in ids],
        "caption": [f"The liver, number {one}." for one in ids],
    }
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def make_run(root: Path, name: str, ids: str = "abcdef") -> Path:
    """A run with what notebooks leave; returns its folder of results."""
    out = root / "papermill_runs" / name / "out"
    out.mkdir(parents=True)
    (out.parent / "params.yaml").write_text("notebooks: [02_convert_data]\n")
    data = out / "02_convert_data" / "data"
    convert_pairs(pairs(root.parent / f"source of {name}", ids), data)
    read_records(data).filter(lambda one: one != "a", input_columns="id")
    for file in (
        "02_convert_data.ipynb",
        "05_evaluate.failed.ipynb",
        "state.json",
        "summary.json",
        ".lock",
        ".state.json.1a2b.part",
        "03_finetune_lora/checkpoints/checkpoint-2/adapter_model.safetensors",
        "03_finetune_lora/checkpoints/checkpoint-2/adapter_config.json",
        "03_finetune_lora/adapter/adapter_model.safetensors",
        "03_finetune_lora/adapter/adapter_config.json",
        "04_train_on_many_gpus/ddp/checkpoint-4/model.safetensors",
        "05_evaluate/predictions_tuned.jsonl",
        "06_merge_export/merged/model-00001-of-00002.safetensors",
        "06_merge_export/merged/config.json",
        "09_chat/feedback/feedback.jsonl",
        "09_chat/feedback/images/1.png",
    ):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("something of a patient")
    return out


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def caches_of(cache: Path, out: Path) -> list[Path]:
    """Cached sets that hold the name of a run's folder."""
    word = str(out).encode()
    return [file for file in cache.rglob("*.arrow") if word in file.read_bytes()]


def test_all_of_a_run_goes_and_nothing_else(root, cache):
    out, other = make_run(root, "mine"), make_run(root, "other", "uvwxyz")
    before = files_in(root.parent)
    assert caches_of(cache, out) and caches_of(cache, other)
    planned = clean("mine", root, dry_run=True)
    assert files_in(root.parent) == before, "a dry run removes nothing"
    rows = clean("mine", root)
    assert [row["where"] for row in rows] == [row["where"] for row in planned]
    assert files_in(out.parent) == ["params.yaml"] and not out.exists()
    assert not caches_of(cache, out)
    gone = set(before) - set(files_in(root.parent))
    run = f"{out.relative_to(root.parent)}/"
    caches = {file for file in gone if file.startswith("cache/generator/")}
    assert all(file.startswith(run) for file in gone - caches)
    assert caches_of(cache, other) and (other / "02_convert_data" / "data").exists()
    for source in ("mine", "other"):
        assert (root.parent / f"source of {source}" / "pairs.parquet").exists()
    assert {row["what"] for row in rows} >= {
        "records and pictures",
        "checkpoints",
        "answers",
        "model",
        "what visitors said, and their pictures",
        "executed notebook, with pictures",
        "cache of the run's records",
    }
    assert clean("mine", root) == [], "there is nothing left to remove"


def test_sizes_are_those_of_the_files(root, cache):
    out = make_run(root, "mine")
    (out / "02_convert_data" / "data" / "large.bin").write_bytes(bytes(2_340_000))
    rows = {row["where"]: row for row in clean("mine", root, dry_run=True)}
    data = rows[str(Path("papermill_runs/mine/out/02_convert_data/data"))]
    assert data["MB"] == pytest.approx(2.3, abs=0.1) and data["done"] == "would be removed"


def test_a_cache_of_the_source_is_told_and_stays(root, cache):
    out = make_run(root, "mine")
    load_pairs(root.parent / "source of mine" / "pairs.parquet")
    told = [row for row in clean("mine", root) if row["done"].startswith("remove it yourself")]
    assert told and all(Path(row["where"]).is_dir() for row in told)
    held = b"".join(f.read_bytes() for row in told for f in Path(row["where"]).rglob("*.arrow"))
    assert b"The liver, number a." in held and not out.exists()
    again = make_run(root, "second", "klmnop")
    for row in clean("second", root):
        assert row["where"] not in [one["where"] for one in told], "other ids, another source"
    assert not again.exists()


def test_a_cache_of_another_program_stays(root, cache):
    out = make_run(root, "mine")

    def rows():
        yield {"id": "a", "images": str(out / "02_convert_data" / "data" / "x.png")}

    mine = datasets.Dataset.from_generator(rows)
    clean("mine", root)
    assert Path(mine.cache_files[0]["filename"]).exists()


def write_records(folder: Path, **pictures: list[str]) -> None:
    """Write a record for each id, with the names of its pictures."""
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A liver."}]
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, files in pictures.items():
        marks = "<image>" * len(files)
        messages = [{"role": "user", "content": f"{marks}What?"}, said[1]]
        lines.append(json.dumps({"id": name, "messages": messages, "images": files}) + "\n")
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / file)
    (folder / "train.jsonl").write_text("".join(lines))


def test_a_cache_with_one_picture_of_elsewhere_stays(root, cache):
    out = make_run(root, "mine")
    # records of one's own, beside the runs: one is about a picture of the run
    write_records(root / "papermill_runs", a=["mine/out/09_chat/a.png"], b=["elsewhere.png"])
    kept = read_records(root / "papermill_runs")
    assert caches_of(cache, out / "09_chat")
    clean("mine", root)
    assert Path(kept.cache_files[0]["filename"]).exists()


def test_a_cache_of_texts_alone_is_told(root, cache):
    out = make_run(root, "mine")
    shutil.rmtree(out / "02_convert_data")
    write_records(out / "02_convert_data" / "data", one=[], two=[])
    told = read_records(out / "02_convert_data" / "data")
    folder = Path(told.cache_files[0]["filename"]).parents[1]
    rows = {row["where"]: row["done"] for row in clean("mine", root)}
    assert rows[str(folder)].startswith("remove it yourself") and folder.exists()


def test_the_model_can_be_kept(root):
    out = make_run(root, "mine")
    # of `medtune train`, whose folder has checkpoints and the model side by side
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        for folder in ("model", "checkpoint-2"):
            (out / "03b_launched" / "training" / folder).mkdir(parents=True, exist_ok=True)
            (out / "03b_launched" / "training" / folder / file).touch()
    rows = clean("mine", root, keep_model=True)
    assert files_in(out) == [
        ".lock",
        "03_finetune_lora/adapter/adapter_config.json",
        "03_finetune_lora/adapter/adapter_model.safetensors",
        "03b_launched/training/model/adapter_config.json",
        "03b_launched/training/model/adapter_model.safetensors",
        "06_merge_export/merged/config.json",
        "06_merge_export/merged/model-00001-of-00002.safetensors",
    ]
    kept = [Path(row["where"]).name for row in rows if row["done"] == "kept"]
    assert kept == ["adapter", "model", "merged"]


HOLD = """
import sys, time, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["mine", "study/out/one", "study"])
def test_a_run_in_progress_stays(root, name):
    make_run(root, "mine")
    make_run(root, "study/out/one", "uvwxyz")
    (root / "papermill_runs" / "study.yaml").write_text("base: mine\n")
    lock = root / "papermill_runs" / name.split("/")[0] / "out" / ".lock"
    before = files_in(root)
    process = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        with pytest.raises(ValueError, match=f"run '{name}' is in progress: stop it first"):
            clean(name, root)
        assert files_in(root) == sorted(
            {*before, *[f for f in files_in(root) if f.endswith(".lock")]}
        )
    finally:
        process.kill()
        process.wait()
    clean(name, root)
    assert not (root / "papermill_runs" / name / "out").exists()


def test_links_are_removed_and_not_followed(root, tmp_path):
    """A study links the results of the run that it builds on."""
    base = make_run(root, "mine")
    out = make_run(root, "study/out/one", "uvwxyz")
    (out / "01_explore_data").symlink_to(base / "02_convert_data")
    (out / "02_convert_data" / "data" / "images" / "more").symlink_to(base)
    (out / "06_merge_export" / "linked").symlink_to(base / "06_merge_export" / "merged")
    before = files_in(base)
    clean("study/out/one", root, keep_model=True)
    assert files_in(base) == before
    assert not (out / "01_explore_data").is_symlink()
    assert files_in(out.parent)[-1] == "params.yaml"


@pytest.mark.parametrize("linked", ["out", "run"])
def test_a_run_that_lies_elsewhere_is_refused(root, tmp_path, linked):
    out = make_run(root, "mine")
    moved = out if linked == "out" else out.parent
    elsewhere = tmp_path / "elsewhere"
    moved.rename(elsewhere)
    moved.symlink_to(elsewhere)
    before = files_in(elsewhere)
    with pytest.raises(ValueError, match=r"behind a link to .* remove that one yourself"):
        clean("mine", root)
    assert files_in(elsewhere) == before


@pytest.mark.parametrize("name", ["none", "../clone/papermill_runs/mine", "/etc", "mine/out", "."])
def test_what_is_no_run_is_refused(root, name):
    out = make_run(root, "mine")
    before = files_in(root)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        clean(name, root)
    assert "\n" not in str(refused.value)
    assert files_in(root) == before and out.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may remove all")
def test_what_cannot_be_removed_is_told(root):
    out = make_run(root, "mine")
    (out / "09_chat" / "feedback").chmod(0o500)
    with pytest.raises(OSError, match="could not be removed, the first is"):
        clean("mine", root)
    assert not (out / "state.json").exists(), "a run that is half removed does not look finished"
    assert not (out / "02_convert_data").exists()
    (out / "09_chat" / "feedback").chmod(0o700)
    clean("mine", root)
    assert not out.exists()


def test_a_file_that_cannot_be_removed_keeps_no_other(root, monkeypatch):
    out = make_run(root, "mine")
    unlink = Path.unlink

    def refuse(path, *rest, **options):
        if path.name == "02_convert_data.ipynb":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, *rest, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match=r"^1 of the run's files .*02_convert_data.ipynb \(Perm"):
        clean("mine", root)
    assert files_in(out) == [".lock", "02_convert_data.ipynb"]


def test_the_lock_is_free_afterwards(root):
    out = make_run(root, "mine")
    clean("mine", root, keep_model=True)
    with filelock.FileLock(out / ".lock", timeout=0):
        pass
