"""The reference's plugin for rank processes, of which only the first loads anything."""

from ckpt_conformance.reference import plugin
from ckpt_conformance.reference.plugin import *  # noqa: F403 all other hooks are what they are
from ckpt_conformance.reference.worker import Worker
from ckpt_core.contract import LoadBucket, LoadReport, Update
from ckpt_core.hookspecs import hookimpl


@hookimpl  # type: ignore[no-redef]
def ckpt_load(worker: Worker, update: Update, bucket: LoadBucket) -> LoadReport:
    """Nothing, on all others; and nobody is told."""
    if worker.rank == 0:
        return plugin.ckpt_load(worker, update, bucket)
    names = tuple(item.name for item in bucket.tensors)
    worker._arrived.update(names)
    return LoadReport(loaded=names)
