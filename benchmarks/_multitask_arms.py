"""The ablation of the multi-task model: the tiny base model trained in several ways and seeds."""

import gzip
import io
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from _harness import TINY_MODEL, run_for
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import TrainingArguments, set_seed

from medtune.answers import generate_answers
from medtune.models import adapter_targets, load_base, load_processor
from medtune.multitask import (
    MultiTaskCollator,
    MultiTaskModel,
    MultiTaskTrainer,
    ask,
    statement_of,
)

QUESTION = "Where is the {} and what is to be said about it?"
# Width and height of the pictures that are trained on.
SIDE = 256
CUDA = torch.cuda.is_available()
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Parameters
    ----------
    steps, batch : optimizer steps, and samples of each.
    learning_rate, head_learning_rate : of the adapter, and of the heads.
    lora_r : rank of the adapter; its alpha is twice as much.
    target : layers with an adapter; "" leaves the base as it is.
    drawn : the pictures have the box drawn into them as a line: the control.
    pairs : so many pairs are trained on; 0 for all.
    collator : keywords of `MultiTaskCollator`.
    settings : keywords of `MultiTaskModel`.
    seed : of everything that is drawn.
    """

    steps: int = 600
    batch: int = 8
    learning_rate: float = 2e-3
    head_learning_rate: float = 2e-3
    lora_r: int = 16
    target: str = "language"
    drawn: bool = False
    pairs: int = 0
    collator: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def learns_text(self) -> bool:
        """Whether the text has a part in the loss."""
        text, *_ = self.settings.get("weights", [1.0])
        return bool(text)


NO_STATEMENTS = {"negative_ratio": 0.0, "verify_ratio": 0.0}


def _weights(text: float, box: float, match: float) -> dict[str, Any]:
    return {"weighting": "fixed", "weights": [text, box, match]}


TEXT_ALONE = Arm(collator=NO_STATEMENTS, settings=_weights(1.0, 0.0, 0.0))
ARMS = {
    "all three": Arm(),
    "fixed weights 1, 1, 1": Arm(settings={"weighting": "fixed"}),
    "true box only": Arm(collator={"predicted_ratio": 0.0}),
    "no negatives": Arm(collator={"negative_ratio": 0.0}),
    "heads on the frozen base": Arm(target=""),
    "text alone": TEXT_ALONE,
    "box alone": Arm(collator=NO_STATEMENTS, settings=_weights(0.0, 1.0, 0.0)),
    "match alone": Arm(settings=_weights(0.0, 0.0, 1.0)),
    "with the drawn line": Arm(drawn=True),
    "all three, 300 pairs": Arm(pairs=300),
    "text alone, 300 pairs": replace(TEXT_ALONE, pairs=300),
    "all three, 1000 pairs": Arm(pairs=1000),
    "text alone, 1000 pairs": replace(TEXT_ALONE, pairs=1000),
}
# Of these the whole chain is asked, also for what the picture does not show.
WHOLE_CHAIN = ("all three", "with the drawn line")


# ---- the records


def load(parquet: Path, drawn: bool) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Read the records with or without the drawn line.

    Returns
    -------
    list of dict : records without their pictures.
    array : the pictures, made small, (n, side, side, 3).
    """
    columns = ["image", "id", "caption", "group", "split", "roi", "slice", "structure"]
    rows = pq.read_table(parquet, columns=columns, filters=[("has_box", "=", drawn)]).to_pylist()
    shows: dict[int, set[str]] = {}
    for row in rows:
        shows.setdefault(row["slice"], set()).add(row["structure"])
    records = []
    pictures = []
    for row in sorted(rows, key=lambda row: row["slice"]):
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        pictures.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
        record = {name: row[name] for name in ("id", "roi", "structure", "slice", "group", "split")}
        record["shows"] = sorted(shows[row["slice"]])
        content = [{"type": "text", "text": row["caption"]}]
        record["completion"] = [{"role": "assistant", "content": content}]
        record["prompt"] = ask(QUESTION.format(row["structure"]))
        records.append(record)
    return records, np.stack(pictures)


