"""Small files that would hang or fill the machine: each is refused, or read without what it asks for, at once."""

import json
import os
import struct
import time
import tracemalloc

import pytest
import torch
from helpers_adapters import edit_tensors, save_adapter
from safetensors.torch import save, save_file

from lora_recycle.adapters.keys import module_of
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.adapters.quantization import read_coded_header
from lora_recycle.errors import AdapterError, DataError
from lora_recycle.hub.card_files import read_card
from lora_recycle.hub.cards import is_repo_id
from lora_recycle.hub.repo_files import CODES_FILE
from lora_recycle.runtime import untrusted_tensors
from lora_recycle.runtime.untrusted import check_settings, parse_front_matter, parse_json
from lora_recycle.runtime.untrusted_tensors import read_safetensors_header
from lora_recycle.surrogate.dataset import SurrogateDataset


CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
#: Processor seconds and traced bytes that reading any of these files may take.
SECONDS, MEMORY = 8, 100_000_000


@pytest.fixture(autouse=True)
def bounded():
    """Fails a test that takes long, or much memory."""
    tracemalloc.start()
    started = time.process_time()
    yield
    seconds, memory = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 4 * SECONDS and memory < 2 * MEMORY  # making the file is in it


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "stranger"
    save_adapter(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def stranger(sound, tmp_path):
    folder = tmp_path / "stranger"
    folder.mkdir()
    for name, data in sound.items():
        (folder / name).write_bytes(data)
    return folder


MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: *a{i - 1}, k{i}: 1}}\n" for i in range(1, 9000))
CARDS = {
    "merge chain": (MERGES, "more than 131072"),
    "short merge chain": (MERGES[:60_000].rsplit("\n", 1)[0], "anchors, aliases and tags"),
    "merge without alias": ("a: {<<: {b: 1}}", "merge keys"),
    "merge of a list": ("a: {<<: [{b: 1}, {c: 2}]}", "merge keys"),
    "flow list of a megabyte": ("labels: [" + "1," * 500_000 + "1]", "more than 131072"),
    "flow list": ("labels: [" + "1," * 60_000 + "1]", "more than 20000 values"),
    "block list": ("labels:\n" + "- 1\n" * 30_000, "more than 20000 values"),
    "brackets": ("labels: " + "[" * 60_000, "deeper than 20"),
    "braces": ("{a: " * 30_000, "deeper than 20"),
    "dashes": ("- " * 60_000 + "a", "deeper than 20"),
    "anchors": ("a: &a 1\nb: *a", "anchors, aliases and tags .*line 2"),
    "tag": ("a: !!set {b, c}", "anchors, aliases and tags"),
    "python": ("a: !!python/object/apply:os.system ['false']", "anchors, aliases and tags"),
    "list": ("- a", "must be a mapping, got a list"),
    "broken": ("a: [", "no plain YAML"),
    "long number": ("a: " + "9" * 100_000, "Exceeds the limit"),
    "base sixty": ("a: 1" + ":59" * 40_000, "Exceeds the limit|float"),
    "date": ("a: 2001-99-99", "month must be"),
}


@pytest.fixture(scope="module")
def largest():
    """Seconds of the processor for about as many values as a card may hold."""
    text = "labels:\n" + "- 1\n" * 19_000
    started = time.process_time()
    for _ in range(2):  # as often as a pull looks at a card
        assert len(parse_front_matter(text)["labels"]) == 19_000
    return time.process_time() - started


@pytest.mark.parametrize("name", CARDS)
def test_front_matter(stranger, name, largest):
    """A hostile card is refused, and costs no more than a few harmless ones: the ratio holds on any processor."""
    text, reason = CARDS[name]
    (stranger / CARD).write_text(f"---\n{text}\n---\n# Card\n")
    started = time.process_time()
    assert pull_adapter(stranger).labels is None
    assert time.process_time() - started < 4 * largest + 1
    if name != "base sixty":  # a number, if a large one
        with pytest.raises(ValueError, match=reason):
            read_card(stranger / CARD)


@pytest.mark.parametrize(
    "text", ["---\n" + "\n" * 1_000_000, "---\n" * 250_000, " " * 1_000_000 + "---", "\n" * 10**6]
)
def test_cards_without_front_matter(stranger, text):
    (stranger / CARD).write_text(text)
    started = time.process_time()
    assert pull_adapter(stranger).labels is None
    assert time.process_time() - started < SECONDS


def test_a_card_of_many_megabytes_is_not_read(stranger):
    os.truncate(stranger / CARD, 2**40)
    assert pull_adapter(stranger).labels is None
    with pytest.raises(ValueError, match="1099511627776 bytes, more than 1048576"):
        read_card(stranger / CARD)


