"""How each of the three tasks is judged: by a loss to train on, and by a metric that people read.

Both are sums, not means: a step may have several batches on several ranks, and its losses are
divided by what counts in all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    smooth_l1_loss,
)
from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou

# The order of all that comes in threes: losses, weights, log-variances, counts.
TASKS = ("text", "box", "match")


@dataclass(frozen=True)
class Judged:
    """How a batch did in one task.

    Parameters
    ----------
    loss : the sum of its losses, with a gradient.
    metric : the sum of its metric: right tokens, IoU of boxes, or right matches.
    """

    loss: Tensor
    metric: Tensor


def count_items(labels: Tensor, boxes: Tensor, matches: Tensor) -> Tensor:
    """Count the answer tokens, boxes and pairs of a batch that have a loss.

    Examples
    --------
    >>> labels = torch.tensor([[-100, -100, 7, 8]])
    >>> count_items(labels, torch.full((1, 4), torch.nan), torch.tensor([-1])).tolist()
    [2, 0, 0]
    """
    answer_tokens = (labels[:, 1:] != -100).sum()
    return torch.stack([answer_tokens, has_box(boxes).sum(), has_match(matches).sum()])


def has_box(boxes: Tensor) -> Tensor:
    """Say which rows have a box; the others are NaN."""
    return boxes.isfinite().all(1)


def has_match(matches: Tensor) -> Tensor:
    """Say which rows have a statement; the others are -1."""
    return matches >= 0


def judge_text(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Judged:
    """Cross-entropy and accuracy of tokens.

    Parameters
    ----------
    logits : (rows, tokens, words of the vocabulary).
    targets : (rows, tokens), ids of the tokens to predict; -100 for none.
    weights : (rows, tokens), of each token in the loss; by default all are 1.
    """
    # float32: a sum over a vocabulary of 150,000 words is too coarse in bfloat16
    flat = logits.float().flatten(0, 1)
    if weights is None:
        loss = cross_entropy(flat, targets.flatten(), reduction="sum")
    else:
        each = cross_entropy(flat, targets.flatten(), reduction="none")
        loss = (each * weights.flatten()).sum()
    right = logits.argmax(-1) == targets
    return Judged(loss, right.sum())


def judge_boxes(found: Tensor, true: Tensor) -> Judged:
    """Smooth L1 plus generalised IoU loss of boxes, and their IoU.

    Parameters
    ----------
    found, true : (boxes, 4) as shares of the picture; there may be none.
    """
    edges = smooth_l1_loss(found, true, beta=0.1, reduction="sum")
    # both functions compare each box with each; the pairs stand on the diagonal
    overlap = (1 - generalized_box_iou(found, true).diag()).sum()
    iou = box_iou(found, true)[0].diag()
    return Judged(edges + overlap, iou.sum())


def judge_matches(logits: Tensor, matches: Tensor, miss_weight: float) -> Judged:
    """Focal loss (Lin et al. 2017) of pairs of picture and statement, and their accuracy.

    Parameters
    ----------
    logits : (pairs,); above 0 the pair is taken for a true one.
    matches : (pairs,), 1 or 0, as floats.
    miss_weight : weight of true pairs, so that few of them are missed.
    """
    pairs = binary_cross_entropy_with_logits(logits, matches, reduction="none")
    chance_of_truth = torch.exp(-pairs)
    focus = (1 - chance_of_truth) ** 2
    weight = 1 + matches * (miss_weight - 1)
    loss = (pairs * focus * weight).sum()
    right = (logits > 0) == (matches > 0)
    return Judged(loss, right.sum())
