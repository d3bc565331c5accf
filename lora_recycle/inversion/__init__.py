"""LoRA inversion: surrogate images from adapters."""
