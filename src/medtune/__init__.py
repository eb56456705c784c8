"""medtune: fine-tune multimodal language models on medical images, and check what they learned."""

__version__ = "0.1.0"
