"""What is asked: the question that a row brings, one for all, or one of ours."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import CAPTION, CHINESE, json_lines, pair, picture, rejected, write_shard

from medtune.records import QUESTIONS, check_folder, convert_pairs, read_records
from medtune.records.judge import Pair
from medtune.records.write import Gatherer


def asked_in(folder, name: str = "train") -> list[str]:
    """The question of each record, without the marks for pictures."""
    records = json_lines(folder / f"{name}.jsonl")
    return [record["instruction"].replace("<image>", "") for record in records]


def test_a_row_is_asked_its_own_question(tmp_path):
    rows = [
        pair(0, question="Is it normal?", caption="Yes."),
        pair(1, question="<image>\nWhere is the fracture?", caption="Rib."),
        pair(2, question=None),
        pair(3, question=" ", caption=CHINESE.format(3)),
    ]
    source = write_shard(tmp_path / "a.parquet", rows)
    convert_pairs(source, tmp_path / "own")
    ours = [QUESTIONS[0], QUESTIONS[3]]
    assert asked_in(tmp_path / "own") == ["Is it normal?", "Where is the fracture?", *ours]
    assert check_folder(tmp_path / "own")["ok"]
    convert_pairs(source, tmp_path / "given", questions="What is it?")
    assert asked_in(tmp_path / "given") == ["What is it?"] * 4


def test_a_question_may_say_where_the_picture_stands(tmp_path):
    """One recipe publishes its question with the mark before it, another with the picture behind."""
    rows = [pair(i, group="g", split="train") for i in range(2)]
    source = write_shard(tmp_path / "a.parquet", rows)
    published = {
        "<image>What is it?": "<image>What is it?",
        "What is it?<image>": "What is it?<image>",
    }
    published |= {"What is it?": "<image>What is it?"}
    for number, (question, written) in enumerate(published.items()):
        out = tmp_path / str(number)
        convert_pairs(source, out, questions=question)
        assert {record["instruction"] for record in json_lines(out / "train.jsonl")} == {written}
        assert check_folder(out)["ok"]

    out = tmp_path / "both"
    convert_pairs(source, out, questions="What is it?<image>", pictures_per_sample=2)
    (record,) = json_lines(out / "train.jsonl")
    assert record["instruction"] == "What is it?<image><image>"
    (row,) = read_records(out)
    kinds = [part["type"] for part in row["prompt"][0]["content"]]
    assert kinds == ["text", "image", "image"]
    assert len(row["images"]) == 2


def test_a_vqa_table_is_learned_with_its_questions(tmp_path):
    for name in "ab":
        picture(0).save(tmp_path / f"{name}.png")
    (tmp_path / "vqa.csv").write_text(
        "image,id,question,caption\na.png,x,Which organ?,The lungs.\nb.png,y,Normal?,No.\n"
    )
    convert_pairs(tmp_path / "vqa.csv", tmp_path / "out")
    said = [(r["instruction"], r["output"]) for r in json_lines(tmp_path / "out" / "train.jsonl")]
    assert said == [("<image>Which organ?", "The lungs."), ("<image>Normal?", "No.")]


def test_a_dialogue_is_learned_answer_by_answer(tmp_path):
    picture(0).save(tmp_path / "0.jpg")
    asked = {"<image>\nIs there an effusion?": "No.", "Which organ?": "The lungs."}
    said = []
    for question, answer in asked.items():
        said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record = {"id": "p", "image": "0.jpg", "conversations": said}
    (tmp_path / "llava.json").write_text(json.dumps([record]))
    convert_pairs(tmp_path / "llava.json", tmp_path / "out")
    rows = read_records(tmp_path / "out").select_columns(["prompt", "completion"])
    told = [(r["prompt"][-1]["content"][-1], r["completion"][0]["content"][0]) for r in rows]
    assert [(question["text"], answer["text"]) for question, answer in told] == [
        ("Is there an effusion?", "No."),
        ("Which organ?", "The lungs."),
    ]


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("<video>What moves?", "question: it holds the mark <video>"),
        ("What is \ufffd?", "question: holds characters"),
        (7, "question: is no text"),
    ],
)
def test_a_question_that_cannot_be_asked_is_a_reason(tmp_path, question, reason):
    kind = pa.int64() if question == 7 else pa.string()
    table = pq.read_table(write_shard(tmp_path / "a.parquet", [pair(0)]))
    pq.write_table(
        table.append_column("question", pa.array([question], kind)), tmp_path / "a.parquet"
    )
    summary = convert_pairs(tmp_path / "a.parquet", tmp_path / "out")
    assert summary["rejected"] == 1 and not summary["records"]
    assert rejected(tmp_path / "out")["id-00000"].startswith(reason)


def test_a_caption_with_the_mark_of_a_clip_is_a_reason(tmp_path):
    rows = [pair(0, caption="See <video>."), pair(1)]
    convert_pairs(write_shard(tmp_path / "a.parquet", rows), tmp_path / "out")
    assert rejected(tmp_path / "out") == {"id-00000": "caption: it holds the mark <video>"}


# --- several pictures -------------------------------------------------------------------------


def test_two_views_are_one_sample_for_each_question(tmp_path):
    """Two pictures with three answers each come one after the other, as a dialogue gives them."""
    rows = []
    for view in range(2):
        for number, question in enumerate(["Normal?", "Which organ?", "Which side?"]):
            answer = CAPTION.format(number)
            rows.append(pair(10 * view + number, question=question, caption=answer, group="g"))
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    convert_pairs(source, out, pictures_per_sample=2)
    records = json_lines(out / "train.jsonl")
    assert [record["id"] for record in records] == ["id-00000+1", "id-00001+1", "id-00002+1"]
    assert [record["instruction"] for record in records] == [
        "<image><image>Normal?",
        "<image><image>Which organ?",
        "<image><image>Which side?",
    ]
    assert [record["output"] for record in records] == [CAPTION.format(i) for i in range(3)]
    assert check_folder(out)["ok"]


def test_two_views_stay_together_where_a_block_of_rows_ends(tmp_path):
    groups = ["first", *(f"g{i // 2}" for i in range(299))]
    rows = [pair(i, group=group) for i, group in enumerate(groups)]
    source, out = write_shard(tmp_path / "a.parquet", rows, row_group_size=7), tmp_path / "out"
    convert_pairs(source, out, pictures_per_sample=2, split_by="none")
    pictures = [len(record["images"]) for record in json_lines(out / "train.jsonl")]
    assert pictures == [1, *[2] * 149, 1]


KINDS = st.tuples(st.sampled_from(["a", "b", None]), st.sampled_from(["q", "r", None]))


@settings(max_examples=200, deadline=None)
@given(st.lists(KINDS, max_size=30), st.integers(1, 3))
def test_gathering_loses_no_pair_and_mixes_no_groups(kinds, pictures):
    gatherer = Gatherer(pictures)
    samples = []
    for number, (group, question) in enumerate(kinds):
        cells = {"group": group}
        own = question is not None
        one = Pair(number, cells, "train", "A liver.", question or "What?", own, "a.png", None)
        samples += gatherer.add(one)
    samples += gatherer.finish()
    assert sorted(one.number for sample in samples for one in sample) == list(range(len(kinds)))
    for sample in samples:
        assert len(sample) <= pictures
        assert len({one.cells["group"] for one in sample}) == 1
        assert len({(one.own_question, one.question) for one in sample}) == 1
        assert len(sample) == 1 or sample[0].cells["group"]
        numbers = [one.number for one in sample]
        assert numbers == sorted(numbers)
