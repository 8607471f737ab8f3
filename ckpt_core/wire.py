"""Messages between controller, agents and ranks: a closed, typed, versioned schema in MessagePack. No pickle.

Every frame is one `Envelope`. Who receives it checks protocol version, token and sequence number before looking at
the body, and refuses what is too large before decoding it.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection

import msgspec

from ckpt_core.contract import AbortOutcome, RankInfo
from ckpt_core.errors import CkptError, WireError
from ckpt_core.layout import Layout
from ckpt_core.manifest import Manifest
from ckpt_core.plan import Plan
from ckpt_core.relay import Relay
from ckpt_core.source import SourceIndex
from ckpt_core.stats import AgentStats, RankStats

PROTOCOL_VERSION = 6
MAX_MESSAGE_BYTES = 512 << 20  # a plan of a trillion parameters in 140,000 tensors takes some 30 MB


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
        replay: write recorded slices straight into parameters, where that was proved.
        slices: ask for these slices only; else for whole tensors, whose digests can be compared.
    """

    manifest: Manifest
    replay: bool = True
    slices: bool = True


class OfferPlan(Message, frozen=True, kw_only=True):
    """Map the rings, check the plan, and say whether you agree to it.

    Attributes:
        plan: None for the one that the rank knows from its last update.
        digests: content of the checkpoint's tensors, in the order of its manifest; empty where none are to be compared.
    """

    plan: Plan | None
    digests: tuple[str, ...]
    rings: RingSet
    update_id: str
    version: str
    digest: str
    verify: str
    fingerprint: bool
    transfer_timeout_s: float
    trace: bool = False


class Begin(Message, frozen=True, kw_only=True):
    """All ranks agreed: load."""


class Commit(Message, frozen=True, kw_only=True):
    """All ranks verified: these are the weights now."""

    version: str
    digest: str


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


# -- controller to agents --------------------------------------------------------------------------------------------------
class Prepare(Message, frozen=True, kw_only=True):
    """Map the files of this checkpoint and digest these tensors of it.

    Attributes:
        holds: tensors that this agent's host has to read; None for all.
    """

    index: SourceIndex
    digest: tuple[str, ...]
    holds: tuple[str, ...] | None = None


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
    """Answer to Prepare: content digests by tensor name, and what was newly page-locked."""

    digests: dict[str, str]
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
    | RankHello
    | LayoutReply
    | PlanAgreed
    | Progress
    | Verified
    | Committed
    | Aborted
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


class Envelope(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One frame. `seq` counts from 1 per sender and connection."""

    protocol: int
    token: str
    seq: int
    body: AnyMessage


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def encode(body: AnyMessage, *, token: str, seq: int) -> bytes:
    """One frame for a message."""
    try:
        frame = _encoder.encode(Envelope(protocol=PROTOCOL_VERSION, token=token, seq=seq, body=body))
    except UnicodeEncodeError as error:
        raise WireError(
            f"a {type(body).__name__} holds text that is no UTF-8 ({error}); rename the file or tensor"
        ) from error
    if len(frame) > MAX_MESSAGE_BYTES:
        raise WireError(f"a {type(body).__name__} of {len(frame)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    return frame


def decode(frame: bytes, *, tokens: Collection[str], last_seq: int) -> Envelope:
    """Decode and check one frame, which must carry one of the tokens.

    Raises:
        WireError: too large, not in the schema, another protocol version, wrong token, or out of sequence.
    """
    if len(frame) > MAX_MESSAGE_BYTES:
        raise WireError(f"a frame of {len(frame)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    try:
        envelope = _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, CkptError) as error:
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
    return envelope
