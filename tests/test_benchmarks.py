"""The field's benchmarks: read as they were published, judged by published rules, and what leaks."""

import io
import json
import pickle
import subprocess
import sys
import zipfile

import datasets
import pytest
from benchmark_files import (
    draw,
    write_omnimedvqa,
    write_openi,
    write_path_vqa,
    write_r2gen,
    write_slake,
    write_vqa_rad,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_pairs_hub import Hub, serve_hub

from medtune.benchmarks import count_shared, load_benchmark, own_questions, score_benchmark
from medtune.benchmarks.published import BENCHMARKS
from medtune.benchmarks.rules import judge_choice, judge_closed, normal_form, token_scores
from medtune.pairs import load_pairs

WRITERS = {
    "vqa-rad": write_vqa_rad,
    "slake": write_slake,
    "slake-zh": write_slake,
    "path-vqa": write_path_vqa,
    "omnimedvqa": write_omnimedvqa,
    "iu-xray": write_openi,
}
TWO_OPTIONS = " Please choose from the following two options: [yes, no]."


def asked(loaded) -> list[str]:
    return [row["prompt"][-1]["content"][-1]["text"] for row in loaded.rows]


def references(loaded) -> list[str]:
    return [row["completion"][-1]["content"][0]["text"] for row in loaded.rows]


def kinds(loaded) -> list[str]:
    return [fact["kind"] for fact in loaded.facts]


# ---- as published


def test_each_benchmark_that_has_files_is_tested_here():
    assert {*WRITERS, "own"} == set(BENCHMARKS)


def test_vqa_rad_is_split_by_its_phrase_types(tmp_path):
    loaded = load_benchmark("vqa-rad", write_vqa_rad(tmp_path))
    assert [row["id"] for row in loaded.rows] == ["2", "3", "4", "5"]
    # the answer type may have a blank behind it, and an answer may be a number
    assert kinds(loaded) == ["closed", "open", "closed", "open"]
    assert references(loaded) == ["No", "2", "Left", "Upper lobe"]
    assert asked(loaded)[0] == "Is there an effusion?" + TWO_OPTIONS
    # what is not answered by yes or no is asked as it stands
    assert asked(loaded)[2] == "Left or right?"
    assert len({fact["group"] for fact in loaded.facts}) == 3
    train = load_benchmark("VQA_RAD", tmp_path, split="train")
    assert [row["id"] for row in train.rows] == ["1"]
    assert train.rows[0]["images"][0].size == (96, 96)


def test_vqa_rad_is_read_from_two_files_too(tmp_path):
    rows = json.loads((write_vqa_rad(tmp_path) / "VQA_RAD Dataset Public.json").read_text())
    (tmp_path / "VQA_RAD Dataset Public.json").unlink()
    (tmp_path / "trainset.json").write_text(json.dumps(rows[:1]))
    test = [row | {"phrase_type": "freeform"} for row in rows[1:]]
    (tmp_path / "testset.json").write_text(json.dumps(test))
    assert references(load_benchmark("vqa-rad", tmp_path)) == ["No", "2", "Left", "Upper lobe"]
    assert len(load_benchmark("vqa-rad", tmp_path, split="train").rows) == 1


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "pictures in a ZIP"])
def test_slake_is_read_in_either_language(tmp_path, monkeypatch, zipped):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_slake(tmp_path / "slake", zipped=zipped)
    english = load_benchmark("slake", folder)
    assert references(english) == ["No", "Lung"] and kinds(english) == ["closed", "open"]
    chinese = load_benchmark("slake-zh", folder)
    assert references(chinese) == ["没有", "左肺"]
    assert asked(chinese)[0] == "图中有肝脏吗？"
    # source.jpg lies in many folders: each question has the picture of its own
    with Image.open(draw(tmp_path / "same.jpg", 11)) as wanted:
        assert chinese.rows[1]["images"][0].tobytes() == wanted.tobytes()
    assert references(load_benchmark("slake", folder, split="train")) == ["Yes"]
    with pytest.raises(ValueError, match="there are no questions of this part"):
        load_benchmark("slake", folder, split="validation")


