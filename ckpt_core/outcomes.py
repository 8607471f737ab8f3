"""What an update that failed left behind, worked out from the last words of its ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ckpt_core import wire
from ckpt_core.contract import AbortOutcome
from ckpt_core.errors import Outcome

_SEVERITY = (Outcome.COMMITTED, Outcome.CLEAN, Outcome.RESTORED, Outcome.POISONED)
_OUTCOME_OF = {
    AbortOutcome.UNTOUCHED: Outcome.CLEAN,
    AbortOutcome.RELOADABLE: Outcome.POISONED,
    AbortOutcome.RESTORED: Outcome.RESTORED,
    AbortOutcome.POISONED: Outcome.POISONED,
}
SAYS = {
    Outcome.COMMITTED: "committed.",
    Outcome.CLEAN: "nothing was touched, engines serve the old weights.",
    Outcome.RESTORED: "the old weights are back, verified.",
    Outcome.POISONED: "engines hold mixed weights and stay paused; update them again, or restart them.",
}


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The one that an orchestrator must act on. Some committed and some not is no state that a fleet may serve in: POISONED."""
    found = set(outcomes)
    if Outcome.COMMITTED in found and len(found) > 1:
        return Outcome.POISONED
    return max(found, key=_SEVERITY.index)


def outcomes_by_endpoint(
    urls: Sequence[str],
    hellos: Mapping[bytes, wire.RankHello],
    words: Mapping[bytes, wire.Aborted | wire.Committed],
    *,
    begun: bool,
) -> dict[str, Outcome]:
    """Worst outcome of each endpoint's ranks; CLEAN where none dialled in.

    Args:
        urls: endpoints of the update, in order.
        hellos: ranks that dialled in.
        words: how they ended, as far as they told. One that did not may hold anything, once it was told to begin.
        begun: whether they were.
    """
    of_ranks: dict[str, list[Outcome]] = {url: [] for url in urls}
    for peer, hello in hellos.items():
        of_ranks[urls[hello.endpoint_index]].append(_outcome_of(words.get(peer), begun=begun))
    return {url: worst(outcomes) if outcomes else Outcome.CLEAN for url, outcomes in of_ranks.items()}


def _outcome_of(word: wire.Aborted | wire.Committed | None, *, begun: bool) -> Outcome:
    if isinstance(word, wire.Committed):
        return Outcome.COMMITTED
    if isinstance(word, wire.Aborted):
        return _OUTCOME_OF[word.outcome]
    return Outcome.POISONED if begun else Outcome.CLEAN
