"""The embedded default: tiny backbone, pool and meta-LoRA, and the demo that runs the main job on them."""

from ..hub.embedded import backbone_path, meta_lora_path, pool_path


__all__ = ["backbone_path", "meta_lora_path", "pool_path"]
