"""medtune: fine-tune multimodal language models on medical images, and check what they learned."""

import logging

__version__ = "0.1.0"

# On a CPU with AVX512-BF16 bitsandbytes asks a hub for a faster product when it is imported, and
# warns that it has none. The product that it then takes is right; other warnings of it stay.
_of_bitsandbytes = logging.getLogger("bitsandbytes.backends.cpu.ops")
_of_bitsandbytes.addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
