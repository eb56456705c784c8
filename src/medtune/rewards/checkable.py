"""Rewards that compare an answer with what is known to be true.

Each function has the signature of TRL's `GRPOTrainer`: it is called with the answers as
`completions` and every other column of the data set by its name, and returns one number an answer,
or None where it cannot judge. It calls no other function of this file, so that each can be copied
alone; that is why they all begin by taking the text from the answer.

`functools.partial` sets a parameter, and keeps the name that TRL writes into its log:
`partial(finding_reward, missed=-2.0)`.

A reward is a wish in numbers, and training grants the numbers. What a function cannot see will be
neglected, or used: each says what that is.
"""

import re
from collections.abc import Sequence
from typing import Any

from medtune.captions import parse_caption

Completion = str | Sequence[dict[str, Any]]
"""An answer: a text, or the messages that TRL makes of it."""


def finding_reward(
    completions: Sequence[Completion],
    reference: Sequence[str],
    *,
    missed: float = -1.0,
    invented: float = -0.5,
    silent: float = 0.5,
    **columns: Any,
) -> list[float]:
    """Reward what an answer says about findings: 1 where it is what the reference says.

    A missed finding and an invented one cost differently. "Better a false alarm than a miss" is a
    `missed` below `invented`; the other way round the model learns to keep quiet.

    A finding that is reported as something else (a cyst, called a lesion) is worth 0: more than
    missed, less than right. Of several findings the overlap counts, twice what both name over all
    that both name.

    It cannot see where in the region the finding lies, how large it is, or which organ has it; nor
    whether a word stands in the answer because of the picture. A reference that says nothing about
    findings counts as none, as in `scores.detection_scores`: where your reports leave some out,
    leave these rows out. An answer that lists all kinds gets part of the overlap.

    Parameters
    ----------
    completions : sequence
        The answers.
    reference : sequence of str
        The true captions, a column of the data set.
    missed : float
        What an answer gets that reports none where there is one.
    invented : float
        What it gets that reports one where there is none.
    silent : float
        What it gets that says nothing where the reference says that there is none.
    **columns
        Other columns of the data set, not used.

    Returns
    -------
    list of float
        One an answer.

    Raises
    ------
    ValueError
        Not one reference for each answer, or one of them is no text.

    Examples
    --------
    >>> cyst, none = "Within it lies a cyst.", "No focal lesion is seen."
    >>> finding_reward([cyst, none, cyst], [cyst, cyst, none])
    [1.0, -1.0, -0.5]
    >>> finding_reward([[{"role": "assistant", "content": "A nodule."}]], [cyst])
    [0.0]
    """
    rewards = []
    for completion, caption in zip(completions, reference, strict=True):
        answer = completion if isinstance(completion, str) else completion[-1]["content"]
        said = parse_caption(answer)
        truth = parse_caption(caption)
        reported = set(said.findings)
        there = set(truth.findings)
        if there and reported:
            reward = 2 * len(reported & there) / (len(reported) + len(there))
        elif there:
            reward = missed
        elif reported:
            reward = invented
        elif truth.negated and not said.negated:
            reward = silent
        else:
            reward = 1.0
        rewards.append(reward)
    return rewards


def name_reward(
    completions: Sequence[Completion],
    reference: Sequence[str],
    *,
    wrong_side: float = 0.5,
    **columns: Any,
) -> list[float | None]:
    """Reward the name of the structure: 1 for the true one, `wrong_side` for its mirror image.

    It cannot see anything that the answer says besides this name: an answer of one sentence gets as
    much as a whole caption. Of several structures the one counts that the caption rules take for
    the region's. With much credit for the wrong side a model may stop to learn sides.

    Parameters
    ----------
    completions : sequence
        The answers.
    reference : sequence of str
        The true captions, a column of the data set.
    wrong_side : float
        What "left kidney" gets where it is the right one, or where only one of the two has a side.
    **columns
        Other columns of the data set, not used.

    Returns
    -------
    list
        A number an answer; None where the reference names no structure.

    Raises
    ------
    ValueError
        Not one reference for each answer, or one of them is no text.

    Examples
    --------
    >>> answers = ["It shows the left kidney.", "It shows the right kidney.", "The liver."]
    >>> name_reward(answers, ["It shows the left kidney."] * 3)
    [1.0, 0.5, 0.0]
    """
    rewards = []
    for completion, caption in zip(completions, reference, strict=True):
        answer = completion if isinstance(completion, str) else completion[-1]["content"]
        said = parse_caption(answer).structure or ""
        truth = parse_caption(caption).structure
        if truth is None:
            rewards.append(None)
            continue
        same_organ = re.sub("^(left|right) ", "", said) == re.sub("^(left|right) ", "", truth)
        if said == truth:
            rewards.append(1.0)
        elif same_organ:
            rewards.append(wrong_side)
        else:
            rewards.append(0.0)
    return rewards


