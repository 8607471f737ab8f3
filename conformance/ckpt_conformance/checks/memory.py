"""Whose memory is whose: buckets belong to the ring, live weights stay where they are, nothing grows."""

from __future__ import annotations

import gc

import torch

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.attempt import Attempt
from ckpt_conformance.checks.expect import spoil
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.levels import ModelKind
from ckpt_core.capability import Capability

_KINDS = (ModelKind.PLAIN, ModelKind.EXPERTS, ModelKind.QUANTISED)
_GARBAGE = 0xA5
_UPDATES = 5


@check(
    "no_view_kept",
    kinds=_KINDS,
    rule="After ckpt_load returns, the engine has no reference to a bucket's tensors: the ring is written over at once.",
    usual_cause="A loader that keeps what it is given until a module is complete, without cloning it.",
)
def no_view_kept(bench: Bench) -> None:
    """Overwrite each bucket after its load, and see whether anybody still holds its memory."""
    usual = bench.bits(bench.worker_on(1))
    worker = bench.worker()
    spoil(bench.harness.live(worker))
    attempt = bench.attempt(worker, 1)
    attempt.begin()
    for index in range(len(attempt.batches)):
        _load_and_overwrite(bench, attempt, index, rank=bench.rank(worker))
    attempt.finish()
    attempt.commit()
    bench.expect_bits(worker, usual, "an update whose buckets were not written over")


@check(
    "bucket_not_written",
    kinds=_KINDS,
    rule="ckpt_load does not write into a bucket: other ranks read the same memory.",
    usual_cause="An operation in place on the loaded tensor: a scale, a transposition, a cast.",
)
def bucket_not_written(bench: Bench) -> None:
    """Compare each bucket before and after."""
    worker = bench.worker()
    attempt = bench.attempt(worker, 1)
    attempt.begin()
    for index, batch in enumerate(attempt.batches):
        delivery = attempt.deliver(batch, index=index)
        before = delivery.memory.clone()
        attempt.load_bucket(delivery.bucket)
        if not torch.equal(before, delivery.memory):
            names = [item.name for item in delivery.bucket.tensors]
            raise CheckFailed(
                expected="the bucket as it was", got=f"other bytes in a bucket of {names}", rank=bench.rank(worker)
            )
    attempt.finish()


@check(
    "addresses_stable",
    kinds=_KINDS,
    needs=(Capability.STABLE_ADDRESSES,),
    rule="Storage addresses of live weights are the same after ckpt_finish: they are baked into captured graphs.",
    usual_cause="Post-processing that replaces a parameter, or a load into a new one that is swapped in.",
)
def addresses_stable(bench: Bench) -> None:
    """Over two updates."""
    worker = bench.worker_on(1)
    before = bench.addresses(worker)
    bench.update(worker, 2)
    for name, address in bench.addresses(worker).items():
        if before.get(name) != address:
            raise CheckFailed(
                expected=f"address {before.get(name, 0):#x}", got=f"{address:#x}", tensor=name, rank=bench.rank(worker)
            )


@check(
    "no_growth",
    kinds=_KINDS,
    rule="Updates leave no more memory in use than the first one did.",
    usual_cause="A list of what was loaded, or a snapshot that is never dropped.",
)
def no_growth(bench: Bench) -> None:
    """Bytes of all tensors that this process can reach and could not before."""
    worker = bench.worker_on(1)
    with _Newcomers() as newcomers:
        bench.update(worker, 2)
        before = newcomers.size_bytes()
        for seed in range(_UPDATES):
            bench.update(worker, 1 + seed % 2)
        after = newcomers.size_bytes()
    if after > before:
        raise CheckFailed(
            expected=f"{before} bytes of tensors after {_UPDATES} more updates", got=str(after), rank=bench.rank(worker)
        )


class _Newcomers:
    """Tensors made since it was entered. What was there before is frozen: going through all of it takes seconds."""

    def __enter__(self) -> _Newcomers:
        gc.collect()
        gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()

    def size_bytes(self) -> int:
        """Bytes of their storages, each once; on devices all that the allocator has given."""
        gc.collect()
        sizes: dict[int, int] = {}
        for item in gc.get_objects():
            # not isinstance: that would run the __class__ property of lazy objects which are none of ours
            if issubclass(type(item), torch.Tensor) and item.device.type == "cpu" and item.layout is torch.strided:
                storage = item.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        on_devices = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        return sum(sizes.values()) + on_devices


def _load_and_overwrite(bench: Bench, attempt: Attempt, index: int, *, rank: str) -> None:
    delivery = attempt.deliver(attempt.batches[index], index=index)
    attempt.load_bucket(delivery.bucket)
    delivery.memory.fill_(_GARBAGE)
    names, alive = [item.name for item in delivery.bucket.tensors], delivery.alive
    del delivery
    if alive is not None and alive() is not None:
        gc.collect()  # slow, and only cycles need it
    if alive is not None and alive() is not None:
        raise CheckFailed(expected="nobody refers to the bucket any more", got=f"views of {names}", rank=rank)
