"""The page of surrogate data, its maps, and the pictures of what was kept and looked at."""

import re

import numpy as np
import pytest
import torch

from lora_recycle.images.labelled import LabelledImages
from lora_recycle.reports.charts import scatter
from lora_recycle.reports.gallery import show_attention
from lora_recycle.reports.maps import principal_map, share_nearest_to_own, share_same_neighbour, turned
from lora_recycle.reports.surrogate_page import map_images, read_patch_size, write_surrogate_page
from lora_recycle.surrogate.dataset import Shard, SurrogateDataset, save_shard, write_manifest


def shard(name: str, classes: int, each: int) -> Shard:
    labels = torch.arange(classes).repeat_interleave(each)
    logits = torch.nn.functional.one_hot(labels, classes) * 2.0
    pixels = torch.full((len(labels), 3, 8, 8), 100, dtype=torch.uint8)
    adapter = {"name": name, "sha256": name, "labels": [f"{name} {c}" for c in range(classes)]}
    kept = torch.zeros(len(labels), 1, dtype=torch.int16)
    return Shard(adapter, pixels, labels, logits, torch.zeros(len(labels), 4, dtype=torch.float16), kept)


@pytest.fixture
def surrogate(tmp_path) -> SurrogateDataset:
    paths = [tmp_path / "shards" / f"{name}.safetensors" for name in ("birds", "<cats>")]
    for path in paths:
        save_shard(path, shard(path.stem, classes=3, each=4), "id")
    return write_manifest(tmp_path, {"config": {"seed": 7}, "backbone": {}}, paths)


def test_each_image_has_its_confidence_and_its_mask(surrogate, tmp_path):
    page = write_surrogate_page(tmp_path / "page.html", surrogate, patch_size=4).read_text(encoding="utf-8")
    confidence = np.exp(2) / (np.exp(2) + 2)
    assert page.count("<figure>") == 24 and page.count("<img") == 48
    assert f"birds 0 (birds): {confidence:.0%}" in page and "<cats>" not in page and "&lt;cats&gt;" in page
    assert "Map of the" not in page and "&#34;seed&#34;: 7" in page


def test_masks_need_a_patch_size_that_the_manifest_may_lack(surrogate, tmp_path):
    assert read_patch_size(surrogate) is None
    surrogate.manifest["backbone"] = {"name": "demo", "revision": None}
    assert read_patch_size(surrogate) == 8
    page = write_surrogate_page(tmp_path / "page.html", surrogate, patch_size=None).read_text(encoding="utf-8")
    assert page.count("<img") == 24


def test_a_map_shows_some_images_of_some_classes_of_both_kinds(surrogate):
    pixels = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    real = LabelledImages(pixels, torch.arange(60) % 2, ["one", "two"], "photos")
    images = map_images(surrogate, real)
    assert len(images.pixels) == len(images.labels) == len(images.kinds)
    assert images.kinds == ["surrogate"] * 24 + ["real"] * 40  # 20 of each class
    assert set(images.labels[24:]) == {"one (photos)", "two (photos)"}


def test_two_axes_show_what_two_axes_hold():
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    angles = torch.rand(30, generator=generator) * 6
    circle = torch.stack([angles.cos(), angles.sin()], -1)  # of unit length already
    points, shown = principal_map(circle @ plane[:2])
    assert shown == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(circle, circle), atol=1e-3, rtol=0)
    reference = circle - circle.mean(0)
    torch.testing.assert_close(turned(points, reference), reference, atol=1e-4, rtol=0)


def test_share_of_images_nearest_to_their_own_class():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.05], [0.1, 1.0]])
    assert share_nearest_to_own(features, ["a", "a", "b", "b", "b"]) == pytest.approx(0.8)  # the fourth lies among a
    assert share_nearest_to_own(features[:3], ["a", "a", "b"]) == 1.0  # b has no other image to lie near to
    assert share_nearest_to_own(features[:2], ["a", "a"]) is None
    assert share_nearest_to_own(features[:2], ["a", "b"]) is None


def test_share_of_images_with_the_same_neighbour():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.2, 1.0]])
    assert share_same_neighbour(features, 3 * features) == 1.0
    assert share_same_neighbour(features, features[[2, 1, 0, 3]]) == 0.0  # 0-1, 2-3 against 0-3, 1-2


def test_kinds_have_shapes_and_distances_one_scale():
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [4.0, 1.0]])
    svg = scatter("both <kinds>", points, ["x", "x", "y"], ["surrogate", "surrogate", "real"])
    assert "circles: surrogate; crosses: real" in svg and "<kinds>" not in svg
    marks = re.findall(r'class="mark( second)?" d="M([\d.]+) ([\d.]+)(m[^"]+)"><title>(\w)', svg)
    assert [(second, label) for second, *_, label in marks] == [("", "x"), ("", "x"), (" second", "y")]
    assert marks[0][3] == marks[1][3] != marks[2][3]
    (x0, y0), (x1, y1), (x2, y2) = [(float(x), float(y)) for _, x, y, *_ in marks]
    assert y0 == y1 and x1 - x0 == pytest.approx(4 * (y1 - y2), abs=0.5) and x1 == x2


def test_attention_lights_the_patches():
    image = torch.full((3, 9, 8), 200, dtype=torch.uint8)
    lit = show_attention(image, torch.tensor([0.5, 0.25, 0.25, 0.0]), 4)
    assert [int(lit[0, y, x]) for y in (0, 4) for x in (0, 4)] == [200, 120, 120, 40]
    assert int(lit[0, 8, 0]) == 40  # the rim