def box_reward(
    completions: Sequence[Completion],
    roi: Sequence[Sequence[float] | None],
    *,
    scale: float = 1000.0,
    **columns: Any,
) -> list[float | None]:
    """Reward a box that is written as text: its overlap (IoU) with the true one.

    The box is the first four numbers in brackets, left, upper, right, lower. Without one the reward
    is 0.

    It cannot see what the box is said to hold. Two boxes that do not touch are 0 however near they
    are, so a model that is far off has nothing to climb: begin from one that hits now and then. A
    box as large as the picture always gets something.

    Parameters
    ----------
    completions : sequence
        The answers.
    roi : sequence
        The true boxes, xyxy from 0 to 1, a column of the data set; None where there is none.
    scale : float
        What the width and the height of the picture are in the answer: 1000 with Qwen3-VL, 1 for
        shares.
    **columns
        Other columns of the data set, not used.

    Returns
    -------
    list
        0 to 1 for an answer; None where no box is known.

    Raises
    ------
    ValueError
        Not one box for each answer.

    Examples
    --------
    >>> answers = ['{"bbox_2d": [0, 0, 500, 1000]}', "The liver, at (0, 0, 250, 1000).", "Liver."]
    >>> box_reward(answers, [(0, 0, 0.5, 1)] * 3)
    [1.0, 0.5, 0.0]
    """
    number = r"\s*(-?\d+(?:\.\d+)?)\s*"
    four_numbers = re.compile(r"[\[(]" + ",".join([number] * 4) + r"[\])]")
    rewards: list[float | None] = []
    for completion, box in zip(completions, roi, strict=True):
        answer = completion if isinstance(completion, str) else completion[-1]["content"]
        written = four_numbers.search(answer)
        if box is None:
            rewards.append(None)
            continue
        if written is None:
            rewards.append(0.0)
            continue
        # what lies outside of the picture does not count
        left, upper, right, lower = [
            min(max(float(digits) / scale, 0.0), 1.0) for digits in written.groups()
        ]
        width = min(right, box[2]) - max(left, box[0])
        height = min(lower, box[3]) - max(upper, box[1])
        both = max(width, 0.0) * max(height, 0.0)
        said = max(right - left, 0.0) * max(lower - upper, 0.0)
        truth = (box[2] - box[0]) * (box[3] - box[1])
        either = said + truth - both
        rewards.append(both / either if either > 0 else 0.0)
    return rewards


def format_reward(
    completions: Sequence[Completion], *, pattern: str = r"[^\n]+[.。]", **columns: Any
) -> list[float]:
    """Reward the form of an answer: 1 where the whole of it matches a pattern, else 0.

    By default: one paragraph that ends with a full stop, so that an answer that was cut off gets 0.

    It cannot see whether one word is true. Where it is the easiest reward to get, the model learns
    the form and nothing else: give it a small weight, and look at the other curves.

    Parameters
    ----------
    completions : sequence
        The answers.
    pattern : str
        A regular expression; its dot matches line ends, too.
    **columns
        Other columns of the data set, not used.

    Returns
    -------
    list of float
        1 or 0 for each answer.

    Raises
    ------
    ValueError
        `pattern` is no regular expression.

    Examples
    --------
    >>> format_reward(["The liver is seen.", "The liver is"])
    [1.0, 0.0]
    >>> steps = r"<think>.+</think>\\s*<answer>.+</answer>"
    >>> format_reward(["<think>It is dark.</think> <answer>A cyst.</answer>"], pattern=steps)
    [1.0]
    """
    try:
        form = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from None
    rewards = []
    for completion in completions:
        answer = completion if isinstance(completion, str) else completion[-1]["content"]
        rewards.append(float(form.fullmatch(answer.strip()) is not None))
    return rewards


def length_reward(
    completions: Sequence[Completion], *, shortest: int = 40, longest: int = 90, **columns: Any
) -> list[float]:
    """Reward an answer that is as long as the references are: 1 between two numbers of words.

    Below and above the reward falls with the distance, to 0 for an empty answer and for one of
    twice the longest. A Chinese character counts as a word. The defaults are the lengths of the
    sample's captions.

    It cannot see what the words say: one word, repeated, gets 1. Never reward length without an upper
    end, or answers grow for as long as training lasts.

    Parameters
    ----------
    completions : sequence
        The answers.
    shortest, longest : int
        Words that an answer should have.
    **columns
        Other columns of the data set, not used.

    Returns
    -------
    list of float
        0 to 1 for each answer.

    Raises
    ------
    ValueError
        `shortest` is below 1 or above `longest`.

    Examples
    --------
    >>> length_reward(["The liver.", "one two three four five six"], shortest=4, longest=4)
    [0.5, 0.5]
    """
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest={shortest} must be 1 or more, and not above longest={longest}")
    word = re.compile("[\u3400-\u9fff]|[^\\s\u3400-\u9fff]+")
    rewards = []
    for completion in completions:
        answer = completion if isinstance(completion, str) else completion[-1]["content"]
        words = len(word.findall(answer))
        if words < shortest:
            rewards.append(words / shortest)
        elif words <= longest:
            rewards.append(1.0)
        else:
            rewards.append(max(0.0, 2 - words / longest))
    return rewards
