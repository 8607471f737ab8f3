"""Whatever bytes come in: an envelope or a WireError, never another exception."""
# ruff: noqa: S106 (tokens of these tests are no secrets)

import contextlib
import typing

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from ckpt_core import wire
from ckpt_core.dtypes import DType
from ckpt_core.errors import WireError
from ckpt_core.layout import whole_layout
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.plan import make_plan

MANIFEST = Manifest(tensors=(TensorMeta(name="a", dtype=DType.F32, shape=(2, 100), digest="0" * 32),))
PLAN = make_plan(MANIFEST, [whole_layout(MANIFEST)], agents=1, ring_bytes=1024, bucket_bytes=512)
FRAMES = tuple(
    wire.encode(body, token="t", seq=1)
    for body in (
        wire.TakePlan(plan=PLAN),
        wire.AskLayout(manifest=MANIFEST),
        wire.AskHeld(manifest=MANIFEST),
        wire.HeldSlices(parts=(wire.PartOf(tensor=0, box=None),)),
        wire.LayoutReply(layout=whole_layout(MANIFEST)),
        wire.Failure(error="PlanError", message="no", phase="plan"),
        wire.Ping(),
    )
)
TAGS = tuple(kind.__name__ for kind in typing.get_args(wire.AnyMessage))

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
tensors = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "b"]),
        "dtype": st.sampled_from(["F32", "BF16", "Q8"]),
        "shape": st.lists(st.integers(-1, 2**63), max_size=3),
        "digest": st.sampled_from(["", "0" * 32, "zz"]),
    }
)
bodies = st.fixed_dictionaries(
    {"type": st.sampled_from(TAGS)}, optional={"manifest": st.fixed_dictionaries({"tensors": st.lists(tensors)})}
) | st.dictionaries(st.sampled_from(["type", "cause", "plan", "manifest", "layout", "rank"]), values)


def take(frame):
    with contextlib.suppress(WireError):
        assert isinstance(wire.decode(frame, tokens=["t"], last_seq=0), wire.Envelope)


@given(st.binary(max_size=400))
def test_any_bytes(frame):
    take(frame)


@given(st.sampled_from(FRAMES), st.data())
def test_damaged_frames(frame, data):
    damaged = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4), label="places")):
        damaged[data.draw(st.integers(0, len(frame) - 1), label="where")] = data.draw(st.integers(0, 255), label="what")
    take(bytes(damaged[: data.draw(st.integers(0, len(frame)), label="length")]))


@given(bodies)
@example({"type": "AskLayout", "manifest": {"tensors": [{"name": "a", "dtype": "F32", "shape": [-1]}]}})
def test_well_formed_frames_of_any_content(body):
    take(msgspec.msgpack.encode([wire.PROTOCOL_VERSION, "t", 1, body]))


@given(st.lists(values, min_size=4, max_size=4))
def test_any_four_things(four):
    take(msgspec.msgpack.encode(four))


@given(
    st.text(st.characters(codec="utf-8")),
    st.text(st.characters(codec="utf-8"), min_size=1),
    st.integers(1, 2**63 - 1),
)
def test_text_token_and_number_survive(cause, token, seq):
    envelope = wire.decode(wire.encode(wire.Abort(cause=cause), token=token, seq=seq), tokens=[token], last_seq=seq - 1)
    assert envelope == wire.Envelope(protocol=wire.PROTOCOL_VERSION, token=token, seq=seq, body=wire.Abort(cause=cause))
