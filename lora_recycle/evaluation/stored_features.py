"""Features of real images on disk, by checksums of the images and of the network: a second table costs no forward."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ..backbones.backbone import Backbone
from ..images.labelled import LabelledImages
from ..runtime.files import load_sealed, save_sealed, tensors_sha256
from ..runtime.outputs import OutputKind


_FORMAT = 1
#: What a folder of features holds.
OUTPUT = OutputKind("stored features", lambda folder: any(folder.glob("features-*.safetensors")))


@dataclasses.dataclass
class NetworkFeatures:
    """Features (N, D) of a data set by one network, seconds for each image, and, of the first of a method's networks,
    the bytes that the images of one task hold at most, by shots."""

    features: torch.Tensor
    seconds: float
    bytes: dict[int, int]


class StoredFeatures:
    """The features of one data set by any number of networks, one file `features-<checksum>.safetensors` for each.

    A file holds 4 bytes x images x width. Nothing is ever deleted: delete the folder, or files in it.

    Args:
        folder: theirs; data sets may share it.
        data: the images.
    """

    def __init__(self, folder: str | Path, data: LabelledImages):
        self.folder, self._count = Path(folder), len(data)
        self._images = tensors_sha256({"pixels": data.pixels})

    def path(self, network: Backbone) -> Path | None:
        """Where the features by a network lie, None where the network has no checksum."""
        checksum = network_sha256(network)
        if checksum is None:
            return None
        parts = [_FORMAT, self._images, checksum, network.device.type]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        return self.folder / f"features-{digest}.safetensors"

    def load(self, path: Path | None) -> NetworkFeatures | None:
        """What `save` wrote; None where there is nothing, or nothing whole."""
        if path is None:
            return None
        try:
            tensors, header = load_sealed(path)
            features, held = tensors["features"], {int(k): int(v) for k, v in header["bytes"].items()}
            stored = NetworkFeatures(features, float(header["seconds"]), held)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return stored if features.ndim == 2 and len(features) == self._count else None

    def save(self, path: Path, found: NetworkFeatures) -> None:
        """Write the features, whole or not at all. Raises `StorageError` where that fails."""
        header = {"seconds": found.seconds, "bytes": found.bytes}
        save_sealed(path, {"features": found.features}, json.loads(json.dumps(header)))


def network_sha256(network: Backbone) -> str | None:
    """A checksum of all that the features of normalised images depend on: weights with an adapter folded in or wrapped
    around them, what else the modules hold, the architecture and the normalisation. None for a network with hooks or
    replaced methods, such as one that routes tokens: what those hold cannot be seen."""
    model = network.model
    tensors = {**model.state_dict(), "mean": network.mean, "std": network.std}
    parts: list[Any] = [model.config.to_dict()]
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        parts.append([path, type(module).__name__])
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                for key, part in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(part, torch.Tensor):
                        tensors[f"{path}/{name}/{key}"] = part
                    elif isinstance(part, (bool, int, float, str)):
                        parts.append([name, str(key), part])
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256((text + tensors_sha256(tensors)).encode()).hexdigest()
