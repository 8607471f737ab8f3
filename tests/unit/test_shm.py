"""Shared memory files: private, of the right size, unmapped and removed, also where somebody still looks."""

import errno
import mmap
import os
import stat

import numpy as np
import pytest

from ckpt_core import shm
from ckpt_core.errors import CapacityError, TransportError
from ckpt_core.shm import SharedFile, private_directory, remove_directory


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def mapped(path):
    with open("/proc/self/maps") as maps:
        return sum(str(path) in line for line in maps)


def test_a_new_file_is_private_zero_and_of_that_size(tmp_path):
    previous = os.umask(0)
    try:
        file = SharedFile.create(tmp_path / "ring", 10_000)
    finally:
        os.umask(previous)
    assert mode(file.path) == 0o600
    assert file.path.stat().st_size == file.size_bytes == 10_000
    assert file.array.shape == (10_000,)
    assert file.array.dtype == np.uint8
    assert not file.array.any()
    assert file.close()


def test_both_sides_see_the_same_bytes(tmp_path):
    mine = SharedFile.create(tmp_path / "ring", 4096)
    other = SharedFile.open(tmp_path / "ring", 4096)
    mine.array[17] = 42
    other.array[18] = 43
    assert (other.array[17], mine.array[18]) == (42, 43)
    assert other.close()
    assert mine.path.exists()  # who opened it does not remove it
    assert mine.close()
    assert not mine.path.exists()


def test_a_file_that_exists_is_not_taken_over(tmp_path):
    (tmp_path / "ring").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        SharedFile.create(tmp_path / "ring", 4096)
    assert (tmp_path / "ring").read_bytes() == b"mine"


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "real").write_bytes(bytes(4096))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(TransportError, match="cannot open shared memory"):
        SharedFile.open(tmp_path / "link", 4096)
    with pytest.raises(FileExistsError):
        SharedFile.create(tmp_path / "link", 4096)


def test_a_missing_file_is_told_with_the_mend(tmp_path):
    with pytest.raises(TransportError, match=r"No such file.*--ipc"):
        SharedFile.open(tmp_path / "none", 1)


def test_a_shorter_file_is_refused(tmp_path):
    (tmp_path / "short").write_bytes(bytes(100))
    with pytest.raises(TransportError, match="at least 101 bytes"):
        SharedFile.open(tmp_path / "short", 101)


def test_a_file_of_somebody_else_is_refused(tmp_path, monkeypatch):
    (tmp_path / "ring").write_bytes(bytes(100))
    owner = os.getuid()
    monkeypatch.setattr(shm.os, "getuid", lambda: owner + 1)
    with pytest.raises(TransportError, match=f"not a file of uid {owner + 1}"):
        SharedFile.open(tmp_path / "ring", 100)


def test_a_directory_is_no_shared_memory(tmp_path):
    with pytest.raises(TransportError):
        SharedFile.open(tmp_path, 1)


def test_a_full_file_system_is_an_error_now_and_leaves_no_file(tmp_path, monkeypatch):
    def full(_fd, _offset, _size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shm.os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match=r"no room for 4096 bytes .*--shm-size"):
        SharedFile.create(tmp_path / "ring", 4096)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_mapped_is_not_left_behind(tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        SharedFile.create(tmp_path / "ring", 4096)
    assert list(tmp_path.iterdir()) == []


def test_close_is_idempotent_and_unmaps(tmp_path):
    file = SharedFile.create(tmp_path / "ring", 4096)
    assert mapped(file.path) == 1
    assert file.close()
    assert file.close()
    assert mapped(tmp_path / "ring") == 0
    assert file.array.size == 0


def test_a_view_that_lives_on_keeps_the_mapping_until_it_goes(tmp_path):
    file = SharedFile.create(tmp_path / "ring", 4096)
    view = file.array[10:20]
    view[0] = 7
    assert not file.close()
    assert not file.path.exists()
    assert view[0] == 7
    del view
    assert file.close()
    assert mapped(tmp_path / "ring") == 0


def test_a_thousand_files_leave_no_descriptor_and_no_mapping(tmp_path):
    def counts():
        return len(os.listdir("/proc/self/fd")), mapped(tmp_path)

    before = counts()
    for number in range(1000):
        file = SharedFile.create(tmp_path / str(number % 3), 64)
        other = SharedFile.open(file.path, 64)
        other.close()
        file.close()
    assert counts() == before
    assert list(tmp_path.iterdir()) == []


def test_a_refused_file_leaves_no_descriptor(tmp_path):
    (tmp_path / "short").write_bytes(b"1")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with pytest.raises(TransportError):
            SharedFile.open(tmp_path / "short", 100)
    assert len(os.listdir("/proc/self/fd")) == before


def test_directories_are_private_and_removed_with_all_they_hold(tmp_path):
    made = private_directory(tmp_path, "ckpt-")
    assert made.parent == tmp_path
    assert mode(made) == 0o700
    (made / "inner").mkdir()
    (made / "inner" / "file").write_bytes(b"x")
    remove_directory(made)
    remove_directory(made)
    assert list(tmp_path.iterdir()) == []
