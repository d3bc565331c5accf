"""Images in all the places and modes users keep them."""

import io

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from lora_recycle.errors import DataError
from lora_recycle.images import sources
from lora_recycle.images.decode import to_rgb
from lora_recycle.images.labelled import load_labelled_images, load_unlabelled_images


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(colour, size=(6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def table(count=12, classes=3, **columns) -> datasets.Dataset:
    images = [{"bytes": png((index, 0, 0)), "path": None} for index in range(count)]
    labels = [index % classes for index in range(count)]
    names = [f"class {index}" for index in range(classes)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    return datasets.Dataset.from_dict({"image": images, "label": labels, **columns}, features=features)


def write_folder(root, classes=("ant", "bee"), count=3):
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.png").write_bytes(png((0, index, 0)))
    return root


def test_parquet_keeps_class_names_and_pixels(tmp_path):
    path = tmp_path / "flowers" / "test.parquet"
    path.parent.mkdir()
    table().to_parquet(str(path))
    data = load_labelled_images(path, size=8)
    assert data.name == "flowers/test"
    assert data.label_names == ["class 0", "class 1", "class 2"]
    assert data.pixels.shape == (12, 3, 8, 8) and data.pixels.dtype == torch.uint8
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == [0, 1, 2] * 4
    assert data.pixels[:, 0, 0, 0].tolist() == list(range(12)) and data.pixels[:, 1:].max() == 0
    assert data.by_class()[1].tolist() == [1, 4, 7, 10]


def test_subset_is_drawn_per_class_and_repeats(tmp_path):
    path = tmp_path / "test.parquet"
    table(40, 4).to_parquet(str(path))
    first, again, other = (load_labelled_images(path, 8, max_per_class=3, seed=seed) for seed in (0, 0, 1))
    assert first.labels.bincount().tolist() == [3, 3, 3, 3]
    assert torch.equal(first.pixels, again.pixels) and not torch.equal(first.pixels, other.pixels)
    numbers = first.pixels[:, 0, 0, 0].long()  # the red value is the row number
    assert torch.equal(numbers % 4, first.labels)


def test_saved_data_set_and_splits(tmp_path):
    datasets.DatasetDict(train=table(6), test=table(9)).save_to_disk(str(tmp_path / "saved"))
    assert len(load_labelled_images(tmp_path / "saved", 8)) == 9
    assert len(load_labelled_images(tmp_path / "saved", 8, split="train")) == 6
    with pytest.raises(DataError, match="no split 'validation', it has test, train"):
        load_labelled_images(tmp_path / "saved", 8, split="validation")


def test_folder_of_parquet_files_reads_one_split(tmp_path):
    table(6).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    table(5).to_parquet(str(tmp_path / "test-00000-of-00002.parquet"))
    table(4).to_parquet(str(tmp_path / "test-00001-of-00002.parquet"))
    assert len(load_labelled_images(tmp_path, 8)) == 9


@pytest.mark.parametrize("labels, names", [(["b", "a", "b"], ["a", "b"]), ([7, 3, 7], ["3", "7"])])
def test_plain_labels(tmp_path, labels, names):
    images = [{"bytes": png((1, 2, 3)), "path": None}] * 3
    path = tmp_path / "plain.parquet"
    datasets.Dataset.from_dict({"img": images, "fine_label": labels}).to_parquet(str(path))
    data = load_labelled_images(path, 4)
    assert data.label_names == names and data.labels.tolist() == [1, 0, 1]


def test_class_folders_and_split_folders(tmp_path):
    write_folder(tmp_path / "insects")
    data = load_labelled_images(tmp_path / "insects", 5)
    assert (data.name, data.label_names, data.labels.tolist()) == ("insects", ["ant", "bee"], [0, 0, 0, 1, 1, 1])
    write_folder(tmp_path / "both" / "train", count=1)
    write_folder(tmp_path / "both" / "test", count=2)
    data = load_labelled_images(tmp_path / "both", 5)
    assert (data.name, len(data), data.label_names) == ("both/test", 4, ["ant", "bee"])


def test_unlabelled_folder_and_limit(tmp_path):
    write_folder(tmp_path / "any" / "deep")
    assert load_unlabelled_images(tmp_path / "any", 4).shape == (6, 3, 4, 4)
    first, again = (load_unlabelled_images(tmp_path / "any", 4, limit=2, seed=3) for _ in range(2))
    assert first.shape == (2, 3, 4, 4) and torch.equal(first, again)


def test_unlabelled_table(tmp_path):
    table(5).to_parquet(str(tmp_path / "x.parquet"))
    assert load_unlabelled_images(tmp_path / "x.parquet", 4).shape == (5, 3, 4, 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = to_rgb(Image.new(mode, (3, 2)))
    assert image.mode == "RGB" and image.size == (3, 2)


def test_sixteen_bits_are_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    assert np.asarray(to_rgb(image))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_exif_orientation_is_applied(tmp_path):
    image, exif = Image.new("RGB", (4, 2)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert to_rgb(Image.open(tmp_path / "turned.png")).size == (2, 4)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file or folder. Expected a parquet or CSV file"):
        load_labelled_images(tmp_path / "nowhere", 4)
    with pytest.raises(DataError, match="got a .txt file"):
        (tmp_path / "notes.txt").write_text("x")
        load_labelled_images(tmp_path / "notes.txt", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found no folder"):
        load_labelled_images(tmp_path / "empty", 4)
    with pytest.raises(DataError, match="no images below"):
        load_unlabelled_images(tmp_path / "empty", 4)

    def refuse(name):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(sources, "_ask_hub", refuse)
    with pytest.raises(DataError, match=r"someone/none: no such file .* from the Hub \(no network\)"):
        load_labelled_images("someone/none", 4)


def test_a_name_that_the_hub_does_not_know_is_asked_for_once(hub):
    with pytest.raises(DataError, match=r"photos: no such file .* from the Hub \(it has none, or a private one"):
        load_labelled_images("photos", 4)
    assert hub.count("datasets/photos") == 1


def test_an_unreachable_hub_is_no_reason_to_wait(monkeypatch):
    def down(self, name, timeout):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", down)
    with pytest.raises(DataError, match=r"from the Hub \(no network\)"):
        load_labelled_images("someone/none", 4)


def test_hub_data_set_takes_the_first_usual_split(monkeypatch):
    loaded = datasets.DatasetDict(train=table(6), validation=table(3))
    monkeypatch.setattr(sources, "_ask_hub", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    data = load_labelled_images("someone/flowers", 4)
    assert (data.name, len(data)) == ("someone/flowers", 3)


def test_empty_class_folder_is_named(tmp_path):
    (write_folder(tmp_path / "insects") / "cricket").mkdir()
    with pytest.raises(DataError, match="cricket: this class folder holds no images"):
        load_labelled_images(tmp_path / "insects", 4)


@pytest.mark.parametrize("content", [b"", b"not an image", png((1, 2, 3), (64, 64))[:60]])
def test_broken_file_is_named(tmp_path, content):
    (write_folder(tmp_path / "insects") / "ant" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match="1.png: not a readable image"):
        load_labelled_images(tmp_path / "insects", 4)


def test_broken_table_rows_and_columns(tmp_path):
    images = [{"bytes": png((1, 1, 1)), "path": None}, {"bytes": b"broken", "path": None}]
    path = tmp_path / "broken.parquet"
    datasets.Dataset.from_dict({"image": images, "label": [0, 1]}).to_parquet(str(path))
    with pytest.raises(DataError, match="broken, row 1: not a readable image"):
        load_labelled_images(path, 4)
    table().remove_columns("label").to_parquet(str(tmp_path / "bare.parquet"))
    with pytest.raises(DataError, match="expected a label column .* found columns none besides the images"):
        load_labelled_images(tmp_path / "bare.parquet", 4)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "bare.parquet").read_bytes()[:100])
    with pytest.raises(DataError, match="not a readable parquet file"):
        load_labelled_images(tmp_path / "cut.parquet", 4)
