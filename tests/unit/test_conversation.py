"""The controller's talk: one reply each, failures in their own class, deaths and deadlines noticed, nothing left over."""

import contextlib
import subprocess
import sys
import threading

import msgspec
import pytest

from ckpt_core import process, wire
from ckpt_core.channel import Hub, Line
from ckpt_core.conversation import Conversation, failure_of
from ckpt_core.errors import (
    CapacityError,
    EngineStateError,
    HookFailed,
    PeerLost,
    RendezvousTimeout,
    TransferTimeout,
)

WAIT_S = 10.0
SHORT_S = 0.2


@pytest.fixture
def hub(tmp_path):
    with contextlib.closing(Hub(tmp_path)) as made:
        made.allow("t")
        yield made


@pytest.fixture
def talk(hub):
    with contextlib.closing(Conversation(hub, ping_every_s=0.02)) as made:
        yield made


@pytest.fixture
def dial(hub):
    with contextlib.ExitStack() as stack:
        yield lambda token="t": stack.enter_context(Line(hub.address, token, WAIT_S))


@pytest.fixture
def child():
    """A process that lives until it is killed or this test ends."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as made:
        yield made
        made.kill()


def admit(talk, dial, agent=0, info=None, name=None):
    line = dial()
    info = info or process.current()
    line.send(wire.AgentHello(agent=agent, process=info))
    (peer,) = talk.admit(wire.AgentHello, 1, timeout_s=WAIT_S, who="agent")
    talk.introduce(peer, info, name or f"agent {agent}")
    return peer, line


def of(child):
    return msgspec.structs.replace(process.current(), pid=child.pid)


def fail(line, error="CapacityError", message="no room"):
    line.send(wire.Failure(error=error, message=message, phase="load", traceback="Traceback: here"))


OPENED = wire.RingOpened(offer=wire.RingOffer(owner=0, device="cpu", handle="", size_bytes=1, control_path=""))


def test_everybody_is_asked_and_answers_once(talk, dial):
    peers = [admit(talk, dial, number) for number in range(3)]

    def answer(line):
        number = int(line.expect(wire.Commit).version)
        line.send(wire.Progress(done_bytes=number))
        line.send(msgspec.structs.replace(OPENED, offer=msgspec.structs.replace(OPENED.offer, owner=number)))

    progress = []
    talk.on_progress = lambda name, message: progress.append((name, message.done_bytes))
    threads = [threading.Thread(target=answer, args=(line,)) for _, line in peers]
    for thread in threads:
        thread.start()
    asks = {peer: wire.Commit(version=str(number), digest="") for number, (peer, _) in enumerate(peers)}
    replies = talk.ask(asks, wire.RingOpened, timeout_s=WAIT_S)
    for thread in threads:
        thread.join()
    assert [replies[peer].offer.owner for peer, _ in peers] == [0, 1, 2]
    assert sorted(progress) == [("agent 0", 0), ("agent 1", 1), ("agent 2", 2)]


def test_peers_that_do_not_come_are_counted(talk, dial):
    dial().send(wire.AgentHello(agent=0, process=process.current()))
    with pytest.raises(RendezvousTimeout, match=r"1 of 2 agents dialled in within 0\.2 s"):
        talk.admit(wire.AgentHello, 2, timeout_s=SHORT_S, who="agent")


def test_after_a_rendezvous_that_failed_the_talk_goes_on(hub, talk, dial):
    """The token of the failed attempt is revoked; who had come with it must not disturb those who come next."""
    hub.allow("first")
    dial("first").send(wire.AgentHello(agent=0, process=process.current()))
    with pytest.raises(RendezvousTimeout):
        talk.admit(wire.AgentHello, 2, timeout_s=SHORT_S, who="rank")
    hub.revoke("first")
    peer, line = admit(talk, dial)
    line.send(wire.RingClosed())
    assert talk.gather({peer: wire.RingClosed}, timeout_s=WAIT_S) == {peer: wire.RingClosed()}


def test_a_reported_failure_is_raised_in_its_own_class(talk, dial):
    peer, line = admit(talk, dial)
    fail(line)
    with pytest.raises(CapacityError, match="agent 0, in load: no room"):
        talk.gather({peer: wire.RingClosed}, timeout_s=WAIT_S)


def test_what_came_after_a_failure_is_not_lost(talk, dial):
    peer, line = admit(talk, dial)
    fail(line)
    line.send(wire.RingClosed())
    with pytest.raises(CapacityError):
        talk.gather({peer: wire.RingOpened}, timeout_s=WAIT_S)
    assert peer in talk.gather({peer: wire.RingClosed}, timeout_s=WAIT_S, patient=True)


def test_a_failure_of_somebody_who_was_forgotten_ends_nothing(hub, talk, dial):
    """Two agents fail at once: the second report must not end the next update, which has other agents."""
    hub.allow("old")
    lines = [dial("old"), dial("old")]
    for number, line in enumerate(lines):
        line.send(wire.AgentHello(agent=number, process=process.current()))
    old = talk.admit(wire.AgentHello, 2, timeout_s=WAIT_S, who="agent")
    for line in lines:
        fail(line)
    with pytest.raises(CapacityError):
        talk.gather(dict.fromkeys(old, wire.RingClosed), timeout_s=WAIT_S)
    talk.forget(old)
    hub.revoke("old")
    peer, line = admit(talk, dial)
    line.send(wire.RingClosed())
    assert peer in talk.gather({peer: wire.RingClosed}, timeout_s=WAIT_S)


def test_a_deadline_names_who_is_late(talk, dial):
    first, line = admit(talk, dial, 0)
    second, _ = admit(talk, dial, 1)
    line.send(wire.RingClosed())
    got = {}
    with pytest.raises(TransferTimeout, match=r"no answer within 0\.2 s from agent 1 \(RingClosed\)"):
        talk.gather({first: wire.RingClosed, second: wire.RingClosed}, timeout_s=SHORT_S, into=got)
    assert list(got) == [first]


def test_a_death_is_noticed_long_before_the_deadline(talk, dial, child):
    peer, _ = admit(talk, dial, info=of(child))
    child.kill()
    with pytest.raises(PeerLost, match="agent 0 died"):
        talk.gather({peer: wire.RingClosed}, timeout_s=WAIT_S * 10)


def test_a_process_that_was_gone_before_it_was_introduced_is_dead(talk, dial, child):
    child.kill()
    child.wait()
    peer, _ = admit(talk, dial, info=of(child))
    with pytest.raises(PeerLost, match="agent 0"):
        talk.gather({peer: wire.RingClosed}, timeout_s=WAIT_S * 10)


def test_patience_gathers_who_answers_and_waits_for_no_dead(talk, dial, child):
    living, line = admit(talk, dial, 0)
    dead, _ = admit(talk, dial, 1, info=of(child))
    child.kill()
    fail(line)
    line.send(wire.RingClosed())
    wanted = {living: wire.RingClosed, dead: wire.RingClosed}
    assert list(talk.gather(wanted, timeout_s=WAIT_S * 10, patient=True)) == [living]


def test_patience_ends_at_the_deadline(talk, dial):
    peer, _ = admit(talk, dial)
    assert talk.gather({peer: wire.RingClosed}, timeout_s=SHORT_S, patient=True) == {}


def test_a_watch_ends_the_wait(talk, dial):
    peer, _ = admit(talk, dial)

    def watch():
        raise EngineStateError("left")

    talk.watches.append(watch)
    with pytest.raises(EngineStateError, match="left"):
        talk.gather({peer: wire.RingClosed}, timeout_s=WAIT_S)


def test_everybody_hears_pings_until_forgotten(talk, dial, hub):
    first, _ = admit(talk, dial, 0)
    second, _ = admit(talk, dial, 1)
    sent = []
    hub.send = lambda peer, body: sent.append((peer, type(body)))
    talk.gather({second: wire.RingClosed}, timeout_s=SHORT_S, patient=True)
    assert {(first, wire.Ping), (second, wire.Ping)} == set(sent)
    talk.forget([first])
    sent.clear()
    talk.gather({second: wire.RingClosed}, timeout_s=SHORT_S, patient=True)
    assert {(second, wire.Ping)} == set(sent)


def test_a_forgotten_process_may_die(talk, dial, child):
    dead, _ = admit(talk, dial, 0, info=of(child))
    living, line = admit(talk, dial, 1)
    talk.forget([dead])
    child.kill()
    child.wait()
    line.send(wire.RingClosed())
    assert living in talk.gather({living: wire.RingClosed}, timeout_s=WAIT_S)


def test_a_process_on_another_host_is_not_watched_as_one_of_this(talk, dial, child):
    """Its number may be that of another process here: only the deadline tells."""
    elsewhere = msgspec.structs.replace(of(child), boot_id="elsewhere", host="far")
    child.kill()
    child.wait()
    peer, line = admit(talk, dial, info=elsewhere)
    line.send(wire.RingClosed())
    assert peer in talk.gather({peer: wire.RingClosed}, timeout_s=WAIT_S)


def test_agents_are_known_whether_or_not_anybody_waited_for_them(talk, dial):
    hello = wire.AgentHello(agent=3, process=process.current(), count=4, address="10.0.0.1")
    talk.listen_to("t", agents=True)
    dial().send(hello)
    talk.idle_until(lambda: bool(talk.agents), timeout_s=WAIT_S)
    ((peer, known),) = talk.agents.items()
    assert known == hello
    talk.dismiss([peer])
    assert talk.agents == {}


@pytest.mark.parametrize(
    "error", ["ValueError", "HookFailed", "UpdateAborted", "Outcome", "annotations", "", "__doc__"]
)
def test_what_is_no_plain_error_of_ours_is_a_failed_hook(error):
    made = failure_of("rank 3", wire.Failure(error=error, message="odd", phase="finish", traceback="Traceback: x"))
    assert type(made) is HookFailed
    assert f"rank 3, in finish: {error}: odd" in str(made)
    assert made.remote_traceback == "Traceback: x"
