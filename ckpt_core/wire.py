"""Messages between controller, agents and ranks: a closed, typed, versioned schema in MessagePack. No pickle.

Every frame is one `Envelope`. Who receives it checks protocol version, token, sequence number and size before anything of
the body is decoded. What the body holds is decided by lengths in it, and these are checked against its bytes first.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection

import msgspec

from ckpt_core.contract import AbortOutcome, RankInfo
from ckpt_core.errors import CkptError, WireError
from ckpt_core.layout import Box, Layout
from ckpt_core.manifest import Manifest
from ckpt_core.plan import Plan
from ckpt_core.relay import Relay
from ckpt_core.source import SourceIndex
from ckpt_core.stats import AgentStats, RankStats

PROTOCOL_VERSION = 7
MAX_MESSAGE_BYTES = 512 << 20  # a plan of a trillion parameters in 140,000 tensors takes some 30 MB
MAX_REPLY_BYTES = 128 << 20  # to the controller go layouts, digests and traces, which are smaller than plans
MAX_SMALL_BYTES = 1 << 20


class ProcessInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process runs: enough to see whether two can share memory or are the same host, and to watch it die."""

    boot_id: str
    pid: int
    uid: int
    pid_namespace: str
    ipc_namespace: str
    net_namespace: str
    host: str


class RingOffer(msgspec.Struct, frozen=True, kw_only=True):
    """How to map the ring of one agent.

    Attributes:
        owner: index of the agent.
        device: "cpu", or the UUID of the accelerator that holds the ring.
        handle: path of the shared memory file, or the driver's IPC handle in hex.
        size_bytes: of the ring.
        control_path: shared memory file with the sequence numbers.
    """

    owner: int
    device: str
    handle: str
    size_bytes: int
    control_path: str


class RingSet(msgspec.Struct, frozen=True, kw_only=True):
    """The rings of all agents, as offered to one rank.

    Attributes:
        offers: by agent.
        receiver: the rank's place among their readers, which is its index in the plan.
        receivers: how many readers there are.
    """

    offers: tuple[RingOffer, ...]
    receiver: int
    receivers: int


