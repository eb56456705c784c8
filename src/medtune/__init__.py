"""medtune: fine-tune multimodal language models on medical images, and check what they learned."""

import logging
import os

__version__ = "0.1.0"

# Nothing is reported to anybody. Libraries read these when they are imported, which is later.
for _switch in ("HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS"):
    os.environ.setdefault(_switch, "1")

# On a CPU with AVX512-BF16 bitsandbytes asks a hub for a faster product when it is imported, and
# warns that it has none. The product that it then takes is right; other warnings of it stay.
_of_bitsandbytes = logging.getLogger("bitsandbytes.backends.cpu.ops")
_of_bitsandbytes.addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
