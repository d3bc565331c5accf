"""The view gives what transformers' own models give, for each family."""

import numpy as np
import pytest
import torch
from helpers_backbones import FAMILIES, build
from helpers_tiny import SIZES, random_pixels, shake, tiny_backbone, tiny_processor
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
)

from lora_recycle.backbones.backbone import Backbone, extract_features
from lora_recycle.backbones.token_selection import keep_tokens, take_patches
from lora_recycle.errors import AdapterError, DataError


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_logits_are_those_of_transformers(family):
    model, base, prefix = build(family)
    x = torch.randn(3, 3, 32, 32)
    logits, output = model(x).logits, base(x)
    features = output.pooler_output if family in ("clip", "siglip") else output.last_hidden_state[:, 0]
    view = Backbone(base, tiny_processor(), family)
    hidden, kept = view(x)
    assert kept is None and view.num_prefix_tokens == prefix and hidden.shape == (3, prefix + 16, 32)
    torch.testing.assert_close(view.pool_features(hidden), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(view.features(x), features, rtol=1e-4, atol=1e-5)
    assert view.pool_for_head(hidden).shape[1] == view.head_size == model.classifier.in_features
    torch.testing.assert_close(model.classifier(view.pool_for_head(hidden)), logits, rtol=1e-4, atol=1e-5)


def view_of(family, layers=2):
    _, base, prefix = build(family, layers)
    return Backbone(base, tiny_processor(), family), prefix


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorded_attention_is_that_of_eager_attention(family):
    """The row of CLS, mean over heads (Eq. 5); without CLS the mean over heads and over all tokens that look."""
    (view, _), x = view_of(family), torch.randn(2, 3, 32, 32)
    eager = build(family)[1]
    eager.set_attn_implementation("eager")
    for layer, attentions in enumerate(eager(x, output_attentions=True).attentions):
        with view.record_attention(layer) as attention:
            view(x)
        expected = attentions.mean((1, 2)) if family == "siglip" else attentions[:, :, 0].mean(1)
        torch.testing.assert_close(attention.row, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_pruned_is_the_plain_forward(family):
    (view, _), x = view_of(family), torch.randn(2, 3, 32, 32)
    plain, _ = view(x)
    for prune in ({}, {0: 1.0}, {0: 1.0, 1: 1.0}):
        hidden, kept = view(x, prune=prune)
        assert torch.equal(hidden, plain) and kept is None


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_runs_on_as_those_tokens_alone(family):
    (view, prefix), x = view_of(family), torch.randn(2, 3, 32, 32)
    with view.record_attention(0) as attention:
        view(x)
    expected = attention.row[:, prefix:].topk(4).indices.sort().values
    hidden, kept = view(x, prune={0: 0.25})
    assert torch.equal(kept, expected) and hidden.shape == (2, prefix + 4, 32)
    first, second = view.layers
    rows = [
        torch.cat([t[:prefix], t[prefix:][k]]) for t, k in zip(_out(first(view.embed(x), None)), kept, strict=True)
    ]
    torch.testing.assert_close(hidden, _out(second(torch.stack(rows), None)), rtol=1e-4, atol=1e-5)
    assert (view.features(x) - view.pool_features(hidden)).abs().max() > 1e-4
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(view.features(x, everything), view.features(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_exactly_the_patches_that_are_left(family):
    view, prefix = view_of(family)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    outputs = []
    handle = view.layers[0].register_forward_hook(lambda *hooked: outputs.append(_out(hooked[-1])))
    hidden, kept = view(x, prune={0: 0.25})
    handle.remove()
    outputs[0].retain_grad()
    view.pool_features(hidden).square().sum().backward()
    left = torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True)
    assert torch.equal((outputs[0].grad[:, prefix:] != 0).any(-1), left)  # after the pruning layer: those alone
    assert (patches_of(x.grad) > 0).all()  # before it: all, the dropped ones were keys and values there

    x.grad = None
    view.features(x, kept).square().sum().backward()
    assert torch.equal(patches_of(x.grad) > 0, left)  # never embedded: their own pixels alone


@pytest.mark.parametrize("family", FAMILIES)
def test_progressive_pruning_drops_layer_by_layer(family):
    view, prefix = view_of(family, layers=3)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    outputs = []
    hooks = [layer.register_forward_hook(lambda *hooked: outputs.append(_out(hooked[-1]))) for layer in view.layers]
    hidden, kept = view(x, prune={0: 0.5, 1: 0.25})
    for hook in hooks:
        hook.remove()
    assert [output.shape[1] - prefix for output in outputs] == [16, 8, 4] and hidden.shape == (2, prefix + 4, 32)

    chosen, tokens = torch.arange(16).expand(2, -1), view.embed(x)
    for layer, k in (
        (0, 8),
        (1, 4),
    ):  # by hand: each choice among the tokens that are left, by what is left's attention
        with torch.no_grad(), view.record_attention(layer) as attention:
            tokens = _out(view.layers[layer](tokens, None))
        top = attention.row[:, prefix:].topk(k).indices.sort().values
        chosen, tokens = chosen.gather(1, top), keep_tokens(tokens, top, prefix)
    assert torch.equal(kept, chosen)
    torch.testing.assert_close(hidden, _out(view.layers[2](tokens, None)), rtol=1e-4, atol=1e-5)

    reached = torch.autograd.grad(view.pool_features(hidden).square().sum(), [x, *outputs[:2]])
    assert (patches_of(reached[0]) > 0).all()
    for grad, k in zip(reached[1:], (8, 4), strict=True):
        assert ((grad[:, prefix:] != 0).any(-1).sum(1) == k).all()


def patches_of(images):
    """(B, 3, 32, 32) to (B, 16): sum of the absolute values in each patch of 8 pixels."""
    return images.abs().sum(1).unfold(1, 8, 8).unfold(2, 8, 8).sum((-1, -2)).flatten(1)


def _out(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "siglip"])
def test_a_saved_folder_loads_with_the_same_features(tmp_path, family):
    model, base, _ = build(family)
    (model if family in ("clip", "siglip") else base).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    loaded = Backbone.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.features(x), Backbone(base, tiny_processor(), family).features(x))
    assert not any(p.requires_grad for p in loaded.parameters()) and loaded.name == str(tmp_path)


def test_normalisation_is_the_image_processors():
    view, pixels = tiny_backbone(), random_pixels(2)
    pictures = [Image.fromarray(np.asarray(p.permute(1, 2, 0))) for p in pixels]
    expected = tiny_processor()(images=pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(view.normalize(pixels), expected)
    torch.testing.assert_close(view.normalize(pixels.float() / 255), expected)


@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (2, 3, 24, 32), (2, 3, 32, 24), (2, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(DataError, match=r"tiny takes images of shape \(B, 3, 32, 32\)"):
        tiny_backbone().features(torch.zeros(shape))


def test_other_model_types_are_refused():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(AdapterError, match=r"backbones of type resnet are not supported \(vit, deit"):
        Backbone(model, tiny_processor(), "cnn")


def test_a_hierarchical_model_is_refused():
    model = SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2]))
    with pytest.raises(AdapterError, match=r"backbones of type swin are not supported \(vit, deit, .*siglip"):
        Backbone(model, tiny_processor(), "swin")


