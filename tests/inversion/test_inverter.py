"""Inversion on the tiny pool: images that their adapter recognises, stored with what it says of them."""

import copy
import dataclasses

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers_backbones import FAMILIES, build
from helpers_tiny import copied_state, planted_adapter, random_factors, random_pixels, same_weights, tiny_processor
from PIL import Image

from lora_recycle.adapters.heads import Head
from lora_recycle.adapters.stored import StoredAdapter
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.backbones.token_selection import select_top
from lora_recycle.errors import AdapterError, ConfigError
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.inverter import LoRAInverter
from lora_recycle.inversion.pixel_spaces import MultiResolution, Pixels
from lora_recycle.pool.pool import AdapterPool


def quick(**changes):
    return InversionConfig(**{"images_per_class": 3, "iterations": 2, "jitter": 1, **changes})


def shards_by_adapter(surrogate):
    files = [surrogate.folder / entry["file"] for entry in surrogate.manifest["shards"]]
    names = [entry["adapter"]["sha256"] for entry in surrogate.manifest["shards"]]
    return dict(zip(names, [file.read_bytes() for file in files], strict=True))


@pytest.mark.parametrize("parameterization", ["multires", "pixels"])
def test_loss_falls_and_accuracy_rises(tiny_pool, parameterization):
    common = {"images_per_class": 4, "jitter": 0, "stop_at": 1.0, "starts": {"noise": 1.0}}
    common["parameterization"] = parameterization
    before = LoRAInverter(tiny_pool, InversionConfig(iterations=1, lr=1e-9, **common)).invert(0)
    inverter = LoRAInverter(tiny_pool, InversionConfig(iterations=25, lr=0.1, **common))
    after = inverter.invert(0)
    assert torch.equal(before.labels, after.labels)
    assert len(inverter.losses) == 25 and inverter.losses[-1] < 0.7 * inverter.losses[0]
    assert after.accuracy > before.accuracy and after.confidence > before.confidence + 0.2


def test_labels_are_balanced_and_classes_limited(tiny_pool):
    shard = LoRAInverter(tiny_pool, quick(max_classes=2)).invert(0)
    assert shard.labels.bincount().max() == 3 and len(shard.labels.unique()) == 2 and len(shard) == 6
    assert LoRAInverter(tiny_pool, quick()).invert(0).labels.bincount().tolist() == [3, 3, 3, 3]


@torch.no_grad()
def test_what_is_stored_is_said_of_the_stored_pixels(tiny_pool, tiny_surrogate):
    for i, adapter in enumerate(tiny_pool):
        shard = tiny_surrogate.shard(i)
        assert shard.adapter["sha256"] == adapter.info.sha256 and shard.label_names == [f"n{i + c}" for c in range(4)]
        with tiny_pool.folded(i) as backbone:
            hidden, _ = backbone(backbone.normalize(shard.pixels))
        logits = adapter.logits(backbone, hidden)
        torch.testing.assert_close(shard.teacher_logits, logits, rtol=1e-4, atol=1e-4)
        with tiny_pool.folded(i) as backbone:
            features = backbone.features(backbone.normalize(shard.pixels))
        torch.testing.assert_close(shard.teacher_features.float(), features, rtol=2e-3, atol=2e-3)


def assert_largest_are_kept(scores, kept):
    """(N, K) are the numbers, in order, of the largest of (N, P) scores, but for those that rounding makes alike."""
    assert (kept.diff() > 0).all()
    left = scores.scatter(1, kept.long(), -1.0)
    assert (scores.gather(1, kept.long()).amin(1) > left.amax(1) - 1e-5).all()


