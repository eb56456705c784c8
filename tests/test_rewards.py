"""Rewards that can be checked, pairs made from the truth, and questions worth asking."""

import ast
import inspect
import math
import random
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtune import boxes, captions, rewards
from medtune.rewards import checkable

FINDINGS = ["solid nodule", "cyst", "hypodense lesion", "sclerotic lesion", "lytic lesion"]
ORGANS = ["liver", "spleen", "left kidney", "right kidney", "left upper lobe of the lung"]
NONE = "No focal lesion is seen within it."
FUNCTIONS = [
    rewards.finding_reward,
    rewards.name_reward,
    rewards.box_reward,
    rewards.format_reward,
    rewards.length_reward,
]


def caption(organ: str, finding: str | None) -> str:
    """A caption in the sample's words; an empty finding is silence."""
    text = (
        "The region of interest, located in the middle left of the image, covers about 5% of its "
        f"area and shows the {organ}. It has high density."
    )
    if finding is None:
        return f"{text} {NONE}"
    if finding == "":
        return text
    return f"{text} Within it lies a {finding}, about a tenth as wide as the region."


organs = st.sampled_from(ORGANS)
said = st.sampled_from([*FINDINGS, None, ""])


@settings(deadline=None)
@given(organs, said, said)
def test_the_truth_earns_most(organ, truth, answer):
    reference = caption(organ, truth)
    [best] = rewards.finding_reward([reference], [reference])
    [earned] = rewards.finding_reward([caption(organ, answer)], [reference])
    assert best == 1 and earned <= best
    if answer != truth and truth:
        assert earned < best


@settings(deadline=None)
@given(organs, st.sampled_from(FINDINGS), st.floats(-5, 0.5), st.floats(-5, 0.5))
def test_a_miss_and_an_invention_cost_what_they_are_set_to(organ, finding, missed, invented):
    reward = partial(rewards.finding_reward, missed=missed, invented=invented)
    report = caption(organ, finding)
    denial = caption(organ, None)
    silence = caption(organ, "")
    assert reward([denial, silence, report], [report, report, denial]) == [
        missed,
        missed,
        invented,
    ]
    # what a reference does not speak of was not there
    assert reward([report, silence, denial], [silence] * 3) == [invented, 1.0, 1.0]


def test_another_kind_is_less_than_right_and_more_than_missed():
    reference = caption("liver", "cyst")
    right, other, none = rewards.finding_reward(
        [caption("liver", "cyst"), caption("liver", "lytic lesion"), NONE], [reference] * 3
    )
    assert right > other > none


def test_a_list_of_all_kinds_does_not_earn_what_the_right_one_does():
    everything = "Within it lies a " + ", a ".join(FINDINGS) + "."
    [earned] = rewards.finding_reward([everything], [caption("liver", "cyst")])
    assert 0 < earned < 0.5


def test_silence_where_none_is_denied_is_between():
    rewarded = rewards.finding_reward([caption("liver", "")], [caption("liver", None)], silent=0.25)
    assert rewarded == [0.25]


@settings(deadline=None)
@given(organs, organs, st.floats(0, 1))
def test_the_mirror_image_of_a_name_has_part_of_the_credit(truth, answer, wrong_side):
    [earned] = rewards.name_reward(
        [caption(answer, None)], [caption(truth, None)], wrong_side=wrong_side
    )
    if answer == truth:
        assert earned == 1
    elif {answer, truth} == {"left kidney", "right kidney"}:
        assert earned == wrong_side
    else:
        assert earned == 0


def test_a_reference_without_a_name_cannot_judge_one():
    assert rewards.name_reward(["The liver."], ["A picture."]) == [None]


def corners(values):
    first, second = sorted(values)
    return first, max(second, first + 1)


sides = st.tuples(st.integers(0, 998), st.integers(0, 998)).map(corners)


@settings(deadline=None)
@given(sides, sides, sides, sides, st.sampled_from(["[{}, {}, {}, {}]", "({},{},{},{})"]))
def test_a_box_in_a_text_earns_its_overlap(across, down, true_across, true_down, form):
    box = [across[0], down[0], across[1], down[1]]
    truth = [true_across[0], true_down[0], true_across[1], true_down[1]]
    roi = [value / 1000 for value in truth]
    [earned] = rewards.box_reward(["The liver: " + form.format(*box)], [roi])
    assert earned == pytest.approx(boxes.iou([value / 1000 for value in box], roi), abs=1e-6)


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text_is_answered_with_numbers(answer, reference):
    told = {"reference": [reference], "roi": [(0.1, 0.1, 0.5, 0.5)], "fields": [{}]}
    for function in FUNCTIONS:
        [earned] = function([answer], **told)
        assert earned is None or (math.isfinite(earned) and -1 <= earned <= 1)


