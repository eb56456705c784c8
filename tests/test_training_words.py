"""Words that weigh more in the loss: which ones, how much, and the loss against one by hand."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import GEMMA, TINY, make_record, wake_adapter, words_of
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer

from medtune import captions, models, plan, records, training
from medtune.training.words import STRESSED

# what they say is of unequal length, and the last one names nothing
ANSWERS = [
    ("It shows the left kidney.", "left kidney", ["left kidney"]),
    (
        "The region of interest, in the upper left of the image, shows the liver.",
        "liver",
        ["liver"],
    ),
    ("The aorta is bright, and the aorta is round.", "aorta", ["aorta", "aorta"]),
    ("图像显示左肾。其密度高。", "left kidney", ["左肾"]),
    ("It is dark.", None, []),
]


def said_by(answer: str, **columns) -> dict:
    content = [{"type": "text", "text": answer}]
    return {"completion": [{"role": "assistant", "content": content}], **columns}


# ---- which words


@pytest.mark.parametrize("answer, structure, words", ANSWERS)
def test_a_record_says_what_it_names(answer, structure, words):
    for row in (said_by(answer, structure=structure), said_by(answer)):
        found = [answer[first:behind] for first, behind in training.name_spans(row)]
        assert found == words


def test_the_record_goes_before_the_rules():
    row = said_by("The spleen lies beside the liver.", structure="liver")
    assert training.name_spans(row) == [(27, 32)]
    row = said_by("图像显示脾脏和肝脏。", structure="liver", fields={"structure_zh": "肝脏"})
    assert training.name_spans(row) == [(7, 9)]
    # a name that the answer does not have: the rules read it; and "rib" is no part of "ribbon"
    assert training.name_spans(said_by("It shows the spleen.", structure="liver")) == [(13, 19)]
    assert training.name_spans(said_by("A ribbon.", structure="rib")) == []
    assert training.name_spans({"completion": "A large Liver.", "structure": "liver"}) == [(8, 13)]


@pytest.mark.parametrize(
    "caption, words",
    [
        (
            "The region of interest is the right kidney. The left kidney is normal.",
            ["right kidney"],
        ),
        ("A cyst in the liver, which is bordered by the spleen.", ["liver"]),
        ("Hepatic lesion: the liver shows a mass.", ["Hepatic", "liver"]),
        ("感兴趣区域显示肝脏，与脾脏相邻。", ["肝"]),
        ("No words of the table.", []),
        ("", []),
    ],
)
def test_the_rules_find_the_words_of_a_structure(caption, words):
    spans = captions.structure_spans(caption)
    assert [caption[first:behind] for first, behind in spans] == words


@given(st.text(max_size=80))
@settings(max_examples=40, deadline=None)
def test_any_text_has_its_words_within_itself(text):
    spans = captions.structure_spans(text)
    assert all(0 <= first < behind <= len(text) for first, behind in spans)
    if spans:
        assert captions.parse_caption(text).structure


# ---- which tokens


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.data())
@settings(max_examples=40, deadline=None)
def test_tokens_are_marked_where_they_share_a_character(lengths, data):
    edges = torch.tensor([0, *lengths]).cumsum(0)
    size = int(edges[-1])
    two = st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)
    spans = [tuple(sorted(pair)) for pair in data.draw(st.lists(two, max_size=3))]
    marked = models.mark_words(edges[:-1], edges[1:], spans)
    for token in range(len(lengths)):
        own = set(range(int(edges[token]), int(edges[token + 1])))
        shared = any(own & set(range(first, behind)) for first, behind in spans)
        assert bool(marked[token]) == shared


@given(st.data(), st.floats(0.1, 50))
@settings(max_examples=40, deadline=None)
def test_an_answer_weighs_as_before(data, stress):
    flags = st.lists(st.booleans(), min_size=9, max_size=9)
    stressed = torch.tensor([data.draw(flags) for _ in range(2)])
    learned = torch.tensor([data.draw(flags) for _ in range(2)])
    weights = models.weigh_tokens(stressed, learned, stress)
    assert not weights[~learned].any()
    for row in range(2):
        count = int(learned[row].sum())
        assert weights[row].sum().item() == pytest.approx(count, rel=1e-4)
        heavy = weights[row][learned[row] & stressed[row]]
        light = weights[row][learned[row] & ~stressed[row]]
        if len(heavy) and len(light):
            assert heavy[0].item() == pytest.approx(stress * light[0].item(), rel=1e-4)
        elif count:
            # nothing to set them apart from: a weight of exactly 1
            assert torch.equal(weights[row], learned[row].float()) or heavy.numel() == count


# ---- the loss of a trainer


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    lines = []
    for number, (answer, structure, _) in enumerate(ANSWERS):
        record = make_record(tmp_path, f"r{number}", [], picture=bytes([40 * number]) * 3072)
        record["completion"][0]["content"][0]["text"] = answer
        record["structure"] = structure
        record["group"] = "a"
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), "utf-8")
    text = {"dtype": "string", "_type": "Value"}
    notes = {"features": {"structure": text, "group": text}}
    (tmp_path / "convert.json").write_text(json.dumps(notes))
    return tmp_path


def trainer_of(folder, **changes):
    choices = {
        "data": folder,
        "model_name_or_path": TINY,
        "output_dir": folder / "out",
        "eval_strategy": "steps",
        "lora_r": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 5,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    trainer = training.build_trainer(*training.parse_arguments(words_of(choices | changes)))
    torch.manual_seed(0)
    wake_adapter(trainer.model)
    return trainer


def rows_of(trainer) -> list[dict]:
    return [dict(row) for row in trainer.train_dataset]


def batch_of(trainer) -> dict:
    return trainer.data_collator(rows_of(trainer))


def loss_of(trainer, batch: dict) -> torch.Tensor:
    """The loss as a step of training computes it, with the number of tokens of the batch."""
    trainer.model.train()
    items = (batch["labels"][:, 1:] != -100).sum()
    return trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)


def heavy_places(tokenizer, ids: list[int], words: list[str]) -> set[int]:
    """Where the tokens of words stand among those of an answer, by looking for their ids."""
    places = set()
    for word in words:
        # a blank in front belongs to an English word
        own = tokenizer(f" {word}" if word.isascii() else word, add_special_tokens=False)[
            "input_ids"
        ]
        for start in range(len(ids) - len(own) + 1):
            if ids[start : start + len(own)] == own:
                places.update(range(start, start + len(own)))
    return places


def loss_by_hand(trainer, batch: dict, name_weight: float, *, model=None) -> float:
    """Written out token by token, in float64, from all logits."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", STRESSED)}
    with torch.no_grad():
        logits = (model or trainer.model)(**inputs).logits.double()
    total = 0.0
    tokens = 0
    for number, (_, _, words) in enumerate(ANSWERS):
        labels = batch["labels"][number]
        places = (labels != -100).nonzero().flatten().tolist()
        ids = labels[places].tolist()
        heavy = heavy_places(trainer.processing_class.tokenizer, ids, words)
        assert bool(heavy) == bool(words)
        weights = [name_weight if place in heavy else 1.0 for place in range(len(ids))]
        mean = sum(weights) / len(weights)
        for place, weight in zip(places, weights, strict=True):
            loss = cross_entropy(logits[number, place - 1], labels[place]).item()
            total += loss * weight / mean
        tokens += len(places)
    return total / tokens


