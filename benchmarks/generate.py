r"""Time `generate_answers` beside plain loops of `generate`, in one call, on the same samples.

The tiny base model on a CPU, against one `generate` call a sample:

    python benchmarks/generate.py

A large model on a GPU, with 150 tokens each, also against batches whose inputs are ready before the
clock starts:

    python benchmarks/generate.py --model bench_out/model --data bench_out/data/img \
        --dtype bfloat16 --exact --tokens 150 --samples 1024 --single 4 --plain 64 64:static \
        --batch-sizes 64 128 256 --cache static

`generate_batch` of Transformers (continuous batching) is not among the choices: it takes token ids
only, no pictures.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import SAMPLE, TINY_MODEL, Spent, Stopwatch, make_parser, write_result
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, CompileConfig

from medtune.answers import generate_answers, generation_speed
from medtune.models import load_processor

QUESTION = "What is the diagnosis in this picture?"
PICTURES = (".jpg", ".jpeg", ".png")
CUDA = torch.cuda.is_available()

Rows = list[dict[str, Any]]


def start_clock() -> Stopwatch:
    """Start a clock that waits for the GPU before it is read."""
    return Stopwatch(torch.cuda.synchronize if CUDA else None)


# ---- model and samples


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Load model and processor."""
    options = {"attn_implementation": args.attention} if args.attention else {}
    model = AutoModelForImageTextToText.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), **options
    )
    return model.to(args.device).eval(), load_processor(args.model)


def load_rows(args: argparse.Namespace) -> Rows:
    """Load pictures of a folder, or pairs of a parquet file; they repeat if there are few."""
    found = []
    if args.data.is_dir():
        files = sorted(path for path in args.data.iterdir() if path.suffix in PICTURES)
        for file in files[: args.samples]:
            found.append({"image": Image.open(file).convert("RGB"), "caption": file.name})
    else:
        data = load_dataset("parquet", data_files=str(args.data), split="train")
        data = data.select_columns(["image", "caption"]).shuffle(seed=0)
        found += data.select(range(min(args.samples, len(data))))
    rows = []
    for number in range(args.samples):
        rows.append({"id": str(number), **found[number % len(found)]})
    return rows


# ---- plain loops


