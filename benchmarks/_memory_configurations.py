"""The configurations of benchmarks/memory.py: which trainings are measured."""

from dataclasses import dataclass, field
from typing import Any

QWEN3 = "Qwen/Qwen3-VL-2B-Instruct"
QWEN3_MOE = "Qwen/Qwen3-VL-30B-A3B-Instruct"
QWEN25 = "Qwen/Qwen2.5-VL-7B-Instruct"
QWEN2 = "Qwen/Qwen2-VL-2B-Instruct"
GEMMA = "google/gemma-3-4b-it"
SMOL = "HuggingFaceTB/SmolVLM-256M-Instruct"
QWEN25_3B = "Qwen/Qwen2.5-VL-3B-Instruct"
QWEN3_8B = "Qwen/Qwen3-VL-8B-Instruct"
QWEN35_SMALL = "Qwen/Qwen3.5-0.8B"
QWEN35 = "Qwen/Qwen3.5-2B"
QWEN35_4B = "Qwen/Qwen3.5-4B"
QWEN35_9B = "Qwen/Qwen3.5-9B"
QWEN35_MOE = "Qwen/Qwen3.5-35B-A3B"
GEMMA4 = "google/gemma-4-E2B-it"
GEMMA4_LARGE = "google/gemma-4-E4B-it"
MEDGEMMA = "google/medgemma-1.5-4b-it"


@dataclass(frozen=True)
class Configuration:
    """One training, or one batch of answers.

    Parameters
    ----------
    part : half of the configurations that it belongs to, 0 or 1.
    model : whose shape it is.
    method : "lora", "qlora", "full" or "generate".
    target : layers with an adapter.
    batch : samples of a step.
    pixels : width and height of a picture.
    checkpointing : activations are computed twice.
    options : "r", "dropout" and "save" (modules trained whole) of an adapter, "dtype" of the
        weights, "new_tokens" of an answer, and "must", which says what the run is expected to do.
    """

    part: int
    model: str
    method: str
    target: str
    batch: int
    pixels: int
    checkpointing: bool
    options: dict[str, Any] = field(default_factory=dict)


RUNS_OUT = {"must": "run out of memory"}
PUBLISHED_GEMMA = {"r": 16, "dropout": 0.05, "save": ["lm_head", "embed_tokens"]}

# Those that the constants of `medtune.plan` were fitted to.
FIT = [
    Configuration(0, QWEN3, "lora", "language", 4, 512, False),
    Configuration(0, QWEN3, "lora", "language", 16, 512, False),
    Configuration(0, QWEN3, "lora", "language", 16, 512, True),
    Configuration(0, QWEN3, "lora", "language", 8, 1024, False),
    Configuration(0, QWEN3, "lora", "language", 16, 1024, True),
    Configuration(0, QWEN3, "lora", "all-linear", 8, 512, False),
    Configuration(0, QWEN3, "lora", "all-linear", 16, 512, True),
    Configuration(0, QWEN3, "qlora", "language", 8, 512, False),
    Configuration(0, QWEN3, "qlora", "language", 16, 512, True),
    Configuration(0, QWEN3, "full", "", 4, 512, True),
    Configuration(0, QWEN3, "full", "", 4, 512, False, {"dtype": "bfloat16"}),
    Configuration(0, QWEN2, "lora", "language", 2, 512, False),
    Configuration(0, QWEN2, "lora", "language", 16, 512, False),
    Configuration(0, QWEN2, "lora", "language", 16, 512, True),
    Configuration(0, QWEN3, "lora", "language", 96, 1024, False, RUNS_OUT),
    Configuration(0, SMOL, "lora", "language", 4, 512, False),
    Configuration(0, QWEN3, "generate", "", 32, 512, False, {"new_tokens": 64}),
    Configuration(1, GEMMA, "qlora", "all-linear", 1, 512, True, PUBLISHED_GEMMA),
    Configuration(1, GEMMA, "qlora", "all-linear", 1, 512, True, {"r": 16, "dropout": 0.05}),
    Configuration(1, GEMMA, "qlora", "all-linear", 8, 512, True, {"r": 16}),
    Configuration(1, GEMMA, "lora", "language", 4, 512, False),
    Configuration(1, GEMMA, "lora", "language", 16, 512, True),
    Configuration(1, QWEN3_MOE, "lora", "attention", 8, 512, True),
    Configuration(1, QWEN3_MOE, "lora", "attention", 2, 512, False),
    Configuration(1, QWEN3_MOE, "lora", "attention+experts", 8, 512, True),
    Configuration(1, QWEN3_MOE, "lora", "attention", 32, 512, True),
    Configuration(1, QWEN3_MOE, "lora", "attention", 64, 512, False, RUNS_OUT),
    Configuration(1, QWEN25, "lora", "language", 8, 512, True),
    Configuration(1, GEMMA, "generate", "", 16, 512, False, {"new_tokens": 64}),
]
# Those that they had not seen.
CHECK = [
    Configuration(0, QWEN3, "lora", "language", 32, 512, False),
    Configuration(0, QWEN3, "lora", "language", 64, 512, True, {"r": 32}),
    Configuration(0, QWEN3, "qlora", "language", 4, 1024, False),
    Configuration(0, QWEN3, "lora", "all-linear", 4, 1024, False, {"r": 16}),
    Configuration(0, QWEN2, "lora", "language", 8, 1024, False),
    Configuration(0, QWEN2, "qlora", "language", 8, 512, True),
    Configuration(0, QWEN3, "full", "", 16, 512, True, {"dtype": "bfloat16"}),
    Configuration(0, QWEN25, "lora", "language", 4, 512, False),
    Configuration(0, SMOL, "lora", "language", 16, 512, True),
    Configuration(1, GEMMA, "lora", "language", 8, 512, False),
    Configuration(1, GEMMA, "qlora", "language", 4, 512, False),
    Configuration(1, GEMMA, "lora", "language", 64, 512, False, RUNS_OUT),
    Configuration(1, QWEN3_MOE, "lora", "attention", 4, 512, False),
    Configuration(1, QWEN3_MOE, "lora", "attention", 16, 1024, True),
    Configuration(1, QWEN3_MOE, "lora", "attention+experts", 2, 512, True),
    Configuration(1, QWEN3_MOE, "qlora", "attention", 4, 512, True),
]
# Those of models that were added later, the ones that profiles use first; nothing was fitted to them.
NEW = [
    Configuration(0, QWEN35, "lora", "language", 8, 512, True, {"r": 16}),
    Configuration(0, MEDGEMMA, "qlora", "language", 4, 512, True, {"r": 16}),
    Configuration(0, QWEN35_MOE, "lora", "attention", 4, 512, True, {"r": 16}),
    Configuration(0, QWEN35, "lora", "language", 4, 512, False),
    Configuration(0, GEMMA4, "lora", "language", 4, 512, False),
    Configuration(0, QWEN35, "qlora", "language", 8, 512, True),
    Configuration(0, GEMMA4, "qlora", "language", 8, 512, True),
    Configuration(0, QWEN35_9B, "qlora", "language", 4, 512, True),
    Configuration(0, GEMMA4_LARGE, "lora", "language", 4, 512, True),
    Configuration(0, QWEN35_4B, "lora", "language", 4, 512, False),
    Configuration(0, QWEN3_8B, "lora", "language", 8, 512, True),
    Configuration(0, QWEN25_3B, "lora", "language", 4, 512, False),
    Configuration(0, QWEN35_SMALL, "lora", "language", 16, 512, True),
    Configuration(0, QWEN35, "lora", "language", 64, 512, False, RUNS_OUT),
]
