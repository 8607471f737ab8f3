"""The data that hooks take and return: what the core and a plugin tell each other.

Nothing here imports torch or an engine: `ckpt engines` reads it on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from ckpt_core.capability import UNKNOWN, Capability, Support

if TYPE_CHECKING:
    import torch

    from ckpt_core.layout import Box

# Raised by one when a plugin that kept the contract would no longer keep it. What may change without: conformance/README.md.
CONTRACT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a plugin says of itself and its engine, in any process and without importing the engine.

    Attributes:
        name: the entry point's name, e.g. "vllm".
        plugin_version: version of the plugin.
        engine_version: installed version of the engine, or None where it is not installed.
        capabilities: a level for each capability the plugin knows about; the others are UNKNOWN.
        contract: CONTRACT_VERSION that the plugin was written for, as a number and not as that name.
    """

    name: str
    plugin_version: str
    engine_version: str | None
    capabilities: Mapping[Capability, Support]
    contract: int = 1

    def support(self, capability: Capability) -> Support:
        """Level of one capability."""
        return self.capabilities.get(capability, UNKNOWN)


class DeviceKind(Enum):
    """Where live weights are."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """Who a rank of an engine is. The core adds host, process and namespace facts by itself.

    Attributes:
        instance_id: one per engine start, the same on all its ranks; a restarted engine has another one.
        device_kind, device_index: where the live weights are, as torch counts in this process.
        device_uuid: hardware UUID of the accelerator; on CPU any string unique per rank of the instance.
        rank, world_size: position among all ranks of the engine instance.
        tp_rank .. dp_size: coordinates in each kind of parallelism.
    """

    instance_id: str
    device_kind: DeviceKind
    device_index: int
    device_uuid: str
    rank: int
    world_size: int
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One attempt to move engines to a checkpoint, as hooks see it.

    Attributes:
        update_id: unique per attempt.
        version: label of the checkpoint.
        digest: content digest of the checkpoint (hex), which the label is bound to.
        expected: names that will arrive.
        partial: only some of the engine's tensors arrive through `ckpt_load`; the others stay, or are replayed.
        replayed: names that the core itself writes between begin and finish, straight into live parameters. What they leave
            in an abort the core knows; in finish they count as loaded.
    """

    update_id: str
    version: str
    digest: str
    expected: frozenset[str]
    partial: bool = False
    replayed: frozenset[str] = frozenset()


