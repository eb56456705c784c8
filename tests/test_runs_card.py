"""medtune card RUN: what checklists ask for, from a run's results; empty fields are shown as empty."""

import json
import re
import shutil
from pathlib import Path

import pytest

from medtune import cli
from medtune.runs import write_card
from medtune.runs.card import EMPTY, FIELDS, STILL_EMPTY

REPO = Path(__file__).parents[1]
PARAMS = "notebooks: [02_convert_data, 03_finetune_lora, 05_evaluate]\n"


def section(card: str, title: str) -> str:
    """The text under a title, without the items that ask for it."""
    found = re.search(
        rf"^## {re.escape(title)}\n\n<sub>.*?</sub>\n\n(.*?)(?=\n## |\Z)", card, re.M | re.S
    )
    return found[1].strip()


@pytest.fixture
def clone(tmp_path) -> Path:
    """A root with a run that has no results yet."""
    root = tmp_path / "clone"
    shutil.copytree(REPO / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (root / "papermill_runs" / "small").mkdir(parents=True)
    (root / "papermill_runs" / "small" / "params.yaml").write_text(PARAMS)
    return root


def write_results(clone: Path, **notebooks: dict) -> Path:
    out = clone / "papermill_runs" / "small" / "out"
    for name, summary in notebooks.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary))
    return out


def test_the_fields_cover_claim_from_the_first_item_to_the_last():
    items = set()
    for field in FIELDS:
        named = re.search(r"CLAIM ([\d, to]+)", field.asked_by)
        if not named:
            continue
        for part in named[1].strip(" ,").split(","):
            first, _, last = part.partition("to")
            items |= set(range(int(first), int(last or first) + 1))
    # item 2 is the abstract of a paper
    assert items == set(range(1, 43)) - {2}
    assert len({field.key for field in FIELDS}) == len(FIELDS)


def test_the_card_of_an_executed_reference_has_its_figures():
    card = write_card("tiny-cpu", root=REPO)
    results = json.loads((REPO / "papermill_runs/reference/tiny-cpu/summary.json").read_text())
    found = results["notebooks"]
    tuned = found["05_evaluate"]["name_accuracy"]["tuned"]
    assert f"| {tuned:.1f} |" in section(card, "Performance, with controls")
    parts = section(card, "Partitions")
    for part, pairs in found["02_convert_data"]["audit"]["rows"].items():
        assert f"| {part} | {pairs} |" in parts
    assert found["05_evaluate"]["intervals"] in section(card, "Metrics and uncertainty")
    assert section(card, "Model").startswith("tiny-vlm, tuned with lora: rank 16")
    assert "which was not run here" in card and "../" not in card
    # what no run can know is empty, and says what belongs there
    assert (
        section(card, "Ethics approval")
        == f"{EMPTY}: which board, which number (`ethics` in card.yaml)"
    )
    assert STILL_EMPTY in section(card, "Data sources")


def test_a_run_without_most_results_shows_the_rest_as_empty(clone):
    trained = {"model_name_or_path": "/home/me/secret/base", "eval_loss": {"before": None}}
    write_results(clone, **{"03_finetune_lora": trained, "05_evaluate": {"n": 3}})
    card = write_card("small", root=clone)
    assert section(card, "Model") == "base, tuned with ?."
    assert section(card, "Metrics and uncertainty") == "3 held-out pairs; no intervals."
    for title in ("Partitions", "Performance, with controls", "Prompts"):
        assert section(card, title).startswith(EMPTY)
    assert "secret" not in card
    assert f"{card.count(EMPTY)} empty" in card


def test_other_people_and_benchmarks_are_external_validation(clone):
    out = write_results(clone, **{"05_evaluate": {"n": 3}})
    score = {"value": 51.2, "low": 40.0, "high": 62.0}
    benchmark = {
        "scores": {"open: recall of words": score},
        "in_training_set": {"pictures": 9, "exact": 0, "near": 2, "unreadable": 0},
    }
    people = {"ward": {"scores": {"name right": {"value": 44.0, "low": None, "high": None}}}}
    for kind, name, content in [
        ("benchmarks", "vqa-rad-test", benchmark),
        ("another_person", "ward", people),
    ]:
        folder = out / kind / name
        folder.mkdir(parents=True)
        (folder / "scores.json").write_text(json.dumps(content))
    text = section(write_card("small", root=clone), "External validation")
    assert "- `ward`: name right 44.0 %" in text
    assert (
        "- `vqa-rad-test`, open: recall of words: 51.2 [40.0, 62.0] %; 2 of its pictures were "
        "trained on" in text
    )


def test_what_the_makers_say_stands_beside_what_was_measured(clone):
    data = {"settings": {"data": "sample", "language": "en", "boxes": "drawn"}}
    write_results(clone, **{"02_convert_data": data})
    file = clone / "papermill_runs" / "small" / "card.yaml"
    file.write_text("funding: None.\ndata_sources: One hospital, 2024.\n")
    card = write_card("small", root=clone)
    assert section(card, "Funding") == "None."
    assert section(card, "Data sources") == "One hospital, 2024.\n\n`sample`."
    assert "2 by its makers" in card
    for text, message in [
        ("fundings: x", "there is no field 'fundings'; there are model, intended_use"),
        ("funding: 7", "funding is no text"),
        ("- a", "is no mapping"),
        ("a: [", "is no YAML"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            write_card("small", root=clone)
        assert "\n" not in str(error.value)


def test_the_command_prints_or_writes_the_card_or_says_why_not(clone, tmp_path, capsys):
    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in ("card", *arguments, "--root", clone)])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    code, out, err = call("small")
    assert (code, out) == (1, "") and "medtune run small makes" in err and err.count("\n") == 1
    assert call("none")[0] == 1
    write_results(clone, **{"05_evaluate": {"n": 3}})
    code, printed, _ = call("small")
    assert code == 0 and printed.startswith("# Card of small\n")
    code, out, _ = call("small", "--out", tmp_path / "CARD.md")
    assert (code, out) == (0, "") and (tmp_path / "CARD.md").read_text("utf-8") == printed
    (clone / "papermill_runs/small/out/05_evaluate/summary.json").write_text("{")
    code, _, err = call("small")
    assert code == 1 and "05_evaluate/summary.json is damaged" in err
