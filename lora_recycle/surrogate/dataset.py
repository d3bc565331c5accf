"""SurrogateDataset: a folder of safetensors shards, one for each adapter, and a manifest.

manifest.json            config, sources with commits, image processor, checksums, scores
shards/<adapter>.safetensors
    pixels           uint8   (N, 3, H, W)
    labels           int64   (N,)          class of the adapter's own head
    teacher_logits   float32 (N, C)        taken on the stored pixels
    teacher_features float16 (N, D)        taken on the stored pixels
    kept_tokens      int16   (N, K)        only where tokens were pruned
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import AdapterError, DataError
from ..hub.cards import TABLE_FILE, is_repo_id, surrogate_card
from ..hub.download import HubOptions, fetch
from ..hub.picture_grid import picture_grid
from ..hub.repo_files import PICTURE_FILE
from ..hub.upload import push_files, without_local_paths
from ..runtime.files import atomic_write, file_sha256, read_header, save_sealed
from ..runtime.outputs import OutputKind, holds_json
from ..runtime.terminal import utf8
from ..runtime.untrusted import parse_json
from ..runtime.untrusted_files import MAX_TEXT_BYTES, check_utf8, path_inside, read_text
from ..runtime.untrusted_tensors import MAX_FILE_BYTES
from .manifest import check_manifest
from .shards import TENSORS, ShardRows, check_alike, open_shard
from .table import to_table


if TYPE_CHECKING:
    import datasets


FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 1024**2
#: All that is downloaded of a data set's repo, and the most bytes that each file may have.
REPO_FILES = {MANIFEST: MAX_MANIFEST_BYTES, "shards/*.safetensors": MAX_FILE_BYTES, "README.md": MAX_TEXT_BYTES}
IMAGES_ON_CARD = 24
#: What `invert` writes to a folder.
OUTPUT = OutputKind("surrogate data", lambda folder: holds_json(folder / MANIFEST, "format_version", "shards"))


@dataclasses.dataclass
class Shard:
    """The surrogate images of one adapter. Shapes as in the module's description."""

    adapter: dict[str, Any]
    pixels: torch.Tensor
    labels: torch.Tensor
    teacher_logits: torch.Tensor
    teacher_features: torch.Tensor
    kept_tokens: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def label_names(self) -> list[str]:
        names = self.adapter.get("labels")
        return list(names) if names else [f"class {i}" for i in range(self.teacher_logits.shape[1])]

    @property
    def accuracy(self) -> float:
        """Share of the images that their own adapter classifies as intended."""
        return (self.teacher_logits.argmax(1) == self.labels).float().mean().item()

    @property
    def confidence(self) -> float:
        """Mean probability that the adapter gives the intended class."""
        return self.confidences.mean().item()

    @property
    def confidences(self) -> torch.Tensor:
        """Probability that the adapter gives the intended class of each image: (N,)."""
        return self.teacher_logits.softmax(1).gather(1, self.labels[:, None]).squeeze(1)


class SurrogateSample(NamedTuple):
    """Some images of many adapters.

    Args:
        pixels: uint8 (N, 3, H, W).
        labels: N names "class (adapter)".
        kept_tokens: int16 (N, K) kept patches, None where tokens were not pruned.
        confidence: (N,) probability that the image's adapter gives its class.
    """

    pixels: torch.Tensor
    labels: list[str]
    kept_tokens: torch.Tensor | None
    confidence: torch.Tensor


def save_shard(path: Path, shard: Shard, config_id: str) -> None:
    """Write one shard atomically; its header names the adapter and the configuration it was made with.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {name: getattr(shard, name) for name in TENSORS if getattr(shard, name) is not None}
    save_sealed(path, tensors, {"adapter": shard.adapter, "config_id": config_id})


def load_shard(path: Path) -> Shard:
    """Read one shard. Raises `DataError` where it is missing, damaged or of another form."""
    return _in_memory(open_shard(path))


def _in_memory(rows: ShardRows) -> Shard:
    return Shard(rows.adapter, **{name: file.read_range(0, len(rows)) for name, file in rows.tensors.items()})


def shard_config_id(path: Path) -> str | None:
    """The configuration that an existing shard was made with; None where there is no readable shard."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        return read_header(path)["config_id"]
    return None


def evenly_spread(count: int, most: int) -> torch.Tensor:
    """At most `most` of the numbers 0 to `count` - 1, at even distances: int64 (M,)."""
    return torch.linspace(0, max(count - 1, 0), min(count, most)).round().long()


