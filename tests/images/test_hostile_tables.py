"""Parquet and Arrow files that anyone may have written: read, or refused with the library's error.

    PYTHONPATH=tests python tests/images/test_hostile_tables.py --inputs 10000

Inputs follow from the seed and their number; a failure names both, so that `--seed S --first N --inputs 1` repeats it.
"""

import argparse
import io
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, config, disable_progress_bars
from datasets import Image as ImageFeature
from PIL import Image

from lora_recycle.errors import DataError, LoRARecycleError
from lora_recycle.images import sources
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.images.table_checks import check_parquet


CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(colour="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = pa.array([{"bytes": picture(), "path": None}] * 4, CELL)
NUMBERS = [0, 1, 0, 1]


def names(*every) -> dict[bytes, bytes]:
    """Metadata that make a column of numbers one of classes."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(every)}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def repeated(value, count) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()).take(pa.array([0] * count)), pa.array([value]))


def write(folder: Path, image=IMAGES, label=NUMBERS, metadata=None) -> Path:
    table = pa.table({"image": image, "label": label}).replace_schema_metadata(metadata)
    pq.write_table(table, folder / "table.parquet", compression="zstd")
    return folder / "table.parquet"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, 9, 0, 1], "metadata": names("a", "b")}, "holds the label 9, but has 2 names"),
        ({"metadata": names("a", "a")}, "not a readable parquet file .*duplicated"),
        ({"metadata": {b"huggingface": b"[" * 9000}}, "not a readable parquet file .*recursion"),
        ({"label": [0.5, 1, float("nan"), 1]}, "must hold one integer or string"),
        ({"label": [[0], [1], [0], [1]]}, "must hold one integer or string"),
        ({"label": [None, 1, 0, 1]}, "1 of 4 images have no label"),
        ({"image": [1, 2, 3, 4]}, "holds no images"),
        ({"image": [{"a": 1}] * 4}, "row 0: No image can be read from a NoneType"),
        ({"image": pa.array([{"bytes": b"", "path": None}] * 4, CELL)}, "row 0: No image can be read"),
    ],
)
def test_columns_that_are_no_images_and_labels(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        load_labelled_images(write(tmp_path, **columns), 8)


def test_a_file_of_this_machine_is_not_one_of_the_hub(tmp_path, monkeypatch):
    """A table of this machine may name its pictures, as `datasets` writes them; one of the Hub only its own."""
    secret, own = tmp_path / "secret.png", tmp_path / "cache" / "own.png"
    own.parent.mkdir()
    for path in (secret, own):
        path.write_bytes(picture("blue"))
    os.symlink(secret, own.with_name("link.png"))
    paths = [secret, own.parent / ".." / "secret.png", own.with_name("link.png"), own]
    monkeypatch.setattr(sources, "_caches", lambda: [own.parent])
    for path in paths:
        cells = [{"bytes": None, "path": str(path)}] * 4
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
        table = Dataset.from_dict({"image": cells, "label": NUMBERS}, features=features)
        monkeypatch.setattr(sources, "_read_hub", lambda *_, table=table: table)
        if path == own:
            assert load_labelled_images("org/data", 8).pixels[0, :, 0, 0].tolist() == [0, 0, 255]
        else:
            with pytest.raises(DataError, match="row 0: names the file .*png, which is not of the data set"):
                load_labelled_images("org/data", 8)


def test_a_kilobyte_that_stands_for_gigabytes(tmp_path):
    path = write(tmp_path, repeated(b"x" * 200_000, 20_000), [0] * 20_000)
    assert path.stat().st_size < 2000
    with pytest.raises(DataError, match="table.parquet: it has more than 1073741824 bytes of repeated values"):
        load_labelled_images(path, 8)
    path = write(tmp_path, repeated(b"x", 2**22 + 1), pa.nulls(2**22 + 1, pa.int8()))
    with pytest.raises(DataError, match="table.parquet: it has 4194305 rows, more than 4194304"):
        load_labelled_images(path, 8)


def test_row_groups_with_a_dictionary_each(tmp_path):
    """Arrow refuses a batch of structs across two of them; files like that are as common as harmless."""
    cells = [{"bytes": random.Random(i).randbytes(300), "path": None} for i in range(2000)]
    pq.write_table(pa.table({"image": pa.array(cells, CELL)}), tmp_path / "table.parquet", row_group_size=1000)
    with pytest.raises(pa.ArrowNotImplementedError):
        list(pq.ParquetFile(tmp_path / "table.parquet", read_dictionary=["image.bytes"]).iter_batches(2000))
    check_parquet(tmp_path / "table.parquet")


def test_many_equal_labels_are_no_bomb(tmp_path):
    path = write(tmp_path, label=["cat", "dog", "cat", "dog"])
    assert load_labelled_images(path, 8).label_names == ["cat", "dog"]


def test_a_table_that_never_ends(tmp_path):
    os.mkfifo(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="train.parquet: not a readable parquet file .it is not a regular file"):
        load_labelled_images(tmp_path, 8)


def test_offsets_that_lie_do_not_read_other_memory(tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict({"image": IMAGES.to_pylist(), "label": NUMBERS}, features=features).save_to_disk(tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    size = len(picture())
    offsets = b"".join((size * i).to_bytes(4, "little") for i in range(5))
    data = path.read_bytes()
    assert offsets in data
    path.write_bytes(data.replace(offsets, offsets[:8] + (2**31 - 1).to_bytes(4, "little") + offsets[12:]))
    with pytest.raises(DataError, match="not a readable saved data set"):
        load_labelled_images(tmp_path, 8)


def prepare(folder: Path) -> dict[str, bytes]:
    """The same images as a parquet file and as a saved data set: path to content."""
    cells = [{"bytes": picture((20 * i, 0, 0)), "path": None} for i in range(9)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    dataset = Dataset.from_dict({"image": cells, "label": [0, 1, 2] * 3}, features=features)
    (folder / "parquet").mkdir()
    dataset.to_parquet(folder / "parquet" / "train.parquet")
    dataset.save_to_disk(folder / "saved")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Change, cut or insert bytes, half of the time near the end, where a parquet file says what is in it."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else len(data) - 1 - rng.randrange(min(len(data), 900))
        how = rng.randrange(4)
        if how < 2:
            data[at] = rng.randrange(256)
        elif how == 2 and len(data) > 200:
            del data[at : at + rng.choice((1, 4, 50))]
        else:
            data[at:at] = bytes(rng.randrange(256) for _ in range(4))
    return bytes(data)


def attempt(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether a data set of these files is read; all but the library's errors go through."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    try:
        found = load_labelled_images(folder, 8)
    except LoRARecycleError:
        return False
    assert found.pixels.shape[1:] == (3, 8, 8) and len(found.labels) == len(found.pixels)
    assert int(found.labels.max()) < len(found.label_names)
    return True


def fuzz(folder: Path, inputs: int, seed: int = 0, first: int = 0) -> dict[str, int]:
    """Try `inputs` inputs, each in a folder of its own, as `datasets` keeps what it has read."""
    (folder / "sound").mkdir()
    sound, read = prepare(folder / "sound"), {"parquet": 0, "saved": 0}
    for number in range(first, first + inputs):
        rng = random.Random(f"{seed}/{number}")
        kind = ("parquet", "saved")[number % 2]
        files = {name.split("/", 1)[1]: data for name, data in sound.items() if name.startswith(kind)}
        bad = rng.choice(sorted(files))
        files[bad] = spoil(files[bad], rng)
        place = folder / str(number)
        try:
            read[kind] += attempt(place, files)
        except Exception as error:
            raise AssertionError(f"input {number} of seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(place)
        shutil.rmtree(Path(config.HF_DATASETS_CACHE) / "parquet", ignore_errors=True)
    return read


@pytest.mark.filterwarnings("ignore")
def test_damaged_tables_are_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    read = fuzz(tmp_path, 60)
    assert 0 < read["parquet"] < 30 and 0 < read["saved"] < 30  # both ways were walked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        config.HF_DATASETS_CACHE = Path(scratch) / "cache"
        print(fuzz(Path(scratch), arguments.inputs, arguments.seed, arguments.first))
