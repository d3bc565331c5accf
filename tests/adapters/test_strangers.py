"""Repos that mean harm, or are broken: each is refused with its name, its file and the reason, without the memory."""

import json
import os
import re
import tracemalloc

import pytest
import torch
from helpers_adapters import ATTENTION, edit_config, edit_tensors, headless_twin, save_adapter, tiny_classifier
from helpers_tiny import save_tiny_backbone, tiny_processor
from peft import ShiraConfig, get_peft_model
from safetensors.torch import save_file

from lora_recycle.adapters.load import load_adapter
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.adapters.usability import check_usable
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.errors import AdapterError
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification
from lora_recycle.pool.pool import AdapterPool
from lora_recycle.runtime.untrusted import check_pattern


CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
Q = "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight"
LIVE_Q = Q.replace("vit.", "")
HEAD = "base_model.model.classifier.weight"


@pytest.fixture
def stranger(tmp_path):
    """A sound adapter's folder and its headless backbone; each test spoils one thing."""
    _, backbone = save_adapter(tmp_path / "stranger")
    return tmp_path / "stranger", backbone


def write_file(folder, header: bytes, data_bytes: int = 0, length: int | None = None):
    """A safetensors file with this header; its data is a hole in the file, so terabytes cost nothing."""
    path = folder / WEIGHTS
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + data_bytes)


def entry(shape, dtype="F32", begin=0, end=None):
    size = 4
    for n in shape:
        size *= n
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size if end is None else end]}


def refused(folder, file, reason):
    """Pulling is refused with name, file and reason, and takes next to no memory."""
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match=f"stranger: {file}.*{reason}"):
            pull_adapter(folder)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({Q: entry((4, 32))}, 100, "incomplete|invalid|Invalid"),  # claims more than the file
        ({Q: entry((4, 32))}, 600, "incomplete|invalid|Invalid"),  # and less
        ({Q: entry((4, 32)), "b": entry((4, 32))}, 512, "Invalid|overlap|offset"),
        ({Q: entry((2**20, 2**20))}, 2**42, "more than 2 GiB"),
        ({Q: entry((2**62, 2**62), end=8)}, 8, "more than 2 GiB"),
        ({f"{Q}{i}": entry((2**14, 2**14), begin=i * 2**30) for i in range(9)}, 9 * 2**30, "would take"),
        ({Q: entry((-4, -32))}, 512, r"impossible shape \(-4, -32\)"),
        ({Q: entry((0, 32))}, 0, r"impossible shape \(0, 32\)"),
        ({Q: entry((1,) * 9)}, 4, "impossible shape"),
        ({Q: entry((4, 32)) | {"shape": [4.0, 32]}}, 512, "no shape of whole numbers"),
        ({Q: entry((4, 32)) | {"shape": [True, 128]}}, 512, "no shape of whole numbers"),
        ({Q: entry((4, 32)) | {"shape": "4x32"}}, 512, "no shape of whole numbers"),
        ({Q: [4, 32]}, 512, "no shape of whole numbers"),
        ({Q: entry((4, 32), dtype="PICKLE")}, 512, "truncated or damaged"),
        ({}, 0, "holds no tensors"),
        ({"__metadata__": {"a": "b"}}, 0, "holds no tensors"),
        ([1], 0, "JSON object, got a list"),
        ({HEAD: entry((1_000_000, 32))}, 1_000_000 * 32 * 4, "1 to 100000 classes"),
    ],
)
def test_headers(stranger, header, data, reason):
    write_file(stranger[0], json.dumps(header).encode(), data)
    refused(stranger[0], WEIGHTS, reason)


