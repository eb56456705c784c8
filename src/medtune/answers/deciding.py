"""Ask a model what it would say next: the odds of two words at one place of the reference."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .prompts import Preparer, prompt_of, undecoded


@torch.no_grad()
def deciding_log_odds(  # noqa: PLR0913 - each is a setting of its own, given by keyword
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    words: Sequence[str] = (" Within", " No"),
    batch_size: int = 8,
    image_transform: Callable | None = None,
    pictures_from: Sequence[int] | None = None,
) -> list[float]:
    """Give the log-odds of one word against another, where the reference has one of them.

    The model reads the question and the reference up to that word, as if it had written so far
    itself (teacher forcing). What it would write next decides the answer: "Within it lies a cyst"
    or "No focal lesion is seen". The log-odds order the samples by how strongly the model leans to
    the first word, also where a greedy answer never takes it.

    Ask twice, with the own picture and with another (`pictures_from`). If the wrong picture orders
    the samples as well, the words before give the finding away, not the picture.

    Parameters
    ----------
    model, processor : model on its device, with or without adapter (it is left in evaluation mode),
        and its processor.
    dataset : `datasets.Dataset` or list of dicts, as `generate_answers` takes it, with references.
    words : two words with the blank before them, of which a reference has one. Where it has both,
        or one of them twice, the last place counts.
    batch_size : samples in a forward pass.
    image_transform : function of a PIL picture that returns the picture to show instead, or None
        for no picture.
    pictures_from : for each sample the row whose pictures it is shown.

    Returns
    -------
    list of float : of each sample the logarithm of how many times likelier the first word is; NaN
        where the reference has neither.

    Raises
    ------
    ValueError : not two words, words that begin with the same token, `pictures_from` that does not
        fit.

    Examples
    --------
    >>> from PIL import Image
    >>> from medtune.models import load_base, load_processor
    >>> from medtune.runs import find_root
    >>> tiny = str(find_root() / "data" / "tiny-vlm")
    >>> row = {"image": Image.new("RGB", (64, 64)), "question": "Describe this picture."}
    >>> rows = [row | {"caption": "The image is a CT scan."}, row | {"caption": "Nothing."}]
    >>> model, processor = load_base(tiny), load_processor(tiny)
    >>> odds = deciding_log_odds(model, processor, rows, words=(" image", " liver"))
    >>> odds[0] > 0, odds[1]
    (True, nan)
    """
    if len(words) != 2:
        raise ValueError(f"words={list(words)}: give two, such as ' Within' and ' No'")
    references = [prompt_of(row).reference for row in undecoded(dataset)]
    donors = list(range(len(references)) if pictures_from is None else pictures_from)
    if len(donors) != len(references):
        raise ValueError(f"pictures_from must hold {len(references)} row numbers, one a sample")
    begun = []
    places = []
    for reference in references:
        place = max(reference.rfind(word) for word in words)
        begun.append(reference[: max(place, 0)])
        places.append(place)
    first, second = _first_tokens(processor, words)

    prepare = Preparer(dataset, processor, donors, image_transform, None, model.dtype, begun=begun)
    # similar lengths need little padding
    asked = [row for row, place in enumerate(places) if place >= 0]
    asked.sort(key=lambda row: -len(begun[row]))
    log_odds = [math.nan] * len(references)
    model.eval()
    for start in range(0, len(asked), batch_size):
        rows = asked[start : start + batch_size]
        inputs = prepare(rows).to(model.device)
        # padding stands on the left, so the last place is the one before the word
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
        difference = logits[:, first] - logits[:, second]
        for row, value in zip(rows, difference.tolist(), strict=True):
            log_odds[row] = value
    return log_odds


def _first_tokens(processor: Any, words: Sequence[str]) -> list[int]:
    """Give the token that each word begins with, behind the end of a sentence."""
    tokenize = processor.tokenizer
    before = tokenize(".", add_special_tokens=False)["input_ids"]
    tokens = []
    for word in words:
        ids = tokenize("." + word, add_special_tokens=False)["input_ids"]
        if ids[: len(before)] != before or len(ids) == len(before):
            raise ValueError(f"words={word!r}: the tokenizer does not begin a token with it")
        tokens.append(ids[len(before)])
    if tokens[0] == tokens[1]:
        raise ValueError(
            f"words={list(words)}: both begin with the same token, which cannot decide: give words "
            "that differ from their beginning"
        )
    return tokens
