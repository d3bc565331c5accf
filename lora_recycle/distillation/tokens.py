"""What enters the first layer that learns, computed once for all surrogate images and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..errors import DataError
from ..pool.pool import AdapterPool
from ..runtime.array_files import RowFile, open_rows, write_rows
from ..runtime.heartbeat import Heartbeat, beat
from .config import DistillationConfig
from .student import Student
from .surrogate_images import SurrogateImages


def tokens_entering(
    student: Student,
    images: SurrogateImages,
    config: DistillationConfig,
    pool: AdapterPool,
    state: Accelerator,
    folder: Path,
    shared: bool,
    progress: bool = True,
) -> RowFile | None:
    """`store_tokens` under a name that says all that they depend on, None where all layers learn. Of processes that
    share the folder (`shared`) the main one writes."""
    if not config.first_layer:
        return None
    parts = [config.init, config.rank, config.seed, config.first_layer, images.masked, state.mixed_precision]
    parts += [config.peft_type, pool.backbone.name, pool.backbone.revision, str(pool.backbone.dtype)]
    parts += [[info.sha256 for info in pool.infos], images.checksums]
    path = folder / f"tokens-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}.npy"
    with state.autocast():
        if shared:
            with Heartbeat("store tokens") as heart:
                if state.is_main_process:
                    store_tokens(student, images, path, progress)
                heart.wait_for_all()
        return store_tokens(student, images, path, progress)


def store_tokens(student: Student, images: SurrogateImages, path: Path, progress: bool = True) -> RowFile:
    """The tokens of every image that enter `student.first_layer`: float16 (N, T, D).

    A file that is there is taken as it is: its name must say what it depends on.

    Raises:
        DataError: a token is beyond the range of float16.
    """
    if not path.is_file():
        backbone, masks = student.backbone, images.shards[0].tensors.get("kept_tokens")
        patches = masks.shape[1] if images.masked and masks is not None else backbone.num_patches
        shape = (len(images), backbone.num_prefix_tokens + patches, backbone.hidden_size)
        write_rows(path, np.float16, shape, _blocks(student, images, progress))
    return open_rows(path)


def _blocks(student: Student, images: SurrogateImages, progress: bool) -> Iterator[torch.Tensor]:
    device, patch_size = student.backbone.device, student.backbone.patch_size
    numbers = torch.arange(len(images)).split(128)
    for index in tqdm(numbers, desc=f"tokens entering layer {student.first_layer}", disable=not progress):
        beat(f"tokens of image {int(index[0])} of {len(images)}")
        pixels, kept = images.inputs(index, patch_size)
        tokens = student.tokens(student.backbone.normalize(pixels), None if kept is None else kept.to(device))
        stored = tokens.half().cpu()
        if not stored.isfinite().all():
            raise DataError("Tokens of this backbone are beyond the range of float16. Use first_layer 0.")
        yield stored
