"""One look at the live weights of engines: paused, asked, compared, resumed as they were. No ring, no transfer, no write.

    pause -> board -> AskHeld / HeldSlices -> agents digest these parts -> CompareHeld / Compared -> Abort -> resume

Nothing is touched, so whatever fails, engines that still are whole serve on.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable

from ckpt_core import wire
from ckpt_core.boarding import Boarding
from ckpt_core.config import UpdateConfig
from ckpt_core.content import Content
from ckpt_core.contract import EndpointState
from ckpt_core.conversation import Conversation
from ckpt_core.errors import CkptError, CoverageError, EngineError, EngineStateError, WireError
from ckpt_core.failure import describe
from ckpt_core.fleet import Fleet, Member
from ckpt_core.layout import check_coverage
from ckpt_core.manifest import Manifest
from ckpt_core.plan_parts import PlanParts

_log = logging.getLogger(__name__)
_LAST_WORDS_S = 30.0
_OVER = "the look is over"
_LOOKED_AT = (EndpointState.SERVING, EndpointState.PAUSED)


class Inspection:
    """See the module. `run` is called once.

    Args:
        fleet: checked, locked members.
        content: prepared; None to ask for fingerprints and nothing else.

    Attributes:
        look_id: its name.
        boarding: the ranks.
        held, compared: what each said, by peer, in the order of endpoints and ranks.
        pause_s: how long engines did not serve.
    """

    def __init__(
        self, *, fleet: Fleet, conversation: Conversation, config: UpdateConfig, content: Content | None
    ) -> None:
        self.look_id = secrets.token_hex(6)
        self._fleet = fleet
        self._talk = conversation
        self._config = config
        self._content = content
        self.boarding = Boarding(fleet=fleet, conversation=conversation, config=config, update_id=self.look_id)
        self.held: dict[bytes, wire.HeldSlices] = {}
        self.compared: dict[bytes, wire.Compared] = {}
        self.pause_s = 0.0

    def run(self) -> None:
        """The whole way.

        Raises:
            EngineStateError: an engine has no whole weights; nothing was paused.
            CoverageError: checkpoint and engines are not of one model.
            CkptError: anything else; its text says what engines do now.
        """
        for member in self._fleet.members:
            _check_whole(member)
        start = time.perf_counter()
        try:
            self._look()
        except Exception as error:  # noqa: BLE001 told, in a class of ours
            self._leave(describe(error))
            told = self._told(error)
            raise told from (error.__cause__ if told is error else error)
        except BaseException:
            self._leave("interrupted")
            raise
        if errors := self._leave(_OVER):
            raise self._told(errors[0])
        self.pause_s = time.perf_counter() - start

    def check_fit(self) -> None:
        """Raise CoverageError where the checkpoint is not of the engines' model, or lacks something that they need."""
        fits = {self.boarding.name(self.boarding.hellos[peer]): held.fit for peer, held in self.held.items()}
        layouts = {name: fit for name, fit in fits.items() if fit is not None}
        check_coverage(layouts, allow_missing=True, allow_unexpected=True)
        for name, fit in layouts.items():
            if fit.missing:
                raise CoverageError(
                    f"{name}: expected all tensors that it needs, got none for {len(fit.missing)}, e.g. {fit.missing[0]!r:.200}; "
                    "name the whole checkpoint that it was started with"
                )

    def _look(self) -> None:
        self._fleet.pause(self._config.pause_mode)
        self._watch_agents()
        self.boarding.board()
        manifest = self._content.structure if self._content is not None else None
        ask = wire.AskHeld(manifest=manifest)
        held = self._talk.ask(
            dict.fromkeys(self.boarding.hellos, ask), wire.HeldSlices, timeout_s=self._config.transfer_timeout_s
        )
        self.held = {peer: held[peer] for peer in self.boarding.hellos}
        digests = self._digests(manifest) if manifest is not None else dict.fromkeys(self.held, b"")
        asks = {peer: wire.CompareHeld(digests=digests[peer]) for peer in self.held}
        compared = self._talk.ask(asks, wire.Compared, timeout_s=self._config.transfer_timeout_s)
        self.compared = {peer: compared[peer] for peer in self.held}
        if self._content is not None:
            self._content.check_again()

    def _watch_agents(self) -> None:
        if self._content is not None:
            self._content.agents.check_alive()
            self._talk.watches.append(self._content.agents.check_replaced)

    def _digests(self, manifest: Manifest) -> dict[bytes, bytes]:
        """What each rank is to compare with."""
        assert self._content is not None, "there is a manifest"
        parts = PlanParts(manifest)
        for peer, held in self.held.items():
            _check_parts(held, manifest, self.boarding.name(self.boarding.hellos[peer]))
            parts.add_parts(held.parts)
        digests = self._content.digests_of(parts)
        return {peer: parts.of_rank(rank, digests)[0] for rank, peer in enumerate(self.held)}

    def _leave(self, cause: str) -> list[Exception]:
        """Everybody is told, attach calls come back, engines serve again that did. What of it failed."""
        self._talk.watches.clear()
        farewell = wire.Abort(cause=cause)
        self._talk.turn_away(farewell)
        hellos = self.boarding.hellos
        for peer in hellos:
            self._talk.tell(peer, farewell)
        ended = self._talk.gather(dict.fromkeys(hellos, wire.Aborted), timeout_s=_LAST_WORDS_S, patient=True)
        silent = {hello.endpoint_index for peer, hello in hellos.items() if peer not in ended}
        urls = [member.endpoint.url for index, member in enumerate(self._fleet.members) if index not in silent]
        self._talk.idle_until(lambda: self._fleet.detach(0.0), timeout_s=self._config.commit_timeout_s)
        return [*_failed(self.boarding.leave), *_failed(lambda: self._fleet.resume(None, only=urls))]

    def _told(self, error: Exception) -> CkptError:
        """The error, and what engines do now."""
        states = ", ".join(f"{member.endpoint.url} is {_state_of(member)}" for member in self._fleet.members)
        text = f"{error or type(error).__name__}; the look wrote nothing: {states}"
        if not isinstance(error, CkptError):
            return EngineError(f"{type(error).__name__}: {text}")
        error.args = (text,)
        return error


def _check_whole(member: Member) -> None:
    assert member.status is not None, "check the fleet first"
    if member.status.state not in _LOOKED_AT:
        raise EngineStateError(
            f"{member.endpoint} is {member.status.state.value} ({member.status.detail}), expected serving or paused; update it, "
            "then look at it"
        )


def _check_parts(held: wire.HeldSlices, manifest: Manifest, name: str) -> None:
    """Raise WireError where a rank names a part of what is not there."""
    for part in held.parts:
        if not 0 <= part.tensor < len(manifest.tensors):
            raise WireError(f"{name}: expected a tensor below {len(manifest.tensors)}, got {part.tensor}")
        shape = manifest.tensors[part.tensor].shape
        if part.box is not None and not part.box.fits(shape):
            raise WireError(f"{name}: expected a part of a tensor of shape {list(shape)}, got {part.box}")


def _state_of(member: Member) -> str:
    try:
        return str(member.plugin.hook.ckpt_ready(endpoint=member.endpoint).state.value)
    except Exception as error:  # noqa: BLE001 whatever it is, nobody can tell
        _log.info("%s does not tell its state: %s", member.endpoint, error)
        return "not to be reached"


def _failed(call: Callable[[], None]) -> list[Exception]:
    """A step of the way out must not stop the next one."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 told
        return [error]
    return []
