"""What a router is told: who may get requests, and why not."""

import pytest

from ckpt_core.contract import DeviceKind, EndpointState, EndpointStatus
from ckpt_core.readiness import not_ready
from ckpt_core.store_records import EngineRecord


def status(state=EndpointState.SERVING, instance="one", detail=""):
    return EndpointStatus(
        engine="toy", state=state, world_size=1, device_kind=DeviceKind.CPU, instance_id=instance, detail=detail
    )


def record(url, digest="d" * 32, instance="one", at=1.0):
    return EngineRecord(
        url=url, engine="toy", instance_id=instance, digest=digest, version=digest[:2], update_id="u", committed_at=at
    )


def test_engines_that_serve_what_was_committed_are_ready():
    assert not_ready({"a": status(), "b": status()}, {"a": record("a"), "b": record("b")}) == {}


def test_where_nobody_remembers_anything_serving_is_enough():
    assert not_ready({"a": status(), "b": status()}, {"a": None, "b": None}) == {}
    assert not_ready({"a": status()}, {}) == {}


@pytest.mark.parametrize("state", [state for state in EndpointState if state is not EndpointState.SERVING])
def test_an_engine_that_does_not_serve_is_not_ready(state):
    assert not_ready({"a": status(state, detail="told so")}, {}) == {"a": f"{state.value} told so"}


def test_a_restarted_engine_is_not_ready():
    reasons = not_ready({"a": status(instance="two"), "b": status()}, {"a": record("a"), "b": record("b")})
    assert reasons == {"a": "restarted since dd was committed to it; update it"}


def test_an_engine_that_was_left_behind_is_not_ready():
    known = {"a": record("a", at=1.0), "b": record("b", "e" * 32, at=2.0), "c": None}
    reasons = not_ready({"a": status(), "b": status(), "c": status()}, known)
    assert reasons == {
        "a": "runs dd, the others ee; update it",
        "c": "runs nobody knows what, the others ee; update it",
    }
