"""Frames: every message survives the way, and whatever does not fit is refused with WireError and nothing else."""
# ruff: noqa: S106 (tokens of these tests are no secrets)

import typing

import msgspec
import pytest

from ckpt_core import wire
from ckpt_core.contract import AbortOutcome, DeviceKind, RankInfo
from ckpt_core.dtypes import DType
from ckpt_core.errors import WireError
from ckpt_core.layout import Box, Layout, LayoutEntry, Mismatch, whole_layout
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.plan import make_plan
from ckpt_core.relay import Arrival, Departure, Relay
from ckpt_core.source import Extent, SourceFile, SourceIndex
from ckpt_core.stats import AgentStats, RankStats

MANIFEST = Manifest(
    tensors=(
        TensorMeta(name="a.weight", dtype=DType.BF16, shape=(4, 300), digest="0" * 32),
        TensorMeta(name="b.gewölbe", dtype=DType.F32, shape=()),
        TensorMeta(name="c.none", dtype=DType.I64, shape=(0, 7)),
    )
)
CUT = Layout(
    entries=(
        LayoutEntry(tensor="a.weight", box=Box(start=(1, 0), shape=(2, 300)), group="a", cut=True),
        LayoutEntry(tensor="b.gewölbe"),
    ),
    missing=("lacking",),
    unknown=("c.none",),
    mismatched=(Mismatch(tensor="b.gewölbe", expected="BF16 []", got="F32 []"),),
    retained_bytes={"a": 17},
)
PLAN = make_plan(MANIFEST, [whole_layout(MANIFEST), CUT], agents=2, ring_bytes=4096, bucket_bytes=1024)
RING = wire.RingOffer(owner=1, device="cpu", handle="/shm/ring-1", size_bytes=4096, control_path="/shm/control-1")
PROCESS = wire.ProcessInfo(
    boot_id="b",
    pid=1,
    uid=1000,
    pid_namespace="pid:[1]",
    ipc_namespace="ipc:[1]",
    net_namespace="net:[3]",
    host="localhost",
)
RANK = RankInfo(
    instance_id="i", device_kind=DeviceKind.CUDA, device_index=3, device_uuid="GPU-0", rank=1, world_size=2, tp_size=2
)
INDEX = SourceIndex(
    files=(SourceFile(path="/f", size_bytes=8, mtime_ns=2**62, inode=5, device=6),),
    extents=(Extent(name="a", dtype=DType.U8, shape=(8,), file=0, offset_bytes=0, size_bytes=8),),
)
RANK_STATS = RankStats(
    received_bytes=2**40,
    wait_s=0.5,
    load_s=1.0,
    digest_s=0.0,
    begin_s=1e-9,
    finish_s=2.0,
    fingerprint_s=3.0,
    retained_bytes=0,
    digested_bytes=1,
    ignored=("lm_head.weight",),
)
AGENT_STATS = AgentStats(
    sent_bytes=1, copy_s=0.1, wait_s=0.2, total_s=0.3, network_in_bytes=2**40, network_out_bytes=2**41
)
RELAY = Relay(
    inlets=(3,),
    outlets=(4, 5),
    arrivals=(Arrival(seq=1, inlet=0), Arrival(seq=3, inlet=0)),
    departures=(Departure(outlet=0, to_seq=1, bucket=PLAN.steps[0].bucket), Departure(outlet=1, to_seq=2, seq=3)),
    slots=2,
)
LINKS = wire.Links(agent=2, secret="0" * 32, ports=("10.0.0.2:1", "[::1]:2"))
RINGS = wire.RingSet(offers=(RING, RING), receiver=1, receivers=2)
OFFER = wire.OfferPlan(
    plan=PLAN,
    digests=("0" * 32, "", ""),
    rings=RINGS,
    update_id="u",
    version="v",
    digest="d",
    verify="arrival",
    fingerprint=True,
    transfer_timeout_s=600.0,
)
SAMPLES = (
    wire.Failure(error="PlanError", message="no", phase="plan", traceback="Traceback"),
    wire.Ping(),
    wire.Abort(cause="because"),
    wire.MapRings(rings=RINGS),
    wire.AskLayout(manifest=MANIFEST),
    OFFER,
    wire.Begin(),
    wire.Commit(version="v1", digest="00"),
    wire.RankHello(endpoint_index=1, rank=RANK, process=PROCESS),
    wire.LayoutReply(layout=CUT),
    wire.PlanAgreed(digest=PLAN.digest),
    wire.Progress(done_bytes=2**50),
    wire.Verified(stats=RANK_STATS, fingerprint="f"),
    wire.Committed(),
    wire.Aborted(outcome=AbortOutcome.RELOADABLE),
    wire.Prepare(index=INDEX, digest=("a",), holds=("a",)),
    wire.OpenRing(size_bytes=1 << 20, receivers=3),
    wire.TakePlan(plan=PLAN, relay=RELAY, links=LINKS),
    wire.Send(timeout_s=1.5),
    wire.Stop(),
    wire.AgentHello(agent=1, process=PROCESS, count=2, address="10.0.0.1", nic_gb_s=50.0),
    wire.Prepared(digests={"a": "0" * 32}, digest_s=0.1, locked_bytes=8, lock_s=0.2),
    wire.RingOpened(offer=RING, port="10.0.0.1:4711"),
    wire.PlanTaken(digest=PLAN.digest),
    wire.Sent(stats=AGENT_STATS),
    wire.RingClosed(),
)


def frame(body=None, *, protocol=wire.PROTOCOL_VERSION, token="t", seq=1):  # noqa: S107
    return msgspec.msgpack.encode([protocol, token, seq, {"type": "Ping"} if body is None else body])


