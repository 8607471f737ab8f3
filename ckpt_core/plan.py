"""The plan of an update: which bucket, by whom, to whom, in which order, and where in whose ring.

Made once by the controller, checked by everybody who follows it, known by its digest. It holds for every
checkpoint of the same structure.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import NoReturn

import msgspec
import xxhash

from ckpt_core.assign import assign_owners
from ckpt_core.bucket import ALIGN_BYTES, Bucket, Piece, bits, collect_needs, pack
from ckpt_core.errors import CapacityError, PlanError
from ckpt_core.layout import Box, Layout, covers, joined
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.wanted import Wanted


class Step(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One bucket on its way.

    Attributes:
        index: place in the order in which receivers consume, from 0.
        bucket: what travels.
        owner: the agent that fills it.
        seq: its number among the buckets of that owner, from 1.
        ring_offset_bytes: where it lies in the owner's ring, aligned; never across the end.
        free_after_seq: the highest earlier seq of the owner whose bytes it overwrites, 0 for none. The
            owner may fill it once every receiver is done with that one.
        receivers: who needs an element of it, in ascending order. The others pass over it without waiting.
    """

    index: int
    bucket: Bucket
    owner: int
    seq: int
    ring_offset_bytes: int
    free_after_seq: int
    receivers: tuple[int, ...]


# No slots: cached_property needs a __dict__. Only the declared fields travel.
@dataclass(frozen=True, kw_only=True)
class Plan:
    """All steps of an update.

    Attributes:
        structure_digest: of the manifests it holds for.
        asked_ring_bytes: size of each ring as asked for.
        ring_bytes: size as planned: larger where one bucket is larger than what was asked for.
        bucket_bytes: size of a bucket as asked for; a tensor that may not be cut can be larger.
        agents: number of owners.
        receivers: number of receivers.
        bytes_needed_by_receiver: what each receiver's layout needs, without padding and other ranks' rows.
        steps: in the order of consumption.
    """

    structure_digest: str
    asked_ring_bytes: int
    ring_bytes: int
    bucket_bytes: int
    agents: int
    receivers: int
    bytes_needed_by_receiver: tuple[int, ...]
    steps: tuple[Step, ...]

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of the plan; what ranks and agents agree on."""
        return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(self))

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all buckets: what enters the host."""
        return sum(step.bucket.size_bytes for step in self.steps)

    @cached_property
    def bytes_by_owner(self) -> tuple[int, ...]:
        """Bytes that each agent sends."""
        total = [0] * self.agents
        for step in self.steps:
            total[step.owner] += step.bucket.size_bytes
        return tuple(total)

    @property
    def ring_grew(self) -> bool:
        """Whether the ring is larger than what was asked for."""
        return self.ring_bytes > self.asked_ring_bytes


