"""Changes of images in meta-training: patches move with the image, and the draws of an image decide alone."""

import pytest
import torch
from helpers_tiny import random_pixels, tiny_backbone

from lora_recycle.backbones.token_selection import take_patches
from lora_recycle.distillation.augmentation import augment, draw_changes, recolour
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import ConfigError


MIRROR, TURN, COLOUR = 0.1, 0.5, 0.9


def drawn(kind, made=True, colours=(0.5, 0.5, 0.5, 0.5), count=2):
    return torch.tensor([[kind, 0.0 if made else 0.9, *colours]]).repeat(count, 1)


@pytest.mark.parametrize(("kind", "axis"), [(MIRROR, -1), (TURN, -2)])
def test_an_image_is_mirrored_or_turned_over(kind, axis):
    pixels = random_pixels(2)
    assert torch.equal(augment(pixels, None, 4, drawn(kind))[0], pixels.flip(axis))
    assert torch.equal(augment(pixels, None, 4, drawn(kind, made=False))[0], pixels)


@pytest.mark.parametrize("kind", [MIRROR, TURN])
def test_patches_move_with_the_image(kind):
    """The kept patches of a changed image are, as a set, what the changed image has at their new places."""
    pixels, kept = random_pixels(3), torch.tensor([[0, 5, 6], [3, 7, 12], [1, 2, 15]])
    patches, moved = augment(take_patches(pixels, kept, 8), kept, 4, drawn(kind, count=3))
    whole, _ = augment(pixels, None, 4, drawn(kind, count=3))
    assert torch.equal(patches, take_patches(whole, moved, 8))
    by_hand = {MIRROR: [3, 6, 5], TURN: [12, 9, 10]}[kind]  # a grid of 4 x 4
    assert moved[0].tolist() == by_hand


@torch.no_grad()
def test_the_features_of_moved_patches_are_those_of_the_changed_image():
    backbone, pixels, every = tiny_backbone(), random_pixels(2), torch.arange(16).expand(2, 16)
    patches, moved = augment(take_patches(pixels, every, 8), every, 4, drawn(MIRROR))
    features = backbone.features(backbone.normalize(patches), moved)
    torch.testing.assert_close(features, backbone.features(backbone.normalize(pixels.flip(-1))), rtol=1e-4, atol=1e-5)


def test_colours_by_hand():
    pixels = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).repeat(2, 1, 2, 2)
    assert torch.equal(recolour(pixels, torch.full((2, 4), 0.5)), pixels)
    darker = recolour(pixels, torch.tensor([[0.0, 0.5, 0.5, 0.5]]).repeat(2, 1))
    assert darker[0, :, 0, 0].tolist() == [100, 50, 25]  # half as bright
    grey = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    paler = recolour(pixels, torch.tensor([[0.5, 0.5, 0.0, 0.5]]).repeat(2, 1))
    assert paler[0, :, 0, 0].tolist() == [round(grey + 0.5 * (c - grey)) for c in (200, 100, 50)]
    flat = recolour(pixels, torch.tensor([[0.5, 0.0, 0.5, 0.5]]).repeat(2, 1))
    assert flat[0, :, 0, 0].tolist() == [round(grey + 0.5 * (c - grey)) for c in (200, 100, 50)]  # one colour alone


def test_a_turned_hue_keeps_greys_and_brightness():
    draws = torch.tensor([[0.5, 0.5, 0.5, 0.1], [0.5, 0.5, 0.5, 0.8]])
    grey = torch.full((2, 3, 2, 2), 120, dtype=torch.uint8)
    assert (recolour(grey, draws).int() - grey.int()).abs().max() <= 1
    colour = torch.tensor([140, 110, 120], dtype=torch.uint8).view(1, 3, 1, 1).repeat(2, 1, 2, 2)
    turned, weights = recolour(colour, draws).float(), torch.tensor([0.299, 0.587, 0.114])
    assert not torch.equal(turned[0], turned[1]) and (turned - colour).abs().max() > 5
    assert (torch.einsum("c,bchw->bhw", weights, turned - colour.float())).abs().max() < 1


def test_patches_are_recoloured_as_the_image_that_they_make_up():
    pixels, every = random_pixels(2), torch.arange(16).expand(2, 16)
    draws = drawn(COLOUR, colours=(0.2, 0.9, 0.7, 0.3))
    patches, kept = augment(take_patches(pixels, every, 8), every, 4, draws)
    assert torch.equal(kept, every)
    assert torch.equal(patches, take_patches(augment(pixels, None, 4, draws)[0], every, 8))


def test_all_kinds_are_drawn_and_images_decide_alone():
    pixels, draws = random_pixels(60), draw_changes(60, torch.Generator().manual_seed(0))
    changed = augment(pixels, None, 4, draws)[0]
    alone = torch.cat([augment(pixels[i : i + 1], None, 4, draws[i : i + 1])[0] for i in range(60)])
    assert torch.equal(changed, alone)
    same = (changed == pixels).flatten(1).all(1)
    mirrored = (changed == pixels.flip(-1)).flatten(1).all(1)
    turned = (changed == pixels.flip(-2)).flatten(1).all(1)
    assert same.sum() >= 10 and mirrored.sum() >= 5 and turned.sum() >= 5
    assert (~(same | mirrored | turned)).sum() >= 10  # recoloured


def test_only_batches_that_teach_are_augmented(tiny_pool, tiny_surrogate):
    """The same draws of images with and without; plain batches do not change."""
    batches = {}
    for on in (False, True):
        config = DistillationConfig(steps=2, rank=4, relational_batch=16, augment=on, validation_fraction=0.25)
        trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, config)
        trainer.prepare(progress=False)
        batches[on] = trainer.make_batch(1), trainer.make_batch(1), trainer.make_batch.own_inputs(torch.arange(4))
        trainer.close()
    plain, changed = batches[False], batches[True]
    assert all(torch.equal(a, b) for a, b in zip(plain[0].parts, changed[0].parts, strict=True))
    assert not torch.equal(plain[0].inputs, changed[0].inputs) and not torch.equal(plain[0].kept, changed[0].kept)
    assert torch.equal(changed[0].inputs, changed[1].inputs)  # a batch depends on its step alone
    assert torch.equal(plain[2][0], changed[2][0]) and torch.equal(plain[2][1], changed[2][1])


def test_stored_activations_are_of_plain_images():
    with pytest.raises(ConfigError, match="augment needs first_layer 0"):
        DistillationConfig(augment=True, first_layer=1)
