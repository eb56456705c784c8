"""Samples per second, peak memory and losses of `medtune.train` on one and two GPUs: no DeepSpeed, ZeRO-2, ZeRO-3.

    python benchmarks/launch_gpus.py OUT_FOLDER [--small] [--seconds 440]

The model has the shape of Qwen3-VL-2B and random weights, so nothing is downloaded. Then a model of the shape of
Qwen3-VL-30B-A3B runs under ZeRO-3 over both cards. Each result is a JSON line in OUT_FOLDER/results.jsonl. ``--small``
is a rehearsal with a tiny shape, also on a CPU; ``--only zero3,experts`` runs a part.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPO = Path(__file__).parents[1]
ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
VISION = {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 2048}
DENSE = {
    "text_config": {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": ROPE},
    "vision_config": VISION
    | {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
    | {"num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]},
    "tie_word_embeddings": True,
}
EXPERTS = {
    "text_config": {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "rope_parameters": ROPE}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "vision_config": VISION
    | {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
    | {"num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]},
}


def shape(kind: dict, small: bool, tokenizer) -> dict:
    """The configuration of a twin; a small one keeps its form."""
    shape = json.loads(json.dumps(kind))
    if small:
        shape["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 128}
        shape["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 4000}
        shape["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "depth": 4, "num_heads": 2}
        shape["vision_config"] |= {"out_hidden_size": 64, "deepstack_visual_indexes": [1, 2, 3]}
        if "num_experts" in shape["text_config"]:
            shape["text_config"] |= {"num_experts": 8, "moe_intermediate_size": 48}
    marks = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    marks |= {"vision_end": "<|vision_end|>"}
    return shape | {f"{key}_token_id": tokenizer.convert_tokens_to_ids(mark) for key, mark in marks.items()}


def build(folder: Path, small: bool) -> None:
    """Write the dense twin, the configuration of the twin with experts, and 640 records of unequal length."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig

    from medtune import models

    processor = models.load_processor(REPO / "data" / "tiny-vlm")
    prepare = processor.image_processor
    side = 64 if small else 512
    prepare.size = type(prepare.size)(shortest_edge=side * side, longest_edge=side * side)
    prepare.temporal_patch_size = 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        dense = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**shape(DENSE, small, processor.tokenizer)))
    torch.set_default_dtype(torch.float32)
    dense.save_pretrained(folder / "dense")
    moe = Qwen3VLMoeConfig(**shape(EXPERTS, small, processor.tokenizer))
    moe.architectures = ["Qwen3VLMoeForConditionalGeneration"]
    moe.save_pretrained(folder / "experts")
    for name in ("dense", "experts"):
        processor.save_pretrained(folder / name)
    draw, noise = random.Random(0), np.random.default_rng(0)
    (folder / "data" / "images").mkdir(parents=True)
    for i in range(64):
        picture = noise.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((512, 512)).save(folder / "data" / "images" / f"{i}.jpg", quality=90)
    text = "the liver is seen at upper left of this picture bright dark small large kidney spleen region near"
    words = text.split()
    tokens = []
    with open(folder / "data" / "train.jsonl", "w", encoding="utf-8") as file:
        for i in range(640):
            caption = " ".join(draw.choice(words) for _ in range(draw.randint(60, 180)))
            tokens.append(len(processor.tokenizer(caption)["input_ids"]))
            question = [{"type": "image"}, {"type": "text", "text": "Describe this medical image."}]
            turns = {"prompt": [{"role": "user", "content": question}]}
            turns["completion"] = [{"role": "assistant", "content": [{"type": "text", "text": caption}]}]
            file.write(json.dumps({"id": str(i), "images": [f"images/{i % 64}.jpg"]} | turns) + "\n")
    print(f"answers have {sum(tokens) / len(tokens):.0f} tokens on average, pictures {(side // 32) ** 2}", flush=True)


def settings(folder: Path, small: bool) -> dict:
    """What all runs share."""
    common = {"data": str(folder / "data"), "model_name_or_path": str(folder / "dense"), "target": "llamafactory-all"}
    common |= {"lora_r": 8, "lora_alpha": 16, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "seed": 0}
    common |= {"logging_steps": 1, "save_strategy": "no", "autocast_adapter_dtype": False, "disable_tqdm": True}
    return common | {"dataloader_num_workers": 0 if small else 8}


