"""What the server and its rank processes say to each other over pipes: a command, a reply, msgpack."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ckpt_core.contract import Rendezvous


class StepItem(msgspec.Struct, frozen=True, kw_only=True):
    """Work of one sequence in one step.

    Attributes:
        sequence_id: unique in the engine's life.
        token_ids: the whole sequence so far where `prefill`, else its newest token.
        prefill: start the sequence anew, with what the prefix cache has of it.
    """

    sequence_id: int
    token_ids: list[int]
    prefill: bool = False


class Step(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Compute one token of each sequence."""

    items: list[StepItem]


class Free(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget sequences."""

    sequence_ids: list[int]


class SetPaused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The scheduler stopped, or goes on."""

    paused: bool


class FlushCache(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Drop the prefix cache."""


class Sleep(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Free weights and caches."""


class Wake(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Allocate what the tags name."""

    tags: list[str]


class Attach(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Take part in an update; the reply comes when it is over."""

    rendezvous: Rendezvous


class Digest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Digest every live tensor."""


class Exit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End the process."""


Command: TypeAlias = Step | Free | SetPaused | FlushCache | Sleep | Wake | Attach | Digest | Exit


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to any command, and the first word of a rank.

    Attributes:
        error: empty where the command was carried out, else a message for people.
        refused: the error is a refusal in the present state: nothing was changed and the rank goes on.
        token_ids: of a step, in the order of its items.
        digests: of live tensors, by name.
        outcome, attach_error: of an attach (see contract.AttachResult).
        state, detail, version, asleep, device_uuid: of the worker after the command.
    """

    error: str = ""
    refused: bool = False
    token_ids: list[int] = []
    digests: dict[str, str] = {}
    outcome: str = ""
    attach_error: str = ""
    state: str = ""
    detail: str = ""
    version: str = ""
    asleep: list[str] = []
    device_uuid: str = ""
