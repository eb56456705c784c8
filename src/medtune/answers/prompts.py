"""What the model is asked: rows of a data set become prompts, and prompts become inputs of a model.

A row is a converted record (`prompt`, `completion`, `images`) or a pair (`image`, `caption`).
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image

from medtune.files import one_line
from medtune.pairs import names_group

# What is asked where neither the caller nor the row has a question.
DEFAULT_QUESTION = "Describe this medical image."

# One image token of Qwen3-VL stands for 32 x 32 pixels. For other models this is a rough figure,
# which is enough to sort prompts by length.
PIXELS_PER_TOKEN = 1024
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Prompt:
    """One question to the model.

    Parameters
    ----------
    messages : the conversation so far, for the chat template; the last message holds the question.
    pictures : the pictures that the messages refer to, in order: PIL, or a dict of `bytes` and
        `path` where the data set was not decoded.
    reference : the answer that the model's own is compared with; may be empty.
    """

    messages: list[dict[str, Any]]
    pictures: list[Any]
    reference: str


def prompt_of(row: Mapping[str, Any], question: str | None = None) -> Prompt:
    """Take the prompt from a converted record, or ask about the picture of a pair.

    Parameters
    ----------
    row : record or pair; without `completion` or `caption` its reference is empty.
    question : what a pair is asked; by default its own `question`, or to describe the picture.

    Examples
    --------
    >>> prompt = prompt_of({"image": "a picture", "caption": "A normal liver."}, "What is it?")
    >>> prompt.messages[0]["content"]
    [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]
    >>> prompt.reference
    'A normal liver.'
    """
    if "prompt" in row:
        completion = row.get("completion")
        reference = text_of(completion[-1]) if completion else ""
        return Prompt(row["prompt"], row.get("images") or [], reference)
    pictures = []
    if row.get("image") is not None:
        pictures.append(row["image"])
    asked = question or row.get("question") or DEFAULT_QUESTION
    content = [{"type": "image"} for _ in pictures]
    content.append({"type": "text", "text": asked})
    messages = [{"role": "user", "content": content}]
    return Prompt(messages, pictures, row.get("caption") or "")


def text_of(message: Mapping[str, Any]) -> str:
    """Join the text of a message, whose content is a text or a list of parts.

    Examples
    --------
    >>> text_of({"content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]})
    'What is it?'
    """
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def undecoded(dataset: Any) -> Any:
    """Give the rows of a data set with their pictures as bytes or paths.

    Whoever wants only text, sizes or bytes saves the time to decode each picture. A list of dicts
    stays as it is.
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    as_file = datasets.Image(decode=False)
    if "image" in dataset.column_names:
        dataset = dataset.cast_column("image", as_file)
    if "images" in dataset.column_names:
        dataset = dataset.cast_column("images", datasets.List(as_file))
    return dataset


@dataclass(frozen=True)
class Survey:
    """What is known of a data set before the first question is asked.

    Parameters
    ----------
    samples : for each row a dict of "id", "question", "reference" and, where they are known, "group"
        and "slice", all of them texts.
    lengths : for each row about how many tokens its prompt has, image tokens included.
    digest : SHA-256 of all prompts, references and pictures: the same for the same data only.
    """

    samples: list[dict[str, str]]
    lengths: list[int]
    digest: str


def survey_rows(dataset: Any, processor: Any, question: str | None) -> Survey:
    """Read through a data set once.

    Parameters
    ----------
    dataset : `datasets.Dataset` or list of dicts.
    processor : processor of the model, with its tokenizer and chat template; None for a model that
        a server has.
    question : what pairs are asked, see `prompt_of`; records bring their own question.

    Raises
    ------
    ValueError : there is no row, or an id occurs more than once.
    """
    samples = []
    texts = []
    areas = []
    digest = hashlib.sha256()
    for number, row in enumerate(undecoded(dataset)):
        prompt = prompt_of(row, question)
        name = row.get("id")
        sample = {
            "id": str(number if name is None else name),
            "question": text_of(prompt.messages[-1]),
            "reference": prompt.reference,
        }
        text = render(processor, prompt.messages)
        # the digest stands in settings files of runs that may go on: its ingredients and their
        # order must stay
        digest.update(json.dumps([sample, text]).encode())
        if names_group(row.get("group")):
            # scores resample patients, so an answer says whose it is
            sample["group"] = str(row["group"])
        if row.get("slice") is not None:
            # of one patient they resample slices
            sample["slice"] = str(row["slice"])
        area = 0
        for picture in prompt.pictures:
            pixels, content = _measure(picture)
            area += pixels
            digest.update(content)
        samples.append(sample)
        texts.append(text)
        areas.append(area)
    _check_ids(samples)
    lengths = []
    for tokens, area in zip(_token_counts(processor, texts), areas, strict=True):
        lengths.append(tokens + area // PIXELS_PER_TOKEN)
    return Survey(samples, lengths, digest.hexdigest())


def _token_counts(processor: Any, texts: list[str]) -> list[int]:
    """Count the tokens of texts, roughly where only a server has the tokenizer."""
    if processor is None:
        return [len(text) // CHARACTERS_PER_TOKEN for text in texts]
    return [len(ids) for ids in processor.tokenizer(texts)["input_ids"]]


def render(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """Write messages as the text that the model continues with its answer.

    A server has a template of its own: without a processor the messages stand for themselves.
    """
    if processor is None:
        return json.dumps(messages)
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _measure(picture: Any) -> tuple[int, bytes]:
    """Return how many pixels a picture has, and the bytes that tell it from others."""
    if isinstance(picture, Mapping):
        content = picture["bytes"] or Path(picture["path"]).read_bytes()
        opened = Image.open(io.BytesIO(content))  # reads the header only
        return opened.width * opened.height, content
    return picture.width * picture.height, picture.tobytes()


def _check_ids(samples: Sequence[Mapping[str, str]]) -> None:
    """Refuse an empty data set and ids that repeat: answers on file are known by their ids."""
    if not samples:
        raise ValueError("there is no sample to answer")
    counts = Counter(sample["id"] for sample in samples)
    for name, times in counts.items():
        if times > 1:
            raise ValueError(f"id {name!r} occurs more than once")


@dataclass
class Preparer:
    """Makes the inputs of a part of a batch; a data loader calls it, maybe in worker processes.

    Parameters
    ----------
    dataset : rows with decoded pictures.
    processor : processor of the model; None makes requests for a server, which has its own.
    donors : for each row the row whose pictures it is shown; its own number where nothing is
        exchanged.
    image_transform : function of a PIL picture that returns the one to show, or None for no
        picture.
    question : what pairs are asked.
    dtype : type of the model's weights, which the pixels take; None makes requests for vLLM instead
        of tensors.
    begun : for each row the words that its answer has begun with; None where no answer has.
    """

    dataset: Any
    processor: Any
    donors: Sequence[int]
    image_transform: Callable | None
    question: str | None
    dtype: torch.dtype | None
    begun: Sequence[str] | None = None

    def __call__(self, rows: Iterable[int]) -> Any:
        """Make the inputs of these rows: a padded batch of tensors, or requests of vLLM or a server."""
        rows = list(rows)
        if self.processor is None:
            return [self._server_request(row) for row in rows]
        texts = []
        images = []
        for row in rows:
            messages, pictures = self._shown(row)
            text = render(self.processor, messages)
            texts.append(text if self.begun is None else text + self.begun[row])
            images.append(pictures)
        if self.dtype is None:
            return _vllm_requests(texts, images)
        try:
            return self._inputs(texts, images)
        except ValueError:
            # the processor does not say of which row it speaks
            self._name_the_row(rows, texts, images)
            raise

    def _server_request(self, row: int) -> dict[str, Any]:
        """Write messages and pictures of a row, for a server that prepares both."""
        messages, pictures = self._shown(row)
        name = self.dataset[row].get("id", row)
        return {"id": name, "messages": messages, "pictures": pictures}

    def _inputs(self, texts: list[str], images: list[list]) -> Any:
        # processors want None, not empty lists, where a batch has no picture at all
        shown = images if any(images) else None
        # a decoder goes on behind the last token of a row, so the padding must stand on the left
        inputs = self.processor(
            text=texts, images=shown, return_tensors="pt", padding=True, padding_side="left"
        )
        return inputs.to(dtype=self.dtype)

    def _name_the_row(self, rows: list[int], texts: list[str], images: list[list]) -> None:
        """Prepare rows one by one, and raise a ValueError that names the first that fails."""
        for row, text, pictures in zip(rows, texts, images, strict=True):
            try:
                self._inputs([text], [pictures])
            except ValueError as error:
                name = self.dataset[row].get("id", row)
                raise ValueError(
                    f"the sample with id {name} cannot be prepared: {one_line(error)}"
                ) from None

    def _shown(self, row: int) -> tuple[list[dict[str, Any]], list[Any]]:
        """Return the messages of a row and its pictures, exchanged and transformed."""
        prompt = prompt_of(self.dataset[row], self.question)
        messages = prompt.messages
        pictures = prompt.pictures
        donor = self.donors[row]
        if donor != row:
            pictures = prompt_of(self.dataset[donor], self.question).pictures
            if len(pictures) != len(prompt.pictures):
                wanted = len(prompt.pictures)
                raise ValueError(
                    f"row {row} wants {wanted} pictures, row {donor} has {len(pictures)}"
                )
        if self.image_transform:
            pictures = [self.image_transform(picture) for picture in pictures]
        if pictures and pictures[0] is None:
            return [_without_pictures(message) for message in messages], []
        return messages, pictures


def _without_pictures(message: Mapping[str, Any]) -> dict[str, Any]:
    """Take the places of pictures out of a message."""
    if isinstance(message["content"], str):
        return dict(message)
    content = [part for part in message["content"] if part["type"] != "image"]
    return {**message, "content": content}


def _vllm_requests(texts: Sequence[str], images: Sequence[list]) -> list[dict[str, Any]]:
    """Write prompts and pictures as vLLM wants them."""
    requests = []
    for text, pictures in zip(texts, images, strict=True):
        request: dict[str, Any] = {"prompt": text}
        if pictures:
            request["multi_modal_data"] = {"image": pictures}
        requests.append(request)
    return requests