def gradients_of(trainer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    trainer.model.zero_grad()
    return found


@pytest.mark.parametrize("fast", [False, True])
def test_the_loss_is_the_one_by_hand(folder, fast):
    """TRL's own loss, of names that weigh 3; this fails where TRL renames what its head returns."""
    trainer = trainer_of(folder, name_weight=3.0)
    if fast:
        training.speed_up(trainer.model)
    batch = batch_of(trainer)
    tokenizer = trainer.processing_class.tokenizer
    for number, (_, _, words) in enumerate(ANSWERS):
        marked = batch["input_ids"][number][batch[STRESSED][number]]
        glue = "" if number == 3 else " "
        assert tokenizer.decode(marked).strip() == glue.join(words)
    trainer.model.train()
    by_hand = loss_by_hand(trainer, batch, 3.0)
    plain = loss_by_hand(trainer, batch, 1.0)
    assert loss_of(trainer, batch).item() == pytest.approx(by_hand, rel=1e-5)
    assert abs(by_hand - plain) > 1e-3 * plain, "or the test says nothing"
    # judged, not trained: the plain loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)
    # and the names of fields that all of it rests on
    outputs = trainer.model(**batch, fused_lm_head=True)
    assert {"log_probs", "label_mask"} <= set(outputs)


@pytest.mark.parametrize("fast", [False, True])
def test_where_nothing_is_named_the_loss_is_trls_to_the_bit(folder, fast):
    """As with a weight of 1; so are all gradients."""
    trainer = trainer_of(folder)
    plain_batch = batch_of(trainer)
    assert STRESSED not in plain_batch, "a weight of 1 leaves the trainer as it is"
    collate, forward = trainer.data_collator, trainer.model.get_base_model().forward
    training.weigh_names(trainer, 1.0)
    assert trainer.data_collator is collate
    assert trainer.model.get_base_model().forward == forward
    if fast:
        training.speed_up(trainer.model)
    plain = loss_of(trainer, plain_batch)
    plain.backward()
    before = gradients_of(trainer)

    weighed = trainer_of(folder, name_weight=3.0)
    if fast:
        training.speed_up(weighed.model)
    batch = batch_of(weighed)
    assert batch[STRESSED].any()
    batch[STRESSED] = torch.zeros_like(batch[STRESSED])
    loss = loss_of(weighed, batch)
    loss.backward()
    assert torch.equal(loss, plain)
    after = gradients_of(weighed)
    assert before.keys() == after.keys() and before
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_however_a_step_is_cut_it_is_the_same_step(folder):
    """Weights have a mean of 1 in each answer, so the count of tokens is theirs, too."""
    trainer = trainer_of(folder, name_weight=3.0)
    rows = rows_of(trainer)
    training.check_accumulation(trainer, rows[:4])
    halves = []
    for half in (rows[:2], rows[2:]):
        batch = trainer.data_collator([dict(row) for row in half])
        items = (batch_of(trainer)["labels"][:, 1:] != -100).sum()
        trainer.model.train()
        halves.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).item())
    whole = loss_of(trainer, batch_of(trainer)).item()
    assert sum(halves) == pytest.approx(whole, rel=1e-5)


