"""Time `generate_answers` beside plain loops of `generate`, in one call, on the same samples.

The tiny base model on a CPU, against one `generate` call a sample:

    python benchmarks/generate.py

A large model on a GPU, with 150 tokens each, also against batches whose inputs are ready before the clock starts:

    python benchmarks/generate.py --model bench_out/model --data bench_out/data/img --dtype bfloat16 --exact \
        --tokens 150 --samples 1024 --single 4 --plain 64 64:static --batch-sizes 64 128 256 --cache static

`generate_batch` of Transformers (continuous batching) is not among the choices: it takes token ids only, no pictures.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image

from medtune.generate import generate_answers, generation_speed

QUESTION = "What is the diagnosis in this picture?"
REPO = Path(__file__).parents[1]


def load(args):
    from transformers import AutoModelForImageTextToText

    from medtune.models import load_processor

    options = {"attn_implementation": args.attention} if args.attention else {}
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **options)
    return model.to(args.device).eval(), load_processor(args.model)


def load_rows(args):
    if args.data.is_dir():
        files = sorted(path for path in args.data.iterdir() if path.suffix in (".jpg", ".jpeg", ".png"))
        rows = [{"image": Image.open(file).convert("RGB"), "caption": file.name} for file in files[: args.samples]]
    else:
        from datasets import load_dataset

        data = load_dataset("parquet", data_files=str(args.data), split="train").select_columns(["image", "caption"])
        rows = list(data.shuffle(seed=0).select(range(min(args.samples, len(data)))))
    return [{"id": str(i), **rows[i % len(rows)]} for i in range(args.samples)]


class Clock:
    """Seconds since the start, on the wall and of this process: the second tells more on a shared machine."""

    def __init__(self):
        self.start = self.now()

    def now(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def read(self):
        return tuple(b - a for a, b in zip(self.start, self.now(), strict=True))


def time_single(model, processor, rows, options):
    """One `generate` call a sample, as most tutorials do."""
    answers, clock = [], Clock()
    for row in rows:
        inputs = prepare(model, processor, [row])
        tokens = model.generate(**inputs, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return clock.read(), answers


def prepare(model, processor, rows):
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [[row["image"]] for row in rows]
    inputs = processor(text=[text] * len(rows), images=images, return_tensors="pt", padding=True, padding_side="left")
    return inputs.to(model.device, dtype=model.dtype)


def time_plain(model, processor, rows, options, batch_size, cache):
    """One batch, prepared before the clock starts; the second of two runs, as the first compiles."""
    inputs = prepare(model, processor, [rows[i % len(rows)] for i in range(batch_size)])
    options = options | ({"cache_implementation": cache} if cache != "dynamic" else {})
    for _ in range(2):
        clock = Clock()
        model.generate(**inputs, do_sample=False, **options)
    return clock.read()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPO / "data" / "tiny-vlm"))
    parser.add_argument("--data", type=Path, default=REPO / "data" / "sample" / "sample.parquet")
    parser.add_argument("--samples", type=int, default=128, help="pictures repeat if there are fewer")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--exact", action="store_true", help="generate all tokens, whatever the end token says")
    parser.add_argument("--single", type=int, default=12, help="samples of the loop of single calls; 0 leaves it out")
    parser.add_argument("--plain", nargs="*", default=[], metavar="SIZE[:CACHE]", help="batches prepared beforehand")
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[16, 32, 64])
    parser.add_argument("--cache", nargs="+", default=["dynamic"], choices=["dynamic", "static", "auto"])
    parser.add_argument("--compile-mode", help="of torch.compile for a static cache, such as max-autotune")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", help="attn_implementation, such as sdpa or flash_attention_2")
    parser.add_argument("--workers", type=int, help="processes that prepare pictures")
    parser.add_argument("--vllm", action="store_true", help="also through vLLM")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()

    model, processor = load(args)
    rows = load_rows(args)
    exact = {"min_new_tokens": args.tokens} if args.exact else {}
    options = {"max_new_tokens": args.tokens, **exact}
    results, single_answers = [], []

    def report(name, count, seconds, cpu_seconds, **more):
        rates = {"samples_per_second": count / seconds, "samples_per_cpu_second": count / cpu_seconds}
        first = results[0] if results else rates
        times = {"times": rates["samples_per_second"] / first["samples_per_second"]}
        times["times_by_cpu"] = rates["samples_per_cpu_second"] / first["samples_per_cpu_second"]
        results.append({"what": name, **{key: round(value, 3) for key, value in (rates | times).items()}, **more})
        if args.device == "cuda":
            results[-1]["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
            torch.cuda.reset_peak_memory_stats()
        print("  ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)

    def attempt(measure, name, *arguments):
        try:
            measure(name, *arguments)
        except torch.OutOfMemoryError:
            print(f"what {name}  out of memory", flush=True)
            torch.cuda.empty_cache()

    def measure_plain(name, size, cache):
        report(name, size, *time_plain(model, processor, rows, options, size, cache))

    if args.single:
        time_single(model, processor, rows[:1], options)
        seconds, single_answers = time_single(model, processor, rows[: args.single], options)
        report("single generate calls", args.single, *seconds)
    for choice in args.plain:
        size, _, cache = choice.partition(":")
        cache = cache or "dynamic"
        attempt(measure_plain, f"plain batch of {size}, {cache} cache", int(size), cache)
    if args.compile_mode:
        from transformers import CompileConfig

        exact["compile_config"] = CompileConfig(mode=args.compile_mode)

    def measure(name, backend, subject, size, cache):
        common = dict(batch_size=size, max_new_tokens=args.tokens, question=QUESTION, workers=args.workers, **exact)
        common |= dict(backend=backend, cache_implementation=None if cache == "dynamic" else cache)
        clock = Clock()
        generate_answers(subject, processor, rows[:size], **common)
        warm_up = clock.read()[0]
        clock = Clock()
        answers = generate_answers(subject, processor, rows, **common)
        speed = generation_speed(answers)
        agree = sum(a["answer"] == b for a, b in zip(answers, single_answers, strict=False))
        report(
            name,
            len(rows),
            *clock.read(),  # the survey of the data set counts too
            predict_samples_per_second=speed["predict_samples_per_second"],
            predict_tokens_per_second=speed["predict_tokens_per_second"],
            warm_up_seconds=round(warm_up, 1),
            same_as_single=f"{agree}/{len(single_answers)}",
        )

    for cache in args.cache:
        for size in args.batch_sizes:
            attempt(measure, f"generate_answers, batch {size}, {cache} cache", "transformers", model, size, cache)
    if args.vllm:
        from vllm import LLM

        model.to("cpu")
        torch.cuda.empty_cache()
        measure("generate_answers, vLLM", "vllm", LLM(args.model, dtype=args.dtype), args.samples, "dynamic")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