def make_plan(
    manifest: Manifest, layouts: Sequence[Layout], *, agents: int, ring_bytes: int, bucket_bytes: int
) -> Plan:
    """Plan to bring every receiver what its layout needs.

    Args:
        manifest: the checkpoint; contents do not matter.
        layouts: one per receiver.
        agents: number of agents, each with a ring.
        ring_bytes: size of each ring; grows to the largest bucket if that is larger.
        bucket_bytes: size of a bucket.

    Raises:
        CapacityError: sizes or numbers with which nothing can be sent.
        ManifestError, CoverageError: a layout does not fit the checkpoint.
    """
    for what, got, least in (
        ("agents", agents, 1),
        ("receivers", len(layouts), 1),
        ("ring size in bytes", ring_bytes, ALIGN_BYTES),
        ("bucket size in bytes", bucket_bytes, ALIGN_BYTES),
    ):
        if got < least:
            raise CapacityError(f"{what}: expected at least {least}, got {got}; give more")
    needs = collect_needs(manifest, layouts)
    buckets = pack(needs, bucket_bytes=bucket_bytes)
    largest = max((bucket.size_bytes for bucket, _ in buckets), default=0)
    actual_ring_bytes = max(ring_bytes // ALIGN_BYTES * ALIGN_BYTES, largest)
    return Plan(
        structure_digest=manifest.structure_digest,
        asked_ring_bytes=ring_bytes,
        ring_bytes=actual_ring_bytes,
        bucket_bytes=bucket_bytes,
        agents=agents,
        receivers=len(layouts),
        bytes_needed_by_receiver=needs.bytes_by_receiver(),
        steps=tuple(_steps(buckets, agents, actual_ring_bytes)),
    )


def _steps(buckets: Sequence[tuple[Bucket, int]], agents: int, ring_bytes: int) -> Iterator[Step]:
    rings = [RingSpace(ring_bytes) for _ in range(agents)]
    owners = assign_owners([bucket.size_bytes for bucket, _ in buckets], agents)
    for (bucket, receivers), owner in zip(buckets, owners, strict=True):
        offset, seq, free_after = rings[owner].append(bucket.size_bytes)
        yield Step(
            index=bucket.index,
            bucket=bucket,
            owner=owner,
            seq=seq,
            ring_offset_bytes=offset,
            free_after_seq=free_after,
            receivers=tuple(bits(receivers)),
        )


class LastWriters:
    """Which bucket wrote each byte of a ring last: disjoint intervals in ascending order."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._seqs: list[int] = []

    def overwrite(self, begin: int, end: int, seq: int) -> int:
        """Note that `seq` writes [begin, end). Highest seq that it overwrites, 0 for none."""
        if begin == end:
            return 0
        first, last = bisect_right(self._ends, begin), bisect_left(self._begins, end)
        begins, ends, seqs = [begin], [end], [seq]
        highest = max(self._seqs[first:last], default=0)
        if first < last and self._begins[first] < begin:
            begins, ends, seqs = [self._begins[first], *begins], [begin, *ends], [self._seqs[first], *seqs]
        if first < last and self._ends[last - 1] > end:
            begins, ends, seqs = [*begins, end], [*ends, self._ends[last - 1]], [*seqs, self._seqs[last - 1]]
        self._begins[first:last], self._ends[first:last], self._seqs[first:last] = begins, ends, seqs
        return highest


class RingSpace:
    """Lays buckets one behind the other; what does not fit before the end begins at 0 again."""

    def __init__(self, ring_bytes: int) -> None:
        self._ring_bytes = ring_bytes
        self._head = 0
        self._seq = 0
        self._writers = LastWriters()

    def append(self, size_bytes: int) -> tuple[int, int, int]:
        """Offset, seq and free_after_seq of the next bucket."""
        assert size_bytes <= self._ring_bytes, (size_bytes, self._ring_bytes)
        if self._head + size_bytes > self._ring_bytes:
            self._head = 0
        offset = self._head
        self._seq += 1
        self._head += size_bytes
        return offset, self._seq, self._writers.overwrite(offset, self._head, self._seq)


# -- checks of a plan that somebody else made ----------------------------------------------------------------
def check_plan(plan: Plan, manifest: Manifest, wanted: Mapping[int, Wanted] | None = None) -> None:
    """Prove that a plan is safe to follow for this checkpoint.

    No byte of a ring is written before it was read, all offsets and indexes are in range, no byte of the
    checkpoint is sent twice; and for the receivers in `wanted` (by number), their slices arrive whole.

    Raises:
        PlanError: it is not; nothing must be sent by it.
    """
    if plan.structure_digest != manifest.structure_digest:
        _refuse("structure digest", manifest.structure_digest, plan.structure_digest)
    if plan.agents < 1 or len(plan.bytes_needed_by_receiver) != plan.receivers:
        got = f"{plan.agents} agents, {plan.receivers} receivers, {len(plan.bytes_needed_by_receiver)} needs"
        _refuse("participants", "at least one agent, and what each receiver needs", got)
    last_seqs = [0] * plan.agents
    rings = [LastWriters() for _ in range(plan.agents)]
    sent = _Sent()
    for position, step in enumerate(plan.steps):
        _check_place(plan, step, position, last_seqs)
        _check_ring(plan, step, rings[step.owner])
        _check_pieces(step, manifest, sent)
    _check_sent_once(plan, manifest, sent)
    for receiver, mine in (wanted or {}).items():
        _check_arrivals(plan, receiver, mine)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """Tensors that were sent whole, byte ranges of the others, and those of which a part was more than one range."""

    whole: set[int] = field(default_factory=set)
    parts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    strided: set[int] = field(default_factory=set)


def _check_place(plan: Plan, step: Step, position: int, last_seqs: list[int]) -> None:
    where = f"step {position}"
    if step.index != position or step.bucket.index != position:
        _refuse(f"{where}: index", position, (step.index, step.bucket.index))
    if not 0 <= step.owner < plan.agents:
        _refuse(f"{where}: owner", f"0 to {plan.agents - 1}", step.owner)
    last_seqs[step.owner] += 1
    if step.seq != last_seqs[step.owner]:
        _refuse(f"{where}: seq of owner {step.owner}", last_seqs[step.owner], step.seq)
    in_range = all(0 <= receiver < plan.receivers for receiver in step.receivers)
    if not in_range or list(step.receivers) != sorted(set(step.receivers)):
        _refuse(f"{where}: receivers", f"ascending, 0 to {plan.receivers - 1}", step.receivers)


def _check_ring(plan: Plan, step: Step, writers: LastWriters) -> None:
    begin, end = step.ring_offset_bytes, step.ring_offset_bytes + step.bucket.size_bytes
    if step.bucket.size_bytes < 0 or begin < 0 or end > plan.ring_bytes or begin % ALIGN_BYTES:
        expected = f"aligned to {ALIGN_BYTES}, inside 0 to {plan.ring_bytes}"
        _refuse(f"step {step.index}: bytes of the ring", expected, f"{begin} to {end}")
    overwritten = writers.overwrite(begin, end, step.seq)
    if not overwritten <= step.free_after_seq < step.seq:
        expected = f"at least {overwritten}, which it overwrites, and less than {step.seq}"
        _refuse(f"step {step.index}: free_after_seq", expected, step.free_after_seq)


def _check_pieces(step: Step, manifest: Manifest, sent: _Sent) -> None:
    """Pieces must lie in the bucket without overlap, and be what they say of the checkpoint."""
    end = 0
    tensors, sizes = manifest.tensors, manifest.sizes_bytes
    # Ranks check plans while their engine stands still: no calls that a look-up can save.
    for piece in step.bucket.pieces:
        index, offset, size = piece.tensor, piece.offset_bytes, piece.size_bytes
        if not 0 <= index < len(tensors):
            _refuse(f"step {step.index}: piece of tensor {index}", f"an index below {len(tensors)}", index)
        whole = sizes[index]
        if piece.box is None:
            first, expected_size = 0, whole
        else:
            first, expected_size = _box_span(piece.box, tensors[index].shape, tensors[index].dtype.itemsize)
            if first < 0:
                sent.strided.add(index)
        if (
            size != expected_size
            or size < 0
            or (not size and whole)
            or offset < end
            or offset % tensors[index].dtype.itemsize
        ):
            _refuse_piece(step, piece, tensors[index], end)
        end = offset + size
        if piece.box is None and index not in sent.whole:
            sent.whole.add(index)
        else:
            sent.parts.setdefault(index, []).append((first, first + size))
    if end > step.bucket.size_bytes:
        _refuse(
            f"step {step.index}: bucket size",
            f"at least {end}, the end of its pieces",
            step.bucket.size_bytes,
        )


def _refuse_piece(step: Step, piece: Piece, tensor: TensorMeta, end: int) -> NoReturn:
    where = f"step {step.index}: piece of tensor {piece.tensor}"
    if piece.offset_bytes < end or piece.offset_bytes % tensor.dtype.itemsize:
        _refuse(f"{where}: offset", f"at least {end}, aligned", piece.offset_bytes)
    expected = f"a part of {tensor.dtype.value} {list(tensor.shape)}, and its size"
    _refuse(where, expected, f"{piece.box}, {piece.size_bytes} bytes")


# Models repeat a few shapes, and so do the pieces cut from them. A size of -1: no part of the tensor; a first byte of -1: a
# part that is not contiguous there (it is packed in the bucket).
@lru_cache(maxsize=4096)
def _box_span(box: Box, shape: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    if not box.fits(shape):
        return 0, -1
    runs = box.byte_runs(shape, itemsize)
    return runs.first_offset_bytes if runs.count <= 1 else -1, box.size * itemsize


def _check_sent_once(plan: Plan, manifest: Manifest, sent: _Sent) -> None:
    if sent.strided:
        _check_boxes_once(plan, manifest, sent.strided)
    for index, spans in sent.parts.items():
        if index in sent.strided:
            continue
        if index in sent.whole:
            spans.append((0, manifest.sizes_bytes[index]))
        spans.sort()
        for before, span in itertools.pairwise(spans):
            if span[0] < before[1] or span == before:
                name = manifest.tensors[index].name
                _refuse(f"tensor {name!r:.200}", "every byte once", f"bytes {span[0]} to {before[1]} twice")


def _check_boxes_once(plan: Plan, manifest: Manifest, tensors: set[int]) -> None:
    """The same of parts that are no ranges of bytes."""
    boxes: dict[int, list[Box]] = {}
    for step in plan.steps:
        for piece in step.bucket.pieces:
            if piece.tensor in tensors:
                boxes.setdefault(piece.tensor, []).append(piece.box or Box.whole(manifest.tensors[piece.tensor].shape))
    for index, parts in boxes.items():
        parts.sort(key=lambda box: box.start)
        for position, box in enumerate(parts):
            for other in itertools.takewhile(lambda other: other.start[0] < box.stop[0], parts[position + 1 :]):  # noqa: B023
                if not box.disjoint(other):
                    _refuse(f"tensor {manifest.tensors[index].name!r:.200}", "every byte once", f"{box} and {other}")


def _check_arrivals(plan: Plan, receiver: int, wanted: Wanted) -> None:
    if not 0 <= receiver < plan.receivers:
        _refuse("receiver", f"0 to {plan.receivers - 1}", receiver)
    arrivals: dict[int, list[Box]] = {}
    whole: set[int] = set()
    for step in plan.steps:
        if receiver in step.receivers:
            for piece in step.bucket.pieces:
                if piece.box is None:
                    whole.add(piece.tensor)
                else:
                    arrivals.setdefault(piece.tensor, []).append(piece.box)
    covered = cache(covers)
    for index in wanted.boxes.keys() - whole:
        tensor = wanted.manifest.tensors[index]
        parts = tuple(joined(arrivals.get(index, ())))
        for box in wanted.boxes[index]:
            needed = Box.whole(tensor.shape) if box is None else box
            if not (parts or tensor.size_bytes) or not covered(parts, needed):
                got = f"{len(parts)} pieces without it"
                _refuse(f"tensor {tensor.name!r:.200} for receiver {receiver}", str(needed), got)


def _refuse(what: str, expected: object, got: object) -> NoReturn:
    raise PlanError(
        f"plan: {what}: expected {expected!s:.300}, got {got!s:.300}; "
        "the plan is not safe to follow: check that controller, agents and engines run one version"
    )
