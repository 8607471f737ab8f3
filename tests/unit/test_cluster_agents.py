"""Agents that dial in from several hosts: awaited host by host, known by where they run, missed when another takes their place."""
# ruff: noqa: S106 (tokens of these tests are no secrets)

import contextlib
import threading

import msgspec
import pytest
import torch

from ckpt_core import process, wire
from ckpt_core.channel import Hub, Line
from ckpt_core.cluster_agents import ClusterAgents
from ckpt_core.config import Reading
from ckpt_core.conversation import Conversation
from ckpt_core.errors import ConfigError, PeerLost, RendezvousTimeout, TransportError
from ckpt_core.manifest import Manifest
from ckpt_core.pool_file import stage_tensors

WAIT_S = 10.0
SHORT_S = 0.3
HERE = process.current()


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "sockets").mkdir()
    with contextlib.closing(Hub(tmp_path / "sockets")) as made:
        yield made


@pytest.fixture
def talk(hub):
    with contextlib.closing(Conversation(hub, ping_every_s=1.0)) as made:
        yield made


@pytest.fixture
def dial(hub, talk):
    """An agent dials in; what it is. Returns once it is known, so that agents come in the order of the calls."""
    with contextlib.ExitStack() as stack:

        def dial(host="", agent=0, *, count=1, address=None, known=True, nic_gb_s=0.0, **where):
            line = stack.enter_context(Line(hub.address, "t", WAIT_S))
            line.send(
                wire.AgentHello(
                    agent=agent,
                    process=at(host, **where),
                    count=count,
                    address=f"10.0.0.{host}" if address is None else address,
                    nic_gb_s=nic_gb_s,
                )
            )
            before = len(talk.agents)
            if known:
                talk.idle_until(lambda: len(talk.agents) > before, timeout_s=WAIT_S)
            return line

        yield dial


@pytest.fixture
def agents_of(talk):
    return lambda reading=Reading.STRIPED: ClusterAgents(talk, token="t", reading=reading)


def at(host="", **where):
    """A process of this machine, or of another one; neither is watched: the first lives, of the others nothing is known."""
    boot_id = f"boot-{host}" if host else HERE.boot_id
    return msgspec.structs.replace(HERE, **{"boot_id": boot_id, "host": f"host-{host}", **where})


# -- joining -----------------------------------------------------------------------------------------------------
def test_hosts_are_complete_when_all_their_agents_are_there(agents_of, dial):
    agents = agents_of()
    dial("2", 1, count=2, nic_gb_s=25.0)
    dial("1", 0)
    with pytest.raises(
        RendezvousTimeout, match=r"agents of 1 of 2 hosts .* \(host-1 \(10\.0\.0\.1\)\); run `ckpt agent`"
    ):
        agents.join(2, SHORT_S)
    dial("2", 0, count=2, nic_gb_s=25.0)
    agents.join(2, SHORT_S)
    assert [host.name for host in agents.hosts] == ["host-1 (10.0.0.1)", "host-2 (10.0.0.2)"]
    assert [host.nic_gb_s for host in agents.hosts] == [0.0, 25.0]
    assert [len(host.peers) for host in agents.hosts] == [1, 2]
    assert agents.alive
    assert len(set(agents.peers)) == 3


def test_where_nobody_came_it_says_so(agents_of):
    with pytest.raises(RendezvousTimeout, match=r"agents of 0 of 1 hosts dialled in within 0\.3 s \(none\)"):
        agents_of().join(1, SHORT_S)


def test_agents_of_a_host_are_in_their_order_whoever_came_first(agents_of, talk, dial):
    agents = agents_of()
    for agent in (2, 0, 1):
        dial("1", agent, count=3)
    agents.join(1, WAIT_S)
    assert [talk.agents[peer].agent for peer in agents.peers] == [0, 1, 2]


def test_joining_waits_for_who_comes_late(agents_of, dial):
    agents = agents_of()
    dial("1", 0, count=2)
    thread = threading.Thread(target=lambda: dial("1", 1, count=2, known=False))
    thread.start()
    agents.join(1, WAIT_S)
    thread.join()
    assert len(agents.peers) == 2


