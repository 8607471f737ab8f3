"""What a check is, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias

from ckpt_conformance.levels import Level, ModelKind, Tier
from ckpt_core.capability import Capability

if TYPE_CHECKING:
    from ckpt_conformance.bench import Bench

_TOPICS = (
    "plugin",
    "identity",
    "layout",
    "order",
    "hidden",
    "content",
    "buckets",
    "memory",
    "names",
    "failure",
    "abort",
    "poison",
    "snapshot",
    "live",
    "partial",
    "control",
    "version",
    "group",
    "fleet",
    "looks",
    "undo",
    "losses",
    "server",
    "requests",
    "server_guard",
)
CheckFunction: TypeAlias = "Callable[[Bench], None]"


class CheckFailed(Exception):
    """A rule is broken.

    Attributes:
        expected, got: in words.
        tensor, rank: where; empty where the rule is not about one.
    """

    def __init__(self, *, expected: str, got: str, tensor: str = "", rank: str = "") -> None:
        super().__init__(f"expected {expected}, got {got}")
        self.expected, self.got, self.tensor, self.rank = expected, got, tensor, rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One rule of the contract, and a function that raises `CheckFailed` where it is broken.

    Attributes:
        check_id: level and name, e.g. "core.live_equals_fresh".
        kinds: the models it runs on, as far as the harness has them.
        needs: capabilities without which it is skipped.
        rule: one sentence of the contract.
        usual_cause: what most often breaks it.
    """

    check_id: str
    level: Level
    tier: Tier
    kinds: tuple[ModelKind, ...]
    needs: frozenset[Capability]
    rule: str
    usual_cause: str
    function: CheckFunction


_CHECKS: dict[str, Check] = {}


def check(
    name: str,
    *,
    rule: str,
    usual_cause: str,
    level: Level = Level.CORE,
    tier: Tier = Tier.WORKER,
    kinds: tuple[ModelKind, ...] = (ModelKind.PLAIN,),
    needs: Iterable[Capability] = (),
) -> Callable[[CheckFunction], CheckFunction]:
    """Register a function as a check; its id is the level's name and `name`."""

    def register(function: CheckFunction) -> CheckFunction:
        check_id = f"{level.name.lower()}.{name}"
        assert check_id not in _CHECKS, f"two checks are named {check_id}"
        _CHECKS[check_id] = Check(
            check_id=check_id,
            level=level,
            tier=tier,
            kinds=kinds,
            needs=frozenset(needs),
            rule=rule,
            usual_cause=usual_cause,
            function=function,
        )
        return function

    return register


def load_all() -> tuple[Check, ...]:
    """Every check, in the order in which they are best read: what is simpler, first; whoever imported a topic before."""
    places = {import_module(f"ckpt_conformance.checks.{topic}").__name__: place for place, topic in enumerate(_TOPICS)}
    return tuple(sorted(_CHECKS.values(), key=lambda check: places[check.function.__module__]))
