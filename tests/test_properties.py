"""What must hold for all episodes, masks, shards and configs, on examples that hypothesis looks for."""

import dataclasses
import json
import tempfile
import typing
from pathlib import Path

import pytest
import torch
import yaml
from helpers_tiny import ListedShard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_recycle.backbones.token_selection import keep_tokens, num_kept, select_top, take_patches
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.episodes import EpisodeSampler, class_identities
from lora_recycle.distillation.surrogate_images import SurrogateImages
from lora_recycle.errors import ConfigError, DataError
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.pool.config import AdapterTrainingConfig
from lora_recycle.runtime.config import read_yaml
from lora_recycle.surrogate.dataset import (
    Shard,
    SurrogateDataset,
    load_shard,
    save_shard,
    shard_config_id,
    write_manifest,
)


seeds = st.integers(0, 2**31)
sizes = st.lists(st.integers(0, 12), min_size=1, max_size=8)
ways_shots_queries = st.tuples(st.integers(2, 6), st.integers(1, 4), st.integers(1, 6))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shuffled(sizes: list[int], seed: int) -> torch.Tensor:
    """A label for each image, `sizes[c]` of class c, in any order."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=generator(seed))]


@given(sizes, ways_shots_queries, seeds)
def test_evaluation_episodes(sizes, numbers, seed):
    (ways, shots, queries), labels = numbers, shuffled(sizes, seed)
    usable = {label: size for label, size in enumerate(sizes) if size > shots}
    if len(usable) < ways:
        with pytest.raises(DataError, match=f"found {len(usable)} such classes"):
            sample_episodes(labels, ways, shots, queries, 4, seed)
        return
    drawn = sample_episodes(labels, ways, shots, queries, 4, seed)
    for episode in drawn:
        assert episode.support.shape == (ways, shots) and len(episode.classes.unique()) == ways
        assert (labels[episode.support] == episode.classes[:, None]).all()
        assert torch.equal(labels[episode.query], episode.classes[episode.query_labels])
        every = torch.cat([episode.support.flatten(), episode.query])
        assert len(every.unique()) == len(every)
        expected = [min(queries, usable[label] - shots) for label in episode.classes.tolist()]
        assert episode.query_labels.bincount(minlength=ways).tolist() == expected
    complete = all(size == 0 or size >= shots + queries for size in sizes)
    assert complete == (not drawn.notes)


@given(sizes, ways_shots_queries, seeds)
def test_more_evaluation_episodes_begin_with_the_same_ones(sizes, numbers, seed):
    (ways, shots, queries), labels = numbers, shuffled(sizes, seed)
    assume(sum(size > shots for size in sizes) >= ways)
    few, many = (sample_episodes(labels, ways, shots, queries, count, seed) for count in (2, 5))
    for one, other in zip(few, many, strict=False):
        for field in dataclasses.fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name))


#: Adapters, each with the number of images of its classes, whose names repeat among adapters
pools = st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 6), min_size=1), min_size=1, max_size=4)


@given(pools, ways_shots_queries, seeds)
def test_distillation_episodes(pool, numbers, seed):
    ways, shots, queries = numbers
    shards = [ListedShard({"labels": list(classes)}, shuffled(list(classes.values()), seed)) for classes in pool]
    images, identities = SurrogateImages(shards, []), class_identities(shards)
    names = [shard.adapter["labels"][c] for shard in shards for c in shard.labels.tolist()]
    sources = [number for number, shard in enumerate(shards) for _ in range(len(shard))]
    enough = [{name for name, size in classes.items() if size > shots} for classes in pool]
    if len(set().union(*enough)) < ways:
        with pytest.raises(DataError, match=f"has {len(set().union(*enough))} different classes"):
            EpisodeSampler(images, identities, ways, shots, queries)
        return
    sampler = EpisodeSampler(images, identities, ways, shots, queries)
    episodes = [sampler.interpolated(generator(seed))]
    if any(len(classes) >= ways for classes in enough):
        episodes.append(sampler.single_source(generator(seed)))
        assert {sources[i] for i in episodes[1].support.flatten().tolist()} == {episodes[1].source}
    else:
        with pytest.raises(DataError, match=f"No adapter has {ways} classes"):
            sampler.single_source(generator(seed))
    for episode in episodes:
        rows = torch.cat([episode.support, episode.query], 1)
        assert episode.support.shape == (ways, shots) and 1 <= episode.query.shape[1] <= queries
        assert len(rows.unique()) == rows.numel()
        shown = [{(names[i], sources[i]) for i in row} for row in rows.tolist()]
        assert all(len(way) == 1 for way in shown)  # one class of one adapter in each way
        assert len({name for way in shown for name, _ in way}) == ways  # and no thing twice


@given(st.integers(1, 300), st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_some_patches_are_always_kept_and_a_larger_share_keeps_more(patches, one, other):
    small, large = sorted((one, other))
    assert 1 <= num_kept(patches, small) <= num_kept(patches, large) <= patches == num_kept(patches, 1.0)


@given(st.integers(1, 4), st.integers(1, 30), st.data())
def test_kept_patches_are_the_best_in_their_order(batch, patches, data):
    k, seed = data.draw(st.integers(1, patches)), data.draw(seeds)
    scores = torch.randint(0, 9, (batch, patches), generator=generator(seed)).float()  # with ties
    kept = select_top(scores, k)
    assert kept.shape == (batch, k) and kept.dtype == torch.int64 and (kept.diff() > 0).all()
    left = torch.ones_like(scores, dtype=torch.bool).scatter(1, kept, False)
    worst = scores.gather(1, kept).min(1).values
    assert (scores.masked_fill(~left, -1).max(1).values <= worst).all()


@given(st.integers(1, 3), st.integers(0, 2), st.integers(1, 12), st.data())
def test_kept_tokens_are_those_of_the_positions(batch, prefix, patches, data):
    hidden = torch.randn(batch, prefix + patches, 3, generator=generator(data.draw(seeds)))
    kept = torch.tensor([sorted(data.draw(st.permutations(range(patches)))[: patches // 2 + 1]) for _ in range(batch)])
    found = keep_tokens(hidden, kept, prefix)
    for image in range(batch):
        rows = [*range(prefix), *(prefix + position for position in kept[image].tolist())]
        assert torch.equal(found[image], hidden[image][rows])
    assert torch.equal(keep_tokens(hidden, torch.arange(patches).expand(batch, -1), prefix), hidden)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), seeds)
def test_all_patches_together_are_the_image(batch, rows, columns, size, seed):
    images = torch.randn(batch, 3, rows * size, columns * size, generator=generator(seed))
    every = torch.arange(rows * columns).expand(batch, -1)
    patches = take_patches(images, every, size).view(batch, rows, columns, 3, size, size)
    assert torch.equal(patches.permute(0, 3, 1, 4, 2, 5).reshape(images.shape), images)
    order = torch.randperm(rows * columns, generator=generator(seed)).expand(batch, -1)
    assert torch.equal(take_patches(images, order, size), patches.flatten(1, 2)[:, order[0]])


@st.composite
def shards(draw):
    count, classes, side, width = (draw(st.integers(low, 5)) for low in (1, 2, 1, 1))
    rng, names = generator(draw(seeds)), st.text(max_size=8)
    kept = draw(st.integers(0, min(4, side * side)))  # of patches, of which there are no more than pixels
    return Shard(
        adapter={
            "name": draw(names),
            "sha256": draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
            "labels": draw(st.none() | st.lists(names, min_size=classes, max_size=classes)),
        },
        pixels=torch.randint(0, 256, (count, 3, side, side), generator=rng, dtype=torch.uint8),
        labels=torch.randint(0, classes, (count,), generator=rng),
        teacher_logits=torch.randn(count, classes, generator=rng),
        teacher_features=torch.randn(count, width, generator=rng).half(),
        kept_tokens=torch.arange(kept, dtype=torch.int16).repeat(count, 1) if kept else None,
    )


def same_shard(one: Shard, other: Shard) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Shard)]
    return all(torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@settings(max_examples=10)
@given(shards(), st.text(max_size=8), st.data())
def test_a_shard_comes_back_as_it_was(shard, config_id, data):
    with tempfile.TemporaryDirectory() as folder:
        path, again = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
        save_shard(path, shard, config_id)
        save_shard(again, shard, config_id)
        assert path.read_bytes() == again.read_bytes()
        assert same_shard(load_shard(path), shard) and shard_config_id(path) == config_id
        write_manifest(Path(folder), {"config": {}}, [path])
        surrogate = SurrogateDataset.from_pretrained(folder)
        assert len(surrogate) == len(shard) and same_shard(surrogate.shard(0, verify=True), shard)
        rows = torch.tensor(data.draw(st.lists(st.integers(0, len(shard) - 1), min_size=1, max_size=9)))
        for name, file in surrogate.shard_rows(0).tensors.items():
            assert torch.equal(file.read(rows), getattr(shard, name)[rows])


@settings(max_examples=10)
@given(shards(), st.data())
def test_a_spoilt_shard_is_refused(shard, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        save_shard(path, shard, "id")
        surrogate, whole = write_manifest(Path(folder), {"config": {}}, [path]), path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(DataError):
            load_shard(path)
        place, flipped = data.draw(st.integers(0, len(whole) - 1)), bytearray(whole)
        flipped[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(flipped)
        with pytest.raises(DataError, match="not the file that manifest.json describes"):
            surrogate.shard(0, verify=True)


CONFIGS = (DistillationConfig, InversionConfig, AdapterTrainingConfig)
#: What a YAML file may hold in a setting's place.
scalars = st.none() | st.booleans() | st.integers(-3, 500) | st.floats() | st.text(max_size=6)
anything = scalars | st.lists(scalars, max_size=3) | st.dictionaries(scalars, scalars, max_size=3)


def plausible(field: dataclasses.Field, hint) -> st.SearchStrategy:
    """Values of the field's own type, in and out of its range."""
    if field.metadata["choices"]:
        return st.sampled_from(field.metadata["choices"])
    numbers, shares = st.integers(0, 300), st.floats(0, 1) | st.floats(0, 1e6)
    return {
        int: numbers,
        float: shares,
        bool: st.booleans(),
        str: st.text(max_size=12),
        int | None: st.none() | numbers,
        float | None: st.none() | shares,
        str | None: st.none() | st.text(max_size=12),
        dict[str, float]: st.dictionaries(st.sampled_from(["noise", "fractal", "tv"]), shares, max_size=2),
        dict[int, float]: st.dictionaries(numbers, shares, max_size=2),
    }[hint]


