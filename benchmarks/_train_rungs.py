"""The rungs of benchmarks/train.py: which settings are measured, on which model."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

DENSE = "Qwen/Qwen3-VL-2B-Instruct"
EXPERTS = "Qwen/Qwen3-VL-30B-A3B-Instruct"
GEMMA = "google/gemma-3-4b-pt"


@dataclass(frozen=True)
class Rung:
    """One measurement.

    Parameters
    ----------
    settings : keys of `medtune.training`, on top of `LORA`.
    model : the published model whose shape is trained.
    speed : keywords of `medtune.training.speed_up`; empty to leave the model as it is.
    send_bytes : pixels travel to the GPU as bytes.
    tie_embeddings : one trained embedding serves as the head, too.
    limit_gb : memory of the card that may be used, as on a smaller one; 0 for all.
    generate : keywords of `medtune.answers.generate_answers`; then nothing is trained.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    model: str = DENSE
    speed: dict[str, bool] = field(default_factory=dict)
    send_bytes: bool = False
    tie_embeddings: bool = False
    limit_gb: float = 0
    generate: dict[str, Any] = field(default_factory=dict)


# what all trainings share, unless a rung says otherwise
LORA = {
    "lora_r": 8,
    "lora_alpha": 16,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "constant",
    "target": "language",
}
BY_LENGTH = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}

# Each rung changes something of the one above it: first its settings, then other fields of `Rung`.
LADDER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "naive": (
        {
            "per_device_train_batch_size": 4,
            "dtype": "float32",
            "bf16": False,
            "optim": "adamw_torch",
            "activation_checkpointing": True,
            "dataloader_num_workers": 0,
        },
        {},
    ),
    "workers": ({"dataloader_num_workers": 8}, {}),
    "bf16": ({"dtype": "bfloat16", "bf16": True}, {}),
    "batch16": ({"per_device_train_batch_size": 16}, {}),
    "by_length": (BY_LENGTH, {}),
    "no_checkpointing": ({"activation_checkpointing": False}, {}),
    "fused": ({"optim": "adamw_torch_fused"}, {}),
    "batch32": ({"per_device_train_batch_size": 32}, {}),
    "attention": ({}, {"speed": {"attention": True}}),
    "bytes": ({}, {"send_bytes": True}),
    "compile": ({}, {"speed": {"attention": True, "compiled": True}}),
    "bf16_adapters": ({"autocast_adapter_dtype": False}, {}),
    "features": (
        {"autocast_adapter_dtype": True, "cache_features": True},
        {"send_bytes": False},
    ),
}

# The one key `fast`, on top of the plain settings of a GPU.
FAST = {"dtype": "bfloat16", "bf16": True, "fast": True, **BY_LENGTH}
CACHED = {"cache_features": True}
ONE_KEY_SETTINGS: dict[str, dict[str, Any]] = {
    "fast32": {"per_device_train_batch_size": 32},
    "fast64": {"per_device_train_batch_size": 64},
    "fast96": {"per_device_train_batch_size": 96},
    "fast128": {"per_device_train_batch_size": 128},
    "fast96_features": {"per_device_train_batch_size": 96, **CACHED},
    "fast128_features": {"per_device_train_batch_size": 128, **CACHED},
    "fast96_features_bf16_adapters": {
        "per_device_train_batch_size": 96,
        **CACHED,
        "autocast_adapter_dtype": False,
    },
    "fast96_checkpointing": {"per_device_train_batch_size": 96, "activation_checkpointing": True},
}
ONE_KEY = {name: Rung(FAST | settings) for name, settings in ONE_KEY_SETTINGS.items()}

# What a card of 16 or 24 GB holds: short batches, plain and `fast`, and the same card's long ones.
PLAIN = {"dtype": "bfloat16", "bf16": True, "optim": "adamw_torch_fused", **BY_LENGTH}
PLAIN["dataloader_num_workers"] = 8
SAVING = {"activation_checkpointing": True}
SHORT = {}
for _size in (4, 8):
    _batch = {"per_device_train_batch_size": _size, **SAVING}
    SHORT[f"plain{_size}_16gb"] = Rung(PLAIN | _batch, limit_gb=16)
    SHORT[f"fast{_size}_16gb"] = Rung(FAST | _batch, limit_gb=16)
SHORT["fast8_24gb"] = Rung(FAST | {"per_device_train_batch_size": 8}, limit_gb=24)
for _size, _limit in ((32, 16), (64, 16), (96, 24)):
    _batch = {"per_device_train_batch_size": _size, **SAVING}
    SHORT[f"fast{_size}_{_limit}gb"] = Rung(FAST | _batch, limit_gb=_limit)

# A mixture of experts.
ROUTED = {
    "target": "attention+experts",
    "dtype": "bfloat16",
    "bf16": True,
    "activation_checkpointing": True,
    "dataloader_num_workers": 8,
    "autocast_adapter_dtype": False,
}
MOE_SETTINGS: dict[str, dict[str, Any]] = {
    "moe_plain8": {"per_device_train_batch_size": 8},
    "moe_fast8": {"per_device_train_batch_size": 8, "fast": True},
    "moe_fast32": {"per_device_train_batch_size": 32, "fast": True},
    "moe_fast64": {"per_device_train_batch_size": 64, "fast": True},
    "moe_fast128": {"per_device_train_batch_size": 128, "fast": True},
    "moe_fast64_features": {"per_device_train_batch_size": 64, "fast": True, **CACHED},
    "moe_qlora8": {"per_device_train_batch_size": 8, "load_in_4bit": True, "target": "attention"},
}
MOE = {name: Rung(ROUTED | settings, EXPERTS) for name, settings in MOE_SETTINGS.items()}

# The settings of a published recipe (R4), which train both embeddings whole.
R4 = {
    "target": "all-linear",
    "dtype": "bfloat16",
    "bf16": True,
    "load_in_4bit": True,
    "use_bnb_nested_quant": True,
    "lora_r": 16,
    "lora_dropout": 0.05,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "max_grad_norm": 0.3,
    "activation_checkpointing": True,
    "learning_rate": 2e-4,
}
MEMORY = {
    "gemma_published": Rung(R4 | {"lora_modules_to_save": ["lm_head", "embed_tokens"]}, GEMMA),
    "gemma_tied": Rung(R4 | {"lora_modules_to_save": ["embed_tokens"]}, GEMMA, tie_embeddings=True),
    "gemma_adapters_only": Rung(R4, GEMMA),
}

# A static cache compiles decoding.
GENERATE = {
    "generate64": Rung(generate={"batch_size": 64, "cache_implementation": None}),
    "generate64_static": Rung(generate={"batch_size": 64, "cache_implementation": "static"}),
    "generate128_static": Rung(generate={"batch_size": 128, "cache_implementation": "static"}),
    "generate256_static": Rung(generate={"batch_size": 256, "cache_implementation": "static"}),
}


def _ladder() -> Iterator[tuple[str, Rung]]:
    """Yield each rung of the ladder by name, with what the rungs above it have set."""
    rung = Rung()
    for name, (settings, others) in LADDER.items():
        rung = replace(rung, settings=rung.settings | settings, **others)
        yield name, rung


RUNGS = dict(_ladder()) | ONE_KEY | SHORT | MOE | MEMORY | GENERATE
