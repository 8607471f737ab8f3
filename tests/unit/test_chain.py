"""Connections between agents of different hosts: buckets as they were sent and in order, or a typed error."""

import contextlib
import logging
import socket
import struct
import threading
import time

import numpy as np
import pytest
import xxhash

from ckpt_core.errors import PeerLost, RendezvousTimeout, TransportError
from ckpt_core.relay import Relay
from ckpt_core.transport import chain
from ckpt_core.transport.chain import Inlet, Neighbours, Outlet, connect
from ckpt_core.wire import Links

WAIT_S = 10.0
SECRET = "5" * 32
SEQ = 3


def unchecked():
    """Nothing ends the wait early."""


@pytest.fixture
def ends():
    """An outlet of agent 1 and an inlet of agent 2, and the bare socket behind the outlet."""
    here, there = socket.socketpair()
    outlet, inlet = Outlet(here, 2), Inlet(there, 1)
    yield outlet, inlet, here
    outlet.close()
    inlet.close()


@pytest.fixture
def bare():
    """An inlet of agent 1 and the bare socket that it listens to."""
    here, there = socket.socketpair()
    inlet = Inlet(there, 1)
    with here:
        yield here, inlet
        inlet.close()


def digest_of(data):
    return xxhash.xxh3_64_intdigest(data)


def frame(data, *, size=None, digest=None, seq=SEQ):
    return struct.pack("<QQQ", len(data) if size is None else size, digest or digest_of(data), seq) + data


def place(size):
    return np.zeros(size, dtype=np.uint8)


def random_bytes(size):
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


def pump_until_complete(inlet, outlet=None):
    deadline = time.monotonic() + WAIT_S
    while True:
        if outlet is not None:
            outlet.pump()
        _, digest = inlet.pump()
        if digest is not None:
            return digest
        assert time.monotonic() < deadline


# -- one bucket after the other ----------------------------------------------------------------------------------
def test_buckets_arrive_in_order_whatever_their_size(ends):
    outlet, inlet, _ = ends
    for size in (0, 1, 4096, 24 << 20, 0, 7):  # one is more than a socket takes at once
        sent, got = random_bytes(size), place(size)
        outlet.start(sent.data, digest_of(sent), SEQ)
        assert not outlet.idle
        inlet.expect(got.data, SEQ)
        assert inlet.busy
        assert pump_until_complete(inlet, outlet) == digest_of(sent)
        assert (got == sent).all()
        assert outlet.idle
        assert not inlet.busy


def test_nothing_waits_where_nothing_can_move(ends):
    outlet, inlet, _ = ends
    assert not outlet.pump()
    assert inlet.pump() == (False, None)  # has no place yet
    got = place(8)
    inlet.expect(got.data, SEQ)
    assert inlet.pump() == (False, None)
    large = random_bytes(24 << 20)
    outlet.start(large.data, digest_of(large), SEQ)
    assert outlet.pump()
    assert not outlet.pump(), "the socket is full"
    assert not outlet.idle


def test_a_bucket_waits_for_its_place(ends):
    outlet, inlet, _ = ends
    sent = [random_bytes(size) for size in (3, 5)]
    for data in sent:
        outlet.start(data.data, digest_of(data), SEQ)
    outlet.pump()
    for data in sent:
        assert inlet.pump() == (False, None)
        got = place(data.size)
        inlet.expect(got.data, SEQ)
        pump_until_complete(inlet)
        assert (got == data).all()


def test_bytes_may_come_one_by_one(bare):
    raw, inlet = bare
    data, got = bytes(random_bytes(20)), place(20)
    inlet.expect(got.data, SEQ)
    sent = frame(data)
    for number in range(len(sent)):
        assert inlet.pump()[1] is None
        raw.sendall(sent[number : number + 1])
    assert pump_until_complete(inlet) == digest_of(data)
    assert bytes(got) == data


@pytest.mark.parametrize("flip", [0, 19])
def test_a_changed_byte_is_an_error(bare, flip):
    raw, inlet = bare
    data = bytearray(random_bytes(20))
    sent = bytearray(frame(bytes(data)))
    sent[24 + flip] ^= 0x80
    got = place(20)
    inlet.expect(got.data, SEQ)
    raw.sendall(sent)
    with pytest.raises(TransportError, match=f"agent 1 arrived with digest .*, sent was {digest_of(bytes(data)):016x}"):
        pump_until_complete(inlet)


