"""Train from shards of many pairs: audit, split, ten steps on two ranks, a kill, and on from there.

    python benchmarks/stream.py --pairs 5000 50000 --out results.json
    python benchmarks/stream.py --pairs 500000 --out results.json   # twice the disk of the shards
    python benchmarks/stream.py --loader                    # a loader alone: pairs/s and memory

The pairs are those of the sample under new ids, again and again, in 50 shards that are made on the
spot. Pictures are 192 pixels wide; those of each copy are a little lighter and coarser than those of
the one before, so that no two files are equal. Each copy has patients of its own; the audit finds
that their pictures are nearly the same, and keeps the copies on one side. With `--splits-by-group`
the table of splits is dealt out by the patients alone, without looking at the pictures.

`--loader` compares a loader of shards with one of the converted folder of the same pairs: both with
two processes, shuffled, and every picture decoded, but not prepared for a model.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from _harness import (
    SAMPLE,
    TINY_MODEL,
    environment_of_ranks,
    make_parser,
    to_arguments,
    torchrun,
    write_result,
)
from PIL import Image

SHARDS = 50
GROUP = 100  # rows of a row group
RANKS = 2
STEPS = 10
KILLED_AFTER = 4
SIDE = 192  # pixels; what the tiny base sees
WORKERS = 2
BATCH = 16
COLUMNS = ["image", "id", "caption", "group"]


# ---- the pairs


def make_shards(folder: Path, pairs: int, side: int | None = None) -> None:
    """Write the sample again and again, under new ids, with flat memory.

    Parameters
    ----------
    folder : where the shards go.
    pairs : how many in all.
    side : pictures of so many pixels, other ones in each copy; None takes them as they are.
    """
    folder.mkdir(parents=True)
    sample = pq.ParquetFile(SAMPLE)
    schema = pa.schema([sample.schema_arrow.field(name) for name in COLUMNS])
    copies = -(-pairs // sample.metadata.num_rows)
    missing = pairs
    with contextlib.ExitStack() as open_files:
        writers = []
        for shard in range(SHARDS):
            writer = pq.ParquetWriter(folder / f"part-{shard:05d}.parquet", schema)
            writers.append(open_files.enter_context(writer))
        # like cards, so that a shard holds a bit of everything
        for number, table in enumerate(tables_of_copies(sample, copies, side)):
            writers[number % SHARDS].write_table(table.slice(0, missing).cast(schema))
            missing -= min(missing, table.num_rows)
            if not missing:
                break
    # a small set does not fill all of them
    for file in folder.iterdir():
        if not pq.read_metadata(file).num_rows:
            file.unlink()


def tables_of_copies(sample: pq.ParquetFile, copies: int, side: int | None) -> Iterator[pa.Table]:
    """Yield the rows of the sample, a row group at a time, each so many times as other people's."""
    for batch in sample.iter_batches(GROUP, columns=COLUMNS):
        pictures = []
        if side is not None:
            pictures = [shrunk(cell["bytes"], side) for cell in batch["image"].to_pylist()]
        for copy in range(copies):
            ids = []
            for name in batch["id"].to_pylist():
                ids.append(str(uuid.uuid5(uuid.NAMESPACE_OID, f"{copy} {name}")))
            groups = [f"{name} {copy}" for name in batch["group"].to_pylist()]
            images = batch["image"]
            if side is not None:
                cells = [{"bytes": changed(picture, copy), "path": None} for picture in pictures]
                images = pa.array(cells, images.type)
            # a split is for the audit to make
            yield pa.Table.from_arrays([images, ids, batch["caption"], groups], COLUMNS)


