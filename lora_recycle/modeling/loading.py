"""A pulled meta-LoRA to networks: its base model, its adapter, its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..adapters.experts import read_domains
from ..adapters.load import load_adapter, wear
from ..adapters.pull import AdapterInfo
from ..adapters.sources import named_base
from ..backbones.backbone import Backbone
from ..errors import ConfigError
from ..hub.download import HubOptions
from .domains import DomainNetworks


def checked_options(
    name: str | Path,
    subfolder: str = "",
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
) -> tuple[str | Path, torch.dtype | None]:
    """What transformers calls otherwise, as this library has it: the folder or repo id, and the dtype.

    Args:
        dtype: or its name, such as `"bfloat16"`; None and `"auto"` are float32.

    Raises:
        ConfigError: `device_map`, two dtypes, an unknown one, or a subfolder of a repo that is no local folder.
    """
    if device_map is not None:
        raise ConfigError(
            f"device_map={device_map!r}: the model lies on one device. Pass device, for instance device='cuda'."
        )
    if dtype is not None and torch_dtype is not None:
        raise ConfigError("dtype and torch_dtype are the same. Pass dtype alone.")
    given = torch_dtype if dtype is None else dtype
    if isinstance(given, str):
        known = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
        if given != "auto" and given not in known:
            raise ConfigError(f"dtype must be auto, {', '.join(known)} or a torch.dtype, got {given!r}.")
        given = known.get(given)
    if not subfolder:
        return name, given
    if not Path(name, subfolder).is_dir():
        raise ConfigError(
            f"{name}: there is no local folder {subfolder!r} in it. Of a repo, fetch it first (hf download {name} "
            f"--include '{subfolder}/*' --local-dir FOLDER), then name FOLDER."
        )
    return Path(name, subfolder), given


def load_networks(
    info: AdapterInfo,
    settings: dict[str, Any],
    hub: HubOptions,
    base_model: str | Path | None = None,
    base_revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Backbone, PeftModel, DomainNetworks | None]:
    """The backbone that wears the shared adapter, PEFT's model around it, and the experts where there are any.

    Args:
        settings: the sidecar, as [`modeling.sidecar.read_sidecar`] gives it.
        base_model: by default the one that the adapter names, at the revision that it names.

    Raises:
        AdapterError: files are missing or damaged, or do not fit the base model.
    """
    if base_model is None and base_revision is None:
        base_revision = info.base_revision
    base = named_base(info) if base_model is None else base_model
    entries = read_domains(settings, info.where)
    backbone = Backbone.from_pretrained(base, revision=base_revision, device=device, dtype=dtype, **hub)
    loaded = load_adapter(info, backbone.model)
    # before the shared adapter: each takes a copy of the bare backbone
    experts = None if entries is None else DomainNetworks.from_entries(info, entries, backbone, hub)
    loaded.peft_config.base_model_name_or_path = str(base)
    return backbone, wear(backbone, loaded), experts