def test_path_vqa_is_read_from_its_pickles_without_running_them(tmp_path):
    folder = write_path_vqa(tmp_path)
    loaded = load_benchmark("path-vqa", folder)
    assert kinds(loaded) == ["closed", "open", "closed"]
    assert [fact["group"] for fact in loaded.facts] == ["test_0001", "test_0001", "test_0002"]
    assert references(load_benchmark("path-vqa", folder, split="val")) == ["no"]

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "was run"), "w"))

    (folder / "qas" / "test" / "test_qa.pkl").write_bytes(pickle.dumps([Trap()]))
    with pytest.raises(ValueError, match="which a table does not need"):
        load_benchmark("path-vqa", folder)
    assert not (tmp_path / "was run").exists()


def test_omnimedvqa_is_asked_with_its_options_from_a_zip_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_omnimedvqa(tmp_path / "OmniMedVQA")
    archive = tmp_path / "OmniMedVQA.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in sorted(folder.rglob("*.*")):
            zipped.write(file, file.relative_to(tmp_path))
    loaded = load_benchmark("omnimedvqa", archive)
    assert asked(loaded)[1] == (
        "What is the modality?Here are 3 candidate answers:['MRI', 'CT', 'X-Ray'] Only return what "
        "you think is the correct answer from the candidate answers, do not return any other "
        "irrelevant text!"
    )
    assert [len(fact["options"]) for fact in loaded.facts] == [2, 3, 4, 2, 3]
    assert len(load_benchmark("omnimedvqa", archive, limit=2).rows) == 2
    with pytest.raises(ValueError, match="has no split 'train', only test"):
        load_benchmark("omnimedvqa", archive, split="train")


def test_reports_have_their_views_and_what_has_no_findings_is_counted(tmp_path):
    loaded = load_benchmark("iu-xray", write_openi(tmp_path / "openi"))
    assert len(loaded.rows) == 4 and loaded.left_out == {"no findings": 1}
    assert [len(row["images"]) for row in loaded.rows] == [2] * 4
    assert references(loaded)[0] == "The heart is normal. No mass 1 & no effusion."
    assert [part["type"] for part in loaded.rows[0]["prompt"][0]["content"]] == ["image"] * 2 + [
        "text"
    ]
    other = load_benchmark("iu-xray", write_r2gen(tmp_path / "r2gen"))
    assert references(other) == ["Lungs are clear 3.", "Lungs are clear 4."]
    assert [fact["group"] for fact in other.facts] == ["CXR3", "CXR4"]


def test_the_form_of_the_hub_is_read_from_its_parquet_files(tmp_path):
    cells = []
    for seed in (1, 1, 2):
        buffer = io.BytesIO()
        Image.open(draw(tmp_path / "drawn.png", seed)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    table = {"image": cells, "question": ["Is it a CT?", "Where?", "Which?"]}
    rows = datasets.Dataset.from_dict(table | {"answer": ["yes", "left", "no"]})
    (tmp_path / "data").mkdir()
    rows = rows.cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    loaded = load_benchmark("vqa-rad", tmp_path / "data")
    assert kinds(loaded) == ["closed", "open", "closed"]
    assert loaded.rows["question"][:] == [
        "Is it a CT?" + TWO_OPTIONS,
        "Where?",
        "Which?" + TWO_OPTIONS,
    ]
    assert loaded.rows["caption"][:] == ["yes", "left", "no"]
    # questions about one picture are one group, though the hub names no pictures
    groups = [fact["group"] for fact in loaded.facts]
    assert groups[0] == groups[1] != groups[2] and len(list(loaded.pictures())) == 2


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_not_there_is_said_in_one_line(tmp_path, name):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="does not hold .* as it was published") as error:
        load_benchmark(name, empty)
    assert "\n" not in str(error.value)
    folder = WRITERS[name](tmp_path / "whole")
    pictures = [file for file in folder.rglob("*.*") if file.suffix in (".jpg", ".png")]
    for file in pictures[1:]:
        file.unlink()
    try:
        left_out = load_benchmark(name, folder).left_out
    except ValueError as none:
        assert "its picture is missing" in str(none)
    else:
        assert left_out["its picture is missing"] > 0
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_benchmark(name, tmp_path / "nowhere")


