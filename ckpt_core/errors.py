"""Every error a user can meet.

::

    CkptError
    |- ConfigError              an option or the environment is wrong
    |- ManifestError            the checkpoint itself is wrong: files, headers, names, shapes, dtypes
    |- PlanError                no plan can be made
    |  `- CapacityError         memory is too short even for one slot
    |- PluginError              the plugin is wrong
    |  |- PluginNotFound
    |  |- PluginIncompatible
    |  `- CapabilityMismatch    a capability is claimed without its hook
    |- TransportError           bytes did not move
    |  |- RendezvousTimeout     somebody did not come in time
    |  |- TransferTimeout       a slot was not filled or freed in time
    |  `- PeerLost              a process went away
    |- WireError                a message is not in the schema, too large, or not for this update
    |- EngineError              the engine refused or failed
    |  |- EngineUnavailable     nothing answers, or it is not ready
    |  |- EngineStateError      asleep, updating, poisoned, not paused: the call came at the wrong time
    |  `- HookFailed            a hook raised in the engine's process; carries the remote traceback
    |- CoverageError            tensors missing, unknown, repeated, or of the wrong shape or dtype
    |- VerificationError        the bits that arrived are not the bits that were sent
    `- UpdateAborted            the update ended without a commit; `.outcome` says what the engines hold now

Messages name the rank, the engine, the tensor, what was expected and what was got, and end with what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum


class CkptError(Exception):
    """Base of all errors of this project. `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(CkptError):
    """An option or an environment variable is wrong; nothing was started."""

    exit_code = 2


class ManifestError(CkptError):
    """The checkpoint cannot be used as it is; no engine was touched."""

    exit_code = 3


class PlanError(CkptError):
    """No plan satisfies the constraints."""

    exit_code = 4


class CapacityError(PlanError):
    """Memory is too short even for a ring of one slot."""


class PluginError(CkptError):
    """A plugin does not keep the contract."""

    exit_code = 5


class PluginNotFound(PluginError):
    """No installed plugin has that engine name."""


class PluginIncompatible(PluginError):
    """The plugin's hooks do not match the specification."""


class CapabilityMismatch(PluginError):
    """A capability is claimed without the hook it needs."""


class TransportError(CkptError):
    """Bytes did not move."""

    exit_code = 6


class RendezvousTimeout(TransportError):
    """A rank or an agent did not dial in before the deadline."""


class TransferTimeout(TransportError):
    """A slot was not published or not freed before the deadline."""


class PeerLost(TransportError):
    """A process of the update went away."""


class WireError(CkptError):
    """A message does not fit the schema, is too large, or carries a wrong token."""

    exit_code = 6


class EngineError(CkptError):
    """The engine refused or failed."""

    exit_code = 7


class EngineUnavailable(EngineError):
    """Nothing answers at the endpoint, or it is not that engine, or it is not up yet."""


class EngineStateError(EngineError):
    """The engine is in a state in which this call is refused; nothing was changed."""


class HookFailed(EngineError):
    """A hook raised inside the engine. `remote_traceback` is the text from that process."""

    def __init__(self, message: str, *, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback


class CoverageError(CkptError):
    """The checkpoint and the engine's parameters do not fit each other; nothing was touched."""

    exit_code = 3


class VerificationError(CkptError):
    """What arrived is not what was sent."""

    exit_code = 8


class Outcome(Enum):
    """What an update left behind (DESIGN section 9). Orchestrators branch on this and on nothing else."""

    COMMITTED = "committed"
    CLEAN = "clean"
    RESTORED = "restored"
    POISONED = "poisoned"


class UpdateAborted(CkptError):
    """The update ended without a commit on every rank.

    Attributes:
        outcome: CLEAN, RESTORED or POISONED, the worst of all engines.
        by_endpoint: the same per engine; COMMITTED where only others failed to commit.
        causes: what led to it, first cause first.
    """

    def __init__(
        self,
        message: str,
        *,
        outcome: Outcome,
        by_endpoint: Mapping[str, Outcome] | None = None,
        causes: Sequence[BaseException] = (),
    ) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.by_endpoint = dict(by_endpoint or {})
        self.causes = tuple(causes)

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """10, 11 or 12 for CLEAN, RESTORED and POISONED."""
        return _EXIT_CODE_OF[self.outcome]


_EXIT_CODE_OF = {Outcome.COMMITTED: 0, Outcome.CLEAN: 10, Outcome.RESTORED: 11, Outcome.POISONED: 12}
