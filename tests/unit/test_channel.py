"""Hub and lines: frames in order, strangers unheard, silence and aborts noticed."""
# ruff: noqa: S106 (tokens of these tests are no secrets)

import contextlib
import logging
import time

import pytest
import zmq

from ckpt_core import wire
from ckpt_core.channel import AbortRequested, Hub, Line
from ckpt_core.errors import RendezvousTimeout, TransportError, WireError

WAIT_S = 10.0  # for what must come
SOON_S = 0.05  # for what must not


@pytest.fixture
def hub(tmp_path):
    with contextlib.closing(Hub(tmp_path)) as made:
        yield made


@pytest.fixture
def dial(hub):
    with contextlib.ExitStack() as stack:
        yield lambda token="t", silence_timeout_s=WAIT_S: stack.enter_context(
            Line(hub.address, token, silence_timeout_s)
        )


def take(hub, count=1):
    """That many messages; a frame that was dropped ends a call of receive too."""
    came, deadline = [], time.monotonic() + WAIT_S
    while len(came) < count:
        came += hub.receive(WAIT_S)
        assert time.monotonic() < deadline, f"{count} messages expected, got {came}"
    return came


def check_for_ever(line):
    """As a transfer does; ends by the line's own silence at the latest."""
    while True:
        line.check_abort()


def meet(hub, line):
    line.send(wire.Progress(done_bytes=0))
    ((peer, _),) = take(hub)
    return peer


def test_frames_of_one_line_come_in_order(hub, dial):
    hub.allow("t")
    line = dial()
    for count in range(300):
        line.send(wire.Progress(done_bytes=count))
    came = take(hub, 300)
    assert [message.done_bytes for _, message in came] == list(range(300))
    assert len({peer for peer, _ in came}) == 1


def test_answers_come_in_order_and_to_the_right_line(hub, dial):
    hub.allow("t")
    lines = [dial(), dial()]
    peers = [meet(hub, line) for line in lines]
    assert peers[0] != peers[1]
    for count in range(50):
        for peer in peers:
            hub.send(peer, wire.Commit(version=str(count), digest=str(peers.index(peer))))
    for number, line in enumerate(lines):
        got = [line.expect(wire.Commit) for _ in range(50)]
        assert [(ask.version, ask.digest) for ask in got] == [(str(count), str(number)) for count in range(50)]


def test_two_tokens_are_heard_beside_each_other(hub, dial):
    hub.allow("agents")
    hub.allow("ranks")
    peers = {token: meet(hub, dial(token)) for token in ("agents", "ranks")}
    hub.revoke("ranks")
    hub.send(peers["agents"], wire.Ping())
    assert peers["agents"] != peers["ranks"]


def test_a_stranger_is_dropped_and_logged(hub, dial, caplog):
    hub.allow("t")
    with caplog.at_level(logging.WARNING):
        dial("guessed").send(wire.Ping())
        dial().send(wire.Progress(done_bytes=1))
        ((_, message),) = take(hub)
        assert list(hub.receive(SOON_S)) == []
    assert message == wire.Progress(done_bytes=1)
    assert "wrong token" in caplog.text


def test_nobody_is_heard_before_a_token_is_allowed(hub, dial):
    line = dial()
    line.send(wire.Ping())
    assert list(hub.receive(SOON_S)) == []


def test_a_revoked_token_is_heard_no_more(hub, dial, caplog):
    hub.allow("t")
    line = dial()
    meet(hub, line)
    hub.revoke("t")
    with caplog.at_level(logging.WARNING):
        line.send(wire.Progress(done_bytes=1))
        assert list(hub.receive(1.0)) == []
    assert "wrong token" in caplog.text


