"""Rate a finder of boxes on pictures whose box is known."""

from collections.abc import Sequence

import numpy as np

from .draw import iou

Box = Sequence[float]


def rate_boxes(
    found: Sequence[Box | None], known: Sequence[Box | None]
) -> dict[str, float | int | None]:
    """Compare the boxes that a finder found with those that are known.

    Parameters
    ----------
    found : for each picture the box (xyxy, 0..1) that was found, None where nothing was.
    known : for each picture the box that is drawn in it, None where none is known.

    Returns
    -------
    dict : "mean IoU", "worst IoU" and "IoU 0.95 or more" (a share), all 0..1, over the pictures
        with a known box, where nothing found counts as an IoU of 0; in how many of them there was
        "nothing found"; and in how many others a "box where none is known". All but the last are
        None if no box is known.

    Examples
    --------
    >>> whole = (0, 0, 1, 1)
    >>> rating = rate_boxes([(0, 0, 0.5, 1), None, whole], [whole, whole, None])
    >>> rating["mean IoU"], rating["nothing found"], rating["box where none is known"]
    (0.25, 1, 1)
    """
    overlaps = []
    missed = 0
    invented = 0
    for guess, box in zip(found, known, strict=True):
        if box is None:
            invented += guess is not None
        elif guess is None:
            overlaps.append(0.0)
            missed += 1
        else:
            overlaps.append(iou(guess, box))
    any_known = len(overlaps) > 0
    return {
        "mean IoU": float(np.mean(overlaps)) if any_known else None,
        "worst IoU": float(np.min(overlaps)) if any_known else None,
        "IoU 0.95 or more": float(np.mean(np.array(overlaps) >= 0.95)) if any_known else None,
        "nothing found": missed if any_known else None,
        "box where none is known": invented,
    }
