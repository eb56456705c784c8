"""Prepare a record as a training will, before the training: what would it die of?

The processor comes from whoever calls.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import datasets

from medtune.files import one_line

from .dialects import MARK, OTHER_MARKS, messages_with_parts

# Control tokens of well-known chat templates, for want of a processor to ask: <|im_end|>,
# <|image_pad|> and their like, and those of Gemma, Llama, Mistral, InternVL, LLaVA and SmolVLM.
WELL_KNOWN = re.compile(
    r"<\|[\w ./-]{1,40}\|>"
    r"|</?(?:start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token)>"
    r"|<(?:end_of_utterance|fake_token_around_image|global-img|row_\d+_col_\d+|image_placeholder)>"
    r"|</?(?:bos|eos|pad|unk|s|img|IMG_CONTEXT)>"
    r"|\[/?(?:INST|IMG|IMG_BREAK|IMG_END|AVAILABLE_TOOLS|TOOL_CALLS)\]"
    r"|<</?SYS>>"
)
# Marks of places and things in a picture, which answers may teach: no commands.
GROUNDING = re.compile(r"</?\|?(?:object_ref|ref|box|quad|point|loc)(?:_start|_end|\d*)?\|?>")
# A tokenizer says so where its model has no longest text.
ENDLESS = 1_000_000


class Shown(Protocol):
    """A picture of a record.

    file : where it lies.
    size : width and height in pixels.
    mode : such as "RGB".
    """

    file: Any
    size: tuple[int, int]
    mode: str


class Said(Protocol):
    """An answer of a record: its turns with all before it, and the pictures shown in them."""

    turns: list
    images: Sequence


def find_control_token(text: str, known: Iterable[str] | None = None) -> str | None:
    """Give the first control token that a text of a record holds.

    Parameters
    ----------
    text : a question, an answer or a system prompt; its marks for pictures are no control tokens.
    known : the control tokens of the model; None: those of well-known models.

    Returns
    -------
    str or None : the token, or None if the text holds none.

    Examples
    --------
    >>> find_control_token("A liver.<|im_end|>")
    '<|im_end|>'
    >>> find_control_token("<image>Is the ratio < 0.5?")
    """
    for mark in (MARK, *OTHER_MARKS):
        # these have a check of their own
        text = text.replace(mark, "")
    if known is None:
        text = GROUNDING.sub("", text)
        found = WELL_KNOWN.search(text)
        return found[0] if found else None
    return next((token for token in known if token in text), None)


def control_tokens_of(processor: Any) -> list[str]:
    """List the words that the tokenizer of a processor takes for commands."""
    tokenizer = processor.tokenizer
    tokens = list(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            tokens.append(token.content)
    for name in ("image_token", "video_token", "audio_token", "boi_token", "eoi_token"):
        tokens.append(getattr(processor, name, None))
    commands = []
    for token in dict.fromkeys(tokens):
        # one that reads like a word would be found in every text
        if token and re.search(r"[<\[|]", token) and not GROUNDING.fullmatch(token):
            commands.append(token)
    return commands


class Preparer:
    """Prepares records as TRL does for a training, and counts their tokens.

    Parameters
    ----------
    processor : of the model, with its `tokenizer` and a chat template.
    max_length : tokens to which a training would cut, if it does.

    Attributes
    ----------
    control_tokens : what the tokenizer takes for commands.
    """

    def __init__(self, processor: Any, max_length: int | None):
        self.processor = processor
        self.max_length = max_length
        self.control_tokens = control_tokens_of(processor)
        # what the pictures of a record add, or why they cannot be prepared, by size and mode
        self._tokens_of_pictures: dict[tuple, int | str] = {}

    def count_tokens(self, answer: Said) -> int:
        """Count the tokens of an answer with all that comes before it.

        Raises
        ------
        Exception : whatever the processor raises, and a training would die of.
        """
        prompt, completion = self._render(answer.turns)
        count = self._count_text(prompt) + self._count_text(completion)
        return count + self._tokens_added_by(answer.images, prompt)

    def _render(self, turns: list) -> tuple[str, str]:
        """Give the texts of prompt and completion that the chat template makes, as TRL does."""
        messages = messages_with_parts(turns)
        apply = self.processor.apply_chat_template
        prompt = apply(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = apply(messages, tokenize=False)
        # some templates end a prompt with what they do not write in front of an answer
        common = len(os.path.commonprefix([prompt, whole]))
        return whole[:common], whole[common:]

    def _count_text(self, text: str) -> int:
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokens_added_by(self, pictures: Sequence[Shown], prompt: str) -> int:
        """Count the tokens that the pictures add to those of their marks.

        The pixels themselves play no part in it: pictures of sizes and modes that were met before
        are not prepared again.
        """
        if not pictures:
            return 0
        kinds = tuple((picture.size, picture.mode) for picture in pictures)
        if kinds not in self._tokens_of_pictures:
            try:
                self._tokens_of_pictures[kinds] = self._prepare(pictures, prompt)
            except Exception as error:  # processors raise many kinds
                # in words: the error itself would keep the pixels in memory
                self._tokens_of_pictures[kinds] = one_line(error)
        found = self._tokens_of_pictures[kinds]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _prepare(self, pictures: Sequence[Shown], prompt: str) -> int:
        decode = datasets.Image().decode_example
        images = [decode({"path": str(picture.file), "bytes": None}) for picture in pictures]
        batch = self.processor(
            images=[images], text=[prompt], return_tensors="pt", add_special_tokens=False
        )
        return len(batch["input_ids"][0]) - self._count_text(prompt)

    def cuts(self, tokens: int) -> bool:
        """Say whether a training with `max_length` would cut so many tokens."""
        return bool(self.max_length) and tokens > self.max_length

    def problem_of_length(self, tokens: int) -> str | None:
        """Say what is wrong with a record of so many tokens."""
        if self.cuts(tokens):
            return f"{tokens} tokens, more than max_length={self.max_length}: it would be cut"
        longest = getattr(self.processor.tokenizer, "model_max_length", None) or ENDLESS
        if tokens > longest and longest < ENDLESS:
            return f"{tokens} tokens, more than the {longest} that the model takes"
        return None