@pytest.mark.parametrize(
    "written", ["[" + "9" * 400 + ", 0, 1, 2]", "[5, 5, 5, 5]", "[9, 9, 1, 1]"]
)
def test_a_box_that_is_none_earns_nothing(written):
    assert rewards.box_reward([written], [(0.1, 0.1, 0.5, 0.5)]) == [0.0]
    assert rewards.box_reward([written], [None]) == [None]


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 60), st.integers(0, 60))
def test_length_is_rewarded_between_two_ends_only(words, shortest, more):
    longest = shortest + more
    measure = partial(rewards.length_reward, shortest=shortest, longest=longest)
    [earned] = measure([" ".join(["word"] * words)])
    assert (earned == 1) == (shortest <= words <= longest)
    if words >= longest:
        assert measure([" ".join(["word"] * (words + 1))]) <= [earned]
    # a Chinese character is a word
    assert measure(["肝" * words]) == [earned]


def test_an_answer_that_was_cut_has_not_the_form():
    whole = caption("liver", None)
    assert rewards.format_reward([whole, whole[:-1], whole + "\n\n" + whole]) == [1, 0, 0]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_conversation_earns_what_its_text_does(function):
    told = {"reference": [caption("liver", "cyst")], "roi": [(0.0, 0.0, 1.0, 0.5)]}
    text = caption("liver", "lytic lesion") + " [0, 0, 1000, 1000]"
    assert function([[{"role": "assistant", "content": text}]], **told) == function([text], **told)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_each_reward_can_be_copied_alone(function):
    """With the imports of its file, and nothing else of it."""
    tree = ast.parse(inspect.getsource(checkable))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    alone: dict = {}
    exec(compile(ast.Module(imports, []), "imports", "exec"), alone)
    annotated = "from __future__ import annotations\n" + inspect.getsource(function)
    exec(annotated, alone)
    told = {"reference": [caption("liver", "cyst")], "roi": [(0.0, 0.0, 1.0, 0.5)]}
    answer = [caption("liver", "cyst") + " [0, 0, 1000, 1000]"]
    assert alone[function.__name__](answer, **told) == function(answer, **told)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError):
        rewards.finding_reward(["a"], [])
    with pytest.raises(ValueError, match="shortest=5"):
        rewards.length_reward(["a"], shortest=5, longest=4)
    with pytest.raises(ValueError, match="pattern="):
        rewards.format_reward(["a"], pattern="(")
    with pytest.raises(ValueError, match="1 answers, 0 references"):
        rewards.preference_pairs(["a"], [])
    with pytest.raises(ValueError, match="kinds='all'"):
        rewards.preference_pairs([], [], kinds=["all"])


# ------------------------------------------------------------ preference pairs


cases = st.lists(st.tuples(organs, organs, said, said), min_size=1, max_size=8)


@settings(deadline=None)
@given(cases, st.integers(0, 3))
def test_the_chosen_answer_is_true_where_the_rejected_is_not(drawn, seed):
    answers = [caption(organ, finding) for organ, _, finding, _ in drawn]
    references = [caption(organ, finding) for _, organ, _, finding in drawn]
    pairs = rewards.preference_pairs(answers, references, seed=seed)
    assert pairs == rewards.preference_pairs(answers, references, seed=seed)
    for pair in pairs:
        reference = references[pair.row]
        chosen = captions.parse_caption(pair.chosen)
        rejected = captions.parse_caption(pair.rejected)
        truth = captions.parse_caption(reference)
        if pair.kind == "side":
            assert chosen.structure == truth.structure != rejected.structure
            assert rewards.name_reward([pair.rejected], [reference]) == [0.5]
            assert chosen.findings == rejected.findings
            continue
        assert (chosen.findings, chosen.negated) == (truth.findings, truth.negated)
        assert (rejected.findings, rejected.negated) != (truth.findings, truth.negated)
        # all the rest is the model's own
        assert chosen.structure == rejected.structure
        assert chosen.place == rejected.place
        if pair.kind == "own":
            assert pair.rejected == answers[pair.row]
        elif pair.kind == "removed":
            assert truth.findings and not rejected.findings
        elif pair.kind == "invented":
            assert not truth.findings and rejected.findings
        elif pair.kind == "kind":
            assert truth.findings and rejected.findings != truth.findings


def test_every_kind_is_made_and_only_those_that_are_asked_for():
    references = [
        caption("left kidney", "cyst"),
        caption("liver", None),
        caption("liver", "lytic lesion"),
    ]
    answers = [
        caption("left kidney", None),
        caption("liver", None),
        caption("liver", "lytic lesion"),
    ]
    made = rewards.preference_pairs(answers, references)
    kinds = {pair.kind for pair in made}
    assert kinds == {"own", "removed", "invented", "kind", "side"}
    only = rewards.preference_pairs(answers, references, kinds=["side"])
    assert [pair.kind for pair in only] == ["side"]


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["no", "without", "not", "cyst", "liver", "seen.", "the"]), max_size=6
    ),
    st.sampled_from([caption("liver", "cyst"), caption("liver", None)]),
)
def test_an_answer_that_was_cut_makes_no_pair_whose_better_answer_is_wrong(words, reference):
    """Without its full stop it runs into the sentence that is put behind it, and may deny it."""
    others = [caption("spleen", "solid nodule"), caption("spleen", None)]
    references = [reference, *others]
    pairs = rewards.preference_pairs([" ".join(words), *others], references)
    for pair in pairs:
        if pair.kind != "side":
            truth = [references[pair.row]]
            assert rewards.finding_reward([pair.chosen], truth) == [1.0]
            assert rewards.finding_reward([pair.rejected], truth) <= [1.0]


