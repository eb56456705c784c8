"""What the multi-task model can do, and what it takes: the figures of notebook 07 that its one run does not make.

    python benchmarks/multitask.py profile --out papermill_runs/reference/multitask-2b-h200
    python benchmarks/multitask.py ablation --out papermill_runs/reference/multitask-ablation --workers 16
    python benchmarks/multitask.py table papermill_runs/reference/multitask-ablation

`profile` runs the published recipe (Qwen3-VL-2B, batch 2, accumulation 4, activation checkpointing, LoRA r 8 alpha 32)
on a twin of the model's shape with random weights, and reports the peak of GPU memory. `ablation` trains the tiny base
model in several ways with several seeds, one process each, and writes one JSON object a line. `table` prints the
tables that the notebook shows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(os.environ.get("REPO", Path(__file__).parents[1]))


def profile(out: Path) -> None:
    """Train the shape twin for some steps in several ways, one line of results each."""
    import gc

    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from PIL import Image
    from transformers import TrainingArguments

    from medtune import models, multitask, sizing

    random = np.random.default_rng(0)
    text = json.loads((Path(sizing.__file__).with_name("shapes.json")).read_text("utf-8"))["text"].split()
    name, rows = "Qwen/Qwen3-VL-2B-Instruct", []
    for number in range(64):  # pictures of 512x512 as in MedTrinity, answers of about 110 words
        words = " ".join(random.choice(text, 110))
        picture = Image.fromarray(random.integers(0, 256, (512, 512, 3), np.uint8))
        row = {"id": str(number), "prompt": multitask.ask("Where is it?"), "roi": [0.2, 0.2, 0.6, 0.7]}
        row |= {"images": [picture], "structure": f"part {number % 8}"}
        rows.append(row | {"completion": [{"role": "assistant", "content": [{"type": "text", "text": words}]}]})
    folder = Path(tempfile.mkdtemp())
    processor = sizing.save_processor(name, folder / "processor")
    for setting in (
        {"quantised": False, "checkpointing": True, "batch": 2},
        {"quantised": False, "checkpointing": False, "batch": 2},
        {"quantised": True, "checkpointing": True, "batch": 2},
        {"quantised": False, "checkpointing": True, "batch": 8},
    ):
        result = {"model": name, "device": torch.cuda.get_device_name(), **setting, "accumulation": 4}
        try:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            quantization = models.nf4_config() if setting["quantised"] else None
            base = sizing.build_twin(name, processor, device="cuda", quantization_config=quantization)
            if setting["quantised"]:
                base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
            layers = r".*language_model.*\.(q_proj|v_proj|gate_proj)"
            base = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=layers))
            args = TrainingArguments(
                output_dir=str(folder / "out"), max_steps=6, per_device_train_batch_size=setting["batch"],
                gradient_accumulation_steps=4, learning_rate=2e-5, bf16=True, report_to="none", save_strategy="no",
                gradient_checkpointing=setting["checkpointing"], logging_steps=1, dataloader_num_workers=4,
                gradient_checkpointing_kwargs={"use_reentrant": False}, disable_tqdm=True,
            )  # fmt: skip
            trainer = multitask.MultiTaskTrainer(base, args, train_dataset=rows, processing_class=processor)
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            batch = trainer.data_collator(rows[: setting["batch"]])
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            result |= {
                "peak_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
                "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
                "tokens_per_sample": batch["input_ids"].shape[1],
                "trained_parameters": trained,
                "samples_per_second": round(6 * 4 * setting["batch"] / seconds, 2),
                "last_log": [entry for entry in trainer.state.log_history if "loss" in entry][-1],
            }
            del trainer, base, batch
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        gc.collect()
        with open(out / "profile.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(result, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["profile"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    profile(args.out)


if __name__ == "__main__":
    main()
