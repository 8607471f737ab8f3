"""What the plugin shows of the live weights: the storage itself, all of it."""

from __future__ import annotations

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.levels import Level, ModelKind
from ckpt_core.capability import Capability
from ckpt_core.contract import LiveTensor


@check(
    "live_read_complete",
    level=Level.VERIFIED,
    kinds=tuple(ModelKind),
    needs=(Capability.LIVE_READ,),
    rule="ckpt_live has all that an update determines, as the storage itself and not copies, each with its state.",
    usual_cause="Buffers or derived tensors left out, or tensors gathered or cloned on the way.",
)
def live_read_complete(bench: Bench) -> None:
    """Compared by address with the harness's view, and again after an update."""
    worker = bench.worker_on(1)
    bench.update(worker, 2)
    shown = bench.hook.ckpt_live(worker=worker)
    if wrong := [name for name, item in shown.items() if not isinstance(item, LiveTensor)]:
        raise CheckFailed(expected="a LiveTensor", got=repr(shown[wrong[0]]), tensor=wrong[0], rank=bench.rank(worker))
    places = {item.tensor.data_ptr() for item in shown.values()}
    for name, address in bench.addresses(worker).items():
        if address not in places:
            raise CheckFailed(
                expected=f"in ckpt_live, at {address:#x}", got="not there", tensor=name, rank=bench.rank(worker)
            )
