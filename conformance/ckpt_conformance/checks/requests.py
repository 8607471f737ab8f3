"""Requests that an update meets: what becomes of them in each pause mode, and which version each of their tokens names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

from ckpt_conformance.bench import PROMPT, Bench
from ckpt_conformance.checks.answers import Answer
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.checks.updates import updater
from ckpt_conformance.harness import NotOffered, Server, Stream
from ckpt_conformance.levels import Tier
from ckpt_core.capability import Capability
from ckpt_core.contract import PauseMode
from ckpt_core.fleet import Fleet

_FINISHED = 800  # tokens of a request that a pause waits for
_COMPARED = 4
_ATTEMPTS = 3
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
            answer = _met_by_an_update(bench, server, mode, wanted)
            _expect_end(answer, wanted, mode)
            if not answer.versions and mode is not PauseMode.ABORT:  # an answer of full length may be of any
                raise NotOffered("versions of tokens")
            goes_on = mode in (PauseMode.KEEP, PauseMode.RETRACT)
            if answer.versions:
                _expect_versions(answer.versions, ["old", "new"] if goes_on else ["old"])
            if mode is PauseMode.RETRACT:
                _expect_computed_again(server, answer)


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
        for seed, version in ((1, "old"), (2, "new")):
            updating.update(bench.checkpoint(seed).path, version=version)
            answer = Answer(_stream_of(server)(PROMPT, _COMPARED))
            answer.read()
            if not answer.versions:
                raise NotOffered("versions of tokens")
            _expect_versions(answer.versions, [version])
            _expect_versions(answer.of(version), answer.token_ids)


def _met_by_an_update(bench: Bench, server: Server, mode: PauseMode, wanted: int) -> Answer:
    """The answer to a request that began right before the pause of an update, as far as it is of interest."""
    with updater(bench, [server.target], pause_mode=mode, allow_stale_cache=mode is PauseMode.KEEP) as updating:
        for _ in range(_ATTEMPTS):
            updating.update(bench.checkpoint(1).path, version="old")
            answer = Answer(_stream_of(server)(PROMPT, wanted))
            with _before_the_pause(answer.begin):
                (met,) = updating.update(bench.checkpoint(2).path, version="new").in_flight
            answer.read(until=lambda so_far: len(so_far.of("new")) >= _AFTERWARDS)
            # an engine with a tiny model may be through before its server told the first token: that was no meeting
            over = len(answer.token_ids) == wanted and answer.versions in ([], ["old"])
            if mode is PauseMode.WAIT or met.requests or not over:
                return answer
    raise NotOffered(f"requests that last until the pause: {_ATTEMPTS} were over before it")


@contextmanager
def _before_the_pause(begin: Callable[[], None]) -> Iterator[None]:
    pause = Fleet.pause

    def begin_and_pause(fleet: Fleet, mode: PauseMode) -> object:
        begin()
        return pause(fleet, mode)

    with patch.object(Fleet, "pause", begin_and_pause):
        yield


def _streaming_server(bench: Bench) -> AbstractContextManager[Server]:
    """One rank, on whatever weights."""
    if not bench.harness.streams:  # told before a server is started, which may take a minute
        raise NotOffered("servers that tell tokens as they come")
    return bench.kept.lend(lambda: bench.harness.server(bench.checkpoint(1).path, ranks=1, dummy=False))


def _stream_of(server: Server) -> Stream:
    assert server.stream is not None, "Harness.streams is set"
    return server.stream


def _expect_end(answer: Answer, wanted: int, mode: PauseMode) -> None:
    count = len(answer.token_ids)
    if mode is PauseMode.ABORT and not (answer.ended and count < wanted):
        raise CheckFailed(expected=f"an end before {wanted} tokens", got=f"{count} tokens, and more to come")
    if mode is not PauseMode.ABORT and answer.ended and count < wanted:
        raise CheckFailed(expected=f"{wanted} tokens", got=f"an end after {count}")


def _expect_versions(got: Sequence[object], expected: Sequence[object]) -> None:
    if list(got) != list(expected):
        raise CheckFailed(expected=f"tokens of versions {expected}, one after the other", got=str(got))


def _expect_computed_again(server: Server, answer: Answer) -> None:
    """What comes after the update is what a new request with the same tokens gets."""
    new = answer.of("new")[:_COMPARED]
    expected = server.generate([*PROMPT, *answer.of("old")], _COMPARED)
    if new[: len(expected)] != expected:
        raise CheckFailed(expected=f"tokens {expected}, by the new weights alone", got=str(new))