class PartOf(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A tensor of a manifest, by its index, or a box of it."""

    tensor: int
    box: Box | None


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """How an agent connects to agents of other hosts.

    Attributes:
        agent: its number among those of all hosts.
        secret: of the update, 32 hex digits.
        ports: host:port of those it sends to, in the order of its relay's outlets.
    """

    agent: int
    secret: str
    ports: tuple[str, ...]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that travels."""


# -- both ways -------------------------------------------------------------------------------------------------------
class Failure(Message, frozen=True, kw_only=True):
    """The sender failed. `error` is the name of the exception class, `phase` what it was doing."""

    error: str
    message: str
    phase: str
    traceback: str = ""


# -- controller to everybody -------------------------------------------------------------------------------------------
class Ping(Message, frozen=True, kw_only=True):
    """The controller is alive."""


class Abort(Message, frozen=True, kw_only=True):
    """End the update; go back to what can be gone back to."""

    cause: str


# -- controller to ranks -------------------------------------------------------------------------------------------------
class MapRings(Message, frozen=True, kw_only=True):
    """Begin to map these rings; nobody waits for it. The first mapping between two processes takes the driver 15 to 30 ms."""

    rings: RingSet


class AskLayout(Message, frozen=True, kw_only=True):
    """Which slices of this checkpoint do you need?

    Attributes:
        replay: ask for recorded slices, and write them straight into parameters, where that was proved.
    """

    manifest: Manifest
    replay: bool = True


class OfferPlan(Message, frozen=True, kw_only=True):
    """Map the rings, check the plan, and say whether you agree to it.

    Attributes:
        plan: None for the one that the rank knows from its last update.
    """

    plan: Plan | None
    rings: RingSet
    update_id: str
    version: str
    digest: str
    verify: str
    fingerprint: bool
    transfer_timeout_s: float
    trace: bool = False
    snapshot: bool = False


class Begin(Message, frozen=True, kw_only=True):
    """All ranks agreed: load.

    Attributes:
        parts: by bucket, digests of what this rank takes of it, see `parts.parts_of`; little-endian. Empty to compare none.
    """

    parts: dict[int, bytes] = msgspec.field(default_factory=dict)


class Commit(Message, frozen=True, kw_only=True):
    """All ranks verified: these are the weights now."""

    version: str
    digest: str


class AskHeld(Message, frozen=True, kw_only=True):
    """A look, in place of an update: which slices of this checkpoint do you hold just as they are in it?

    Attributes:
        manifest: None to tell a fingerprint and nothing else.
    """

    manifest: Manifest | None


class CompareHeld(Message, frozen=True, kw_only=True):
    """What you hold should have these digests: of the parts that you named, in their order; little-endian."""

    digests: bytes


# -- ranks to controller ---------------------------------------------------------------------------------------------------
class RankHello(Message, frozen=True, kw_only=True):
    """First word of a rank. `known_plan` is the digest of the plan of its last update, "" for none."""

    endpoint_index: int
    rank: RankInfo
    process: ProcessInfo
    known_plan: str = ""


class LayoutReply(Message, frozen=True, kw_only=True):
    """Answer to AskLayout."""

    layout: Layout


class PlanAgreed(Message, frozen=True, kw_only=True):
    """The plan with this digest is safe, and every ring is mapped."""

    digest: str


class Progress(Message, frozen=True, kw_only=True):
    """Bytes of the plan that this rank is done with."""

    done_bytes: int


class Verified(Message, frozen=True, kw_only=True):
    """Loaded, finished, and proved as far as asked. `fingerprint` digests the live weights ("" where not asked)."""

    stats: RankStats
    fingerprint: str


class Committed(Message, frozen=True, kw_only=True):
    """The commit was taken."""


class Aborted(Message, frozen=True, kw_only=True):
    """The update was undone as far as the engine can."""

    outcome: AbortOutcome


class HeldSlices(Message, frozen=True, kw_only=True):
    """Answer to AskHeld.

    Attributes:
        parts: that live parameters hold as they are in the checkpoint.
        unchecked, unchecked_bytes: tensors that the loader takes and nobody can compare, and how much it takes of them.
        fit: what of checkpoint and engine does not fit each other; no entries.
        why: nothing can be compared at all, and this is the reason; "" else.
    """

    parts: tuple[PartOf, ...]
    unchecked: tuple[str, ...] = ()
    unchecked_bytes: int = 0
    fit: Layout | None = None
    why: str = ""


class Compared(Message, frozen=True, kw_only=True):
    """Answer to CompareHeld.

    Attributes:
        differing: tensors that live otherwise: the first few of so many.
        fingerprint: of all live weights; "" where the plugin does not show them.
    """

    equal_bytes: int = 0
    differing_bytes: int = 0
    differing: tuple[str, ...] = ()
    differing_count: int = 0
    fingerprint: str = ""


# -- controller to agents --------------------------------------------------------------------------------------------------
class Prepare(Message, frozen=True, kw_only=True):
    """Map the files of this checkpoint; digest these parts of it, and then these tensors.

    Parts come first: what changes between the two is then not what the tensors' digests say, and ranks see that.

    Attributes:
        holds: tensors that this agent's host has to read; None for all.
    """

    index: SourceIndex
    digest: tuple[str, ...]
    holds: tuple[str, ...] | None = None
    parts: tuple[PartOf, ...] = ()


class OpenRing(Message, frozen=True, kw_only=True):
    """Make a ring of that size for at most that many readers. An open one stays until all ranks agreed to the new one."""

    size_bytes: int
    receivers: int


class TakePlan(Message, frozen=True, kw_only=True):
    """Send by this plan, which must be for the checkpoint you prepared; None for the plan and relay of last time.

    Attributes:
        relay: what goes between hosts.
        links: None where there is one host.
    """

    plan: Plan | None
    relay: Relay | None = None
    links: Links | None = None


class Send(Message, frozen=True, kw_only=True):
    """Send your buckets of the plan that you took, through the last ring opened; with `trace`, record when each was copied."""

    timeout_s: float
    trace: bool = False


class Stop(Message, frozen=True, kw_only=True):
    """End the process."""


# -- agents to controller --------------------------------------------------------------------------------------------------
class AgentHello(Message, frozen=True, kw_only=True):
    """First word of an agent.

    Attributes:
        agent, count: which of its host's agents it is, and of how many.
        address: where agents of other hosts reach it; "" where there are none.
        nic_gb_s: what its host's network carries, GB/s; 0 where nobody said.
    """

    agent: int
    process: ProcessInfo
    count: int = 1
    address: str = ""
    nic_gb_s: float = 0.0


class Prepared(Message, frozen=True, kw_only=True):
    """Answer to Prepare: content digests by tensor name, those of parts as in Begin, and what was newly page-locked."""

    digests: dict[str, str]
    parts: bytes = b""
    digest_s: float
    locked_bytes: int
    lock_s: float


class RingOpened(Message, frozen=True, kw_only=True):
    """Answer to OpenRing. `port` is where agents of other hosts connect to, host:port."""

    offer: RingOffer
    port: str = ""


class PlanTaken(Message, frozen=True, kw_only=True):
    """Answer to TakePlan: the plan with this digest fits checkpoint and ring."""

    digest: str


class Sent(Message, frozen=True, kw_only=True):
    """Every bucket was published and read."""

    stats: AgentStats


class RingClosed(Message, frozen=True, kw_only=True):
    """An agent's answer to Abort: its ring is given back, or there was none."""


AnyMessage = (
    Failure
    | Ping
    | Abort
    | MapRings
    | AskLayout
    | OfferPlan
    | Begin
    | Commit
    | AskHeld
    | CompareHeld
    | RankHello
    | LayoutReply
    | PlanAgreed
    | Progress
    | Verified
    | Committed
    | Aborted
    | HeldSlices
    | Compared
    | Prepare
    | OpenRing
    | TakePlan
    | Send
    | Stop
    | AgentHello
    | Prepared
    | RingOpened
    | PlanTaken
    | Sent
    | RingClosed
)


# These grow with the checkpoint. All others are small, whatever is updated.
LARGE_ASKS = (AskLayout, OfferPlan, AskHeld, CompareHeld, Prepare, TakePlan)
LARGE_REPLIES = (LayoutReply, Verified, HeldSlices, Prepared, Sent)
_ASK_TAGS = frozenset(kind.__name__ for kind in LARGE_ASKS)
_REPLY_TAGS = frozenset(kind.__name__ for kind in LARGE_REPLIES)


class Envelope(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One frame. `seq` counts from 1 per sender and connection."""

    protocol: int
    token: str
    seq: int
    body: AnyMessage


class _Sealed(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """An Envelope of which the body is not decoded yet, only walked over: no length in it goes beyond its bytes."""

    protocol: int
    token: str
    seq: int
    body: msgspec.Raw


class _Tag(msgspec.Struct, frozen=True, kw_only=True):
    """What kind of body it is."""

    type: str


_encoder = msgspec.msgpack.Encoder()
_sealed_decoder = msgspec.msgpack.Decoder(_Sealed)
_tag_decoder = msgspec.msgpack.Decoder(_Tag)
_body_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(body: AnyMessage, *, token: str, seq: int) -> bytes:
    """One frame for a message."""
    try:
        frame = _encoder.encode(Envelope(protocol=PROTOCOL_VERSION, token=token, seq=seq, body=body))
    except UnicodeEncodeError as error:
        raise WireError(
            f"a {type(body).__name__} holds text that is no UTF-8 ({error}); rename the file or tensor"
        ) from error
    if len(frame) > (limit := _limit_of(type(body).__name__)):
        raise WireError(f"a {type(body).__name__} of {len(frame)} bytes exceeds the limit of {limit}")
    return frame


def decode(frame: bytes, *, tokens: Collection[str], last_seq: int) -> Envelope:
    """Decode and check one frame, which must carry one of the tokens.

    Raises:
        WireError: too large, not in the schema, another protocol version, wrong token, or out of sequence.
    """
    if len(frame) > MAX_MESSAGE_BYTES:
        raise WireError(f"a frame of {len(frame)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    try:
        envelope = _sealed_decoder.decode(frame)
    except _NOT_IN_SCHEMA as error:
        raise WireError(f"a frame of {len(frame)} bytes is not in the schema: {error}") from error
    if envelope.protocol != PROTOCOL_VERSION:
        raise WireError(
            f"the peer speaks protocol {envelope.protocol}, this side {PROTOCOL_VERSION}; install the same "
            "ckpt-core on both"
        )
    if not any(hmac.compare_digest(envelope.token.encode(), token.encode()) for token in tokens):
        raise WireError("a frame carries a wrong token; it is not from this update")
    if envelope.seq != last_seq + 1:
        raise WireError(f"expected frame {last_seq + 1}, got {envelope.seq}; frames were lost or repeated")
    body = _decode_body(envelope.body, len(frame))
    return Envelope(protocol=envelope.protocol, token=envelope.token, seq=envelope.seq, body=body)


_NOT_IN_SCHEMA = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, CkptError)


def _decode_body(raw: msgspec.Raw, size_bytes: int) -> AnyMessage:
    try:
        if size_bytes > MAX_SMALL_BYTES and size_bytes > (limit := _limit_of(tag := _tag_decoder.decode(raw).type)):
            raise WireError(f"a {tag!r:.50} of {size_bytes} bytes exceeds the limit of {limit}")
        return _body_decoder.decode(raw)
    except WireError:
        raise
    except _NOT_IN_SCHEMA as error:
        raise WireError(f"a frame of {size_bytes} bytes is not in the schema: {error}") from error


def _limit_of(tag: str) -> int:
    limit = MAX_MESSAGE_BYTES if tag in _ASK_TAGS else MAX_REPLY_BYTES if tag in _REPLY_TAGS else MAX_SMALL_BYTES
    return min(limit, MAX_MESSAGE_BYTES)