@pytest.mark.parametrize(
    ("header", "length", "reason"),
    [
        (b"{}", 2**63, "truncated, a header of 9223372036854775808 bytes in a file of 10"),
        (b"{}", 7, "truncated, a header of 7 bytes in a file of 14"),
        (b"{" + b" " * 10, None, "truncated or damaged"),
        (b"\xff\xfe{}", None, "truncated or damaged"),
        (b'{"a":' * 50_000, None, "nested too deeply"),
        (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', None, "not a finite number"),
        (f'{{"{Q}":{json.dumps(entry((1,)))},"{Q}":{json.dumps(entry((1,)))}}}'.encode(), None, "appears twice"),
        (b'{"a":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,4]}}', None, "'shape' appears twice"),
    ],
)
def test_raw_headers(stranger, header, length, reason):
    write_file(stranger[0], header, 4, length)
    if reason.endswith("of 10"):
        write_file(stranger[0], header, 0, length)
    refused(stranger[0], WEIGHTS, reason)


def test_a_header_that_is_too_long(stranger):
    write_file(stranger[0], b"{}", 2**40, length=2**30)  # a terabyte of hole
    refused(stranger[0], WEIGHTS, "header has 1073741824 bytes, more than")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "sets auto_map=.*never loaded"),
        ({"trust_remote_code": True}, "sets trust_remote_code=True"),
        ({"custom_pipelines": {"a": "b"}}, "sets custom_pipelines"),
        (
            {"auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"}},
            "names the module 'subprocess'",
        ),
        ({"auto_mapping": {"parent_library": "transformers.models.x; os"}}, "names the module"),
        ({"auto_mapping": ["os"]}, "auto_mapping must be"),
        ({"base_model_name_or_path": ["a", "b"]}, "base_model_name_or_path must be a string"),
        ({"revision": {"a": 1}}, "revision must be a string"),
        ({"r": 10**9}, "r is 1000000000, which is beyond"),
        ({"r": -(10**9)}, "beyond"),
        ({"rank_pattern": {"q_proj": 10**12}}, "rank_pattern is 1000000000000"),
        ({"peft_type": "XLORA", "adapters": {"a": "../../other"}}, "type XLORA steer a text model"),
        ({"peft_type": "SHADOW", "shadow_model": "/etc"}, "type SHADOW steer a text model"),
    ],
)
def test_configs(stranger, change, reason):
    edit_config(stranger[0], **change)
    refused(stranger[0], CONFIG, reason)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_code_of_the_base_model_is_never_run_nor_asked_for(tmp_path, monkeypatch, name):
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked the user"))
    base = save_tiny_backbone(tmp_path / "base")
    (base / "evil.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w').close()\nclass Evil:\n    pass\n")
    settings = json.loads((base / name).read_text()) | {"model_type": "evil", "image_processor_type": "Evil"}
    settings["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor"), "evil.Evil")
    (base / name).write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=r"base: .*it names custom code \(auto_map\), which is never run"):
        Backbone.from_pretrained(base)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"peft_type": "LORA", "r": 4, "r": 8}', "'r' appears twice"),
        ('{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}', "'a' appears twice"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not a finite number"),
        ('{"peft_type": "LORA", "lora_alpha": -Infinity}', "not a finite number"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "1e999 is not a finite number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"r": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_config_texts(stranger, text, reason):
    (stranger[0] / CONFIG).write_text(text)
    refused(stranger[0], CONFIG, reason)


def test_a_huge_config_is_not_read(stranger):
    os.truncate(stranger[0] / CONFIG, 2**40)
    refused(stranger[0], CONFIG, "1099511627776 bytes, more than")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CARD])
@pytest.mark.parametrize("target", ["/etc/hostname", "../secret", "../../../../../../etc/hostname"])
def test_links_out_of_the_repo(stranger, name, target):
    (stranger[0].parent / "secret").write_text("{}")
    (stranger[0] / name).unlink(missing_ok=True)
    (stranger[0] / name).symlink_to(target)
    refused(stranger[0], name, "link that leaves the folder")


def test_links_inside_a_cached_repo_do_not_reach_another(stranger, tmp_path):
    repo = tmp_path / "cache" / "models--a--b"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / CONFIG).write_bytes((stranger[0] / CONFIG).read_bytes())
    (snapshot / WEIGHTS).symlink_to(stranger[0] / WEIGHTS)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    with pytest.raises(AdapterError, match=rf"a/b@{'a' * 40}: {WEIGHTS} is a link that leaves"):
        pull_adapter("a/b", cache_dir=tmp_path / "cache", local_files_only=True)


def test_no_regular_file(stranger):
    (stranger[0] / WEIGHTS).unlink()
    os.mkfifo(stranger[0] / WEIGHTS)
    refused(stranger[0], WEIGHTS, "not a regular file")
    (stranger[0] / CONFIG).unlink()
    (stranger[0] / CONFIG).mkdir()
    refused(stranger[0], CONFIG, "not a regular file")


