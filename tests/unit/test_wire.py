"""Frames: every message survives the way, and whatever does not fit is refused with WireError and nothing else."""
# ruff: noqa: S106 (tokens of these tests are no secrets)

import tracemalloc
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
    wire.Begin(parts={3: bytes(16)}),
    wire.Commit(version="v1", digest="00"),
    wire.AskHeld(manifest=MANIFEST),
    wire.CompareHeld(digests=bytes(16)),
    wire.RankHello(endpoint_index=1, rank=RANK, process=PROCESS),
    wire.LayoutReply(layout=CUT),
    wire.PlanAgreed(digest=PLAN.digest),
    wire.Progress(done_bytes=2**50),
    wire.Verified(stats=RANK_STATS, fingerprint="f"),
    wire.Committed(),
    wire.Aborted(outcome=AbortOutcome.RELOADABLE),
    wire.HeldSlices(
        parts=(wire.PartOf(tensor=0, box=Box(start=(1, 0), shape=(2, 300))), wire.PartOf(tensor=1, box=None)),
        unchecked=("c.none",),
        unchecked_bytes=7,
        fit=Layout(entries=(), missing=("lacking",)),
    ),
    wire.Compared(equal_bytes=2**40, differing_bytes=4, differing=("a.weight",), differing_count=1, fingerprint="f"),
    wire.Prepare(
        index=INDEX, digest=("a",), holds=("a",), parts=(wire.PartOf(tensor=0, box=Box(start=(0,), shape=(1,))),)
    ),
    wire.OpenRing(size_bytes=1 << 20, receivers=3),
    wire.TakePlan(plan=PLAN, relay=RELAY, links=LINKS),
    wire.Send(timeout_s=1.5),
    wire.Stop(),
    wire.AgentHello(agent=1, process=PROCESS, count=2, address="10.0.0.1", nic_gb_s=50.0),
    wire.Prepared(digests={"a": "0" * 32}, parts=bytes(8), digest_s=0.1, locked_bytes=8, lock_s=0.2),
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


# -- sizes ---------------------------------------------------------------------------------------------------------
SMALL = tuple(kind for kind in typing.get_args(wire.AnyMessage) if kind not in wire.LARGE_ASKS + wire.LARGE_REPLIES)


def padded(kind, size_bytes):
    """A frame of that kind with something unknown in it, which the schema lets pass."""
    body = {"type": kind.__name__, "padding": b"x" * size_bytes}
    return frame(body)


@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)
def test_only_what_grows_with_the_checkpoint_may_be_large(kind):
    with pytest.raises(WireError, match=rf"'{kind.__name__}' of \d+ bytes exceeds the limit of {1 << 20}"):
        wire.decode(padded(kind, 1 << 20), tokens=["t"], last_seq=0)


@pytest.mark.parametrize("kind", wire.LARGE_ASKS + wire.LARGE_REPLIES, ids=lambda kind: kind.__name__)
def test_what_grows_with_the_checkpoint_has_a_limit_too(kind, monkeypatch):
    with pytest.raises(WireError, match="schema"):  # which it does not fit; its size is none of its faults
        wire.decode(padded(kind, 1 << 20), tokens=["t"], last_seq=0)
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES" if kind in wire.LARGE_ASKS else "MAX_REPLY_BYTES", 2 << 20)
    with pytest.raises(WireError, match=f"exceeds the limit of {2 << 20}"):
        wire.decode(padded(kind, 2 << 20), tokens=["t"], last_seq=0)


def test_a_small_message_that_is_large_is_not_even_sent():
    with pytest.raises(WireError, match=f"Abort of .* exceeds the limit of {1 << 20}"):
        wire.encode(wire.Abort(cause="x" * (1 << 20)), token="t", seq=1)


def test_a_large_message_of_no_known_kind():
    for body in ({"type": "Ping2"}, {"kind": 1}, [1]):
        sent = frame([body, b"x" * (1 << 20)] if isinstance(body, list) else body | {"padding": b"x" * (1 << 20)})
        with pytest.raises(WireError, match=r"exceeds the limit|schema"):
            wire.decode(sent, tokens=["t"], last_seq=0)


def test_the_body_of_a_stranger_is_not_decoded(monkeypatch):
    class Untouched:
        def decode(self, _raw):
            raise AssertionError("decoded")

    monkeypatch.setattr(wire, "_body_decoder", Untouched())
    monkeypatch.setattr(wire, "_tag_decoder", Untouched())
    sent = frame({"type": "AskLayout", "padding": b"x" * (2 << 20)}, token="wrong")
    with pytest.raises(WireError, match="wrong token"):
        wire.decode(sent, tokens=["t"], last_seq=0)
    with pytest.raises(WireError, match="expected frame 2"):
        wire.decode(frame(), tokens=["t"], last_seq=1)
    with pytest.raises(AssertionError, match="decoded"):
        wire.decode(frame(), tokens=["t"], last_seq=0)


def test_an_envelope_has_four_parts():
    with pytest.raises(WireError, match="schema"):
        wire.decode(msgspec.msgpack.encode([wire.PROTOCOL_VERSION, "t", 1]), tokens=["t"], last_seq=0)
    later = msgspec.msgpack.encode([wire.PROTOCOL_VERSION + 1, "t", 1, {"type": "Ping"}, 0])  # it says what is wrong
    with pytest.raises(WireError, match="speaks protocol"):
        wire.decode(later, tokens=["t"], last_seq=0)


@pytest.mark.parametrize(
    "head", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
)
def test_a_length_in_a_body_that_is_not_there_takes_no_memory(head):
    sent = (
        b"\x94" + msgspec.msgpack.encode(wire.PROTOCOL_VERSION) + b"\xa1t\x01\x82\xa4type\xa7Prepare\xa6digest" + head
    )
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="schema"):
            wire.decode(sent, tokens=["t"], last_seq=0)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
