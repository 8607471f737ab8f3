"""What an update should have taken, whichever way its bytes came; worked out when the engines serve again."""

from __future__ import annotations

from collections.abc import Callable

from ckpt_core.cost import Prediction, predict
from ckpt_core.flows import predict_fleet
from ckpt_core.limits import Limits
from ckpt_core.p2p.read_plan import expected_of
from ckpt_core.session import Session


def prediction_of(session: Session, limits: Callable[[], Limits | None]) -> Prediction | None:
    """None where the speeds that decide were never measured, and nobody tells them.

    Args:
        limits: of this machine, asked for only where they count.
    """
    plan, remote = session.plan, session.content.index.remote
    if plan is None:
        return None
    if remote is not None:
        return expected_of(remote)
    known = limits()
    if plan.routed is not None:
        return predict_fleet(plan, known) if plan.rates_known else None
    return predict(plan.plans[0], known) if known is not None else None
