"""Batches to train three tasks: records become questions to answer or statements to verify.

Some statements come with a wrong picture. What belongs to the prompt, to the picture and to the
statement is marked token by token, because the heads of the model look at one of them at a time.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from medtune.captions import parse_caption
from medtune.models import image_token_id, mark_words, weigh_tokens

# Kinds of tokens that the heads look at; 0 is all the rest: padding, an answer, the template's own
# words behind the statement.
PROMPT = 1
IMAGE = 2
STATEMENT = 3

# Label of a token from which nothing is learned, as in all of Transformers.
IGNORED = -100
# Match of a sample without a statement.
NO_MATCH = -1
# A character for private use, which no text of a record has. It stands for statement and answer
# while the chat template is rendered.
MARK = "\ue000"

# What is asked where no structure is named: the published prompt of R3, whose pictures were all
# ultrasound images. The line break is published, too.
REGION_QUESTION = (
    "Describe the abnormality in the {modality} image.\nFocus on the region of interest."
)
# Stands for a modality that neither the record nor its answer names.
UNKNOWN_MODALITY = "medical"

# Between two sentences; a full stop ends one only before a space, as in "3.2 cm. No mass."
_SENTENCE_ENDS = re.compile(r"(?<=[。！；;\n])|(?<=[.!?？])(?=\s)")

# What a record is about: the structure, and its findings in alphabetical order.
Finding = tuple[str, tuple[str, ...]]


def statement_of(answer: str) -> str:
    """Shorten an answer to what is to be verified.

    That is the structure and what is said of findings; where neither can be told, all of it.

    Examples
    --------
    >>> place = "The region, in the upper left of the image, shows the left kidney."
    >>> statement_of(place + " No cyst is seen within it.")
    'left kidney: No cyst is seen within it.'
    """
    caption = parse_caption(answer)
    parts = [part for part in (caption.structure, caption.target_diag) if part]
    return ": ".join(parts) or answer


def finding_of(row: Mapping[str, Any]) -> Finding:
    """Say what a record is about: its structure and its findings.

    The structure is that of the column `structure`, else what `medtune.captions` reads. Two records
    of which neither can be said are about the same thing only if their answers are equal.

    Examples
    --------
    >>> answer = {"content": [{"type": "text", "text": "A cyst is seen."}]}
    >>> finding_of({"structure": "liver", "completion": [answer]})
    ('liver', ('cyst',))
    """
    answer = _answer_of(row)
    caption = parse_caption(answer)
    structure = row.get("structure") or caption.structure
    findings = tuple(sorted(caption.findings))
    if structure:
        return structure, findings
    if findings:
        return "", findings
    return answer, findings


def question_of(
    row: Mapping[str, Any], question: str = "", region_question: str = REGION_QUESTION
) -> str:
    """Say what is asked about a record.

    Parameters
    ----------
    row : a record.
    question : asked instead of the record's own; ``{structure}`` and ``{modality}`` in it become
        what the record is about, by its columns or, without them, by its answer.
    region_question : asked instead where `question` wants a structure and none is named: it speaks
        of the region of interest.

    Returns
    -------
    str : the question.

    Examples
    --------
    >>> row = {"structure": "liver", "modality": "CT"}
    >>> row["completion"] = [{"content": [{"type": "text", "text": "A cyst."}]}]
    >>> question_of(row, "Where is the {structure}?")
    'Where is the liver?'
    >>> question_of(row | {"structure": None}, "Where is the {structure}?")
    'Describe the abnormality in the CT image.\\nFocus on the region of interest.'
    """
    if not question:
        # the picture may stand behind the text as well as before it
        parts = row["prompt"][-1]["content"]
        return "".join(part["text"] for part in parts if part["type"] == "text")
    caption = parse_caption(_answer_of(row))
    structure = row.get("structure") or caption.structure
    if "{structure}" in question and not structure:
        question = region_question
    modality = row.get("modality") or caption.modality or UNKNOWN_MODALITY
    return question.replace("{structure}", structure or "").replace("{modality}", modality)


def diagnosis_spans(answer: str, target_diag: str | None = None) -> list[tuple[int, int]]:
    """Find the words of an answer that name the disease.

    Parameters
    ----------
    answer : the text.
    target_diag : the words that carry the diagnosis, if they are known; by default what
        `medtune.captions` reads. They need not stand together in the answer.

    Returns
    -------
    list of (int, int) : first character of each stretch, and the one behind it; empty where the
        words do not stand in the answer.

    Examples
    --------
    >>> diagnosis_spans("A CT scan. A cyst is seen.")
    [(11, 26)]
    """
    for words in (target_diag, parse_caption(answer).target_diag):
        pieces = [words] if words and words in answer else _SENTENCE_ENDS.split(words or "")
        spans = []
        for piece in pieces:
            start = answer.find(piece.strip())
            if piece.strip() and start >= 0:
                spans.append((start, start + len(piece.strip())))
        if spans:
            return spans
    return []


def check_box(box: Sequence[float] | None, name: str = "a row") -> list[float] | None:
    """Return a box as four numbers, or None where there is none.

    Parameters
    ----------
    box : (x0, y0, x1, y1) as shares of the picture, or nothing.
    name : what the message calls the row.

    Raises
    ------
    ValueError : several boxes, coordinates outside 0..1 or not finite, or in the wrong order.

    Examples
    --------
    >>> check_box((0, 0, 0.5, 1))
    [0.0, 0.0, 0.5, 1.0]
    """
    if box is None:
        return None
    edges = np.ravel(box).astype(float).tolist()
    if not edges:
        return None
    if not _is_box(edges):
        raise ValueError(
            f"{name} has the box {box}, not x0 < x1, y0 < y1 in 0..1; "
            "of several boxes make several rows"
        )
    return edges


def _is_box(edges: Sequence[float]) -> bool:
    if len(edges) != 4:
        return False
    x0, y0, x1, y1 = edges
    return 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


def ask(question: str) -> list[dict[str, Any]]:
    """Put a question about a picture as the messages that training and inference share.

    Examples
    --------
    >>> ask("Where is the liver?")[0]["content"]
    [{'type': 'image'}, {'type': 'text', 'text': 'Where is the liver?'}]
    """
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def _answer_of(row: Mapping[str, Any]) -> str:
    return row["completion"][-1]["content"][0]["text"]


@dataclass(frozen=True)
class Target:
    """What the heads learn from a sample.

    Parameters
    ----------
    region : the box into which the match head looks; four NaN for the one that is predicted.
    box : the box to learn; four NaN for none.
    match : 1 if picture and statement belong together, 0 if not, -1 for no statement.
    """

    region: list[float]
    box: list[float]
    match: int


@dataclass(frozen=True)
class Sample:
    """A picture and a question, with a statement to verify, an answer to learn, or neither.

    Parameters
    ----------
    image : the picture that is shown.
    question : what is asked.
    statement : what is to be verified; "" for nothing.
    answer : what is to be learned; "" for nothing. Beside a statement it is left out: behind its
        own statement an answer would be copied.
    target : what the heads learn; None where nothing is learned.
    stressed : stretches of the answer, in characters, whose tokens weigh more in the loss.
    stress : how many times as much as the others.
    """

    image: Image.Image
    question: str
    statement: str = ""
    answer: str = ""
    target: Target | None = None
    stressed: Sequence[tuple[int, int]] = ()
    stress: float = 1.0


@dataclass(frozen=True)
class _Rendered:
    """The text of a sample, and where its pieces begin.

    The places are counted in characters from the end of the text: a processor writes many image
    tokens where the text has one, all of them in front of these pieces, so only the distance from
    the end stays.

    Parameters
    ----------
    text : question, statement or answer in the chat template.
    statement : where the statement begins.
    reply : where the template goes on behind the statement, to begin the reply.
    answer : where the answer begins.
    """

    text: str
    statement: int
    reply: int
    answer: int


def _render(processor: Any, sample: Sample) -> _Rendered:
    """Write a sample in the chat template."""
    reply = {"role": "assistant", "content": [{"type": "text", "text": MARK}]}
    messages = [*ask(sample.question + MARK), reply]
    text = processor.apply_chat_template(messages, tokenize=False)
    question, reply_begins, answer_ends = text.split(MARK)
    statement = f"\n{sample.statement}" if sample.statement else ""
    answer = sample.answer + answer_ends if sample.answer and not sample.statement else ""
    from_answer = len(answer)
    from_reply = len(reply_begins) + from_answer
    from_statement = len(statement) + from_reply
    text = question + statement + reply_begins + answer
    return _Rendered(text, from_statement, from_reply, from_answer)


def encode(processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Make a batch of samples, padded on the right.

    Parameters
    ----------
    processor : of the base model; its tokenizer must be a fast one, which tells where tokens stand.
    samples : all of them with a `target`, or none.

    Returns
    -------
    dict : what the processor makes of it, and, of shape (rows, tokens), `labels`, -100 but for an
        answer and its end, and `token_kinds`, which tells the heads what belongs to prompt, picture
        and statement. With targets also `regions` and `boxes`, (rows, 4), and `matches`, (rows,).
        If a sample stresses words, also `token_weights`, (rows, tokens), whose mean over the tokens
        that a row learns is 1.
    """
    rendered = [_render(processor, sample) for sample in samples]
    batch = dict(
        processor(
            images=[[sample.image.convert("RGB")] for sample in samples],
            text=[one.text for one in rendered],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_offsets_mapping=True,
        )
    )
    ids = batch["input_ids"]
    mask = batch["attention_mask"]
    # (rows, tokens) each: where a token begins and ends in the text, in characters
    starts, ends = batch.pop("offset_mapping").unbind(-1)
    to_the_end = ends.amax(1, keepdim=True) - starts  # characters from a token to the text's end

    # each of these reaches to the end of the text, so the later ones take from the earlier ones
    in_statement = to_the_end <= _column([one.statement for one in rendered])
    in_reply = to_the_end <= _column([one.reply for one in rendered])
    in_answer = to_the_end <= _column([one.answer for one in rendered])
    kinds = torch.where(ids == image_token_id(processor), IMAGE, PROMPT)
    kinds = kinds.masked_fill(in_statement, STATEMENT).masked_fill(in_reply, 0)
    # padding claims to stand where the text begins: the mask takes it out
    batch["labels"] = ids.masked_fill(~in_answer | (mask == 0), IGNORED)
    batch["token_kinds"] = kinds * mask

    if any(sample.stress != 1 and sample.stressed for sample in samples):
        # where a token begins and ends in its answer, in characters
        from_answer = _column([one.answer for one in rendered])
        begins = from_answer - to_the_end
        batch["token_weights"] = _weigh_answers(
            samples, batch["labels"] != IGNORED, begins, begins + ends - starts
        )

    targets = [sample.target for sample in samples if sample.target is not None]
    if targets:
        batch["regions"] = torch.tensor([target.region for target in targets])
        batch["boxes"] = torch.tensor([target.box for target in targets])
        batch["matches"] = torch.tensor([target.match for target in targets])
    return batch


