"""Keys of a cluster and its control plane: files that only their owner reads, and who does not have the right ones gets nowhere."""
# ruff: noqa: S106 (tokens of these tests are no secrets)

import contextlib
import logging
import os
import socket
import stat
import time

import msgspec
import pytest
import zmq

from ckpt_core import channel, cluster, wire
from ckpt_core.channel import Hub, Line
from ckpt_core.cluster import AGENT_FILE, CONTROLLER_FILE, ClusterKey
from ckpt_core.errors import ConfigError, PeerLost

WAIT_S = 10.0  # for what must come
SOON_S = 0.5  # for what must not: a handshake on loopback takes milliseconds


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"tcp://127.0.0.1:{taken.getsockname()[1]}"


# -- files -------------------------------------------------------------------------------------------------------
def test_two_files_of_which_one_may_update(tmp_path):
    paths = cluster.create(tmp_path / "new" / "keys", "tcp://10.0.0.1:7000")
    assert [path.name for path in paths] == [CONTROLLER_FILE, AGENT_FILE]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in paths)
    controller, agents = cluster.load(paths[0], controller=True), cluster.load(paths[1], controller=False)
    assert controller.address == "tcp://10.0.0.1:7000"
    assert zmq.curve_public(controller.secret_key.encode()).decode() == controller.server_key
    assert agents == msgspec.structs.replace(controller, secret_key="")
    assert len(agents.token) == 32
    assert controller.secret_key not in paths[1].read_text()
    assert cluster.load(paths[0], controller=False) == controller


def test_no_two_clusters_are_alike(tmp_path):
    keys = [cluster.load(cluster.create(tmp_path / name, "tcp://h:1")[0], controller=True) for name in ("one", "other")]
    for field in ("server_key", "secret_key", "token"):
        assert getattr(keys[0], field) != getattr(keys[1], field)


def test_a_key_tells_no_secret_when_it_is_shown(tmp_path):
    key = cluster.load(cluster.create(tmp_path, "tcp://h:1")[0], controller=True)
    for shown in (repr(key), str(key), f"{[key]}"):
        assert key.address in shown
        assert key.secret_key not in shown
        assert key.token not in shown


@pytest.mark.parametrize("address", ["", "10.0.0.1:7000", "tcp://10.0.0.1", "tcp://h:", "tcp://h:x", "ipc:///tmp/1"])
def test_an_address_that_is_none(tmp_path, address):
    with pytest.raises(ConfigError, match=r"expected the controller's address as tcp://host:port, got '.*'"):
        cluster.create(tmp_path, address)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [CONTROLLER_FILE, AGENT_FILE])
def test_files_that_exist_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"cannot write .*{name}: File exists; choose another directory"):
        cluster.create(tmp_path, "tcp://h:1")
    assert (tmp_path / name).read_text() == "mine"


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / CONTROLLER_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot write"):
        cluster.create(tmp_path, "tcp://h:1")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o666])
def test_a_file_that_others_may_read_or_write_is_refused(tmp_path, mode):
    path, _ = cluster.create(tmp_path, "tcp://h:1")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"others may read it; chmod 600 {path}"):
        cluster.load(path, controller=True)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_in_which_others_could_replace_the_keys_is_refused(tmp_path, mode):
    directory = tmp_path / "keys"
    path, _ = cluster.create(directory, "tcp://h:1")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(mode)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    for given in (path, link):
        with pytest.raises(
            ConfigError, match=rf"{given} in {directory}: .*got mode {mode:04o} .*chmod go-w {directory}"
        ):
            cluster.load(given, controller=True)
    with pytest.raises(ConfigError, match=rf"keys of a cluster in {directory}: .*mode {mode:04o}"):
        cluster.create(directory, "tcp://h:1")
    directory.chmod(0o1777)
    assert cluster.load(link, controller=True).address == "tcp://h:1"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_file_of_somebody_else_is_refused(tmp_path):
    path, _ = cluster.create(tmp_path, "tcp://h:1")
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match=rf"{path} is of uid 12345, expected 0 or root: .*make a copy"):
        cluster.load(path, controller=True)


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "key", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        cluster.load(tmp_path / "key", controller=False)


