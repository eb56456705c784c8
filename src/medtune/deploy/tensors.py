"""Find the tensors that a training changed in the files of an export.

Names in a GGUF file are others, and some tensors are cut up on the way. So they are found by their
values: what a file holds must be the tuned weight, as exactly as its type allows, and not the
base's.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from medtune.models import load_base

from .exported import Exported

# How far values in a file may be from those of the model, as a share of their size.
ROUNDING = {"F32": 1e-6, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 2e-2}
# So many values of a tensor tell it from others of its shape.
SAMPLED = 512


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Parameters
    ----------
    tensor : of gguf's reader.
    some : values at places that are spread evenly.
    """

    tensor: Any
    some: np.ndarray


def find_changed(
    export: Exported, type: str, tuned: Any, base: str | os.PathLike
) -> dict[str, Any]:
    """Find what differs between a tuned model and its base in the files of an export.

    Parameters
    ----------
    export : the export.
    type : of its text part.
    tuned : the merged model, in float32.
    base : folder or hub name of the base model.

    Returns
    -------
    dict : "changed", the number of tensors; "found", how many of them stand in the files; "missing",
        the names of the others.
    """
    before = load_base(base).state_dict()
    stored = _stored(export, type)
    changed = 0
    missing = []
    for name, parameter in tuned.named_parameters():
        weight = parameter.detach().float().numpy()
        old = before[name].float().numpy()
        if np.array_equal(weight, old):
            continue
        changed += 1
        if not _is_found(weight, old, stored):
            missing.append(name)
    return {"changed": changed, "found": changed - len(missing), "missing": missing}


def _stored(export: Exported, type: str) -> dict[tuple[int, ...], list[Stored]]:
    """Read the tensors of both files, by their shape."""
    from gguf import GGUFReader  # an extra; the export has said so where it is missing

    stored: dict[tuple[int, ...], list[Stored]] = {}
    for file in (export.text_file(type), export.folder / export.mmproj):
        for tensor in GGUFReader(file).tensors:
            # a file counts dimensions from the last
            shape = tuple(int(size) for size in reversed(tensor.shape))
            some = _some(_values(tensor, shape))
            stored.setdefault(shape, []).append(Stored(tensor, some))
    return stored


def _values(tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Give the values of a tensor in a file as float32."""
    from gguf.quants import dequantize

    return dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)


def _some(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(-1)
    return flat[:: max(1, flat.size // SAMPLED)]


def _is_found(
    weight: np.ndarray, old: np.ndarray, stored: dict[tuple[int, ...], list[Stored]]
) -> bool:
    """Tell whether a weight is in the files, whole or in the parts that a converter makes of it."""
    for parts, old_parts in zip(_forms(weight), _forms(old), strict=True):
        pairs = zip(parts, old_parts, strict=True)
        if all(_is_stored(part, old_part, stored) for part, old_part in pairs):
            return True
    return False


def _forms(weight: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Give the forms in which a weight may be stored, each a list of parts."""
    yield [weight]
    if weight.ndim <= 2 and weight.shape[0] % 3 == 0:
        # queries, keys and values of a vision part stand one below the other
        yield list(np.split(weight, 3))
    if weight.ndim == 3:
        # experts, in Transformers with the inputs before the outputs
        yield [weight.swapaxes(1, 2)]
        if weight.shape[2] % 2 == 0:
            yield [half.swapaxes(1, 2) for half in np.split(weight, 2, axis=2)]
        if weight.shape[1] % 2 == 0:
            yield list(np.split(weight, 2, axis=1))


def _is_stored(
    weight: np.ndarray, old: np.ndarray, stored: dict[tuple[int, ...], list[Stored]]
) -> bool:
    candidates = stored.get(weight.shape, [])
    if not candidates:
        return False
    some = _some(weight)
    nearest = min(candidates, key=lambda one: float(np.abs(one.some - some).mean()))
    values = _values(nearest.tensor, weight.shape)
    size = _size(weight)
    off = _size(values - weight)
    allowed = ROUNDING.get(nearest.tensor.tensor_type.name, 0.0) * size
    # an update may be smaller than the rounding: still the file must be nearer to it than to before
    return off <= allowed and off <= _size(values - old)


def _size(values: np.ndarray) -> float:
    """Give the root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
