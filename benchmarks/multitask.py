"""What the multi-task model can do, and what it takes: the figures of notebook 07 that its one run does not make.

    python benchmarks/multitask.py profile --out papermill_runs/reference/multitask-2b-h200
    python benchmarks/multitask.py ablation --out results --workers 8
    python benchmarks/multitask.py collect --results results --out papermill_runs/reference/multitask-ablation

`profile` runs the published recipe (Qwen3-VL-2B, batch 2, accumulation 4, activation checkpointing, LoRA r 8 alpha 32)
on a twin of the model's shape with random weights, and reports the peak of GPU memory. `ablation` trains the tiny base
model in several ways with several seeds, one process each, and keeps boxes, match scores and answers. `collect` scores
them, and writes the tables that the notebook shows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(os.environ.get("REPO") or Path(__file__).resolve().parents[1])


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
            trainer = multitask.classes()[1](base, args, train_dataset=rows, processing_class=processor)
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


QUESTION = "Where is the {} and what is to be said about it?"
DEFAULTS = {
    "seed": 0, "steps": 600, "batch": 8, "learning_rate": 2e-3, "head_learning_rate": 2e-3, "lora_r": 16,
    "target": "language", "drawn": False, "pairs": 0, "collator": {}, "settings": {},
}  # fmt: skip
ONLY_TEXT = {"collator": {"negative_ratio": 0.0, "verify_ratio": 0.0}, "settings": {"weighting": "fixed"}}
ONLY_TEXT["settings"]["weights"] = [1.0, 0.0, 0.0]
ARMS = {
    "all three": {},
    "fixed weights 1, 1, 1": {"settings": {"weighting": "fixed"}},
    "true box only": {"collator": {"predicted_ratio": 0.0}},
    "no negatives": {"collator": {"negative_ratio": 0.0}},
    "heads on the frozen base": {"target": ""},
    "text alone": ONLY_TEXT,
    "box alone": {**ONLY_TEXT, "settings": {"weighting": "fixed", "weights": [0.0, 1.0, 0.0]}},
    "match alone": {"settings": {"weighting": "fixed", "weights": [0.0, 0.0, 1.0]}},
    "with the drawn line": {"drawn": True},
    "all three, 300 pairs": {"pairs": 300},
    "text alone, 300 pairs": ONLY_TEXT | {"pairs": 300},
    "all three, 1000 pairs": {"pairs": 1000},
    "text alone, 1000 pairs": ONLY_TEXT | {"pairs": 1000},
}


def load(parquet: Path, drawn: bool = False, size: int = 256) -> tuple[list[dict], Any]:
    """Records with or without the drawn line, without pictures, and the pictures, made small: (n, size, size, 3)."""
    import io

    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    from medtune import multitask

    columns = ["image", "id", "caption", "group", "split", "roi", "slice", "structure"]
    rows = pq.read_table(parquet, columns=columns, filters=[("has_box", "=", drawn)]).to_pylist()
    shows: dict[int, set] = {}
    for row in rows:
        shows.setdefault(row["slice"], set()).add(row["structure"])
    records, pictures = [], []
    for row in sorted(rows, key=lambda row: row["slice"]):
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        pictures.append(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)))
        answer = [{"role": "assistant", "content": [{"type": "text", "text": row["caption"]}]}]
        record = {name: row[name] for name in ("id", "roi", "structure", "slice", "group", "split")}
        record |= {"shows": sorted(shows[row["slice"]]), "completion": answer}
        records.append(record | {"prompt": multitask.ask(QUESTION.format(row["structure"]))})
    return records, np.stack(pictures)


def mismatched(records: list[dict], seed: int = 0) -> list[tuple[int, int]]:
    """Pairs (record, record whose picture does not show the first one's structure)."""
    import random

    rng, pairs = random.Random(seed), []
    for i, record in enumerate(records):
        others = [k for k, other in enumerate(records) if record["structure"] not in other["shows"]]
        if others:
            pairs.append((i, rng.choice(others)))
    return pairs


def train_one(arm: str, seed: int, data: Path, folder: Path) -> None:
    """Train one arm, and write boxes, match scores and answers of validation and test."""
    import gzip
    import random

    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from PIL import Image
    from transformers import TrainingArguments, set_seed

    from medtune import models, multitask
    from medtune.generate import generate_answers

    config = DEFAULTS | ARMS[arm] | {"seed": seed}
    records = json.loads((data / f"drawn-{config['drawn']}.json").read_text("utf-8"))
    splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for record, picture in zip(records, np.load(data / f"drawn-{config['drawn']}.npy", mmap_mode="r"), strict=True):
        splits[record["split"]].append(record | {"images": [Image.fromarray(np.array(picture))]})
    set_seed(seed)
    device, base = "cuda" if torch.cuda.is_available() else "cpu", models.load_base(REPO / "data" / "tiny-vlm")
    processor = models.load_processor(REPO / "data" / "tiny-vlm")
    if config["target"]:
        lora = {"r": config["lora_r"], "lora_alpha": 2 * config["lora_r"]}
        base = get_peft_model(base, LoraConfig(**lora, **models.adapter_targets(base, config["target"])))
    else:
        base.requires_grad_(False)
    make_model, make_trainer = multitask.classes()
    model, train = make_model(base, **config["settings"]).to(device), splits["train"]
    if config["pairs"]:
        train = random.Random(seed).sample(train, config["pairs"])
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"), max_steps=config["steps"], per_device_train_batch_size=config["batch"],
        learning_rate=config["learning_rate"], lr_scheduler_type="cosine", warmup_steps=20, logging_steps=10,
        save_strategy="no", report_to="none", seed=seed, disable_tqdm=True, use_cpu=device == "cpu",
        dataloader_num_workers=0 if device == "cpu" else 1, dataloader_pin_memory=False,
    )  # fmt: skip
    collator = multitask.MultiTaskCollator(processor, pool=train, seed=seed, **config["collator"])
    options = {"data_collator": collator, "processing_class": processor}
    rate = config["head_learning_rate"]
    trainer = make_trainer(model, args, train_dataset=train, head_learning_rate=rate, **options)
    start = time.perf_counter()
    trainer.train()
    result = {"arm": arm, "seed": seed, "config": config, "seconds": round(time.perf_counter() - start, 1)}
    result["log"] = [{k: round(v, 4) for k, v in log.items()} for log in trainer.state.log_history if "loss" in log]
    for split in ("validation", "test"):
        records = splits[split]
        images, said = [], []
        for record in records:
            images.append(record["images"][0])
            said.append(multitask.statement_of(record["completion"][0]["content"][0]["text"]))
        questions = [r["prompt"][0]["content"][1]["text"] for r in records]
        pairs = mismatched(records)
        boxes, right = model.judge(processor, images, questions, said, batch_size=64)
        rows = [[images[k] for _, k in pairs], [questions[i] for i, _ in pairs], [said[i] for i, _ in pairs]]
        _, wrong = model.judge(processor, *rows, batch_size=64)
        found = {"boxes": [[round(edge, 4) for edge in box] for box in boxes], "pairs": pairs}
        found |= {"right": [round(x, 5) for x in right], "wrong": [round(x, 5) for x in wrong]}
        if split == "test" and config["settings"].get("weights", [1.0])[0]:
            options = {"batch_size": 320, "max_new_tokens": 140, "workers": 0}
            answers = [row["answer"] for row in generate_answers(model.base, processor, records, **options)]
            found["answers"] = answers
        if "answers" in found and arm in ("all three", "with the drawn line"):  # the whole chain, also asked in vain
            asked = [records[k] | {"prompt": records[i]["prompt"], "id": f"{i} {k}"} for i, k in pairs]
            vain = [row["answer"] for row in generate_answers(model.base, processor, asked, **options)]
            found["vain_answers"] = vain
            drafts = [[multitask.statement_of(answer) for answer in texts] for texts in (answers, vain)]
            found["right_drafts"] = model.judge(processor, images, questions, drafts[0])[1]
            found["wrong_drafts"] = model.judge(processor, *rows[:2], drafts[1])[1]
        result[split] = found
    with gzip.open(folder / f"{arm.replace(' ', '_')}-{seed}.json.gz", "wt", encoding="utf-8") as file:
        json.dump(result, file)


