"""Updates of two hosts by NCCL: two processes with a GPU each play the hosts, their ranks are processes of their own."""

import json
import runpy
import signal
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "integration" / "collective_host.py"
Fleet = runpy.run_path(str(PROGRAM))["Fleet"]
LONG_S = 180.0
ON_GPUS = {"backend": "nccl", "lanes": 1, "ranks": 1}

pytestmark = [pytest.mark.gpu2, pytest.mark.timeout(300)]


def test_random_plans_arrive_bit_by_bit_on_both_hosts(tmp_path):
    """Updates through one group; sources are dealt in some plans and given, bucket by bucket, in others."""
    seeds = [(11, 1), (11, 2), (12, 1), (214, 2), (300, 3)]
    with Fleet(tmp_path, 2, seeds=seeds, **ON_GPUS) as fleet:
        outcomes = [fleet.rest(host) for host in range(2)]
    assert [lines[-1] for lines in outcomes] == [{"closed": True}] * 2
    for update in zip(*(lines[:-1] for lines in outcomes), strict=True):
        assert [each["errors"] for each in update] == [{}, {}]
        assert all(wrong == 0 for each in update for wrong, _ in each["ranks"])
        assert len({json.dumps(each["ranks"]) for each in update}) == 1, "hosts differ"
        assert [each["left"] for each in update] == [[], []]
    assert {len(lines) for lines in outcomes} == {len(seeds) + 1}


@pytest.mark.parametrize("where", ["fill", "broadcast"])
def test_a_killed_agent_is_noticed_and_its_communicator_aborted(tmp_path, where):
    """At "broadcast" the survivor's kernel waits on its GPU for a peer that will never come."""
    with Fleet(tmp_path, 2, seeds=[(214, 1)], hang=where, timeout_s=LONG_S, **ON_GPUS) as fleet:
        assert fleet.line(1) == {"here": True}
        fleet.processes[1].send_signal(signal.SIGKILL)
        failed, closed = fleet.rest(0)
    assert failed["errors"]["agent 0"][0] == "PeerLost"
    assert failed["broken"] == [True]
    assert failed["left"] == []
    assert closed == {"closed": True}


def test_an_agent_that_falls_silent_in_a_broadcast_is_given_up_after_the_deadline(tmp_path):
    with Fleet(tmp_path, 2, seeds=[(214, 1)], hang="broadcast", timeout_s=1.0, **ON_GPUS) as fleet:
        assert fleet.line(1) == {"here": True}
        failed, closed = fleet.rest(0)
    kind, message = failed["errors"]["agent 0"]
    assert kind == "PeerLost"
    # a small broadcast is complete for its sender once NCCL has buffered it: then the next one is what nobody joins
    assert "did not complete" in message or "hosts [1] were not ready" in message
    assert closed == {"closed": True}
