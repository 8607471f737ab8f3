"""The owner's side: a version's bytes mapped where they are, registered once, and then nothing is done for those who read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from ckpt_core.cpu import CpuDevice
from ckpt_core.errors import ConfigError
from ckpt_core.leaf_digest import leaves_of
from ckpt_core.manifest import Manifest, content_digest
from ckpt_core.p2p.nics import Nic, NicKind
from ckpt_core.p2p.offers import Offer, OfferedNic, OfferedTensor
from ckpt_core.source import Extent, SourceIndex
from ckpt_core.staging import HostPool
from ckpt_core.transport.p2p.base import Memory, OneSided


@contextmanager
def exported(
    index: SourceIndex,
    library: OneSided,
    *,
    owner: str,
    version: str = "",
    nics: Sequence[Nic] = (),
    max_bytes_per_s: float = 0.0,
) -> Iterator[Offer]:
    """Expose a version's files as long as the block runs.

    Args:
        index: files; each is registered as one region.
        library: open in this process.
        owner: name of this process, for messages of those who read.
        version: label; by default the start of the content digest.
        nics: through which this host is read.
        max_bytes_per_s: that each host which joins may read of it; 0 for no limit.

    Raises:
        ConfigError: the version is not in files.
        TransportError: the library refuses the memory.
    """
    if not index.in_files:
        raise ConfigError("expected a version in files, got one elsewhere; export a warm version or a checkpoint")
    with ExitStack() as stack:
        pool = HostPool(CpuDevice())
        stack.callback(pool.close)
        pool.adopt(index)
        for file in pool.files:
            memory = Memory(address=file.ctypes.data, size_bytes=file.size)
            library.expose(memory)
            stack.callback(library.withdraw, memory)
        tensors = tuple(_offered(pool, extent) for extent in index.extents)
        digest = Manifest.from_index(index, {one.name: one.digest for one in tensors}).digest
        yield Offer(
            owner=owner,
            library=library.library,
            contact=library.contact(),
            version=version or digest[:12],
            digest=digest,
            tensors=tensors,
            nics=tuple(OfferedNic(name=nic.name, bytes_per_s=nic.bytes_per_s or 0.0) for nic in nics),
            rdma=any(nic.kind is NicKind.RDMA for nic in nics),
            max_bytes_per_s=max_bytes_per_s,
        )


def _offered(pool: HostPool, extent: Extent) -> OfferedTensor:
    data = pool.packed(extent.name, None)
    return OfferedTensor(
        name=extent.name,
        dtype=extent.dtype,
        shape=extent.shape,
        digest=content_digest(data.data),
        address=data.ctypes.data if data.size else 0,
        leaves=leaves_of(data).astype(np.dtype("<u8")).tobytes(),
    )
