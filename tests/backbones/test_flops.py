"""FLOPs from shapes, compared with what torch counts of the library's own steps."""

import copy

import pytest
import torch
from helpers_tiny import tiny_processor
from test_backbones import FAMILIES, build
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lora_recycle.backbones.backbone import Backbone
from lora_recycle.backbones.flops import forward_flops, inversion_flops, lora_flops
from lora_recycle.distillation.student import Student


def attention(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


def attention_backward(gradient, query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_backward_flop_count(gradient, query, key, value)


#: torch counts the attention of GPUs only.
CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def counted(step) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU) as flops:
        step()
    return flops.get_total_flops()


#: Where patches are kept, the positions are embedded once for the whole batch, of an empty image of 16 patches.
EMPTY = 2 * 16 * 3 * 8**2 * 32


def view(family: str) -> Backbone:
    return Backbone(build(family, layers=3)[1], tiny_processor(), family)


@pytest.mark.parametrize("prune", [None, {0: 0.5, 1: 0.25}])
@pytest.mark.parametrize("family", FAMILIES)
def test_inversion(family, prune):
    backbone, count = view(family), 4
    pixels = torch.rand(count, 3, 32, 32, requires_grad=True)

    def step():
        backbone(backbone.normalize(pixels), prune=prune)[0].sum().backward()

    expected = inversion_flops(backbone, prune)
    assert counted(step) == pytest.approx(count * expected.both, rel=0.01)
    with torch.no_grad():
        forward = counted(lambda: backbone(backbone.normalize(pixels), prune=prune))
    assert forward == pytest.approx(count * expected.forward, rel=0.01)


@pytest.mark.parametrize("patches", [16, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_of_kept_patches(family, patches):
    backbone, count = view(family), 4
    kept = torch.arange(patches).expand(count, -1)
    with torch.no_grad():
        forward = counted(lambda: backbone(backbone.normalize(torch.rand(count, 3, 32, 32)), kept))
    assert forward == pytest.approx(EMPTY + count * forward_flops(backbone, patches), rel=0.01)


@pytest.mark.parametrize(("patches", "first_layer"), [(16, 0), (5, 0), (16, 1), (16, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_a_lora(family, patches, first_layer):
    backbone, count, once = view(family), 4, 0
    student = Student(copy.deepcopy(backbone), 4, family, first_layer=first_layer)
    inputs, kept = backbone.normalize(torch.rand(count, 3, 32, 32)), None
    if first_layer:
        inputs = student.tokens(inputs).clone()
    elif patches < 16:
        kept, once = torch.arange(patches).expand(count, -1), EMPTY
    expected = lora_flops(backbone, 4, patches, first_layer)
    both = counted(lambda: student(inputs, kept).sum().backward())
    assert both == pytest.approx(once + count * expected.both, rel=0.01)
    with torch.no_grad():
        forward = counted(lambda: student(inputs, kept))
    assert forward == pytest.approx(once + count * expected.forward, rel=0.01)
