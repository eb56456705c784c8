"""Prove an export: the file says what the model says in Transformers, or the export is not proven.

A greedy answer of llama.cpp is given to the model in Transformers, which says in one pass what it
would have written at each place. Where that is the same token every time, its own greedy answer is
the same; where the two part, the margin tells whether that was a near tie.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medtune.answers import TransformersBackend, prompt_of
from medtune.files import write_json
from medtune.models import load_base, load_processor
from medtune.scores import (
    Measure,
    compare_conditions,
    finding_scores,
    score_conditions,
    standard_scores,
)

from .engine import Engine
from .exported import PROOF, Exported, digest_of_file, read_export
from .serve import write_request
from .tensors import find_changed

# How far a log-probability of a chosen token may be from that of Transformers in float32, and how
# far ahead Transformers' own choice may be where the answers part, in nats.
NEAR = {"f32": 0.01, "f16": 0.05, "bf16": 0.3, "q8_0": 0.3}
# What Transformers answers is scored under this name.
REFERENCE = "transformers"
# The scores of notebook 05 that ask for content, and the one of the words.
MEASURES = (
    Measure("word BLEU-4", standard_scores, "bleu"),
    Measure("name right", finding_scores, "structure_exact", 100),
    Measure("place right", finding_scores, "place_exact", 100),
    Measure("entity F1", finding_scores, "f1", 100),
)


@dataclass(frozen=True)
class Compared:
    """One answer of llama.cpp beside Transformers.

    Parameters
    ----------
    id : of the sample.
    prompt_tokens : of the prompt in llama.cpp and in Transformers.
    answer : what llama.cpp says.
    transformers : what Transformers says, greedily.
    place : number of the first token where they part; None where they never do.
    margin : how much likelier Transformers finds its own token there, in nats; None where they
        never part.
    difference : largest difference of a chosen token's log-probability before that place.
    tokens : of the answer of llama.cpp.
    seconds : until it was there.
    """

    id: str
    prompt_tokens: tuple[int, int]
    answer: str
    transformers: str
    place: int | None
    margin: float | None
    difference: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Judged:
    """What Transformers makes of an answer of llama.cpp.

    Parameters
    ----------
    prompt_tokens : of the prompt.
    logs : log-probability of each token of the answer, up to the place where they part.
    place, margin : see `Compared`.
    answer : its own greedy answer; None where it is the same.
    """

    prompt_tokens: int
    logs: list[float]
    place: int | None
    margin: float | None
    answer: str | None


@dataclass(frozen=True)
class Scoring:
    """How answers are scored.

    Parameters
    ----------
    references : what the answers should be.
    measures : what is measured.
    groups : the patient or block of each sample; None without intervals.
    slices : the slice of each sample, for samples of one patient; None where they have none.
    seed : of the resamples.
    """

    references: list[str]
    measures: Sequence[Measure]
    groups: list[str] | None
    slices: list[Any] | None
    seed: int


def check_export(  # noqa: PLR0913 - each is a setting of its own, given by keyword
    export: Exported | str | os.PathLike,
    model: str | os.PathLike,
    dataset: Any,
    *,
    samples: int = 20,
    types: Sequence[str] | None = None,
    base: str | os.PathLike | None = None,
    measures: Sequence[Measure] = MEASURES,
    max_new_tokens: int = 160,
    threads: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare an export with the model in Transformers, and say whether it is proven.

    A type is proven where all of this holds: the files are those that were written; each prompt has
    as many tokens; each greedy answer is the same or parts at a near tie; no log-probability of a
    chosen token is far off; the tensors that the training changed are found in the file with their
    new values; and no score is lower by more than its interval. The result also goes to proof.json
    in the folder of the export, which a server reads.

    Parameters
    ----------
    export : from `export_gguf`, or its folder.
    model : the merged model that was exported.
    dataset : held-out records or pairs, as for `generate_answers`; its first `samples` are asked.
    samples : how many.
    types : those to check; by default all that were exported.
    base : the base model before tuning: then it is checked that the training is in the file.
    measures : scores of the answers, where the samples have references. Columns `group` and `slice`
        make their intervals.
    max_new_tokens : longest answer.
    threads : of llama.cpp.
    seed : of the resamples.

    Returns
    -------
    dict : "samples"; "scores" of Transformers; and in "types" for each type "proven", "why_not" (a
        list of reasons), "same_answers", "same_prompts", "partings", "largest_difference",
        "tensors", "scores", "scores_less_transformers", "answers" and, under "timing", tokens a
        second, a second of CPU time, and megabytes of memory.

    Raises
    ------
    ValueError : no samples, or a type that was not exported.
    OSError : a model or file cannot be loaded.
    ImportError : the extra `gguf` is not installed.

    Examples
    --------
    >>> proof = check_export("export", "merged", test, base="tiny-vlm")  # doctest: +SKIP
    >>> proof["types"]["f16"]["proven"]  # doctest: +SKIP
    True
    """
    if not isinstance(export, Exported):
        export = read_export(export)
    rows = [dataset[number] for number in range(min(samples, len(dataset)))]
    if not rows:
        raise ValueError("there is no sample to compare answers on")
    rows = [{**row, "id": str(row.get("id", number))} for number, row in enumerate(rows)]
    teacher = Teacher(model, max_new_tokens)
    changed = _digests_that_differ(export)
    compared: dict[str, list[Compared]] = {}
    proof: dict[str, Any] = {"model": export.name, "samples": len(rows), "types": {}}
    for type in types or export.files:
        with Engine(export, type, threads=threads) as engine:
            start = engine.seconds()
            compared[type] = [teacher.compare(engine, row) for row in rows]
            timing = _timing(compared[type], engine.seconds() - start, engine.memory())
        proof["types"][type] = {**_summary(compared[type]), "timing": timing}
        if base is not None:
            found = find_changed(export, type, teacher.model, base)
            proof["types"][type]["tensors"] = found
    _add_scores(proof, compared, _scoring(rows, measures, seed))
    for type, result in proof["types"].items():
        result["why_not"] = changed + _reasons(result, NEAR[type])
        result["proven"] = not result["why_not"]
    _write_proof(export, proof)
    return proof


