"""How fast, and with how much memory, pairs become a training set: medtune against the loop that the recipes publish.

Both sides run in turn, each in a process of its own on the same cores and the same parquet shards of JPEG pictures; the
best of several rounds counts. From the figures follows what the 25 million pairs of the full set would take.

    python benchmarks/convert.py                         # 5,000 and 50,000 pairs, 2 cores: needs 8 GB of disk
    python benchmarks/convert.py --pairs 500 --large 2000 --rounds 1
"""

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FULL = 25_000_000
ID_BYTES = 110  # a pair's id and its hashes, which one call holds to find duplicates
QUESTION = "What is the diagnosis?"
CAPTION = (
    "The image is a computed tomography (CT) scan of the upper abdomen in axial view, shown with a soft tissue window. "
    "The region of interest, located in the upper left of the image, covers about 4% of its area and shows the spleen. "
    "It has soft tissue density and is bordered by the stomach and the left kidney. Within it lies a round hypodense "
    "lesion of about 14 mm, in its upper part. The abnormality may compress the surrounding tissue, pair {}."
)


def make_pictures(count: int = 48) -> list[bytes]:
    """JPEG pictures of 512 x 512 in RGB, about 40 kB each, smooth shapes under noise like a CT slice."""
    import numpy as np
    from PIL import Image

    made = []
    for seed in range(count):
        draw = np.random.default_rng(seed)
        coarse = Image.fromarray(draw.integers(0, 256, (24, 24), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((512, 512), Image.Resampling.BICUBIC), dtype=np.float32)
        grey = smooth + draw.normal(0, 5, (512, 512))
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
        picture.save(buffer := io.BytesIO(), "JPEG", quality=80)
        made.append(buffer.getvalue())
    return made


def make_shards(folder: Path, pairs: int, pictures: list[bytes], shard: int = 10_000, group: int = 1_000) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for start in range(0, pairs, shard):
        writer = None
        for first in range(start, min(start + shard, pairs), group):
            rows = range(first, min(first + group, start + shard, pairs))
            table = pa.table({
                "image": [{"bytes": pictures[i % len(pictures)], "path": f"{i}.jpg"} for i in rows],
                "id": [f"8031efe0-1b5c-11ef-8929-{i:012d}" for i in rows],
                "caption": [CAPTION.format(i) for i in rows],
            })  # fmt: skip
            writer = writer or pq.ParquetWriter(folder / f"{start:08d}.parquet", table.schema)
            writer.write_table(table)
        writer.close()
    return folder


def published_loop(source: Path, out: Path) -> None:
    """What the recipes print: decode, save, one list in memory, one json.dump."""
    import datasets

    files = [str(file) for file in sorted(source.glob("*.parquet"))]
    pairs = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(out / "cache"))
    pairs = pairs.cast_column("image", datasets.Image())
    (out / "images").mkdir()
    records = []
    started, used = time.perf_counter(), time.process_time()  # after loading: to its advantage
    for pair in pairs:
        path = out / "images" / f"{pair['id']}.jpg"
        pair["image"].save(path)
        said = [{"role": "user", "content": f"<image>{QUESTION}"}, {"role": "assistant", "content": pair["caption"]}]
        records.append({"messages": said, "images": [str(path)]})
    with open(out / "train.json", "w", encoding="utf-8") as file:
        json.dump(records, file, ensure_ascii=False, indent=2)
    print(json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - used}))


def medtune(source: Path, out: Path, workers: int) -> None:
    import datasets  # noqa: F401  imported beforehand on both sides
    import pyarrow.parquet  # noqa: F401
    from PIL import Image

    from medtune import captions, data  # noqa: F401
    from medtune.convert import convert_pairs

    Image.init()
    started, used = time.perf_counter(), time.process_time()
    summary = convert_pairs(source, out, questions=QUESTION, workers=workers)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    assert summary["copied"] == summary["rows"] and not summary["rejected"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sizes = [os.path.getsize(entry) for entry in os.scandir(out) if entry.is_file()]
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mb": peak, "record_bytes": sum(sizes)}))


def run_apart(side: str, source: Path, out: Path, cores: int) -> dict:
    out.mkdir()
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, "--side", side, "--cores", str(cores), str(source), str(out)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5_000)
    parser.add_argument("--large", type=int, default=50_000, help="pairs of the second memory measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--side", choices=["loop", "medtune"], help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        published_loop(*options.paths) if options.side == "loop" else medtune(*options.paths, workers=options.cores)
        return
    folder = Path(tempfile.mkdtemp(prefix="medtune-convert-", dir=options.folder))
    try:
        pictures = make_pictures()
        small = make_shards(folder / "small", options.pairs, pictures)
        large = make_shards(folder / "large", options.large, pictures)
        loop, ours = [], []
        # Nothing is deleted in between: ext4 is slow to make files for seconds after it has deleted many.
        for n in range(options.rounds):
            loop.append(run_apart("loop", small, folder / f"loop{n}", options.cores))
            ours.append(run_apart("medtune", small, folder / f"ours{n}", options.cores))
        much = run_apart("medtune", large, folder / "much", options.cores)
    finally:
        shutil.rmtree(folder)
    slow, fast = (options.pairs / min(run["seconds"] for run in runs) for runs in (loop, ours))
    slow_cpu, fast_cpu = (min(run["cpu"] for run in runs) / options.pairs * 1000 for runs in (loop, ours))
    peak = max(run["peak_mb"] for run in ours)
    picture = sum(map(len, pictures)) / len(pictures)
    record = much["record_bytes"] / options.large
    figures = {
        "pairs": options.pairs,
        "cores": options.cores,
        "loop_pictures_per_second": round(slow),
        "medtune_pictures_per_second": round(fast),
        "times_faster": round(fast / slow, 1),
        "loop_cpu_ms": round(slow_cpu, 3),
        "medtune_cpu_ms": round(fast_cpu, 3),
        f"peak_mb_{options.pairs}": round(peak),
        f"peak_mb_{options.large}": round(much["peak_mb"]),
        "peak_ratio": round(much["peak_mb"] / peak, 2),
        "full_set": {
            "pairs": FULL,
            "hours": round(FULL / (options.large / much["seconds"]) / 3600, 1),
            "loop_hours": round(FULL / slow / 3600, 1),
            "disk_gb": round(FULL * (picture + record) / 1e9),
            "records_gb": round(FULL * record / 1e9),
            "peak_gb_in_one_call": round((much["peak_mb"] * 2**20 + FULL * ID_BYTES) / 1e9, 1),
        },
    }
    print(f"{options.pairs:,} JPEG pairs of {picture / 1000:.0f} kB on {options.cores} cores, best of {options.rounds}")
    print(f"{'':24}{'pictures/s':>12}{'CPU ms each':>13}{'peak MB':>10}")
    print(f"{'published loop':24}{slow:12,.0f}{slow_cpu:13.2f}")
    print(f"{'medtune convert':24}{fast:12,.0f}{fast_cpu:13.2f}{peak:10,.0f}")
    name = f"  the same, {options.large:,}"
    print(f"{name:24}{options.large / much['seconds']:12,.0f}{'':13}{much['peak_mb']:10,.0f}")
    print(f"{fast / slow:.1f} times as fast; peak memory x {much['peak_mb'] / peak:.2f} for {options.large:,} pairs")
    print(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
