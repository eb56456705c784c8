"""Tokens of some words of an answer, and how much they weigh in a loss.

`medtune.training` weighs the words that name a structure so, `medtune.multitask` those that name a
disease.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mark_words(
    begins: torch.Tensor, ends: torch.Tensor, spans: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Say which tokens have a part in some words.

    Parameters
    ----------
    begins, ends : (tokens,), first character of each token in the text, and the one behind it.
    spans : the words, in characters of the same text.

    Returns
    -------
    Tensor : (tokens,), true or false.

    Examples
    --------
    >>> begins = torch.tensor([0, 3, 8])
    >>> mark_words(begins, torch.tensor([3, 8, 14]), [(4, 8)]).tolist()
    [False, True, False]
    """
    marked = torch.zeros(begins.shape, dtype=torch.bool)
    for first, behind in spans:
        marked |= (begins < behind) & (ends > first)
    return marked


def weigh_tokens(
    stressed: torch.Tensor, learned: torch.Tensor, stress: float | torch.Tensor
) -> torch.Tensor:
    """Weigh the tokens of answers: more where words are stressed, 1 on average in each row.

    So a row counts as much as before, and the stressed words get a larger share of it.

    Parameters
    ----------
    stressed : (rows, tokens), true where a token belongs to such a word.
    learned : (rows, tokens), true where a token is learned at all.
    stress : how many times as much they weigh as the others; or of each row, (rows, 1).

    Returns
    -------
    Tensor : (rows, tokens), float32; 0 where nothing is learned.

    Examples
    --------
    >>> stressed = torch.tensor([[False, True, False]])
    >>> weigh_tokens(stressed, torch.tensor([[True, True, False]]), 3.0).tolist()
    [[0.5, 1.5, 0.0]]
    """
    weights = torch.where(stressed, stress, 1.0) * learned
    means = weights.sum(1, keepdim=True) / learned.sum(1, keepdim=True).clamp(min=1)
    # a row that learns nothing has a mean of 0
    return weights / means.clamp(min=1e-6)