def test_preflight_passes(folder):
    """The checks of notebook 03, before and after a training."""
    trainer = trainer_of(folder, name_weight=3.0)
    batch = batch_of(trainer)
    answers = [answer for answer, _, _ in ANSWERS]
    training.check_labels(batch, trainer.processing_class, answers)
    training.check_image_tokens(batch, trainer.processing_class)
    assert training.check_gradients(trainer.model, batch)
    trainer.save_model(str(folder / "adapter"))
    training.check_reload(TINY, folder / "adapter", trainer.model, batch)


@pytest.mark.slow
def test_a_training_weighs_names_however_fast_it_is(folder):
    """Marks come through TRL's choice of columns, and through all that makes a training fast."""
    losses = {}
    for name, changes in {
        "plain": {},
        "named": {"name_weight": 3.0},
        "fast": {"name_weight": 3.0, "fast": True},
        "cached": {"name_weight": 3.0, "fast": True, "cache_features": True},
    }.items():
        choices = {
            "data": folder,
            "model_name_or_path": TINY,
            "output_dir": folder / name,
            "max_steps": 3,
            "per_device_train_batch_size": 5,
            "learning_rate": 2e-3,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "eval_on_start": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        training.main(words_of(choices | changes))
        log = json.loads((folder / name / "log.json").read_text())
        losses[name] = [entry["loss"] for entry in log if "loss" in entry]
        judged = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        # the same model, judged plainly, before any of them trained
        losses[name].append(judged[0])
    assert losses["plain"][-1] == pytest.approx(losses["named"][-1], rel=1e-5)
    assert losses["plain"][0] != pytest.approx(losses["named"][0], rel=1e-3)
    assert losses["named"][2] < losses["named"][0]
    assert losses["fast"] == pytest.approx(losses["named"], rel=1e-3)
    assert losses["cached"] == pytest.approx(losses["named"], rel=1e-3)


def test_marks_travel_with_padded_lengths_and_bytes(folder):
    trainer = trainer_of(folder, name_weight=3.0)
    plain = loss_of(trainer, batch_of(trainer)).item()
    # named records have wrapped the collator: unwrap to where `build_trainer` makes it fast
    trainer.data_collator = trainer.data_collator.collate
    assert training.send_bytes(trainer)
    rows = rows_of(trainer)
    width = trainer.data_collator([dict(row) for row in rows])["input_ids"].shape[1]
    batch = training.pad_lengths(trainer.data_collator, rows, step=width + 3)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch[STRESSED].shape == batch["labels"].shape == (5, width + 3)
    assert not batch[STRESSED][:, width:].any()
    assert loss_of(trainer, batch).item() == pytest.approx(plain, rel=1e-4)


def loss_of_marked(trainer, batch: dict) -> float:
    """As `loss_by_hand`, where the tokens of a name are those that the batch marks."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", STRESSED)}
    with torch.no_grad():
        logits = trainer.model(**inputs).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses = losses.view(labels.shape)
    learned = labels != -100
    weights = torch.where(batch[STRESSED][:, 1:], 3.0, 1.0).double() * learned
    weights = weights * (learned.sum(1) / weights.sum(1))[:, None]
    return ((losses * weights).sum() / learned.sum()).item()


def test_another_family(folder, tmp_path_factory):
    """A Gemma, whose tokens and template are others."""
    place = tmp_path_factory.mktemp("gemma")
    twin = plan.make_twin(GEMMA, place / "twin", scale="tiny", dtype="float32")
    trainer = trainer_of(folder, model_name_or_path=twin, name_weight=3.0)
    batch = batch_of(trainer)
    assert batch[STRESSED].any(1).tolist() == [True, True, True, True, False]
    assert loss_of(trainer, batch).item() == pytest.approx(loss_of_marked(trainer, batch), rel=1e-4)
    assert training.check_gradients(trainer.model, batch)


# ---- what is refused


def plain_trainer(folder, **changes):
    """TRL's trainer as notebook 03 makes it."""
    args = SFTConfig(
        str(folder / "out"),
        max_length=None,
        report_to="none",
        use_cpu=True,
        bf16=False,
        **changes,
    )
    return SFTTrainer(
        models.load_base(TINY),
        args,
        train_dataset=records.read_records(folder),
        processing_class=models.load_processor(TINY),
    )


@pytest.mark.parametrize(
    "changes, name_weight, words",
    [
        ({}, 0, "name_weight=0: must be above 0"),
        ({}, float("nan"), "name_weight=nan: must be above 0"),
        ({"loss_type": "dft"}, 3, "loss_type=dft"),
        ({"label_smoothing_factor": 0.1}, 3, "label_smoothing_factor"),
    ],
)
def test_what_would_not_be_heeded_is_refused(folder, changes, name_weight, words):
    trainer = plain_trainer(folder, **changes)
    with pytest.raises(ValueError, match=words) as raised:
        training.weigh_names(trainer, name_weight)
    assert "\n" not in str(raised.value)


def test_labels_of_more_than_the_answer_are_refused(folder):
    trainer = plain_trainer(folder, completion_only_loss=False)
    training.weigh_names(trainer, 3)
    with pytest.raises(ValueError, match="completion_only_loss=true, or name_weight=1"):
        batch_of(trainer)


def test_an_answer_that_is_cut_is_marked_as_far_as_it_goes(folder):
    trainer = plain_trainer(folder)
    training.weigh_names(trainer, 3)
    batch = batch_of(trainer)
    trainer.data_collator.collate.max_length = batch["input_ids"].shape[1] - 6
    shorter = batch_of(trainer)
    width = shorter["input_ids"].shape[1]
    assert width == batch["input_ids"].shape[1] - 6
    assert torch.equal(shorter[STRESSED], batch[STRESSED][:, :width])


def test_a_second_start_of_the_cell_changes_nothing(folder):
    trainer = plain_trainer(folder)
    training.weigh_names(trainer, 3)
    batch = batch_of(trainer)
    first = loss_of(trainer, batch)
    training.weigh_names(trainer, 3)
    again = batch_of(trainer)
    assert torch.equal(again[STRESSED], batch[STRESSED])
    assert torch.equal(loss_of(trainer, again), first)


def test_a_yaml_says_it_in_one_line(folder, capsys):
    choices = {"data": folder, "model_name_or_path": TINY, "output_dir": folder / "out"}
    with pytest.raises(SystemExit) as end:
        training.main(words_of(choices | {"name_weight": -1}))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 1 and "name_weight=-1.0: must be above 0" in last
    arguments = training.parse_arguments(words_of(choices | {"name_weight": 2}))
    with pytest.raises(ValueError, match="leave it at 1"):
        training.build_trainer(*arguments, trainer_class=SFTTrainer)
    assert training.parse_arguments(words_of(choices))[0].name_weight == 1