def test_a_picture_of_the_same_name_in_another_folder_is_not_taken(tmp_path):
    folder = write_slake(tmp_path / "slake")
    (folder / "imgs" / "xmlab10" / "source.jpg").unlink()
    with pytest.raises(ValueError, match="2 rows: its picture is missing"):
        load_benchmark("slake", folder)
    # whoever renames the folder above all loses nothing
    (folder / "imgs").rename(folder / "pictures")
    assert len(load_benchmark("slake-zh", folder).rows) == 1
    omni = write_omnimedvqa(tmp_path / "omni")
    (omni / "Images").rename(omni / "pictures")
    assert len(load_benchmark("omnimedvqa", omni).rows) == 5


def test_damage_and_unknown_names_are_said(tmp_path):
    with pytest.raises(ValueError, match="none of this name; there are vqa-rad, slake"):
        load_benchmark("medqa", tmp_path)
    with pytest.raises(ValueError, match="no set on the hub"):
        load_benchmark("iu-xray")
    folder = write_vqa_rad(tmp_path)
    table = folder / "VQA_RAD Dataset Public.json"
    row = json.loads(table.read_text())[1]
    table.write_text(json.dumps([row | {"qid": "9"}, row | {"qid": "9"}]))
    assert load_benchmark("vqa-rad", folder).left_out == {"the same question a second time": 1}
    del row["question"]
    for text, message in [
        (json.dumps([row]), "a question of VQA-RAD has no 'question'"),
        ("[{", "is damaged"),
        ('{"a": 1}', "is no list of questions"),
    ]:
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_benchmark("vqa-rad", folder)


def test_own_questions_are_asked_as_they_stand(tmp_path):
    for number in range(3):
        draw(tmp_path / f"{number}.png", number)
    lines = ["image,question,answer,answer_type,split,patient"]
    lines += ["0.png,A cyst?,yes,,test,p1", "1.png,Which side?,left,CLOSED,test,p1"]
    lines += ["2.png,What is it?,a lung,OPEN,train,p2"]
    (tmp_path / "questions.csv").write_text("\n".join(lines))
    pairs = load_pairs(tmp_path)
    loaded = own_questions(pairs, split="test")
    assert kinds(loaded) == ["closed", "closed"]
    assert loaded.rows["question"][:] == ["A cyst?", "Which side?"]
    assert len({fact["group"] for fact in loaded.facts}) == 1
    with pytest.raises(ValueError, match="no rows of the split 'validation'"):
        own_questions(pairs, split="validation")
    with pytest.raises(ValueError, match="no column question"):
        own_questions(pairs.remove_columns("question"))


# ---- rules


@pytest.mark.parametrize(
    ("answer", "reference", "strict", "published"),
    [
        ("Yes.", "yes", 1, 1),
        ("no", "Yes", 0, 0),
        ("The heart is normal.", "No", 0, 1),  # "no" is part of "normal"
        ("Yes or no", "yes", 0, 1),
        ("On the left side", "Left", 1, 1),
        ("cleft", "left", 0, 1),
        ("", "no", 0, 0),
    ],
)
def test_closed_questions_are_judged_strictly_and_as_published(
    answer, reference, strict, published
):
    assert judge_closed(answer, reference) == {"accuracy": strict, "published": published}