def test_another_bucket_than_expected_is_an_error(bare):
    raw, inlet = bare
    got = place(20)
    inlet.expect(got.data, SEQ)
    raw.sendall(frame(b"x" * 20, seq=SEQ + 1))
    with pytest.raises(TransportError, match="bucket 4 of 20 bytes, expected 3 of 20"):
        pump_until_complete(inlet)


@pytest.mark.parametrize("size", [0, 19, 21, 2**64 - 1])
def test_another_size_than_expected_is_an_error_before_a_byte_is_taken(bare, size):
    raw, inlet = bare
    got = place(20)
    inlet.expect(got.data, SEQ)
    raw.sendall(frame(b"x" * 20, size=size))
    with pytest.raises(
        TransportError, match=f"bucket 3 of {size} bytes, expected 3 of 20; all hosts must follow one plan"
    ):
        pump_until_complete(inlet)
    assert not got.any()


@pytest.mark.parametrize("sent", [0, 7, 16, 26])
def test_who_hangs_up_is_lost_wherever_in_a_bucket_that_is(bare, sent):
    raw, inlet = bare
    got = place(20)
    inlet.expect(got.data, SEQ)
    raw.sendall(frame(b"x" * 20)[:sent])
    raw.close()
    with pytest.raises(PeerLost, match="the connection to agent 1 broke"):
        pump_until_complete(inlet)


def test_an_outlet_notices_that_nobody_listens(ends):
    outlet, inlet, _ = ends
    inlet.close()
    data = random_bytes(1 << 20)
    outlet.start(data.data, digest_of(data), SEQ)
    with pytest.raises(PeerLost, match=r"the connection to agent 2 broke \(Broken pipe\)"):
        outlet.pump()


# -- meeting -----------------------------------------------------------------------------------------------------
@pytest.fixture
def neighbours():
    with contextlib.ExitStack() as stack:

        def neighbours():
            made = Neighbours("127.0.0.1")
            stack.callback(made.close)
            return made

        yield neighbours


def links(agent, *ports, secret=SECRET):
    return Links(agent=agent, secret=secret, ports=ports)


def dial(port, agent, secret=SECRET):
    return connect(port, peer=0, links=links(agent, secret=secret), deadline=time.monotonic() + WAIT_S)


def carries(outlet, inlet):
    sent, got = random_bytes(100), place(100)
    outlet.start(sent.data, digest_of(sent), SEQ)
    inlet.expect(got.data, SEQ)
    pump_until_complete(inlet, outlet)
    return bool((got == sent).all())


def test_inlets_and_outlets_are_in_the_order_of_the_relay(neighbours):
    """Four agents, each with all others: whoever connects first."""
    group = [neighbours() for _ in range(4)]
    relays = [Relay(inlets=tuple(o for o in (3, 1, 0, 2) if o != n), outlets=tuple(o for o in (2, 0, 3, 1) if o != n))
              for n in range(4)]  # fmt: skip
    met = {}
    for again in range(2):  # the same connects anew for the next update
        for number in (2, 0, 3, 1):
            ports = [group[peer].port for peer in relays[number].outlets]
            group[number].connect(relays[number], links(number, *ports, secret=str(again) * 32))
        for number in range(4):
            met[number] = group[number].meet(relays[number], unchecked)
            assert tuple(inlet.peer for inlet in met[number][0]) == relays[number].inlets
            assert tuple(outlet.peer for outlet in met[number][1]) == relays[number].outlets
        for number, (_, outlets) in met.items():
            for outlet in outlets:
                inlets, _ = met[outlet.peer]
                assert carries(outlet, next(inlet for inlet in inlets if inlet.peer == number))


def test_strangers_are_turned_away_and_do_not_keep_friends_out(neighbours, caplog):
    mine = neighbours()
    mine.connect(Relay(), links(0))
    wrong = [dial(mine.port, 7, "6" * 32), dial(mine.port, 7, ""), dial(mine.port, 9)]
    host, _, port = mine.port.rpartition(":")
    with socket.create_connection((host, int(port))) as short:
        short.sendall(b"GET / HTTP/1.0\r\n\r\n")
    right = dial(mine.port, 7)
    with caplog.at_level(logging.WARNING):
        inlets, _ = mine.meet(Relay(inlets=(7,)), unchecked)
    assert caplog.text.count("turned away a connection that did not know this update's secret") == 3
    assert carries(right, inlets[0])
    for outlet in wrong:
        data = random_bytes(1 << 20)
        outlet.start(data.data, digest_of(data), SEQ)
        with pytest.raises(PeerLost):
            hang_up_of(outlet)
    for outlet in (*wrong, right):
        outlet.close()