def test_the_side_of_the_place_stays():
    answer = caption("right kidney", None)
    [pair] = rewards.preference_pairs([answer], [answer], kinds=["side"])
    assert pair.chosen == answer
    assert pair.rejected == answer.replace("right kidney", "left kidney")
    assert "middle left of the image" in pair.rejected


def test_chinese_sentences_are_exchanged_too():
    cyst, none = "图像显示左肾。其内可见囊肿。", "图像显示左肾。其内未见局灶性病变。"
    [pair] = rewards.preference_pairs([none], [cyst])
    assert (pair.kind, pair.chosen, pair.rejected) == ("own", cyst, none)


# ------------------------------------------------------------ questions


values = st.one_of(st.none(), st.just(math.nan), st.sampled_from([-1.0, 0.0, 0.5, 1.0]))


@settings(deadline=None)
@given(st.lists(st.lists(values, max_size=8), min_size=1, max_size=12))
def test_questions_are_kept_by_their_share_of_right_answers(rewarded):
    judged = [np.array(row, dtype=float) for row in rewarded]
    wanted = []
    for number, row in enumerate(judged):
        known = row[~np.isnan(row)]
        if len(known) and 0.1 <= np.mean(known >= 1) <= 0.9:
            wanted.append(number)
    if wanted:
        assert rewards.choose_questions(rewarded) == wanted
    else:
        with pytest.raises(ValueError, match="no question has a pass rate between 0.1 and 0.9"):
            rewards.choose_questions(rewarded)


def test_the_range_of_pass_rates_must_be_one():
    with pytest.raises(ValueError, match=r"low=0.9 and high=0.1"):
        rewards.choose_questions([[1.0]], low=0.9, high=0.1)


# ------------------------------------------------------------ TRL as oracle


@pytest.fixture(scope="module")
def asked(sample_path):
    """Four questions of the sample, with what the rewards want to know."""
    import datasets

    from medtune.pairs import load_pairs

    rows = []
    for row in load_pairs(sample_path, split="train", limit=4):
        question = [{"type": "image"}, {"type": "text", "text": "Describe this picture."}]
        prompt = [{"role": "user", "content": question}]
        rows.append({"prompt": prompt, "images": [row["image"]], "reference": row["caption"]})
    return datasets.Dataset.from_list(rows)


def training_parts(tiny_vlm):
    from peft import LoraConfig

    from medtune import models

    model = models.load_base(tiny_vlm)
    adapter = LoraConfig(r=4, task_type="CAUSAL_LM", **models.adapter_targets(model))
    return model, models.load_processor(tiny_vlm), adapter


SETTINGS = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
    "use_cpu": True,
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trl_trains_with_the_rewards_and_logs_their_means(asked, tiny_vlm, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    model, processor, adapter = training_parts(tiny_vlm)
    noted = []

    def length_noted(completions, **columns):
        earned = rewards.length_reward(completions, shortest=4, longest=6, **columns)
        noted.append(earned)
        return earned

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[
            partial(rewards.finding_reward, missed=-2.0),
            rewards.name_reward,
            length_noted,
        ],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=12,
            beta=0.1,
            **SETTINGS,
        ),
        train_dataset=asked,
        processing_class=processor,
        peft_config=adapter,
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(steps) == len(noted) == 2
    for entry, earned in zip(steps, noted, strict=True):
        assert entry["rewards/length_noted/mean"] == pytest.approx(np.mean(earned), abs=1e-5)
        assert -2 <= entry["rewards/finding_reward/mean"] <= 1
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4), "the start is the reference"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trl_learns_from_the_pairs(asked, tiny_vlm, tmp_path):
    import datasets
    from trl import DPOConfig, DPOTrainer

    references = list(asked["reference"])
    answers = list(references)
    random.Random(0).shuffle(answers)
    references += [caption("liver", "cyst"), caption("left kidney", None)]
    answers += [caption("liver", None), caption("left kidney", "cyst")]
    rows = []
    for pair in rewards.preference_pairs(answers, references)[-4:]:
        question = asked[pair.row % len(asked)]
        row = {"prompt": question["prompt"], "images": question["images"]}
        for key in ("chosen", "rejected"):
            text = [{"type": "text", "text": getattr(pair, key)}]
            row[key] = [{"role": "assistant", "content": text}]
        rows.append(row)
    model, processor, adapter = training_parts(tiny_vlm)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_length=None, **SETTINGS
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        peft_config=adapter,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3), "the start is the reference"
    assert losses[1] < losses[0], "one step on the same four pairs already tells them apart"
