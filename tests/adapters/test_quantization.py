"""Adapters in few bits: by hand, from file to model, between folders and repos, and where a stranger wrote them."""

import json
import random
import re

import pytest
import torch
from helpers_adapters import CONFIGS, save_adapter
from helpers_fuzz import spoil_bytes, spoil_header, spoil_json, spoil_numbers
from helpers_tiny import tiny_processor
from peft import PeftModel
from safetensors.torch import load, load_file, save_file
from transformers import AutoModel

from lora_recycle import AdapterError, ConfigError, MetaLoRAForFewShotClassification
from lora_recycle.adapters.centroids import coded, coded_product, fit_centroids, nearest_codes
from lora_recycle.adapters.load import load_adapter
from lora_recycle.adapters.pull import pull_adapter, read_tensors
from lora_recycle.adapters.quantization import decode, pack, unpack, weights_bytes
from lora_recycle.adapters.weight_deltas import to_adapter
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.cli.main import main
from lora_recycle.hub.repo_files import CODES_FILE


PLAIN = "adapter_model.safetensors"


def test_centroids_and_codes_by_hand():
    values = torch.tensor([[0.0, 1.0, 9.0], [11.0, 10.0, -1.0]])
    centroids = fit_centroids(values, 1)
    assert centroids.tolist() == [0.0, 10.0]
    assert nearest_codes(values, centroids).tolist() == [[0, 0, 1], [1, 1, 0]]
    values = torch.tensor([-3.0, -1.0, 1.0, 3.0])  # centroids -2 and 2: product 16 with the values, whose own is 20
    codes, centroids = coded(values, 1)
    assert codes.tolist() == [0, 0, 1, 1] and centroids.tolist() == [-2.5, 2.5]
    assert coded(torch.zeros(5), 2)[1].tolist() == [0.0] * 4


def test_a_product_is_kept_better_than_its_factors():
    generator = torch.Generator().manual_seed(2)
    b, a = torch.randn(48, 6, generator=generator), torch.randn(6, 40, generator=generator)
    b, a = b * torch.logspace(0, 1, 6), a / torch.logspace(0, 2, 6)[:, None]  # B and A out of balance
    change, gaps = b @ a, {}
    for name, parts in (("together", coded_product(b, a, 2)), ("alone", (coded(b, 2), coded(a, 2)))):
        (codes_b, of_b), (codes_a, of_a) = parts
        found = of_b[codes_b] @ of_a[codes_a]
        gaps[name] = (found - change).norm() / change.norm()
    assert gaps["together"] < 0.5 * gaps["alone"]
    (codes_b, of_b), (codes_a, of_a) = coded_product(b, a, 1)
    along = (of_b[codes_b] @ of_a[codes_a] * change).sum() / change.square().sum()
    assert along == pytest.approx(1, abs=1e-4)


def test_packed_codes_by_hand():
    assert pack(torch.tensor([1, 0, 3, 2, 3]), 2).tolist() == [1 + 3 * 16 + 2 * 64, 3]
    assert pack(torch.tensor([[1, 0], [1, 1]]), 1).tolist() == [1 + 4 + 8]
    generator = torch.Generator().manual_seed(0)
    for bits in (8, 4, 2, 1):
        codes = torch.randint(0, 2**bits, (37,), generator=generator)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and len(packed) == -(-37 * bits // 8)
        assert torch.equal(unpack(packed, bits, 37).long(), codes)


def test_more_bits_are_nearer_and_nothing_is_missing_along_the_weights():
    weights = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    gaps = []
    for bits in (8, 4, 2, 1):
        name, data = weights_bytes({"base_model.w": weights}, bits, {})
        found = decode(data)["base_model.w"]
        assert name == CODES_FILE and found.unique().numel() <= 2**bits
        assert (found * weights).sum() / weights.square().sum() == pytest.approx(1, abs=4e-3)  # bfloat16 centroids
        gaps.append((found - weights).norm() / weights.norm())
    assert gaps[0] < 0.03 < gaps[1] < 0.15 < gaps[2] < 0.5 < gaps[3] < 0.9


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_type_loads_from_codes(kind, tmp_path):
    _, backbone = save_adapter(tmp_path, CONFIGS[kind])
    before = load_adapter(pull_adapter(tmp_path), backbone)
    name, data = weights_bytes(load_file(tmp_path / PLAIN), 8, pull_adapter(tmp_path).config)
    (tmp_path / name).write_bytes(data)
    assert pull_adapter(tmp_path).bits is None  # the plain file is the one to take where there are both
    (tmp_path / PLAIN).unlink()
    info = pull_adapter(tmp_path)
    assert (info.file, info.bits, info.num_parameters) == (CODES_FILE, 8, before.info.num_parameters)
    after = load_adapter(info, backbone)
    assert after.state_dict.keys() == before.state_dict.keys()
    for key, tensor in after.state_dict.items():
        if ".lora_A." in key or ".lora_B." in key:
            continue
        torch.testing.assert_close(tensor, before.state_dict[key], rtol=0.1, atol=0.02 * tensor.abs().max().item())
        if tensor.ndim == 1:
            assert torch.equal(tensor, before.state_dict[key])
    one, other = (to_adapter(loaded, Backbone(backbone, tiny_processor(), "tiny")) for loaded in (before, after))
    assert one.factors.keys() == other.factors.keys()
    for module, (b, a) in one.factors.items():
        was, now = b @ a, other.factors[module][0] @ other.factors[module][1]
        assert (was - now).norm() < 0.05 * was.norm()


@torch.no_grad()
def test_a_model_in_few_bits_loads_as_any_other(hub, model, tmp_path):
    x, gaps, sizes = torch.randn(3, 3, 32, 32), [], []
    for bits in (None, 16, 8, 1):
        model.save_pretrained(tmp_path / "meta", bits=bits)
        files = {path.name for path in (tmp_path / "meta").iterdir()}
        assert (PLAIN in files, CODES_FILE in files) == ((False, True) if bits in (8, 1) else (True, False))
        sizes.append((tmp_path / "meta" / pull_adapter(tmp_path / "meta").file).stat().st_size)
        gaps.append(
            (
                MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "meta").features(x) - model.features(x)
            ).norm()
        )
    assert gaps[0] < 1e-4 < min(gaps[1:3]) and max(gaps[1:3]) < 0.05 < gaps[3]
    assert sizes[3] < sizes[1] < sizes[0]  # 256 centroids are as large as the matrices of a model as tiny as this
    with pytest.raises(ConfigError, match="bits must be one of 32, 16, 8, 4, 2, 1, got 3"):
        model.save_pretrained(tmp_path / "other", bits=3)


