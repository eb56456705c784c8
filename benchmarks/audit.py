"""Time the near-duplicate audit of 20,000 pictures (512x512 JPEG), and show that memory does not follow the pictures.

    python benchmarks/audit.py                      # 5,000 and 20,000 pictures, made on the spot (a minute or two)
    python benchmarks/audit.py --data shard.parquet --rows 162000

One picture in twenty is planted: another one of the set, saved again, scaled, trimmed or brightened. The table tells
how many of those were found, and whether any two others were called alike. Seconds are given on the wall and of the
processors: on a shared machine the second tells more.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

SIDE, SHARD = 512, 500
CHANGES = (
    lambda image: (image, 60),
    lambda image: (image.resize((384, 384)), 90),
    lambda image: (image.crop((5, 5, SIDE - 5, SIDE - 5)), 90),
    lambda image: (image.crop((0, 0, SIDE, SIDE - 15)), 90),
    lambda image: (ImageEnhance.Brightness(image).enhance(1.15), 90),
)


@cache
def textures() -> np.ndarray:
    """Forty large random textures with detail of every size; a picture mixes windows of three of them."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(40):
        total = sum(
            np.asarray(Image.fromarray(rng.normal(0, 1, (6 << k, 6 << k)).astype(np.float32)).resize((1024, 1024), 3))
            / 2**k
            for k in range(7)
        )
        made.append(total / np.abs(total).max())
    return np.stack(made).astype(np.float32)


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    total = np.zeros((SIDE, SIDE), np.float32)
    for texture in rng.choice(40, 3, replace=False):
        x, y = rng.integers(0, 1024 - SIDE, 2)
        total += np.rot90(textures()[texture, y : y + SIDE, x : x + SIDE], rng.integers(4))
    return Image.fromarray((total * 80 + 110).clip(0, 220).astype(np.uint8)).convert("RGB")


def make_shard(start: int, stop: int, path: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = []
    for number in range(start, stop):
        planted = number % 20 == 19  # a copy of the picture 19 places before it
        image, quality = (
            CHANGES[number // 20 % len(CHANGES)](picture(number - 19)) if planted else (picture(number), 90)
        )
        image.save(buffer := io.BytesIO(), "JPEG", quality=quality)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    ids = [f"n{number}" for number in range(start, stop)]
    pq.write_table(pa.table({"image": cells, "id": ids, "caption": ids}), path, row_group_size=100)


def audit(folder: str, rows: int, workers: int) -> None:
    """Run in a process of its own, whose peak memory is then that of the audit."""
    from medtune.audit import fingerprint, near_duplicates
    from medtune.data import load_pairs

    pairs = load_pairs(folder, streaming=True, limit=rows)
    wall, spent = time.perf_counter(), time.process_time()
    marks = fingerprint(pairs, workers=workers)
    read = time.perf_counter() - wall
    found = near_duplicates(pairs, fingerprints=marks)
    wall, spent = time.perf_counter() - wall, time.process_time() - spent
    status = Path("/proc/self/status").read_text()  # of this program alone, unlike resource.getrusage
    peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
    count = len(marks.digests)
    planted = {(number - 19, number) for number in range(19, count, 20)}
    hits = len(planted & {(i, j) for i, j, _ in found})
    print(f"{count:8,} {wall:7.1f} {read:9.1f} {wall - read:10.1f} {spent:11.1f} {count / wall:10.0f} {peak:8} "
          f"{len(found):7,} {hits:7,} of {len(planted):,}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 20_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--data", help="audit these pictures instead of made ones (the planted column then says nothing)"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return audit(args.one, args.rows[0], args.workers)
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            with ProcessPoolExecutor(args.workers) as pool:
                starts = range(0, max(args.rows), SHARD)
                paths = [str(Path(folder) / f"{start:08d}.parquet") for start in starts]
                list(pool.map(make_shard, starts, [start + SHARD for start in starts], paths))
        print(
            "pictures  wall s  reading s  comparing s  processor s  pictures/s  peak MB  pairs  planted and found",
            flush=True,
        )
        for rows in args.rows:
            command = [sys.executable, __file__, "--one", args.data or folder, "--rows", str(rows)]
            subprocess.run([*command, "--workers", str(args.workers)], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
