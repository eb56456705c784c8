"""medtune.multitask.records: what a batch is made of, and that wrong pictures are wrong."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from multitask_twins import (
    FAMILIES,
    ORGANS,
    answer_of,
    decode,
    make_records,
    record,
    tuned,
    twins_below,
)

from medtune import models, multitask, training
from medtune.multitask import (
    IMAGE,
    PROMPT,
    STATEMENT,
    MultiTaskCollator,
    Sample,
    check_box,
    diagnosis_spans,
    encode,
    finding_of,
)


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    return twins_below(tmp_path_factory)


@pytest.fixture
def records():
    return make_records()


# ---- what the model receives


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_answer_is_learned_and_only_the_statement_is_judged(twin, records, family):
    """Of the published recipe's faults: prompt and image tokens were labels, so was the padding."""
    processor = models.load_processor(twin(family))
    question = "Where is it, and what is it?"
    first = Sample(records[0]["images"][0], question)
    second = Sample(records[1]["images"][0], question)
    answers = ["The spleen is large.", "One cyst in the liver, of about 4 mm, and nothing else."]
    batch = encode(
        processor, [replace(first, answer=answers[0]), replace(second, answer=answers[1])]
    )
    training.check_labels(batch, processor, answers)

    statement = "a cyst of the liver"
    batch = encode(
        processor, [replace(first, statement=statement), replace(second, answer=answers[1])]
    )
    assert decode(processor, batch, 0, STATEMENT).strip() == statement
    assert (batch["labels"][0] == -100).all()
    assert decode(processor, batch, 1, STATEMENT) == ""
    assert "Where is it" in decode(processor, batch, 0, PROMPT)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all() and (batch["token_kinds"][padding] == 0).all()

    seen = batch["token_kinds"] == IMAGE
    assert (batch["labels"][seen] == -100).all()
    if "image_grid_thw" in batch:
        merge = processor.image_processor.merge_size**2
        assert seen.sum(1).tolist() == (batch["image_grid_thw"].prod(1) // merge).tolist()
    else:
        assert seen.sum(1).tolist() == [processor.image_seq_length] * 2

    both = encode(processor, [replace(first, statement="a cyst", answer=answers[0])])
    assert (both["labels"] == -100).all(), "an answer behind its own statement would be copied"


def test_training_and_generation_ask_alike(twin, records):
    """The prompt of a diagnosis is, token by token, what `generate_answers` asks."""
    processor = models.load_processor(twin("qwen3-vl"))
    row = records[1]
    question = row["prompt"][0]["content"][1]["text"]
    batch = encode(processor, [Sample(row["images"][0], question, answer="Yes.")])
    text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    asked = processor(text=[text], images=[row["images"]], return_tensors="pt")["input_ids"][0]
    prompt = batch["input_ids"][0][batch["labels"][0] == -100]
    assert prompt.tolist() == asked.tolist()


def test_a_wrong_picture_comes_with_its_own_grid_and_image_tokens(twin, records):
    """Of the published recipe's faults: a negative kept the grid of the right picture."""
    processor = models.load_processor(twin("qwen3-vl"))
    wrong_ones = MultiTaskCollator(
        processor, negative_ratio=1.0, verify_ratio=0.0, predicted_ratio=0.0
    )
    batch = wrong_ones(records[:4])
    training.check_image_tokens(batch, processor)
    rights = MultiTaskCollator(processor, negative_ratio=0.0)(records[:4])
    grids = batch["image_grid_thw"].tolist()
    own = rights["image_grid_thw"].tolist()
    assert all(grid != right for grid, right in zip(grids, own, strict=True))
    assert all(grid in own for grid in grids)
    for row, grid in enumerate(grids):
        donor = records[own.index(grid)]
        region = batch["regions"][row].tolist()
        assert region == pytest.approx(donor["roi"]), "the box of the picture that is shown"
        statement = multitask.statement_of(answer_of(records[row]))
        assert decode(processor, batch, row, STATEMENT).strip() == statement
    assert (batch["labels"] == -100).all() and batch["boxes"].isnan().all()
    assert batch["matches"].tolist() == [0] * 4


def test_a_question_may_name_the_structure(twin, records):
    processor = models.load_processor(twin("qwen3-vl"))
    batch = MultiTaskCollator(processor, question="Find the {structure}!")(records[:2])
    assert "Find the liver!" in decode(processor, batch, 0, PROMPT)
    assert "Find the spleen!" in decode(processor, batch, 1, PROMPT)


def test_without_a_name_the_region_of_interest_is_asked_for(twin):
    """The published prompt, with its line break; the answer never gets into the question."""
    processor = models.load_processor(twin("qwen3-vl"))
    rows = [record(0), record(1)]
    for row in rows:
        row["structure"] = None
        row["completion"][0]["content"][0]["text"] = "Something is bright in the ultrasound image."
    rows[1]["completion"][0]["content"][0]["text"] = "Something is bright."
    batch = MultiTaskCollator(processor, question="Find the {structure}!")(rows)
    asked = [decode(processor, batch, number, PROMPT) for number in range(2)]
    published = (
        "Describe the abnormality in the ultrasound image.\nFocus on the region of interest."
    )
    assert published in asked[0]
    assert "in the medical image.\nFocus on" in asked[1]
    assert "bright" not in asked[0] + asked[1]
    own = "Where is it?"
    for question in ("", own):
        collator = MultiTaskCollator(processor, question=question, region_question="What?")
        text = decode(processor, collator(rows), 0, PROMPT)
        assert (own if question else "Where is the liver?") in text


def test_the_words_of_a_diagnosis_are_found_in_the_answer():
    answer = "A CT scan.\nA cyst is seen. It is axial. A mass of 3.2 cm is near."
    spans = diagnosis_spans(answer)
    assert [answer[first:behind] for first, behind in spans] == [
        "A cyst is seen.",
        "A mass of 3.2 cm is near.",
    ]
    (span,) = diagnosis_spans(answer, "It is axial.")
    assert answer[slice(*span)] == "It is axial."
    assert diagnosis_spans(answer, "words of another text") == spans, "then rules read them"
    assert diagnosis_spans("A CT scan.") == []
    zh = "图像为CT。其内见一囊肿。"
    assert [zh[first:behind] for first, behind in diagnosis_spans(zh)] == ["其内见一囊肿。"]


# ---- what becomes of a record


@pytest.fixture
def matches_alone(monkeypatch):
    """Let the collator return the matches, and need no processor."""

    def encode_matches(processor, samples):
        return [sample.target.match for sample in samples]

    monkeypatch.setattr("medtune.multitask.records.encode", encode_matches)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_ratio_is_exact_in_expectation_for_any_batch(matches_alone, size):
    """Of the published recipe's faults: int(2 x 0.3) made no negative at batch 2."""
    rows = [record(number, size=(8, 8)) for number in range(20)]
    collator = MultiTaskCollator(None, negative_ratio=0.3, verify_ratio=0.2, pool=rows)
    found = Counter()
    for epoch in range(100):
        collator.epoch = epoch
        for start in range(0, 20, size):
            found.update(collator(rows[start : start + size]))
    # three standard deviations
    assert abs(found[0] / 2000 - 0.3) < 0.035
    assert abs(found[1] / 2000 - 0.2) < 0.03


def test_every_record_becomes_each_in_time_and_the_same_seed_gives_the_same(matches_alone):
    rows = [record(number, size=(8, 8)) for number in range(8)]

    def fates(seed, rows_in_order):
        collator = MultiTaskCollator(None, pool=rows, seed=seed)
        found = []
        for epoch in range(30):
            collator.epoch = epoch
            found.append(collator(rows_in_order))
        return found

    first = fates(0, rows)
    assert first == fates(0, rows) != fates(1, rows)
    backwards = [epoch[::-1] for epoch in first]
    assert backwards == fates(0, rows[::-1]), "the batch does not matter"
    assert all(set(fate) == {-1, 0, 1} for fate in zip(*first, strict=True))


def test_the_number_of_workers_does_not_matter(twin, records):
    processor = models.load_processor(twin("qwen3-vl"))
    collator = MultiTaskCollator(processor, pool=records, seed=3)
    batches = []
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(
            records, batch_size=3, collate_fn=collator, num_workers=workers
        )
        batches.append(list(loader))
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name].nan_to_num(), other[name].nan_to_num()), name