@torch.no_grad()
def test_bfloat16_is_a_plain_peft_adapter(hub, model, tiny_backbone_path, tmp_path):
    model.save_pretrained(tmp_path, bits=16)
    assert {tensor.dtype for tensor in load_file(tmp_path / PLAIN).values()} == {torch.bfloat16}
    base, x = AutoModel.from_pretrained(tiny_backbone_path, add_pooling_layer=False), torch.randn(2, 3, 32, 32)
    features = PeftModel.from_pretrained(base, tmp_path).eval()(pixel_values=x).last_hidden_state[:, 0]
    torch.testing.assert_close(features, model.features(x), rtol=0.05, atol=0.05)


def test_push_in_few_bits_and_back(hub, model, toy_data, tmp_path, capsys):
    model.fit(toy_data.pixels[::20], [int(label) for label in toy_data.labels[::20]])
    model.save_pretrained(tmp_path / "meta")
    assert main(["push", str(tmp_path / "meta"), "org/small", "--bits", "4"]) == 0
    files = hub.files("org/small")
    assert CODES_FILE in files and PLAIN not in files and "few_shot_task.safetensors" in files
    assert "stored in 4 bits" in files["README.md"].decode()
    loaded = MetaLoRAForFewShotClassification.from_pretrained("org/small")
    assert loaded.label_names == model.label_names
    assert main(["quantize", "org/small", "--bits", "32", "--output", str(tmp_path / "plain")]) == 0
    assert re.search(r"bytes in adapter_model.safetensors, \d+ before", capsys.readouterr().out)
    again = MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "plain")
    assert again.label_names == model.label_names
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again.features(x), loaded.features(x), rtol=1e-4, atol=1e-5)
    assert "It is also a plain PEFT adapter" in (tmp_path / "plain" / "README.md").read_text()
    assert main(["quantize", "org/small", "--bits", "2", "--output", str(tmp_path / "plain")]) == 1  # no overwriting
    model.push_to_hub("org/small")
    assert PLAIN in hub.files("org/small") and CODES_FILE not in hub.files("org/small")


HEADER = {"bits": 2, "shapes": {"w": [4, 6]}}
TENSORS = {"codes": torch.zeros(6, dtype=torch.uint8), "centroids": torch.ones(1, 4)}


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        (None, {}, "no header"),
        ({"bits": 3}, {}, "bits must be one of 8, 4, 2, 1, got 3"),
        ({"bits": True}, {}, "got True"),
        ({"shapes": {"w": [4, -6]}}, {}, "impossible shape"),
        ({"shapes": {"w": [4, 7]}}, {}, r"codes must have the shape \(7,\)"),
        ({"shapes": {"w": [2**20, 2**20]}}, {}, "more than 2 GiB"),
        ({"shapes": {f"w{i}": [2**14, 2**15] for i in range(9)}}, {}, "codes must have the shape"),
        ({"shapes": []}, {}, "no header"),
        ({}, {"centroids": torch.ones(4, 1)}, r"centroids must have the shape \(1, 4\)"),
        ({}, {"w": torch.ones(2)}, "w is there twice"),
        ({}, {"codes": torch.zeros(6, dtype=torch.int8)}, "codes must be bytes"),
        ({}, {"centroids": torch.ones(1, 4).long()}, "centroids numbers"),
    ],
)
def test_damaged_codes_are_refused_with_the_place(header, tensors, message, tmp_path):
    save_adapter(tmp_path / "bad", CONFIGS["lora"])
    (tmp_path / "bad" / PLAIN).unlink()
    metadata = {} if header is None else {"header": json.dumps({**HEADER, **header})}
    save_file({**TENSORS, **tensors}, tmp_path / "bad" / CODES_FILE, metadata=metadata)
    with pytest.raises(AdapterError, match=message) as caught:
        read_tensors(pull_adapter(tmp_path / "bad"))
    assert "bad" in str(caught.value) and CODES_FILE in str(caught.value)


