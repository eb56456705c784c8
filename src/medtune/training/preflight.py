"""Looks at the data before the first step, so that no record ends a training hours later.

Of all records only the sizes of the pictures are read, and the texts where a length would cut them:
a tenth to a third of a millisecond a record. The first few are prepared as a batch. What shows only
later is raised with the id of its record. Of a stream some records are looked at so; the others
are judged when they come.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import datasets
from PIL import Image
from trl import apply_chat_template

from medtune.files import one_line

from .around import AroundCollator, rows_without
from .checks import check_image_tokens, check_labels, holds_image_tokens

# Pictures stay in their files until a batch is made of them.
UNDECODED = datasets.List(datasets.Image(decode=False))

# Rows of the batch that is looked at closely.
ROWS_IN_DETAIL = 4

# Texts that are turned into tokens at once.
TEXTS_AT_ONCE = 1000

# A text around a picture may join its tokens otherwise than another. Records that are so close to
# max_length are counted with their own text and pictures.
CLOSE = 16

Size = tuple[int, int]  # width and height in pixels


@dataclass
class RecordLength:
    """How many tokens a record has.

    Attributes
    ----------
    name : how messages call the record.
    row : its place in the data set.
    prompt : tokens of the question and its pictures.
    answer : tokens of the answer and its end.
    """

    name: str
    row: int
    prompt: int
    answer: int

    @property
    def all(self) -> int:
        """Tokens of question, pictures and answer."""
        return self.prompt + self.answer


def check_data(trainer: Any, train: datasets.Dataset, *, allow_cut_answers: bool) -> None:
    """Look at the records that a trainer will train on and evaluate with.

    Parameters
    ----------
    trainer : a `trl.SFTTrainer` on the data sets of `read_records`.
    train : the records that it trains on, or those of a stream that are to be looked at.
    allow_cut_answers : whether answers that `max_length` cuts may be learned.

    Raises
    ------
    ValueError : names the first record whose picture cannot be prepared, or whose answer would be
        cut, or the first row whose labels or image tokens are wrong.
    """
    processor = trainer.processing_class
    max_length = trainer.args.max_length
    cut_rows: set[int] = set()
    for data in (trainer.eval_dataset, train):
        if not data:
            continue
        sizes = sizes_of_pictures(data)
        refuse_odd_sizes(processor, data, sizes)
        if max_length:
            cut = find_cut(processor, data, sizes, max_length)
            refuse_cut(cut, len(data), max_length, allowed=allow_cut_answers)
            # the training data come last: the first batch is theirs
            cut_rows = {record.row for record in cut}
    _check_first_batch(trainer, train, cut_rows)


def name_of(row: dict[str, Any]) -> str:
    """Say which record a row is, for a message."""
    return f"record {row['id']!r}" if row.get("id") else "a record without id"


# ---- sizes of pictures


def sizes_of_pictures(data: datasets.Dataset) -> list[list[Size]]:
    """Read the sizes of the pictures of each record from the heads of their files."""
    sizes = []
    for row in data.select_columns(["id", "images"]).cast_column("images", UNDECODED):
        sizes.append([_size_of(picture, name_of(row)) for picture in row["images"]])
    return sizes


def _size_of(picture: dict[str, Any], name: str) -> Size:
    """Read the size of a picture from the head of its file."""
    try:
        # in a file beside the records, or in a stream the bytes themselves
        held = picture["path"] if picture["bytes"] is None else io.BytesIO(picture["bytes"])
        with Image.open(held) as opened:
            return opened.size
    except Exception as error:  # decoders raise many kinds
        raise ValueError(
            f"{name}: a picture cannot be opened ({one_line(error)}): "
            "`medtune check` lists all such records"
        ) from error


def refuse_odd_sizes(processor: Any, data: datasets.Dataset, sizes: list[list[Size]]) -> None:
    """Raise `ValueError` if the processor cannot prepare the oddest pictures of the data.

    Processors refuse pictures that are too narrow or too small: if the narrowest and the smallest
    pass, so do all others.
    """
    row_of: dict[Size, int] = {}
    for row, pictures in enumerate(sizes):
        for size in pictures:
            row_of.setdefault(size, row)
    if not row_of:
        return
    oddest = {
        max(row_of, key=lambda size: size[0] / size[1]),
        max(row_of, key=lambda size: size[1] / size[0]),
        min(row_of, key=lambda size: size[0]),
        min(row_of, key=lambda size: size[1]),
    }
    # in the order of the records, so that the first is named
    for size in sorted(oddest, key=row_of.__getitem__):
        try:
            _tokens_with_picture(processor, size)
        except Exception as error:  # processors raise many kinds
            name = name_of({"id": data["id"][row_of[size]]})
            raise ValueError(
                f"{name}: its picture of {size[0]} x {size[1]} pixels cannot be prepared "
                f"({one_line(error)}): take the record out; "
                "`medtune check` with --model lists all such records"
            ) from error


def without_odd_pictures(
    processor: Any, data: datasets.Dataset, leave_out: Callable[[int | None, object, str], None]
) -> datasets.Dataset:
    """Leave the records of a stream out whose pictures the processor cannot prepare.

    Parameters
    ----------
    processor : of the model.
    data : some records of the stream.
    leave_out : called with None, the id of each such record, and the reason.

    Raises
    ------
    ValueError : none is left.
    """
    reason_of: dict[Size, str] = {}
    good = []
    for row, sizes in enumerate(sizes_of_pictures(data)):
        for size in sizes:
            if size not in reason_of:
                reason_of[size] = _why_refused(processor, size)
        reasons = [reason_of[size] for size in sizes if reason_of[size]]
        if reasons:
            leave_out(None, data[row]["id"], f"record: {reasons[0]}")
        else:
            good.append(row)
    if not good:
        raise ValueError(
            f"none of the first {len(data)} records can be prepared: {next(iter(reason_of.values()))}"
        )
    return data.select(good)


def _why_refused(processor: Any, size: Size) -> str:
    """Say why the processor refuses pictures of a size; empty if it takes them."""
    try:
        _tokens_with_picture(processor, size)
    except Exception as error:  # processors raise many kinds
        return one_line(error)
    return ""


def _tokens_with_picture(processor: Any, size: Size) -> int:
    """Count the tokens that a picture of a size adds to its mark in the text."""
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    picture = Image.new("RGB", size)
    tokens = processor(images=[[picture]], text=[text], add_special_tokens=False)["input_ids"][0]
    return len(tokens) - len(_tokens_of([text], processor)[0])


# ---- lengths


def _tokens_of(texts: list[str], processor: Any) -> list[list[int]]:
    """Turn texts, which hold all special tokens already, into tokens."""
    return processor.tokenizer(texts, add_special_tokens=False)["input_ids"]


def find_cut(
    processor: Any, data: datasets.Dataset, sizes: list[list[Size]], max_length: int
) -> list[RecordLength]:
    """Find the records that are longer than `max_length`.

    Parameters
    ----------
    processor : of the model.
    data : records with "id", "prompt", "completion" and "images".
    sizes : of their pictures.
    max_length : most tokens of a record.
    """
    cut = []
    for record in _lengths(processor, data, sizes):
        if abs(record.all - max_length) <= CLOSE:
            record = _exact_length(processor, data[record.row], record)
        if record.all > max_length:
            cut.append(record)
    return cut


def _lengths(
    processor: Any, data: datasets.Dataset, sizes: list[list[Size]]
) -> Iterable[RecordLength]:
    """Count the tokens of all records; no picture is prepared, of each size an empty one is."""
    tokens_of_size: dict[Size, int] = {}
    texts = data.select_columns(["id", "prompt", "completion"])
    for start in range(0, len(data), TEXTS_AT_ONCE):
        rows = [texts[row] for row in range(start, min(start + TEXTS_AT_ONCE, len(data)))]
        rendered = [_rendered(row, processor) for row in rows]
        prompts = _tokens_of([text["prompt"] for text in rendered], processor)
        answers = _tokens_of([text["completion"] for text in rendered], processor)
        for place, row in enumerate(rows):
            pictures = 0
            for size in sizes[start + place]:
                if size not in tokens_of_size:
                    tokens_of_size[size] = _tokens_with_picture(processor, size)
                pictures += tokens_of_size[size]
            prompt = len(prompts[place]) + pictures
            yield RecordLength(name_of(row), start + place, prompt, len(answers[place]))


def _rendered(row: dict[str, Any], processor: Any) -> dict[str, str]:
    """Write the texts of a record as TRL's collator does: "prompt" and "completion"."""
    turns = {"prompt": row["prompt"], "completion": row["completion"]}
    return apply_chat_template(turns, processor)


