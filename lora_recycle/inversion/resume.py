"""What an inversion that ended early left in its folder, and whether this one may go on with it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..runtime.config import differences
from ..runtime.files import is_sealed
from ..surrogate.dataset import MANIFEST, SurrogateDataset, shard_config_id


logger = logging.getLogger(__name__)


def refuse_other_recipe(folder: Path, identities: dict[str, str], config: dict[str, Any]) -> None:
    """Raise `ConfigError` where a shard of this run is there already, but of other settings or of another adapter.

    Args:
        identities: file name of each shard to what it depends on, as `shard_config_id` tells it.
        config: the settings, to tell which of them differ.
    """
    stored = {name: shard_config_id(folder / "shards" / name) for name in identities}
    others = [name for name, there in stored.items() if there not in (None, identities[name])]
    if not others:
        return
    reason = "another adapter, backbone, precision or data, or other settings"
    with contextlib.suppress(DataError):
        there = SurrogateDataset.from_pretrained(folder).manifest.get("config", {})
        reason = differences(there, json.loads(json.dumps(config))) or "another adapter, backbone, precision or data"
    raise ConfigError(
        f"{folder}: holds surrogate data of another recipe ({reason}): {others[0]}, {len(others)} in all. Choose "
        "another output folder. To replace what is there, pass --no-resume (from Python: resume=False)."
    )


def start_over(folder: Path, names: Iterable[str]) -> None:
    """Delete the manifest and the shards: those of these `names`, and all others that an inversion wrote."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in (folder / "shards").glob("*.safetensors"):
        if path.name in set(names) or shard_config_id(path) is not None:
            path.unlink()


def is_finished(path: Path, identity: str) -> bool:
    """Whether a shard needs no work: it is there, of this run, and not a bit of it has changed since."""
    if not path.is_file():
        return False
    if shard_config_id(path) == identity and is_sealed(path):
        return True
    logger.warning("%s is damaged; it is made again.", path)
    return False