def test_centroids_that_are_not_finite_and_files_cut_off_are_refused(tmp_path):
    _, backbone = save_adapter(tmp_path / "bad", CONFIGS["lora"])
    _, data = weights_bytes(load_file(tmp_path / "bad" / PLAIN), 4, {})
    (tmp_path / "bad" / PLAIN).unlink()
    path, length = tmp_path / "bad" / CODES_FILE, int.from_bytes(data[:8], "little")
    stored, header = load(data), json.loads(data[8 : 8 + length])["__metadata__"]
    stored["centroids"][0, 0] = float("nan")
    save_file(stored, path, metadata=header)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        load_adapter(pull_adapter(tmp_path / "bad"), backbone)
    path.write_bytes(data[:-9])
    with pytest.raises(AdapterError, match="truncated or damaged"):
        pull_adapter(tmp_path / "bad")


def test_spoilt_codes_load_or_are_refused(tmp_path):
    _, backbone = save_adapter(tmp_path, CONFIGS["lora"])
    _, data = weights_bytes(load_file(tmp_path / PLAIN), 2, pull_adapter(tmp_path).config)
    (tmp_path / PLAIN).unlink()
    loaded, met = 0, {}
    for number in range(300):
        rng = random.Random(number)
        how = rng.choice((spoil_header, spoil_metadata, spoil_numbers, lambda d, rng: spoil_bytes(d, rng, reach=1500)))
        (tmp_path / CODES_FILE).write_bytes(how(data, rng))
        try:
            load_adapter(pull_adapter(tmp_path), backbone, met)
            loaded += 1
        except AdapterError as error:
            assert tmp_path.name in str(error)
    assert 20 < loaded < 280


def spoil_metadata(data, rng):
    """One place of the JSON inside the header's JSON."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["header"])
    header["__metadata__"]["header"] = json.dumps(spoil_json(inner, rng, ["bits", "shapes", "codes"]))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


A, B = "m.lora_A.weight", "m.lora_B.weight"


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize(
    ("size_b", "size_a"), [(1e30, 1e30), (1e-30, 1e-35), (1e25, 1e-25), (1.0, 1e-40), (1e37, 1e-37)]
)
def test_numbers_whose_squares_overflow_or_vanish(bits, size_b, size_a):
    generator = torch.Generator().manual_seed(3)
    b, a = torch.randn(32, 4, generator=generator), torch.randn(4, 32, generator=generator)
    sound = decode(weights_bytes({A: a, B: b}, bits, {"peft_type": "LORA"})[1])
    found = decode(weights_bytes({A: a * size_a, B: b * size_b}, bits, {"peft_type": "LORA"})[1])
    gaps = [
        torch.linalg.norm(one[B].double() @ one[A].double() / size - b.double() @ a.double())
        for one, size in ((sound, 1.0), (found, size_b * size_a))
    ]
    assert gaps[1] < gaps[0] * 1.5 + 0.05 * torch.linalg.norm(b @ a) or size_a < 1e-37  # few digits are left there
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, bad, capsys):
    save_adapter(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / PLAIN)
    name = next(key for key in tensors if key.endswith("lora_B.weight"))
    tensors[name][0, 0] = bad
    save_file(tensors, tmp_path / "a" / PLAIN, metadata={"format": "pt"})
    assert main(["quantize", str(tmp_path / "a"), "--bits", "4", "--output", str(tmp_path / "b")]) == 1
    assert f"error: a: {PLAIN}: {name} holds NaN, infinity, or numbers too large" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_factors_of_every_form_are_coded_or_refused():
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        shape = torch.randint(1, 9, (3,), generator=generator).tolist()
        b, a = torch.randn(shape[:2], generator=generator), torch.randn(shape[1:], generator=generator)
        for factor in (b, a):  # rows of nothing, equal numbers, and one that outweighs all others
            kind = trial % 5
            factor *= {0: 1, 1: (factor > 1.5), 2: 0}.get(kind, 1)
            factor += float(kind == 3)
            factor.view(-1)[0] += 1e30 if kind == 4 else 0
        try:
            tensors = decode(weights_bytes({A: a, B: b}, 2 ** (trial % 4), {"peft_type": "LORA"})[1])
        except AdapterError as error:
            assert "numbers too large" in str(error) and trial % 5 == 4
        else:
            assert all(tensor.isfinite().all() for tensor in tensors.values())
