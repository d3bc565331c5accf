"""The meta-LoRAs that the page serves: one visitor at a time, and always as they lie in their folders now."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..adapters.sources import one_id
from ..hub.embedded import resolve_meta_lora
from ..modeling.meta_lora import MetaLoRAForFewShotClassification


MODELS_KEPT = 2  # in memory

#: Name, time of change, size and number on the disk of each file of a folder.
Stamp = tuple[tuple[str, int, int, int], ...]


class ServedModels:
    """Meta-LoRAs by name, the last few of them kept loaded.

    Args:
        device: where to compute.
    """

    def __init__(self, device: Any = None):
        self._device, self._lock = device, threading.Lock()
        self._kept: OrderedDict[str, tuple[Stamp, MetaLoRAForFewShotClassification]] = OrderedDict()

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[MetaLoRAForFewShotClassification]:
        """The meta-LoRA of a folder or repo id, for one thread at a time.

        Raises:
            LoRARecycleError: it cannot be loaded.
        """
        with self._lock:
            yield self._current(name)

    def _current(self, name: str) -> MetaLoRAForFewShotClassification:
        """The one in memory, loaded again where its folder changed since."""
        repo, revision = one_id(name)
        stamp = folder_stamp(Path(resolve_meta_lora(repo)))
        known, model = self._kept.pop(name, (None, None))
        if model is None or known != stamp:
            model = MetaLoRAForFewShotClassification.from_pretrained(repo, revision=revision, device=self._device)
        self._kept[name] = (stamp, model)
        if len(self._kept) > MODELS_KEPT:
            self._kept.popitem(last=False)
        return model


def folder_stamp(folder: Path) -> Stamp:
    """What changes whenever a file of the folder does; empty for what is no folder of this machine."""
    if not folder.is_dir():
        return ()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return tuple((path.name, (s := path.stat()).st_mtime_ns, s.st_size, s.st_ino) for path in files)
