r"""How many samples a second one and more processes answer together, with a GPU for each.

    python benchmarks/generate_ranks.py --ranks 1 2                       # the tiny base, also on a CPU
    python benchmarks/generate_ranks.py --ranks 1 2 --shape Qwen/Qwen3-VL-2B-Instruct \
        --samples 2048 --batch-size 256 --tokens 150 --out results.json   # two GPUs

All samples go through `generate_answers` under torchrun, into one file, as `medtune evaluate` does it.
`--shape` makes a model of a published shape with random weights in each process. Every answer has all
tokens, so that no process has less to do. The clock runs from when all processes have warmed up until
the last one is done; models are loaded before.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _harness import (
    SAMPLE,
    TINY_MODEL,
    environment_of_ranks,
    make_parser,
    torchrun,
    write_result,
)

QUESTION = "Describe this medical image."


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", help="hub name of a published model, for random weights")
    parser.add_argument(
        "--scale", default="full", help="of the shape: full, or tiny for a rehearsal"
    )
    parser.add_argument("--data", type=Path, default=SAMPLE, help="parquet file with pictures")
    parser.add_argument(
        "--samples", type=int, default=64, help="pictures repeat if there are fewer"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--side", type=int, default=512, help="pixels of a picture of --shape")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- in every rank


def load(args: argparse.Namespace, device: str) -> tuple[Any, Any]:
    """Load or make model and processor."""
    from medtune.models import load_base, load_processor
    from medtune.plan import build_twin

    processor = load_processor(TINY_MODEL)
    if not args.shape:
        return load_base(TINY_MODEL, device_map={"": device}).eval(), processor
    prepare = processor.image_processor
    pixels = args.side**2
    # Qwen-VL calls numbers of pixels by the names of edges
    prepare.size = type(prepare.size)(shortest_edge=pixels, longest_edge=pixels)
    prepare.temporal_patch_size = 2
    return build_twin(args.shape, processor, scale=args.scale, device=device), processor


def load_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Load pairs; they repeat under other ids if there are few."""
    from datasets import load_dataset

    data = load_dataset("parquet", data_files=str(args.data), split="train")
    data = data.select_columns(["image", "caption"])
    found = list(data.select(range(min(args.samples, len(data), 512))))
    rows = []
    for number in range(args.samples):
        rows.append({**found[number % len(found)], "id": str(number)})
    return rows


def answer(args: argparse.Namespace) -> None:
    """Answer all samples as one of the ranks; rank 0 notes the seconds beside the answers."""
    from medtune.answers import generate_answers

    rank = int(os.environ["LOCAL_RANK"])
    device = "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    model, processor = load(args, device)
    rows = load_rows(args)
    options = {
        "batch_size": args.batch_size,
        "max_new_tokens": args.tokens,
        "min_new_tokens": args.tokens,
        "question": QUESTION,
    }
    ranks = int(os.environ["WORLD_SIZE"])
    # it also begins the group of processes
    generate_answers(model, processor, rows[: args.batch_size * ranks], **options)
    if ranks > 1:
        torch.distributed.barrier()
    began = time.perf_counter()
    answers = generate_answers(model, processor, rows, out=args.answer, **options)
    if ranks > 1:
        torch.distributed.barrier()
    seconds = time.perf_counter() - began
    if len(answers) != len(rows) or any(row["tokens"] != args.tokens for row in answers):
        raise RuntimeError("not every sample has an answer of all tokens")
    if rank == 0:
        args.answer.with_suffix(".seconds").write_text(json.dumps(seconds))
    if ranks > 1:
        torch.distributed.destroy_process_group()


# ---- the measurements


def measure(ranks: int, args: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Start so many ranks, and say how fast they were."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.jsonl"
        command = [*torchrun(ranks), __file__, *words, "--answer", str(out)]
        subprocess.run(command, env=environment_of_ranks(), check=True)
        seconds = json.loads(out.with_suffix(".seconds").read_text())
    return {
        "ranks": ranks,
        "samples": args.samples,
        "seconds": round(seconds, 2),
        "samples_per_second": round(args.samples / seconds, 3),
    }


def main() -> None:
    args = parse()
    if args.answer:
        answer(args)
        return
    words = ["--data", str(args.data), "--samples", str(args.samples)]
    words += ["--batch-size", str(args.batch_size), "--tokens", str(args.tokens)]
    words += ["--side", str(args.side), "--scale", args.scale]
    if args.shape:
        words += ["--shape", args.shape]
    results = []
    for ranks in args.ranks:
        row = measure(ranks, args, words)
        results.append(row)
        row["times"] = round(row["samples_per_second"] / results[0]["samples_per_second"], 3)
        print(json.dumps(row), flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = {"device": device, "model": args.shape or "tiny-vlm", "tokens": args.tokens}
    if args.out:
        write_result(args.out, {**found, "batch_size": args.batch_size, "results": results})


if __name__ == "__main__":
    main()