def ablation(out: Path, parquet: Path, arms: list[str], seeds: list[int], workers: int, seconds: float) -> None:
    """Train all arms with all seeds, several processes at a time, for at most so many seconds."""
    import numpy as np

    start, data = time.monotonic(), Path(tempfile.mkdtemp())
    for drawn in {(DEFAULTS | ARMS[arm])["drawn"] for arm in arms}:
        records, pictures = load(parquet, drawn)
        np.save(data / f"drawn-{drawn}.npy", pictures)
        (data / f"drawn-{drawn}.json").write_text(json.dumps(records), "utf-8")
    todo, running = [(arm, seed) for seed in seeds for arm in arms], []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    while (todo or running) and time.monotonic() - start < seconds:
        while todo and len(running) < workers:
            arm, seed = todo.pop(0)
            log = open(data / f"{arm}-{seed}.log", "w")  # noqa: SIM115
            command = [sys.executable, __file__, "one", "--out", str(out), "--arms", arm, "--seeds", str(seed)]
            process = subprocess.Popen([*command, "--data", str(data)], stdout=log, stderr=log, env=environment)
            running.append((arm, seed, process))
        for arm, seed, process in [one for one in running if one[2].poll() is not None]:
            running.remove((arm, seed, process))
            print(f"{time.monotonic() - start:.0f} s: {arm}, seed {seed}, code {process.returncode}", flush=True)
            if process.returncode:
                print((data / f"{arm}-{seed}.log").read_text()[-1500:], flush=True)
        time.sleep(0.5)
    for arm, seed, process in running:
        process.kill()
        print(f"killed: {arm}, seed {seed}", flush=True)


