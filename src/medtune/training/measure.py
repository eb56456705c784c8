"""What a training step takes: arithmetic, kept activations, and time by operator.

Needs torch.

These are yardsticks for a ladder of settings. The arithmetic of a step, divided by what the machine
does in a large matrix product, is the least time that a step can take.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# What PyTorch calls its products of matrices, by the last part of an operator's name.
PRODUCTS = {"mm", "addmm", "bmm", "addmm_", "convolution", "mkldnn_convolution"}


def count_tflop(model: Any, batch: Mapping[str, Any], autocast: Any = None) -> float:
    """Count the arithmetic of one forward and backward pass.

    Parameters
    ----------
    model : returns something with a `loss`, which needs a gradient. Its gradients are cleared
    afterwards.
    batch : keywords for the model, labels among them.
    autocast : a context in which training computes, such as `trainer.accelerator.autocast()`.

    Returns
    -------
    float : TFLOP (10^12 operations) of the whole batch, as PyTorch counts products and attention.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> layer = torch.nn.Linear(1000, 1000)
    >>> def model(x):
    ...     return SimpleNamespace(loss=layer(x).sum())
    >>> model.zero_grad = layer.zero_grad
    >>> round(1e12 * count_tflop(model, {"x": torch.ones(10, 1000)}) / 1e6)  # forward, and weights
    40
    """
    with FlopCounterMode(display=False) as counter, autocast or contextlib.nullcontext():
        model(**batch).loss.backward()
    model.zero_grad()
    return counter.get_total_flops() / 1e12


def kept_bytes(model: Any, batch: Mapping[str, Any], autocast: Any = None) -> int:
    """Count the bytes of activations that one forward pass keeps for the backward pass.

    Weights are left out. On a CPU nobody counts the peak of memory; this is the part of it that
    settings can change.

    Parameters
    ----------
    model, batch, autocast : as for `count_tflop`.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> layer = torch.nn.Linear(8, 8)
    >>> def model(x):
    ...     return SimpleNamespace(loss=torch.tanh(layer(x)).sum())
    >>> model.parameters = layer.parameters
    >>> kept_bytes(model, {"x": torch.ones(10, 8)})  # the input, and the output of tanh
    640
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # Where a storage begins -> the storage, so that a tensor kept twice counts once. It is held
    # here, for the address of one that has gone is given to the next.
    found: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    def give_back(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, give_back)
    with hooks, autocast or contextlib.nullcontext():
        loss = model(**batch).loss
    del loss
    return sum(storage.nbytes() for storage in found.values())


def product_tflops(device: str = "cpu") -> float:
    """Time a product of large matrices: about the fastest arithmetic that a machine does.

    Parameters
    ----------
    device : "cuda" (then in bfloat16) or "cpu" (in float32).

    Returns
    -------
    float : TFLOP/s of the best of five.

    Examples
    --------
    >>> product_tflops() > 0.001
    True
    """
    on_gpu = device == "cuda"
    side = 8192 if on_gpu else 2048
    matrix = torch.randn(
        side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # reading a number waits for the GPU
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds) / 1e12


def time_by_operator(step: Callable[[], Any], *, times: int = 2) -> dict[str, float]:
    """Profile a step and give each operator's share of the time, the largest first.

    Parameters
    ----------
    step : a forward and backward pass, for example. On a GPU its own time counts, else the CPU's.
    times : how often it is called.

    Returns
    -------
    dict : name of an operator, such as "aten::mm", to its share (0..1).

    Examples
    --------
    >>> matrix = torch.ones(300, 300)
    >>> next(iter(time_by_operator(lambda: matrix @ matrix)))
    'aten::mm'
    """
    with torch.profiler.profile() as profile:
        for _ in range(times):
            step()
    on_gpu = torch.cuda.is_available()
    spent: dict[str, float] = {}
    for event in profile.key_averages():
        if event.key.startswith("aten::"):
            own_time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[event.key] = own_time
    whole = sum(spent.values()) or 1
    ranked = sorted(spent, key=lambda name: -spent[name])
    return {name: spent[name] / whole for name in ranked}


def time_by_kind(operators: Mapping[str, float]) -> dict[str, float]:
    """Sum the shares of `time_by_operator` up into "products" of matrices, "attention" and the
    "rest".

    Examples
    --------
    >>> time_by_kind({"aten::mm": 0.5, "aten::scaled_dot_product_attention": 0.2, "aten::add": 0.3})
    {'attention': 0.2, 'products': 0.5, 'rest': 0.3}
    """
    kinds = {"attention": 0.0, "products": 0.0, "rest": 0.0}
    for name, share in operators.items():
        if "attention" in name:
            kinds["attention"] += share
        elif name.split("::")[-1] in PRODUCTS:
            kinds["products"] += share
        else:
            kinds["rest"] += share
    return kinds
