"""Scores of other programs: what is promised to them, and what is said when they do not keep it."""

import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest

from medtune import cli
from medtune.scores import bootstrap_interval, mean_scores, run_scorer

PAGE = Path(__file__).parents[1] / "docs" / "trust.md"
ROWS = [
    {"id": "a", "answer": "the liver", "reference": "the liver", "group": "p1", "more": 1},
    {"id": "b", "answer": "the liver\u2028肝", "reference": "the\nspleen", "group": "p2"},
    {"id": "c", "answer": "", "reference": "the heart", "group": "p3"},
]
READ = """
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
"""
# scores in the other order, and one that an empty answer has not
GOOD = (
    READ
    + """
print("loading weights")
with open(sys.argv[2], "w", encoding="utf-8") as file:
    for row in reversed(rows):
        assert sorted(row) == ["answer", "id", "reference"]
        right = None if not row["answer"] else row["answer"] == row["reference"]
        line = {"id": row["id"], "length": len(row["answer"]), "right": right and 1.0}
        if right is False:
            line["right"] = 0.0
        print(json.dumps(line), file=file)
"""
)


@pytest.fixture
def program(tmp_path):
    """Write a program into a folder with a blank in its name; gives its command."""

    def write(source: str) -> str:
        folder = tmp_path / "my programs"
        folder.mkdir(exist_ok=True)
        (folder / "score.py").write_text(source, "utf-8")
        return shlex.join([sys.executable, str(folder / "score.py")])

    return write


def test_a_program_scores_in_any_order(program):
    values = run_scorer(program(GOOD), ROWS)
    assert values["length"] == [9, 11, 0]
    assert values["right"][:2] == [1, 0] and math.isnan(values["right"][2])
    assert mean_scores(values) == {"length": 20 / 3, "right": 0.5}


def writes(text: str) -> str:
    return READ + f"open(sys.argv[2], 'w').write({text!r})"


BROKEN = {
    "fails": ("import sys; print('secret', file=sys.stderr); sys.exit(3)", "failed with 3"),
    "is killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9"),
    "writes nothing": ("", "it wrote no scores to its second argument"),
    "leaves out ids": (writes('{"id": "b", "x": 1}\n'), "left out 2 of 3 ids: 'a', 'c'"),
    "no JSON": (writes('{"id": "a"'), "line 1 of its scores is no JSON"),
    "no object": (writes("[1]\n"), "line 1 of its scores is no JSON object with an id"),
    "another id": (writes('{"id": "z", "x": 1}\n'), "line 1 of its scores has an id that no answer"),
    "twice": (writes('{"id": "a", "x": 1}\n' * 2), "line 2 of its scores has the id of an earlier"),
    "text": (writes('{"id": "a", "x": "1"}\n'), "line 1 of its scores: x is no number"),
    "a truth": (writes('{"id": "a", "x": true}\n'), "x is no number"),
    "no end": (writes('{"id": "a", "x": Infinity}\n'), "x is no number"),
    "no score": (
        READ + "open(sys.argv[2], 'w').write(''.join(json.dumps({'id': r['id']}) + '\\n' for r in rows))",
        "wrote ids without any score",
    ),
    "one lacks a score": (
        writes('{"id": "a", "x": 1}\n{"id": "b", "x": 1}\n{"id": "c", "y": 1}\n'),
        "1 of 3 ids have no x, the first is 'c'",
    ),
    "no text": (
        READ + r"open(sys.argv[2], 'wb').write(b'\xff\xfe')", "its scores are no UTF-8 text"
    ),
}  # fmt: skip


