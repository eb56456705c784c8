"""medtune.multitask.model: what the heads see, and what the losses count."""

import pytest
import torch
from multitask_twins import FAMILIES, answer_of, make_records, record, tuned, twins_below
from PIL import Image
from safetensors.torch import load_file, save_file

from medtune import models
from medtune.multitask import IMAGE, MultiTaskCollator, MultiTaskModel, Sample, encode


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    return twins_below(tmp_path_factory)


@pytest.fixture
def records():
    return make_records()


# ---- batches in which something is missing


@pytest.mark.parametrize("family", FAMILIES)
def test_no_box_and_a_picture_smaller_than_a_patch(twin, family):
    processor, model = tuned(twin(family))
    rows = [record(0, roi=None, size=(3, 2)), record(1, roi=None)]
    out = model(**MultiTaskCollator(processor, negative_ratio=0.0)(rows))
    assert out.loss.isfinite()
    assert out.tally[0, 1] == 0 == out.tally[1, 1], "no box, no box loss"
    assert ((out.boxes >= 0) & (out.boxes <= 1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_only_negatives_trains_the_match_alone(twin, records, family):
    processor, model = tuned(twin(family))
    collator = MultiTaskCollator(processor, negative_ratio=1.0, verify_ratio=0)
    out = model(**collator(records[:4]))
    out.loss.backward()
    assert out.tally[1].tolist() == [0, 0, 4] and out.tally[0, :2].tolist() == [0, 0]
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, "or ranks would wait"
            assert parameter.grad.isfinite().all()
    match = model.heads["match"][0].weight.grad.norm()
    vote = model.heads["vote"][0].weight.grad.norm()
    assert match > 0 == vote


# ---- the heads


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(twin, records, family):
    """Of the published recipe's faults: pooling had no mask."""
    processor, model = tuned(twin(family))
    model.eval()
    long = "one cyst in the left lobe of the liver, and a second one of 4 mm below it"
    short_sample = Sample(records[0]["images"][0], "Where?", statement="a cyst")
    long_sample = Sample(records[1]["images"][0], "Where?", statement=long)
    with torch.no_grad():
        alone = model(**encode(processor, [short_sample]))
        beside = model(**encode(processor, [short_sample, long_sample]))
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(alone.boxes[0], beside.boxes[0], **close)
    torch.testing.assert_close(alone.match_logits[0], beside.match_logits[0], **close)


def test_the_box_does_not_depend_on_the_statement_but_the_match_does(twin, records):
    """So the draft cannot move the box, and training and inference see the same kinds of tokens."""
    processor, model = tuned(twin("qwen3-vl"))
    images = [records[0]["images"][0]] * 2
    questions = ["Where is the liver?"] * 2
    statements = ["a cyst", "no cyst, but a mass of 3 cm"]
    boxes, scores = model.judge(processor, images, questions, statements)
    assert boxes[0] == pytest.approx(boxes[1], abs=1e-5)
    assert scores[0] != pytest.approx(scores[1], abs=1e-5)
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1


def test_the_match_looks_into_the_region_only(twin):
    processor, model = tuned(twin("qwen3-vl"))
    seen = []

    def verify(hidden, kinds, covered):
        seen.append(covered)
        return hidden[:, 0, 0]

    model.verify = verify
    sample = Sample(Image.new("RGB", (128, 64)), "Where?", statement="a cyst")
    batch = encode(processor, [sample])
    patches = batch["image_grid_thw"][0, 1:]
    high, wide = (patches // processor.image_processor.merge_size).tolist()
    model(**batch, regions=torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
    grid = seen[0][0][batch["token_kinds"][0] == IMAGE].reshape(high, wide)
    # the left half: 1 for columns inside, 0 outside, a share for a column that is cut
    right_edges = (torch.arange(wide) + 1).clamp(max=wide / 2)
    left_edges = torch.arange(wide).clamp(max=wide / 2)
    columns = right_edges - left_edges
    torch.testing.assert_close(grid, columns.expand(high, wide).float())


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_stand_where_they_are_in_the_picture(twin, family):
    """Row by row from the upper left, as the processors cut the picture."""
    processor, model = tuned(twin(family))
    kept = []
    own = model.locate

    def locate(hidden, kinds, centres):
        kept.append(centres)
        return own(hidden, kinds, centres)

    model.locate = locate
    batch = encode(processor, [Sample(Image.new("RGB", (128, 64)), "?")])
    image = batch["token_kinds"][0] == IMAGE
    tokens = int(image.sum())
    if "image_grid_thw" in batch:
        _, high, wide = batch["image_grid_thw"][0].tolist()
    else:
        high = wide = int(tokens**0.5)
    merge = (high * wide / tokens) ** 0.5
    high = int(high / merge)
    wide = int(wide / merge)
    model(**batch)
    rows = (torch.arange(high) + 0.5) / high
    columns = (torch.arange(wide) + 0.5) / wide
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    torch.testing.assert_close(kept[0][0][image], torch.stack([x, y], -1).reshape(-1, 2))


# ---- the losses


def output_with_match_logit(twin, logit, *, negative, **settings):
    """Let the match head always say the same, about wrong or about right pictures."""
    processor, model = tuned(twin("qwen3-vl"), **settings)

    def verify(hidden, kinds, covered):
        return torch.full((len(hidden),), logit) + 0 * hidden[:, 0, 0]

    model.verify = verify
    ratios = {"negative_ratio": float(negative), "verify_ratio": float(not negative)}
    collator = MultiTaskCollator(processor, **ratios)
    return model(**collator([record(0), record(1)]))


@pytest.mark.parametrize("weight", [1.0, 10.0])
@pytest.mark.parametrize("logit", [-2.0, 0.5, 3.0])
def test_the_miss_weight_multiplies_the_true_pairs(twin, logit, weight):
    """Of the published recipe's faults: the x10 fell on false alarms, not on misses."""
    score = torch.tensor(logit).sigmoid()
    for negative, chance in ((False, score), (True, 1 - score)):
        focal = -((1 - chance) ** 2) * chance.log()
        expected = focal.item() * (1 if negative else weight)
        out = output_with_match_logit(twin, logit, negative=negative, miss_weight=weight)
        losses, counts, _ = out.tally
        assert losses[2] / counts[2] == pytest.approx(expected, rel=1e-4)


def test_the_log_variances_weigh_as_kendall_says(twin, records):
    processor, model = tuned(twin("qwen3-vl"))
    with torch.no_grad():
        model.heads.log_variances.copy_(torch.tensor([0.3, -0.2, 0.1]))
    batch = MultiTaskCollator(processor, seed=1)(records)
    out = model(**batch)
    s = model.heads.log_variances
    means = out.tally[0] / out.tally[1]
    expected = (0.5 * torch.exp(-s) * means + 0.5 * s).sum()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    out.loss.backward()
    gradient = 0.5 - 0.5 * torch.exp(-s.detach()) * means
    torch.testing.assert_close(s.grad, gradient, rtol=1e-4, atol=1e-5)

    model.settings.weighting = "fixed"
    model.settings.weights = [0.0, 2.0, 0.0]
    assert model(**batch).loss.item() == pytest.approx(2 * means[1].item(), rel=1e-5)


def text_loss_by_hand(model, batch, weights):
    """The mean cross-entropy of each answer token, weighed, token by token."""
    names = ("regions", "boxes", "matches", "token_kinds", "labels", "token_weights")
    inputs = {name: tensor for name, tensor in batch.items() if name not in names}
    with torch.no_grad():
        chances = model.base(**inputs, use_cache=False).logits.float().log_softmax(-1)
    total = 0
    for row, labels in enumerate(batch["labels"]):
        for place in range(1, len(labels)):
            if labels[place] != -100:
                surprise = -chances[row, place - 1, labels[place]].item()
                total += weights[row][place].item() * surprise
    return total


def test_the_words_that_name_the_disease_get_a_larger_share(twin):
    """Against the sum over tokens, written out; the words are the sentence of the finding."""
    processor, model = tuned(twin("qwen3-vl"))
    model.eval()
    rows = [record(0, finding="a mass of 12 mm"), record(1)]
    place = "The region lies in the upper left of the image. "
    for row in rows:
        answer = row["completion"][0]["content"][0]
        answer["text"] = place + answer["text"]
    settings = {"negative_ratio": 0.0, "verify_ratio": 0.0}
    plain = MultiTaskCollator(processor, **settings)(rows)
    batch = MultiTaskCollator(processor, diagnosis_weight=3.0, **settings)(rows)

    weights = batch["token_weights"]
    learned = batch["labels"] != -100
    for row in range(2):
        of_row = weights[row][learned[row]]
        assert of_row.mean().item() == pytest.approx(1, rel=1e-5), "an answer weighs as before"
        low, high = sorted(set(of_row.tolist()))[0], of_row.max().item()
        assert high / low == pytest.approx(3, rel=1e-5)
        heavy = batch["input_ids"][row][learned[row] & (weights[row] > 1)]
        said = processor.tokenizer.decode(heavy)
        assert "upper left" not in said
        # a token may begin with the blank in front of the sentence
        assert said.strip() == answer_of(rows[row]).removeprefix(place).split(". ")[-1].strip()

    losses, counts, metrics = model(**batch).tally
    assert losses[0].item() == pytest.approx(text_loss_by_hand(model, batch, weights), rel=1e-4)
    of_plain = model(**plain).tally
    assert counts[0] == of_plain[1, 0] == learned.sum(), "tokens are counted as before"
    assert metrics[0] == of_plain[2, 0]
    assert losses[0] != of_plain[0, 0]


def test_a_weight_of_one_is_the_loss_of_before(twin, records):
    processor, model = tuned(twin("qwen3-vl"))
    model.eval()
    before = MultiTaskCollator(processor, seed=1)(records)
    after = MultiTaskCollator(processor, seed=1, diagnosis_weight=1.0)(records)
    assert before.keys() == after.keys()
    assert "token_weights" not in after
    loss = model(**before).loss
    assert torch.equal(loss, model(**after).loss)
    ones = torch.ones(before["labels"].shape)
    assert model(**before, token_weights=ones).loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_the_box_loss_is_smooth_l1_plus_giou(twin):
    """Against the formulas, written out for one pair of boxes that do not touch."""
    processor, model = tuned(twin("qwen3-vl"))
    found = torch.tensor([[0.0, 0.0, 0.25, 0.5]])
    true = (0.5, 0.5, 1.0, 1.0)
    model.locate = lambda hidden, kinds, centres: found + 0 * hidden[:, 0, :1]
    collator = MultiTaskCollator(processor, negative_ratio=0)
    losses, _, metrics = model(**collator([record(0, roi=true)])).tally
    smooth = 0
    for edge, right in zip(found[0].tolist(), true, strict=True):
        smooth += abs(edge - right) - 0.05  # beta is 0.1, and every edge is farther away
    union = 0.125 + 0.25
    hull = 1
    giou = 0 - (hull - union) / hull
    assert losses[1].item() == pytest.approx(smooth + 1 - giou, rel=1e-5)
    assert metrics[1] == 0


# ---- saving


def test_saved_and_loaded_it_says_the_same(twin, records, tmp_path):
    processor, model = tuned(twin("qwen3-vl"))
    model.eval()
    batch = MultiTaskCollator(processor)(records)
    folder = tmp_path / "model"
    models.save_model(model, processor, folder, card="a test")
    base = models.load_base(twin("qwen3-vl"))
    fresh = MultiTaskModel.from_pretrained(base, folder)
    with torch.no_grad():
        one = model(**batch)
        other = fresh(**batch)
    assert torch.equal(one.match_logits, other.match_logits)
    assert torch.equal(one.boxes, other.boxes)
    assert one.loss == other.loss

    file = folder / "multitask.safetensors"
    weights = load_file(file)
    del weights["vote.0.weight"]
    save_file(weights, file)
    base = models.load_base(twin("qwen3-vl"))
    with pytest.raises(ValueError, match=r"the heads in .* do not fit: .*vote\.0\.weight"):
        MultiTaskModel.from_pretrained(base, folder)


def test_the_settings_file_keeps_its_form(twin, tmp_path):
    """Heads that were saved before must go on to load."""
    _, model = tuned(twin("qwen3-vl"), weighting="fixed", weights=[1.0, 0.5, 0.0])
    model.save_pretrained(tmp_path)
    expected = '{\n "weighting": "fixed",\n "weights": [\n  1.0,\n  0.5,\n  0.0\n ],\n'
    expected += ' "miss_weight": 10.0,\n "width": 256\n}'
    assert (tmp_path / "multitask.json").read_text("utf-8") == expected
