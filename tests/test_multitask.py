"""Locate, verify, diagnose: what the heads see, what the collator makes, what the losses count, and that it trains."""

import functools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from medtune import models, multitask, preflight, sizing
from medtune.multitask import IMAGE, STATEMENT, MultiTaskCollator, check_box, encode, locate_verify_diagnose

FAMILIES = {
    "qwen2-vl": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen3-vl": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-moe": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "gemma-3": "google/gemma-3-4b-pt",
}
ORGANS = ("liver", "spleen", "heart", "stomach")


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """The folder of a tiny twin of each family."""
    return functools.cache(
        lambda name: sizing.make_twin(
            FAMILIES[name], tmp_path_factory.mktemp("twins") / name, scale="tiny", dtype="float32"
        )
    )


def tuned(folder, *, quantised=False, dtype="float32", seed=0, **settings):
    """Processor, and a model with adapter and heads whose adapter already does something."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(seed)
    config = models.nf4_config("float32") if quantised else None
    base = models.load_base(folder, dtype=dtype, quantization_config=config)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False) if quantised else base
    base = get_peft_model(base, LoraConfig(r=4, **models.adapter_targets(base, "language")))
    model = multitask.classes()[0](base, **settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return models.load_processor(folder), model


def record(number, *, organ=None, finding=None, size=(64, 64), roi=(0.1, 0.2, 0.5, 0.6), **more):
    organ = organ or ORGANS[number % 4]
    said = f"The {organ} shows {finding}." if finding else f"The {organ} is normal. No cyst is seen within it."
    picture = Image.effect_noise(size, 60).convert("RGB")
    row = {"id": f"r{number}", "images": [picture], "roi": roi and list(roi), "structure": organ}
    row |= {"prompt": multitask.ask(f"Where is the {organ}?")}
    return row | {"completion": [{"role": "assistant", "content": [{"type": "text", "text": said}]}]} | more


@pytest.fixture
def records():
    sizes = ((64, 64), (96, 64), (64, 128), (128, 96))
    return [record(i, size=sizes[i % 4], roi=(0.1 * (i % 4), 0.2, 0.5, 0.6)) for i in range(8)]


def answer_of(row):
    return row["completion"][0]["content"][0]["text"]


def decode(processor, batch, row, kind):
    return processor.tokenizer.decode(batch["input_ids"][row][batch["token_kinds"][row] == kind])


# ---- what the model receives


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_answer_is_learned_and_only_the_statement_is_judged(twin, records, family):
    """Of the published recipe's faults: prompt and image tokens were labels, and so was the padding."""
    processor = models.load_processor(twin(family))
    samples = [{"image": row["images"][0], "question": "Where is it, and what is it?"} for row in records[:3]]
    answers = ["The spleen is large.", "One cyst in the liver, of about 4 mm, and nothing else."]
    batch = encode(processor, [samples[0] | {"answer": answers[0]}, samples[1] | {"answer": answers[1]}])
    preflight.check_labels(batch, processor, answers)
    batch = encode(processor, [samples[0] | {"statement": "a cyst of the liver"}, samples[1] | {"answer": answers[1]}])
    assert decode(processor, batch, 0, STATEMENT).strip() == "a cyst of the liver"
    assert (batch["labels"][0] == -100).all()
    assert decode(processor, batch, 1, STATEMENT) == "" and "Where is it" in decode(processor, batch, 0, 1)
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["labels"][padding] == -100).all() and (batch["token_kinds"][padding] == 0).all()
    seen = batch["token_kinds"] == IMAGE
    assert (batch["labels"][seen] == -100).all()
    if "image_grid_thw" in batch:
        merge = processor.image_processor.merge_size**2
        assert seen.sum(1).tolist() == (batch["image_grid_thw"].prod(1) // merge).tolist()
    else:
        assert seen.sum(1).tolist() == [processor.image_seq_length] * 2
    both = encode(processor, [samples[0] | {"statement": "a cyst", "answer": answers[0]}])
    assert (both["labels"] == -100).all(), "an answer behind its own statement would be copied"


def test_training_and_generation_ask_alike(twin, records):
    """The prompt of a diagnosis is, token by token, what `generate_answers` asks."""
    processor = models.load_processor(twin("qwen3-vl"))
    row = records[1]
    question = row["prompt"][0]["content"][1]["text"]
    batch = encode(processor, [{"image": row["images"][0], "question": question, "answer": "Yes."}])
    text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    asked = processor(text=[text], images=[row["images"]], return_tensors="pt")["input_ids"][0]
    assert batch["input_ids"][0][batch["labels"][0] == -100].tolist() == asked.tolist()


def test_a_wrong_picture_comes_with_its_own_grid_and_image_tokens(twin, records):
    """Of the published recipe's faults: a negative kept the grid, and so the image tokens, of the right picture."""
    processor = models.load_processor(twin("qwen3-vl"))
    collator = MultiTaskCollator(processor, negative_ratio=1.0, verify_ratio=0.0, predicted_ratio=0.0)
    batch = collator(records[:4])
    preflight.check_image_tokens(batch, processor)
    rights = MultiTaskCollator(processor, negative_ratio=0.0)(records[:4])
    grids, own = batch["image_grid_thw"].tolist(), rights["image_grid_thw"].tolist()
    assert all(grid != right for grid, right in zip(grids, own, strict=True)) and all(grid in own for grid in grids)
    for row, grid in enumerate(grids):
        donor = records[own.index(grid)]
        assert batch["regions"][row].tolist() == pytest.approx(donor["roi"]), "the box of the picture that is shown"
        assert decode(processor, batch, row, STATEMENT).strip() == multitask.statement_of(answer_of(records[row]))
    assert (batch["labels"] == -100).all() and batch["boxes"].isnan().all() and batch["matches"].tolist() == [0] * 4


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_ratio_is_exact_in_expectation_for_any_batch(monkeypatch, size):
    """Of the published recipe's faults: int(2 x 0.3) made no negative at batch 2."""
    monkeypatch.setattr(multitask, "encode", lambda processor, samples, own: [match for _, _, match in own])
    rows = [record(i, size=(8, 8)) for i in range(20)]
    collator, found = MultiTaskCollator(None, negative_ratio=0.3, verify_ratio=0.2, pool=rows), Counter()
    for collator.epoch in range(100):
        for start in range(0, 20, size):
            found.update(collator(rows[start : start + size]))
    assert abs(found[0] / 2000 - 0.3) < 0.035 and abs(found[1] / 2000 - 0.2) < 0.03  # three standard deviations


def test_every_record_becomes_each_in_time_and_the_same_seed_gives_the_same(monkeypatch):
    monkeypatch.setattr(multitask, "encode", lambda processor, samples, own: [match for _, _, match in own])
    rows = [record(i, size=(8, 8)) for i in range(8)]

    def fates(seed, order=slice(None)):
        collator = MultiTaskCollator(None, pool=rows, seed=seed)
        found = []
        for collator.epoch in range(30):
            found.append(collator(rows[order]))
        return found

    assert fates(0) == fates(0) != fates(1)
    assert [list(reversed(epoch)) for epoch in fates(0)] == fates(0, slice(None, None, -1)), "the batch does not matter"
    assert all(set(record) == {-1, 0, 1} for record in zip(*fates(0), strict=True))


def test_the_number_of_workers_does_not_matter(twin, records):
    processor = models.load_processor(twin("qwen3-vl"))
    collator = MultiTaskCollator(processor, pool=records, seed=3)
    batches = [
        list(torch.utils.data.DataLoader(records, batch_size=3, collate_fn=collator, num_workers=workers))
        for workers in (0, 2)
    ]
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key].nan_to_num(), other[key].nan_to_num()) for key in one)