@pytest.mark.parametrize("name", ["../up", "/absolute/path", "a/../../b", "a//b", "https://x/y", "a\0b", "~root/x"])
def test_names_that_are_paths(name, tmp_path):
    with pytest.raises(AdapterError, match="no such folder or repo"):
        pull_adapter(name, cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("base", ["/etc", "../model", "a/../b", "C:\\model", "./out/model", "file://x"])
def test_a_repo_does_not_choose_a_folder_of_this_machine_as_base(stranger, tmp_path, base):
    edit_config(stranger[0], base_model_name_or_path=base)
    snapshot = tmp_path / "cache" / "models--a--b" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    stranger[0].rename(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    cached = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    message = rf"a/b@a{{40}}: adapter_config.json names the local path {re.escape(repr(base))} as its base model"
    with pytest.raises(AdapterError, match=message):
        AdapterPool.from_pretrained(["a/b"], **cached)
    with pytest.raises(AdapterError, match=message):
        MetaLoRAForFewShotClassification.from_pretrained("a/b", **cached)
    (usable,) = check_usable([pull_adapter("a/b", **cached)])
    assert not usable.usable and re.search(message, usable.reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({Q: torch.full((4, 32), float("-inf"))}, f"{LIVE_Q} holds NaN or infinity"),
        ({Q: torch.full((4, 32), float("nan"), dtype=torch.float16)}, f"{LIVE_Q} holds NaN or infinity"),
        ({Q: torch.full((4, 32), 1e300, dtype=torch.float64)}, f"{LIVE_Q} holds NaN or infinity"),
        ({Q: torch.zeros(4, 32, dtype=torch.complex64)}, f"{LIVE_Q} must be floating point"),
        ({Q: torch.zeros(4, 32, dtype=torch.bool)}, f"{LIVE_Q} must be floating point"),
        ({HEAD: torch.zeros(3, 32, dtype=torch.int64)}, f"{HEAD} must be floating point"),
        ({HEAD: torch.full((3, 32), float("nan"))}, f"{HEAD} holds NaN or infinity"),
        ({Q: torch.zeros(2000, 32)}, rf"{LIVE_Q} must be \(4, 32\), got \(2000, 32\)"),
    ],
)
def test_tensors(stranger, change, reason):
    folder, backbone = stranger
    edit_tensors(folder, lambda tensors: tensors | change)
    with pytest.raises(AdapterError, match=f"stranger: {WEIGHTS}: {reason}"):
        load_adapter(pull_adapter(folder), backbone)


def test_shapes_are_compared_before_the_tensors_are_read(stranger, monkeypatch):
    folder, backbone = stranger
    edit_tensors(folder, lambda tensors: tensors | {Q: torch.zeros(2000, 32)})
    monkeypatch.setattr("lora_recycle.adapters.pull.load", lambda data: pytest.fail("read"))
    with pytest.raises(AdapterError, match="got .2000, 32."):
        load_adapter(pull_adapter(folder), backbone)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", [-1, 10**6])
def test_indices_that_point_out_of_the_weight(tmp_path, index):
    classifier = tiny_classifier()
    backbone = headless_twin(classifier)
    get_peft_model(classifier, ShiraConfig(r=2, target_modules=ATTENTION)).save_pretrained(tmp_path)
    edit_tensors(
        tmp_path, lambda ts: {k: torch.full_like(t, index) if k.endswith("indices") else t + 1 for k, t in ts.items()}
    )
    with pytest.raises(AdapterError, match=f"{tmp_path.name}: .*type SHIRA cannot run on twin"):
        AdapterPool.from_pretrained(tmp_path, backbone=Backbone(backbone, tiny_processor(), "twin"))


def test_numbers_that_overflow_together(stranger):
    folder, backbone = stranger
    edit_tensors(folder, lambda tensors: {k: torch.full_like(t, 1e30) for k, t in tensors.items()})
    with pytest.raises(AdapterError, match="stranger: its weight changes are not finite"):
        AdapterPool.from_pretrained(folder, backbone=Backbone(backbone, tiny_processor(), "twin"))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*.*)*x", ".*.*.*.*.*x", "a" * 201, "(a|aa){30}", "(unclosed"])
def test_patterns_that_never_end(stranger, pattern):
    folder, backbone = stranger
    edit_config(folder, rank_pattern={pattern: 4})
    with pytest.raises(AdapterError, match=f"stranger: {WEIGHTS}: the config is not valid for LORA"):
        load_adapter(pull_adapter(folder), backbone)


def test_patterns_that_peft_users_write():
    for pattern in ("q_proj", r"layers\.(0|1)\.attention\.q_proj", r".*\.layers\.\d+\.mlp\.fc[12]", r"^vit.*fc1$"):
        assert check_pattern(pattern) == pattern


@pytest.mark.parametrize(
    "card",
    [
        "labels:\n" + "".join(f"- &a{i} [{', '.join(f'*a{i - 1}' for _ in range(9)) or 1}]\n" for i in range(1, 3)),
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9))
        + "labels: [*j, *j, *j]",
        "labels: !!python/object/apply:os.system ['touch hacked']",
        "labels: [1, {a: b}, [c]]",
        "id2label: {a: b}",
        "id2label: {0: a, 1: b, 2: !!python/name:os.system }",
    ],
)
def test_a_card_that_is_a_bomb_gives_no_labels(stranger, card, tmp_path):
    (stranger[0] / CARD).write_text(f"---\n{card}\n---\n")
    assert pull_adapter(stranger[0]).labels is None
    assert not (tmp_path / "hacked").exists()


def test_a_file_of_a_pickle_under_the_right_name(stranger):
    torch.save({Q: torch.zeros(4, 32)}, stranger[0] / WEIGHTS)
    refused(stranger[0], WEIGHTS, "truncated or damaged")


def test_a_file_of_another_safetensors_model(stranger):
    save_file({"weight": torch.zeros(3)}, stranger[0] / WEIGHTS)
    with pytest.raises(AdapterError, match=f"stranger: {WEIGHTS}"):
        load_adapter(pull_adapter(stranger[0]), stranger[1])
