"""Output folders: new, empty, or ours and of the same kind; nothing of anyone else is replaced or deleted."""

import json
import os

import pytest

from lora_recycle.errors import StorageError
from lora_recycle.runtime.outputs import MARKER, OutputKind, check_file, check_output, claim_output, holds_json


KIND = OutputKind("notes", lambda folder: holds_json(folder / "notes.json", "ours"))
OTHER = OutputKind("songs", lambda folder: False)


@pytest.mark.parametrize("prepare", [lambda folder: None, os.mkdir], ids=["new", "empty"])
def test_a_new_or_empty_folder_is_claimed(tmp_path, prepare):
    folder = tmp_path / "out"
    prepare(folder)
    check_output(folder, KIND)
    check_output(folder)
    claim_output(folder, KIND)
    assert json.loads((folder / MARKER).read_text()) == {"kind": "notes"} and os.listdir(folder) == [MARKER]
    (folder / "result").touch()
    claim_output(folder, KIND)  # a second run of the same kind
    with pytest.raises(
        StorageError, match=rf"out: holds notes \({MARKER}, result\), .* Name a new or an empty folder"
    ):
        check_output(folder)
    with pytest.raises(
        StorageError, match=r"out: holds notes \(result\), which is not replaced. Name a new folder, or"
    ):
        claim_output(folder, OTHER)


def test_a_folder_without_a_marker_is_known_by_a_file_of_ours(tmp_path):
    (tmp_path / "notes.json").write_text('{"ours": 1}')
    claim_output(tmp_path, KIND)
    assert json.loads((tmp_path / MARKER).read_text()) == {"kind": "notes"}


@pytest.mark.parametrize("content", ["{}", "[1]", "{", "\xff"])
def test_a_file_of_the_same_name_is_not_ours(tmp_path, content):
    (tmp_path / "notes.json").write_text(content, encoding="latin-1")
    with pytest.raises(
        StorageError, match=r"holds other files \(notes.json\), which is not replaced. Name a new fold"
    ):
        claim_output(tmp_path, KIND)
    assert os.listdir(tmp_path) == ["notes.json"]


def test_what_is_there_is_named_and_counted(tmp_path):
    for name in "abcde":
        (tmp_path / name).touch()
    with pytest.raises(StorageError, match=r"holds other files \(a, b, c and 2 more\)"):
        check_output(tmp_path, KIND)
    with pytest.raises(StorageError, match="a cannot be written: Not a directory"):
        check_output(tmp_path / "a", KIND)


def test_a_dangling_link_is_no_new_folder(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(OSError, match="nowhere|out"):
        check_output(tmp_path / "out", KIND)


def test_partial_folders_of_others_are_theirs(tmp_path):
    (tmp_path / ".theirs.1234.partial").mkdir()
    with pytest.raises(StorageError, match=r"holds other files \(.theirs.1234.partial\)"):
        claim_output(tmp_path, KIND)


def test_files_are_replaced_only_where_they_are_ours(tmp_path):
    def ours(path):
        return path.read_bytes() == b"ours"

    check_file(tmp_path / "deep" / "new", ours, "a note")
    assert os.listdir(tmp_path / "deep") == []
    (tmp_path / "old").write_bytes(b"ours")
    check_file(tmp_path / "old", ours, "a note")
    (tmp_path / "old").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path / "old", tmp_path / "deep", tmp_path / "link"):
        with pytest.raises(StorageError, match=f"{path}: is there already, and is not a note, so it is not replaced"):
            check_file(path, ours, "a note")
    with pytest.raises(StorageError, match="cannot be written: (Not a directory|File exists)"):
        check_file(tmp_path / "old" / "below", ours, "a note")
