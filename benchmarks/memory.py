"""Peaks of GPU memory of training runs on shape twins, really through TRL's SFTTrainer: what the planner is held to.

    python benchmarks/memory.py OUT.jsonl --part 0 --parts 2    # half of the configurations, about 5 minutes on an H200
    python benchmarks/memory.py OUT.jsonl --tiny                # all of them at tiny scale on a CPU, to try the script

Each line of OUT.jsonl is one configuration. Weights are random: nothing here says anything about quality.
"""

import argparse
import gc
import json
import logging
import time
import traceback
import warnings
from contextlib import contextmanager

import torch
from PIL import Image

Q3, Q2, QM = "Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct"
G4, Q25, SMOL = "google/gemma-3-4b-it", "Qwen/Qwen2.5-VL-7B-Instruct", "HuggingFaceTB/SmolVLM-256M-Instruct"
KEYS = ("part", "model", "method", "target", "batch", "pixels", "checkpointing", "options")
ALL = "all-linear"
FIT = [
    (0, Q3, "lora", "language", 4, 512, False, {}),
    (0, Q3, "lora", "language", 16, 512, False, {}),
    (0, Q3, "lora", "language", 16, 512, True, {}),
    (0, Q3, "lora", "language", 8, 1024, False, {}),
    (0, Q3, "lora", "language", 16, 1024, True, {}),
    (0, Q3, "lora", ALL, 8, 512, False, {}),
    (0, Q3, "lora", ALL, 16, 512, True, {}),
    (0, Q3, "qlora", "language", 8, 512, False, {}),
    (0, Q3, "qlora", "language", 16, 512, True, {}),
    (0, Q3, "full", "", 4, 512, True, {}),
    (0, Q3, "full", "", 4, 512, False, {"dtype": "bfloat16"}),
    (0, Q2, "lora", "language", 2, 512, False, {}),
    (0, Q2, "lora", "language", 16, 512, False, {}),
    (0, Q2, "lora", "language", 16, 512, True, {}),
    (0, Q3, "lora", "language", 96, 1024, False, {"must": "run out of memory"}),
    (0, SMOL, "lora", "language", 4, 512, False, {}),
    (0, Q3, "generate", "", 32, 512, False, {"new_tokens": 64}),
    (1, G4, "qlora", ALL, 1, 512, True, {"r": 16, "dropout": 0.05, "save": ["lm_head", "embed_tokens"]}),
    (1, G4, "qlora", ALL, 1, 512, True, {"r": 16, "dropout": 0.05}),
    (1, G4, "qlora", ALL, 8, 512, True, {"r": 16}),
    (1, G4, "lora", "language", 4, 512, False, {}),
    (1, G4, "lora", "language", 16, 512, True, {}),
    (1, QM, "lora", "attention", 8, 512, True, {}),
    (1, QM, "lora", "attention", 2, 512, False, {}),
    (1, QM, "lora", "attention+experts", 8, 512, True, {}),
    (1, QM, "lora", "attention", 32, 512, True, {}),
    (1, QM, "lora", "attention", 64, 512, False, {"must": "run out of memory"}),
    (1, Q25, "lora", "language", 8, 512, True, {}),
    (1, G4, "generate", "", 16, 512, False, {"new_tokens": 64}),
]
CHECK = [
    (0, Q3, "lora", "language", 32, 512, False, {}),
    (0, Q3, "lora", "language", 64, 512, True, {"r": 32}),
    (0, Q3, "qlora", "language", 4, 1024, False, {}),
    (0, Q3, "lora", ALL, 4, 1024, False, {"r": 16}),
    (0, Q2, "lora", "language", 8, 1024, False, {}),
    (0, Q2, "qlora", "language", 8, 512, True, {}),
    (0, Q3, "full", "", 16, 512, True, {"dtype": "bfloat16"}),
    (0, Q25, "lora", "language", 4, 512, False, {}),
    (0, SMOL, "lora", "language", 16, 512, True, {}),
    (1, G4, "lora", "language", 8, 512, False, {}),
    (1, G4, "qlora", "language", 4, 512, False, {}),
    (1, G4, "lora", "language", 64, 512, False, {"must": "run out of memory"}),
    (1, QM, "lora", "attention", 4, 512, False, {}),
    (1, QM, "lora", "attention", 16, 1024, True, {}),
    (1, QM, "lora", "attention+experts", 2, 512, True, {}),
    (1, QM, "qlora", "attention", 4, 512, True, {}),
]


def records(batch: int, pixels: int, words: int, text: str):
    """Rows as notebook 02 writes them: one picture, one question, one answer."""
    from datasets import Dataset, List
    from datasets import Image as Picture

    answer = " ".join((text.split() * 9)[:words])
    user = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is shown?"}]}]
    reply = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    picture = Image.linear_gradient("L").resize((pixels, pixels)).convert("RGB")
    rows = {"prompt": [user] * batch, "completion": [reply] * batch, "images": [[picture]] * batch}
    return Dataset.from_dict(rows).cast_column("images", List(Picture()))