def _exact_length(processor: Any, row: dict[str, Any], about: RecordLength) -> RecordLength:
    """Count the tokens of a record with its own text and pictures."""
    pictures = [_decoded(picture) for picture in row["images"]]
    text = _rendered(row, processor)["prompt"]
    # processors want None, not empty lists, where there is no picture at all
    shown = [pictures] if pictures else None
    prepared = processor(images=shown, text=[text], add_special_tokens=False)
    return RecordLength(about.name, about.row, len(prepared["input_ids"][0]), about.answer)


def refuse_cut(cut: list[RecordLength], total: int, max_length: int, *, allowed: bool) -> None:
    """Raise `ValueError` where answers would be cut, or nothing would be left of one.

    Parameters
    ----------
    cut : from `find_cut`.
    total : number of records that were looked at.
    max_length : most tokens of a record.
    allowed : whether cut answers may be learned all the same.
    """
    if not cut:
        return
    longest = max(record.all for record in cut)
    what_to_set = f"set max_length=null, or max_length={longest} or more"
    if allowed:
        for record in cut:
            if record.prompt >= max_length:
                raise ValueError(
                    f"{record.name}: max_length={max_length} leaves nothing of its answer, "
                    f"question and pictures have {record.prompt} tokens: {what_to_set}"
                )
        print(
            f"medtune train: {len(cut)} of {total} answers are cut by max_length={max_length}",
            file=sys.stderr,
        )
        return
    raise ValueError(
        f"{len(cut)} of {total} answers are cut by max_length={max_length}, the first in "
        f"{cut[0].name} of {cut[0].all} tokens: {what_to_set}; "
        "allow_cut_answers=true learns them cut"
    )


