"""Distillation: surrogate images into one meta-LoRA."""