class LoadTensor:
    """One tensor, or a box of one, in a bucket.

    Attributes:
        name: its name in the checkpoint.
        box: which part of the checkpoint tensor this is; None for the whole.
        tensor: on the rank's device, of the box's shape and the checkpoint's dtype, contiguous. A view of the ring: valid
            until the hook returns. Made when it is asked for, which is not free: ask once.
    """

    __slots__ = ("_tensor", "box", "name")

    def __init__(self, *, name: str, tensor: torch.Tensor | None = None, box: Box | None = None) -> None:
        self.name = name
        self.box = box
        self._tensor = tensor

    @property
    def tensor(self) -> torch.Tensor:
        """See the class."""
        assert self._tensor is not None, "made without data"
        return self._tensor

    def strided(self, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
        """Elements of `tensor`, counted from its first, as `torch.as_strided` takes them: in one step."""
        whole = self.tensor
        return whole.as_strided(size, stride, int(whole.storage_offset()) + offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBucket:
    """What one call of `ckpt_load` gets. `index` counts from 0; order is the same on every rank."""

    index: int
    tensors: tuple[LoadTensor, ...]

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, as engines' `load_weights` take them.

        Raises:
            ValueError: a tensor is only a part; the plugin declared it can take parts, so it must look at `box`.
        """
        for item in self.tensors:
            if item.box is not None:
                raise ValueError(f"tensor {item.name!r} arrived in parts; use bucket.tensors and look at box")
            yield item.name, item.tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What the engine did with a bucket.

    Attributes:
        loaded: checkpoint names that were written into parameters or kept for it.
        ignored: checkpoint names that this rank has no use for (another stage's, a tied head).
        retained_bytes: bytes cloned because the engine keeps them until a module is complete.
    """

    loaded: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    retained_bytes: int = 0


class AbortOutcome(Enum):
    """What an aborted update left in this rank.

    UNTOUCHED: no parameter was written. RELOADABLE: parameters are mixed, and a new update repairs them.
    POISONED: mixed, and the engine must be restarted or proved right before it may serve. RESTORED: the core wrote a snapshot
    back and compared it; no plugin returns it.
    """

    UNTOUCHED = "untouched"
    RELOADABLE = "reloadable"
    RESTORED = "restored"
    POISONED = "poisoned"


class LiveState(Enum):
    """PURE: the bits are those of checkpoint slices. PROCESSED: the engine made them from such (quantised, packed)."""

    PURE = "pure"
    PROCESSED = "processed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTensor:
    """A live parameter, buffer or derived tensor of a rank. The tensor is the live storage, not a copy."""

    tensor: torch.Tensor
    state: LiveState


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingTarget:
    """A model to record a loader on, and the live one that updates may be replayed into.

    Attributes:
        model: has parameters of the names and shapes that the loader wants. Nothing is written to them: they may be the live ones.
        load: takes an iterable of (name, tensor) like the engine's own loader.
        live: the torch module that serves; the same names.
        excluded: modules whose parameters are not as they were loaded (packed, quantised), by path, with the reason.
        caches: attributes of modules that hold no weights.
        placement: changes whenever the engine moves parts of the model (experts) to other ranks.
        thin: give the loader tensors that own copies of the slices it takes and nothing else, for an engine that keeps what it
            is given until a module is complete. They are good for views and copies, beyond the hook.
    """

    model: Any
    load: Callable[[Any], Any]
    live: Any
    excluded: Mapping[str, str] = field(default_factory=dict)
    caches: frozenset[str] = frozenset()
    placement: str = ""
    thin: bool = False


class EndpointState(Enum):
    """What an engine instance is doing, as seen from outside."""

    SERVING = "serving"
    PAUSED = "paused"
    ASLEEP = "asleep"
    UPDATING = "updating"
    WAITING_FOR_WEIGHTS = "waiting_for_weights"
    POISONED = "poisoned"
    STARTING = "starting"
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointStatus:
    """Answer of `ckpt_ready`.

    Attributes:
        engine: name the server gives itself; compared with the plugin's.
        state: what it does now.
        world_size: number of ranks that will dial in when attached.
        device_kind: where its weights are.
        instance_id: see RankInfo; empty where the engine does not tell.
        version: version it serves; empty where it does not know.
        device_uuids: accelerators of its ranks, by rank; empty on CPU, and where it does not tell before attach.
        detail: one line for people, e.g. why it is not ready.
    """

    engine: str
    state: EndpointState
    world_size: int
    device_kind: DeviceKind
    instance_id: str = ""
    version: str = ""
    device_uuids: tuple[str, ...] = ()
    detail: str = ""


class PauseMode(Enum):
    """What happens to requests in flight. abort: they end; wait: they finish first; keep: they freeze and go on
    with their cache; retract: they lose their cache and are computed again; in_place: as keep, at once."""

    ABORT = "abort"
    WAIT = "wait"
    KEEP = "keep"
    RETRACT = "retract"
    IN_PLACE = "in_place"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """All that an attach call carries: where to dial in, and the proof that one was asked.

    Attributes:
        address: ZeroMQ address of the controller.
        token: secret of this update.
        update_id: of this update.
        silence_timeout_s: without a word from the controller for this long, the rank aborts by itself.
        lifetime_s: the longest that the whole attach call may take.
        endpoint_index: which endpoint of the update this engine instance is.
        server_key: the controller's public key, where address is of another host; "" on one host.
    """

    address: str
    token: str
    update_id: str
    silence_timeout_s: float
    lifetime_s: float = 3600.0
    endpoint_index: int = 0
    server_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachResult:
    """What the blocking attach call returns on each rank. Informational: outcomes travel on the update's socket."""

    rank: int
    outcome: str
    error: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