@pytest.mark.parametrize("source, message", BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_contract_is_one_line(program, source, message):
    with pytest.raises(ValueError) as error:
        run_scorer(program(source), ROWS)
    said = str(error.value)
    assert message in said and "\n" not in said
    assert "secret" not in said, "what a program prints may be about patients"


def test_a_command_that_cannot_be_started_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no program 'no-such-program'"):
        run_scorer("no-such-program --fast", ROWS)
    (tmp_path / "notes.txt").write_text("no program")
    with pytest.raises(PermissionError, match="cannot be executed"):
        run_scorer(shlex.quote(str(tmp_path / "notes.txt")), ROWS)
    with pytest.raises(ValueError, match="the command is empty"):
        run_scorer(" ", ROWS)
    with pytest.raises(ValueError, match="no command"):
        run_scorer("python 'score.py", ROWS)
    with pytest.raises(ValueError, match="no answers"):
        run_scorer("true", [])
    with pytest.raises(ValueError, match="an id stands on two answers"):
        run_scorer("true", [ROWS[0], ROWS[0]])


# ---- the command line


@pytest.fixture
def evaluate(tmp_path, capfd):
    """Score six answers of six patients by the command; exit code, stdout and stderr."""
    rows = []
    for number in range(6):
        answer = "the liver" if number % 2 else "the spleen"
        rows.append(
            {
                "id": str(number),
                "answer": answer,
                "reference": "the liver",
                "group": f"p{number}",
            }
        )
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["evaluate", str(file), "--score", "finding", *arguments])
        captured = capfd.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def test_the_command_prints_its_scores_with_intervals(evaluate, program):
    command = program(GOOD)
    code, out, err = evaluate("--score-with", f"mine={command}", "--score-with", command)
    assert code == 0, err
    scores = json.loads(out)  # what the program prints is not in between
    assert list(scores) == ["finding", "mine", "program 2"] and "loading weights" in err
    groups = [f"p{number}" for number in range(6)]
    right = [number % 2 for number in range(6)]
    assert scores["mine"]["right"] == 0.5
    assert scores["mine"]["intervals"]["right"] == bootstrap_interval(right, groups)


def test_the_command_says_in_one_line_what_is_wrong(evaluate, program):
    silent = program("")
    for option, message in [
        ("green=no-such-program", "no-such-program: there is no program 'no-such-program'"),
        (f"green={silent}", "it wrote no scores"),
        (f"finding={silent}", "there is another score called 'finding'"),
    ]:
        code, out, err = evaluate("--score-with", option)
        assert (code, out) == (1, ""), err
        assert message in err
        assert err.count("\n") == 1 and err.startswith("medtune: ")


# ---- the programs of the page, with a stand-in for what each imports

STAND_INS = {
    "radgraph_f1": (
        "radgraph",
        """
class F1RadGraph:
    def __init__(self, reward_level, model_type):
        assert reward_level == "all"
    def __call__(self, hyps, refs):
        right = [float(h == r) for h, r in zip(hyps, refs)]
        return (0, 0, 0), (right, right, right), [], []
""",
        {"simple": [1, 0, 0], "partial": [1, 0, 0], "complete": [1, 0, 0]},
    ),
    "chexbert_f1": (
        "f1chexbert",
        """
class F1CheXbert:
    def get_label(self, report):
        return [int(word in report) for word in ("liver", "spleen", "heart", "none")]
""",
        {"f1": [1, 0, 0], "all_labels": [1, 0, 0]},
    ),
    "rate_score": (
        "RaTEScore",
        """
class RaTEScore:
    def compute_score(self, candidate_list, reference_list):
        return [float(a == b) for a, b in zip(candidate_list, reference_list)]
""",
        {"ratescore": [1, 0, 0]},
    ),
    "green": (
        "green_score",
        """
class GREEN:
    def __init__(self, model_name, output_dir):
        pass
    def __call__(self, refs, hyps):
        assert refs[0] == hyps[0] and hyps[2] == ""
        return 0.5, 0.1, [1.0, 0.0, None], "", None
""",
        {"green": [1, 0, math.nan]},
    ),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_the_programs_of_the_page_keep_the_contract(name, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    assert sorted(STAND_INS) == sorted(name for name, _ in blocks)
    module, source, expected = STAND_INS[name]
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{module}.py").write_text(source)
    (tmp_path / f"{name}.py").write_text(dict(blocks)[name])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.chdir(tmp_path)
    values = run_scorer(shlex.join([sys.executable, str(tmp_path / f"{name}.py")]), ROWS)
    assert list(values) == list(expected)
    for score, numbers in expected.items():
        assert values[score] == pytest.approx(numbers, nan_ok=True)
