"""How fast, and with how much memory, pairs become a training set: against the published loop.

    python benchmarks/convert.py        # 5,000 and 50,000 pairs, 2 cores: needs 8 GB of disk
    python benchmarks/convert.py --pairs 500 --large 2000 --rounds 1

Both sides, medtune and the loop that the recipes publish, run in turn, each in a process of its own
on the same cores and the same parquet shards of JPEG pictures; the best of several rounds counts.
From the figures follows what the 25 million pairs of the full set would take.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _harness import Stopwatch, make_parser, peak_memory_mb, write_result
from PIL import Image

from medtune.records import convert_pairs

FULL = 25_000_000
# a pair's id and its hashes, which one call holds to find duplicates
ID_BYTES = 110
# pairs of a parquet file, and of a row group in it
SHARD = 10_000
GROUP = 1_000
QUESTION = "What is the diagnosis?"
CAPTION = (
    "The image is a computed tomography (CT) scan of the upper abdomen in axial view, shown with a "
    "soft tissue window. The region of interest, located in the upper left of the image, covers "
    "about 4% of its area and shows the spleen. It has soft tissue density and is bordered by the "
    "stomach and the left kidney. Within it lies a round hypodense lesion of about 14 mm, in its "
    "upper part. The abnormality may compress the surrounding tissue, pair {}."
)
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


# ---- pairs


def make_pictures(count: int = 48) -> list[bytes]:
    """Make JPEG pictures of 512x512, about 40 kB each: smooth shapes under noise, like a slice."""
    made = []
    for seed in range(count):
        draw = np.random.default_rng(seed)
        coarse = Image.fromarray(draw.integers(0, 256, (24, 24), dtype=np.uint8))
        smooth = coarse.resize((512, 512), Image.Resampling.BICUBIC)
        grey = np.asarray(smooth, dtype=np.float32) + draw.normal(0, 5, (512, 512))
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        made.append(buffer.getvalue())
    return made


def make_shards(folder: Path, pairs: int, pictures: list[bytes]) -> Path:
    """Write pairs as parquet files."""
    folder.mkdir()
    for start in range(0, pairs, SHARD):
        stop = min(start + SHARD, pairs)
        schema = make_table(range(start, start), pictures).schema
        with pq.ParquetWriter(folder / f"{start:08d}.parquet", schema) as writer:
            for first in range(start, stop, GROUP):
                rows = range(first, min(first + GROUP, stop))
                writer.write_table(make_table(rows, pictures))
    return folder


def make_table(rows: Iterable[int], pictures: list[bytes]) -> pa.Table:
    """Make pairs with these numbers."""
    images = []
    ids = []
    captions = []
    for row in rows:
        images.append({"bytes": pictures[row % len(pictures)], "path": f"{row}.jpg"})
        ids.append(f"8031efe0-1b5c-11ef-8929-{row:012d}")
        captions.append(CAPTION.format(row))
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table(
        {
            "image": pa.array(images, image_type),
            "id": pa.array(ids, pa.string()),
            "caption": pa.array(captions, pa.string()),
        }
    )


# ---- the two sides, each in a process of its own


@dataclass(frozen=True)
class Figures:
    """What one side took.

    Parameters
    ----------
    seconds : by the clock on the wall.
    cpu : seconds of the process's own processors.
    peak_mb : peak of its memory.
    record_bytes : size of the records, without the pictures.
    """

    seconds: float
    cpu: float
    peak_mb: float
    record_bytes: int


def run_published_loop(source: Path, out: Path) -> None:
    """Do what the recipes print: decode, save, one list in memory, one json.dump."""
    files = [str(file) for file in sorted(source.glob("*.parquet"))]
    pairs = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(out / "cache")
    )
    pairs = pairs.cast_column("image", datasets.Image())
    (out / "images").mkdir()
    records = []
    # after loading: to its advantage
    watch = Stopwatch()
    for pair in pairs:
        path = out / "images" / f"{pair['id']}.jpg"
        pair["image"].save(path)
        messages = [
            {"role": "user", "content": f"<image>{QUESTION}"},
            {"role": "assistant", "content": pair["caption"]},
        ]
        records.append({"messages": messages, "images": [str(path)]})
    with open(out / "train.json", "w", encoding="utf-8") as file:
        json.dump(records, file, ensure_ascii=False, indent=2)
    print_figures(watch, out)


def run_medtune(source: Path, out: Path, workers: int) -> None:
    """Convert with medtune."""
    # as the loop has, which has read pictures before its clock starts
    Image.init()
    watch = Stopwatch()
    summary = convert_pairs(source, out, questions=QUESTION, workers=workers)
    print_figures(watch, out)
    assert summary["copied"] == summary["rows"] and not summary["rejected"]


def print_figures(watch: Stopwatch, out: Path) -> None:
    """Print what this process took, as JSON."""
    spent = watch.read()
    records = [entry.stat().st_size for entry in os.scandir(out) if entry.is_file()]
    figures = {
        "seconds": spent.wall,
        "cpu": spent.cpu,
        "peak_mb": peak_memory_mb(),
        "record_bytes": sum(records),
    }
    print(json.dumps(figures))


def run_side(side: str, source: Path, out: Path, cores: int) -> None:
    """Run one side in this process, on so many cores."""
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, available[:cores])
    if side == "loop":
        run_published_loop(source, out)
    else:
        run_medtune(source, out, workers=cores)


def measure_apart(side: str, source: Path, out: Path, cores: int) -> Figures:
    """Run one side in a process of its own."""
    out.mkdir()
    command = [sys.executable, __file__, "--side", side, "--cores", str(cores)]
    command += [str(source), str(out)]
    done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


# ---- the measurement


@dataclass(frozen=True)
class Measured:
    """What all processes took.

    Parameters
    ----------
    loop, medtune : the rounds of each side.
    large : medtune on the larger set.
    picture_bytes : mean size of a picture.
    """

    loop: list[Figures]
    medtune: list[Figures]
    large: Figures
    picture_bytes: float


def measure(options: argparse.Namespace) -> Measured:
    """Make the pairs and let both sides convert them."""
    folder = Path(tempfile.mkdtemp(prefix="medtune-convert-", dir=options.folder))
    try:
        pictures = make_pictures()
        small = make_shards(folder / "small", options.pairs, pictures)
        large = make_shards(folder / "large", options.large, pictures)
        loop = []
        medtune = []
        # Nothing is deleted in between: ext4 is slow to make files for seconds after it has
        # deleted many.
        for number in range(options.rounds):
            loop.append(measure_apart("loop", small, folder / f"loop{number}", options.cores))
            medtune.append(measure_apart("medtune", small, folder / f"ours{number}", options.cores))
        much = measure_apart("medtune", large, folder / "much", options.cores)
    finally:
        shutil.rmtree(folder)
    picture_bytes = sum(map(len, pictures)) / len(pictures)
    return Measured(loop, medtune, much, picture_bytes)


def pictures_per_second(runs: list[Figures], pairs: int) -> float:
    """Give the speed of the fastest run."""
    return pairs / min(run.seconds for run in runs)


def cpu_milliseconds(runs: list[Figures], pairs: int) -> float:
    """Give the CPU milliseconds a picture of the thriftiest run."""
    return 1000 * min(run.cpu for run in runs) / pairs


def summarise(measured: Measured, options: argparse.Namespace) -> dict[str, Any]:
    """Compare both sides, and say what the full set would take."""
    slow = pictures_per_second(measured.loop, options.pairs)
    fast = pictures_per_second(measured.medtune, options.pairs)
    large = pictures_per_second([measured.large], options.large)
    peak = max(run.peak_mb for run in measured.medtune)
    record_bytes = measured.large.record_bytes / options.large
    peak_in_one_call = measured.large.peak_mb * 2**20 + FULL * ID_BYTES
    return {
        "pairs": options.pairs,
        "cores": options.cores,
        "loop_pictures_per_second": round(slow),
        "medtune_pictures_per_second": round(fast),
        "times_faster": round(fast / slow, 1),
        "loop_cpu_ms": round(cpu_milliseconds(measured.loop, options.pairs), 3),
        "medtune_cpu_ms": round(cpu_milliseconds(measured.medtune, options.pairs), 3),
        f"peak_mb_{options.pairs}": round(peak),
        f"peak_mb_{options.large}": round(measured.large.peak_mb),
        "peak_ratio": round(measured.large.peak_mb / peak, 2),
        "large_pictures_per_second": round(large),
        "full_set": {
            "pairs": FULL,
            "hours": round(FULL / large / 3600, 1),
            "loop_hours": round(FULL / slow / 3600, 1),
            "disk_gb": round(FULL * (measured.picture_bytes + record_bytes) / 1e9),
            "records_gb": round(FULL * record_bytes / 1e9),
            "peak_gb_in_one_call": round(peak_in_one_call / 1e9, 1),
        },
    }


def print_table(figures: dict[str, Any], measured: Measured, options: argparse.Namespace) -> None:
    """Print the comparison for people, then the figures as JSON."""
    pairs, large = options.pairs, options.large
    slow = figures["loop_pictures_per_second"]
    fast = figures["medtune_pictures_per_second"]
    peak = figures[f"peak_mb_{pairs}"]
    large_peak = figures[f"peak_mb_{large}"]
    kilobytes = measured.picture_bytes / 1000
    print(
        f"{pairs:,} JPEG pairs of {kilobytes:.0f} kB on {options.cores} cores, "
        f"best of {options.rounds}"
    )
    print(f"{'':24}{'pictures/s':>12}{'CPU ms each':>13}{'peak MB':>10}")
    print(f"{'published loop':24}{slow:12,}{figures['loop_cpu_ms']:13.2f}")
    print(f"{'medtune convert':24}{fast:12,}{figures['medtune_cpu_ms']:13.2f}{peak:10,}")
    name = f"  the same, {large:,}"
    print(f"{name:24}{figures['large_pictures_per_second']:12,}{'':13}{large_peak:10,}")
    print(
        f"{figures['times_faster']} times as fast; "
        f"peak memory x {figures['peak_ratio']:.2f} for {large:,} pairs"
    )
    print(json.dumps(figures))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=5_000)
    parser.add_argument(
        "--large", type=int, default=50_000, help="pairs of the second memory measurement"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--side", choices=["loop", "medtune"], help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        source, out = options.paths
        run_side(options.side, source, out, options.cores)
        return
    measured = measure(options)
    figures = summarise(measured, options)
    print_table(figures, measured, options)
    if options.json:
        write_result(options.json, figures)


if __name__ == "__main__":
    main()