@pytest.mark.parametrize("hard", [False, True])
def test_a_wrong_picture_never_shows_the_same(monkeypatch, hard):
    monkeypatch.setattr("medtune.multitask.records.encode", lambda processor, samples: samples)
    findings = ["a cyst", None, None] * 4
    rows = []
    for number in range(12):
        organ = ORGANS[number % 2]
        finding = findings[number]
        rows.append(record(number, organ=organ, finding=finding, size=(8 + number, 8)))
    rows.append(record(12, organ="heart", size=(40, 8), shows=["heart", "liver"]))
    of_width = {row["images"][0].width: row for row in rows}

    collator = MultiTaskCollator(None, negative_ratio=1.0, verify_ratio=0, hard_negatives=hard)
    for epoch in range(20):
        collator.epoch = epoch
        for row, sample in zip(rows, collator(rows), strict=True):
            donor = of_width[sample.image.width]
            assert finding_of(donor) != finding_of(row)
            assert row["structure"] not in donor.get("shows", ())
            if hard and row["structure"] != "heart":
                same_organ = donor["structure"] == row["structure"]
                assert same_organ, "the same organ with another finding"


def test_a_batch_of_one_without_a_pool_stays_right(twin, records):
    options = {"negative_ratio": 1.0, "verify_ratio": 0, "predicted_ratio": 0}
    processor = models.load_processor(twin("qwen3-vl"))
    batch = MultiTaskCollator(processor, **options)(records[:1])
    assert batch["matches"].tolist() == [1] and batch["boxes"].isfinite().all()
    assert torch.equal(batch["boxes"], batch["regions"])


def test_statements_fall_back_on_the_whole_text():
    assert multitask.statement_of("Something is bright.") == "Something is bright."
    assert finding_of(record(0, finding="a cyst")) == ("liver", ("cyst",))
    row = record(0) | {"structure": None}
    row["completion"][0]["content"][0]["text"] = "Something is bright."
    assert finding_of(row) == ("Something is bright.", ())


# ---- bad input


@pytest.mark.parametrize(
    "box",
    [
        (0.5, 0, 0.2, 1),
        (0, 0.4, 1, 0.4),
        (-0.1, 0, 1, 1),
        (0, 0, 1, 1.2),
        (0, 0, float("nan"), 1),
        (0, 1, 1),
    ],
)
def test_an_impossible_box_is_named(twin, records, box):
    records[1]["roi"] = list(box)
    collator = MultiTaskCollator(models.load_processor(twin("qwen3-vl")), negative_ratio=0)
    with pytest.raises(ValueError, match="row r1 has the box"):
        collator(records[:2])


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
    with pytest.raises(ValueError, match="diagnosis_weight=0: must be above 0"):
        MultiTaskCollator(None, diagnosis_weight=0)
    with pytest.raises(ValueError, match="weighting is uncertainty or fixed"):
        tuned(twin("qwen3-vl"), weighting="gradnorm")
    with pytest.raises(ValueError, match="there are weighting, weights, miss_weight, width"):
        tuned(twin("qwen3-vl"), depth=2)
