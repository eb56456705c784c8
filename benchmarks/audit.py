"""Time the near-duplicate audit of 20,000 pictures, and show that memory does not follow them.

    python benchmarks/audit.py              # 5,000 and 20,000 pictures, made on the spot: minutes
    python benchmarks/audit.py --data shard.parquet --rows 162000
    python benchmarks/audit.py --search papermill_runs/reference/audit-scale/results.json

The pictures are JPEG of 512x512. One in twenty is planted: another one of the set, saved again,
scaled, trimmed or brightened. The table tells how many of those were found, and whether any two
others were called alike. Seconds are given on the wall and of the processors: on a shared machine
the second tells more.

With `--search` only the comparison is measured, on random fingerprints up to 5 million with 1%
planted copies, one thread: half an hour. `--rivals` adds the indexes of faiss (`pip install
faiss-cpu`), which are given the same task.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _audit_search import MEASURES, RIVALS, measure_rival, search, summary_of, versions
from _harness import Stopwatch, make_parser, peak_memory_mb, write_result
from PIL import Image, ImageEnhance

from medtune.audit import fingerprint, near_duplicates
from medtune.pairs import load_pairs

SIDE = 512
# pictures of a parquet file
SHARD = 500
# of so many pictures the last is a copy of the first
EVERY = 20
TEXTURES = 40
TEXTURE_SIDE = 1024
MACHINE = "two CPU cores of an x86-64 server that did other work as well; one thread"
HEADER = (
    "pictures  wall s  reading s  comparing s  processor s  pictures/s  peak MB  pairs  "
    "planted and found"
)


# ---- pictures


@cache
def textures() -> np.ndarray:
    """Make large random textures with detail of every size, (textures, side, side), -1 to 1."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(TEXTURES):
        total = np.zeros((TEXTURE_SIDE, TEXTURE_SIDE), np.float32)
        # from 6x6 to 384x384 dots, the finer the fainter
        for octave in range(7):
            side = 6 * 2**octave
            dots = Image.fromarray(rng.normal(0, 1, (side, side)).astype(np.float32))
            large = dots.resize((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.BICUBIC)
            total = total + np.asarray(large) / 2**octave
        made.append(total / np.abs(total).max())
    return np.stack(made).astype(np.float32)


def make_picture(seed: int) -> Image.Image:
    """Mix windows of three textures."""
    rng = np.random.default_rng(seed)
    total = np.zeros((SIDE, SIDE), np.float32)
    for texture in rng.choice(TEXTURES, 3, replace=False):
        x, y = rng.integers(0, TEXTURE_SIDE - SIDE, 2)
        window = textures()[texture, y : y + SIDE, x : x + SIDE]
        total += np.rot90(window, rng.integers(4))
    grey = (total * 80 + 110).clip(0, 220).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def scaled(image: Image.Image) -> Image.Image:
    return image.resize((384, 384))


def trimmed(image: Image.Image) -> Image.Image:
    return image.crop((5, 5, SIDE - 5, SIDE - 5))


def trimmed_below(image: Image.Image) -> Image.Image:
    return image.crop((0, 0, SIDE, SIDE - 15))


def brightened(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.15)


# What is done to a copy, and the JPEG quality with which it is saved; None saves it again, worse.
CHANGES: tuple[tuple[Callable[[Image.Image], Image.Image] | None, int], ...] = (
    (None, 60),
    (scaled, 90),
    (trimmed, 90),
    (trimmed_below, 90),
    (brightened, 90),
)


def make_jpeg(number: int) -> bytes:
    """Make a picture of the set; one in twenty is a changed copy of the one 19 places before it."""
    quality = 90
    if number % EVERY == EVERY - 1:
        image = make_picture(number - EVERY + 1)
        change, quality = CHANGES[number // EVERY % len(CHANGES)]
        if change:
            image = change(image)
    else:
        image = make_picture(number)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def make_shard(folder: str, start: int) -> None:
    """Write the pictures from `start` on as a parquet file."""
    numbers = range(start, start + SHARD)
    cells = [{"bytes": make_jpeg(number), "path": None} for number in numbers]
    ids = [f"n{number}" for number in numbers]
    table = pa.table({"image": cells, "id": ids, "caption": ids})
    pq.write_table(table, Path(folder) / f"{start:08d}.parquet", row_group_size=100)


# ---- the audit


def audit(source: str, rows: int, workers: int) -> None:
    """Audit in a process of its own, whose peak memory is then that of the audit; print a line."""
    pairs = load_pairs(source, streaming=True, limit=rows)
    watch = Stopwatch()
    marks = fingerprint(pairs, workers=workers)
    reading = watch.read()
    found = near_duplicates(pairs, fingerprints=marks)
    spent = watch.read()
    count = len(marks.digests)
    planted = {(number - EVERY + 1, number) for number in range(EVERY - 1, count, EVERY)}
    hits = planted & {(one, other) for one, other, _ in found}
    cells = [
        f"{count:8,}",
        f"{spent.wall:7.1f}",
        f"{reading.wall:9.1f}",
        f"{spent.wall - reading.wall:10.1f}",
        f"{spent.cpu:11.1f}",
        f"{count / spent.wall:10.0f}",
        f"{int(peak_memory_mb()):8}",
        f"{len(found):7,}",
        f"{len(hits):7,} of {len(planted):,}",
    ]
    print(" ".join(cells))


def audit_apart(source: str, rows: int, workers: int) -> None:
    """Start a process that audits."""
    command = [sys.executable, __file__, "--one", source, "--rows", str(rows)]
    command += ["--workers", str(workers)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


# ---- the search alone


def measure_apart(words: list[str]) -> dict:
    """Measure one search in a process of its own; its last line is the result."""
    command = [sys.executable, __file__, "--measure", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = "{}"
    for line in process.stdout:
        print(line, end="", flush=True)
    if process.wait():
        raise RuntimeError(f"{' '.join(words)} failed")
    return json.loads(line)


def measure_search(file: Path, sizes: list[int], memory: list[int], rivals: bool) -> None:
    """Measure what is asked for; what the file has of other measurements stays."""
    for measure in MEASURES:
        if int(measure[0]) in sizes:
            add_measured(file, "searches", measure_apart(["search", *measure]))
    for rows in memory:
        with tempfile.TemporaryDirectory() as folder:
            # the same pictures again and again: their fingerprints take as much room as others
            make_shard(folder, 0)
            [shard] = Path(folder).iterdir()
            for number in range(1, rows // SHARD):
                os.link(shard, Path(folder) / f"{number * SHARD:08d}.parquet")
            add_measured(file, "reading", measure_apart(["memory", folder]))
    for rival in RIVALS if rivals else []:
        add_measured(file, "rivals", measure_apart(["rival", *rival]))


def add_measured(file: Path, kind: str, new: dict) -> None:
    """Put a result in the place of an older one of the same measurement; by size, ascending."""
    result: dict = {"searches": [], "reading": [], "rivals": []}
    if file.exists():
        result = json.loads(file.read_text("utf-8"))
    measurement = ("index", "pictures", "exact")
    key = [new.get(name) for name in measurement]
    rows = [row for row in result[kind] if [row.get(name) for name in measurement] != key]
    result[kind] = sorted([*rows, new], key=lambda row: row["pictures"])
    result.update(summary_of(result["searches"], result["reading"]))
    result["command"] = "python benchmarks/audit.py --rivals --search results.json"
    result["machine"] = MACHINE
    result["versions"] = versions()
    write_result(file, result)


def measure_memory(source: str) -> dict:
    """Fingerprint a stream of shards into a folder, which is how a set that fits nowhere is read."""
    pairs = load_pairs(source, streaming=True)
    watch = Stopwatch()
    marks = fingerprint(pairs, keep=Path(source) / "marks")
    spent = watch.read()
    return {
        "pictures": len(marks.digests),
        "cpu_seconds": round(spent.cpu, 1),
        "wall_seconds": round(spent.wall, 1),
        "peak_mb": int(peak_memory_mb()),
    }


def measure_one(words: list[str]) -> None:
    """Measure what `measure_apart` names, and print the result as one line."""
    kind, *rest = words
    if kind == "rival":
        result = measure_rival(rest[0], int(rest[1]))
    elif kind == "memory":
        result = measure_memory(rest[0])
    else:
        pictures, distance, how = rest
        result = search(int(pictures), int(distance), exact=how == "exact")
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 20_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--data", help="audit these pictures instead (the planted column then says nothing)"
    )
    parser.add_argument("--search", type=Path, help="measure the search alone, and write this file")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[100_000, 200_000, 1_000_000, 5_000_000],
        help="fingerprints that are searched",
    )
    parser.add_argument(
        "--memory",
        type=int,
        nargs="*",
        default=[5_000, 50_000],
        help="pictures that are read from a stream into a folder of fingerprints",
    )
    parser.add_argument("--rivals", action="store_true", help="measure the indexes of faiss too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure_one(args.measure)
        return
    if args.search:
        measure_search(args.search, args.sizes, args.memory, args.rivals)
        return
    if args.one:
        audit(args.one, args.rows[0], args.workers)
        return
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            with ProcessPoolExecutor(args.workers) as pool:
                # the list waits for all, and raises what went wrong
                list(pool.map(partial(make_shard, folder), range(0, max(args.rows), SHARD)))
        print(HEADER, flush=True)
        for rows in args.rows:
            audit_apart(args.data or folder, rows, args.workers)


if __name__ == "__main__":
    main()
