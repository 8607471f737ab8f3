"""What an owner of a version tells those who join: a JSON file, or an entry of a directory. Never a pickle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ckpt_core.dtypes import DType
from ckpt_core.errors import ConfigError, ManifestError, VerificationError
from ckpt_core.files import read_regular
from ckpt_core.leaf_digest import leaf_count
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.source import Extent, RemoteOwner, RemotePools, SourceIndex
from ckpt_core.transport.p2p.base import Library

FORMAT = 1
_WORD_BYTES = 8
MAX_OFFER_BYTES = 512 << 20  # a terabyte has 4 million leaves: 45 MB


class OfferedTensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor in an owner's memory.

    Attributes:
        digest: content digest, as in manifests.
        address: of its first byte, row-major, in the owner's process.
        leaves: digests of its leaves (see leaf_digest), little-endian; base64 in JSON.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    digest: str
    address: int
    leaves: bytes


class OfferedNic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A NIC of an owner; `bytes_per_s` is its nominal rate, 0 where the system does not tell."""

    name: str
    bytes_per_s: float = 0.0


class Offer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One version in one owner's memory.

    Attributes:
        owner: name of the process, for messages.
        library, contact: how it is read.
        version, digest: label, and what it is bound to.
        tensors: sorted by name.
        nics: through which it is read.
        rdma: whether these are RDMA devices, and used as such.
        max_bytes_per_s: that each host which joins may read of it; 0 for no limit.
    """

    format: int = FORMAT
    owner: str
    library: Library
    contact: str
    version: str
    digest: str
    tensors: tuple[OfferedTensor, ...]
    nics: tuple[OfferedNic, ...] = ()
    rdma: bool = False
    max_bytes_per_s: float = 0.0

    def manifest(self) -> Manifest:
        """Of the version.

        Raises:
            ManifestError: it is none, or not that of the digest.
        """
        made = Manifest(
            tensors=tuple(
                TensorMeta(name=one.name, dtype=one.dtype, shape=one.shape, digest=one.digest) for one in self.tensors
            )
        )
        if not made.has_content or made.digest != self.digest:
            raise ManifestError(
                f"offer of {self.owner!r:.100}: expected tensors of digest {self.digest!r:.100}, got {made.digest}; export anew"
            )
        return made


def write_offer(offer: Offer, path: Path) -> None:
    """As JSON, whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(offer), indent=1) + b"\n")
        beside.replace(path)
    except OSError as error:
        raise ConfigError(f"{str(path)!r}: cannot be written ({error.strerror}); name another file") from error


def read_offer(path: Path) -> Offer:
    """The opposite.

    Raises:
        ConfigError: it cannot be read, or is no offer.
        ManifestError: see Offer.manifest.
    """
    try:
        offer = msgspec.json.decode(read_regular(path, MAX_OFFER_BYTES), type=Offer)
    except OSError as error:
        raise ConfigError(f"{str(path)!r}: cannot be read ({error.strerror}); copy it here from the owner") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{str(path)!r}: expected what `ckpt export` wrote, got something else ({error}); export anew"
        ) from error
    if offer.format != FORMAT:
        raise ConfigError(f"{str(path)!r}: expected format {FORMAT}, got {offer.format}; use one release on both sides")
    offer.manifest()
    return offer


def index_of(offers: Sequence[Offer], *, host: str, max_bytes_per_s: float = 0.0) -> SourceIndex:
    """One version, to be read out of all these owners.

    Args:
        host: address of this host, as owners reach it.
        max_bytes_per_s: what this host reads in all; 0 for no limit.

    Raises:
        ConfigError: no offers, or one owner twice.
        VerificationError: they are of different versions, or disagree about the bytes.
    """
    if not offers:
        raise ConfigError("no offers; name at least one file that `ckpt export` wrote")
    first = offers[0]
    for other in offers[1:]:
        if other.digest != first.digest:
            raise VerificationError(
                f"expected one version, got {first.version} ({first.digest}) of {first.owner} and {other.version} "
                f"({other.digest}) of {other.owner}; name offers of one"
            )
        if [one.leaves for one in other.tensors] != [one.leaves for one in first.tensors]:
            raise VerificationError(
                f"{first.owner} and {other.owner} offer the same version with different digests of its leaves; export anew"
            )
    if len({(one.library, one.contact) for one in offers}) != len(offers):
        raise ConfigError("one owner is named twice; name each offer once")
    return SourceIndex(
        files=(),
        extents=tuple(map(_extent, first.manifest().tensors)),
        remote=RemotePools(
            owners=tuple(map(_owner, offers, _different([offer.owner for offer in offers]))),
            version=first.version,
            digests=tuple(one.digest for one in first.tensors),
            leaves=b"".join(map(_leaves, first.tensors)),
            host=host,
            max_bytes_per_s=max_bytes_per_s,
        ),
    )


def _extent(meta: TensorMeta) -> Extent:
    return Extent(
        name=meta.name, dtype=meta.dtype, shape=meta.shape, file=0, offset_bytes=0, size_bytes=meta.size_bytes
    )


def _different(names: Sequence[str]) -> list[str]:
    """Hosts may call themselves the same."""
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def _owner(offer: Offer, name: str) -> RemoteOwner:
    return RemoteOwner(
        name=name,
        library=offer.library.value,
        contact=offer.contact,
        addresses=tuple(one.address for one in offer.tensors),
        max_bytes_per_s=offer.max_bytes_per_s,
    )


def _leaves(tensor: OfferedTensor) -> bytes:
    size = TensorMeta(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape).size_bytes
    if len(tensor.leaves) != leaf_count(size) * _WORD_BYTES:
        raise ManifestError(
            f"tensor {tensor.name!r:.200}: expected digests of {leaf_count(size)} leaves, got {len(tensor.leaves)} bytes; "
            "export anew"
        )
    return tensor.leaves
