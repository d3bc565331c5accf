"""One model for many threads and many tasks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers_tiny import tiny_backbone
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file

from lora_recycle.errors import AdapterError, DataError
from lora_recycle.fewshot.heads import HEADS
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification


THREADS, ROUNDS = 8, 12


def wearing(settings=None) -> MetaLoRAForFewShotClassification:
    torch.manual_seed(0)
    backbone = tiny_backbone()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return MetaLoRAForFewShotClassification(backbone, get_peft_model(backbone.model, config), settings)


@pytest.fixture(params=["worn", "merged"])
def model(request):
    return wearing().merge() if request.param == "merged" else wearing()


def support(data, classes):
    rows = [int(i) for c in classes for i in data.by_class()[c][:2]]
    return data.pixels[rows], [data.label_names[int(data.labels[i])] for i in rows]


def in_threads(work, count=THREADS):
    """Run `work(number)` in threads that start together; what went wrong in one is raised here."""
    barrier = threading.Barrier(count)

    def started(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as executor:
        return [future.result() for future in [executor.submit(started, number) for number in range(count)]]


def test_many_threads_get_the_same_answers(model, toy_data):
    model.fit(*support(toy_data, [0, 3, 6]))
    batches = [toy_data.pixels[number :: 9 + number] for number in range(THREADS)]
    expected = [model.predict_proba(batch) for batch in batches]

    def work(number):
        for turn in range(ROUNDS):
            chosen = (number + turn) % THREADS
            found = model.predict_proba(batches[chosen])
            assert torch.equal(found, expected[chosen])
        return True

    assert in_threads(work) == [True] * THREADS


def test_threads_that_decode_files_get_the_same_answers(model, toy_data, tmp_path):
    files = []
    for number, pixels in enumerate(toy_data.pixels[::8]):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(files[-1])
    model.fit(*support(toy_data, [0, 3, 6]))
    expected = model.predict_proba(files)
    assert all(in_threads(lambda _: [torch.equal(model.predict_proba(files), expected) for _ in range(3)], 4))


def test_fit_in_one_thread_never_disturbs_predict_in_another(model, toy_data):
    """Each answer is wholly of the one task or wholly of the other, and a task of one's own is never touched."""
    tasks = [support(toy_data, [0, 3]), support(toy_data, [1, 4, 6])]
    queries = toy_data.pixels[::16]
    own = model.new_task().fit(*support(toy_data, [2, 5]))
    own_answer = own.predict_proba(queries)
    answers = []
    for task in tasks:
        model.fit(*task)
        answers.append((model.predict(queries), model.predict_proba(queries)))
    done = threading.Event()

    def fit(number):
        turn = 0
        while not done.is_set():
            model.fit(*tasks[turn % 2])
            turn += 1
        return turn

    def predict(number):
        try:
            for _ in range(ROUNDS):
                labels, probabilities = model.predict(queries), model.predict_proba(queries)
                assert labels in [known for known, _ in answers]
                assert [torch.equal(probabilities, known) for _, known in answers].count(True) == 1
                assert torch.equal(own.predict_proba(queries), own_answer)
        finally:
            done.set()

    turns, *_ = in_threads(lambda number: fit(number) if number == 0 else predict(number), 4)
    assert turns > 1


def test_saving_disturbs_nobody(model, toy_data, tmp_path):
    model.fit(*support(toy_data, [0, 3, 6]))
    model.save_pretrained(tmp_path / "alone")
    expected, queries = model.predict_proba(toy_data.pixels[::9]), toy_data.pixels[::9]
    done = threading.Event()

    def save(number):
        while not done.is_set():
            model.save_pretrained(tmp_path / str(number))

    def predict(number):
        try:
            for _ in range(ROUNDS):
                assert torch.equal(model.predict_proba(queries), expected)
        finally:
            done.set()

    in_threads(lambda number: save(number) if number < 2 else predict(number), 4)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "0", "1")]
    for later in files[1:]:
        assert later.keys() == files[0].keys() and all(torch.equal(later[key], files[0][key]) for key in later)


