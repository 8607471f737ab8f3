"""Requests that an update meets: what becomes of them in each pause mode, and which version each of their tokens names."""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import groupby

from ckpt_conformance.bench import PROMPT, Bench
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.checks.updates import updater
from ckpt_conformance.harness import NotOffered, Server, Stream, Token
from ckpt_conformance.levels import Tier
from ckpt_core.capability import Capability
from ckpt_core.contract import PauseMode

_FINISHED = 800  # tokens of a request that a pause waits for
_COMPARED = 4
_AFTERWARDS = 40  # tokens of the new version that are read
_FATES = {
    PauseMode.ABORT: "a request in flight ends at the pause; all its tokens are of the old version",
    PauseMode.WAIT: "a request in flight is finished first; all its tokens are of the old version",
    PauseMode.KEEP: "a request in flight goes on after the update, to its full length; each token names its version",
    PauseMode.RETRACT: "a request in flight is computed again and goes on; its next tokens are those of the new weights",
}
_CAUSES = {
    PauseMode.ABORT: "The request is frozen, and goes on after the update.",
    PauseMode.WAIT: "The pause returns while requests still run.",
    PauseMode.KEEP: "The request is ended, or named after the version that it began or ended with.",
    PauseMode.RETRACT: "Keys and values of the old weights are kept.",
}


def _register_in_flight(capability: Capability, mode: PauseMode) -> None:
    @check(
        f"in_flight_{mode.value}",
        tier=Tier.SERVER,
        needs=(capability,),
        rule=f"In an update with pause mode {mode.value} {_FATES[mode]}.",
        usual_cause=_CAUSES[mode],
    )
    def in_flight(bench: Bench) -> None:
        with _streaming_server(bench) as server:
            wanted = min(_FINISHED, server.most_tokens) if mode is PauseMode.WAIT else server.most_tokens
            tokens, ended = _update_meanwhile(bench, server, mode, wanted)
            versions = [version for version, _ in groupby(token.version for token in tokens)]
            _expect_end(len(tokens), ended, wanted, mode)
            if any(versions):
                goes_on = mode in (PauseMode.KEEP, PauseMode.RETRACT)
                _expect_versions(versions, ["old", "new"] if goes_on else ["old"])
                if mode is PauseMode.RETRACT:
                    _expect_computed_again(server, tokens)


for _capability, _mode in (
    (Capability.PAUSE_ABORT, PauseMode.ABORT),
    (Capability.PAUSE_WAIT, PauseMode.WAIT),
    (Capability.PAUSE_KEEP, PauseMode.KEEP),
    (Capability.PAUSE_RETRACT, PauseMode.RETRACT),
):
    _register_in_flight(_capability, _mode)


@check(
    "version_of_answers",
    tier=Tier.SERVER,
    needs=(Capability.LIVE_VERSION,),
    rule="Every token of an answer names the version that is committed: the old one before an update, the new one after it.",
    usual_cause="The server names what it was started with, or counts updates by itself.",
)
def version_of_answers(bench: Bench) -> None:
    """Two updates, and an answer after each."""
    with (
        _streaming_server(bench) as server,
        updater(bench, [server.target]) as updating,
    ):
        stream = _stream_of(server)
        for seed, version in ((1, "old"), (2, "new")):
            updating.update(bench.checkpoint(seed).path, version=version)
            tokens = list(stream(PROMPT, _COMPARED))
            if not any(token.version for token in tokens):
                raise NotOffered("versions of tokens")
            _expect_versions([token.version for token in tokens], [version] * _COMPARED)


def _update_meanwhile(bench: Bench, server: Server, mode: PauseMode, wanted: int) -> tuple[list[Token], bool]:
    """Tokens of a request that an update met, as far as they are of interest; and whether it ended with them."""
    stream, keeps = _stream_of(server), mode is PauseMode.KEEP
    with updater(bench, [server.target], pause_mode=mode, allow_stale_cache=keeps) as updating:
        updating.update(bench.checkpoint(1).path, version="old")
        request = stream(PROMPT, wanted)
        tokens = [next(request)]
        updating.update(bench.checkpoint(2).path, version="new")
        for token in request:
            tokens.append(token)
            if sum(token.version == "new" for token in tokens[-_AFTERWARDS:]) == _AFTERWARDS:
                return tokens, False
        return tokens, True


def _streaming_server(bench: Bench) -> AbstractContextManager[Server]:
    """One rank, on a checkpoint."""
    if not bench.harness.streams:  # told before a server is started, which may take a minute
        raise NotOffered("servers that tell tokens as they come")
    return bench.harness.server(bench.checkpoint(1).path, ranks=1, dummy=False)


def _stream_of(server: Server) -> Stream:
    assert server.stream is not None, "Harness.streams is set"
    return server.stream


def _expect_end(count: int, ended: bool, wanted: int, mode: PauseMode) -> None:
    if mode is PauseMode.ABORT and not (ended and count < wanted):
        raise CheckFailed(expected=f"an end before {wanted} tokens", got=f"{count} tokens, and more to come")
    if mode is not PauseMode.ABORT and ended and count < wanted:
        raise CheckFailed(expected=f"{wanted} tokens", got=f"an end after {count}")


def _expect_versions(got: list[str], expected: list[str]) -> None:
    if got != expected:
        raise CheckFailed(expected=f"tokens of versions {expected}, one after the other", got=str(got))


def _expect_computed_again(server: Server, tokens: list[Token]) -> None:
    """What comes after the update is what a new request with the same tokens gets."""
    old = [token.token_id for token in tokens if token.version == "old"]
    new = [token.token_id for token in tokens if token.version == "new"][:_COMPARED]
    expected = server.generate([*PROMPT, *old], _COMPARED)
    if new[: len(expected)] != expected:
        raise CheckFailed(expected=f"tokens {expected}, by the new weights alone", got=str(new))