@contextmanager
def watch_saved(layer, found: list):
    """Note what one layer keeps for the backward pass: dtype and shape of each storage."""
    original, seen = layer.forward, set()

    def pack(tensor):
        if tensor.data_ptr() not in seen and not isinstance(tensor, torch.nn.Parameter):
            seen.add(tensor.data_ptr())
            found.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        return tensor

    def forward(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return original(*args, **kwargs)

    layer.forward = forward
    try:
        yield
    finally:
        layer.forward = original


def layers_of(model) -> dict:
    """A layer from the middle of the language model and of the vision tower."""
    stacks = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1:
            kind = "vision" if "vis" in name else "language"
            if kind not in stacks or len(module) > len(stacks[kind]):
                stacks[kind] = module
    return {kind: stack[len(stack) // 2] for kind, stack in stacks.items()}


def measure(config: dict, scale: str, steps: int) -> dict:
    """Train `steps` steps of one configuration and return what the memory did."""
    import peft
    import transformers
    from trl import SFTConfig, SFTTrainer

    from medtune import models, sizing

    cuda, options = torch.cuda.is_available(), config["options"]
    device = "cuda" if cuda else "cpu"
    now = torch.cuda.memory_allocated if cuda else lambda: 0
    peak = torch.cuda.max_memory_allocated if cuda else lambda: 0
    reset = torch.cuda.reset_peak_memory_stats if cuda else lambda: None
    batch, pixels = (config["batch"], config["pixels"]) if scale == "full" else (2, 64)
    full = config["method"] == "full"
    dtype = options.get("dtype", "float32" if full else "bfloat16")
    start, result = now(), {}
    processor = sizing.save_processor(config["model"], f"scratch-{scale}/{config['model']}", scale=scale)
    began = time.perf_counter()
    quantised = models.nf4_config() if config["method"] == "qlora" else None
    model = sizing.build_twin(
        config["model"], processor, scale=scale, dtype=dtype, device=device, quantization_config=quantised
    )
    gc.collect()
    result |= {"build_seconds": time.perf_counter() - began, "weights": now() - start}
    rows = records(batch, pixels, 60, json.dumps(sizing._facts()["text"]))
    if config["method"] == "generate":
        text = [processor.apply_chat_template(rows[0]["prompt"], tokenize=False, add_generation_prompt=True)] * batch
        inputs = processor(text=text, images=list(rows["images"]), return_tensors="pt", padding=True).to(model.device)
        reset()
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            new = options["new_tokens"]
            model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        shapes = {key: list(value.shape) for key, value in inputs.items()}
        return result | {"peak": peak(), "batch_shapes": shapes}

    log: list[dict] = []

    class Probe(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            log.append({"before": now()})
            reset()
            loss = super().compute_loss(*args, **kwargs)
            log[-1] |= {"kept": now(), "forward": peak()}
            reset()
            return loss

    class Clock(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            log[-1] |= {"gradients": now(), "backward": peak()}
            reset()

        def on_step_end(self, *args, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            log[-1] |= {"end": now(), "optimizer": peak(), "time": time.perf_counter()}

    lora = None
    if not full:
        lora = peft.LoraConfig(
            r=options.get("r", 8),
            lora_alpha=16,
            lora_dropout=options.get("dropout", 0.0),
            modules_to_save=options.get("save"),
            **models.adapter_targets(model, config["target"]),
        )
    arguments = SFTConfig(
        output_dir="scratch",
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-5,
        completion_only_loss=True,
        max_length=None,
        bf16=True,
        use_cpu=not cuda,
        activation_checkpointing=config["checkpointing"],
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Probe(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=processor,
        peft_config=lora,
        callbacks=[Clock()],
    )
    trainer.model_accepts_loss_kwargs = True
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    result |= {"with_adapter": now() - start, "trained": sum(p.numel() for p in trained)}
    result["trained_bytes"] = sum(p.numel() * p.element_size() for p in trained)
    collate, ready = trainer.data_collator, []

    def cached(examples):  # pictures are prepared once: what is timed is the model
        ready.append(collate(examples)) if not ready else None
        return {key: value.clone() for key, value in ready[0].items()}

    trainer.data_collator = cached
    result["batch_shapes"] = {key: list(value.shape) for key, value in cached([*rows]).items()}
    result["answer_tokens"] = int((ready[0]["labels"] != -100).sum())
    saved: dict[str, list] = {"language": [], "vision": []}
    if not config["checkpointing"]:
        watched = layers_of(trainer.model)
        for kind, layer in watched.items():
            with watch_saved(layer, saved[kind]):
                ready_batch = trainer._prepare_inputs(cached([]))
                with torch.autocast(device, torch.bfloat16):  # as accelerate does once training starts
                    trainer.model.train()
                    SFTTrainer.compute_loss(trainer, trainer.model, ready_batch)
            del ready_batch
            gc.collect()
        result["saved"] = saved
    reset()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    times = [entry.pop("time") for entry in log]
    tops = [value for entry in log for key, value in entry.items() if key in ("forward", "backward", "optimizer")]
    return result | {
        "peak": max(tops) - start,
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
        "steps": log,
        "samples_per_second": batch * (len(times) - 2) / (times[-1] - times[1]),
        "losses": losses,
    }


def main():
    """Measure the configurations of one part and write a line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--part", type=int, default=None)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=420, help="start no further configuration after this")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    began = time.perf_counter()
    for values in CHECK if given.check else FIT:
        config = dict(zip(KEYS, values, strict=True))
        if given.part not in (None, config["part"]):
            continue
        if time.perf_counter() - began > given.seconds:
            break
        line = {key: config[key] for key in KEYS[1:]}
        if torch.cuda.is_available():
            line |= {"device": torch.cuda.get_device_name(), "capacity": torch.cuda.mem_get_info()[1]}
            torch.cuda.reset_peak_memory_stats()
        clock = time.perf_counter()
        try:
            line |= measure(config, "tiny" if given.tiny else "full", given.steps)
        except torch.OutOfMemoryError as error:
            line |= {"error": "out of memory", "message": str(error)[:200]}
        except Exception as error:
            line |= {"error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-1500:]}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        line["seconds"] = time.perf_counter() - clock
        with open(given.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(*line.values(), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