@pytest.mark.parametrize(
    ("answer", "reference", "strict"),
    [
        ("没有。", "没有", 1),
        ("有", "没有", 0),
        ("没有", "有", 0),
        ("是", "是的", 1),
        ("图中不包含肝脏", "不包含", 1),
        ("图中包含肝脏", "不包含", 0),
        ("否", "不是", 1),
        ("肝脏", "是的", 0),
        ("左边的肺", "肺", 1),
    ],
)
def test_chinese_yes_and_no_are_not_taken_for_each_other(answer, reference, strict):
    assert judge_closed(answer, reference, "zh")["accuracy"] == strict


def test_words_are_counted_as_the_published_evaluation_counts_them():
    # worked by hand: shared left (2 times said), invented lung; missing lower and lobe
    found = token_scores("left left lung", "left lower lobe")
    assert found["recall"] == 2 / 4 and found["precision"] == 2 / 3 and found["exact"] == 0
    assert token_scores("The Liver.", "liver") == {
        "recall": 1,
        "precision": 1,
        "f1": 1,
        "exact": 1,
    }
    assert token_scores("左侧肺", "左肺", "zh")["recall"] == 1
    assert token_scores("two", "2")["exact"] == 1


def test_a_choice_needs_its_own_words_under_the_strict_rule_only():
    options = ["Left lung", "Lung", "Heart"]
    assert judge_choice("left lung", "Left lung", options)["accuracy"] == 1
    # the longer option names the shorter one along with it, and is another answer
    assert judge_choice("left lung", "Lung", options)["accuracy"] == 0
    assert judge_choice("lung or heart", "Lung", options)["accuracy"] == 0
    # the published rule takes the likeliest option of any answer
    assert judge_choice("a hearth", "Heart", options) == {"accuracy": 0, "published": 1}
    with pytest.raises(ValueError, match="none of the options"):
        judge_choice("x", "Liver", options)


@given(st.text(max_size=60))
def test_the_normal_form_is_stable_and_an_answer_equals_itself(text):
    once = normal_form(text)
    assert once == " ".join(once.split())
    assert token_scores(text, text)["exact"] == 1
    if once:
        assert token_scores(text, text)["f1"] == 1
    assert judge_closed(text, text)["published"] == 1


# ---- scores


def facts_of(kind, groups, **more):
    shared = {"kind": kind, "language": "en", "options": [], "category": ""}
    return [shared | {"group": group} | more for group in groups]


def test_closed_and_open_questions_are_scored_apart_with_intervals_over_pictures():
    groups = [f"g{number % 6}" for number in range(12)]
    facts = facts_of("closed", groups, category="PRES") + facts_of("open", groups)
    answers = []
    for number in range(12):
        said = "no" if number % 3 == 0 else "yes"
        answers.append({"answer": said, "reference": "yes"})
    answers += [{"answer": "right lung", "reference": "left lung"}] * 12
    found = score_benchmark(answers, facts)
    closed = found["scores"]["closed: accuracy, whole words"]
    assert closed["value"] == pytest.approx(100 * 8 / 12)
    assert closed["low"] < closed["value"] < closed["high"] and closed["groups"] == 6
    assert found["scores"]["open: recall of words"]["value"] == 50
    assert found["questions"] == {"closed": 12, "open": 12} and found["groups"] == 6
    # who always says yes is right each time, and has looked at no picture
    assert found["controls"] == {"closed: always 'yes'": 100}
    assert found["categories"] == {"PRES": {"questions": 12, "value": pytest.approx(100 * 8 / 12)}}
    with pytest.raises(ValueError, match="give one of each"):
        score_benchmark(answers[1:], facts)


def test_who_always_says_no_is_right_about_all_chinese_words_for_it():
    facts = [fact | {"language": "zh"} for fact in facts_of("closed", ["a", "b", "c"])]
    answers = [{"answer": "是", "reference": text} for text in ("不是", "不是", "不包含")]
    assert score_benchmark(answers, facts)["controls"] == {"closed: always '不是'": 100}


