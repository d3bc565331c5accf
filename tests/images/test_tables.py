"""CSV files and DataFrames of images: which column is which, and what is refused."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lora_recycle.errors import DataError
from lora_recycle.images import table_checks, tables
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.images.tables import Columns, csv_source, frame_source


def png(value):
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def source(columns, **named):
    return frame_source(pd.DataFrame(columns), True, Columns(**named))


@pytest.mark.parametrize(
    "cell", [png(9), {"bytes": png(9), "path": None}, Image.new("L", (4, 4), 9), np.full((4, 4), 9, np.uint8)]
)
def test_cells_of_images_are_found_by_what_they_hold(cell):
    found = source({"a": [1, 2], "b": [cell, cell], "label": ["x", "y"]})
    assert found.label_names == ["x", "y"] and found.labels.tolist() == [0, 1]
    (where, image), _ = found.fetch([0, 1])
    assert where == "the DataFrame, row 0" and (image is cell or image == png(9))


def test_the_only_column_beside_the_images_is_the_label():
    found = source({"photo": ["a.jpg", "b.jpg"], "species": pd.Categorical(["owl", "ant"])})
    assert found.label_names == ["ant", "owl"] and found.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match="expected a label column .*found columns species, place"):
        source({"photo": ["a.jpg"], "species": ["owl"], "place": ["zoo"]})
    with pytest.raises(DataError, match="expected an image column .*found columns species, place"):
        source({"species": ["owl"], "place": ["zoo"]})


def test_labels_are_integers_or_names_and_none_is_missing():
    assert source({"path": ["a.jpg", "b.jpg"], "label": [7, 3]}).label_names == [3, 7]
    for values, message in (
        (["x", None], "1 of 2 images have no label in column 'label'"),
        (["x", float("nan")], "1 of 2 images have no label"),
        ([0.5, 1.5], "must hold one integer or string a row, got float"),
        (["x", 1], "got int and str"),
    ):
        with pytest.raises(DataError, match=message):
            source({"path": ["a.jpg", "b.jpg"], "label": values})


def test_csv_and_tsv_of_spreadsheets(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "1.png").write_bytes(png(255))
    (tmp_path / "a.tsv").write_bytes('\ufefffile_name\tlabel\r\n0.png\t"a, ""b"""\r\n\r\n1.png\tc\r\n'.encode())
    data = load_labelled_images(tmp_path / "a.tsv", 4)
    assert data.label_names == ['a, "b"', "c"] and data.pixels.float().mean((1, 2, 3)).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b"image,label\n", "no rows"),
        (b"image,label\na.png\n", "line 2 has 1 cells, the header 2 columns"),
        (b"image,label\na.png,\n", "1 of 1 images have no label"),
        (b"image,label\n\xff.png,x\n", "not a readable CSV file in UTF-8"),
        (b'image,label\n"a.png,x\n', "not a readable CSV file in UTF-8"),
        (b"image,image\na.png,x\n", "two columns are called image"),
    ],
)
def test_csv_files_that_are_no_tables(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        csv_source(tmp_path / "a.csv", "a", True)


def test_csv_files_have_bounds(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("image,label\na.png,x\nb.png,y\n")
    monkeypatch.setattr(tables, "MAX_ROWS", 1)
    with pytest.raises(DataError, match="2 rows, more than 1"):
        csv_source(tmp_path / "a.csv", "a", True)
    assert table_checks.MAX_CSV_BYTES == tables.MAX_CSV_BYTES
    monkeypatch.setattr(tables, "MAX_CSV_BYTES", 20)
    with pytest.raises(DataError, match="a.csv: it has more than 20 bytes"):
        csv_source(tmp_path / "a.csv", "a", True)
