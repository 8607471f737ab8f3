"""The ranks of all engines dial in, each once, and leave again."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from ckpt_core import wire
from ckpt_core.config import UpdateConfig
from ckpt_core.contract import Rendezvous
from ckpt_core.conversation import Conversation
from ckpt_core.errors import EngineStateError
from ckpt_core.fleet import Fleet


class Boarding:
    """Of one update, or one look at engines.

    Attributes:
        hellos: by peer, in the order of endpoints and ranks, once all came; as they come where that fails.
    """

    def __init__(self, *, fleet: Fleet, conversation: Conversation, config: UpdateConfig, update_id: str) -> None:
        self._fleet = fleet
        self._talk = conversation
        self._config = config
        self._update_id = update_id
        self._token = secrets.token_hex(16)
        self.hellos: dict[bytes, wire.RankHello] = {}

    def board(self) -> None:
        """Call all engines, wait for all ranks, and watch their processes from then on.

        Raises:
            RendezvousTimeout: not all came.
            EngineStateError: others came than the engines' status says.
        """
        count = sum(member.world_size for member in self._fleet.members)
        self._talk.listen_to(self._token)
        self._talk.watches.append(self._fleet.check_attached)
        self._fleet.attach(self._rendezvous)
        timeout_s = self._config.attach_timeout_s
        self._talk.admit(wire.RankHello, count, timeout_s=timeout_s, who="rank", into=self.hellos)
        in_order = sorted(self.hellos.items(), key=lambda item: _order(item[1]))
        self.hellos.clear()
        self.hellos.update(in_order)
        self._check()
        for peer, hello in self.hellos.items():
            self._talk.introduce(peer, hello.process, self.name(hello))

    def leave(self) -> None:
        """Attach calls came back, ranks have unmapped all rings, the token is worthless.

        Raises:
            EngineStateError: a call did not come back.
        """
        try:
            in_time = self._fleet.detach(self._config.commit_timeout_s)
        finally:
            self._talk.dismiss(self.hellos, self._token)
        if not in_time:
            raise EngineStateError(
                "an attach call did not come back although its ranks are done; the engine may hang: look into its log"
            )

    def name(self, hello: wire.RankHello) -> str:
        """How to call a rank."""
        return f"rank {hello.rank.rank} of {self._fleet.members[hello.endpoint_index].endpoint}"

    def by_endpoint(self, value: Callable[[bytes, wire.RankHello], str]) -> dict[str, tuple[str, ...]]:
        """Something of every rank, by URL of its engine."""
        found: dict[str, list[str]] = {member.endpoint.url: [] for member in self._fleet.members}
        urls = list(found)
        for peer, hello in self.hellos.items():
            found[urls[hello.endpoint_index]].append(value(peer, hello))
        return {url: tuple(values) for url, values in found.items()}

    def _check(self) -> None:
        """Every rank of every engine, each once."""
        members = self._fleet.members
        found = [_order(hello) for hello in self.hellos.values()]
        expected = [(index, rank) for index, member in enumerate(members) for rank in range(member.world_size)]
        sizes = all(
            hello.rank.world_size == members[hello.endpoint_index].world_size
            for hello in self.hellos.values()
            if 0 <= hello.endpoint_index < len(members)
        )
        if found != expected or not sizes:
            raise EngineStateError(
                f"expected ranks (endpoint, rank) {expected} to dial in, got {found}; the engine's status and its ranks "
                "disagree about its size: mend the plugin"
            )

    def _rendezvous(self, endpoint_index: int) -> Rendezvous:
        config = self._config
        return Rendezvous(
            address=self._talk.address,
            token=self._token,
            update_id=self._update_id,
            silence_timeout_s=config.silence_timeout_s,
            lifetime_s=3 * config.attach_timeout_s + config.transfer_timeout_s + 2 * config.commit_timeout_s,
            endpoint_index=endpoint_index,
            server_key=self._talk.server_key,
        )


def _order(hello: wire.RankHello) -> tuple[int, int]:
    return hello.endpoint_index, hello.rank.rank