def test_a_wrong_picture_never_shows_the_same(monkeypatch):
    shown = []
    monkeypatch.setattr(multitask, "encode", lambda processor, samples, own: shown.extend(samples))
    findings = ["a cyst", None, None] * 4
    rows = [record(i, organ=ORGANS[i % 2], finding=findings[i], size=(8 + i, 8)) for i in range(12)]
    rows += [record(12, organ="heart", size=(40, 8), shows=["heart", "liver"])]
    of_width = {row["images"][0].width: row for row in rows}
    for hard in (False, True):
        collator = MultiTaskCollator(None, negative_ratio=1.0, verify_ratio=0, hard_negatives=hard)
        for collator.epoch in range(20):
            shown.clear()
            collator(rows)
            for row, sample in zip(rows, shown, strict=True):
                donor = of_width[sample["image"].width]
                assert multitask.finding_of(donor) != multitask.finding_of(row)
                assert row["structure"] not in donor.get("shows", ())
                if hard and row["structure"] != "heart":
                    assert donor["structure"] == row["structure"], "the same organ with another finding"


def test_a_batch_of_one_without_a_pool_stays_right(twin, records):
    options = {"negative_ratio": 1.0, "verify_ratio": 0, "predicted_ratio": 0}
    batch = MultiTaskCollator(models.load_processor(twin("qwen3-vl")), **options)(records[:1])
    assert batch["matches"].tolist() == [1] and batch["boxes"].isfinite().all()
    assert torch.equal(batch["boxes"], batch["regions"])


