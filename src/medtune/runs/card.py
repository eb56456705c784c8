"""A card of a run with the fields that CLAIM and TRIPOD-LLM ask for; empty ones are shown as empty.

What a run's summaries know is filled in. What only its makers know stands in a file `card.yaml`
beside the run's `params.yaml`: a line for each field, by its key. The numbers of the items are
those of CLAIM (Mongan, Moy and Kahn, 2020); of TRIPOD-LLM (Gallifant and others, 2025) the subject
is named.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .params import find_root, load_run

# Notebook -> what its summary holds.
Summaries = Mapping[str, Mapping[str, Any]]

DATA = "02_convert_data"
EXPLORED = "01_explore_data"
TRAINED = "03_finetune_lora"
EVALUATED = "05_evaluate"
LOCATED = "07_locate_verify_diagnose"

EMPTY = "*not stated*"
STILL_EMPTY = "*the results do not say*"


@dataclass(frozen=True)
class Field:
    """One field of the card.

    Attributes
    ----------
    key : its name in `card.yaml`.
    title : as the card shows it.
    asked_by : the items that ask for it.
    wanted : what belongs there, shown where it is empty.
    fill : makes it of the run's results, None where these do not say it; None for what no run knows.
    is_part : whether what the results say is only a part of what is wanted.
    """

    key: str
    title: str
    asked_by: str
    wanted: str
    fill: Callable[[Summaries], str | None] | None = None
    is_part: bool = False


@dataclass(frozen=True)
class _Filled:
    """A field, what its makers say and what the results say."""

    field: Field
    own: str | None
    found: str | None

    @property
    def is_empty(self) -> bool:
        return not (self.own or self.found)

    def text(self) -> str:
        """Give what stands in the card; what somebody wrote does not replace what was measured."""
        parts = [text for text in (self.own, self.found) if text]
        wanted = f"{self.field.wanted} (`{self.field.key}` in card.yaml)"
        if self.is_empty:
            parts.append(f"{EMPTY}: {wanted}")
        elif self.field.is_part and not self.own:
            parts.append(f"{STILL_EMPTY}: {wanted}")
        return "\n\n".join(parts)


def write_card(name: str, *, root: str | Path | None = None) -> str:
    """Write the card of a run, from its own results or those of its executed reference.

    Parameters
    ----------
    name : folder in `papermill_runs/`.
    root : the repository; see `find_root`.

    Returns
    -------
    str : Markdown. Each field says which items ask for it; those that nobody filled say what
        belongs there. Paths of this machine are shortened to their last part.

    Raises
    ------
    FileNotFoundError : there is no such run, or it has no results.
    ValueError : `card.yaml` is no mapping of the known fields to texts, or a result is damaged.

    Examples
    --------
    >>> card = write_card("tiny-cpu")  # doctest: +SKIP
    >>> write_card("no/such run")
    Traceback (most recent call last):
    ValueError: a name here has letters, digits, '.', '_' and '-' only and is not 'no/such run'
    """
    where = find_root(root)
    load_run(name, where)
    folder = where / "papermill_runs" / name
    summaries, source = _summaries_of(folder, where)
    own = _own_fields(folder / "card.yaml")
    rows = []
    for field in FIELDS:
        found = field.fill(summaries) if field.fill else None
        rows.append(_Filled(field, own.get(field.key), found))
    return _markdown(name, source, rows)


# --- what is read ---------------------------------------------------------------------------------


def _summaries_of(folder: Path, root: Path) -> tuple[dict[str, Any], str]:
    """Read the summary of each notebook that is finished, and what was scored besides."""
    found: dict[str, Any] = {}
    for file in sorted((folder / "out").glob("*/summary.json")):
        found[file.parent.name] = _read(file)
    for kind in ("another_person", "benchmarks"):
        for file in sorted((folder / "out" / kind).glob("*/scores.json")):
            found.setdefault(kind, {})[file.parent.name] = _read(file)
    if found:
        return found, "the results of this run"
    kept = root / "papermill_runs" / "reference" / folder.name / "summary.json"
    if kept.is_file():
        notebooks = _read(kept).get("notebooks", {})
        return notebooks, "the executed reference of this run, which was not run here"
    raise FileNotFoundError(
        f"{folder.name} has no results: medtune run {folder.name} makes what its card says"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{file.parent.name}/{file.name} is damaged: run its notebook again")
    return value


def _own_fields(file: Path) -> dict[str, str]:
    """Read what the makers of a run say of it."""
    if not file.is_file():
        return {}
    try:
        value = yaml.safe_load(file.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file.name} is no YAML: {' '.join(str(error).split())}") from None
    known = [field.key for field in FIELDS]
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} is no mapping: write 'intended_use: ...', a line a field")
    for key, text in value.items():
        if key not in known:
            raise ValueError(
                f"{file.name}: there is no field {key!r}; there are {', '.join(known)}"
            )
        if not isinstance(text, str):
            raise ValueError(f"{file.name}: {key} is no text: put it between quotes")
    return {key: text.strip() for key, text in value.items()}


# --- what the results say -------------------------------------------------------------------------


def _model(results: Summaries) -> str | None:
    trained = results.get(TRAINED)
    if not trained:
        return None
    text = f"{_last_part(trained.get('model_name_or_path', '?'))}, tuned with {trained.get('method', '?')}"
    if trained.get("lora_r"):
        text += f": rank {trained['lora_r']}, alpha {trained.get('lora_alpha')}"
    if trained.get("target"):
        text += f", on {trained['target']}"
    if trained.get("trained_parameters"):
        text += f"; {trained['trained_parameters']:,} trained parameters"
    return text + "."


def _data_sources(results: Summaries) -> str | None:
    settings = results.get(DATA, {}).get("settings", {})
    data = settings.get("data") or results.get(TRAINED, {}).get("data")
    return f"`{_last_part(str(data))}`." if data else None


def _preprocessing(results: Summaries) -> str | None:
    settings = results.get(DATA, {}).get("settings")
    if not settings:
        return None
    said = [f"language of the captions: {settings.get('language')}"]
    said.append(f"regions of interest: {settings.get('boxes')}")
    if settings.get("limit"):
        said.append(f"the first {settings['limit']} pairs only")
    pixels = results.get(TRAINED, {}).get("max_pixels")
    if pixels:
        said.append(f"at most {pixels} pixels a picture")
    return "; ".join(said) + "."


def _left_out(results: Summaries) -> str | None:
    found = results.get(DATA, {}).get("results", {})
    if "rejected" not in found:
        return None
    text = f"{found['rejected']} pairs were rejected as unusable"
    if "pairs_without_a_group" in found:
        text += f"; {found['pairs_without_a_group']} name no patient"
    return text + "."


def _partitions(results: Summaries) -> str | None:
    audit = results.get(DATA, {}).get("audit") or results.get(EXPLORED, {}).get("audit")
    if not audit:
        return None
    lines = ["| part | pairs | groups |", "|---|---|---|"]
    for part, pairs in audit["rows"].items():
        lines.append(f"| {part} | {pairs} | {audit.get('groups', {}).get(part, '')} |")
    by = results.get(DATA, {}).get("groups_by")
    kept = f" Groups by {by}." if by else ""
    lines.append("")
    lines.append(
        f"Crossing the split: {audit['groups_crossing']} groups, "
        f"{audit['near_duplicates_crossing']} pairs of nearly the same picture, "
        f"{audit['captions_crossing']} captions.{kept}"
    )
    return "\n".join(lines)


def _training(results: Summaries) -> str | None:
    trained = results.get(TRAINED)
    if not trained:
        return None
    keys = ("learning_rate", "lr_scheduler_type", "warmup_steps", "effective_batch_size")
    keys += ("num_train_epochs", "max_steps", "dtype", "seed")
    said = [f"{key} {trained[key]}" for key in keys if trained.get(key) not in (None, "")]
    seconds = trained.get("timing", {}).get("train_seconds")
    if seconds:
        said.append(f"{seconds / 60:.0f} minutes")
    loss = trained.get("eval_loss") or {}
    for when in ("before", "after"):
        if loss.get(when) is not None:
            said.append(f"validation loss {when} {loss[when]:.3f}")
    return "; ".join(said) + "."


def _prompts(results: Summaries) -> str | None:
    questions = results.get(DATA, {}).get("settings", {}).get("questions")
    if not questions:
        return None
    return "\n".join(f"- `{' '.join(question.split())}`" for question in questions)


def _intervals(results: Summaries) -> str | None:
    evaluated = results.get(EVALUATED)
    if not evaluated or "n" not in evaluated:
        return None
    return f"{evaluated['n']} held-out pairs; {evaluated.get('intervals') or 'no intervals'}."


MEASURES = {
    "bleu4_words": "word BLEU-4",
    "name_accuracy": "name right",
    "place_accuracy": "place right",
    "finding_accuracy": "finding right",
    "entity_f1": "entity F1",
}
CONDITIONS = {
    "base": "base",
    "tuned": "tuned",
    "shuffled": "wrong picture",
    "most_frequent": "most frequent caption",
    "nearest_picture": "nearest training picture",
}


def _performance(results: Summaries) -> str | None:
    evaluated = results.get(EVALUATED)
    if not evaluated:
        return None
    lines = [f"| %, held out | {' | '.join(CONDITIONS.values())} | tuned less base |"]
    lines.append("|---" * (len(CONDITIONS) + 2) + "|")
    gained = evaluated.get("paired", {}).get("tuned_minus_base", {})
    for key, measure in MEASURES.items():
        values = evaluated.get(key) or {}
        if all(values.get(who) is None for who in CONDITIONS):
            continue
        cells = [_percent(values.get(who)) for who in CONDITIONS]
        lines.append(f"| {measure} | {' | '.join(cells)} | {_gain(gained.get(measure))} |")
    return "\n".join(lines) if len(lines) > 2 else None


def _diagnostic(results: Summaries) -> str | None:
    detection = results.get(EVALUATED, {}).get("detection")
    if not detection:
        return None
    said = [f"{name} {_percent(values.get('tuned'))}" for name, values in detection.items()]
    return f"Of findings, by the tuned model, in percent: {', '.join(said)}."


def _explained(results: Summaries) -> str | None:
    said = []
    if "uses_picture" in results.get(EVALUATED, {}):
        uses = results[EVALUATED]["uses_picture"]
        said.append(f"Answers {'get' if uses else 'do not get'} worse with another picture")
    iou = results.get(LOCATED, {}).get("iou", {}).get("model")
    if iou is not None:
        said.append(f"predicted boxes overlap the region with a mean IoU of {iou:.2f}")
    return "; ".join(said) + "." if said else None


def _external(results: Summaries) -> str | None:
    lines = []
    for name, people in results.get("another_person", {}).items():
        score = people.get(name, {}).get("scores", {}).get("name right", {})
        lines.append(f"- `{name}`: name right {_score(score)} %")
    for name, found in results.get("benchmarks", {}).items():
        shared = found.get("in_training_set")
        seen = "" if shared is None else f"; {shared['near']} of its pictures were trained on"
        for measure, score in found.get("scores", {}).items():
            lines.append(f"- `{name}`, {measure}: {_score(score)} %{seen}")
    return "\n".join(lines) or None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _gain(difference: Mapping[str, Any] | None) -> str:
    if not difference:
        return "-"
    text = f"{difference['difference']:+.1f}"
    if difference.get("low") is None:
        return text
    return f"{text} [{difference['low']:+.1f}, {difference['high']:+.1f}]"


def _score(result: Mapping[str, Any]) -> str:
    text = _percent(result.get("value"))
    if result.get("low") is None:
        return text
    return f"{text} [{result['low']:.1f}, {result['high']:.1f}]"


def _last_part(path: str) -> str:
    """Give a name that may leave this machine: of a folder here its last part.

    >>> _last_part("../data/tiny-vlm"), _last_part("Qwen/Qwen3-VL-2B-Instruct")
    ('tiny-vlm', 'Qwen/Qwen3-VL-2B-Instruct')
    """
    is_here = Path(path).exists()
    is_hub_name = not is_here and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", path)
    return path if is_hub_name else re.split(r"[/\\]", path.rstrip("/\\"))[-1]


# --- the fields, in the order of a paper ----------------------------------------------------------

FIELDS = (
    Field("model", "Model", "CLAIM 1, 22; TRIPOD-LLM: title, methods", "what it is", _model),
    Field(
        "intended_use",
        "Intended use and clinical role",
        "CLAIM 3; TRIPOD-LLM: background",
        "who shall use it, for what, and for what not",
    ),
    Field(
        "objectives",
        "Objectives and hypotheses",
        "CLAIM 4; TRIPOD-LLM: objectives",
        "what was asked before it was measured",
    ),
    Field(
        "study_design",
        "Study design and goal",
        "CLAIM 5, 6",
        "prospective or retrospective; a new model, a trial, a feasibility study",
    ),
    Field(
        "data_sources",
        "Data sources",
        "CLAIM 7; TRIPOD-LLM: data",
        "where, when, whose",
        _data_sources,
        is_part=True,
    ),
    Field("eligibility", "Eligibility", "CLAIM 8", "which patients and studies were taken"),
    Field(
        "preprocessing",
        "Preprocessing and subsets",
        "CLAIM 9, 10",
        "what else was changed before",
        _preprocessing,
        is_part=True,
    ),
    Field("definitions", "Definitions of data elements", "CLAIM 11", "what the words mean"),
    Field("deidentification", "De-identification", "CLAIM 12", "how, and how it was checked"),
    Field(
        "missing_data",
        "Missing and rejected data",
        "CLAIM 13",
        "which values are missing, and what was done",
        _left_out,
        is_part=True,
    ),
    Field(
        "reference_standard",
        "Reference standard, and who set it",
        "CLAIM 14 to 16; TRIPOD-LLM: annotation",
        "who wrote the captions, with what training, from what",
    ),
    Field(
        "annotation_agreement",
        "Annotation tools and agreement",
        "CLAIM 17, 18; TRIPOD-LLM: annotation",
        "how often two readers agree",
    ),
    Field("sample_size", "Sample size", "CLAIM 19", "how many were meant, and why so many"),
    Field(
        "partitions",
        "Partitions",
        "CLAIM 20, 21; TRIPOD-LLM: data",
        "how it was split",
        _partitions,
    ),
    Field(
        "software",
        "Software",
        "CLAIM 23; TRIPOD-LLM: compute",
        "versions of the run, and the machine",
    ),
    Field("training", "Training", "CLAIM 24, 25; TRIPOD-LLM: instruction tuning", "how", _training),
    Field(
        "model_selection", "Selection of the final model", "CLAIM 26, 27", "by what it was chosen"
    ),
    Field("prompts", "Prompts", "TRIPOD-LLM: prompting", "what it was asked", _prompts),
    Field(
        "uncertainty",
        "Metrics and uncertainty",
        "CLAIM 28, 29; TRIPOD-LLM: output",
        "what is counted, over what",
        _intervals,
    ),
    Field("robustness", "Robustness", "CLAIM 30", "other windows, scanners, noise, rotation"),
    Field(
        "explainability",
        "Does it use the picture?",
        "CLAIM 31",
        "controls, boxes, maps",
        _explained,
    ),
    Field(
        "external_validation",
        "External validation",
        "CLAIM 32; TRIPOD-LLM: performance",
        "other people, other hospitals, published benchmarks",
        _external,
        is_part=True,
    ),
    Field(
        "flow",
        "Flow and demographics",
        "CLAIM 33, 34; TRIPOD-LLM: participants",
        "age, sex, device",
    ),
    Field(
        "performance",
        "Performance, with controls",
        "CLAIM 35; TRIPOD-LLM: performance",
        "on held-out pairs",
        _performance,
    ),
    Field("diagnostic_accuracy", "Diagnostic accuracy", "CLAIM 36", "with precision", _diagnostic),
    Field("failures", "Failure cases", "CLAIM 37", "what it gets wrong, with examples"),
    Field(
        "groups", "For whom it is worse", "TRIPOD-LLM: performance", "scores by age, sex, device"
    ),
    Field(
        "limitations", "Limitations", "CLAIM 38; TRIPOD-LLM: discussion", "bias, generalisability"
    ),
    Field(
        "implications", "Implications for practice", "CLAIM 39", "what follows, and what does not"
    ),
    Field("ethics", "Ethics approval", "TRIPOD-LLM: ethical approval", "which board, which number"),
    Field("involvement", "Patients and public", "TRIPOD-LLM: involvement", "who was asked"),
    Field("updating", "Updating", "TRIPOD-LLM: updating", "when it is looked at again, by whom"),
    Field(
        "availability",
        "Registration, protocol, code and data",
        "CLAIM 40, 41; TRIPOD-LLM: open science",
        "where they can be had",
    ),
    Field("funding", "Funding", "CLAIM 42; TRIPOD-LLM: open science", "who paid, and their role"),
)
"""What the two checklists ask of a study, in the order of a paper."""


def _markdown(name: str, source: str, rows: list[_Filled]) -> str:
    own = sum(1 for row in rows if row.own)
    found = sum(1 for row in rows if row.found)
    empty = sum(1 for row in rows if row.is_empty)
    lines = [
        f"# Card of {name}",
        "",
        f"{len(rows)} fields of CLAIM and TRIPOD-LLM: {found} filled from {source}, {own} by its "
        f"makers, {empty} empty. A card with every field filled is no proof that the model may be "
        "used on patients.",
    ]
    for row in rows:
        lines += [
            "",
            f"## {row.field.title}",
            "",
            f"<sub>{row.field.asked_by}</sub>",
            "",
            row.text(),
        ]
    return "\n".join(lines) + "\n"
