"""Options of an update, and the only place that reads the environment."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from ckpt_core.contract import DeviceKind, PauseMode
from ckpt_core.errors import ConfigError
from ckpt_core.files import check_root

MIB = 1 << 20
_RING_BYTES = {DeviceKind.CPU: 16 * MIB, DeviceKind.CUDA: 128 * MIB}
_SOCKET_PATH_LIMIT = 90  # sockaddr_un takes 107 bytes; the names of the sockets are added to the directory


class VerifyLevel(Enum):
    """How an update proves itself, before any rank commits it. Digests of what the agents read are compared.

    NONE: with nothing. ARRIVAL: with what arrived at each rank, on its device. LIVE: with the live weights themselves where
    they are the checkpoint's bits and it is known where these lie (replayed tensors); else with what arrived. AUTO: LIVE.
    The report says which level every byte of every rank reached.
    """

    AUTO = "auto"
    NONE = "none"
    ARRIVAL = "arrival"
    LIVE = "live"


class Undo(Enum):
    """How weights that a failed update left mixed become the old ones again.

    NONE: not at all. REPLAY: by an update to the version that the engine ran before, where that is still warm. SNAPSHOT: from a
    copy that every rank makes before it is touched, which takes as much memory as its weights; where that fails, REPLAY.
    """

    NONE = "none"
    REPLAY = "replay"
    SNAPSHOT = "snapshot"


class Reading(Enum):
    """Which hosts of a cluster read the checkpoint; what the others need comes from them, each byte once into a host.

    HERE: the host of the controller. STRIPED: every host a part: a file system that all have is read once. EVERYWHERE: every host
    what its engines need, and nothing goes between hosts.
    """

    HERE = "here"
    STRIPED = "striped"
    EVERYWHERE = "everywhere"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """Options of one update; every wait in it ends by one of these deadlines.

    Attributes:
        ring_bytes: device memory of the ring of each agent; 0 for 16 MiB on CPU (it stays in the cache) and 128 MiB on a GPU.
            Grows where one tensor is larger and may not be cut; halves where the device has no room for it.
        bucket_bytes: bytes that travel together; 0 for a quarter of the ring.
        pause_mode: what happens to requests in flight.
        allow_stale_cache: accept that requests in flight go on with a KV cache of the old weights (keep, in_place).
        verify: see VerifyLevel.
        digest_content: digest the checkpoint before the pause: its version is then bound to its content. Without it there is
            nothing to verify, and the version's digest is that of names, dtypes and shapes.
        fingerprint: digest the live weights of every rank after the load, and report them.
        replay: once it is proved to be the same, copy recorded slices into parameters instead of calling the engine's loader.
        undo: see Undo.
        keep_versions: so many versions stay warm to go back to, those that engines run among them. Files are used where they
            lie; of named tensors as many copies stay in the host pool.
        copy_to_pool: copy the checkpoint's files into the host pool after the update, so that they may go. Tensors that an
            older version there has are not copied again.
        pool_bytes: what versions in the host pool may take together; 0 for no limit.
        trace: record when each bucket was copied, waited for and loaded, on hosts and devices (`UpdateReport.tracks`).
        allow_missing, allow_unexpected: take a checkpoint that lacks tensors of the engine, or has others.
        prepare_timeout_s: reading and digesting the checkpoint.
        pause_timeout_s: until the engine stopped stepping (mode wait: until its requests are done).
        attach_timeout_s: until every rank dialled in.
        transfer_timeout_s: from begin to the last rank verified.
        silence_timeout_s: a rank that hears nothing for this long aborts by itself.
        commit_timeout_s: commit, flush and resume.
    """

    ring_bytes: int = 0
    bucket_bytes: int = 0
    pause_mode: PauseMode = PauseMode.WAIT
    allow_stale_cache: bool = False
    verify: VerifyLevel = VerifyLevel.AUTO
    fingerprint: bool = True
    replay: bool = True
    digest_content: bool = True
    undo: Undo = Undo.REPLAY
    keep_versions: int = 2
    copy_to_pool: bool = False
    pool_bytes: int = 0
    trace: bool = False
    allow_missing: bool = False
    allow_unexpected: bool = False
    prepare_timeout_s: float = 600.0
    pause_timeout_s: float = 120.0
    attach_timeout_s: float = 60.0
    transfer_timeout_s: float = 600.0
    silence_timeout_s: float = 20.0
    commit_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("ring_bytes", "bucket_bytes", "pool_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be positive, or 0 to choose for you, got {getattr(self, name)}")
        if self.verify in (VerifyLevel.ARRIVAL, VerifyLevel.LIVE) and not self.digest_content:
            raise ConfigError(f"verify={self.verify.name} compares digests of the content: it needs digest_content")
        if self.pause_mode in (PauseMode.KEEP, PauseMode.IN_PLACE) and not self.allow_stale_cache:
            raise ConfigError(
                f"pause mode {self.pause_mode.value} leaves requests in flight with a cache of the old weights; use abort, wait or "
                "retract, or accept it with allow_stale_cache (--allow-stale-cache)"
            )
        if self.keep_versions < 1:
            raise ConfigError(f"keep_versions must be at least 1, got {self.keep_versions}")
        if self.ring_bytes and self.bucket_bytes > self.ring_bytes:
            raise ConfigError(f"bucket_bytes {self.bucket_bytes} does not fit into ring_bytes {self.ring_bytes}")
        for name in self.__dataclass_fields__:
            if name.endswith("_timeout_s") and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")

    def ring_for(self, kind: DeviceKind) -> tuple[int, int]:
        """Bytes of ring and bucket on such a device."""
        ring_bytes = self.ring_bytes or _RING_BYTES[kind]
        return ring_bytes, min(self.bucket_bytes or ring_bytes // 4, ring_bytes)

    def for_source(self, *, remote: bool) -> UpdateConfig:
        """For bytes of other hosts: agents prove them on arrival by digests of the version, so ranks have nothing to compare with.

        Raises:
            ConfigError: ranks were to compare.
        """
        if not remote:
            return self
        if self.verify in {VerifyLevel.ARRIVAL, VerifyLevel.LIVE}:
            raise ConfigError(
                f"verify={self.verify.name}: what is read from other hosts is compared by agents only; use AUTO"
            )
        return replace(self, verify=VerifyLevel.NONE)

    @property
    def level(self) -> VerifyLevel:
        """What AUTO means."""
        if self.verify is not VerifyLevel.AUTO:
            return self.verify
        return VerifyLevel.LIVE if self.digest_content else VerifyLevel.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the process environment says.

    Attributes:
        socket_root: where the 0700 directories of sockets are made (CKPT_SOCKET_DIR, else XDG_RUNTIME_DIR where that is this
            user's, else tmp).
        memory_root: where shared memory files are made (CKPT_SHM_DIR, else /dev/shm).
        log_level: level of the processes that the project starts (CKPT_LOG_LEVEL).
        cache_root: where measured limits are kept (CKPT_CACHE_DIR, else the user's cache directory); None where there is none.
        state_root: where versions, engines and updates are remembered (CKPT_STATE_DIR, else the user's state directory); None
            where there is none.
        bearer_token: for HTTP calls to engines (CKPT_BEARER_TOKEN).
        directory_token: for HTTP calls to the directory, and of it (CKPT_DIRECTORY_TOKEN).
        ca_file: PEM bundle of those who may sign certificates of engines (CKPT_CA_FILE); "" for the usual ones.
        client_cert, client_key: PEM files by which this side proves itself to engines (CKPT_CLIENT_CERT, CKPT_CLIENT_KEY).
        nics: which NICs to read weights through (CKPT_NICS), in the syntax of NCCL_IB_HCA; "" where that, or none, decides.
        nccl_ib_hca: which RDMA devices collectives use (NCCL_IB_HCA): these are read through too, unless `nics` says otherwise.
    """

    socket_root: Path
    memory_root: Path
    log_level: str = "WARNING"
    cache_root: Path | None = None
    state_root: Path | None = None
    bearer_token: str = field(default="", repr=False)
    directory_token: str = field(default="", repr=False)
    ca_file: str = ""
    client_cert: str = ""
    client_key: str = ""
    nics: str = ""
    nccl_ib_hca: str = ""

    @classmethod
    def read(cls) -> Environment:
        """Read it now.

        Raises:
            ConfigError: a directory does not exist, others could tamper with it, or its path is too long for a socket.
        """
        return cls(
            socket_root=_socket_root(),
            memory_root=_directory("CKPT_SHM_DIR", os.environ.get("CKPT_SHM_DIR", "/dev/shm")),  # noqa: S108
            log_level=_log_level(os.environ.get("CKPT_LOG_LEVEL", "WARNING").upper()),
            cache_root=_cache_root(),
            state_root=_state_root(),
            bearer_token=os.environ.get("CKPT_BEARER_TOKEN", ""),
            directory_token=os.environ.get("CKPT_DIRECTORY_TOKEN", ""),
            ca_file=os.environ.get("CKPT_CA_FILE", ""),
            client_cert=os.environ.get("CKPT_CLIENT_CERT", ""),
            client_key=os.environ.get("CKPT_CLIENT_KEY", ""),
            nics=os.environ.get("CKPT_NICS", ""),
            nccl_ib_hca=os.environ.get("NCCL_IB_HCA", ""),
        )