def test_a_question_may_name_the_structure(twin, records):
    processor = models.load_processor(twin("qwen3-vl"))
    batch = MultiTaskCollator(processor, question="Find the {structure}!")(records[:2])
    assert "Find the liver!" in decode(processor, batch, 0, 1) and "Find the spleen!" in decode(processor, batch, 1, 1)


# ---- bad input


@pytest.mark.parametrize(
    "box", [(0.5, 0, 0.2, 1), (0, 0.4, 1, 0.4), (-0.1, 0, 1, 1), (0, 0, 1, 1.2), (0, 0, float("nan"), 1), (0, 1, 1)]
)
def test_an_impossible_box_is_named(twin, records, box):
    records[1]["roi"] = list(box)
    with pytest.raises(ValueError, match="row r1 has the box"):
        MultiTaskCollator(models.load_processor(twin("qwen3-vl")), negative_ratio=0)(records[:2])


def test_several_boxes_are_refused_and_none_is_none():
    with pytest.raises(ValueError, match="of several boxes make several rows"):
        check_box([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    assert check_box(None) is None and check_box([]) is None
    assert check_box((0, 0, 1, 1)) == [0, 0, 1, 1]


def test_several_pictures_and_impossible_ratios_are_refused(twin, records):
    records[0]["images"] *= 2
    with pytest.raises(ValueError, match="row r0 has 2 pictures"):
        MultiTaskCollator(models.load_processor(twin("qwen3-vl")), negative_ratio=0)(records[:1])
    with pytest.raises(ValueError, match="nor above 1 together"):
        MultiTaskCollator(None, negative_ratio=0.8, verify_ratio=0.4)
    with pytest.raises(ValueError, match="weighting is uncertainty or fixed"):
        tuned(twin("qwen3-vl"), weighting="gradnorm")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_box_and_a_picture_smaller_than_a_patch(twin, family):
    processor, model = tuned(twin(family))
    rows = [record(0, roi=None, size=(3, 2)), record(1, roi=None)]
    out = model(**MultiTaskCollator(processor, negative_ratio=0.0)(rows))
    assert out.loss.isfinite() and out.tally[0, 1] == 0 == out.tally[1, 1], "no box, no box loss"
    assert ((out.boxes >= 0) & (out.boxes <= 1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_only_negatives_trains_the_match_alone(twin, records, family):
    processor, model = tuned(twin(family))
    out = model(**MultiTaskCollator(processor, negative_ratio=1.0, verify_ratio=0)(records[:4]))
    out.loss.backward()
    assert out.tally[1].tolist() == [0, 0, 4] and out.tally[0, :2].tolist() == [0, 0]
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients), "or ranks would wait"
    assert model.heads["match"][0].weight.grad.norm() > 0 == model.heads["vote"][0].weight.grad.norm()


# ---- the heads


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(twin, records, family):
    """Of the published recipe's faults: pooling had no mask."""
    processor, model = tuned(twin(family))
    model.eval()
    said = ["a cyst", "one cyst in the left lobe of the liver, and a second one of 4 mm below it"]
    samples = [{"image": records[i]["images"][0], "question": "Where?", "statement": said[i]} for i in (0, 1)]
    rows = []
    for batch in ([samples[0]], samples):
        batch = encode(processor, batch)
        with torch.no_grad():
            rows.append(model(**batch))
    torch.testing.assert_close(rows[0].boxes[0], rows[1].boxes[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rows[0].match_logits[0], rows[1].match_logits[0], atol=1e-5, rtol=1e-4)


def test_the_box_does_not_depend_on_the_statement_but_the_match_does(twin, records):
    """So the draft cannot move the box, and in training and at inference the heads see the same kinds of tokens."""
    processor, model = tuned(twin("qwen3-vl"))
    image, question = records[0]["images"][0], "Where is the liver?"
    boxes, scores = model.judge(processor, [image] * 2, [question] * 2, ["a cyst", "no cyst, but a mass of 3 cm"])
    assert boxes[0] == pytest.approx(boxes[1], abs=1e-5) and scores[0] != pytest.approx(scores[1], abs=1e-5)
    assert all(0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1 for x0, y0, x1, y1 in boxes)


def test_the_match_looks_into_the_region_only(twin, records):
    processor, model = tuned(twin("qwen3-vl"))
    seen = []
    model.verify = lambda hidden, kinds, covered: seen.append(covered) or hidden[:, 0, 0]
    sample = {"image": Image.new("RGB", (128, 64)), "question": "Where?", "statement": "a cyst"}
    batch = encode(processor, [sample])
    high, wide = (batch["image_grid_thw"][0, 1:] // processor.image_processor.merge_size).tolist()
    model(**batch, regions=torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
    grid = seen[0][0][batch["token_kinds"][0] == IMAGE].reshape(high, wide)
    columns = (torch.arange(wide) + 1).clamp(max=wide / 2) - torch.arange(wide).clamp(max=wide / 2)
    torch.testing.assert_close(grid, columns.expand(high, wide).float())


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_stand_where_they_are_in_the_picture(twin, family):
    """Row by row from the upper left, as the processors cut the picture."""
    processor, model = tuned(twin(family))
    kept, locate = [], model.locate
    model.locate = lambda hidden, kinds, centres: kept.append(centres) or locate(hidden, kinds, centres)
    batch = encode(processor, [{"image": Image.new("RGB", (128, 64)), "question": "?"}])
    image = batch["token_kinds"][0] == IMAGE
    grid = batch.get("image_grid_thw", torch.tensor([[1, int(image.sum()) ** 0.5, int(image.sum()) ** 0.5]]))[0]
    merge = (int(grid.prod()) / int(image.sum())) ** 0.5
    high, wide = int(grid[1] / merge), int(grid[2] / merge)
    model(**batch)
    y, x = torch.meshgrid((torch.arange(high) + 0.5) / high, (torch.arange(wide) + 0.5) / wide, indexing="ij")
    torch.testing.assert_close(kept[0][0][image], torch.stack([x, y], -1).reshape(-1, 2))


# ---- the losses


def losses_of(twin, logit, *, negative, **settings):
    processor, model = tuned(twin("qwen3-vl"), **settings)
    model.verify = lambda hidden, kinds, covered: torch.full((len(hidden),), logit) + 0 * hidden[:, 0, 0]
    collator = MultiTaskCollator(processor, negative_ratio=float(negative), verify_ratio=float(not negative))
    return model(**collator([record(0), record(1)]))


@pytest.mark.parametrize("logit", [-2.0, 0.5, 3.0])
def test_the_miss_weight_multiplies_the_true_pairs(twin, logit):
    """Of the published recipe's faults: the x10 fell on false alarms (label 0, score over 0.5), not on misses."""
    score = torch.tensor(logit).sigmoid()
    for negative, chance in ((False, score), (True, 1 - score)):
        focal = -((1 - chance) ** 2) * chance.log()
        for weight in (1.0, 10.0):
            found = losses_of(twin, logit, negative=negative, miss_weight=weight).tally
            assert found[0, 2] / found[1, 2] == pytest.approx(focal.item() * (1 if negative else weight), rel=1e-4)


def test_the_log_variances_weigh_as_kendall_says(twin, records):
    processor, model = tuned(twin("qwen3-vl"))
    with torch.no_grad():
        model.heads.log_variances.copy_(torch.tensor([0.3, -0.2, 0.1]))
    batch = MultiTaskCollator(processor, seed=1)(records)
    out = model(**batch)
    s, means = model.heads.log_variances, out.tally[0] / out.tally[1]
    assert out.loss.item() == pytest.approx((0.5 * torch.exp(-s) * means + 0.5 * s).sum().item(), rel=1e-5)
    out.loss.backward()
    torch.testing.assert_close(s.grad, 0.5 - 0.5 * torch.exp(-s.detach()) * means, rtol=1e-4, atol=1e-5)
    model.settings |= {"weighting": "fixed", "weights": [0.0, 2.0, 0.0]}
    assert model(**batch).loss.item() == pytest.approx(2 * means[1].item(), rel=1e-5)


def test_the_box_loss_is_smooth_l1_plus_giou(twin):
    """Against the formulas, written out for one pair of boxes that do not touch."""
    processor, model = tuned(twin("qwen3-vl"))
    found, true = torch.tensor([[0.0, 0.0, 0.25, 0.5]]), (0.5, 0.5, 1.0, 1.0)
    model.locate = lambda hidden, kinds, centres: found + 0 * hidden[:, 0, :1]
    tally = model(**MultiTaskCollator(processor, negative_ratio=0)([record(0, roi=true)])).tally
    smooth = sum(abs(a - b) - 0.05 for a, b in zip(found[0].tolist(), true, strict=True))
    giou = 0 - (1 - (0.125 + 0.25)) / 1
    assert tally[0, 1].item() == pytest.approx(smooth + 1 - giou, rel=1e-5) and tally[2, 1] == 0


# ---- saving, training, answering


def test_saved_and_loaded_it_says_the_same(twin, records, tmp_path):
    processor, model = tuned(twin("qwen3-vl"))
    model.eval()
    batch = MultiTaskCollator(processor)(records)
    models.save_model(model, processor, tmp_path / "model", card="a test")
    fresh = multitask.classes()[0].from_pretrained(models.load_base(twin("qwen3-vl")), tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(model(**batch).match_logits, fresh(**batch).match_logits)
        assert torch.equal(model(**batch).boxes, fresh(**batch).boxes) and model(**batch).loss == fresh(**batch).loss
    file = tmp_path / "model" / "multitask.safetensors"
    weights = load_file(file)
    del weights["vote.0.weight"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"the heads in .* do not fit: .*vote\.0\.weight"):
        multitask.classes()[0].from_pretrained(models.load_base(twin("qwen3-vl")), tmp_path / "model")


def trainer_of(folder, out, rows, *, steps=3, batch=2, accumulation=1, **options):
    from transformers import TrainingArguments

    settings = {name: options.pop(name) for name in ("quantised", "dtype") if name in options}
    processor, model = tuned(folder, **settings)
    arguments = {"learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "seed": 0}
    args = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        disable_tqdm=True, save_steps=2, **arguments, **options,
    )  # fmt: skip
    trainer = multitask.classes()[1](model, args, train_dataset=rows, eval_dataset=rows, processing_class=processor)
    return trainer


HOW = {"fp32": {}, "bf16": {"bf16": True, "dtype": "bfloat16"}, "nf4": {"quantised": True}}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_it_trains_and_logs_each_task(twin, records, tmp_path, how):
    trainer = trainer_of(twin("qwen3-vl"), tmp_path, records, save_strategy="no", eval_strategy="epoch", **how)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert {name.split(".")[1] for name in moved if name.startswith("heads")} >= {"vote", "match", "log_variances"}
    assert any("lora_A" in name for name in moved)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3 and all(set(multitask.LOGGED) <= log.keys() for log in logs)
    trainer.evaluate()
    assert {f"eval_{name}" for name in multitask.LOGGED} <= trainer.state.log_history[-1].keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_batches_give_the_gradient_of_one(twin, family, tmp_path):
    """For all three losses, though batches differ in answers, boxes and pairs."""
    rows = [record(i, finding=None if i % 2 else "a mass of 12 mm") for i in range(6)]
    rows[1]["roi"] = None
    trainer = trainer_of(twin(family), tmp_path, rows)
    batch = trainer.data_collator(rows)
    assert {-1, 0, 1} == set(batch["matches"].tolist()), "the rows must show it"
    gradients = []
    for cut in ([rows], [rows[:1], rows[1:3], rows[3:]]):
        trainer.model.zero_grad()
        batches, items = trainer.get_batch_samples(iter([trainer.data_collator(part) for part in cut]), len(cut), "cpu")
        trainer.current_gradient_accumulation_steps = len(cut)
        for part in batches:
            trainer.training_step(trainer.model, part, items)
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    for name, one in gradients[0].items():
        torch.testing.assert_close(one, gradients[1][name], atol=2e-5, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_stopped_run_goes_on_with_its_heads(twin, records, tmp_path):
    whole = trainer_of(twin("qwen3-vl"), tmp_path / "whole", records, steps=4)
    whole.train()
    half = trainer_of(twin("qwen3-vl"), tmp_path / "half", records, steps=4)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), half.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_ranks_train_as_one_process_does(twin, records, tmp_path):
    """The same file under torchrun: losses of two ranks of batch 2 are those of one process with batch 4."""
    from datasets import Dataset

    from medtune import convert

    pairs = Dataset.from_list(
        [
            {"image": row["images"][0], "id": row["id"], "caption": answer_of(row), "roi": row["roi"]}
            | {"structure": row["structure"], "split": "train"}
            for row in records
        ]
    )
    convert.convert_pairs(pairs, tmp_path / "data")
    script = tmp_path / "launch.py"
    script.write_text("from medtune import multitask, train\n\ntrain.main(trainer_class=multitask.classes()[1])\n")
    common = ["--data", tmp_path / "data", "--model_name_or_path", twin("qwen3-vl"), "--lora_r", 4, "--max_steps", 3]
    common += ["--logging_steps", 1, "--learning_rate", 1e-3, "--dtype", "float32"]
    logs = {}
    for name, launcher, size in (
        ("one", [sys.executable], 4),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], 2),
    ):
        command = [*launcher, script, *common, "--output_dir", tmp_path / name, "--per_device_train_batch_size", size]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        log = json.loads((tmp_path / name / "log.json").read_text("utf-8"))
        logs[name] = [entry for entry in log if "text_loss" in entry]
        assert (tmp_path / name / "model" / "multitask.safetensors").is_file()
    assert len(logs["one"]) == 3
    for one, two in zip(logs["one"], logs["two"], strict=True):
        for key in multitask.LOGGED:
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-4), key


def test_no_diagnosis_under_the_threshold(twin, records):
    processor, model = tuned(twin("qwen3-vl"))
    images, questions = [row["images"][0] for row in records[:3]], [f"Where is the {organ}?" for organ in ORGANS[:3]]
    options = {"max_new_tokens": 6}
    loose = locate_verify_diagnose(model, processor, images, questions, threshold=0.0, **options)
    scores = [result["match_score"] for result in loose]
    assert all(isinstance(result["answer"], str) for result in loose)
    middle = sorted(scores)[1]
    for result, score in zip(
        locate_verify_diagnose(model, processor, images, questions, threshold=middle, **options), scores, strict=True
    ):
        assert (result["answer"] is None) == (score < middle) and f"threshold {middle:.3f}" in result["reason"]
        assert ("no diagnosis" in result["reason"]) == (score < middle) and len(result["box"]) == 4
    alone = locate_verify_diagnose(model, processor, images[:1], questions[:1], threshold=0.0, **options)[0]
    assert alone["answer"] == loose[0]["answer"] and alone["match_score"] == pytest.approx(scores[0], abs=1e-5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.01, 1))
def test_the_threshold_keeps_the_sensitivity(scores, sensitivity):
    threshold = multitask.choose_threshold(scores, sensitivity)
    kept = [score for score in scores if score >= threshold]
    assert len(kept) >= sensitivity * len(scores) - 1e-6
    higher = [score for score in scores if score > threshold]
    assert len(higher) < sensitivity * len(scores) + 1e-6, "no higher threshold would do"


def test_statements_fall_back_on_the_whole_text():
    assert multitask.statement_of("Something is bright.") == "Something is bright."
    assert multitask.finding_of(record(0, finding="a cyst")) == ("liver", ("cyst",))
    row = record(0) | {"structure": None}
    row["completion"][0]["content"][0]["text"] = "Something is bright."
    assert multitask.finding_of(row) == ("Something is bright.", ())


@pytest.mark.slow
def test_a_square_is_found(twin, tmp_path):
    """The heads learn: the mean IoU with a bright square at a random place rises far above that of the mean box."""
    from medtune.metrics import box_scores

    rng = torch.Generator().manual_seed(0)
    rows = []
    for number in range(160):
        x, y, side = (torch.rand(3, generator=rng) * torch.tensor([80, 80, 24])).int().tolist()
        side += 24
        picture = Image.new("RGB", (128, 128))
        picture.paste((255, 255, 255), (x, y, x + side, y + side))
        rows.append(record(number, roi=[v / 128 for v in (x, y, x + side, y + side)]) | {"images": [picture]})
    trainer = trainer_of(twin("qwen3-vl"), tmp_path, rows[:128], steps=150, batch=8, save_strategy="no")
    trainer.model.settings |= {"weighting": "fixed", "weights": [0.0, 1.0, 0.0]}
    trainer.data_collator.negative_ratio, trainer.data_collator.verify_ratio = 0.0, 0.0
    trainer.train()
    held_out = rows[128:]
    images, true = [row["images"][0] for row in held_out], [row["roi"] for row in held_out]
    found, _ = trainer.model.judge(trainer.processing_class, images, ["Where is the square?"] * 32, ["a square"] * 32)
    mean_box = torch.tensor([row["roi"] for row in rows[:128]]).mean(0).tolist()
    assert box_scores(found, true)["iou"] > 1.5 * box_scores([mean_box] * 32, true)["iou"]


def test_it_needs_three_light_siblings():
    """Who copies the file alone knows what to copy with it."""
    source = Path(multitask.__file__).read_text("utf-8")
    named = {line.split(".")[1].split()[0] for line in source.splitlines() if line.startswith("from medtune.")}
    assert named == {"captions", "generate", "models"}