def test_two_services_at_one_machine_are_two_hosts_by_their_addresses(agents_of, dial):
    agents = agents_of()
    dial("1", address="10.0.0.1", net_namespace="net:[1]")
    dial("1", address="10.0.0.2", net_namespace="net:[2]")
    dial("1", address="10.0.0.3", net_namespace="net:[2]")
    agents.join(3, SHORT_S)
    assert [host.name for host in agents.hosts] == [f"host-1 (10.0.0.{n})" for n in (1, 2, 3)]


def test_an_agent_that_was_started_anew_before_anybody_joined_takes_the_place_of_the_first(agents_of, talk, dial):
    agents = agents_of()
    dial("1", 0, count=2)
    dial("1", 1, count=2)
    dial("1", 0, count=2)
    first, second, third = talk.agents
    agents.join(1, SHORT_S)
    assert agents.peers == (third, second)
    assert first not in agents.peers


# -- replaced ----------------------------------------------------------------------------------------------------
def test_an_agent_that_another_took_the_place_of_is_missed(agents_of, dial):
    agents = agents_of()
    for agent in range(2):
        dial("1", agent, count=2)
    agents.join(1, SHORT_S)
    agents.check_replaced()
    dial("2", 1, count=2)  # of a host that takes no part
    agents.check_replaced()
    assert agents.alive
    dial("1", 1, count=2)
    with pytest.raises(PeerLost, match=r"agent 1 of host host-1 \(10\.0\.0\.1\) died during the update"):
        agents.check_replaced()
    assert not agents.alive


def test_looking_whether_they_live_hears_who_dialled_in_since(agents_of, dial):
    agents = agents_of()
    dial("1")
    agents.join(1, SHORT_S)
    assert agents.alive
    line = dial("1", known=False)
    line.send(wire.RingClosed())  # both frames are on their way
    while agents.alive:
        pass
    with pytest.raises(PeerLost):
        agents.check_replaced()


def test_all_are_sent_home_and_others_may_come(agents_of, talk, dial):
    agents = agents_of()
    lines = [dial("1"), dial("2")]
    agents.join(2, WAIT_S)
    agents.stop()
    for line in lines:
        while (message := line.poll(WAIT_S)) is None:
            pass
        assert message == wire.Stop()
    assert talk.agents == {}
    assert agents.peers == ()
    dial("1")
    agents.join(1, SHORT_S)
    assert len(agents.peers) == 1


def test_a_service_that_was_started_again_with_fewer_agents_is_complete(agents_of, dial):
    agents = agents_of()
    dial("1", 0, count=2)
    dial("1", 1, count=2)
    dial("1", 0, count=1)
    agents.join(1, WAIT_S)
    assert len(agents.peers) == 1


def test_who_comes_with_another_token_is_no_agent(agents_of, talk, hub):
    agents_of()
    talk.listen_to("of a rank")
    with Line(hub.address, "of a rank", WAIT_S) as line:
        line.send(wire.AgentHello(agent=0, process=at("1"), address="10.0.0.1"))
        line.send(wire.Progress(done_bytes=7))
        told = []
        talk.on_progress = lambda _name, progress: told.append(progress)
        talk.idle_until(lambda: bool(told), timeout_s=WAIT_S)
    assert told
    assert talk.agents == {}


def test_more_hosts_than_are_to_take_part_are_refused_by_name(agents_of, dial):
    agents = agents_of()
    dial("1")
    dial("2")
    with pytest.raises(ConfigError, match=r"1 hosts .* agents of 2 are there: .*10\.0\.0\.1.*10\.0\.0\.2"):
        agents.join(1, WAIT_S)


# -- whose rings a rank maps -----------------------------------------------------------------------------------------
@pytest.fixture
def three(agents_of, dial):
    """Two containers with networks of their own on one machine, and another machine."""
    agents = agents_of()
    dial("1", address="10.0.0.1", net_namespace="net:[1]")
    dial("1", address="10.0.0.2", net_namespace="net:[2]")
    dial("3", address="10.0.0.3", net_namespace="net:[1]")
    agents.join(3, SHORT_S)
    return agents


def test_a_rank_belongs_to_the_host_of_its_own_network(three):
    assert three.host_of(at("1", net_namespace="net:[1]"), "rank 0") == 0
    assert three.host_of(at("1", net_namespace="net:[2]"), "rank 0") == 1
    assert three.host_of(at("3", net_namespace="net:[1]"), "rank 0") == 2


