"""Where the embedded default lies: the tiny backbone, the pool of adapters and the meta-LoRA recycled from it."""

from pathlib import Path


ASSETS = Path(__file__).parents[1] / "demo" / "assets"
#: The name that the embedded adapters give as their base model.
BACKBONE_NAME = "lora-recycle/tiny-vit-64"


def backbone_path() -> Path:
    """Folder of the embedded `ViTModel` (64x64 pixels) and its image processor."""
    return ASSETS / "backbone"


def pool_path() -> Path:
    """Folder of the embedded adapters, one PEFT folder each."""
    return ASSETS / "pool"


def meta_lora_path() -> Path:
    """Folder of the embedded meta-LoRA, what `from_pretrained("demo")` loads."""
    return ASSETS / "meta_lora"


def resolve_backbone(name: str | Path) -> str:
    """`demo` and the embedded backbone's own name become its folder; anything else is returned unchanged."""
    return str(backbone_path()) if str(name) in ("demo", BACKBONE_NAME) else str(name)


def backbone_name(base_model: str | Path) -> str:
    """What adapters call their base: the embedded backbone goes by its name, not by the folder it lies in."""
    return BACKBONE_NAME if str(base_model) in ("demo", BACKBONE_NAME, str(backbone_path())) else str(base_model)


def resolve_meta_lora(name: str | Path) -> str:
    """`demo` becomes the embedded meta-LoRA's folder; anything else is returned unchanged."""
    return str(meta_lora_path()) if str(name) == "demo" else str(name)