class SurrogateDataset:
    """Surrogate images of a pool, read shard by shard.

    Args:
        folder: where `manifest.json` lies.
        manifest: its content.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = Path(folder), manifest

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        progress: bool = True,
    ) -> SurrogateDataset:
        """Open a surrogate folder, or a data set repo on the Hub, all of whose shards are then fetched side by side.

        Raises:
            DataError: there is none, it cannot be fetched whole, or its manifest is damaged.
        """
        folder = Path(repo_or_path)
        hub = HubOptions(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        if not folder.is_dir():
            try:
                folder = fetch(str(repo_or_path), REPO_FILES, revision, **hub, repo_type="dataset", progress=progress)
            except AdapterError as error:
                raise DataError(str(error)) from error
        try:
            check_utf8(folder.absolute())
            path = path_inside(folder, MANIFEST) or folder / MANIFEST
            manifest = parse_json(read_text(path, MAX_MANIFEST_BYTES))
            if manifest["format_version"] > FORMAT_VERSION:
                raise DataError(f"{folder}: written by a newer version of lora_recycle. Upgrade it.")
            check_manifest(manifest)
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: no readable {MANIFEST} ({error}). Is the inversion finished?") from error
        return cls(folder, manifest)

    def __repr__(self) -> str:
        return f"SurrogateDataset({len(self)} images of {self.num_shards} adapters in {str(self.folder)!r})"

    def __len__(self) -> int:
        """Number of images."""
        return sum(entry["num_images"] for entry in self.manifest["shards"])

    @property
    def num_shards(self) -> int:
        return len(self.manifest["shards"])

    def shard(self, index: int, verify: bool = False) -> Shard:
        """One adapter's images; `verify` compares the file with the manifest's checksum."""
        return _in_memory(self.shard_rows(index, verify))

    def shard_rows(self, index: int, verify: bool = False) -> ShardRows:
        """The same, left on disk: its rows are read when they are asked for."""
        path, number = self._path(index, verify), self.manifest["shards"][index]["num_images"]
        rows = open_shard(path)
        if len(rows) != number:
            raise DataError(f"{path}: holds {len(rows)} images, not {number} as {MANIFEST} says. Run invert again.")
        return rows

    def _path(self, index: int, verify: bool) -> Path:
        entry = self.manifest["shards"][index]
        path = self.folder / entry["file"]
        try:
            path_inside(self.folder, entry["file"])
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.folder}: {error}. Put the file itself in its place, or run invert again."
            ) from error
        if verify and (not path.is_file() or file_sha256(path) != entry["sha256"]):
            raise DataError(f"{path}: missing, or not the file that {MANIFEST} describes. Run invert again.")
        return path

    def sample(self, count: int) -> SurrogateSample:
        """About `count` images spread over the adapters and their classes, as pages and cards show them."""
        shown = evenly_spread(self.num_shards, count).tolist()
        rows = [self.shard_rows(i) for i in shown]
        check_alike(rows)
        images, labels, kept, confidence = [], [], [], []
        for shard in map(_in_memory, rows):
            order = shard.labels.argsort(stable=True)  # by class, so that even steps show many classes
            chosen = order[evenly_spread(len(order), count // len(shown))]
            images.append(shard.pixels[chosen])
            labels += [f"{shard.label_names[c]} ({shard.adapter['name']})" for c in shard.labels[chosen].tolist()]
            kept.append(None if shard.kept_tokens is None else shard.kept_tokens[chosen])
            confidence.append(shard.confidences[chosen])
        masked = [part for part in kept if part is not None]
        masks = torch.cat(masked) if len(masked) == len(kept) else None
        return SurrogateSample(torch.cat(images), labels, masks, torch.cat(confidence))

    def picture(self) -> bytes:
        """A small PNG of some of the images, for cards."""
        return picture_grid(self.sample(IMAGES_ON_CARD).pixels)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Publish as a data set repo in one commit, and return the URL.

        The repo opens with `datasets.load_dataset` and with `from_pretrained`. The arguments are those of
        [`MetaLoRAForFewShotClassification.push_to_hub`].

        Raises:
            DataError: a shard is missing, damaged or not the one of the manifest.
            PushError: the push failed; then nothing of it is in the repo.
        """
        for i in range(self.num_shards):
            self.shard_rows(i, verify=True)  # checked as `shard` does, without holding the pixels
        manifest = without_local_paths(self.manifest)
        if not is_repo_id((self.manifest.get("backbone") or {}).get("name")):
            manifest["backbone"] = {}  # a folder of this machine
        files: dict[str, Path | bytes] = {e["file"]: self.folder / e["file"] for e in self.manifest["shards"]}
        files[MANIFEST] = json.dumps(manifest, indent=1, allow_nan=False).encode()
        files[PICTURE_FILE] = self.picture()
        files["README.md"] = utf8(surrogate_card(repo_id, manifest, picture=True))
        with tempfile.TemporaryDirectory() as folder:
            files[TABLE_FILE] = Path(folder) / "train.parquet"
            self.to_dataset().to_parquet(files[TABLE_FILE])
            return push_files(
                repo_id,
                files,
                repo_type="dataset",
                replaces=["shards/*.safetensors", "data/*.parquet"],
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message or "Upload surrogate data with lora-recycle",
                create_pr=create_pr,
            )

    def to_dataset(self) -> datasets.Dataset:
        """A `datasets.Dataset` with `image`, `label` (`ClassLabel`, "<adapter>/<class>") and `adapter`."""
        return to_table([self.shard(i) for i in range(self.num_shards)])


def write_manifest(folder: Path, header: dict[str, Any], files: list[Path]) -> SurrogateDataset:
    """Describe finished shards and write the manifest atomically."""
    entries = []
    for path in files:
        shard = load_shard(path)
        entries.append(
            {
                "file": path.relative_to(folder).as_posix(),
                "sha256": file_sha256(path),
                "num_images": len(shard),
                "accuracy": round(shard.accuracy, 4),
                "confidence": round(shard.confidence, 4),
                "adapter": shard.adapter,
            }
        )
    manifest = {"format_version": FORMAT_VERSION, **header, "shards": entries}
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
    return SurrogateDataset(folder, manifest)