def shrunk(data: bytes, side: int) -> Image.Image:
    """Decode a picture, of so many pixels on each side."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (side, side))
    return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def changed(picture: Image.Image, copy: int) -> bytes:
    """Encode a picture, a little lighter and coarser with each copy."""
    lighter = copy % 10
    table = [min(255, value + lighter) for value in range(256)]
    file = io.BytesIO()
    # ten shades times ten qualities: more copies than 500,000 pairs need
    quality = 60 + copy // 10 % 10
    picture.point(table * 3).save(file, "JPEG", quality=quality)
    return file.getvalue()


def split_by_patients(shards: Path, table: Path) -> None:
    """Deal the patients out without looking at pictures."""
    from medtune.audit import split_by_group, write_splits

    parts = [pq.read_table(file, columns=["id", "group"]) for file in sorted(shards.iterdir())]
    rows = pa.concat_tables(parts)
    groups = rows["group"].to_pylist()
    write_splits(table, rows["id"].to_pylist(), split_by_group(groups), groups)


# ---- a training in processes of its own


@dataclass(frozen=True)
class Ran:
    """What a command took.

    Parameters
    ----------
    seconds : by the clock on the wall.
    cpu : seconds of processors, of all its processes.
    peak_mb : most memory that one of its processes had.
    own_mb : the same without files that are mapped into it, which the system can drop at any time.
    """

    seconds: float
    cpu: float
    peak_mb: float
    own_mb: float


def run(command: list[str], work: Path, *, killed_at: Path | None = None) -> Ran:
    """Run a command to its end, or kill all its processes once a file is there.

    What libraries keep goes into the folder `work`.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    environment = environment_of_ranks(
        OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(work / "cache")
    )
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak = own = 0.0
    while process.poll() is None:
        for resident, mapped in memory_of(process):
            peak = max(peak, resident)
            own = max(own, resident - mapped)
        if killed_at is not None and killed_at.exists():
            kill(process)
            break
        time.sleep(0.05)
    code = process.wait()
    if code != (0 if killed_at is None else -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(command)} ended with {code}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ran(round(time.monotonic() - began, 1), round(cpu, 1), round(peak), round(own))


def memory_of(process: subprocess.Popen) -> list[tuple[float, float]]:
    """Give the memory of a process and each below it in MB, and how much of it is mapped files."""
    found = []
    with contextlib.suppress(psutil.Error):
        for member in [psutil.Process(process.pid), *below(process)]:
            memory = member.memory_info()
            found.append((memory.rss / 1e6, memory.shared / 1e6))
    return found


def below(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def kill(process: subprocess.Popen) -> None:
    """End a command and all its processes as a power cut would."""
    family = below(process)
    process.kill()
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)


