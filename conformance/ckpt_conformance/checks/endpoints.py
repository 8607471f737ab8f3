"""The endpoint of a worker in this process, for hooks of the control side."""

from __future__ import annotations

from typing import Any

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import CheckFailed
from ckpt_core.contract import EndpointState
from ckpt_core.endpoint import Endpoint


def endpoint_of(bench: Bench, worker: Any) -> Endpoint:
    """Closed with the bench."""
    target = bench.harness.target(worker)
    endpoint = Endpoint(url=target.url, engine=target.engine, handle=target.handle)
    bench.resources.callback(endpoint.close)
    return endpoint


def expect_state(bench: Bench, endpoint: Endpoint, state: EndpointState) -> None:
    """Raise CheckFailed where ckpt_ready tells another state."""
    status = bench.hook.ckpt_ready(endpoint=endpoint)
    if status.state is not state:
        raise CheckFailed(expected=f"ckpt_ready says {state.value}", got=f"{status.state.value} ({status.detail})")
