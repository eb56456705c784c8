"""Answers that need no model, and that a model must beat."""

from collections import Counter
from typing import Any

import numpy as np

from medtune.audit import Fingerprints, fingerprint


def nearest_caption_copier(
    train: Any, test: Any, *, fingerprints: tuple[Fingerprints, Fingerprints] | None = None
) -> list[str]:
    """Answer each test picture with the caption of the training picture that looks most like it.

    Likeness is the cosine of the two pictures' low frequencies. It knows nothing of medicine: what
    it scores on a split is what copying scores, and on a split that leaks that is a lot.

    Parameters
    ----------
    train : pairs with `image` and `caption`; with fingerprints only the captions are looked at.
    test : rows with an `image`; not looked at when there are fingerprints.
    fingerprints : of the training and of the test pictures, where they are known.

    Returns
    -------
    list : a caption for each test picture.

    Examples
    --------
    >>> import io, PIL.Image
    >>> ramp = PIL.Image.linear_gradient("L")
    >>> ramp.save(down := io.BytesIO(), "PNG")
    >>> ramp.rotate(90).save(across := io.BytesIO(), "PNG")
    >>> cells = [{"image": down.getvalue()}, {"image": across.getvalue()}]
    >>> marks = fingerprint(cells)
    >>> nearest_caption_copier({"caption": ["down", "across"]}, cells, fingerprints=(marks, marks))
    ['down', 'across']
    """
    if fingerprints is None:
        fingerprints = fingerprint(train), fingerprint(test)
    known, asked = fingerprints
    captions = list(train["caption"])
    answers = []
    # 256 test pictures at a time: all by all would not fit in memory
    for start in range(0, len(asked.features), 256):
        block = asked.features[start : start + 256]
        likeness = block @ known.features.T  # (256, training pictures)
        for row in np.argmax(likeness, axis=1).tolist():
            answers.append(captions[row])
    return answers


def most_frequent_caption(train: Any) -> str:
    """Give the training caption that occurs most often, the first of them if several do.

    Examples
    --------
    >>> most_frequent_caption({"caption": ["A lung.", "A liver.", "A liver."]})
    'A liver.'
    """
    return Counter(train["caption"]).most_common(1)[0][0]
