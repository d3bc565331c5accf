"""Whole fine-tuned checkpoints are members of a pool: exact alone, averaged and merged with adapters."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers_adapters import SIZES, edit_config
from helpers_tiny import copied_state, same_weights, tiny_vit, uniform
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from lora_recycle import AdapterPool, InversionConfig, LoRAInverter
from lora_recycle.adapters.pull import describe_place, find_places
from lora_recycle.adapters.usability import check_usable
from lora_recycle.errors import AdapterError
from lora_recycle.merging import Average, Ensemble, Knots, NearestGroup, Ties


WEIGHTS = "model.safetensors"
FOOD = {0: "apple", 1: "bread", 2: "cheese"}


@torch.no_grad()
def fine_tuned(seed: int = 0, reach: float = 0.03, base_seed: int = 0, names=FOOD, **config):
    """A classifier all of whose weights are moved from those of the tiny backbone, norms and embeddings too."""
    model = ViTForImageClassification(ViTConfig(**SIZES, id2label=names, **config)).eval()
    model.vit.load_state_dict(tiny_vit(base_seed).state_dict())
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter += uniform(parameter.shape, 0.5 if "classifier" in name else reach, generator)
    return model


@pytest.fixture
def food(tmp_path):
    """The folder of a fine-tuned checkpoint, and its model."""
    model = fine_tuned()
    model.save_pretrained(tmp_path / "food")
    return tmp_path / "food", model


def edit(folder, change):
    tensors = change(load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def logits(pool, index, pixel_values):
    with pool.folded(index) as backbone:
        return pool[index].logits(backbone, backbone(pixel_values)[0])


def test_a_checkpoint_of_the_hub_answers_as_it_does_alone(hub, tiny_backbone_path, tiny_pool_path, food):
    folder, model = food
    hub.put("org/base", tiny_backbone_path)
    commit = hub.put("org/food", folder)
    card = "---\nbase_model: org/base\nlicense: mit\n---\n# Food\n"
    commit = hub.put("org/food", {"README.md": card, "optimizer.pt": b"x", "pytorch_model.bin": b"x"})
    adapter = tiny_pool_path / "adapter-0"
    pool = AdapterPool.from_pretrained(["org/food", adapter], base_model="org/base", require_heads=True)
    info, pixel_values = pool.infos[0], torch.randn(3, 3, 32, 32)
    assert (info.name, info.revision, info.peft_type, info.base_model) == (
        "org/food",
        commit,
        "CHECKPOINT",
        "org/base",
    )
    assert info.labels == ("apple", "bread", "cheese") and info.to_source()["license"] == "mit"
    before = copied_state(pool.backbone.model)
    expected = model(pixel_values=pixel_values).logits
    torch.testing.assert_close(logits(pool, 0, pixel_values), expected, rtol=1e-4, atol=1e-5)
    assert same_weights(pool.backbone.model, before)
    alone = AdapterPool.from_pretrained("org/food")  # the base that its card names
    assert alone.backbone.name == "org/base" and torch.equal(
        logits(alone, 0, pixel_values), logits(pool, 0, pixel_values)
    )
    assert not hub.count("GET .*(optimizer|pytorch_model)")


def test_checkpoints_and_adapters_are_averaged_merged_and_grouped(tiny_backbone_path, tiny_pool_path, tmp_path):
    for i in range(2):
        fine_tuned(i).save_pretrained(tmp_path / f"run-{i}" / "checkpoint-20")
    sources = [tmp_path, tiny_pool_path / "adapter-0", tiny_pool_path / "adapter-1"]
    pool = AdapterPool.from_pretrained(sources, base_model=tiny_backbone_path)
    assert [info.name for info in pool.infos[:2]] == ["run-0/checkpoint-20", "run-1/checkpoint-20"]
    base = copied_state(pool.backbone.model)
    changes = []
    for i in range(len(pool)):
        with pool.folded(i) as backbone:
            changes.append({name: value - base[name] for name, value in copied_state(backbone.model).items()})
    with pool.folded() as backbone:
        for name, value in copied_state(backbone.model).items():
            mean = torch.stack([change[name] for change in changes]).mean(0)
            torch.testing.assert_close(value - base[name], mean, rtol=1e-3, atol=1e-5)
    module = "layers.0.mlp.fc2"
    b, a = pool.average(rank=4)[module]
    u, s, vh = torch.linalg.svd(torch.stack([change[f"{module}.weight"] for change in changes]).mean(0))
    torch.testing.assert_close(b @ a, u[:, :4] * s[:4] @ vh[:4], rtol=1e-3, atol=1e-4)
    flat = [torch.cat([c[f"{m}.weight"].flatten() for m in pool[0].factors]) for c in changes[:2]]
    assert abs(pool.similarity()[0, 1] - F.cosine_similarity(flat[0], flat[1], dim=0)) < 0.1
    assert sorted(i for group in pool.groups() for i in group) == [0, 1, 2, 3]
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for method in (Average(), Average(rank=4), Ensemble(), Ties(), Knots(), NearestGroup()):
        scores = method.classify(pool, images, torch.tensor([0, 0, 1, 1]), images)
        assert scores.argmax(1).tolist() == [0, 0, 1, 1]


def test_a_checkpoint_is_inverted_with_its_own_names_and_loss(tiny_backbone_path, tmp_path):
    names = {0: "cat", 1: "dog"}
    fine_tuned(names=names).save_pretrained(tmp_path / "one")
    fine_tuned(names=names, problem_type="multi_label_classification").save_pretrained(tmp_path / "several")
    pool = AdapterPool.from_pretrained(
        [tmp_path / "one", tmp_path / "several"], tiny_backbone_path, require_heads=True
    )
    config = InversionConfig(iterations=8, images_per_class=2, jitter=0, priors={}, stop_at=0.9)
    surrogate = LoRAInverter(pool, config).run(tmp_path / "surrogate", progress=False)
    shard = surrogate.shard(0)
    assert surrogate.manifest["shards"][0]["adapter"]["labels"] == ["cat", "dog"]
    expected = logits(pool, 0, pool.backbone.normalize(shard.pixels))
    torch.testing.assert_close(shard.teacher_logits, expected, rtol=1e-4, atol=1e-4)
    scores, classes = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    one, several = pool[0].head, pool[1].head
    assert torch.equal(one.loss(scores, classes), F.cross_entropy(scores, classes))
    targets = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]])
    binary = F.binary_cross_entropy(scores.sigmoid(), targets, reduction="sum") / 4
    torch.testing.assert_close(several.loss(scores, classes), binary)
    assert torch.equal(several.probabilities(scores), scores.sigmoid())
    assert not torch.equal(surrogate.shard(0).pixels, surrogate.shard(1).pixels)  # by their losses alone


def test_names_that_are_only_numbers_are_none(tiny_backbone_path, tmp_path):
    fine_tuned(names={0: "LABEL_0", 1: "LABEL_1"}).save_pretrained(tmp_path)
    assert AdapterPool.from_pretrained(tmp_path, tiny_backbone_path).infos[0].labels is None


def other_shape(folder):
    configure(folder, image_size=64)


def other_kind(folder):
    configure(folder, model_type="dinov2")


def other_base(folder):
    fine_tuned(base_seed=1).save_pretrained(folder)


def narrow_head(folder):
    edit(folder, lambda tensors: tensors | {"classifier.weight": torch.ones(3, 16)})


def no_head(folder):
    edit(folder, lambda tensors: {key: value for key, value in tensors.items() if "classifier" not in key})


def half(folder):
    edit(folder, lambda tensors: {key: value for key, value in tensors.items() if ".layer.1." not in key})


def not_finite(folder):
    edit(folder, lambda tensors: tensors | {"vit.layernorm.bias": torch.full((32,), torch.nan)})


def code(folder):
    configure(folder, auto_map={"AutoModel": "evil.Evil"})


def wide(folder):
    model = ViTForImageClassification(ViTConfig(**SIZES | {"intermediate_size": 96}, num_labels=3))
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message", "seen_without_weights"),
    [
        (other_shape, "food: config.json has image_size 64, and .* has 32", True),
        (other_kind, "food: .*is a dinov2 model, and .* a vit model", True),
        (wide, r"food: model.safetensors: layers.0.mlp.fc1.bias is \(96,\), and \(64,\) in", True),
        (other_base, r"food: its weights are 1\.[34]\d times their own length away .*made from another base", False),
        (narrow_head, "food: its head reads 16 features", True),
        (no_head, "food: has no classification head.*--support", True),
        (half, r"food: model.safetensors lacks 16 tensor\(s\) of the model", True),
        (not_finite, "food: .*layernorm.bias holds NaN", True),
        (code, r"food: config.json: it names custom code \(auto_map\)", True),
    ],
)
def test_bad_checkpoints_are_one_clear_line(tiny_backbone_path, food, spoil, message, seen_without_weights):
    folder, _ = food
    spoil(folder)
    with pytest.raises(AdapterError, match=message) as error:
        AdapterPool.from_pretrained(folder, base_model=tiny_backbone_path, require_heads=True)
    assert "\n" not in str(error.value)
    if spoil is code:
        return
    found = check_usable([describe_place(*find_places(str(folder), None, {}))], str(tiny_backbone_path))[0]
    assert (found.usable, found.reason) == ((False, str(error.value)) if seen_without_weights else (True, None))


def test_bases_that_nobody_names_are_given_once_and_others_are_left_out(hub, tiny_backbone_path, tmp_path, food):
    hub.put("org/base", tiny_backbone_path)
    hub.put("org/food", food[0])
    with pytest.raises(AdapterError, match="^org/food@.*: neither its card nor its config.json names .*--base-model"):
        AdapterPool.from_pretrained("org/food")
    configure(food[0], _name_or_path="org/base")  # as transformers 4 wrote it
    hub.put("org/named", food[0])
    other_base(tmp_path / "other")
    hub.put("org/other", tmp_path / "other")
    hub.put("org/other", {"README.md": "---\nbase_model:\n- org/another\n---\n"})
    with pytest.warns(UserWarning, match="1 of 3 adapters"):
        pool = AdapterPool.from_pretrained(["org/food", "org/named", "org/other"], on_error="skip")
    assert pool.backbone.name == "org/base" and [i.name for i in pool.infos] == ["org/food", "org/named"]
    assert "org/named is made for org/base and org/other for org/another" in pool.skipped[0][1]
    with pytest.raises(AdapterError, match=r"org/other@.*made from another base model \(org/another, it says\)"):
        AdapterPool.from_pretrained("org/other", base_model="org/base")


def test_an_adapters_base_revision_is_not_disputed_by_a_checkpoint(
    hub, tiny_backbone_path, tiny_pool_path, food, tmp_path
):
    commit = hub.put("org/base", tiny_backbone_path)
    shutil.copytree(tiny_pool_path / "adapter-0", tmp_path / "lora")
    edit_config(tmp_path / "lora", base_model_name_or_path="org/base", revision=commit)
    hub.put("org/lora", tmp_path / "lora")
    configure(food[0], _name_or_path="org/base")
    hub.put("org/food", food[0])
    pool = AdapterPool.from_pretrained(["org/food", "org/lora"])
    assert (len(pool), pool.backbone.revision) == (2, commit)


def test_a_merged_adapter_is_a_checkpoint_and_a_stray_config_beside_it_is_nothing(tiny_pool_path, food, tiny_pool):
    folder, model = food
    shutil.copy(tiny_pool_path / "adapter-0" / "adapter_config.json", folder)
    pixel_values = torch.randn(2, 3, 32, 32)
    pool = AdapterPool.from_pretrained(folder, backbone=tiny_pool.backbone)
    assert pool.infos[0].peft_type == "CHECKPOINT"
    with torch.no_grad():
        expected = model(pixel_values=pixel_values).logits
    torch.testing.assert_close(logits(pool, 0, pixel_values), expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_changes_after_it_was_pulled_is_refused(tiny_backbone_path, food):
    pool = AdapterPool.from_pretrained(food[0], tiny_backbone_path)
    edit(food[0], lambda tensors: tensors | {"classifier.bias": torch.ones(3)})
    with pytest.raises(AdapterError, match="food: model.safetensors changed since it was pulled"):
        pool[0]