def collect(results: list[Path], out: Path, parquet: Path) -> None:
    """Score what the runs left, one JSON object a line in ``runs.jsonl``, and sum them up in ``summary.json``."""
    import gzip

    import pyarrow.parquet as pq
    import sacrebleu

    from medtune import metrics

    def auroc(rows) -> float:
        true, wrong = (rows[rows[:, 0] == label, 1] for label in (1, 0))
        more = true[:, None] - wrong
        return float(((more > 0) + (more == 0) / 2).mean()) if more.size else float("nan")

    columns = ["caption", "roi", "slice", "group", "split", "has_box"]
    rows = sorted(pq.read_table(parquet, columns=columns).to_pylist(), key=lambda row: row["slice"])
    runs = []
    for file in sorted(file for folder in results for file in folder.glob("*.json.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as opened:
            run = json.load(opened)
        test = [row for row in rows if row["split"] == "test" and row["has_box"] == run["config"]["drawn"]]
        found, groups, true = run["test"], [row["group"] for row in test], [row["roi"] for row in test]
        scores = {name: run[name] for name in ("arm", "seed", "seconds", "config")}
        boxes = metrics.box_scores(found["boxes"], true, groups=groups)
        scores |= {"iou": boxes["iou"], "iou_above_0.5": boxes["iou_above_0.5"]}
        scores["iou_interval"] = [boxes["intervals"]["iou"][end] for end in ("low", "high")]
        pairs = found["pairs"]
        right, labels = [found["right"][i] for i, _ in pairs], [1] * len(pairs) + [0] * len(pairs)
        judged = list(zip(labels, right + found["wrong"], strict=True))
        names = [groups[i] for i, _ in pairs] * 2
        match = metrics.bootstrap_interval(judged, names, statistic=auroc, resamples=300)
        scores |= {"auroc": match["value"], "auroc_interval": [match["low"], match["high"]], "pairs": len(pairs)}
        if "answers" in found:
            texts = (found["answers"], [row["caption"] for row in test])
            finding = metrics.finding_scores(*texts)
            scores |= {"place": finding["place_exact"], "entity_f1": finding["f1"]}
            scores["bleu"] = sacrebleu.corpus_bleu(texts[0], [texts[1]]).score
        if "right_drafts" in found:  # of the model's own drafts; the threshold is that of the true validation pairs
            at = sorted(run["validation"]["right"])[int(0.1 * len(run["validation"]["right"]))]
            scores["answered_rightly"] = sum(x >= at for x in found["right_drafts"]) / len(found["right_drafts"])
            scores["answered_in_vain"] = sum(x >= at for x in found["wrong_drafts"]) / len(found["wrong_drafts"])
            scores["threshold"] = at
        if (run["arm"], run["seed"]) == ("all three", 0):
            scores["log"] = run["log"]
        runs.append(scores)
    if (out / "runs.jsonl").exists():  # of earlier results: what is not scored anew stays
        known = {(run["arm"], run["seed"]) for run in runs}
        earlier = map(json.loads, (out / "runs.jsonl").read_text("utf-8").splitlines())
        runs += [run for run in earlier if (run["arm"], run["seed"]) not in known]
    runs.sort(key=lambda run: (list(ARMS).index(run["arm"]), run["seed"]))
    (out / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs), "utf-8")
    (out / "summary.json").write_text(json.dumps(summarise(runs), indent=1), "utf-8")


def summarise(runs: list[dict]) -> dict:
    """Put mean and range over seeds of each arm into two tables: the arms, and the text by the number of pairs."""
    shown = {"iou": "mean IoU", "iou_above_0.5": "IoU over 0.5", "auroc": "match AUROC", "place": "place right"}
    shown |= {"entity_f1": "entity F1", "bleu": "word BLEU-4"}
    untrained = {"text alone": {"iou", "iou_above_0.5", "auroc"}, "box alone": {"auroc", "place", "entity_f1", "bleu"}}
    untrained |= {"match alone": {"iou", "iou_above_0.5", "place", "entity_f1", "bleu"}}

    def cell(arm: str, key: str) -> str:
        values = [run[key] for run in runs if run["arm"] == arm and key in run]
        if not values or key in untrained.get(arm.split(",")[0], ()):
            return "-"
        digits = 1 if key == "bleu" else 3
        return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    done = [arm for arm in ARMS if any(run["arm"] == arm for run in runs)]
    seeds = {arm: sum(run["arm"] == arm for run in runs) for arm in done}
    arms = {arm: {"seeds": seeds[arm]} | {name: cell(arm, key) for key, name in shown.items()} for arm in done}
    by_pairs: dict[str, dict] = {}
    for arm in done:
        if arm.split(",")[0] in ("all three", "text alone"):
            task, _, number = arm.partition(", ")
            heads = "with heads" if task == "all three" else "without"
            line = by_pairs.setdefault(number or "all 2962 pairs", {})
            line |= {f"{name}, {heads}": cell(arm, key) for key, name in list(shown.items())[3:]}
    by_pairs = {name: by_pairs[name] for name in sorted(by_pairs, key=lambda name: int(name.split()[-2]))}
    small = {name: line for name, line in arms.items() if "pairs" not in name}
    return {"arms": small, "by_pairs": by_pairs, "runs": len(runs), "steps": runs[0]["config"]["steps"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["profile", "ablation", "one", "collect"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parquet", type=Path, default=REPO / "data" / "sample" / "sample.parquet")
    parser.add_argument("--data", type=Path, help="of 'one': where 'ablation' put the records")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--results", nargs="+", type=Path, help="of 'collect': folders that 'ablation' wrote")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop what is unfinished then")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "profile":
        profile(args.out)
    elif args.what == "one":
        train_one(args.arms[0], args.seeds[0], args.data, args.out)
    elif args.what == "collect":
        collect(args.results, args.out, args.parquet)
    else:
        ablation(args.out, args.parquet, args.arms, args.seeds, args.workers, args.seconds)


if __name__ == "__main__":
    main()
