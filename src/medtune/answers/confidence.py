"""How likely a model found what it said: the probability of each token of its own answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .prompts import Preparer


@dataclass(frozen=True)
class Spoken:
    """An answer with the probability of each of its tokens, given the tokens before.

    Parameters
    ----------
    text : the answer.
    begins, ends : where each token stands in it, in characters.
    log_probs : of each token; the natural logarithm of its probability.
    """

    text: str
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    log_probs: tuple[float, ...]

    def probability(self, words: str | None = None) -> float:
        """Give the probability of some words of the answer, given what stands before them.

        Parameters
        ----------
        words : as they stand in the answer; where they stand twice, the last place counts. None: the
            whole answer.

        Returns
        -------
        float : the product over all tokens that spell them, 0..1; NaN where they do not stand there.

        Examples
        --------
        >>> spoken = Spoken("the liver", (0, 3), (3, 9), (-0.1, -0.7))
        >>> round(spoken.probability("liver"), 2), spoken.probability("spleen")
        (0.5, nan)
        """
        if words is None:
            return math.exp(sum(self.log_probs))
        first = self.text.rfind(words)
        if first < 0 or not words:
            return math.nan
        behind = first + len(words)
        total = 0.0
        for begin, end, log_prob in zip(self.begins, self.ends, self.log_probs, strict=True):
            if begin < behind and end > first:
                total += log_prob
        return math.exp(total)


@torch.no_grad()
def answer_log_probs(
    model: Any,
    processor: Any,
    dataset: Any,
    answers: Sequence[str],
    *,
    batch_size: int = 8,
) -> list[Spoken]:
    """Let a model read its own answers, and note how likely it found each token.

    Greedy answers are the likeliest words one by one, so these are the probabilities with which they
    were chosen. They are the model's own, not those of being right: compare them on pairs with a
    known answer before anything is decided by them.

    Parameters
    ----------
    model, processor : model on its device, with or without adapter (it is left in evaluation mode),
        and its processor, whose tokenizer must be a fast one.
    dataset : `datasets.Dataset` or list of dicts, as `generate_answers` takes it.
    answers : what was answered to each row; an empty answer has no tokens.
    batch_size : answers in a forward pass.

    Returns
    -------
    list of Spoken : one a row.

    Raises
    ------
    ValueError : not as many answers as rows.

    Examples
    --------
    >>> from PIL import Image
    >>> from medtune.models import load_base, load_processor
    >>> from medtune.runs import find_root
    >>> tiny = str(find_root() / "data" / "tiny-vlm")
    >>> model, processor = load_base(tiny), load_processor(tiny)
    >>> rows = [{"image": Image.new("RGB", (64, 64)), "question": "Describe this picture."}]
    >>> [spoken] = answer_log_probs(model, processor, rows, ["It is a drawn circle."])
    >>> 0 < spoken.probability("circle") < 1
    True
    """
    if len(answers) != len(dataset):
        raise ValueError(f"answers must hold {len(dataset)}, one a row, not {len(answers)}")
    if not answers:
        return []
    prepare = Preparer(
        dataset, processor, list(range(len(answers))), None, None, model.dtype, begun=list(answers)
    )
    pieces = processor.tokenizer(
        list(answers), add_special_tokens=False, return_offsets_mapping=True
    )
    lengths = [len(ids) for ids in pieces["input_ids"]]
    spoken = [Spoken(text, (), (), ()) for text in answers]
    # similar lengths need little padding
    asked = sorted((row for row, n in enumerate(lengths) if n), key=lambda row: -lengths[row])
    model.eval()
    for start in range(0, len(asked), batch_size):
        rows = asked[start : start + batch_size]
        inputs = prepare(rows).to(model.device)
        longest = max(lengths[row] for row in rows)
        # padding stands on the left: the answer is the end, and a token is foretold by the one before
        logits = model(**inputs, logits_to_keep=longest + 1).logits[:, :-1].float()
        tokens = inputs["input_ids"][:, -longest:]
        logs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        for row, values in zip(rows, logs.tolist(), strict=True):
            begins, ends = zip(*pieces["offset_mapping"][row], strict=True)
            own = tuple(values[-lengths[row] :])
            spoken[row] = Spoken(answers[row], begins, ends, own)
    return spoken