class Teacher:
    """The model in Transformers, in float32, that knows what it would have said.

    Parameters
    ----------
    folder : of the merged model.
    max_new_tokens : longest answer.
    """

    def __init__(self, folder: str | os.PathLike, max_new_tokens: int) -> None:
        self.processor = load_processor(folder)
        self.model = load_base(folder)
        self.max_new_tokens = max_new_tokens
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        self.backend = TransformersBackend(self.model, self.processor, options, None)
        # by sample and answer
        self.judged: dict[tuple, Judged] = {}

    def compare(self, engine: Engine, row: Mapping[str, Any]) -> Compared:
        """Ask llama.cpp about a sample, and say where Transformers would have gone on otherwise."""
        prompt = prompt_of(row)
        messages = [_in_parts(message) for message in prompt.messages]
        request = write_request(
            engine.export,
            messages,
            prompt.pictures,
            max_tokens=self.max_new_tokens,
            temperature=0,
            logprobs=True,
        )
        start = time.perf_counter()
        reply = engine.complete(request)
        seconds = time.perf_counter() - start
        choice = reply["choices"][0]
        chosen = choice["logprobs"]["content"]
        tokens = [entry["id"] for entry in chosen]
        key = (row["id"], choice["finish_reason"], *tokens)
        # another type often says the same
        if key not in self.judged:
            inputs = self.inputs(messages, prompt.pictures)
            self.judged[key] = self.judge(inputs, tokens, choice["finish_reason"] == "stop")
        judged = self.judged[key]
        pairs = zip(judged.logs, chosen, strict=False)
        differences = [abs(log - entry["logprob"]) for log, entry in pairs]
        answer = choice["message"]["content"].strip()
        return Compared(
            id=row["id"],
            prompt_tokens=(reply["usage"]["prompt_tokens"], judged.prompt_tokens),
            answer=answer,
            transformers=answer if judged.answer is None else judged.answer,
            place=judged.place,
            margin=judged.margin,
            difference=max(differences, default=0.0),
            tokens=len(tokens),
            seconds=seconds,
        )

    def judge(self, inputs: Any, tokens: list[int], ended: bool) -> Judged:
        """Say what Transformers makes of an answer."""
        logs = self.log_probabilities(inputs, tokens)
        place, margin = self.parting(logs, tokens, ended)
        shared = len(tokens) if place is None else min(place, len(tokens))
        return Judged(
            prompt_tokens=inputs["input_ids"].shape[1],
            logs=[logs[number, tokens[number]].item() for number in range(shared)],
            place=place,
            margin=margin,
            answer=None if place is None else self.backend.answer([inputs], 0)[0].text,
        )

    def inputs(self, messages: list[dict[str, Any]], pictures: Sequence[Any]) -> Any:
        """Prepare a prompt as in training."""
        text = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        images = [list(pictures)] if pictures else None
        return self.processor(text=[text], images=images, return_tensors="pt")

    def log_probabilities(self, inputs: Mapping[str, Any], tokens: list[int]) -> torch.Tensor:
        """Compute those of all tokens at each place of an answer, and behind it: one more place."""
        width = inputs["input_ids"].shape[1]
        answer = torch.tensor([tokens], dtype=torch.long)
        full = {}
        for name, tensor in inputs.items():
            full[name] = tensor
            if tensor.shape == inputs["input_ids"].shape:
                # the answer is text: its mask is 1, and the type of its tokens is 0
                more = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
                more = more.get(name, torch.zeros_like(answer))
                full[name] = torch.cat([tensor, more.to(tensor.dtype)], dim=1)
        with torch.inference_mode():
            logits = self.model(**full).logits[0, width - 1 :]
        return logits.float().log_softmax(-1)

    def parting(
        self, logs: torch.Tensor, tokens: list[int], ended: bool
    ) -> tuple[int | None, float | None]:
        """Find the first place where Transformers takes another token, and its margin there."""
        for place, token in enumerate(tokens):
            best = int(logs[place].argmax())
            if best != token:
                return place, (logs[place, best] - logs[place, token]).item()
        ends = sorted(self.backend.end_tokens)
        last = logs[len(tokens)]
        # llama.cpp may or may not list the end token among the chosen ones
        unlisted_end = ended and not (tokens and tokens[-1] in ends)
        if unlisted_end and int(last.argmax()) not in ends:
            return len(tokens), (last.max() - last[ends].max()).item()
        return None, None


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Give a message whose content is a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = []
    for part in content:
        text = part.get("text")
        parts.append(
            {"type": "image"} if part["type"] == "image" else {"type": "text", "text": text}
        )
    return {"role": message["role"], "content": parts}