def test_a_siglip_without_its_pooling_head_is_refused():
    model = SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False))
    with pytest.raises(AdapterError, match="neither a CLS token nor a pooling head"):
        Backbone(model, tiny_processor(), "headless")


def test_a_missing_backbone_is_one_line(tmp_path):
    with pytest.raises(AdapterError, match="the backbone cannot be loaded") as caught:
        Backbone.from_pretrained(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_features_of_many_images_do_not_depend_on_the_batch():
    view, pixels = tiny_backbone(), random_pixels(7)
    kept = torch.stack([torch.randperm(16)[:5].sort().values for _ in range(7)])
    torch.testing.assert_close(extract_features(view, pixels, 3), view.features(view.normalize(pixels)))
    torch.testing.assert_close(
        extract_features(view, pixels, 3, kept), view.features(view.normalize(pixels), kept), rtol=1e-4, atol=1e-5
    )
    assert extract_features(view, pixels[:0]).shape == (0, 32)


def test_the_last_layer_for_cls_alone_has_the_same_gradients():
    for family in ("vit", "registers", "clip"):  # the three ways in which layers are built
        view = Backbone(build(family)[1], tiny_processor(), family)
        x = torch.randn(2, 3, 32, 32, requires_grad=True)
        (whole,) = torch.autograd.grad(view.pool_features(view(x)[0]).square().sum(), x)
        (cls_only,) = torch.autograd.grad(view.features(x).square().sum(), x)
        torch.testing.assert_close(cls_only, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_patches_are_embedded_as_in_the_whole_image(family):
    _, base, prefix = build(family)
    view = Backbone(base, tiny_processor(), family)
    x, kept = torch.randn(3, 3, 32, 32), torch.stack([torch.randperm(16)[:5].sort().values for _ in range(3)])
    expected = keep_tokens(view.embed(x), kept, prefix)
    torch.testing.assert_close(view.embed(x, kept), expected, rtol=1e-5, atol=1e-5)
    patches = take_patches(x, kept, 8)
    torch.testing.assert_close(view.features(patches, kept), view.features(x, kept))
    # the projection wears an adapter: its change counts too
    get_peft_model(base, LoraConfig(target_modules=["projection", "patch_embedding"], init_lora_weights=False))
    torch.testing.assert_close(view.embed(x, kept), keep_tokens(view.embed(x), kept, prefix))
    assert (view.embed(x, kept) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_positions_of_another_image_size_are_those_of_the_whole_image():
    torch.manual_seed(0)
    model = shake(Dinov2Model(Dinov2Config(**SIZES)))
    model.config.image_size = 48  # DINOv2 interpolates its 4 x 4 positions to 6 x 6
    view, x = Backbone(model, tiny_processor(), "dinov2"), torch.randn(2, 3, 48, 48)
    kept = torch.tensor([[0, 17, 35], [3, 20, 21]])
    torch.testing.assert_close(view.embed(x, kept), keep_tokens(view.embed(x), kept, 1), rtol=1e-5, atol=1e-5)