def test_saving_a_merged_model_leaves_its_modules_alone(toy_data, tmp_path, monkeypatch):
    """What a thread would run into: while PEFT writes, the live network must not hold its layers."""
    model, seen = wearing().merge(), []
    save = PeftModel.save_pretrained

    def watched(self, *args, **kwargs):
        seen.append([name for name, _ in model.backbone.named_modules() if "lora_" in name])
        return save(self, *args, **kwargs)

    monkeypatch.setattr(PeftModel, "save_pretrained", watched)
    model.save_pretrained(tmp_path)
    assert seen == [[]]


@pytest.mark.parametrize("head", HEADS)
def test_a_shared_task_is_what_the_model_itself_would_be(head, toy_data, tmp_path):
    model, queries = wearing({"head": head}), toy_data.pixels[::16]
    images, labels = support(toy_data, [0, 3, 6])
    model.fit(images, labels)
    task, other = model.new_task().fit(images[:4], labels[:4]), model.new_task()
    assert task.label_names == ["n0", "n3"] and other.label_names == []
    task.add_classes(images[4:], labels[4:])
    torch.testing.assert_close(task.predict_proba(queries), model.predict_proba(queries), rtol=1e-2, atol=1e-3)
    task.save(tmp_path / "task.safetensors")
    loaded = model.load_task(tmp_path / "task.safetensors")
    assert torch.equal(loaded.predict_proba(queries), task.predict_proba(queries))
    loaded.add_classes(*support(toy_data, [7]))
    assert loaded.label_names == ["n0", "n3", "n6", "n7"] and task.label_names == model.label_names


def test_tasks_are_not_trusted(model, toy_data, tmp_path):
    with pytest.raises(DataError, match="Call fit"):
        model.new_task().save(tmp_path / "task.safetensors")
    with pytest.raises(DataError, match="nowhere: there is no fitted task here that the head prototypes can use"):
        model.load_task(tmp_path / "nowhere")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(AdapterError, match="junk: the fitted task cannot be read"):
        model.load_task(tmp_path / "junk")


@pytest.mark.parametrize("head", HEADS)
def test_queries_of_many_tasks_in_one_forward(head, toy_data, monkeypatch):
    model = wearing({"head": head})
    tasks = [model.new_task().fit(*support(toy_data, classes)) for classes in ([0, 3], [5, 1, 7], [2, 6])]
    model.fit(*support(toy_data, [4, 5]))
    queries = toy_data.pixels[::5]
    generator = torch.Generator().manual_seed(0)
    owners = [[*tasks, model][i] for i in torch.randint(4, (len(queries),), generator=generator).tolist()]
    expected = {}
    for task in {*owners}:
        rows = [row for row, owner in enumerate(owners) if owner is task]
        answers = zip(rows, task.predict_proba(queries[rows]), task.predict(queries[rows]), strict=True)
        expected |= {row: (probabilities, label) for row, probabilities, label in answers}
    batches, features = [], model.features
    monkeypatch.setattr(model, "features", lambda x, *_: batches.append(len(x)) or features(x))
    probabilities = model.predict_proba_tasks(queries, owners)
    assert batches == [32]
    for row, found in enumerate(probabilities):
        torch.testing.assert_close(found, expected[row][0], rtol=1e-4, atol=1e-5)
    assert model.predict_tasks(queries, owners) == [expected[row][1] for row in range(len(queries))]


def test_what_does_not_go_together(model, toy_data):
    task = model.new_task().fit(*support(toy_data, [0, 3]))
    with pytest.raises(DataError, match="3 images, but 2 tasks"):
        model.predict_tasks(toy_data.pixels[:3], [task, task])
    with pytest.raises(DataError, match="belongs to another model"):
        model.predict_tasks(toy_data.pixels[:2], [task, wearing().new_task()])
    with pytest.raises(DataError, match="Call fit"):
        model.predict_tasks(toy_data.pixels[:2], [task, model.new_task()])
    with pytest.raises(DataError, match="No images were given"):
        model.predict_tasks([], [])


def test_a_thousand_tasks_hold_a_few_kilobytes_each(toy_data):
    model = wearing()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    tasks = [model.new_task().fit(*support(toy_data, [0, 3, 6])) for _ in range(20)]
    for task in tasks:
        held = [*task._task.statistics.values(), *task._task.prepared.values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        assert not storages.keys() & weights
        assert sum(storages.values()) <= 2 * 3 * 32 * 4 + 3 * 4  # sums and prototypes of 3 classes, and the counts