def test_a_rank_with_a_network_of_its_own_belongs_to_whom_it_shares_memory_with(three):
    assert three.host_of(at("1", net_namespace="net:[9]"), "rank 0") == 0
    assert three.host_of(at("3", net_namespace="net:[9]"), "rank 0") == 2


@pytest.mark.parametrize("elsewhere", [at("4"), at("3", ipc_namespace="ipc:[9]", net_namespace="net:[1]")])
def test_a_rank_where_no_agent_is_has_none(three, elsewhere):
    with pytest.raises(
        TransportError, match=r"rank 7 runs on host host-[34], where no agent is; run `ckpt agent` there"
    ):
        three.host_of(elsewhere, "rank 7")


def test_a_rank_of_another_user_cannot_map_rings(three):
    with pytest.raises(TransportError, match="rank 7 runs as uid 12345"):
        three.host_of(at("3", net_namespace="net:[1]", uid=12345), "rank 7")


# -- who reads ---------------------------------------------------------------------------------------------------
TENSORS = {f"t{number}": torch.full((100 * (number + 1),), number, dtype=torch.uint8) for number in range(6)}


@pytest.fixture
def index(tmp_path):
    return stage_tensors(TENSORS, tmp_path)


def prepared(agents, lines, index, *, digest=True):
    """What agents are asked when a checkpoint is prepared, and what their answers give."""
    asked = [None] * len(lines)

    def answer(number):
        message = lines[number].expect(wire.Prepare)
        asked[number] = message
        digests = dict.fromkeys(message.digest, f"{number:032}")
        lines[number].send(wire.Prepared(digests=digests, digest_s=number, locked_bytes=10, lock_s=0.0))

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(len(lines))]
    for thread in threads:
        thread.start()
    pool = agents.prepare(index, digest=digest, timeout_s=WAIT_S)
    for thread in threads:
        thread.join()
    assert pool.locked_bytes == 10 * len(lines)
    assert pool.digest_s == len(lines) - 1
    return asked, pool


@pytest.fixture
def joined(agents_of, dial):
    """Agents of two hosts, the second with two; the lines of all, in order."""

    def joined(reading, first=""):
        agents = agents_of(reading)
        lines = [
            dial(first, 0, nic_gb_s=25.0, address="a"),
            *(dial("2", n, count=2, address="b") for n in range(2)),
        ]
        agents.join(2, SHORT_S)
        assert [host.process.host for host in agents.hosts] == [f"host-{first}", "host-2"]
        return agents, lines

    return joined


@pytest.mark.parametrize("reading", list(Reading))
def test_every_tensor_is_digested_once_by_somebody_who_reads_it(joined, index, reading):
    agents, lines = joined(reading)
    asked, pool = prepared(agents, lines, index)
    assert sorted(name for message in asked for name in message.digest) == sorted(TENSORS)
    assert sorted(pool.digests) == sorted(TENSORS)
    assert all(set(message.digest) <= set(message.holds) for message in asked)
    assert agents.members.agents == (1, 2)
    assert agents.members.nic_gb_s == (25.0, 0.0)
    held = [set(message.holds) for message in asked]
    assert held[1] == held[2], "agents of one host read the same"
    manifest = Manifest.from_index(index)
    for host, names in enumerate((held[0], held[1])):
        assert set(agents.members.holders.names(manifest, host)) == names
    if reading is Reading.HERE:
        assert (held[0], held[1]) == (set(TENSORS), set())
    elif reading is Reading.EVERYWHERE:
        assert held[0] == held[1] == set(TENSORS)
    else:
        assert held[0] | held[1] == set(TENSORS)
        assert not held[0] & held[1]


def test_nothing_is_digested_where_nobody_asked(joined, index):
    agents, lines = joined(Reading.EVERYWHERE)
    asked, pool = prepared(agents, lines, index, digest=False)
    assert [message.digest for message in asked] == [()] * 3
    assert pool.digests == {}


def test_reading_here_needs_an_agent_here(joined, index):
    agents, _ = joined(Reading.HERE, first="1")
    with pytest.raises(
        ConfigError, match="read on this host, and no agent of the cluster runs here; run `ckpt agent` here"
    ):
        agents.prepare(index, digest=True, timeout_s=WAIT_S)