def test_a_peer_cannot_change_its_token(hub):
    hub.allow("one")
    hub.allow("two")
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.connect(hub.address)
    try:
        raw.send(wire.encode(wire.Progress(done_bytes=1), token="one", seq=1))
        raw.send(wire.encode(wire.Progress(done_bytes=2), token="two", seq=2))
        raw.send(wire.encode(wire.Progress(done_bytes=3), token="one", seq=2))
        assert [message.done_bytes for _, message in take(hub, 2)] == [1, 3]
    finally:
        raw.close(0)
        context.term()


def test_frames_of_many_parts_garbage_and_repetitions_are_dropped(hub):
    hub.allow("t")
    good = wire.encode(wire.Progress(done_bytes=1), token="t", seq=1)
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.connect(hub.address)
    try:
        raw.send_multipart([good, good])
        raw.send(b"\x00garbage")
        raw.send(good)
        raw.send(good)
        raw.send(wire.encode(wire.Progress(done_bytes=2), token="t", seq=2))
        assert [message.done_bytes for _, message in take(hub, 2)] == [1, 2]
    finally:
        raw.close(0)
        context.term()


def test_the_socket_is_in_the_given_directory(tmp_path):
    with contextlib.closing(Hub(tmp_path)) as hub:
        assert hub.address == f"ipc://{tmp_path}/control"
        assert (tmp_path / "control").is_socket()


# -- a line ------------------------------------------------------------------------------------------------------
def test_a_line_takes_silence_for_the_controllers_end(hub, dial):
    line = dial(silence_timeout_s=0.1)
    with pytest.raises(RendezvousTimeout, match=r"no word from the controller for 0\.1 s"):
        line.expect(wire.Begin)
    with pytest.raises(RendezvousTimeout):
        line.check_abort()


def test_pings_are_words_but_no_messages(hub, dial):
    hub.allow("t")
    line = dial(silence_timeout_s=0.5)
    peer = meet(hub, line)
    for _ in range(5):
        hub.send(peer, wire.Ping())
        assert line.poll(0.2) is None  # longer than the silence in sum: raises if pings did not count
    hub.send(peer, wire.Begin())
    assert line.expect(wire.Begin) == wire.Begin()


def test_an_abort_ends_what_a_line_expects(hub, dial):
    hub.allow("t")
    line = dial()
    hub.send(meet(hub, line), wire.Abort(cause="enough"))
    with pytest.raises(AbortRequested, match="enough"):
        line.expect(wire.Begin)


def test_an_abort_is_found_in_the_middle_of_work(hub, dial):
    hub.allow("t")
    line = dial()
    peer = meet(hub, line)
    line.check_abort()
    hub.send(peer, wire.Ping())
    hub.send(peer, wire.Abort(cause="enough"))
    with pytest.raises(AbortRequested, match="enough"):
        check_for_ever(line)


def test_another_message_than_expected_is_an_error(hub, dial):
    hub.allow("t")
    line = dial()
    peer = meet(hub, line)
    hub.send(peer, wire.Stop())
    with pytest.raises(TransportError, match="expected Begin from the controller, got Stop"):
        line.expect(wire.Begin)
    hub.send(peer, wire.Begin())
    with pytest.raises(TransportError, match="unexpected Begin"):
        check_for_ever(line)


def test_a_line_refuses_frames_out_of_order(tmp_path):
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/control")
    try:
        with Line(f"ipc://{tmp_path}/control", "t", WAIT_S) as line:
            line.send(wire.Progress(done_bytes=1))
            peer, _ = router.recv_multipart()
            router.send_multipart([peer, wire.encode(wire.Begin(), token="t", seq=2)])
            with pytest.raises(WireError, match="expected frame 1, got 2"):
                line.expect(wire.Begin)
    finally:
        router.close(0)
        context.term()


def test_what_was_sent_before_a_line_closed_arrives(hub):
    hub.allow("t")
    with Line(hub.address, "t", WAIT_S) as line:
        for count in range(20):
            line.send(wire.Progress(done_bytes=count))
    assert [message.done_bytes for _, message in take(hub, 20)] == list(range(20))