def _digests_that_differ(export: Exported) -> list[str]:
    """Name the files that are not those that were written."""
    reasons = []
    for name, digest in export.digests.items():
        if digest_of_file(export.folder / name) != digest:
            reasons.append(f"{name} is not the file that was written")
    return reasons


def _summary(compared: Sequence[Compared]) -> dict[str, Any]:
    """Sum up the answers of one type."""
    partings = []
    for one in compared:
        if one.place is not None:
            partings.append({"id": one.id, "place": one.place, "margin": round(one.margin, 4)})
    same_prompts = [one for one in compared if one.prompt_tokens[0] == one.prompt_tokens[1]]
    return {
        "same_prompts": len(same_prompts),
        "same_answers": len(compared) - len(partings),
        "samples": len(compared),
        "partings": partings,
        "largest_difference": max(one.difference for one in compared),
        "answers": [one.answer for one in compared],
    }


def _timing(compared: Sequence[Compared], cpu_seconds: float, memory: int) -> dict[str, float]:
    tokens = sum(one.tokens for one in compared)
    seconds = sum(one.seconds for one in compared)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "tokens_per_cpu_second": tokens / max(cpu_seconds, 1e-9),
        "memory_mb": memory / 1e6,
    }


def _scoring(rows: Sequence[Mapping[str, Any]], measures: Sequence[Measure], seed: int) -> Scoring:
    """Take from the samples what scores and their intervals need."""
    groups = [row.get("group") for row in rows]
    slices = [row.get("slice") for row in rows]
    return Scoring(
        references=[prompt_of(row).reference for row in rows],
        measures=measures,
        groups=None if None in groups else [str(group) for group in groups],
        slices=None if None in slices else slices,
        seed=seed,
    )


