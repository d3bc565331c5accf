"""Files that are whole or absent, seals that notice a changed bit, and refusals that say what to do."""

import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch

from lora_recycle.errors import StorageError
from lora_recycle.runtime.array_files import write_rows
from lora_recycle.runtime.files import (
    atomic_save_tensors,
    atomic_write,
    creating_folder,
    load_sealed,
    remove_abandoned,
    replacing,
    replacing_files,
    save_sealed,
    tensors_sha256,
)
from lora_recycle.runtime.run_lock import OWNER_FILE, only_run_in


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1, dtype=torch.int16)}


def save_folder(folder):
    with replacing_files(folder) as partial:
        (partial / "one").write_bytes(b"new")
        (partial / "two").write_bytes(b"new" * 100_000)


WRITERS = {
    "bytes": lambda path: atomic_write(path, b"x" * 100_000),
    "tensors": lambda path: atomic_save_tensors(path, {"a": torch.zeros(30_000)}, "{}"),
    "sealed": lambda path: save_sealed(path, {"a": torch.zeros(30_000)}, {}),
    "rows": lambda path: write_rows(path, np.float32, (30_000,), [torch.zeros(30_000)]),
}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB, where this system lets us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_told_and_leaves_what_was_there(small_disk, writer):
    path = small_disk / "file"
    path.write_bytes(b"old")
    with pytest.raises(StorageError, match=f"{path} cannot be written: No space left on device. .* run the same com"):
        WRITERS[writer](path)
    assert path.read_bytes() == b"old" and os.listdir(small_disk) == ["file"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_quota_is_told_and_leaves_what_was_there(tmp_path, file_size_limit, writer):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with file_size_limit(50_000), pytest.raises(StorageError, match=f"{path} cannot be written: File too large"):
        WRITERS[writer](path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_of_files_takes_its_place_only_whole(tmp_path, file_size_limit):
    (tmp_path / "one").write_bytes(b"old")
    with file_size_limit(100_000), pytest.raises(StorageError, match="cannot be written: File too large"):
        save_folder(tmp_path)
    assert os.listdir(tmp_path) == ["one"] and (tmp_path / "one").read_bytes() == b"old"
    save_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"] and (tmp_path / "one").read_bytes() == b"new"


def test_errors_that_are_not_the_disks_stay_what_they_are(tmp_path):
    def blocks():
        yield torch.zeros(3)
        raise FileNotFoundError("another file")

    with pytest.raises(FileNotFoundError, match="another file"):
        write_rows(tmp_path / "rows.npy", np.float32, (6,), blocks())
    assert not os.listdir(tmp_path)


def test_a_seal_notices_every_changed_byte(tmp_path):
    path, header = tmp_path / "sealed", {"step": 3, "name": "é", "losses": [0.1, float("nan")]}
    save_sealed(path, TENSORS, header)
    tensors, found = load_sealed(path)
    assert str(found) == str(dict(sorted(header.items())))  # NaN is not equal to itself
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    whole = path.read_bytes()
    for i in range(len(whole)):
        changed = bytes([whole[i] ^ 1])
        path.write_bytes(whole[:i] + changed + whole[i + 1 :])
        if whole[i : i + 1] not in b" " and changed not in b" ":  # white space of the outer JSON says nothing
            with pytest.raises(ValueError):
                load_sealed(path)
    for length in (0, 5, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            load_sealed(path)


def test_a_checksum_is_of_names_types_shapes_and_numbers():
    one = tensors_sha256(TENSORS)
    assert one == tensors_sha256(dict(reversed(TENSORS.items())))
    others = [{"a": TENSORS["a"]}, {**TENSORS, "a": TENSORS["a"].view(3, 2)}, {**TENSORS, "a": TENSORS["a"].double()}]
    others += [{**TENSORS, "a": TENSORS["a"] + 1}, {"c": TENSORS["a"], "b": TENSORS["b"]}]
    assert one not in map(tensors_sha256, others) and len(set(map(tensors_sha256, others))) == 5


def in_child(work):
    """Fork, `work(ready)` in the child; its number, once it is ready."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            work(lambda: os.write(writing, b"x"))
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    return child


def test_a_folder_is_for_one_run_until_that_is_killed(tmp_path, caplog):
    def hold(ready):
        with only_run_in(tmp_path):
            with replacing(tmp_path / "shards" / "a.safetensors") as partial:
                partial.write_bytes(b"half")
                ready()
                time.sleep(60)

    child = in_child(hold)
    try:
        with pytest.raises(StorageError, match=rf"another run \(process {child} on .*\) is at work here"):
            with only_run_in(tmp_path):
                pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / OWNER_FILE).is_file() and os.listdir(tmp_path / "shards")
    with only_run_in(tmp_path):  # its lock died with it, and what it had begun is cleared away
        assert f"process {child}" in caplog.text and not os.listdir(tmp_path / "shards")
        with pytest.raises(StorageError, match=f"process {os.getpid()}"):
            with only_run_in(tmp_path):
                pass
    assert not (tmp_path / OWNER_FILE).exists()
    caplog.clear()
    with only_run_in(tmp_path):
        assert not caplog.text


def test_no_folder_and_other_processes_of_the_same_run_need_no_lock(tmp_path):
    with only_run_in(None), only_run_in(tmp_path / "a", needed=False):
        assert not (tmp_path / "a").exists()


def abandoned(path: Path, lock: bool = True) -> Path:
    """What a writer that was killed leaves."""
    partial = path.with_name(f".{path.name}.0123456789abcdef.partial")
    partial.mkdir(parents=True)
    if lock:
        (partial / ".lora-recycle.lock").touch()
        (partial / "half").touch()
    return partial


def test_only_what_is_abandoned_and_ours_is_cleared_away(tmp_path):
    kept = [tmp_path / ".hidden.partial", tmp_path / ".a.12.partial", tmp_path / ".a.0123456789abcdef"]
    kept += [tmp_path / ".user.fedcba9876543210.partial"]
    for path in kept:
        path.mkdir()
        (path / "theirs").touch()
    abandoned(tmp_path / "shards" / "a"), abandoned(tmp_path / "b"), abandoned(tmp_path / "c", lock=False)
    with replacing(tmp_path / "d") as partial:  # of a writer that lives
        partial.write_bytes(b"d")
        remove_abandoned(tmp_path)
        assert partial.exists()
        assert sorted(tmp_path.glob("*")) == sorted([*kept, tmp_path / "shards", partial.parent])
    assert not list((tmp_path / "shards").iterdir()) and all((path / "theirs").exists() for path in kept)


def test_what_another_name_left_stays(tmp_path):
    other = abandoned(tmp_path / "other")
    abandoned(tmp_path / "one")
    remove_abandoned(tmp_path, "one")
    assert list(tmp_path.iterdir()) == [other]


def save_new_folder(folder):
    with creating_folder(folder) as new:
        (new / "one").write_bytes(b"new")
        (new / "sub").mkdir()
        (new / "sub" / "two").write_bytes(b"new" * 100_000)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path, file_size_limit):
    folder = tmp_path / "new"
    with file_size_limit(100_000), pytest.raises(StorageError, match=f"{folder} cannot be written: File too large"):
        save_new_folder(folder)
    assert not os.listdir(tmp_path)
    save_new_folder(folder)
    assert sorted(os.listdir(folder)) == ["one", "sub"] and os.listdir(tmp_path) == ["new"]
    with pytest.raises(StorageError, match="cannot be written: Directory not empty"):
        save_new_folder(folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    save_new_folder(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "empty") == os.listdir(folder)


def test_a_new_folder_of_a_run_that_was_killed_is_made_again(tmp_path):
    def hold(ready):
        with creating_folder(tmp_path / "new") as new:
            (new / "half").touch()
            ready()
            time.sleep(60)

    child = in_child(hold)
    save_new_folder(tmp_path / "other")
    assert len(os.listdir(tmp_path)) == 2  # it lives
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 2
    save_new_folder(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["new", "other"] and sorted(os.listdir(tmp_path / "new")) == ["one", "sub"]


@pytest.mark.parametrize("error", [NotImplementedError("no flock here"), filelock.Timeout("held")])
def test_a_file_system_without_locks_is_written_to_as_well(tmp_path, monkeypatch, error):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    left = abandoned(tmp_path / "left")
    save_folder(tmp_path)
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([left.name, "one", "two"])


def unwritable(tmp_path) -> Path:
    """A folder that the system lets nobody write to; root may write to all but what the kernel itself shows."""
    if os.geteuid() == 0:
        return Path("/sys/kernel")
    tmp_path.chmod(0o500)
    return tmp_path


def test_a_read_only_folder_is_told_at_once(tmp_path):
    folder = unwritable(tmp_path) / "out"
    with pytest.raises(StorageError, match=f"{folder} cannot be written: .* choose another folder"):
        with only_run_in(folder):
            pass
    with pytest.raises(StorageError, match="cannot be written"):
        atomic_write(folder / "file", b"x")
    with pytest.raises(StorageError, match=f"{folder.parent}.* cannot be written: "):  # one that is there
        with only_run_in(folder.parent):
            pass


def test_files_may_be_read_by_who_may_read_their_folder(tmp_path):
    before = os.umask(0o022)
    try:
        atomic_save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, "{}")
        atomic_write(tmp_path / "b", b"b")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.safetensors", "b")] == [0o644, 0o644]


def test_threads_that_write_one_file_leave_one_whole(tmp_path):
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: atomic_write(path, bytes([i]) * 100_000), range(64)))
    assert len(set(path.read_bytes())) == 1 and len(path.read_bytes()) == 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