@torch.no_grad()
def test_kept_tokens_are_what_cls_looks_at(tiny_pool, tiny_surrogate):
    for i in range(len(tiny_pool)):
        shard = tiny_surrogate.shard(i)
        with tiny_pool.folded(i) as backbone:
            eager = copy.deepcopy(backbone.model)
        eager.set_attn_implementation("eager")
        attentions = eager(tiny_pool.backbone.normalize(shard.pixels), output_attentions=True).attentions
        row = attentions[len(tiny_pool.backbone.layers) // 2][:, :, 0].mean(1)[:, 1:]
        assert shard.kept_tokens.dtype == torch.int16 and shard.kept_tokens.shape == (24, 8)
        assert_largest_are_kept(row, shard.kept_tokens)


def test_without_pruning_no_mask_is_stored(tiny_pool):
    assert LoRAInverter(tiny_pool, quick(keep_ratio=1.0)).invert(0).kept_tokens is None


def test_masks_are_of_the_last_pruning_layer_unless_they_are_not_wanted(tiny_pool):
    shard = LoRAInverter(tiny_pool, quick(prune={0: 0.25}, jitter=0)).invert(1)
    with tiny_pool.folded(1) as backbone, backbone.record_attention(0) as attention:
        backbone(backbone.normalize(shard.pixels))
    assert torch.equal(shard.kept_tokens.long(), select_top(attention.row[:, 1:], 4))
    assert LoRAInverter(tiny_pool, quick(prune={0: 0.25}, keep_ratio=1.0)).invert(1).kept_tokens is None


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_taken_on_the_stored_pixels_whatever_the_jitter(family):
    """Images are shifted and mirrored while they are optimised, but stored as they are: no mask needs moving."""
    _, base, prefix = build(family)
    backbone = Backbone(base, tiny_processor(), family)
    layer = next(name for name, module in base.named_modules() if name.endswith("q_proj"))
    adapter = planted_adapter("planted", random_factors({layer: (32, 2, 32)}, 0))
    adapter = dataclasses.replace(adapter, head=Head(torch.randn(3, backbone.head_size)))
    pool = AdapterPool(backbone, [adapter])
    shard = LoRAInverter(pool, quick(prune={0: 0.5, 1: 0.25}, jitter=4, flip=True)).invert(0)
    with pool.folded(0):
        eager = copy.deepcopy(base)
    eager.set_attn_implementation("eager")
    attention = eager(backbone.normalize(shard.pixels), output_attentions=True).attentions[1]
    row = attention.mean((1, 2)) if family == "siglip" else attention[:, :, 0].mean(1)
    assert shard.kept_tokens.shape[1] == 4
    assert_largest_are_kept(row[:, prefix:], shard.kept_tokens)


def test_patches_are_dropped_from_the_first_iteration_asked_for(tiny_pool, monkeypatch):
    seen, forward = [], Backbone.forward

    def watch(self, *args, prune=None, **kwargs):
        hidden, kept = forward(self, *args, prune=prune, **kwargs)
        seen.append(hidden.shape[1])
        return hidden, kept

    monkeypatch.setattr(Backbone, "forward", watch)
    LoRAInverter(tiny_pool, quick(iterations=4, prune={0: 0.5, 1: 0.25}, prune_start=3)).invert(0)
    assert seen == [17, 17, 17, 5, 17]  # and all tokens when the stored pixels are described


def test_pruning_changes_the_images(tiny_pool):
    plain = LoRAInverter(tiny_pool, quick(iterations=3)).invert(0)
    pruned = LoRAInverter(tiny_pool, quick(iterations=3, prune={0: 0.25})).invert(0)
    late = LoRAInverter(tiny_pool, quick(iterations=3, prune={0: 0.25}, prune_start=3)).invert(0)
    assert not torch.equal(plain.pixels, pruned.pixels) and torch.equal(plain.pixels, late.pixels)


def test_finished_images_stop_and_the_others_go_on_as_if_alone(tiny_pool):
    common = {"images_per_class": 4, "jitter": 0, "lr": 0.1, "priors": {}, "batch_size": 7}

    def pixels(iterations, stop_at=1.0):
        return LoRAInverter(tiny_pool, InversionConfig(iterations=iterations, stop_at=stop_at, **common)).invert(0)

    early, late = pixels(5).pixels, pixels(15)
    middle = pixels(10).pixels
    assert torch.equal(pixels(15, stop_at=1e-6).pixels, early)  # all are finished at the first look
    stopped = pixels(15, stop_at=0.6).pixels
    after = {  # how far each image is from where it would be after so many iterations, in grey levels
        n: (stopped.float() - other.float()).abs().amax((1, 2, 3))
        for n, other in ((5, early), (10, middle), (15, late.pixels))
    }
    same = {n: gap <= 1 for n, gap in after.items()}
    assert (same[5] | same[10] | same[15]).all()
    assert same[5].any() and not same[5].all()


def test_same_seed_same_bytes_whatever_the_other_adapters(tiny_pool, tmp_path):
    config = quick(keep_ratio=0.5, flip=True)
    one = shards_by_adapter(LoRAInverter(tiny_pool, config).run(tmp_path / "one", progress=False))
    again = shards_by_adapter(LoRAInverter(tiny_pool, config).run(tmp_path / "again", progress=False))
    fewer = LoRAInverter(tiny_pool.subset([2, 0]), config).run(tmp_path / "fewer", progress=False)
    assert len(one) == 4 and one == again
    for name, content in shards_by_adapter(fewer).items():
        assert content == one[name]
    other = LoRAInverter(tiny_pool.subset([0]), dataclasses.replace(config, seed=1)).invert(0)
    assert not torch.equal(other.pixels, fewer.shard(1).pixels)


def test_the_pool_is_left_as_it_was(tiny_pool):
    before = copied_state(tiny_pool.backbone)
    LoRAInverter(tiny_pool, quick()).invert(2)
    assert same_weights(tiny_pool.backbone, before)
    assert all(p.grad is None for p in tiny_pool.backbone.parameters())


def test_finished_shards_are_kept_and_other_settings_refused_unless_asked_for(tiny_pool, tmp_path, monkeypatch):
    pool, made = tiny_pool.subset([0, 1]), []
    surrogate = LoRAInverter(pool, quick()).run(tmp_path, progress=False, on_shard=lambda name, _: made.append(name))
    files = [tmp_path / entry["file"] for entry in surrogate.manifest["shards"]]
    assert made == [file.name for file in files]
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    (tmp_path / "manifest.json").unlink()  # as after a kill
    made.clear()
    LoRAInverter(pool, quick()).run(tmp_path, progress=False, on_shard=lambda name, _: made.append(name))
    assert made == [files[1].name] and files[0].stat().st_mtime_ns == times[0]
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(StoredAdapter, "load", lambda self: pytest.fail("read"))
        LoRAInverter(tiny_pool.subset([0, 1]), quick()).run(tmp_path, progress=False)  # nothing is left to do
    changed = LoRAInverter(pool, quick(lr=0.02))
    with pytest.raises(ConfigError, match=r"of another recipe \(lr: 0.05 there, 0.02 here\).*2 in all.*--no-resume"):
        changed.run(tmp_path, progress=False)
    assert files[0].stat().st_mtime_ns == times[0]
    changed.run(tmp_path, progress=False, on_shard=lambda name, _: made.append(name), resume=False)
    assert len(made) == 2 and files[0].stat().st_mtime_ns > times[0]


def test_a_damaged_shard_is_made_again(tiny_pool, tmp_path, caplog):
    pool = tiny_pool.subset([0])
    surrogate = LoRAInverter(pool, quick()).run(tmp_path, progress=False)
    path = tmp_path / surrogate.manifest["shards"][0]["file"]
    whole = path.read_bytes()
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    for damaged in (whole[:-100], flipped, b""):
        path.write_bytes(damaged)
        caplog.clear()
        LoRAInverter(pool, quick()).run(tmp_path, progress=False)
        assert path.read_bytes() == whole and f"{path} is damaged; it is made again." in caplog.text


@pytest.mark.parametrize("start", ["noise", "dead-leaves", "fractal", "strokes"])
def test_no_iterations_keep_the_starts_and_ask_the_adapter(tiny_pool, start):
    shard = LoRAInverter(tiny_pool, quick(iterations=0, starts={start: 1.0})).invert(0)
    assert torch.equal(shard.labels, shard.teacher_logits.argmax(1)) and shard.accuracy == 1.0
    assert shard.pixels.float().std() > 5


def test_starts_from_a_folder_of_images(tiny_pool, tmp_path):
    pixels = random_pixels(5)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    config = quick(iterations=0, starts={"images": 1.0}, start_images=str(tmp_path))
    shard = LoRAInverter(tiny_pool, config).invert(0)
    known = {picture.numpy().tobytes() for picture in pixels}
    assert {picture.numpy().tobytes() for picture in shard.pixels} <= known


def test_starts_from_other_adapters_surrogates(tiny_pool, tiny_surrogate):
    config = quick(iterations=0, starts={"images": 1.0}, start_images=str(tiny_surrogate.folder))
    shard = LoRAInverter(tiny_pool, config).invert(1)
    known = {p.numpy().tobytes() for i in range(4) for p in tiny_surrogate.shard(i).pixels}
    assert {picture.numpy().tobytes() for picture in shard.pixels} <= known


def test_priors_pull(tiny_pool):
    common = {"images_per_class": 2, "iterations": 10, "jitter": 0, "starts": {"noise": 1.0}, "lr": 0.1}
    rough, smooth = (
        LoRAInverter(tiny_pool, InversionConfig(priors={"tv": weight}, **common)).invert(0).pixels.float()
        for weight in (0.0, 50.0)
    )
    assert smooth.diff(dim=-1).abs().mean() < 0.9 * rough.diff(dim=-1).abs().mean()


def test_an_adapter_without_a_head_is_named_at_once(tiny_pool):
    headless = planted_adapter("headless", random_factors({"layers.0.attention.q_proj": (32, 2, 32)}, 0))
    with pytest.raises(AdapterError, match="headless: has no classification head"):
        LoRAInverter(AdapterPool(tiny_pool.backbone, [tiny_pool[0], headless]), quick())


def test_a_head_that_does_not_fit_is_named_at_once(tiny_pool):
    wide = dataclasses.replace(tiny_pool[0], head=Head(torch.zeros(4, 64)))
    with pytest.raises(AdapterError, match="adapter-0: its head reads 64 features, .* gives 32"):
        LoRAInverter(AdapterPool(tiny_pool.backbone, [tiny_pool[1], wide]), quick())


def test_a_layer_that_is_not_there(tiny_pool):
    with pytest.raises(ConfigError, match=r"prune: .*tiny-vit has the layers 0 to 1, got 2"):
        LoRAInverter(tiny_pool, quick(prune={2: 0.5}))


def test_parameterisations_start_at_the_image():
    images = torch.rand(2, 3, 32, 32) * 0.9 + 0.05
    assert [m.shape[-1] for m in MultiResolution(images).maps] == [4, 8, 16, 32]
    torch.testing.assert_close(MultiResolution(images)(), images)
    space = Pixels(images)
    space.images.data += 2
    assert torch.equal(space(), torch.ones_like(images))
    space().sum().backward()
    assert (space.images.grad == 1).all()  # clipped pixels can still come back


def test_mixed_precision_computes_in_bfloat16_and_is_another_run(tiny_pool, launched_with_bf16, monkeypatch):
    inverter, seen = LoRAInverter(tiny_pool, quick()), []
    handle = tiny_pool.backbone.model.layers[0].mlp.fc1.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    shard = inverter.invert(0)
    handle.remove()
    assert torch.bfloat16 in seen[:2] and seen[-1] == torch.float32  # stored logits stay exact
    assert shard.teacher_logits.dtype == torch.float32
    other = inverter._identity(tiny_pool.infos[0])
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert LoRAInverter(tiny_pool, quick())._identity(tiny_pool.infos[0]) != other


def test_fp16_is_refused(tiny_pool, launched_with_bf16, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    with pytest.raises(ConfigError, match="mixed_precision"):
        LoRAInverter(tiny_pool, InversionConfig())


def test_a_backbone_in_bfloat16_is_inverted(tiny_pool_path):
    pool = AdapterPool.from_pretrained(tiny_pool_path, dtype=torch.bfloat16)
    settings = {"priors": {"tv": 0.1, "patch_entropy": 0.1}, "keep_ratio": 0.5}
    shard = LoRAInverter(pool, quick(**settings)).invert(2)
    assert shard.teacher_logits.dtype == torch.float32 and shard.teacher_logits.isfinite().all()
    assert shard.teacher_features.dtype == torch.float16 and shard.kept_tokens.shape[1] == 8


def test_other_images_under_the_same_path_are_another_recipe(tiny_pool, tmp_path):
    config, pool = (
        {"iterations": 0, "starts": {"images": 1.0}, "start_images": str(tmp_path / "in")},
        tiny_pool.subset([0]),
    )
    (tmp_path / "in").mkdir()
    for shade in (10, 20):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(tmp_path / "in" / "a.png")
        inverter = LoRAInverter(pool, quick(**config))
        if shade == 10:
            surrogate = inverter.run(tmp_path / "out", progress=False)
            assert surrogate.manifest["data_sha256"] == inverter.data_sha256 and len(inverter.data_sha256) == 1
        else:
            with pytest.raises(ConfigError, match="another adapter, backbone, precision or data"):
                inverter.run(tmp_path / "out", progress=False)