def train_all(file: str) -> None:
    """In every rank: the runs of a file, one after the other; and the twin with experts, made in shards."""
    import torch
    from transformers import AutoConfig, TrainerCallback

    from medtune import models, train

    load = models.load_base

    class Measure(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.times = []
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

        def on_step_end(self, args, state, control, **kwargs):
            self.times.append(time.perf_counter())  # TRL has just read the loss, so the card is done

        def on_train_end(self, args, state, control, **kwargs):
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            found = {"times": self.times, "peak_gb": peak / 1e9}
            file = Path(args.output_dir) / f"measured-{args.process_index}.json"
            file.write_text(json.dumps(found))

    def in_shards(path, **options):
        import deepspeed
        from transformers import AutoModelForImageTextToText

        if not str(path).endswith("experts"):
            return load(path, **options)
        config = AutoConfig.from_pretrained(path)
        torch.set_default_dtype(torch.bfloat16)
        with deepspeed.zero.Init(config_dict_or_path=plugin.hf_ds_config.config):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        torch.set_default_dtype(torch.float32)
        for parameter in model.parameters():
            if len(parameter.ds_shape) == 3:  # experts, which no constructor fills
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.normal_(0, 0.02)
        return model

    models.load_base = in_shards
    for arguments in json.loads(Path(file).read_text()):
        parsed = train.parse_arguments([part for k, v in arguments.items() for part in (f"--{k}", str(v))])
        plugin = parsed[1].deepspeed_plugin
        train.run(train.build_trainer(*parsed, callbacks=[Measure()]), parsed[0], parsed[2])


def launch(out: Path, folder: Path, name: str, ranks: int, runs: dict[str, dict], seconds: float) -> None:
    """Start ranks for the runs and note of each what it measured."""
    for key, run in runs.items():
        run["output_dir"] = str(folder / f"{name}-{key}")
    file = folder / f"{name}.json"
    file.write_text(json.dumps(list(runs.values())))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", __file__, "--train", str(file)]
    environment = os.environ | {"NCCL_NVLS_ENABLE": "0", "PYTHONPATH": os.pathsep.join([str(REPO / "src"), *sys.path])}
    started = time.perf_counter()
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(timeout=max(30, seconds))
        except subprocess.TimeoutExpired:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()  # the ranks have sessions of their own
            code = "timeout"
    for key, run in runs.items():
        line = {"run": name, "part": key, "ranks": ranks, "code": code, "launch_seconds": time.perf_counter() - started}
        try:
            log = json.loads((Path(run["output_dir"]) / "log.json").read_text())
            line["losses"] = [entry["loss"] for entry in log if "loss" in entry]
            files = [Path(run["output_dir"]) / f"measured-{rank}.json" for rank in range(ranks)]
            measured = [json.loads(file.read_text()) for file in files]
            late = measured[0]["times"][len(measured[0]["times"]) // 3 :]  # the first steps warm up
            batch = ranks * run["per_device_train_batch_size"]
            line["samples_per_second"] = batch * (len(late) - 1) / (late[-1] - late[0])
            line["peak_gb"] = [rank["peak_gb"] for rank in measured]
        except (OSError, ValueError, IndexError, ZeroDivisionError) as error:
            line["error"] = f"{type(error).__name__}: {error}"
        with open(out / "results.jsonl", "a") as results:
            results.write(json.dumps(line) + "\n")
        print(json.dumps(line)[:400], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=440)
    parser.add_argument("--only", default="one,ddp,zero2,zero3,experts,zero2_offload,zero3_offload")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--train")
    options = parser.parse_args()
    if options.train:
        return train_all(options.train)
    end = time.perf_counter() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    folder, small = Path(tempfile.mkdtemp()), options.small
    build(folder, small)
    common = settings(folder, small)
    kind = {"dtype": "float32", "bf16": False} if small else {"dtype": "bfloat16", "bf16": True}
    steps, batch = (6, 2) if small else (options.steps, 32)
    speed = common | kind | {"per_device_train_batch_size": batch, "max_steps": steps}
    exact = common | {"dtype": "float32", "bf16": False, "max_steps": 6}
    only = options.only.split(",")
    for name, ranks, stage in (("one", 1, None), ("ddp", 2, None), ("zero2", 2, "zero2"), ("zero3", 2, "zero3")):
        if name not in only:
            continue
        more = {"deepspeed": stage} if stage else {}
        runs = {"speed": speed | more, "exact": exact | more | {"per_device_train_batch_size": 8 // ranks}}
        launch(options.out, folder, name, ranks, runs, end - time.perf_counter())
    experts = speed | {"model_name_or_path": str(folder / "experts"), "deepspeed": "zero3", "target": "attention"}
    experts |= {"activation_checkpointing": True, "max_steps": 6, "per_device_train_batch_size": 2 if small else 16}
    if "experts" in only:
        launch(options.out, folder, "experts", 2, {"speed": experts}, end - time.perf_counter())
    for name in ("zero2_offload", "zero3_offload"):
        if name in only and end - time.perf_counter() > 60:
            runs = {"speed": speed | {"deepspeed": name, "max_steps": 6}}
            launch(options.out, folder, name, 2, runs, end - time.perf_counter())


if __name__ == "__main__":
    main()