# ---- batches


def _decoded(picture: Any) -> Image.Image:
    """Decode a picture as the data set would do it; one that is decoded stays as it is."""
    if not isinstance(picture, dict):
        return picture
    return datasets.Image().decode_example(picture)


def decode_first(collate: Callable[[list[dict]], dict], rows: list[dict]) -> dict:
    """Collate rows of a stream, whose pictures are files still, by a function that wants pictures.

    Parameters
    ----------
    collate : makes a batch of rows as a data set gives them.
    rows : with pictures as bytes.
    """
    decoded = []
    for row in rows:
        decoded.append(row | {"images": [_decoded(picture) for picture in row["images"]]})
    return collate(decoded)


def _check_first_batch(trainer: Any, train: datasets.Dataset, cut_rows: set[int]) -> None:
    """Raise `ValueError` if labels or image tokens of the first samples are wrong."""
    whole = []
    for row in range(len(train)):
        if len(whole) == ROWS_IN_DETAIL:
            break
        if row not in cut_rows:
            whole.append(row)
    if not whole:
        return
    rows = [train[row] for row in whole]
    answers = [_text_of(row["completion"][-1]) for row in rows]
    # collators may change the rows they get
    batch = trainer.data_collator([dict(row) for row in rows])
    check_labels(batch, trainer.processing_class, answers)
    check_image_tokens(batch, trainer.processing_class)


def _text_of(turn: dict[str, Any]) -> str:
    return "".join(part.get("text") or "" for part in turn["content"])


class NamedRecords(AroundCollator):
    """A collator that says which record cannot be prepared.

    Parameters
    ----------
    collate : makes a batch of rows.
    processor : of the model.
    decode : whether to decode the pictures of the rows; damaged ones are named then, too.
    """

    def __init__(
        self, collate: Callable[[list[dict]], dict], processor: Any, *, decode: bool = False
    ):
        super().__init__(collate, processor)
        self._decode = decode

    def __call__(self, rows: list[dict]) -> dict:
        """Collate rows; a row with an `id` is named when it cannot be."""
        try:
            return self._prepare(rows)
        # with little memory another try makes it worse
        except MemoryError:
            raise
        except Exception:
            for row in rows:
                self._refuse_alone(row)
            raise

    def _prepare(self, rows: list[dict]) -> dict:
        plain_rows = rows_without(rows, ["id"])
        if self._decode:
            for row in plain_rows:
                row["images"] = [_decoded(picture) for picture in row["images"]]
        batch = self.collate(plain_rows)
        if holds_image_tokens(batch, self.own_processor):
            raise ValueError("the mark of a picture stands in its answer")
        check_image_tokens(batch, self.own_processor)
        return batch

    def _refuse_alone(self, row: dict) -> None:
        """Raise `ValueError` if a row cannot be prepared alone, either."""
        try:
            self._prepare([row])
        except Exception as error:  # processors raise many kinds
            raise ValueError(
                f"{name_of(row)} cannot be prepared: {one_line(error)}; "
                "`medtune check` with --model lists all such records"
            ) from error


def name_records(trainer: Any) -> None:
    """Let an `SFTTrainer` say which record cannot be prepared."""
    # TRL takes only the columns out of the data set that its own collator knows
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns.append("id")
    # `cache_features` reads no pictures, and has left them undecoded
    decode = trainer.train_dataset.features["images"].feature.decode
    if decode:
        if not isinstance(trainer.train_dataset, datasets.IterableDataset):
            _load_undecoded(trainer, "train_dataset", "get_train_dataloader")
        _load_undecoded(trainer, "eval_dataset", "get_eval_dataloader")
    trainer.data_collator = NamedRecords(
        trainer.data_collator, trainer.processing_class, decode=decode
    )


def _load_undecoded(trainer: Any, name: str, method: str) -> None:
    """Let a method of a trainer load a data set whose pictures the collator decodes.

    The trainer's own data set stays as it is: others may look at its pictures.
    """
    own = getattr(trainer, method)

    def get_dataloader(*args: Any, **kwargs: Any) -> Any:
        data = getattr(trainer, name)
        if data:
            setattr(trainer, name, data.cast_column("images", UNDECODED))
        try:
            return own(*args, **kwargs)
        finally:
            setattr(trainer, name, data)

    setattr(trainer, method, get_dataloader)
