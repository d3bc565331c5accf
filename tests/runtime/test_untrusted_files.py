"""Files that anyone may have written: what is no regular file, leads elsewhere or is too long is refused."""

import os

import pytest

from lora_recycle.runtime.untrusted_files import check_file_name, open_regular, path_inside, read_text


def test_a_text_of_bounded_size_is_read(tmp_path):
    (tmp_path / "card").write_text("é" * 10, encoding="utf-8")
    assert read_text(tmp_path / "card", most=20) == "é" * 10
    with pytest.raises(ValueError, match="20 bytes, more than 19"):
        read_text(tmp_path / "card", most=19)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_fifo_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="not a regular file"):
        open_regular(tmp_path / "fifo")
    with pytest.raises(ValueError, match="not a regular file"):
        path_inside(tmp_path, "fifo")


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_followed(tmp_path):
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "own").write_text("o")
    (folder / "inside").symlink_to(folder / "own")
    (folder / "outside").symlink_to(tmp_path / "secret")
    assert path_inside(folder, "missing") is None
    assert read_text(path_inside(folder, "inside")) == "o"
    with pytest.raises(ValueError, match="outside is a link that leaves the folder"):
        path_inside(folder, "outside")


def test_a_snapshot_may_link_to_the_blobs_of_its_own_cache_alone(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--org--name" / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    (blobs / "b").write_text("blob")
    (snapshot / "file").symlink_to(blobs / "b")
    assert read_text(path_inside(snapshot, "file")) == "blob"
    (snapshot.parent / "main").mkdir()  # no commit: its links may not leave it
    (snapshot.parent / "main" / "file").symlink_to(blobs / "b")
    with pytest.raises(ValueError, match="leaves the folder"):
        path_inside(snapshot.parent / "main", "file")


@pytest.mark.parametrize("name", ["a" * 256, "a/" * 1001, "a\0b"])
def test_names_that_no_folder_can_have(name):
    with pytest.raises(ValueError, match="base is no name of a folder or a repo"):
        check_file_name(name, "base")
    check_file_name("org/name", "base")