def _weigh_answers(
    samples: Sequence[Sample], learned: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Weigh the tokens of answers, see `medtune.models.weigh_tokens`.

    `begins` and `ends`, (rows, tokens), say where a token stands in its answer, in characters.
    """
    stressed = []
    for row, sample in enumerate(samples):
        stressed.append(mark_words(begins[row], ends[row], sample.stressed))
    stress = _column([sample.stress for sample in samples])
    return weigh_tokens(torch.stack(stressed), learned, stress)


def _column(numbers: Sequence[float]) -> torch.Tensor:
    return torch.tensor(numbers)[:, None]


@dataclass
class MultiTaskCollator:
    """Turn records into a batch in which some are to be verified, a part with a wrong picture.

    A record has `prompt`, `completion`, one picture in `images`, and may have `id`, `roi` (its
    box), `structure`, and `shows`: all structures to be seen in its picture. A wrong picture is
    never one with the same structure and finding, nor one that shows the structure.

    A batch is one of `encode` with targets: `regions`, where the match head looks, is the true box
    of the picture that is shown, or NaN for the predicted one.

    Parameters
    ----------
    processor : of the base model.
    question, region_question : asked instead of a record's own, see `question_of`.
    negative_ratio : chance of a record to get a statement and a wrong picture.
    verify_ratio : chance of a record to get a statement and its own picture. Each record is drawn
        for itself, so both ratios are exact in expectation for any batch size.
    predicted_ratio : chance that the match head looks into the box that is predicted, as it does at
        inference, and not into the true one.
    diagnosis_weight : how many times as much the words of an answer that name the disease weigh in
        the loss of the text; see `diagnosis_spans`. The weight of a whole answer stays.
    hard_negatives : take wrong pictures of the same structure with another finding, where there are
        any.
    pool : records to take wrong pictures from; by default those of the batch. A record that finds
        none stays right.
    seed, epoch : with a record's `id` they decide what becomes of it, whatever the number of
        workers.

    Raises
    ------
    ValueError : a ratio below 0, or both above 1 together; a weight that is not above 0; in a
        batch, a record with several pictures or an impossible box.
    """

    processor: Any
    question: str = ""
    region_question: str = REGION_QUESTION
    negative_ratio: float = 0.3
    verify_ratio: float = 0.3
    predicted_ratio: float = 0.5
    diagnosis_weight: float = 1.0
    hard_negatives: bool = False
    pool: Any = ()
    seed: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        lowest = min(self.negative_ratio, self.verify_ratio)
        if lowest < 0 or self.negative_ratio + self.verify_ratio > 1:
            raise ValueError(
                "negative_ratio and verify_ratio must not be below 0, nor above 1 together"
            )
        if self.diagnosis_weight <= 0:
            raise ValueError(f"diagnosis_weight={self.diagnosis_weight}: must be above 0")
        light = self.pool
        if hasattr(light, "remove_columns"):  # a data set would decode each picture
            light = light.remove_columns("images")
        self._known = [_Content.of(row) for row in light]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of tensors."""
        samples = [self._sample(row, rows) for row in rows]
        return encode(self.processor, samples)

    def _sample(self, row: Mapping[str, Any], batch: Sequence[Mapping[str, Any]]) -> Sample:
        """Draw what becomes of a record."""
        answer = _answer_of(row)
        # a generator of its own: neither the batch nor the worker may change what is drawn
        rng = random.Random(f"{self.seed} {self.epoch} {row.get('id') or answer}")
        draw = rng.random() - self.negative_ratio  # below 0: a negative
        verify = draw < self.verify_ratio
        wrong = self._wrong(row, batch, rng) if draw < 0 else None

        shown = row if wrong is None else wrong
        name = f"row {shown.get('id')}"
        if len(shown["images"]) != 1:
            raise ValueError(f"{name} has {len(shown['images'])} pictures: the heads judge one")
        box = check_box(shown.get("roi"), name)
        nothing = [np.nan] * 4
        target = Target(
            region=box if box and rng.random() >= self.predicted_ratio else nothing,
            # the question names a structure that a wrong picture need not show
            box=box if box and wrong is None else nothing,
            match=int(wrong is None) if verify else NO_MATCH,
        )
        spans = []
        if not verify and self.diagnosis_weight != 1:
            spans = diagnosis_spans(answer, row.get("target_diag"))
        return Sample(
            image=shown["images"][0],
            question=question_of(row, self.question, self.region_question),
            statement=statement_of(answer) if verify else "",
            answer="" if verify else answer,
            target=target,
            stressed=spans,
            stress=self.diagnosis_weight,
        )

    def _wrong(
        self, row: Mapping[str, Any], batch: Sequence[Mapping[str, Any]], rng: random.Random
    ) -> Mapping[str, Any] | None:
        """Draw a record whose picture does not show what this record is about; None without one."""
        records = self.pool
        known = self._known
        if not known:
            records = batch
            known = [_Content.of(other) for other in batch]
        own = finding_of(row)
        structure, _ = own
        fits = []
        if self.hard_negatives:
            fits = [
                number
                for number, other in enumerate(known)
                if other.finding != own and other.finding[0] == structure
            ]
        if not fits:
            fits = [
                number
                for number, other in enumerate(known)
                if other.finding != own and structure not in other.shows
            ]
        if not fits:
            return None
        return records[rng.choice(fits)]


@dataclass(frozen=True)
class _Content:
    """What is known of the picture of a record.

    Parameters
    ----------
    finding : what the record is about, see `finding_of`.
    shows : all structures to be seen in the picture, as far as the record says so.
    """

    finding: Finding
    shows: Sequence[str]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "_Content":
        return cls(finding_of(row), row.get("shows") or ())