def hang_up_of(outlet):
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        outlet.pump()


def test_who_comes_twice_is_taken_once(neighbours):
    mine = neighbours()
    mine.connect(Relay(), links(0))
    twice, late = [dial(mine.port, 7) for _ in range(2)], dial(mine.port, 8)
    inlets, _ = mine.meet(Relay(inlets=(7, 8)), unchecked)
    assert carries(twice[0], inlets[0])
    assert carries(late, inlets[1])
    data = random_bytes(1 << 20)
    twice[1].start(data.data, digest_of(data), SEQ)
    with pytest.raises(PeerLost):
        hang_up_of(twice[1])
    for outlet in (*twice, late):
        outlet.close()


def test_who_does_not_come_is_named(neighbours, monkeypatch):
    monkeypatch.setattr(chain, "_CONNECT_S", 0.2)
    mine = neighbours()
    mine.connect(Relay(), links(0))
    came = dial(mine.port, 7)
    with pytest.raises(RendezvousTimeout, match=r"agents \[5, 9\] did not connect to 127\.0\.0\.1"):
        mine.meet(Relay(inlets=(5, 7, 9)), unchecked)
    came.close()


def test_where_nobody_listens_nobody_answers(neighbours):
    gone = neighbours()
    gone.close()
    gone.close()
    with pytest.raises(PeerLost, match=f"agent 3 does not answer at {gone.port}"):
        neighbours().connect(Relay(outlets=(3,)), links(0, gone.port))


def test_closing_hangs_up(neighbours):
    mine, other = neighbours(), neighbours()
    other.connect(Relay(), links(1))
    mine.connect(Relay(outlets=(1,)), links(0, other.port))
    inlets, _ = other.meet(Relay(inlets=(0,)), unchecked)
    got = place(4)
    inlets[0].expect(got.data, SEQ)
    mine.close()
    with pytest.raises(PeerLost):
        pump_until_complete(inlets[0])


def test_agents_that_wait_for_each_other_meet(neighbours):
    """Connecting needs no accept at the other end: two may both connect first."""
    group = [neighbours(), neighbours()]
    barrier = threading.Barrier(2)
    met = {}

    def meet(number):
        relay = Relay(inlets=(1 - number,), outlets=(1 - number,))
        barrier.wait(WAIT_S)
        group[number].connect(relay, links(number, group[1 - number].port))
        met[number] = group[number].meet(relay, unchecked)

    threads = [threading.Thread(target=meet, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert carries(met[0][1][0], met[1][0][0])
    assert carries(met[1][1][0], met[0][0][0])


@pytest.fixture
def meeting():
    with contextlib.closing(Neighbours("127.0.0.1")) as made:
        made.connect(Relay(), Links(agent=2, secret=SECRET, ports=()))
        yield made


def dialled(meeting):
    host, _, port = meeting.port.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def test_a_greeting_in_two_parts_is_taken(meeting):
    hello = chain._HELLO.pack(SECRET.encode(), 7)
    with dialled(meeting) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(hello[:10])
        rest = threading.Timer(0.1, connection.sendall, [hello[10:]])
        rest.start()
        inlets, _ = meeting.meet(Relay(inlets=(7,)), unchecked)
        rest.join()
    assert [inlet.peer for inlet in inlets] == [7]


def test_who_says_nothing_does_not_keep_the_others_out(meeting):
    start = time.monotonic()
    with dialled(meeting), dialled(meeting) as connection:
        connection.sendall(chain._HELLO.pack(SECRET.encode(), 7))
        inlets, _ = meeting.meet(Relay(inlets=(7,)), unchecked)
    assert [inlet.peer for inlet in inlets] == [7]
    assert time.monotonic() - start < chain._CONNECT_S / 2


def test_many_who_say_nothing_keep_nobody_waiting_either(meeting):
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(dialled(meeting))
        connection = stack.enter_context(dialled(meeting))
        connection.sendall(chain._HELLO.pack(SECRET.encode(), 7))
        start = time.monotonic()
        inlets, _ = meeting.meet(Relay(inlets=(7,)), unchecked)
    assert [inlet.peer for inlet in inlets] == [7]
    assert time.monotonic() - start < chain._CONNECT_S / 4


def test_who_waits_for_others_hears_of_an_abort(meeting):
    def aborted():
        raise PeerLost("enough")

    with pytest.raises(PeerLost, match="enough"):
        meeting.meet(Relay(inlets=(7,)), aborted)
