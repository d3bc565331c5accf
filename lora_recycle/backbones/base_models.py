"""A base model's files at one commit, loaded whole or not at all. Nothing in them is ever executed.

transformers gets a checked configuration and the tensors, never the folder: there it would also follow an adapter, a
quantiser or a kernel that the files name, and fill weights that are missing with random numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import AdapterError
from ..hub.download import fetch
from ..hub.embedded import resolve_backbone
from ..runtime.untrusted import parse_json
from ..runtime.untrusted_files import MAX_TEXT_BYTES, read_text
from ..runtime.untrusted_tensors import count, read_safetensors_header
from .base_config import MAX_PARAMETERS, num_parameters, read_base_settings, read_settings, tower_config, whole_config
from .families import TOWERS


#: See [`BaseModel.load`].
Rename: TypeAlias = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

#: Held while transformers or PEFT builds a model: both replace functions of torch for all threads meanwhile.
LOADING = threading.RLock()

_MAX_WEIGHT_BYTES = 4 * MAX_PARAMETERS
_MAX_TOKENIZER_BYTES = 64 * 1024**2
WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER_CONFIG = "adapter_config.json"
#: What is fetched of a base model's repo, and the most bytes that each file may have.
CONFIG_FILES = dict.fromkeys(
    ("config.json", "preprocessor_config.json", "processor_config.json", _ADAPTER_CONFIG), MAX_TEXT_BYTES
)
WEIGHT_FILES = {WEIGHTS: _MAX_WEIGHT_BYTES, _INDEX: MAX_TEXT_BYTES, "model-*-of-*.safetensors": _MAX_WEIGHT_BYTES}
TOKENIZER_FILES = dict.fromkeys(
    (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    ),
    _MAX_TOKENIZER_BYTES,
)

# classes with a pooling layer that embeddings do not pass
_WITH_POOLER = ("vit", "deit")
# what stands for masked patches in pre-training, and in no embedding
_UNUSED = re.compile(r"(^|\.)mask_token$")
_LAYER = re.compile(r"(^|\.)layers?\.\d+\.")
_SHARD = re.compile(r"[\w.-]+\.safetensors")
#: How many times more numbers a configuration may describe than the files hold, before they are compared by name.
_MOST_DESCRIBED = 4


@dataclasses.dataclass(frozen=True)
class OwnHead:
    """The classifier of a base model: `weight` (C, D), `bias` (C,) or None, and the classes' `names`, if any."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    names: list[str]


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A base model's folder, whose `config.json` was read.

    Args:
        name (`str`): repo id or folder, as the caller gave it.
        folder (`Path`): a local one, or the snapshot of one commit.
        commit (`str`, *optional*): None for a local folder.
        settings (`dict`): the parsed `config.json`.
    """

    name: str
    folder: Path
    commit: str | None
    settings: dict[str, Any]

    @classmethod
    def pull(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        files: Mapping[str, int] = CONFIG_FILES | WEIGHT_FILES,
        **hub: Any,
    ) -> BaseModel:
        """Fetch the files of a base model (`demo`: the embedded one).

        Args:
            files: as [`hub.download.fetch`] takes them.
            hub: [`hub.download.HubOptions`].

        Raises:
            AdapterError: it is not available, holds an adapter too, or its `config.json` is refused.
        """
        path = resolve_backbone(name_or_path)
        folder, commit = Path(path), None
        if not folder.is_dir():
            try:
                folder = fetch(path, files, revision, **hub)
            except AdapterError as error:
                raise AdapterError(f"{name_or_path}: the backbone cannot be loaded ({error})") from error
            commit = folder.name
        if (folder / _ADAPTER_CONFIG).exists():
            raise AdapterError(
                f"{name_or_path}: holds {_ADAPTER_CONFIG} beside the base model, so that it is not clear which of "
                "both is meant. Name the base model alone, or move the adapter to a folder of its own."
            )
        return cls(str(name_or_path), folder, commit, read_base_settings(folder, str(name_or_path)))

    @property
    def model_type(self) -> str:
        return self.settings["model_type"]

    def tower_config(self) -> PreTrainedConfig:
        """See [`base_config.tower_config`]."""
        return tower_config(self.settings, self.name)

    def whole_config(self, **options: Any) -> PreTrainedConfig:
        """See [`base_config.whole_config`]."""
        return whole_config(self.settings, self.name, **options)

    def load_tower(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        config: PreTrainedConfig | None = None,
        rename: Rename | None = None,
    ) -> PreTrainedModel:
        """The headless image encoder, by default of its own `config.json`. Raises `AdapterError` as [`load`]."""
        config = self.tower_config() if config is None else config
        return self.load(TOWERS[config.model_type], config, dtype, rename=rename, **_pooler(config))

    def empty_tower(self) -> PreTrainedModel:
        """The headless image encoder without numbers, on the meta device: names and shapes of its weights."""
        config = self.tower_config()
        with LOADING, torch.device("meta"):
            return TOWERS[config.model_type](config, **_pooler(config))

    def load(
        self,
        model_class: type[PreTrainedModel],
        config: PreTrainedConfig,
        dtype: torch.dtype = torch.float32,
        new: tuple[str, ...] = (),
        rename: Rename | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """A model with all of its weights from the files.

        Args:
            config: from [`tower_config`] or [`whole_config`].
            new: prefixes of weights that may be missing, since the caller trains them.
            rename: the tensors of the files, by their names there, to those under names that transformers knows.

        Raises:
            AdapterError: a file is damaged, or a weight is missing, of another shape, or of a layer beyond `config`'s.
        """
        files = self._weight_files()
        self._check_size(config, files)
        try:
            tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
            tensors = tensors if rename is None else rename(tensors)
            with LOADING, _quiet():
                loaded: Any = model_class.from_pretrained(
                    None,
                    config=config,
                    state_dict=tensors,
                    dtype=dtype,
                    ignore_mismatched_sizes=True,  # they are refused below, by name
                    output_loading_info=True,
                    **options,
                )
        except AdapterError:
            raise
        except Exception as error:  # noqa: BLE001 - torch and transformers raise anything for tensors of a stranger
            raise self._refusal(error) from error
        model, loading = loaded
        self._check_whole(model, loading, files, new)
        model.name_or_path = model.config.name_or_path = self.name
        return model.eval()

    def own_head(self) -> OwnHead | None:
        """The classifier that the base model was published with; None where there is none.

        Without its weights here (`inspect` fetches none) it is as large as `config.json` says, on the meta device.
        """
        labels = self.settings.get("id2label")
        names = [str(name) for name in labels.values()] if isinstance(labels, dict) else []
        classes = self.settings.get("architectures")
        if not (isinstance(classes, list) and any(str(c).endswith("ForImageClassification") for c in classes)):
            return None
        width, weight_key, bias_key = self.tower_config().hidden_size, "classifier.weight", "classifier.bias"
        if not (self.folder / WEIGHTS).is_file():
            return OwnHead(torch.empty(len(names), width, device="meta"), None, names) if names else None
        try:
            shapes = read_safetensors_header(self.folder / WEIGHTS).bounded_shapes(_MAX_WEIGHT_BYTES)
            shape = shapes.get(weight_key, ())
            if len(shape) != 2 or shape[1] not in (width, 2 * width):
                return None
            with safe_open(self.folder / WEIGHTS, framework="pt") as file:
                weight = file.get_tensor(weight_key).float()
                bias = file.get_tensor(bias_key).float() if shapes.get(bias_key) == shape[:1] else None
        except (OSError, ValueError, SafetensorError):  # whoever loads the tower says it
            return None
        return OwnHead(weight, bias, names if len(names) == len(weight) else []) if weight.isfinite().all() else None

    def image_processor(self) -> Any:
        """The image processor. Raises `AdapterError` where there is none that transformers knows."""
        try:
            for name in ("preprocessor_config.json", "processor_config.json"):
                if (self.folder / name).is_file():
                    read_settings(self.folder / name)
            # of a file that names no processor the model's type does
            config = CONFIG_MAPPING[self.model_type]()
            with LOADING:
                return AutoImageProcessor.from_pretrained(
                    self.folder, config=config, backend="pil", trust_remote_code=False, local_files_only=True
                )
        except Exception as error:  # noqa: BLE001 - transformers raises anything for settings of a stranger
            raise self._refusal(error) from error

    def _weight_files(self) -> list[Path]:
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        if not (self.folder / _INDEX).is_file():
            raise AdapterError(
                f"{self.name}: the backbone cannot be loaded ({WEIGHTS} is missing; weights of other formats could "
                "run code and are not read)."
            )
        try:
            names = set(parse_json(read_text(self.folder / _INDEX))["weight_map"].values())
            files = [self.folder / name for name in sorted(names) if _SHARD.fullmatch(name)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{self.name}: {_INDEX} is damaged ({error!r}).") from error
        if not files or len(files) < len(names) or not all(file.is_file() for file in files):
            raise AdapterError(f"{self.name}: {_INDEX} names files that are not there.")
        return files

    def _check_size(self, config: PreTrainedConfig, files: list[Path]) -> None:
        """Refuse a configuration whose model the files could not fill, before it takes memory."""
        stored = 0
        for file in files:
            try:
                stored += sum(map(count, read_safetensors_header(file).bounded_shapes(_MAX_WEIGHT_BYTES).values()))
            except (OSError, ValueError) as error:
                raise AdapterError(f"{self.name}: {file.name} is truncated or damaged, or unsafe: {error}.") from error
        described = num_parameters(config)
        if described > _MOST_DESCRIBED * stored:
            raise AdapterError(
                f"{self.name}: config.json describes a model of at least {described} parameters, but "
                f"{_names(files)} holds {stored}. They do not belong together."
            )

    def _check_whole(self, model: PreTrainedModel, loading: Any, files: list[Path], new: tuple[str, ...]) -> None:
        where, advice = f"{self.name}: {_names(files)}", "Do config.json and the weights belong together?"
        missing = sorted(k for k in loading["missing_keys"] if not _UNUSED.search(k) and not k.startswith(new))
        if missing:
            raise AdapterError(f"{where} lacks {len(missing)} tensor(s) of the model: {_first(missing)}. {advice}")
        for key, found, expected in sorted(loading["mismatched_keys"]):
            if not key.startswith(new):
                raise AdapterError(f"{where}: {key} must be {tuple(expected)}, got {tuple(found)}. {advice}")
        unused = "" if hasattr(model, "text_model") else "text_model."
        surplus = sorted(
            key for key in loading["unexpected_keys"] if _LAYER.search(key) and not (unused and key.startswith(unused))
        )
        if surplus:
            raise AdapterError(
                f"{where} holds {len(surplus)} tensor(s) of layers that config.json does not describe: "
                f"{_first(surplus)}. {advice}"
            )

    def _refusal(self, error: Exception) -> AdapterError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return AdapterError(f"{self.name}: the backbone cannot be loaded ({reason}).")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers shows no bar and no report: what is missing is an error of ours, or new as the caller wants it."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _pooler(config: PreTrainedConfig) -> dict[str, Any]:
    return {"add_pooling_layer": False} if config.model_type in _WITH_POOLER else {}


def _names(files: list[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].name} to {files[-1].name}"


def _first(keys: list[str], shown: int = 3) -> str:
    return ", ".join(key[:200] for key in keys[:shown])
