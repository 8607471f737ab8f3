"""Places that others could tamper with are refused, with their mode, their owner and the mend."""

import os
import stat

import pytest

from ckpt_core.config import Environment
from ckpt_core.errors import ConfigError
from ckpt_core.files import check_root, open_regular, own_directory, read_regular

OTHER_UID = 12345
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


def directory(path, mode, uid=None):
    path.mkdir(parents=True)
    path.chmod(mode)
    if uid is not None:
        os.chown(path, uid, -1)
    return path


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# -- roots that the environment names --------------------------------------------------------------------------------
@pytest.mark.parametrize("allowed", [0o700, 0o755, 0o1777, 0o1770, 0o2750])
def test_a_directory_in_which_nobody_replaces_anything(tmp_path, allowed):
    path = directory(tmp_path / "d", allowed)
    assert check_root(path, "CKPT_SHM_DIR") == path


@pytest.mark.parametrize("wrong", [0o777, 0o770, 0o707, 0o2775])
def test_a_directory_that_others_write_to(tmp_path, wrong):
    path = directory(tmp_path / "d", wrong)
    with pytest.raises(ConfigError, match=f"X={path}: .*got mode {wrong:04o} of uid {os.getuid()}; chmod go-w {path}"):
        check_root(path, f"X={path}")


@as_root
@pytest.mark.parametrize("its_mode", [0o700, 0o755, 0o1777])
def test_a_directory_of_somebody_else(tmp_path, its_mode):
    path = directory(tmp_path / "d", its_mode, OTHER_UID)
    with pytest.raises(ConfigError, match=f"expected .* of uid 0 .*got one of uid {OTHER_UID} .*mkdir -m 700"):
        check_root(path, "X")


def test_a_directory_that_is_safe_in_one_that_is_not(tmp_path):
    above = directory(tmp_path / "above", 0o777)
    path = directory(above / "d", 0o700)
    with pytest.raises(ConfigError, match=rf"everybody may replace it, because {above} .* mode 0777 .*\+t {above}"):
        check_root(path, "X")
    above.chmod(0o1777)
    check_root(path, "X")
    above.chmod(0o770)  # its group is trusted
    check_root(path, "X")


def test_a_link_counts_as_what_it_leads_to(tmp_path):
    path = directory(tmp_path / "d", 0o777)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="mode 0777"):
        check_root(link, "X")


@pytest.mark.parametrize("name", ["none", "file"])
def test_what_is_no_directory(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="create it or choose another"):
        check_root(tmp_path / name, "X")


@pytest.fixture
def clean(monkeypatch):
    for name in ("CKPT_SOCKET_DIR", "CKPT_SHM_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", ["CKPT_SOCKET_DIR", "CKPT_SHM_DIR"])
def test_the_environment_cannot_choose_such_a_directory(clean, tmp_path, name):
    path = directory(tmp_path / "d", 0o770)
    clean.setenv(name, str(path))
    with pytest.raises(ConfigError, match=f"{name}={path}: .*mode 0770"):
        Environment.read()


def test_a_runtime_directory_of_that_kind_is_passed_over(clean, tmp_path):
    path = directory(tmp_path / "d", 0o777)
    clean.setenv("XDG_RUNTIME_DIR", str(path))
    assert Environment.read().socket_root != path
    path.chmod(0o700)
    assert Environment.read().socket_root == path


def test_a_temporary_directory_of_that_kind_is_refused(clean, tmp_path):
    path = directory(tmp_path / "d", 0o777)
    clean.setattr("tempfile.tempdir", str(path))
    with pytest.raises(ConfigError, match=f"the temporary directory={path}"):
        Environment.read()


# -- directories with a name that everybody knows --------------------------------------------------------------------
def test_a_directory_of_our_own_is_made_once(tmp_path):
    previous = os.umask(0)
    try:
        path = own_directory(tmp_path / "locks")
    finally:
        os.umask(previous)
    assert mode(path) == 0o700
    (path / "kept").touch()
    assert own_directory(path) == path
    assert (path / "kept").exists()


@as_root
def test_one_that_another_user_made_first_is_not_used(tmp_path):
    path = directory(tmp_path / "locks", 0o700, OTHER_UID)
    with pytest.raises(ConfigError, match=rf"got a directory of uid {OTHER_UID} .* trap: have it removed, or set CKPT"):
        own_directory(path)


@pytest.mark.parametrize("wrong", [0o777, 0o770, 0o1777, 0o750, 0o705])
def test_one_that_others_may_enter_is_not_used(tmp_path, wrong):
    path = directory(tmp_path / "locks", wrong)
    with pytest.raises(ConfigError, match=f"with mode 0700, got a directory .* with mode {wrong:04o}"):
        own_directory(path)


@pytest.mark.parametrize("target", ["real", "none"])
def test_a_link_in_its_place_is_not_used(tmp_path, target):
    directory(tmp_path / "real", 0o700)
    (tmp_path / "locks").symlink_to(tmp_path / target)
    with pytest.raises(ConfigError, match="got something else"):
        own_directory(tmp_path / "locks")
    assert not (tmp_path / "none").exists()


def test_a_place_where_it_cannot_be_made(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot make the directory .*No such file"):
        own_directory(tmp_path / "none" / "locks")


# -- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "directory", "link to a fifo", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to("fifo") if kind.startswith("link") else (tmp_path / "fifo").rename(path)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(path)


def test_no_more_is_read_than_is_wanted(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(path, 4)


def test_a_pipe_put_in_the_place_of_a_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.touch()
    real_open = os.open

    def swap_and_open(name, *arguments):
        path.unlink()
        os.mkfifo(path)
        return real_open(name, *arguments)

    monkeypatch.setattr(os, "open", swap_and_open)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(path)
