"""What makes hosts one cluster: an address that agents dial, the controller's key, and a secret of its agents.

Two files: `controller.json` for who updates, `agent.json` for who runs agents; only the first has the secret half of the key.
Between hosts all control traffic is encrypted and the controller proves itself (CURVE); peers prove themselves by a token.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

import msgspec
import zmq

from ckpt_core.errors import ConfigError
from ckpt_core.files import check_root, open_regular

CONTROLLER_FILE = "controller.json"
AGENT_FILE = "agent.json"
_MAX_FILE_BYTES = 65536


class ClusterKey(msgspec.Struct, frozen=True, kw_only=True):
    """What one of the files says.

    Attributes:
        address: where the controller listens, tcp://host:port.
        server_key: public half of its key, Z85.
        token: of the cluster's agents.
        secret_key: the other half; "" for agents.
    """

    address: str
    server_key: str
    token: str
    secret_key: str = ""

    def __repr__(self) -> str:
        return f"ClusterKey(address={self.address!r})"


def create(directory: Path, address: str) -> tuple[Path, Path]:
    """Make keys for a new cluster; the controller's file and the agents'.

    Raises:
        ConfigError: no such address, the files exist, or others could tamper with the directory.
    """
    if not address.startswith("tcp://") or not address.rpartition(":")[2].isdigit():
        raise ConfigError(f"expected the controller's address as tcp://host:port, got {address!r}")
    public, secret = (key.decode() for key in zmq.curve_keypair())
    agents = ClusterKey(address=address, server_key=public, token=secrets.token_hex(16))
    controller = msgspec.structs.replace(agents, secret_key=secret)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_root(directory, f"keys of a cluster in {directory}")
    paths = directory / CONTROLLER_FILE, directory / AGENT_FILE
    for path, key in zip(paths, (controller, agents), strict=True):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; choose another directory") from error
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(key), indent=2) + b"\n")
    return paths


def load(path: Path, *, controller: bool) -> ClusterKey:
    """Read a file that `create` made.

    Raises:
        ConfigError: it is not there, others may read or replace it, or it is not one for that use.
    """
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            data = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; `ckpt cluster DIR --address ...` makes such files"
        ) from error
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} holds a secret and others may read it; chmod 600 {path}")
    if status.st_uid not in (0, os.getuid()):
        raise ConfigError(
            f"{path} is of uid {status.st_uid}, expected {os.getuid()} or root: another user chose the keys in it; make a copy of "
            "your own, or new keys with `ckpt cluster`"
        )
    for directory in {path.parent, Path(os.path.realpath(path)).parent}:
        check_root(directory, f"{path} in {directory}")
    try:
        key = msgspec.json.decode(data, type=ClusterKey)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"{path} is not a cluster's file ({error}); give {CONTROLLER_FILE} or {AGENT_FILE}"
        ) from error
    if controller and not key.secret_key:
        raise ConfigError(f"{path} is for agents; whoever updates needs {CONTROLLER_FILE}")
    return key