def training(shards: Path, table: Path, out: Path, **changes: Any) -> list[str]:
    """Give the command of ten steps on two ranks."""
    settings = {
        "data": shards,
        "splits": table,
        "model_name_or_path": TINY_MODEL,
        "output_dir": out,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return [*torchrun(RANKS), "-m", "medtune.training", *to_arguments(settings | changes)]


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def losses_of(out: Path) -> list[float]:
    log = json.loads((out / "log.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry]


def simulate(pairs: int, splits_by_group: bool, work: Path) -> dict[str, Any]:
    """Take a set through audit, split, ten steps, a kill and the rest; give what it took."""
    shards, table = work / "shards", work / "splits.csv"
    began = time.monotonic()
    result: dict[str, Any] = {"pairs": pairs, "load_before": round(os.getloadavg()[0], 1)}
    make_shards(shards, pairs, SIDE)
    result["shards"] = len(list(shards.iterdir()))
    result["bytes"] = bytes_in(shards)
    result["make_seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(result), flush=True)

    if splits_by_group:
        split_by_patients(shards, table)
    else:
        medtune = str(Path(sys.executable).with_name("medtune"))
        command = [medtune, "audit", str(shards), "--write", str(table)]
        command += ["--fingerprints", str(work / "fingerprints")]
        result["audit"] = asdict(run(command, work))
        # the pictures once more, mapped into memory for the audit
        result["cache_bytes"] = bytes_in(work / "cache")
        result["fingerprint_bytes"] = bytes_in(work / "fingerprints")
        shutil.rmtree(work / "cache")
        shutil.rmtree(work / "fingerprints")
    result["splits"] = "by patient" if splits_by_group else "medtune audit"
    result["table_bytes"] = table.stat().st_size
    print(json.dumps(result), flush=True)

    result["undisturbed"] = asdict(run(training(shards, table, work / "undisturbed"), work))
    print(json.dumps(result), flush=True)
    note = work / "killed" / f"checkpoint-{KILLED_AFTER}" / "complete.json"
    run(training(shards, table, work / "killed"), work, killed_at=note)
    went_on = run(training(shards, table, work / "killed", resume=True), work)
    result["resumed"] = asdict(went_on)
    result["losses"] = losses_of(work / "killed")
    adapters = []
    for name in ("undisturbed", "killed"):
        adapters.append((work / name / "model" / "adapter_model.safetensors").read_bytes())
    same_losses = losses_of(work / "undisturbed") == result["losses"]
    result["same_as_undisturbed"] = adapters[0] == adapters[1] and same_losses
    return result


# ---- a loader alone


def decode(rows: list[dict]) -> tuple[int, float]:
    """Decode the pictures of rows; give how many there were, and the memory of this process."""
    import datasets

    for row in rows:
        for picture in row["images"]:
            datasets.Image().decode_example(picture).convert("RGB")
    status = Path("/proc/self/status").read_text()
    return len(rows), int(status.split("VmHWM:")[1].split()[0]) / 1024


def read_all(side: str, source: Path) -> None:
    """Read all pairs once through a loader of two processes, and print what it took."""
    import datasets
    from _harness import peak_memory_mb
    from torch.utils.data import DataLoader
    from torchdata.stateful_dataloader import StatefulDataLoader

    from medtune.records import RecordStream, index_shards, read_records

    began = time.monotonic()
    if side == "shards":
        stream = RecordStream(index_shards(source, split_by="none"), "train")
        windows = stream.windows(seed=0, batch_size=BATCH, workers=WORKERS)
        records = stream.records(windows, seed=0, workers=WORKERS, decode=False)
        make, options = StatefulDataLoader, {}
    else:
        undecoded = datasets.List(datasets.Image(decode=False))
        records = read_records(source).cast_column("images", undecoded)
        make, options = DataLoader, {"shuffle": True}
    opened = time.monotonic()
    loader = make(records, batch_size=BATCH, collate_fn=decode, num_workers=WORKERS, **options)
    seen = 0
    peak = 0.0
    for count, memory in loader:
        seen += count
        peak = max(peak, memory)
    ended = time.monotonic()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = resource.getrusage(resource.RUSAGE_SELF)
    cpu = spent.ru_utime + spent.ru_stime + own.ru_utime + own.ru_stime
    found = {
        "side": side,
        "pairs": seen,
        "open_seconds": round(opened - began, 2),
        "pairs_per_second": round(seen / (ended - opened), 1),
        "cpu_ms_a_pair": round(1000 * cpu / seen, 3),
        "loader_peak_mb": round(peak),
        "main_peak_mb": round(peak_memory_mb()),
    }
    print(json.dumps(found))


def compare_loaders(sizes: list[int], rounds: int, work: Path) -> list[dict[str, Any]]:
    """Measure both sides in turn, each in a process of its own; all rounds are kept."""
    from medtune.records import convert_pairs

    results = []
    for size in sizes:
        make_shards(work / f"{size}", size)
        # the pictures of a large set are not written twice
        folder = work / f"{size}-converted"
        sides = {"shards": work / f"{size}"}
        if size == min(sizes):
            convert_pairs(work / f"{size}", folder, split_by="none")
            sides["folder"] = folder
        for _ in range(rounds):
            for side, source in sides.items():
                command = [sys.executable, __file__, "--read", side, str(source)]
                environment = environment_of_ranks(
                    OMP_NUM_THREADS="1", HF_DATASETS_CACHE=str(work / "cache")
                )
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(results[-1]), flush=True)
        shutil.rmtree(work / f"{size}")
    return results


def main() -> None:
    """Run what the arguments ask for."""
    parser = make_parser(__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[20_000])
    parser.add_argument("--splits-by-group", action="store_true")
    parser.add_argument("--loader", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 50_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--work", type=Path, help="folder for the shards, which is removed")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read_all(args.read[0], Path(args.read[1]))
        return
    results = []
    if args.loader:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            results = compare_loaders(args.sizes, args.rounds, Path(folder))
    else:
        for pairs in args.pairs:
            # one after the other, so that the disk holds one set at a time
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                results.append(simulate(pairs, args.splits_by_group, Path(folder)))
    result = {"cores": len(os.sched_getaffinity(0)), "results": results}
    print(json.dumps(result, indent=1))
    if args.out:
        write_result(args.out, result)


if __name__ == "__main__":
    main()
