"""`lora-recycle benchmark`: methods x data sets x shots on the same episodes, cell by cell, resumable."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..adapters.pull import pull_adapter
from ..adapters.sources import one_id
from ..backbones.backbone import Backbone
from ..errors import ConfigError
from ..fewshot.episodes import EpisodeSet
from ..hub.embedded import backbone_name, pool_path, resolve_meta_lora
from ..images.labelled import LabelledImages, load_labelled_images
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..pool.pool import AdapterPool
from ..runtime.files import tensors_sha256
from ..runtime.terminal import single_line
from .cells import Cell, data_checksum, identity
from .engine import POOLLESS, EvaluationEngine, draw_episodes
from .recipe import STATIC, TUNED, BenchmarkRecipe, DataSpec, PoolSpec
from .stored_features import StoredFeatures


@dataclasses.dataclass
class LoadedPool:
    """A pool of the recipe with its meta-LoRAs and the checksums of both."""

    pool: AdapterPool
    models: dict[str, MetaLoRAForFewShotClassification]
    backbone_sum: str
    adapter_sums: list[str]
    model_sums: dict[str, str]


class Benchmark:
    """The cells of a recipe.

    Args:
        recipe ([`BenchmarkRecipe`]): what to run.
        folder: where the cells lie, one file each. Cells of other recipes there are left alone.
        data_root (*optional*): where relative paths of data sets begin.
        device (*optional*): where to compute.
        features_dir (*optional*): as [`evaluate`] takes it.
    """

    def __init__(
        self,
        recipe: BenchmarkRecipe,
        folder: str | Path,
        data_root: str | Path | None = None,
        device: torch.device | str | None = None,
        features_dir: str | Path | None = None,
    ):
        self.features_dir = features_dir
        self.recipe, self.folder, self.device = recipe, Path(folder), device
        self.data_root = None if data_root is None else Path(data_root)
        self.notes: list[str] = []
        self._pools: dict[tuple, AdapterPool] = {}

    def run(self, part: tuple[int, int] = (0, 1), progress: bool = True) -> list[Cell]:
        """Every cell of the recipe, with its result where it is known now.

        Cells that are whole on disk are taken from there. `part` is (i, n): only every n-th group of cells (one method
        on one data set) from the i-th on is computed, so that several shells can share the work.

        Raises:
            ConfigError: a meta-LoRA of another base than its pool, or a pool of no adapters.
            DataError: a data set that cannot be read, or with too few classes or images for an episode.
        """
        loaded = {name: self._load_pool(name, spec) for name, spec in self.recipe.pools.items()}
        cells: list[Cell] = []
        number = 0
        bar = tqdm(total=self._count(), desc="benchmark", unit="cell", disable=not progress)
        for data in self.recipe.data:
            for engine, method, group in self._groups(data, loaded):
                missing = [cell for cell in group if not cell.load(self.folder)]
                if missing and number % part[1] == part[0]:
                    bar.set_postfix_str(single_line(f"{group[0].data}, {group[0].label}"))
                    for cell in missing:
                        cell.save(self.folder, engine.result(method, cell.shots))
                    engine.forget(method)
                cells, number = cells + group, number + 1
                bar.update(len(group))
        bar.close()
        for cell in cells:  # another shell may have finished it meanwhile
            if cell.result is None:
                cell.load(self.folder)
        return cells

    def _count(self) -> int:
        pairs = [(d, p) for d in self.recipe.data for p in self.recipe.pools.values() if p.runs_on(d)]
        return sum(len(self._methods(pool)) for _, pool in pairs) * len(self.recipe.episodes.shots)

    def _methods(self, pool: PoolSpec) -> list[str]:
        return list(dict.fromkeys(["frozen", "average", *(pool.methods or self.recipe.episodes.methods)]))

    def _groups(
        self, spec: DataSpec, loaded: dict[str, LoadedPool]
    ) -> Iterator[tuple[EvaluationEngine, str, list[Cell]]]:
        """Each method on one data set: the engine, the method, and a cell for each number of shots."""
        numbers = self.recipe.episodes
        pools = [name for name, pool in self.recipe.pools.items() if pool.runs_on(spec)]
        if not pools:
            raise ConfigError(f"{spec.path}: no pool of the recipe runs on it.")
        data, episodes = self._images_and_episodes(spec, loaded[pools[0]].pool.backbone)
        data_sum = data_checksum(data)
        for first, name in [(name == pools[0], name) for name in pools]:
            own = loaded[name]
            engine = EvaluationEngine(
                data,
                episodes,
                own.pool.backbone,
                own.pool,
                own.models,
                tuning=self.recipe.tuning,
                tuning_episodes=numbers.tuning_episodes,
                seed=numbers.seed,
                stored=None if self.features_dir is None else StoredFeatures(self.features_dir, data),
            )
            for method in self._methods(self.recipe.pools[name]):
                base = method.partition(" + ")[0]
                poolless = method in POOLLESS or base == "frozen"
                meta = base if base in own.models else base.removesuffix(TUNED).removesuffix(STATIC)
                if meta in self.recipe.meta_loras and meta not in own.models:
                    continue  # of another pool
                if poolless and not first:
                    continue
                adapters = [] if poolless or meta in own.models else own.adapter_sums
                sums = {"adapters": adapters, "meta_lora": own.model_sums.get(meta)}
                label = method if first else f"{method} @ {name}"
                yield (
                    engine,
                    method,
                    [self._cell(engine, label, method, name, k, data_sum, own.backbone_sum, sums) for k in episodes],
                )

    def _images_and_episodes(self, spec: DataSpec, backbone: Backbone) -> tuple[LabelledImages, dict[int, EpisodeSet]]:
        """The images of a data set, and its episodes by shots."""
        numbers, size, resample = self.recipe.episodes, backbone.image_size, int(backbone.processor.resample)
        place = spec.location(self.data_root)
        data = load_labelled_images(
            place,
            size,
            resample,
            spec.max_per_class,
            spec.split,
            numbers.seed,
            without_classes=spec.without_classes,
            without_images=spec.without_images,
        )
        episodes = draw_episodes(data, numbers)
        for drawn in episodes.values():
            self.notes += [note for note in drawn.notes if note not in self.notes]
        return data, episodes

    def _cell(
        self,
        engine: EvaluationEngine,
        label: str,
        method: str,
        pool: str,
        shots: int,
        data_sum: str,
        backbone_sum: str,
        sums: dict[str, Any],
    ) -> Cell:
        numbers, base = self.recipe.episodes, method.partition(" + ")[0]
        asked: dict[str, Any] = {
            "ways": numbers.ways,
            "shots": shots,
            "queries": numbers.queries,
            "seed": numbers.seed,
        }
        asked |= {"episodes": engine.count(method, shots), "method": method, **sums}
        own = identity(data_sum, backbone_sum, engine.settings(method), asked)
        meta = base.removesuffix(STATIC)
        kind = "tuned" if engine.tunes(method) else "meta-lora" if {base, meta} & {*engine.models} else "rival"
        kind = "frozen" if method == "frozen" else kind
        transductive = engine.transductive(method)
        return Cell(label, method, engine.data.name, pool, numbers.ways, shots, kind, transductive, own)

    def _load_pool(self, name: str, spec: PoolSpec) -> LoadedPool:
        key = (spec.adapters, spec.base_model)
        if key not in self._pools:
            sources = [pool_path() if source == "demo" else source for source in spec.adapters]
            self._pools[key] = AdapterPool.from_pretrained(sources, spec.base_model, device=self.device)
        pool = self._pools[key]
        chosen = [i for i, info in enumerate(pool.infos) if fnmatch.fnmatch(info.name, spec.names)]
        if not chosen:
            names = ", ".join(info.name for info in pool.infos[:5])
            raise ConfigError(f"pools: {name}: no adapter has a name like {spec.names!r}; there are {names}, ...")
        pool = pool.subset(chosen)
        models, sums = {}, {}
        for method, source in spec.meta_loras.items():
            models[method], sums[method] = self._load_model(source, pool, spec)
        adapter_sums = [info.sha256 for info in pool.infos]
        return LoadedPool(pool, models, tensors_sha256(pool.backbone.state_dict()), adapter_sums, sums)

    def _load_model(self, source: str, pool: AdapterPool, spec: PoolSpec) -> tuple:
        path, revision = one_id(source)
        model = MetaLoRAForFewShotClassification.from_pretrained(
            path, revision=revision, base_model=spec.base_model, device=self.device
        )
        mine, theirs = backbone_name(model.backbone.name), backbone_name(pool.backbone.name)
        if mine != theirs:
            raise ConfigError(f"{source} adapts {mine}, its pool {theirs}. If they are the same, give `base_model:`.")
        return model, pull_adapter(resolve_meta_lora(path), revision=revision).sha256