def child_environment(*, visible_gpu: str | None = None) -> dict[str, str]:
    """Environment for processes that the project starts: as it is here, unbuffered, and with one GPU (by UUID) if named."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if visible_gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible_gpu
    return environment


def _socket_root() -> Path:
    if chosen := os.environ.get("CKPT_SOCKET_DIR"):
        root = _directory("CKPT_SOCKET_DIR", chosen)
        if len(os.fsencode(root)) > _SOCKET_PATH_LIMIT:
            raise ConfigError(f"CKPT_SOCKET_DIR={root} is longer than {_SOCKET_PATH_LIMIT} bytes; choose a shorter one")
        return root
    if (runtime := _runtime_directory()) is not None:
        return runtime
    temp = Path(tempfile.gettempdir())
    if len(os.fsencode(temp)) > _SOCKET_PATH_LIMIT:
        temp = Path("/tmp")  # noqa: S108
    return _checked("the temporary directory", temp)


def _runtime_directory() -> Path | None:
    """XDG_RUNTIME_DIR, where it can be used: sudo and su often leave that of another user."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if not runtime or len(os.fsencode(runtime)) > _SOCKET_PATH_LIMIT or not os.access(runtime, os.W_OK):
        return None
    try:
        return _checked("XDG_RUNTIME_DIR", Path(runtime))
    except ConfigError:
        return None


def _state_root() -> Path | None:
    if chosen := os.environ.get("CKPT_STATE_DIR"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_STATE_HOME"):
        return Path(chosen) / "ckpt"
    home = os.environ.get("HOME", "")
    return Path(home) / ".local" / "state" / "ckpt" if home and os.access(home, os.W_OK) else None


def _cache_root() -> Path | None:
    if chosen := os.environ.get("CKPT_CACHE_DIR"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "ckpt"
    home = os.environ.get("HOME", "")
    return Path(home) / ".cache" / "ckpt" if home and os.access(home, os.W_OK) else None


def _log_level(name: str) -> str:
    if not isinstance(logging.getLevelName(name), int):
        raise ConfigError(f"CKPT_LOG_LEVEL={name} is no level; use DEBUG, INFO, WARNING or ERROR")
    return name


def _directory(variable: str, value: str) -> Path:
    path = Path(value)
    if not path.is_dir():
        raise ConfigError(f"{variable}={value} is not a directory; create it or choose another")
    return _checked(variable, path)


def _checked(variable: str, path: Path) -> Path:
    return check_root(path, f"{variable}={path}")