def test_a_card_as_people_write_them_is_read(stranger):
    names = [f"class number {i}" for i in range(1000)]
    text = "---\r\nlicense: mit\r\nid2label:\r\n" + "".join(f"  {i}: {name}\r\n" for i, name in enumerate(names))
    (stranger / CARD).write_bytes(("\ufeff" + text + "---\r\n# Card\r\n").encode())
    card = read_card(stranger / CARD)
    assert card.metadata["license"] == "mit" and list(card.metadata["id2label"].values()) == names
    assert card.text.strip() == "# Card"
    (stranger / CARD).write_text(str(card))
    assert read_card(stranger / CARD).metadata == card.metadata


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("base_model.model." + "a." * 100_000 + "lora_A.weight", "200030 characters and .* parts, more than 500"),
        ("a" * 200_000, "200000 characters"),
        ("a." * 45, "90 characters and 46 parts, more than 500 or 40"),
    ],
)
def test_tensor_names(stranger, name, reason):
    edit_tensors(stranger, lambda tensors: tensors | {name: torch.zeros(1)})
    with pytest.raises(AdapterError, match=f"stranger: {WEIGHTS} .*{reason}"):
        pull_adapter(stranger)


def test_the_longest_names_that_pass_take_no_time():
    name = ".".join("a" * 11 for _ in range(untrusted_tensors.MAX_NAME_PARTS))
    assert len(name) <= untrusted_tensors.MAX_NAME
    started = time.process_time()
    for _ in range(untrusted_tensors.MAX_TENSORS):
        assert module_of(name, set()) is None
    assert time.process_time() - started < SECONDS


def test_too_many_tensors(stranger):
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    header = json.dumps({f"t{i}": entry for i in range(untrusted_tensors.MAX_TENSORS + 1)}).encode()
    (stranger / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"0")
    with pytest.raises(AdapterError, match="holds 10001 tensors, more than 10000"):
        pull_adapter(stranger)


@pytest.mark.parametrize("shapes", [{f"m{i}": [1, 1] for i in range(10_001)}, {"a" * 501: [1, 1]}])
def test_coded_matrices_have_the_same_bounds(tmp_path, shapes):
    header = json.dumps({"bits": 8, "shapes": shapes})
    (tmp_path / CODES_FILE).write_bytes(save({"codes": torch.zeros(1, dtype=torch.uint8)}, {"header": header}))
    with pytest.raises(ValueError, match="10001 tensors, more than|501 characters"):
        read_coded_header(tmp_path / CODES_FILE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" + "0," * 600_000 + "0]", "holds more than 500000 values"),
        ('{"a": ' * 60 + "1" + "}" * 60, "nested too deeply"),
        ("[" * 500 + "]" * 500, "nested too deeply"),
        ("[" * 50_000, "nested too deeply"),
    ],
)
def test_json(stranger, text, reason):
    for form in (text, text.encode()):
        with pytest.raises(ValueError, match=reason):
            parse_json(form)
    (stranger / CONFIG).write_text(text)
    with pytest.raises(AdapterError, match=f"stranger: {CONFIG} is not valid JSON .*{reason}"):
        pull_adapter(stranger)


def test_json_as_deep_as_it_may_be():
    assert parse_json("[" * 50 + "]" * 50) and parse_json(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


def test_a_manifest_of_many_megabytes(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b'{"shards": [' + b" " * 60_000_000 + b"]}")
    with pytest.raises(DataError, match="no readable manifest.json .60000014 bytes, more than 16777216"):
        SurrogateDataset.from_pretrained(tmp_path)


def test_a_manifest_of_many_values(tmp_path):
    (tmp_path / "manifest.json").write_text('{"shards": [' + "0," * 600_000 + "0]}")
    with pytest.raises(DataError, match="more than 500000 values"):
        SurrogateDataset.from_pretrained(tmp_path)


def test_a_shard_with_a_header_of_many_megabytes(tmp_path):
    entry = {"file": "shards/a.safetensors", "sha256": "0", "num_images": 1, "accuracy": 1, "confidence": 1}
    entry["adapter"] = {"name": "a", "sha256": "0"}
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 1, "shards": [entry]}))
    (tmp_path / "shards").mkdir()
    save_file({"labels": torch.zeros(1)}, tmp_path / entry["file"], {"header": "x" * 85_000_000})
    data = SurrogateDataset.from_pretrained(tmp_path)
    started = time.process_time()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with pytest.raises(DataError, match=r"its header has 850\d+ bytes, more than 10485760"):
        data.shard(0)
    assert time.process_time() - started < 1 and tracemalloc.get_traced_memory()[1] - before < 1_000_000


def test_one_parser_says_what_safetensors_says(tmp_path):
    tensors = {"b": torch.arange(6).view(2, 3), "a": torch.zeros(4, dtype=torch.float16)}
    save_file(tensors, tmp_path / "file", {"header": "{}"})
    header = read_safetensors_header(tmp_path / "file")
    assert header.metadata == {"header": "{}"} and header.bounded_shapes() == {"b": (2, 3), "a": (4,)}
    assert header == untrusted_tensors.parse_safetensors_header((tmp_path / "file").read_bytes())
    data = (tmp_path / "file").read_bytes()[header.size :]
    for name, entry in header.tensors.items():
        assert data[entry.begin : entry.end] == tensors[name].numpy().tobytes()


@pytest.mark.parametrize("name", ["a" * 300, "org/" + "é" * 200, "a/" * 1500, "a\0b"])
def test_names_that_no_folder_has(name):
    with pytest.raises(ValueError, match="base_model_name_or_path is no name of a folder or a repo"):
        check_settings({"base_model_name_or_path": name})
    assert not is_repo_id("a" * 5000)