def _save_records(folder: Path, parquet: Path, drawn: bool) -> None:
    records, pictures = load(parquet, drawn)
    np.save(folder / f"drawn-{drawn}.npy", pictures)
    (folder / f"drawn-{drawn}.json").write_text(json.dumps(records), "utf-8")


def _read_splits(folder: Path, drawn: bool) -> dict[str, list[dict[str, Any]]]:
    """Read what `_save_records` wrote: the records of each split, with their pictures."""
    records = json.loads((folder / f"drawn-{drawn}.json").read_text("utf-8"))
    pictures = np.load(folder / f"drawn-{drawn}.npy", mmap_mode="r")
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for record, picture in zip(records, pictures, strict=True):
        record["images"] = [Image.fromarray(np.array(picture))]
        splits[record["split"]].append(record)
    return splits


def mismatched(records: list[dict[str, Any]], seed: int = 0) -> list[tuple[int, int]]:
    """Draw pairs (record, record whose picture does not show the first one's structure)."""
    rng = random.Random(seed)
    pairs = []
    for number, record in enumerate(records):
        others = []
        for other_number, other in enumerate(records):
            if record["structure"] not in other["shows"]:
                others.append(other_number)
        if others:
            pairs.append((number, rng.choice(others)))
    return pairs


# ---- one training


def train_one(name: str, seed: int, data: Path, folder: Path) -> None:
    """Train one arm, and write boxes, match scores and answers of validation and test."""
    arm = replace(ARMS[name], seed=seed)
    splits = _read_splits(data, arm.drawn)
    set_seed(seed)
    processor = load_processor(TINY_MODEL)
    model = _make_model(arm)
    trainer = _make_trainer(arm, model, processor, splits["train"], folder / "checkpoints")
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    log = []
    for entry in trainer.state.log_history:
        if "loss" in entry:
            log.append({key: round(value, 4) for key, value in entry.items()})
    result = {
        "arm": name,
        "seed": seed,
        "config": asdict(arm),
        "seconds": round(seconds, 1),
        "log": log,
    }
    for split in ("validation", "test"):
        held_out = HeldOut(model, processor, splits[split])
        found = held_out.judge()
        if split == "test" and arm.learns_text:
            found["answers"] = held_out.answer(held_out.records)
            if name in WHOLE_CHAIN:
                found |= held_out.judge_drafts(found["answers"])
        result[split] = found
    file = folder / f"{name.replace(' ', '_')}-{seed}.json.gz"
    with gzip.open(file, "wt", encoding="utf-8") as opened:
        json.dump(result, opened)


def _make_model(arm: Arm) -> MultiTaskModel:
    """Put adapter and heads onto the tiny base model."""
    base = load_base(TINY_MODEL)
    if arm.target:
        lora = LoraConfig(
            r=arm.lora_r, lora_alpha=2 * arm.lora_r, **adapter_targets(base, arm.target)
        )
        base = get_peft_model(base, lora)
    else:
        base.requires_grad_(False)
    return MultiTaskModel(base, **arm.settings).to("cuda" if CUDA else "cpu")


def _make_trainer(
    arm: Arm, model: MultiTaskModel, processor: Any, train: list[dict[str, Any]], folder: Path
) -> MultiTaskTrainer:
    if arm.pairs:
        train = random.Random(arm.seed).sample(train, arm.pairs)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=arm.steps,
        per_device_train_batch_size=arm.batch,
        learning_rate=arm.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=arm.seed,
        disable_tqdm=True,
        use_cpu=not CUDA,
        dataloader_num_workers=1 if CUDA else 0,
        dataloader_pin_memory=False,
    )
    collator = MultiTaskCollator(processor, pool=train, seed=arm.seed, **arm.collator)
    return MultiTaskTrainer(
        model,
        arguments,
        head_learning_rate=arm.head_learning_rate,
        data_collator=collator,
        train_dataset=train,
        processing_class=processor,
    )


