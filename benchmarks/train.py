"""How fast `medtune.train` is, rung by rung, with LLaMA-Factory beside it in the same run; each row is also JSON.

    python benchmarks/train.py OUT [--rungs naive,workers,...] [--peer --peer-path FOLDER]
    python benchmarks/train.py OUT --moe --gemma --generate
    python benchmarks/train.py OUT --small          # all of it on a CPU with tiny twins, in a few minutes
    python benchmarks/train.py OUT --rungs fast96 --profile

The ladder's model has the shape of Qwen3-VL-2B and random weights: 512x512 pictures, about 402 tokens a sample, LoRA
of rank 8 on the language layers. Each rung trains in a process of its own through `medtune.train` and TRL's SFTTrainer
and leaves a line in OUT/results.jsonl as it ends: a run that was cut off, or has used up ``--seconds``, goes on where
it stopped when it is started again. Speed is that of the second half of the steps. MFU is the arithmetic that the
shape needs, in TFLOP a second, by ``--peak``, which is 790 for dense bfloat16 on an H200. ``--peer-path`` is a folder
that LLaMA-Factory and what it asks for are installed in, since it wants other versions than this project.
"""

import argparse
import bisect
import importlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

REPO = Path(__file__).parents[1]
DENSE, EXPERTS, GEMMA = "Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct", "google/gemma-3-4b-pt"
LORA = {"lora_r": 8, "lora_alpha": 16, "learning_rate": 5e-5, "lr_scheduler_type": "constant", "target": "language"}
# Each rung adds to those above it. `speed` goes to `medtune.speed.speed_up`, what is in capitals concerns the script.
LADDER = {
    "naive": {"per_device_train_batch_size": 4, "dtype": "float32", "bf16": False, "optim": "adamw_torch"}
    | {"activation_checkpointing": True, "dataloader_num_workers": 0},
    "workers": {"dataloader_num_workers": 8},
    "bf16": {"dtype": "bfloat16", "bf16": True},
    "batch16": {"per_device_train_batch_size": 16},
    "by_length": {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False},
    "no_checkpointing": {"activation_checkpointing": False},
    "fused": {"optim": "adamw_torch_fused"},
    "liger": {"use_liger_kernel": True},
    "batch32": {"per_device_train_batch_size": 32},
    "attention": {"speed": {"attention": True}},
    "bytes": {"SEND": True},
    "compile": {"speed": {"attention": True, "compiled": True}, "use_liger_kernel": False},  # it fuses the same
    "bf16_adapters": {"autocast_adapter_dtype": False},
    "features": {"autocast_adapter_dtype": True, "cache_features": True, "SEND": False},
}
# The one key, from the plain settings of a GPU, at three sizes; with features too.
BASE = {"dtype": "bfloat16", "bf16": True, "fast": True} | LADDER["by_length"]
ONE_KEY = {
    **{f"fast{size}": BASE | {"per_device_train_batch_size": size} for size in (32, 64, 96, 128)},
    **{
        f"fast{size}_features": BASE | {"per_device_train_batch_size": size, "cache_features": True}
        for size in (96, 128)
    },
    "fast96_features_bf16_adapters": BASE
    | {"per_device_train_batch_size": 96, "cache_features": True, "autocast_adapter_dtype": False},
    "fast96_checkpointing": BASE | {"per_device_train_batch_size": 96, "activation_checkpointing": True},
}
ROUTED = {"MODEL": EXPERTS, "target": "attention+experts", "dtype": "bfloat16", "bf16": True}
ROUTED |= {"activation_checkpointing": True, "dataloader_num_workers": 8, "autocast_adapter_dtype": False}
MOE = {
    "moe_plain8": ROUTED | {"per_device_train_batch_size": 8},
    **{f"moe_fast{size}": ROUTED | {"per_device_train_batch_size": size, "fast": True} for size in (8, 32, 64, 128)},
    "moe_fast64_features": ROUTED | {"per_device_train_batch_size": 64, "fast": True, "cache_features": True},
    "moe_qlora8": ROUTED | {"per_device_train_batch_size": 8, "load_in_4bit": True, "target": "attention"},
}
R4 = {"MODEL": GEMMA, "target": "all-linear", "dtype": "bfloat16", "bf16": True, "load_in_4bit": True, "lora_r": 16}
R4 |= {"use_bnb_nested_quant": True, "lora_dropout": 0.05, "per_device_train_batch_size": 1, "max_grad_norm": 0.3}
R4 |= {"gradient_accumulation_steps": 4, "activation_checkpointing": True, "learning_rate": 2e-4}
PUBLISHED = "lm_head embed_tokens"
MEMORY = {
    "gemma_published": R4 | {"lora_modules_to_save": PUBLISHED},
    "gemma_tied": R4 | {"lora_modules_to_save": "embed_tokens", "TIE": True},
    "gemma_adapters_only": R4,
}
STATIC = {"cache_implementation": "static"}  # compiles decoding
GENERATE = {
    "generate64": {"GENERATE": {"batch_size": 64, "cache_implementation": None}},
    **{f"generate{size}_static": {"GENERATE": {"batch_size": size} | STATIC} for size in (64, 128, 256)},
}
PEER = {"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all", "lora_rank": 8}
PEER |= {"lora_alpha": 16, "template": "qwen3_vl_nothink", "dataset": "records", "cutoff_len": 2048}
PEER |= {"preprocessing_num_workers": 8, "dataloader_num_workers": 4, "overwrite_output_dir": True}
PEER |= {"save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 5.0e-5}
PEER |= {"gradient_accumulation_steps": 4, "lr_scheduler_type": "cosine", "bf16": True, "flash_attn": "sdpa"}


def rungs() -> dict[str, dict]:
    """All rungs by name, those of the ladder with what is above them."""
    found, above = {}, {}
    for name, more in LADDER.items():
        found[name] = above = above | more
    return found | ONE_KEY | MOE | MEMORY | GENERATE


def write_data(folder: Path, side: int, pairs: int, words: tuple[int, int]) -> dict:
    """Write records of unequal length for this project and for its peer; say how many tokens an answer has."""
    import numpy as np
    from PIL import Image

    from medtune import models

    tokenizer = models.load_processor(REPO / "data" / "tiny-vlm").tokenizer
    draw, noise, rows, lengths = random.Random(0), np.random.default_rng(0), [], []
    text = re.findall(
        r"\w+", "the liver is seen at upper left of this picture bright dark small large kidney region near"
    )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(min(pairs, 128)):
        picture = Image.fromarray(noise.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8))
        picture.resize((side, side)).save(folder / "images" / f"{i}.jpg", quality=90)
    question = "What is the diagnosis in this picture?"
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for i in range(pairs):
            answer = " ".join(draw.choice(text) for _ in range(draw.randint(*words)))
            lengths.append(len(tokenizer(answer)["input_ids"]))
            row = {"id": str(i), "images": [f"images/{i % 128}.jpg"], "prompt": turn, "length": lengths[-1]}
            row["completion"] = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            file.write(json.dumps(row) + "\n")
            said = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
            rows.append({"messages": said, "images": row["images"]})
    features = {"features": {"length": {"dtype": "int64", "_type": "Value"}}}
    (folder / "convert.json").write_text(json.dumps(features))
    (folder / "records.json").write_text(json.dumps(rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    shape = {"formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"records": {"file_name": "records.json"} | shape}))
    return {"answer_tokens": sum(lengths) / len(lengths)}


def work(name: str, small: bool, tokens: float, answer: float, patches: int, seen: bool) -> float:
    """TFLOP that a sample of LoRA takes: forward and the gradients of activations; frozen weights need none.

    Parameters
    ----------
    tokens, answer, patches : of a sample; the head sees the answer's tokens only.
    seen : pixels go through the vision tower, forward only.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from medtune import models, sizing

    config = sizing.twin_config(name, scale="tiny" if small else "full")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text, vision, parts = config.get_text_config(), config.vision_config, {}
    for key, parameter in model.named_parameters():
        parts[models.part_of(key)] = parts.get(models.part_of(key), 0) + parameter.numel()
    share = getattr(text, "num_experts_per_tok", 0) / (getattr(text, "num_experts", 0) or 1)
    language = sum(parts.get(part, 0) for part in ("language attention", "language MLP")) + share * parts.get(
        "experts", 0
    )
    wide = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    flop = 4 * language * tokens + 4 * text.vocab_size * text.hidden_size * answer
    flop += 3 * 4 * tokens**2 * wide * text.num_hidden_layers / 2  # causal
    tower = (
        2 * parts["vision"] * patches + 2 * parts["merger"] * patches / 4 + 4 * patches**2 * vision.hidden_size * depth
    )
    return (flop + tower * seen) / 1e12


class Watch:
    """Note every millisecond what the main thread does, to say what a GPU waited for."""

    def start(self) -> None:
        self.seen, self.on = [], True
        self.thread = threading.Thread(target=self.look, args=(threading.main_thread().ident,), daemon=True)
        self.thread.start()

    def look(self, thread: int) -> None:
        while self.on:
            frame, names = sys._current_frames()[thread], []
            while frame:
                code = frame.f_code
                names.append(f"{Path(code.co_filename).stem}.{code.co_name}:{frame.f_lineno}")
                frame = frame.f_back
            self.seen.append((time.time_ns(), names))
            time.sleep(0.001)

    def stop(self) -> None:
        self.on = False
        self.thread.join()

    def idle(self, profile) -> str:
        """List the pauses of the GPU of 50 us and more by the functions that the main thread was in."""
        from torch.autograd import DeviceType

        begin = profile.profiler.kineto_results.trace_start_ns()
        spans = [e.time_range for e in profile.events() if e.device_type == DeviceType.CUDA and e.time_range.end]
        spans = sorted((span.start, span.end) for span in spans)
        until, pauses = spans[0][1], []
        for start, end in spans:
            if start - until > 50:
                pauses.append((until, start))
            until = max(until, end)
        total, found = sum(b - a for a, b in pauses) / 1000, {}
        clocks = [(clock - begin) / 1000 for clock, _ in self.seen]
        for a, b in pauses:
            inside = [names for clock, (_, names) in zip(clocks, self.seen, strict=True) if a <= clock <= b]
            inside = inside or [self.seen[max(0, bisect.bisect(clocks, a) - 1)][1]]
            for names in inside:
                for key in ("  " + " < ".join(names[:4]), *{f"any {name.split(':')[0]}" for name in names}):
                    found[key] = found.get(key, 0) + (b - a) / 1000 / len(inside)
        calls = [e for e in profile.key_averages() if e.key in ("cudaMalloc", "cudaFree", "cudaStreamSynchronize")]
        lines = [f"{total:.1f} of {(until - spans[0][0]) / 1000:.1f} ms without work for the GPU, {len(pauses)} pauses"]
        lines += [f"{e.self_cpu_time_total / 1000:9.1f} ms in {e.count} calls of {e.key}" for e in calls]
        for kind in ("  ", "any"):
            some = sorted((key for key in found if key.startswith(kind)), key=found.get, reverse=True)
            lines += [f"{found[key]:9.1f} ms {key}" for key in some[:40]]
        return "\n".join(lines) + "\n"


def train_rung(name: str, rung: dict, out: Path, options) -> dict:
    """In a process of its own: train and measure."""
    import torch
    import trl
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from medtune import models, sizing, speed, train

    small, cuda = options.small, torch.cuda.is_available()
    model_name = rung.get("MODEL", DENSE)
    facts, folder = json.loads((out / "data" / "facts.json").read_text()), out / "models" / model_name.split("/")[1]
    scale = "tiny" if small else "full"
    if not (folder / "config.json").exists():
        sizing.save_processor(model_name, folder, scale=scale, tokenizer=REPO / "data" / "tiny-vlm" / "tokenizer.json")
        sizing.twin_config(model_name, scale=scale).save_pretrained(folder)
    processor = models.load_processor(folder)

    def in_memory(path, *, dtype, quantization_config=None, device_map=None, **more):
        place = {"dtype": dtype, "device": "cuda" if cuda else "cpu", "quantization_config": quantization_config}
        return sizing.build_twin(model_name, processor, scale=scale, **place)

    models.load_base = in_memory  # random weights: no need to write 60 GB and read them again
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if rung.get("GENERATE"):
        return generate_rung(dict(rung["GENERATE"]), in_memory, processor, out, options)
    if rung.get("TIE"):
        made = trl.get_peft_config

        def tied(model_args):
            config = made(model_args)
            config.ensure_weight_tying = True
            return config

        trl.get_peft_config = tied
    steps = max(options.steps or (4 if small else 24), 8 * options.profile)
    settings = {"data": out / "data", "model_name_or_path": folder, "output_dir": out / "runs" / name, "seed": 0}
    settings |= LORA | {key: value for key, value in rung.items() if key not in ("MODEL", "TIE", "SEND", "speed")}
    settings |= {"max_steps": steps, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    if small:
        settings |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    if not cuda:
        settings |= {"dtype": "float32", "bf16": False, "use_liger_kernel": False}
    arguments = []
    for key, value in settings.items():
        arguments += [f"--{key}", *(str(value).split() if key == "lora_modules_to_save" else [str(value)])]
    times, profiled, watch = [], {}, Watch()

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter())  # TRL has just read the loss, so the card is done
            if options.profile and state.global_step == steps - 2:
                kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
                profiled["profile"] = profile(activities=kinds)
                watch.start()
                profiled["profile"].__enter__()

    parsed = train.parse_arguments(arguments)
    if parsed[1].use_liger_kernel:  # 0.8.5 imports classes that Transformers 5.23 has merged into one
        for name in ("qwen3_vl", "qwen3_vl_moe"):
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            old = f"{'Qwen3VLMoe' if 'moe' in name else 'Qwen3VL'}CausalLMOutputWithPast"
            if not hasattr(module, old):
                setattr(module, old, getattr(module, old.replace("Qwen3VL", "")))
    trainer = train.build_trainer(*parsed, callbacks=[Measure()])
    if rung.get("speed"):
        wanted = {"attention": False, "experts": False} | rung["speed"]
        torch._dynamo.config.recompile_limit = 64  # as `fast` sets it
        speed.speed_up(trainer.model, **wanted | {"compiled": bool(wanted.get("compiled")) and cuda})
    if rung.get("SEND"):
        speed.send_bytes(trainer)
    trainer.train()
    if profiled:
        profiled["profile"].__exit__(None, None, None)
        watch.stop()
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        table = profiled["profile"].key_averages().table(sort_by=order, row_limit=30, max_name_column_width=70)
        idle = watch.idle(profiled["profile"]) if cuda else ""
        (out / f"profile-{name}.txt").write_text(f"The last 2 steps of {name}, {order}\n\n{table}\n{idle}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    late = times[len(times) // 2 - 1 : steps - 2 if options.profile else None]
    batch = parsed[1].per_device_train_batch_size * parsed[1].gradient_accumulation_steps
    rate = batch * (len(late) - 1) / (late[-1] - late[0])
    some = trainer.data_collator([dict(trainer.train_dataset[i]) for i in range(16)])
    tokens, grids = some["attention_mask"].sum().item() / 16, some.get("image_grid_thw")
    answer = (some["labels"] != -100).sum().item() / 16
    patches = grids.prod(-1).sum().item() // 16 if grids is not None else 4096
    row = {"samples_per_second": round(rate, 2), "tokens_per_second": round(rate * tokens), "tokens": round(tokens, 1)}
    if not rung.get("load_in_4bit"):
        need = work(model_name, small, tokens, answer, patches, not parsed[0].cache_features)
        row |= {"tflop_a_sample": round(need, 3), "mfu_percent": round(100 * need * rate / options.peak, 1)}
    row |= {"batch": batch, "steps": steps, "first_loss": losses[0], "last_loss": losses[-1]} | facts
    return row | {"seconds_to_second_step": round(times[1] - times[0], 1)}


def generate_rung(choice: dict, load, processor, out: Path, options) -> dict:
    """Answer 1,024 questions with `generate_answers`, 150 tokens each, the second of two rounds."""
    from medtune import convert, generate, speed

    new, dtype = (4, "float32") if options.small else (150, "bfloat16")
    model, rows = load(None, dtype=dtype), convert.read_records(out / "data", "train")
    if options.small:
        choice["batch_size"] = 2
    rows = rows.select(range(min(len(rows), 6 if options.small else 1024)))
    choice |= {"max_new_tokens": new, "min_new_tokens": new}
    speed.speed_up(model)
    generate.generate_answers(model, processor, rows, **choice)  # compiles for these lengths
    began = time.perf_counter()
    answers = generate.generate_answers(model, processor, rows, **choice)
    rate = len(answers) / (time.perf_counter() - began)
    return {"samples_per_second": round(rate, 2), "tokens_per_second": round(rate * new), "batch": choice["batch_size"]}


def child(name: str, out: Path, options) -> None:
    """Run a rung and note what came of it, errors as well."""
    import logging
    import warnings

    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    row = {"rung": name, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    try:
        row |= train_rung(name, rungs()[name], out, options)
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if torch.cuda.is_available():
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    note(out, row)


def rows_of(out: Path) -> list[dict]:
    """What has been noted so far; a line that a kill cut short is left out."""
    file = out / "results.jsonl"
    text = file.read_text("utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def note(out: Path, row: dict) -> None:
    with open(out / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    keys = ("rung", "samples_per_second", "mfu_percent", "peak_gb", "first_loss", "error")
    print("  ".join(f"{key}={row[key]}" for key in keys if key in row), flush=True)


def peer(out: Path, options, seconds: float) -> None:
    """Train the same pairs with LLaMA-Factory's defaults, in its own environment."""
    import torch
    import yaml

    from medtune import sizing

    model, scale = out / "models" / "saved", "tiny" if options.small else "full"
    if not (model / "config.json").exists():
        words = REPO / "data" / "tiny-vlm" / "tokenizer.json"
        sizing.make_twin(
            DENSE, model, scale=scale, tokenizer=words, device="cuda" if torch.cuda.is_available() else "cpu"
        )
    settings = PEER | {
        "model_name_or_path": str(model),
        "dataset_dir": str(out / "data"),
        "media_dir": str(out / "data"),
    }
    settings |= {"output_dir": str(out / "runs" / "peer"), "max_steps": options.steps or 30, "report_to": "none"}
    if not torch.cuda.is_available():
        settings |= {"bf16": False, "use_cpu": True}
    (out / "peer.yaml").write_text(yaml.safe_dump(settings))
    environment = os.environ | {"PYTHONPATH": str(options.peer_path), "DISABLE_VERSION_CHECK": "1"}
    row = {"rung": "peer", "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    with open(out / "peer.log", "w") as log:
        try:
            command = [options.peer_python, "-m", "llamafactory.cli", "train", str(out / "peer.yaml")]
            subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=seconds, check=True)
            lines = (out / "runs" / "peer" / "trainer_log.jsonl").read_text().splitlines()
            entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
            clocks = [
                sum(int(n) * 60**p for p, n in enumerate(reversed(e["elapsed_time"].split(":")))) for e in entries
            ]
            half = len(entries) // 2
            steps = entries[-1]["current_steps"] - entries[half]["current_steps"]
            row |= {"samples_per_second": round(16 * steps / max(clocks[-1] - clocks[half], 1), 2), "batch": 16}
            row |= {"first_loss": entries[0]["loss"], "steps": entries[-1]["current_steps"]}
        except (subprocess.SubprocessError, OSError, ValueError, KeyError, IndexError) as error:
            row["error"] = f"{type(error).__name__}: see peer.log: {str(error)[-200:]}"
    note(out, row)


def table(out: Path) -> str:
    """Results as Markdown, the newest of each rung."""
    rows = {row["rung"]: row for row in rows_of(out)}
    keys = ["rung", "batch", "samples_per_second", "tokens_per_second", "mfu_percent", "peak_gb", "first_loss", "error"]
    lines = ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    for row in rows.values():
        shown = [row.get(key, "") for key in keys]
        shown = [
            f"{value:.4f}" if key == "first_loss" and value != "" else value
            for key, value in zip(keys, shown, strict=True)
        ]
        lines.append("| " + " | ".join(map(str, shown)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rungs", default="", help=f"of {', '.join(rungs())}; default: the ladder and the one key")
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--gemma", action="store_true")
    parser.add_argument("--generate", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--peer-path", type=Path, default=Path("peer"))
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--small", action="store_true", help="tiny twins, also on a CPU, all groups")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=570, help="start no rung after so many seconds")
    parser.add_argument("--each", type=float, default=240, help="most seconds of one rung")
    parser.add_argument("--peak", type=float, default=790.0, help="TFLOP/s of the card, dense bfloat16")
    parser.add_argument("--profile", action="store_true", help="also write profile-RUNG.txt of the last two steps")
    parser.add_argument("--apart", action="store_true", help="a process for each rung with --small too")
    parser.add_argument("--child", default="")
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    out = options.out.resolve()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(out / "hub")}
    sys.path.insert(0, str(REPO / "src"))
    if options.child:
        return child(options.child, out, options)
    groups = ((options.moe, MOE), (options.gemma, MEMORY), (options.generate, GENERATE))
    names = [name for wanted, group in groups for name in group if wanted or options.small]
    if options.small or not names:
        names = [*LADDER, *ONE_KEY, *names]
    names = options.rungs.split(",") if options.rungs else names
    if unknown := set(names) - rungs().keys():
        parser.error(f"unknown rungs: {', '.join(sorted(unknown))}")
    if not (out / "data" / "facts.json").exists():
        side, words = (64, (4, 12)) if options.small else (512, (77, 104))
        facts = write_data(out / "data", side, 64 if options.small else 4096, words)  # no epoch ends in 24 steps
        (out / "data" / "facts.json").write_text(json.dumps(facts))
    done = {row["rung"] for row in rows_of(out) if "error" not in row}
    if options.peer and "peer" not in done:
        peer(out, options, min(options.each, end - time.perf_counter()))
    for name in names:
        if time.perf_counter() > end - 20:
            print("the time is used up: start again to go on", flush=True)
            break
        if name in done:
            continue
        if options.small and not options.apart:
            child(name, out, options)  # one process is enough where nothing is measured
            continue
        before = len(rows_of(out))
        command = [sys.executable, __file__, str(out), "--child", name, "--steps", str(options.steps)]
        command += ["--peak", str(options.peak)] + ["--profile"] * options.profile + ["--small"] * options.small
        with open(out / f"{name}.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                process.wait(timeout=max(20, min(options.each, end - time.perf_counter())))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # its loading workers too
                process.wait()
        after = rows_of(out)
        if name not in {row["rung"] for row in after[before:]}:
            note(out, {"rung": name, "error": f"ended with {process.returncode}, see {name}.log"})
        else:
            print(json.dumps(after[-1]), flush=True)
    if (out / "results.jsonl").exists():
        (out / "table.md").write_text(table(out) + "\n")
        print(table(out), flush=True)


if __name__ == "__main__":
    main()