def prepare(model: Any, processor: Any, rows: Rows) -> Any:
    """Make one batch of inputs."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(
        text=[text] * len(rows),
        images=[[row["image"]] for row in rows],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    return inputs.to(model.device, dtype=model.dtype)


def answer_one_by_one(model: Any, processor: Any, rows: Rows, **options: Any) -> list[str]:
    """Answer by one `generate` call a sample, as most tutorials do."""
    answers = []
    for row in rows:
        inputs = prepare(model, processor, [row])
        prompt = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, do_sample=False, **options)[0, prompt:]
        answers.append(processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return answers


# ---- the measurements


class Measurements:
    """Measure one way to answer after the other; what is slower or faster shows beside the first.

    Parameters
    ----------
    args : the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model, self.processor = load(args)
        self.rows = load_rows(args)
        self.results: list[dict[str, Any]] = []
        self.single_answers: list[str] = []
        # of `model.generate`
        self.options: dict[str, Any] = {"max_new_tokens": args.tokens}
        if args.exact:
            self.options["min_new_tokens"] = args.tokens

    def report(self, name: str, count: int, spent: Spent, **more: Any) -> None:
        """Note and print how fast `count` samples were answered."""
        rate = count / spent.wall
        cpu_rate = count / spent.cpu
        if not self.results:
            self.first_rate = rate
            self.first_cpu_rate = cpu_rate
        result = {
            "what": name,
            "samples_per_second": round(rate, 3),
            "samples_per_cpu_second": round(cpu_rate, 3),
            "times": round(rate / self.first_rate, 3),
            "times_by_cpu": round(cpu_rate / self.first_cpu_rate, 3),
            **more,
        }
        if self.args.device == "cuda":
            result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
            torch.cuda.reset_peak_memory_stats()
        self.results.append(result)
        print("  ".join(f"{key} {value}" for key, value in result.items()), flush=True)

    def attempt(self, measure: Callable[..., None], name: str, *arguments: Any) -> None:
        """Measure, or say that memory ran out."""
        try:
            measure(name, *arguments)
        except torch.OutOfMemoryError:
            print(f"what {name}  out of memory", flush=True)
            torch.cuda.empty_cache()

    def measure_single(self, count: int) -> None:
        """Measure one call a sample, after one that warms up."""
        answer_one_by_one(self.model, self.processor, self.rows[:1], **self.options)
        clock = start_clock()
        self.single_answers = answer_one_by_one(
            self.model, self.processor, self.rows[:count], **self.options
        )
        self.report("single generate calls", count, clock.read())

    def measure_plain(self, name: str, size: int, cache: str) -> None:
        """Measure one batch that is prepared before the clock starts."""
        rows = [self.rows[number % len(self.rows)] for number in range(size)]
        inputs = prepare(self.model, self.processor, rows)
        options = dict(self.options)
        if cache != "dynamic":
            options["cache_implementation"] = cache
        # the first of the two compiles
        for _ in range(2):
            clock = start_clock()
            self.model.generate(**inputs, do_sample=False, **options)
        self.report(name, size, clock.read())

    def measure_answers(
        self, name: str, size: int, cache: str, backend: str = "transformers", subject: Any = None
    ) -> None:
        """Measure `generate_answers`, after a batch that warms up."""
        options = {
            **self.options,
            "batch_size": size,
            "question": QUESTION,
            "workers": self.args.workers,
            "backend": backend,
            "cache_implementation": None if cache == "dynamic" else cache,
        }
        if self.args.compile_mode:
            options["compile_config"] = CompileConfig(mode=self.args.compile_mode)
        subject = subject or self.model
        clock = start_clock()
        generate_answers(subject, self.processor, self.rows[:size], **options)
        warm_up = clock.read()
        # the survey of the data set counts too
        clock = start_clock()
        answers = generate_answers(subject, self.processor, self.rows, **options)
        spent = clock.read()
        speed = generation_speed(answers)
        singles = self.single_answers
        same = 0
        for answer, single in zip(answers, singles, strict=False):
            same += answer["answer"] == single
        self.report(
            name,
            len(self.rows),
            spent,
            predict_samples_per_second=speed["predict_samples_per_second"],
            predict_tokens_per_second=speed["predict_tokens_per_second"],
            warm_up_seconds=round(warm_up.wall, 1),
            same_as_single=f"{same}/{len(singles)}",
        )

    def measure_vllm(self) -> None:
        """Measure `generate_answers` through vLLM, which wants the card for itself."""
        # an extra, for a GPU only
        from vllm import LLM

        self.model.to("cpu")
        torch.cuda.empty_cache()
        engine = LLM(self.args.model, dtype=self.args.dtype)
        self.measure_answers("generate_answers, vLLM", self.args.samples, "dynamic", "vllm", engine)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(TINY_MODEL))
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument(
        "--samples", type=int, default=128, help="pictures repeat if there are fewer"
    )
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument(
        "--exact", action="store_true", help="generate all tokens, whatever the end token says"
    )
    parser.add_argument(
        "--single", type=int, default=12, help="samples of the loop of single calls; 0: none"
    )
    parser.add_argument(
        "--plain", nargs="*", default=[], metavar="SIZE[:CACHE]", help="batches prepared before"
    )
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[16, 32, 64])
    parser.add_argument(
        "--cache", nargs="+", default=["dynamic"], choices=["dynamic", "static", "auto"]
    )
    parser.add_argument(
        "--compile-mode", help="of torch.compile for a static cache, such as max-autotune"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if CUDA else "cpu")
    parser.add_argument("--attention", help="attn_implementation, such as flash_attention_2")
    parser.add_argument("--workers", type=int, help="processes that prepare pictures")
    parser.add_argument("--vllm", action="store_true", help="also through vLLM")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    measurements = Measurements(args)
    if args.single:
        measurements.measure_single(args.single)
    for choice in args.plain:
        size, _, cache = choice.partition(":")
        cache = cache or "dynamic"
        name = f"plain batch of {size}, {cache} cache"
        measurements.attempt(measurements.measure_plain, name, int(size), cache)
    for cache in args.cache:
        for size in args.batch_sizes:
            name = f"generate_answers, batch {size}, {cache} cache"
            measurements.attempt(measurements.measure_answers, name, size, cache)
    if args.vllm:
        measurements.measure_vllm()
    if args.json:
        write_result(args.json, measurements.results)


if __name__ == "__main__":
    main()