def test_choices_and_reports_are_scored_by_rules_of_their_own():
    facts = facts_of("choice", ["a", "b"], options=["CT", "MRI"])
    answers = [{"answer": said, "reference": "CT"} for said in ("CT.", "MRI")]
    found = score_benchmark(answers, facts)
    assert found["scores"]["choice: accuracy, OmniMedVQA's rule"]["value"] == 50
    assert found["controls"] == {"choice: by chance": 50}

    reports = ["The heart is large and there is an effusion.", "No mass is seen in either lung."]
    answers = [{"answer": text.upper(), "reference": text} for text in reports]
    found = score_benchmark(answers, facts_of("report", ["a", "b"]))
    assert found["scores"]["report: BLEU-4"]["value"] == pytest.approx(100)
    assert found["scores"]["report: ROUGE-L"]["value"] == pytest.approx(100)
    assert found["questions"] == {"report": 2}


# ---- what leaks


def test_pictures_that_another_set_holds_are_found_as_files_and_as_pictures(tmp_path):
    ours = [draw(tmp_path / f"{number}.png", number) for number in range(4)]
    same = tmp_path / "copy.png"
    same.write_bytes(ours[0].read_bytes())
    resized = draw(tmp_path / "resized.jpg", 1, size=160)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    others = [draw(tmp_path / f"other{number}.png", 50 + number) for number in range(5)]
    known = [same, resized, *others, tmp_path / "broken.png"]
    # asked twice, a file counts once
    shared = count_shared([*ours, ours[0]], known)
    assert (shared.pictures, shared.exact, shared.near, shared.unreadable) == (4, 1, 2, 1)
    nothing = count_shared(ours, [])
    assert (nothing.pictures, nothing.near) == (4, 0)


def test_the_published_split_of_vqa_rad_leaks_and_that_of_slake_does_not(tmp_path):
    for name, pictures, leaked in (("vqa-rad", 3, 1), ("slake", 1, 0)):
        folder = WRITERS[name](tmp_path / name)
        test = load_benchmark(name, folder)
        train = load_benchmark(name, folder, split="train")
        shared = count_shared(test.pictures(), train.pictures())
        assert (shared.pictures, shared.exact, shared.near) == (pictures, leaked, leaked)


# ---- from the hub


class HubOfBenchmarks(Hub):
    """SLAKE as files and VQA-RAD as a table, each under its own name."""

    sets: dict[str, dict[str, bytes]] = {}

    def do_GET(self):
        for name, files in self.sets.items():
            if f"datasets/{name}" in self.path:
                self.path = self.path.replace(name, "org/pairs")
                self.files = files
                return super().do_GET()
        return self.answer(401, X_Error_Code="RepoNotFound")

    do_HEAD = do_POST = do_GET


FETCH = """
import json
from medtune.benchmarks import load_benchmark

for name, options in (("slake", {}), ("vqa-rad", {"limit": 2}), ("omnimedvqa", {})):
    try:
        loaded = load_benchmark(name, **options)
        print(json.dumps([fact["kind"] for fact in loaded.facts]))
    except ConnectionError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_files_and_tables_are_fetched_from_the_hub(tmp_path):
    slake = write_slake(tmp_path / "slake", zipped=True)
    HubOfBenchmarks.sets["BoKelvin/SLAKE"] = {
        file.name: file.read_bytes() for file in slake.iterdir() if file.is_file()
    }
    cell = {"bytes": draw(tmp_path / "a.png", 1).read_bytes(), "path": None}
    table = {"image": [cell] * 3, "question": ["A?", "B?", "C?"], "answer": ["yes", "left", "no"]}
    rows = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    HubOfBenchmarks.sets["flaviagiammarino/vqa-rad"] = {"data/test-00000-of-00001.parquet": content}
    server, environment = serve_hub(HubOfBenchmarks, tmp_path)
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    command = [sys.executable, "-W", "ignore", "-c", FETCH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    slake, vqa_rad, missing = [json.loads(line) for line in done.stdout.splitlines()]
    assert slake == ["closed", "open"] and vqa_rad == ["closed", "open"]
    assert "does not give foreverbeliever/OmniMedVQA" in missing and "data=FOLDER" in missing