@pytest.mark.parametrize("config_class", CONFIGS)
@given(data=st.data())
def test_a_config_survives_its_file(config_class, data):
    hints = typing.get_type_hints(config_class)
    chosen = data.draw(st.lists(st.sampled_from(dataclasses.fields(config_class)), max_size=4, unique=True))
    values = {field.name: data.draw(plausible(field, hints[field.name]), field.name) for field in chosen}
    try:
        config = config_class(**values)
    except ConfigError:
        assume(False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(yaml.safe_dump(config.to_dict(), allow_unicode=True), encoding="utf-8")
        assert config_class.from_yaml(path) == config
    assert config_class.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("config_class", CONFIGS)
@given(data=st.data())
def test_an_ill_typed_setting_is_our_error(config_class, data):
    name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(config_class)]))
    value, hint = data.draw(anything), typing.get_type_hints(config_class)[name]
    try:
        found = getattr(config_class.from_dict({name: value}), name)
    except ConfigError as error:
        assert config_class.__name__ in str(error)
        return
    kinds = (typing.get_origin(hint) or hint,) if not typing.get_args(hint) else typing.get_args(hint)
    plain = tuple(typing.get_origin(kind) or kind for kind in kinds) if isinstance(hint, type(int | None)) else ()
    assert isinstance(found, plain or (typing.get_origin(hint) or hint))


@pytest.mark.parametrize("config_class", CONFIGS)
@given(name=scalars | st.text(min_size=1))
def test_an_unknown_setting_is_our_error(config_class, name):
    assume(name not in {field.name for field in dataclasses.fields(config_class)})
    with pytest.raises(ConfigError, match="unknown key"):
        config_class.from_dict({name: 1})


@given(st.binary(max_size=40) | st.text(":-[]{}&*!|>'\"#%@` \nab1", max_size=40).map(str.encode))
def test_any_file_is_a_recipe_or_our_error(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_bytes(content)
        try:
            assert isinstance(read_yaml(path), dict)
        except ConfigError as error:
            assert "recipe.yaml" in str(error)
