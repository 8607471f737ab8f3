"""Options are checked before anything starts; the environment is read in one place."""

import dataclasses
import math

import pytest

from ckpt_core.config import Environment, UpdateConfig, VerifyLevel, child_environment
from ckpt_core.contract import DeviceKind, PauseMode
from ckpt_core.errors import ConfigError

TIMEOUTS = [field.name for field in dataclasses.fields(UpdateConfig) if field.name.endswith("_timeout_s")]


def test_the_defaults_are_valid():
    config = UpdateConfig()
    assert all(getattr(config, name) > 0 for name in TIMEOUTS)
    assert len(TIMEOUTS) == 6


@pytest.mark.parametrize("name", TIMEOUTS)
@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_every_deadline_is_positive(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be positive"):
        UpdateConfig(**{name: value})


@pytest.mark.parametrize("name", ["ring_bytes", "bucket_bytes"])
def test_sizes_are_not_negative(name):
    with pytest.raises(ConfigError, match=f"{name} must be positive, or 0 to choose for you, got -4"):
        UpdateConfig(**{name: -4})


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, (16 << 20, 4 << 20)),
        ({"ring_bytes": 4096}, (4096, 1024)),
        ({"ring_bytes": 4096, "bucket_bytes": 4096}, (4096, 4096)),
        ({"bucket_bytes": 64 << 20}, (16 << 20, 16 << 20)),
    ],
)
def test_sizes_that_are_not_given_are_chosen(given, used):
    assert UpdateConfig(**given).ring_for(DeviceKind.CPU) == used


def test_the_default_proof_is_the_strongest_there_is():
    assert UpdateConfig().level is VerifyLevel.LIVE
    assert UpdateConfig(verify=VerifyLevel.NONE).level is VerifyLevel.NONE
    assert UpdateConfig(digest_content=False).level is VerifyLevel.NONE
    for level in (VerifyLevel.ARRIVAL, VerifyLevel.LIVE):
        with pytest.raises(ConfigError, match=f"verify={level.name} .* needs digest_content"):
            UpdateConfig(verify=level, digest_content=False)


def test_a_bucket_fits_into_the_ring():
    with pytest.raises(ConfigError, match="bucket_bytes 2048 does not fit into ring_bytes 1024"):
        UpdateConfig(ring_bytes=1024, bucket_bytes=2048)
    UpdateConfig(ring_bytes=1024, bucket_bytes=1024)


@pytest.mark.parametrize("mode", PauseMode)
def test_a_stale_cache_must_be_accepted(mode):
    if mode in (PauseMode.KEEP, PauseMode.IN_PLACE):
        with pytest.raises(ConfigError, match="--allow-stale-cache"):
            UpdateConfig(pause_mode=mode)
    else:
        UpdateConfig(pause_mode=mode)
    UpdateConfig(pause_mode=mode, allow_stale_cache=True)


# -- environment -------------------------------------------------------------------------------------------------
@pytest.fixture
def clean(monkeypatch):
    names = ("CKPT_SOCKET_DIR", "CKPT_SHM_DIR", "CKPT_LOG_LEVEL", "CKPT_BEARER_TOKEN", "XDG_RUNTIME_DIR")
    for name in (*names, "CKPT_NICS", "NCCL_IB_HCA"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_an_empty_environment_has_defaults(clean):
    read = Environment.read()
    assert read.socket_root.is_dir()
    assert str(read.memory_root) == "/dev/shm"
    assert (read.log_level, read.bearer_token) == ("WARNING", "")


def test_variables_are_taken(clean, tmp_path):
    (tmp_path / "s").mkdir()
    for name, value in (
        ("CKPT_SOCKET_DIR", tmp_path / "s"),
        ("CKPT_SHM_DIR", tmp_path),
        ("CKPT_LOG_LEVEL", "info"),
        ("CKPT_BEARER_TOKEN", "hush"),
    ):
        clean.setenv(name, str(value))
    read = Environment.read()
    assert (read.socket_root, read.memory_root, read.log_level, read.bearer_token) == (
        tmp_path / "s",
        tmp_path,
        "INFO",
        "hush",
    )
    assert "hush" not in repr(read)


def test_nics_are_chosen_by_two_variables(clean):
    assert (Environment.read().nics, Environment.read().nccl_ib_hca) == ("", "")
    clean.setenv("CKPT_NICS", "=mlx5_0:1")
    clean.setenv("NCCL_IB_HCA", "^mlx5_bond")
    assert (Environment.read().nics, Environment.read().nccl_ib_hca) == ("=mlx5_0:1", "^mlx5_bond")


def test_the_runtime_directory_is_used_where_it_can_be(clean, tmp_path):
    clean.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    assert Environment.read().socket_root != tmp_path / "none"
    clean.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert Environment.read().socket_root == tmp_path


@pytest.mark.parametrize("name", ["CKPT_SOCKET_DIR", "CKPT_SHM_DIR"])
def test_a_directory_that_is_none_is_refused(clean, tmp_path, name):
    clean.setenv(name, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=f"{name}=.*none is not a directory"):
        Environment.read()


def test_a_socket_path_must_be_short(clean, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    clean.setenv("CKPT_SOCKET_DIR", str(long))
    with pytest.raises(ConfigError, match="longer than 90 bytes"):
        Environment.read()
    clean.delenv("CKPT_SOCKET_DIR")
    clean.setenv("XDG_RUNTIME_DIR", str(long))
    assert Environment.read().socket_root != long


def test_a_log_level_that_is_none_is_refused(clean):
    clean.setenv("CKPT_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="CKPT_LOG_LEVEL"):
        Environment.read()


def test_children_inherit_and_do_not_buffer(clean):
    clean.setenv("SOMETHING", "else")
    child = child_environment()
    assert (child["SOMETHING"], child["PYTHONUNBUFFERED"]) == ("else", "1")