def test_there_is_a_sample_of_every_message():
    assert {type(sample) for sample in SAMPLES} == set(typing.get_args(wire.AnyMessage))


@pytest.mark.parametrize("body", SAMPLES, ids=lambda body: type(body).__name__)
def test_every_message_survives_the_way(body):
    sent = wire.encode(body, token="t", seq=7)
    envelope = wire.decode(sent, tokens=["other", "t"], last_seq=6)
    assert envelope.body == body
    assert (envelope.protocol, envelope.token, envelope.seq) == (wire.PROTOCOL_VERSION, "t", 7)


def test_digests_of_manifest_and_plan_survive_the_way():
    sent = wire.encode(wire.TakePlan(plan=PLAN), token="t", seq=1)
    body = wire.decode(sent, tokens=["t"], last_seq=0).body
    assert body.plan.digest == PLAN.digest
    sent = wire.encode(wire.AskLayout(manifest=MANIFEST), token="t", seq=1)
    body = wire.decode(sent, tokens=["t"], last_seq=0).body
    assert body.manifest.structure_digest == MANIFEST.structure_digest


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (frame(token="wrong"), "wrong token"),
        (frame(token=""), "wrong token"),
        (frame(token="t\N{COMBINING ACUTE ACCENT}"), "wrong token"),
        (frame(protocol=wire.PROTOCOL_VERSION + 1), f"protocol {wire.PROTOCOL_VERSION + 1}"),
        (frame(seq=2), "expected frame 1, got 2"),
        (frame(seq=0), "expected frame 1, got 0"),
        (frame(seq=-1), "expected frame 1, got -1"),
    ],
)
def test_frames_of_others_are_refused(sent, says):
    with pytest.raises(WireError, match=says):
        wire.decode(sent, tokens=["t"], last_seq=0)


def test_a_repeated_frame_is_refused():
    sent = wire.encode(wire.Ping(), token="t", seq=1)
    assert wire.decode(sent, tokens=["t"], last_seq=0).seq == 1
    with pytest.raises(WireError, match="lost or repeated"):
        wire.decode(sent, tokens=["t"], last_seq=1)


def test_without_any_token_nothing_is_taken():
    with pytest.raises(WireError, match="wrong token"):
        wire.decode(frame(), tokens=[], last_seq=0)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"type": "Ping2"},
        {"type": "Abort"},
        {"type": "Abort", "cause": 3},
        {"type": "Aborted", "outcome": "fine"},
        {"type": "Progress", "done_bytes": "1"},
        {"type": "Progress", "done_bytes": 1.5},
        {"type": "Prepared", "digests": {1: "x"}, "digest_s": 0.0, "locked_bytes": 0, "lock_s": 0.0},
        "Ping",
        None,
        [],
    ],
    ids=repr,
)
def test_bodies_outside_the_schema_are_refused(body):
    sent = msgspec.msgpack.encode([wire.PROTOCOL_VERSION, "t", 1, body])
    with pytest.raises(WireError, match="schema"):
        wire.decode(sent, tokens=["t"], last_seq=0)


@pytest.mark.parametrize(
    "tensors",
    [
        [{"name": "b", "dtype": "F32", "shape": [1]}, {"name": "a", "dtype": "F32", "shape": [1]}],
        [{"name": "a", "dtype": "F32", "shape": [1]}, {"name": "a", "dtype": "F32", "shape": [1]}],
        [{"name": "a", "dtype": "F32", "shape": [-1]}],
        [{"name": "a", "dtype": "F32", "shape": [2**62]}],
        [{"name": "a", "dtype": "F32", "shape": [1], "digest": "none"}],
        [{"name": "a", "dtype": "F33", "shape": [1]}],
    ],
    ids=["unsorted", "twice", "negative", "huge", "digest", "dtype"],
)
def test_a_manifest_that_cannot_be_is_refused_as_a_frame(tensors):
    sent = frame({"type": "AskLayout", "manifest": {"tensors": tensors}})
    with pytest.raises(WireError):
        wire.decode(sent, tokens=["t"], last_seq=0)


def test_a_wrong_token_is_told_before_the_body_is_looked_at():
    body = {"type": "AskLayout", "manifest": {"tensors": [{"name": "a", "dtype": "F32", "shape": [-1]}]}}
    with pytest.raises(WireError):
        wire.decode(frame(body, token="wrong"), tokens=["t"], last_seq=0)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xc1",
        b"\x94",
        b"\x94" * 5000,
        b"\xa4" + b"\xff" * 4,
        b"\xdd\xff\xff\xff\xff",
        frame()[:-1],
        frame() + b"\0",
    ],
    ids=["empty", "never used", "cut", "deep", "no text", "four billion", "truncated", "trailing"],
)
def test_garbage_is_refused(garbage):
    with pytest.raises(WireError):
        wire.decode(garbage, tokens=["t"], last_seq=0)


def test_too_large_a_frame_is_refused_undecoded_on_both_sides(monkeypatch):
    sent = wire.encode(wire.Abort(cause="x" * 200), token="t", seq=1)
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(WireError, match="exceeds the limit of 100"):
        wire.decode(sent, tokens=["t"], last_seq=0)
    with pytest.raises(WireError, match=r"Abort .* exceeds the limit of 100"):
        wire.encode(wire.Abort(cause="x" * 200), token="t", seq=1)


def test_text_that_is_not_unicode_does_not_travel():
    with pytest.raises(WireError):
        wire.encode(wire.Abort(cause="file \udcff is gone"), token="t", seq=1)