def test_the_file_of_agents_may_not_update(tmp_path):
    _, path = cluster.create(tmp_path, "tcp://h:1")
    with pytest.raises(ConfigError, match=r"agent\.json is for agents; whoever updates needs controller\.json"):
        cluster.load(path, controller=True)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"address": 1}', '{"address": "tcp://h:1", "token": "t"}'])
def test_a_file_that_is_no_key_is_refused(tmp_path, text):
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"is not a cluster's file .*; give controller\.json or agent\.json"):
        cluster.load(path, controller=False)


def test_a_file_that_is_not_there_is_made_by_a_command(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*No such file.*`ckpt cluster DIR --address \.\.\.`"):
        cluster.load(tmp_path / "none", controller=False)


# -- the control plane between hosts ---------------------------------------------------------------------------------
@pytest.fixture
def key(tmp_path):
    return cluster.load(cluster.create(tmp_path / "keys", free_address())[0], controller=True)


@pytest.fixture
def hub(key):
    with contextlib.closing(Hub(cluster=key)) as made:
        made.allow(key.token)
        yield made


@pytest.fixture
def dial(key):
    with contextlib.ExitStack() as stack:

        def dial(**changes):
            given = {"token": key.token, "server_key": key.server_key, "watch": False, **changes}
            return stack.enter_context(Line(key.address, given.pop("token"), WAIT_S, **given))

        yield dial


def take_one(hub, timeout_s=WAIT_S):
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        for item in hub.receive(left):
            return item
    return None


def test_messages_go_both_ways_between_hosts(hub, key, dial):
    assert (hub.address, hub.server_key) == (key.address, key.server_key)
    lines = [dial(), dial()]
    for number, line in enumerate(lines):
        line.send(wire.Progress(done_bytes=number))
        peer, message = take_one(hub)
        assert message == wire.Progress(done_bytes=number)
        hub.send(peer, wire.Abort(cause=str(number)))
    for number, line in enumerate(lines):
        assert line.poll(WAIT_S) == wire.Abort(cause=str(number))


@pytest.mark.parametrize("watch", [False, True])
def test_who_dials_before_the_controller_listens_is_heard_once_it_does(key, dial, watch):
    """Until then its connection is refused, which is not the end of a controller that was there."""
    line = dial(watch=watch)
    assert line.poll(SOON_S) is None
    line.send(wire.Progress(done_bytes=1))
    with contextlib.closing(Hub(cluster=key)) as hub:
        hub.allow(key.token)
        peer, message = take_one(hub)
        assert message == wire.Progress(done_bytes=1)
        hub.send(peer, wire.Begin())
        assert line.poll(WAIT_S) == wire.Begin()


def test_who_expects_another_controller_tells_this_one_nothing(hub, dial):
    other, _ = zmq.curve_keypair()
    stranger = dial(server_key=other.decode())
    stranger.send(wire.Progress(done_bytes=1))
    assert take_one(hub, SOON_S) is None
    assert stranger.poll() is None
    friend = dial()  # goes through all the same
    friend.send(wire.Progress(done_bytes=2))
    assert take_one(hub)[1] == wire.Progress(done_bytes=2)


def test_who_does_not_encrypt_is_not_heard(hub, dial):
    dial(server_key="").send(wire.Progress(done_bytes=1))
    assert take_one(hub, SOON_S) is None
    dial().send(wire.Progress(done_bytes=2))
    assert take_one(hub)[1] == wire.Progress(done_bytes=2)


def test_the_public_key_without_the_token_is_not_enough(hub, dial, caplog):
    with caplog.at_level(logging.WARNING):
        dial(token="t").send(wire.Progress(done_bytes=1))
        dial().send(wire.Progress(done_bytes=2))
        assert take_one(hub)[1] == wire.Progress(done_bytes=2)
        assert take_one(hub, SOON_S) is None
    assert "wrong token" in caplog.text


def test_nothing_of_it_is_readable_on_the_way(hub, key):
    """What a line sends to a listener that only listens holds neither the token nor what it says."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        with Line(address, key.token, WAIT_S, server_key=key.server_key) as line:
            line.send(wire.Abort(cause="the cause of it all"))
            host, _, port = key.address.removeprefix("tcp://").rpartition(":")
            sent = b""
            here, _ = listening.accept()
            with here, socket.create_connection((host, int(port))) as there:
                for end in (here, there):
                    end.settimeout(0.02)
                while (item := next(iter(hub.receive(0.0)), None)) is None:
                    for source, sink in ((here, there), (there, here)):
                        with contextlib.suppress(TimeoutError):
                            data = source.recv(65536)
                            sink.sendall(data)
                            sent += data
    assert item[1] == wire.Abort(cause="the cause of it all")
    assert len(sent) > 200
    assert key.token.encode() not in sent
    assert b"the cause of it all" not in sent


def listen_for_ever(line):
    """Ends by the line's own silence at the latest."""
    while True:
        line.poll(1.0)


def test_a_watched_controller_is_missed(key, dial):
    watching, patient = dial(watch=True), dial()
    with contextlib.closing(Hub(cluster=key)) as hub:
        hub.allow(key.token)
        for line in (watching, patient):
            line.send(wire.Progress(done_bytes=1))
            hub.send(take_one(hub)[0], wire.Begin())
            assert line.poll(WAIT_S) == wire.Begin()
        assert watching.poll() is None
    with pytest.raises(PeerLost, match="the connection to the controller ended"):
        listen_for_ever(watching)
    assert patient.poll() is None


def test_what_was_said_last_is_heard_before_the_controller_is_missed(key, dial):
    line = dial(watch=True)
    with contextlib.closing(Hub(cluster=key)) as hub:
        hub.allow(key.token)
        line.send(wire.Progress(done_bytes=1))
        peer, _ = take_one(hub)
        hub.send(peer, wire.Stop())
        assert line.poll(WAIT_S) == wire.Stop()


def test_an_address_in_use_is_refused_with_the_likely_cause(hub, key):
    with pytest.raises(ConfigError, match=f"cannot listen on {key.address}: .*in use.*; is another controller"):
        Hub(cluster=key)


def test_a_hub_on_one_host_has_no_key(tmp_path):
    with contextlib.closing(Hub(tmp_path)) as hub:
        assert hub.server_key == ""


def test_a_key_is_plain_data():
    made = ClusterKey(address="tcp://h:1", server_key="k", token="t")
    assert msgspec.json.decode(msgspec.json.encode(made), type=ClusterKey) == made


# -- strangers -----------------------------------------------------------------------------------------------------------
def greeted(key):
    """A raw connection that has said that it will speak CURVE, and nothing of it yet."""
    host, _, port = key.address.removeprefix("tcp://").partition(":")
    made = socket.create_connection((host, int(port)), timeout=WAIT_S)
    made.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32))
    assert made.recv(64)
    return made


def closed(connection):
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_stranger_who_announces_too_much_is_hung_up_on(hub, key):
    with greeted(key) as stranger:
        stranger.sendall(b"\x06" + (wire.MAX_REPLY_BYTES + 1).to_bytes(8, "big"))
        began = time.monotonic()
        assert closed(stranger)
        assert time.monotonic() - began < 4.0  # before the handshake is overdue


def test_a_stranger_who_never_finishes_the_handshake_is_hung_up_on(key, monkeypatch):
    monkeypatch.setattr(channel, "_HANDSHAKE_MS", 200)
    with contextlib.closing(Hub(cluster=key)), greeted(key) as stranger:
        stranger.sendall(b"\x06" + (1 << 20).to_bytes(8, "big") + b"begun")
        assert closed(stranger)