def _add_scores(
    proof: dict[str, Any], compared: Mapping[str, Sequence[Compared]], scoring: Scoring
) -> None:
    """Score the answers of each type and of Transformers, and their differences."""
    proof["scores"] = {}
    if not all(scoring.references):
        return
    first = next(iter(compared.values()))
    answers = {REFERENCE: [one.transformers for one in first]}
    for type, ones in compared.items():
        answers[type] = [one.answer for one in ones]
    drawn = {"groups": scoring.groups, "slices": scoring.slices, "seed": scoring.seed}
    scored = score_conditions(answers, scoring.references, scoring.measures, **drawn)
    theirs = scored[REFERENCE]
    proof["scores"] = theirs.results
    known = [name for name, found in theirs.results.items() if found["value"] is not None]
    for type in compared:
        result = proof["types"][type]
        result["scores"] = scored[type].results
        result["scores_less_transformers"] = {}
        # without groups there is no interval, and nothing to compare by
        if scoring.groups is not None:
            result["scores_less_transformers"] = compare_conditions(
                scored[type], theirs, known, **drawn
            )


def _reasons(result: Mapping[str, Any], near: float) -> list[str]:
    """Say why a type is not proven; an empty list where it is."""
    reasons = []
    other_prompts = result["samples"] - result["same_prompts"]
    if other_prompts:
        reasons.append(
            f"{other_prompts} of {result['samples']} prompts have another number of tokens: other "
            "limits of pictures, or another chat template"
        )
    far = [parting for parting in result["partings"] if parting["margin"] > near]
    if far:
        reasons.append(
            f"{len(far)} of {result['samples']} answers part from Transformers where it is sure "
            f"(margin over {near} nats), the first is {far[0]['id']} at token {far[0]['place']}"
        )
    if result["largest_difference"] > near:
        reasons.append(
            f"a log-probability is off by {result['largest_difference']:.2f} nats (at most {near})"
        )
    missing = result.get("tensors", {}).get("missing", [])
    if missing:
        reasons.append(f"{len(missing)} tensors of the training are not found, as {missing[0]}")
    if "tensors" in result and not result["tensors"]["changed"]:
        reasons.append("the model is no other than the base: there is no training to find")
    for name, found in result.get("scores_less_transformers", {}).items():
        if found.get("high") is not None and found["high"] < 0:
            reasons.append(f"{name} is lower by {-found['difference']:.1f}, beyond its interval")
    return reasons


def _write_proof(export: Exported, proof: Mapping[str, Any]) -> None:
    """Write what was found beside the files that it is about."""
    types = {}
    for type, result in proof["types"].items():
        # answers speak of patients: they stay out of a folder that goes elsewhere
        types[type] = {key: value for key, value in result.items() if key != "answers"}
        types[type]["partings"] = [
            {"place": parting["place"], "margin": parting["margin"]}
            for parting in result["partings"]
        ]
        types[type]["why_not"] = [reason.split(", the first is")[0] for reason in result["why_not"]]
    kept = {**proof, "types": types, "digests": export.digests}
    write_json(Path(export.folder) / PROOF, kept)
