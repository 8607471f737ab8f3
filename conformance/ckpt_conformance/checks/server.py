"""Real updates into a server with several ranks, over its own HTTP interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ckpt_conformance.bench import NEW_TOKENS, PROMPT, Bench
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.checks.updates import updater
from ckpt_conformance.harness import Server
from ckpt_conformance.levels import Tier

_RANKS = 2
_SEEDS = (1, 2)
Answer: TypeAlias = tuple[list[int], Sequence[Mapping[str, str]]]


@check(
    "server_update",
    tier=Tier.SERVER,
    rule="A server of two ranks has the bits and gives the tokens of a fresh start, after a first and a second update.",
    usual_cause="Only one rank enters the loop, or a cache of the old weights answers.",
)
def server_update(bench: Bench) -> None:
    """Started on dummy weights; updated twice; asked the same prompt before."""
    expected = {seed: _fresh(bench, seed) for seed in _SEEDS}
    with (
        bench.harness.server(bench.checkpoint(1).path, ranks=_RANKS, dummy=True) as server,
        updater(bench, [server.target]) as updating,
    ):
        for seed in _SEEDS:
            updating.update(bench.checkpoint(seed).path)
            compare(expected[seed], answer_of(server))


def _fresh(bench: Bench, seed: int) -> Answer:
    with bench.harness.server(bench.checkpoint(seed).path, ranks=_RANKS, dummy=False) as server:
        return answer_of(server)


def answer_of(server: Server) -> Answer:
    """Tokens for the usual prompt, and digests of what lives."""
    return server.generate(PROMPT, NEW_TOKENS), server.digests() if server.digests is not None else ()


def compare(expected: Answer, got: Answer) -> None:
    """Raise CheckFailed where digests or tokens differ."""
    for rank, (wanted, found) in enumerate(zip(expected[1], got[1], strict=True)):
        for name, digest in wanted.items():
            if found.get(name) != digest:
                raise CheckFailed(
                    expected=f"a fresh start's bits, digest {digest}",
                    got=str(found.get(name)),
                    tensor=name,
                    rank=f"{rank} of {len(expected[1])}",
                )
    if expected[0] != got[0]:
        raise CheckFailed(expected=f"a fresh start's tokens {expected[0]}", got=str(got[0]))