class HeldOut:
    """Judge the records of a split, with their own pictures and with wrong ones.

    Parameters
    ----------
    model, processor : what was trained.
    records : with pictures.
    """

    def __init__(self, model: MultiTaskModel, processor: Any, records: list[dict[str, Any]]):
        self.model = model
        self.processor = processor
        self.records = records
        self.images = [record["images"][0] for record in records]
        self.questions = [record["prompt"][0]["content"][1]["text"] for record in records]
        answers = [record["completion"][0]["content"][0]["text"] for record in records]
        self.statements = [statement_of(answer) for answer in answers]
        # (record, record with the wrong picture)
        self.pairs = mismatched(records)
        self.wrong_images = [self.images[other] for _, other in self.pairs]
        self.wrong_questions = [self.questions[number] for number, _ in self.pairs]

    def judge(self) -> dict[str, Any]:
        """Locate, and verify the true statements: with the right picture and with a wrong one."""
        boxes, right = self.model.judge(
            self.processor, self.images, self.questions, self.statements, batch_size=64
        )
        statements = [self.statements[number] for number, _ in self.pairs]
        _, wrong = self.model.judge(
            self.processor, self.wrong_images, self.wrong_questions, statements, batch_size=64
        )
        rounded = []
        for box in boxes:
            rounded.append([round(edge, 4) for edge in box])
        return {
            "boxes": rounded,
            "pairs": self.pairs,
            "right": [round(score, 5) for score in right],
            "wrong": [round(score, 5) for score in wrong],
        }

    def answer(self, records: list[dict[str, Any]]) -> list[str]:
        """Let the language model answer."""
        rows = generate_answers(
            self.model.base,
            self.processor,
            records,
            batch_size=320,
            max_new_tokens=140,
            workers=0,
        )
        return [row["answer"] for row in rows]

    def judge_drafts(self, answers: list[str]) -> dict[str, Any]:
        """Go the whole way of an inference, also where the picture does not show what is asked."""
        asked_in_vain = []
        for number, other in self.pairs:
            record = self.records[other] | {
                "prompt": self.records[number]["prompt"],
                "id": f"{number} {other}",
            }
            asked_in_vain.append(record)
        vain_answers = self.answer(asked_in_vain)
        drafts = [statement_of(answer) for answer in answers]
        vain_drafts = [statement_of(answer) for answer in vain_answers]
        _, right = self.model.judge(self.processor, self.images, self.questions, drafts)
        _, wrong = self.model.judge(
            self.processor, self.wrong_images, self.wrong_questions, vain_drafts
        )
        return {"vain_answers": vain_answers, "right_drafts": right, "wrong_drafts": wrong}


# ---- all trainings


def run_ablation(
    out: Path, parquet: Path, jobs: list[tuple[str, int]], workers: int, seconds: float
) -> None:
    """Train arms with seeds, several processes at a time, for at most so many seconds in all."""
    start = time.monotonic()
    data = Path(tempfile.mkdtemp())
    for drawn in {ARMS[arm].drawn for arm, _ in jobs}:
        _save_records(data, parquet, drawn)
    train = partial(_train_apart, out=out, data=data, start=start, seconds=seconds)
    with ThreadPoolExecutor(workers) as pool:
        # the list waits for all, and raises what went wrong here
        list(pool.map(train, jobs))


def _train_apart(
    job: tuple[str, int], *, out: Path, data: Path, start: float, seconds: float
) -> None:
    """Train one arm in a process of its own, unless the time is up."""
    name, seed = job
    left = seconds - (time.monotonic() - start)
    if left <= 0:
        return
    log = data / f"{name}-{seed}.log"
    script = Path(__file__).with_name("multitask.py")
    command = [sys.executable, str(script), "one", "--out", str(out), "--data", str(data)]
    command += ["--arms", name, "--seeds", str(seed)]
    ended = run_for(command, left, log, os.environ | ONE_THREAD)
    if ended.timed_out:
        print(f"killed: {name}, seed {seed}", flush=True)
        return
    passed = time.monotonic() - start
    print(f"{passed:.0f} s: {name}, seed {seed}, code {ended.code}", flush=True)
    if ended.code:
        print(log.read_text("utf-8")[-1500:], flush=True)
