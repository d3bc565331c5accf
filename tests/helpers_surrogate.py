"""Surrogate data changed as a hostile author would: with checksums that are right."""

import json

from lora_recycle.runtime.files import file_sha256
from lora_recycle.surrogate.dataset import MANIFEST, SurrogateDataset, save_shard


def edit(folder, change) -> None:
    """Change the manifest in place."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def replace_shard(folder, number, change) -> None:
    """Change one shard in place, and its checksum with it."""
    data = SurrogateDataset.from_pretrained(folder)
    entry, shard = data.manifest["shards"][number], data.shard(number)
    change(shard)
    save_shard(folder / entry["file"], shard, "id")
    digits = file_sha256(folder / entry["file"])
    edit(folder, lambda manifest: manifest["shards"][number].update(sha256=digits))
