"""Peak memory and speed of the multi-task model at the size of Qwen3-VL-2B, on a GPU."""

import gc
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import append_row
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from PIL import Image
from transformers import TrainingArguments

from medtune.models import nf4_config
from medtune.multitask import MultiTaskTrainer, ask
from medtune.plan import build_twin, save_processor

# the words of the twins' own text: their stand-in tokenizer was trained on it
from medtune.plan.shapes import FACTS

MODEL = "Qwen/Qwen3-VL-2B-Instruct"
ACCUMULATION = 4
STEPS = 6
LAYERS = r".*language_model.*\.(q_proj|v_proj|gate_proj)"


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Parameters
    ----------
    quantised : the base is packed in 4 bits.
    checkpointing : activations are computed twice.
    batch : samples of one forward pass.
    """

    quantised: bool
    checkpointing: bool
    batch: int


SETTINGS = (
    # as published
    Setting(quantised=False, checkpointing=True, batch=2),
    Setting(quantised=False, checkpointing=False, batch=2),
    Setting(quantised=True, checkpointing=True, batch=2),
    Setting(quantised=False, checkpointing=True, batch=8),
)


def profile(out: Path) -> None:
    """Train the twin for some steps in several ways, one line of results each."""
    rows = _rows()
    folder = Path(tempfile.mkdtemp())
    processor = save_processor(MODEL, folder / "processor")
    for setting in SETTINGS:
        result = {
            "model": MODEL,
            "device": torch.cuda.get_device_name(),
            **asdict(setting),
            "accumulation": ACCUMULATION,
        }
        try:
            result |= _train(setting, rows, processor, folder / "out")
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        # model and trainer hold each other
        gc.collect()
        append_row(out / "profile.jsonl", result)
        print(result, flush=True)


def _rows() -> list[dict[str, Any]]:
    """Make records with pictures of 512x512 as in MedTrinity, and answers of 110 words."""
    random = np.random.default_rng(0)
    words = FACTS["text"].split()
    rows = []
    for number in range(64):
        answer = " ".join(random.choice(words, 110))
        picture = Image.fromarray(random.integers(0, 256, (512, 512, 3), np.uint8))
        content = [{"type": "text", "text": answer}]
        rows.append(
            {
                "id": str(number),
                "prompt": ask("Where is it?"),
                "completion": [{"role": "assistant", "content": content}],
                "images": [picture],
                "roi": [0.2, 0.2, 0.6, 0.7],
                "structure": f"part {number % 8}",
            }
        )
    return rows


def _train(
    setting: Setting, rows: list[dict[str, Any]], processor: Any, folder: Path
) -> dict[str, Any]:
    """Train for some steps, and say what it took."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    quantization = nf4_config() if setting.quantised else None
    base = build_twin(MODEL, processor, device="cuda", quantization_config=quantization)
    if setting.quantised:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=LAYERS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=setting.batch,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=2e-5,
        bf16=True,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=setting.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        dataloader_num_workers=4,
        disable_tqdm=True,
    )
    trainer = MultiTaskTrainer(
        get_peft_model(base, lora), arguments, train_dataset=rows, processing_class=processor
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    batch = trainer.data_collator(rows[: setting.batch])
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    samples = STEPS * ACCUMULATION * setting.batch
    return {
        "peak_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "tokens_per_sample": batch["input_ids"].shape[1],
        "trained_parameters": sum(weight.numel() for weight in trained),
        "samples_per_second": round(samples / seconds, 2),
        "last_log": [entry for entry in trainer.state.log_history if "loss" in entry][-1],
    }
