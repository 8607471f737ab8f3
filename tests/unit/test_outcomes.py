"""What is told of an update that failed."""

import gc
from contextlib import suppress

import msgspec
import pytest

from ckpt_core import wire
from ckpt_core.agreement import KnownPlan, Ranks, Terms
from ckpt_core.config import UpdateConfig
from ckpt_core.contract import AbortOutcome, DeviceKind, RankInfo
from ckpt_core.dtypes import DType
from ckpt_core.errors import Outcome
from ckpt_core.fleet_plan import FleetPlan
from ckpt_core.layout import whole_layout
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.outcomes import outcomes_by_endpoint
from ckpt_core.plan import make_plan
from ckpt_core.process import current
from ckpt_core.uncollected import uncollected

URLS = ["one", "two"]
UNTOUCHED, RELOADABLE, RESTORED, POISONED = (wire.Aborted(outcome=outcome) for outcome in AbortOutcome)


def hello(endpoint=0, rank=0, instance="i", known=""):
    info = RankInfo(
        instance_id=instance, device_kind=DeviceKind.CPU, device_index=0, device_uuid="c", rank=rank, world_size=2
    )
    return wire.RankHello(endpoint_index=endpoint, rank=info, process=current(), known_plan=known)


HELLOS = {b"a": hello(0, 0), b"b": hello(0, 1), b"c": hello(1, 0)}


@pytest.mark.parametrize(
    ("words", "begun", "expected"),
    [
        ({}, False, [Outcome.CLEAN, Outcome.CLEAN]),
        ({}, True, [Outcome.POISONED, Outcome.POISONED]),
        ({b"a": UNTOUCHED, b"b": UNTOUCHED, b"c": UNTOUCHED}, True, [Outcome.CLEAN, Outcome.CLEAN]),
        ({b"a": UNTOUCHED, b"b": RELOADABLE, b"c": UNTOUCHED}, True, [Outcome.POISONED, Outcome.CLEAN]),
        ({b"a": RESTORED, b"b": UNTOUCHED, b"c": RESTORED}, True, [Outcome.RESTORED, Outcome.RESTORED]),
        ({b"a": RESTORED, b"b": RELOADABLE, b"c": UNTOUCHED}, True, [Outcome.POISONED, Outcome.CLEAN]),
        ({b"a": wire.Committed(), b"b": wire.Committed(), b"c": POISONED}, True, [Outcome.COMMITTED, Outcome.POISONED]),
        ({b"a": wire.Committed(), b"c": wire.Committed()}, True, [Outcome.POISONED, Outcome.COMMITTED]),
        (
            {b"a": wire.Committed(), b"b": UNTOUCHED, b"c": wire.Committed()},
            True,
            [Outcome.POISONED, Outcome.COMMITTED],
        ),
    ],
)
def test_an_endpoint_is_as_bad_as_its_worst_rank(words, begun, expected):
    assert list(outcomes_by_endpoint(URLS, HELLOS, words, begun=begun).values()) == expected


def test_an_endpoint_without_ranks_was_not_touched():
    assert outcomes_by_endpoint(URLS, {}, {}, begun=False) == dict.fromkeys(URLS, Outcome.CLEAN)


def manifest(rows):
    return Manifest(tensors=(TensorMeta(name="w", dtype=DType.BF16, shape=(rows, 8)),))


def terms(rows, **options):
    made = manifest(rows)
    config = UpdateConfig(**options)
    return Terms(update_id="u", version="v", manifest=made, structure=made, config=config, device_kind=DeviceKind.CPU)


RINGS = ((wire.RingOffer(owner=0, device="cpu", handle="", size_bytes=4096, control_path=""),),)


def ranks_of(hellos, host_of=(0, 0, 0)):
    return Ranks(hellos=hellos, host_of=host_of[: len(hellos)])


def test_a_plan_is_known_only_to_the_same_ranks_for_the_same_shapes():
    plan = make_plan(manifest(4), [whole_layout(manifest(4))] * 3, agents=1, ring_bytes=4096, bucket_bytes=4096)
    hellos = {peer: hello(i // 2, i % 2, known=plan.digest) for i, peer in enumerate((b"a", b"b", b"c"))}
    mine = ranks_of(hellos)
    known = KnownPlan(plan=FleetPlan(plans=(plan,), host_of=(0, 0, 0)), ranks=mine.keys, replay=True)
    assert known.fits(terms(4), mine, RINGS)
    assert not known.fits(terms(5), mine, RINGS)
    assert not known.fits(terms(4, replay=False), mine, RINGS)
    small = msgspec.structs.replace(RINGS[0][0], size_bytes=plan.ring_bytes - 1)
    assert not known.fits(terms(4), mine, ((small,),))
    assert not known.fits(terms(4), mine, (*RINGS, (small,)))  # on another host
    forgot = {**hellos, b"c": hello(1, 0, known="")}
    assert not known.fits(terms(4), ranks_of(forgot), RINGS)
    restarted = {**hellos, b"c": hello(1, 0, instance="restarted", known=plan.digest)}
    assert not known.fits(terms(4), ranks_of(restarted), RINGS)
    assert not known.fits(terms(4), ranks_of({peer: hellos[peer] for peer in (b"a", b"b")}), RINGS)


def test_each_rank_must_know_the_plan_of_its_own_host():
    layouts = [whole_layout(manifest(4))]
    one, other = (make_plan(manifest(4), layouts, agents=1, ring_bytes=r, bucket_bytes=256) for r in (256, 512))
    plan = FleetPlan(plans=(one, other), host_of=(1, 0))
    mine = ranks_of({b"a": hello(0, 0, known=other.digest), b"b": hello(0, 1, known=one.digest)}, (1, 0))
    known = KnownPlan(plan=plan, ranks=mine.keys, replay=True)
    assert known.fits(terms(4), mine, RINGS * 2)
    assert not known.fits(terms(4), Ranks(hellos=mine.hellos, host_of=(0, 1)), RINGS * 2)  # moved
    swapped = ranks_of({b"a": hello(0, 0, known=one.digest), b"b": hello(0, 1, known=other.digest)}, (1, 0))
    assert not known.fits(terms(4), swapped, RINGS * 2)


@pytest.mark.parametrize("before", [True, False])
def test_collection_comes_back_as_it_was(before):
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with suppress(KeyError), uncollected():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is before
    finally:
        (gc.enable if was else gc.disable)()
