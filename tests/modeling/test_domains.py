"""A meta-LoRA with experts: what fit chooses is what all that follows uses, and nothing of a folder is trusted."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers_domains import MEMBERS, mixed_model, repair_expert
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, ViTModel

from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.errors import AdapterError, ConfigError, DataError, StorageError
from lora_recycle.fewshot.domains import DomainChoice
from lora_recycle.modeling import domains
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification
from lora_recycle.modeling.publishing import write_adapter


SCORES = {"birds": {"separability": 0.5, "displacement": 2.0}}


@pytest.fixture(scope="module")
def saved(tiny_backbone_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "meta"
    mixed_model(tiny_backbone_path).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "meta")


@pytest.fixture
def model(saved):
    return MetaLoRAForFewShotClassification.from_pretrained(saved)


@pytest.fixture
def chooses(monkeypatch):
    """Let the rule choose this domain; gives what it was asked."""
    asked = []

    def choose(name):
        def choice(*args):
            asked.append(args)
            return DomainChoice(name, SCORES)

        monkeypatch.setattr(domains, "choose_domain", choice)
        return asked

    return choose


def support(data, classes):
    rows = [int(i) for c in classes for i in data.by_class()[c][:2]]
    return data.pixels[rows], [data.label_names[int(data.labels[i])] for i in rows]


def test_peft_loads_the_root_and_each_expert(model, saved, tiny_backbone_path, toy_data):
    pixels = model.backbone.normalize(toy_data.pixels[:3])
    base = ViTModel.from_pretrained(tiny_backbone_path, add_pooling_layer=False)
    plain = PeftModel.from_pretrained(base, str(saved)).eval()
    for number, name in enumerate(MEMBERS, 1):
        plain.load_adapter(str(saved), adapter_name=name, subfolder=f"experts/{number}")
    for name, adapter in (("shared", "default"), *((name, name) for name in MEMBERS)):
        plain.set_adapter(adapter)
        with torch.no_grad():
            expected = plain(pixels).last_hidden_state[:, 0]
            torch.testing.assert_close(model.features(pixels, name), expected, rtol=1e-4, atol=1e-4)


def test_the_choice_sees_the_support_set_in_every_network(model, chooses, toy_data):
    asked = chooses("birds")
    images, labels = support(toy_data, [0, 3])
    model.fit(images, labels)
    ((frozen, shared, looks, numbers, experts, spread),) = asked
    torch.testing.assert_close(frozen, model.domain_networks.frozen.features(model.preprocess(images)))
    torch.testing.assert_close(shared, model.embed(images, domain="shared"))
    assert list(looks) == list(MEMBERS) and [expert.name for expert in experts] == list(MEMBERS)
    for name, look in looks.items():
        torch.testing.assert_close(look, model.embed(images, domain=name))
    assert numbers.tolist() == [0, 0, 1, 1] and 0 < spread < 1
    assert model.domain == DomainChoice("birds", SCORES)


def test_the_real_choice_is_deterministic_and_of_the_domains(model, toy_data):
    choices = [model.fit(*support(toy_data, [0, 3, 6])).domain for _ in range(2)]
    assert choices[0] == choices[1] and choices[0].name in model.domains and set(choices[0].scores) == set(MEMBERS)


def test_predictions_are_those_of_the_chosen_network_alone(model, chooses, toy_data):
    chooses("birds")
    images, labels = support(toy_data, [0, 3, 6])
    answers = model.fit(images, labels).predict_proba(toy_data.pixels)
    prototypes = torch.stack([model.embed(images[i : i + 2], domain="birds").mean(0) for i in (0, 2, 4)])
    torch.testing.assert_close(model.prototypes, prototypes)
    features = model.embed(toy_data.pixels, domain="birds")
    torch.testing.assert_close(answers, model.probabilities(features))
    assert not torch.allclose(features, model.embed(toy_data.pixels, domain="shared"), atol=1e-3)
    torch.testing.assert_close(model.embed(toy_data.pixels), features)  # by default the task's
    torch.testing.assert_close(model.features(model.preprocess(images)), model.embed(images, domain="birds"))


def test_a_domain_can_be_named(model, toy_data):
    for name in ("cars", "shared", "rest"):
        assert model.fit(*support(toy_data, [0, 3]), domain=name).domain == DomainChoice(name)
    with pytest.raises(ConfigError, match=r"no domain 'boats'; this model has 'shared', 'dogs'"):
        model.fit(*support(toy_data, [0, 3]), domain="boats")
    assert model.domain.name == "rest"  # as it was
    with pytest.raises(DataError, match="at least two classes"):
        model.fit(*support(toy_data, [0]))


def test_forward_is_fit_and_predict_at_once(model, chooses, toy_data):
    chooses("cars")
    images, labels = support(toy_data, [0, 3])
    pixels, queries = model.preprocess(images), model.preprocess(toy_data.pixels[::16])
    with torch.no_grad():
        logits = model(pixels, torch.tensor([0, 0, 1, 1]), queries).logits
    expected = model.fit(images, labels).predict_proba(toy_data.pixels[::16])
    torch.testing.assert_close(logits.softmax(-1), expected)


def test_added_classes_keep_the_domain(model, chooses, toy_data):
    chooses("birds")
    model.fit(*support(toy_data, [0, 3]))
    chooses("cars")
    model.add_classes(*support(toy_data, [6]))
    grown = model.prototypes
    assert model.domain.name == "birds"
    torch.testing.assert_close(grown, model.fit(*support(toy_data, [0, 3, 6]), domain="birds").prototypes)


def test_saved_tasks_keep_their_domain(model, chooses, toy_data, tmp_path):
    chooses("birds")
    queries = toy_data.pixels[::8]
    expected = model.fit(*support(toy_data, [0, 3])).predict_proba(queries)
    model.save_pretrained(tmp_path / "fitted")
    loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "fitted")
    assert loaded.domain == DomainChoice("birds", SCORES)
    torch.testing.assert_close(loaded.predict_proba(queries), expected)
    task = model.new_task().fit(*support(toy_data, [0, 3]))
    task.save(tmp_path / "task.safetensors")
    again = loaded.load_task(tmp_path / "task.safetensors")
    assert again.domain == task.domain == DomainChoice("birds", SCORES)
    torch.testing.assert_close(again.predict_proba(queries), expected)


@pytest.mark.parametrize(
    "domain",
    [
        {"name": "boats", "scores": {}},
        {"name": "birds", "scores": {"birds": {"separability": 1e999, "displacement": 1.0}}},
        {"name": "birds", "scores": {"boats": {"separability": 1.0, "displacement": 1.0}}},
        {"name": "birds", "scores": 3},
        {"name": ["birds"], "scores": {}},
        "birds",
    ],
)
def test_a_task_of_an_unknown_domain_is_refused(model, toy_data, tmp_path, domain):
    path = tmp_path / "task.safetensors"
    model.new_task().fit(*support(toy_data, [0, 3]), domain="birds").save(path)
    header = {"label_names": ["n0", "n3"], "domain": domain}
    save_file(load_file(path), path, metadata={"header": json.dumps(header)})
    with pytest.raises(AdapterError, match="fitted task cannot be read"):
        model.load_task(path)


def test_many_tasks_of_many_domains_in_one_call(model, toy_data):
    kinds = ["birds", "shared", "cars", "birds"]
    tasks = [model.new_task().fit(*support(toy_data, [n, n + 3]), domain=kind) for n, kind in enumerate(kinds)]
    images = toy_data.pixels[::7]
    order = [tasks[i % len(tasks)] for i in range(len(images))]
    rows = model.predict_proba_tasks(images, order, batch_size=5)
    for image, task, row in zip(images, order, rows, strict=True):
        torch.testing.assert_close(row, task.predict_proba(image[None])[0], rtol=1e-4, atol=1e-5)


def test_threads_on_different_domains_do_not_meet(model, toy_data):
    tasks = [model.new_task().fit(*support(toy_data, [0, 3]), domain=name) for name in model.domains]
    queries = toy_data.pixels[::4]
    expected = [task.predict_proba(queries) for task in tasks]

    def work(number):
        turns = [(number + turn) % len(tasks) for turn in range(10)]
        return all(torch.equal(tasks[turn].predict_proba(queries), expected[turn]) for turn in turns)

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(work, range(8)))


def test_merging_keeps_to_the_domain_of_the_task(model, toy_data, tmp_path):
    images, labels = support(toy_data, [0, 3])
    queries = toy_data.pixels[::8]
    other = model.new_task().fit(images, labels, domain="cars")
    expected = model.fit(images, labels, domain="birds").predict_proba(queries)
    model.merge()
    torch.testing.assert_close(model.predict_proba(queries), expected, rtol=1e-3, atol=1e-4)
    assert model.fit(images, labels).domain == DomainChoice("birds")
    torch.testing.assert_close(model.predict_proba(queries), expected, rtol=1e-3, atol=1e-4)
    for refused in (lambda: other.predict(queries), lambda: model.fit(images, labels, domain="shared")):
        with pytest.raises(ConfigError, match="merged into the domain 'birds'"):
            refused()
    model.save_pretrained(tmp_path / "merged")
    again = MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again.predict_proba(queries), expected, rtol=1e-3, atol=1e-4)
    assert again.new_task().fit(images, labels, domain="cars").predict(queries)


def test_an_unfitted_model_merges_the_shared_network(model, toy_data):
    expected = model.embed(toy_data.pixels[:4], domain="shared")
    torch.testing.assert_close(model.merge().embed(toy_data.pixels[:4]), expected, rtol=1e-3, atol=1e-4)
    assert model.fit(*support(toy_data, [0, 3])).domain == DomainChoice("shared")


def test_tuning_starts_from_the_chosen_expert(model, chooses, toy_data, tmp_path):
    chooses("birds")
    images, labels = support(toy_data, [0, 3])
    before = {name: model.embed(images, domain=name) for name in model.domains}
    model.tune(images, labels)
    assert model.domain == DomainChoice("birds", SCORES)
    changed = {name for name in model.domains if not torch.equal(model.embed(images, domain=name), before[name])}
    assert changed == {"birds"}
    expected = model.predict_proba(images)
    model.save_pretrained(tmp_path / "tuned")
    loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(loaded.predict_proba(images), expected)
    model.fit(images, labels)
    assert torch.equal(model.embed(images, domain="birds"), before["birds"])
    with pytest.raises(ConfigError, match="no domain 'boats'"):
        model.tune(images, labels, domain="boats")


def test_an_exported_checkpoint_is_the_network_of_the_task(model, toy_data, tmp_path):
    images, labels = support(toy_data, [0, 3])
    pixels = model.preprocess(images)
    for name in ("birds", "shared"):
        model.fit(images, labels, domain=name).merge_and_save(tmp_path / name)
        assert json.loads((tmp_path / name / "export.json").read_text())["domain"] == name
        plain = AutoModel.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            found = plain(pixels).pooler_output
        torch.testing.assert_close(found, model.features(pixels, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 4])
def test_fewer_bits_are_those_of_the_experts_too(model, saved, toy_data, tmp_path, bits):
    model.save_pretrained(tmp_path / "saved", bits=bits)
    write_adapter(pull_adapter(saved), tmp_path / "quantized", bits)
    images = toy_data.pixels[::32]
    for name in ("saved", "quantized"):
        loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path / name)
        file = "adapter_model.safetensors" if bits == 16 else "adapter_codes.safetensors"
        assert [p.name for p in sorted((tmp_path / name / "experts" / "1").iterdir())] == [
            *sorted(("adapter_config.json", file))
        ]
        for domain in model.domains:
            exact, near = model.embed(images, domain=domain), loaded.embed(images, domain=domain)
            assert torch.cosine_similarity(exact, near).min() > (0.9999 if bits == 16 else 0.97)


def test_a_folder_without_experts_is_as_it_was(folder, toy_data, tmp_path):
    path = folder / "meta_lora_config.json"
    settings = json.loads(path.read_text())
    del settings["domains"]
    path.write_text(json.dumps(settings))
    model = MetaLoRAForFewShotClassification.from_pretrained(folder)
    assert model.domains == [] and model.fit(*support(toy_data, [0, 3])).domain is None
    assert model.fit(*support(toy_data, [0, 3]), domain="shared").domain is None
    with pytest.raises(ConfigError, match="no domain 'birds'; this model has 'shared' alone"):
        model.fit(*support(toy_data, [0, 3]), domain="birds")
    model.save_pretrained(folder)  # over the one that had some
    assert not (folder / "experts").exists()


def test_experts_travel_to_the_hub_and_back(hub, tiny_backbone_path, toy_data):
    hub.put("org/tiny-vit", tiny_backbone_path)
    model = mixed_model("org/tiny-vit")
    model.push_to_hub("org/mixed")
    loaded = MetaLoRAForFewShotClassification.from_pretrained("org/mixed")
    assert loaded.domains == model.domains
    for name in model.domains:
        near = loaded.embed(toy_data.pixels[:4], domain=name)
        torch.testing.assert_close(near, model.embed(toy_data.pixels[:4], domain=name), rtol=1e-4, atol=1e-5)
    card = pull_adapter("org/mixed").path / "README.md"
    assert "| birds | birds-5, birds-6 |" in card.read_text()
    model.push_to_hub("org/coded", bits=4)
    assert MetaLoRAForFewShotClassification.from_pretrained("org/coded").domains == model.domains
    model.domain_networks = None
    model.push_to_hub("org/mixed")
    assert not [name for name in HfApi().list_repo_files("org/mixed") if name.startswith("experts/")]
    assert MetaLoRAForFewShotClassification.from_pretrained("org/mixed").domains == []


def test_an_expert_that_the_repo_lacks_is_told(hub, saved, tiny_backbone_path):
    files = {path.relative_to(saved).as_posix(): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    hub.put("org/half", {name: data for name, data in files.items() if not name.startswith("experts/3")})
    with pytest.raises(AdapterError, match=r"org/half@\w+: experts/3 \(birds\): the expert is missing"):
        MetaLoRAForFewShotClassification.from_pretrained("org/half", base_model=tiny_backbone_path)


def remove_folder(folder):
    shutil.rmtree(folder / "experts" / "2")


def remove_weights(folder):
    (folder / "experts" / "2" / "adapter_model.safetensors").unlink()


def truncate(folder):
    path = folder / "experts" / "2" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def exchange(folder):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(folder / "experts" / "1" / name, folder / "experts" / "2" / name)


def change_config(folder, **changes):
    path = folder / "experts" / "2" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    repair_expert(folder, 2)


def change_tensor(folder, value):
    path = folder / "experts" / "2" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[sorted(tensors)[0]][0, 0] = value
    save_file(tensors, path)
    repair_expert(folder, 2)


def link_out(folder):
    outside = folder.parent / "outside"
    (folder / "experts" / "2").rename(outside)
    (folder / "experts" / "2").symlink_to(outside)


def link_file_out(folder):
    outside = folder.parent / "weights"
    path = folder / "experts" / "2" / "adapter_model.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_folder, r"experts/2 \(rest\): the expert is missing"),
        (remove_weights, "experts/2: adapter_model.safetensors is missing"),
        (truncate, "experts/2: adapter_model.safetensors is truncated"),
        (exchange, r"experts/2 \(rest\): adapter_\w+.\w+ is not the one"),
        (lambda folder: change_config(folder, r=2), "experts/2: .*must be"),
        (lambda folder: change_config(folder, base_model_name_or_path="other/base"), "is made for 'other/base'"),
        (lambda folder: change_config(folder, peft_type="XLORA"), "steer a text model"),
        (lambda folder: change_tensor(folder, float("nan")), "experts/2: .* holds NaN or infinity"),
        (link_out, "is a link that leaves the repo"),
        (link_file_out, "is a link that leaves the folder"),
    ],
)
def test_an_expert_that_is_no_good_is_told(folder, spoil, message):
    spoil(folder)
    with pytest.raises(AdapterError, match=message):
        MetaLoRAForFewShotClassification.from_pretrained(folder)


def renamed(name):
    return lambda found: found["experts"][1].update(name=name)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: found.clear(),
        lambda found: found.update(experts=[]),
        lambda found: found.update(experts=found["experts"] * 10),
        lambda found: found.update(reference_spread=0),
        lambda found: found.update(reference_spread=True),
        lambda found: found.update(reference_spread="1"),
        renamed("dogs"),
        renamed("shared"),
        renamed("../up\n"),
        renamed(7),
        lambda found: found["experts"][0].update(role="king"),
        lambda found: found["experts"][0].update(role=["part"]),
        lambda found: found["experts"][0].update(share=1.0),
        lambda found: found["experts"][0].update(share=-0.5),
        lambda found: found["experts"][0].update(adapters=[{"name": 3}]),
        lambda found: found["experts"][0].update(checksums=None),
        lambda found: found["experts"][0].pop("checksums"),
    ],
)
def test_a_damaged_part_of_the_sidecar_is_told(folder, spoil):
    path = folder / "meta_lora_config.json"
    settings = json.loads(path.read_text())
    spoil(settings["domains"])
    path.write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match="the part `domains` is damaged"):
        MetaLoRAForFewShotClassification.from_pretrained(folder)


def test_links_in_the_folder_to_write_to_are_not_followed(model, folder, tmp_path):
    link_out(folder)
    with pytest.raises(StorageError, match="is a link"):
        model.save_pretrained(folder)
