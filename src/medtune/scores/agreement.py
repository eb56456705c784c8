"""Count in which of their fields captions agree."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from medtune.captions import Caption


def field_agreement(
    first: Iterable[Caption | Mapping],
    second: Iterable[Caption | Mapping],
    fields: Iterable[str],
) -> dict[str, float]:
    """Give for each field the share of captions that have the same value on both sides.

    Parameters
    ----------
    first, second : captions that `medtune.captions.parse_caption` read, or mappings with the same
        fields; the n-th of one side belongs to the n-th of the other.
    fields : names of fields, such as "structure".

    Returns
    -------
    dict : 0..1 for each field; None on both sides counts as the same.

    Raises
    ------
    ValueError : one side has more captions than the other.

    Examples
    --------
    >>> from medtune.captions import parse_caption
    >>> read = [parse_caption("It shows the liver."), parse_caption("It shows the spleen.")]
    >>> field_agreement(read, [{"structure": "liver"}] * 2, ["structure"])
    {'structure': 0.5}
    """
    pairs = list(zip(first, second, strict=True))
    agreement = {}
    for name in fields:
        # `array_equal`, because a field may be a list, or an array where a table holds it
        same = [np.array_equal(_value(one, name), _value(other, name)) for one, other in pairs]
        agreement[name] = float(np.mean(same))
    return agreement


def _value(caption: Caption | Mapping, name: str) -> Any:
    return caption[name] if isinstance(caption, Mapping) else getattr(caption, name)
