"""What a checkpoint is: names, shapes, dtypes, digests. Canonical: equal checkpoints have equal digests.

Digests are xxh3-128: they find accidents (a wrong file, a damaged transfer, a stale version), not forgery.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import msgspec
import xxhash

from ckpt_core.dtypes import DType, size_bytes
from ckpt_core.errors import ManifestError
from ckpt_core.files import read_regular
from ckpt_core.source import SourceIndex

_FORMAT = "ckpt-manifest"
_FORMAT_VERSION = 1
_HEX_DIGEST = re.compile(r"[0-9a-f]{32}")
_MAX_TENSOR_BYTES = 2**63 - 1
_MAX_FILE_BYTES = 512 << 20  # a trillion parameters in 140,000 tensors take some 25 MB
# Domain separation of leaves and nodes, as in RFC 6962 section 2.1: no tree can pass for another tree's leaf.
_LEAF, _NODE, _EMPTY = b"\x00", b"\x01", b"\x02"


def content_digest(data: bytes | bytearray | memoryview) -> str:
    """Digest of a tensor's row-major bytes: xxh3-128, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


class TensorMeta(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of a checkpoint.

    Attributes:
        name: unique in the checkpoint.
        dtype, shape: as in the checkpoint.
        digest: `content_digest` of its bytes, or "" where it is not known.

    Raises:
        ManifestError: a negative or too large shape, a digest that is none, a name that is not text.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    digest: str = ""

    def __post_init__(self) -> None:
        if self.shape and not _is_sound(tuple(self.shape), self.dtype):
            raise ManifestError(
                f"tensor {self.name!r:.200}: shape: expected >= 0 and at most {_MAX_TENSOR_BYTES} bytes, "
                f"got {self.shape!s:.200}; make the manifest anew from the checkpoint"
            )
        if self.digest and not _HEX_DIGEST.fullmatch(self.digest):
            raise ManifestError(
                f"tensor {self.name!r:.200}: digest: expected 32 hex digits, got {self.digest!r:.100}"
                "; make the manifest anew from the checkpoint"
            )
        if not self.name.isascii():
            _check_text(self.name)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return size_bytes(self.shape, self.dtype)


@lru_cache(maxsize=4096)  # models repeat a few shapes a hundred thousand times
def _is_sound(shape: tuple[int, ...], dtype: DType) -> bool:
    """Multiplied in order and no further than it must: the product of a long list of large numbers takes minutes.

    As for safetensors, a zero behind an overflow does not save it.
    """
    total = dtype.itemsize
    for extent in shape:
        total *= extent
        if extent < 0 or max(total, extent) > _MAX_TENSOR_BYTES:
            return False
    return True


# No slots: cached_property needs a __dict__. Only the declared field travels.
@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All tensors of a checkpoint, sorted by name.

    Raises:
        ManifestError: not sorted, or a name twice.
    """

    tensors: tuple[TensorMeta, ...]

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        if all(map(str.__lt__, names, names[1:])):
            return
        for before, name in itertools.pairwise(names):
            if before >= name:
                what = "it twice" if before == name else f"it after {before!r:.200}"
                raise ManifestError(
                    f"tensor {name!r:.200}: expected unique names in ascending order, got {what}; "
                    "make the manifest anew from the checkpoint"
                )

    @classmethod
    def from_index(cls, index: SourceIndex, digests: Mapping[str, str] | None = None) -> Manifest:
        """Manifest of an opened checkpoint; `digests` by tensor name, as far as they are known."""
        tensors = tuple(
            TensorMeta(name=extent.name, dtype=extent.dtype, shape=extent.shape) for extent in index.extents
        )
        manifest = cls(tensors=tensors)
        return manifest.with_digests(digests) if digests else manifest

    def __contains__(self, name: object) -> bool:
        return name in self.positions

    def index_of(self, name: str) -> int:
        """Position of a tensor.

        Raises:
            ManifestError: it is not in the checkpoint.
        """
        try:
            return self.positions[name]
        except KeyError:
            raise ManifestError(
                f"tensor {name!r:.200}: expected in the checkpoint, got {len(self.tensors)} others; "
                "check that checkpoint and engine are of one model"
            ) from None

    def warm(self) -> None:
        """Work out now what a plan will ask of it: for whoever waits anyway."""
        _ = self.positions, self.sizes_bytes, self.kinds, self.structure_digest

    @cached_property
    def positions(self) -> dict[str, int]:
        """Position of each tensor, by name."""
        return {tensor.name: position for position, tensor in enumerate(self.tensors)}

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """A number for each tensor, the same for those of one shape and dtype: cheaper to look up by than these."""
        numbers: dict[tuple[tuple[int, ...], str], int] = {}
        return tuple(numbers.setdefault((tensor.shape, tensor.dtype.value), len(numbers)) for tensor in self.tensors)

    @cached_property
    def sizes_bytes(self) -> tuple[int, ...]:
        """Bytes of each tensor."""
        return tuple(tensor.size_bytes for tensor in self.tensors)

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes_bytes)

    @cached_property
    def structure_digest(self) -> str:
        """Digest of names, dtypes and shapes: plans and layouts hold for every content of this structure."""
        fields = [(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors]
        return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(fields))

    @property
    def has_content(self) -> bool:
        """Whether the content digest of every tensor is known."""
        return all(tensor.digest for tensor in self.tensors)

    @cached_property
    def digest(self) -> str:
        """Digest of everything: a Merkle root over one leaf per tensor (name, dtype, shape, content).

        Raises:
            ManifestError: a content digest is missing.
        """
        unknown = [tensor.name for tensor in self.tensors if not tensor.digest]
        if unknown:
            raise ManifestError(
                f"tensor {unknown[0]!r:.200} and {len(unknown) - 1} others: expected a digest, got none; "
                "add them with with_digests first"
            )
        encode = msgspec.msgpack.Encoder().encode
        return _merkle_root([xxhash.xxh3_128_digest(_LEAF + encode(tensor)) for tensor in self.tensors])

    def with_digests(self, digests: Mapping[str, str]) -> Manifest:
        """The same with content digests by name; tensors not named keep what they have.

        Raises:
            ManifestError: a name that is not in the checkpoint, or a digest that is none.
        """
        for name in digests:
            self.index_of(name)
        return Manifest(tensors=tuple(_with_digest(tensor, digests) for tensor in self.tensors))

    def to_json(self) -> bytes:
        """Canonical JSON: equal manifests give equal bytes."""
        file = _ManifestFile(format=_FORMAT, format_version=_FORMAT_VERSION, tensors=self.tensors)
        return msgspec.json.encode(file) + b"\n"

    @classmethod
    def from_json(cls, data: bytes | str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            ManifestError: it is not that.
        """
        if len(data) > _MAX_FILE_BYTES:
            raise ManifestError(f"expected a manifest of at most {_MAX_FILE_BYTES} bytes, got {len(data)}")
        try:
            file = msgspec.json.decode(data, type=_ManifestFile, strict=True)
        except (ValueError, RecursionError) as error:
            raise ManifestError(
                f"expected a manifest in JSON, got something else ({error}); make it anew from the checkpoint"
            ) from error
        if (file.format, file.format_version) != (_FORMAT, _FORMAT_VERSION):
            raise ManifestError(
                f"expected {_FORMAT!r} of version {_FORMAT_VERSION}, got {file.format!r:.100} of version "
                f"{file.format_version}; make it anew from the checkpoint"
            )
        return cls(tensors=file.tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON. A reader sees the old file or the new one, whole."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            temporary.write_bytes(self.to_json())
            temporary.replace(target)
        except OSError as error:
            raise ManifestError(f"{str(target)!r}: cannot be written ({error.strerror}); check the path") from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read what `save` wrote.

        Raises:
            ManifestError: it cannot be read, or is not that.
        """
        try:
            return cls.from_json(read_regular(path, _MAX_FILE_BYTES))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise ManifestError(f"{str(path)!r:.300}: cannot be read ({reason}); check the path") from error
        except ManifestError as error:
            raise ManifestError(f"{str(path)!r}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _ManifestFile:
    format: str
    format_version: int
    tensors: tuple[TensorMeta, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestDiff:
    """Names by what became of them, each in ascending order.

    Attributes:
        added, removed: in one of the two only.
        reshaped: of another shape or dtype.
        changed: of other content, or of content that is not known on both sides.
        unchanged: proved equal by digest.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    reshaped: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]


def diff(old: Manifest, new: Manifest) -> ManifestDiff:
    """What an update from one checkpoint to another must move."""
    before = {tensor.name: tensor for tensor in old.tensors}
    groups: dict[str, list[str]] = {"added": [], "reshaped": [], "changed": [], "unchanged": []}
    for tensor in new.tensors:
        groups[_fate(before.get(tensor.name), tensor)].append(tensor.name)
    return ManifestDiff(
        removed=tuple(name for name in before if name not in new),
        **{fate: tuple(names) for fate, names in groups.items()},
    )


def _fate(old: TensorMeta | None, new: TensorMeta) -> str:
    if old is None:
        return "added"
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return "reshaped"
    return "unchanged" if old.digest and old.digest == new.digest else "changed"


def _with_digest(tensor: TensorMeta, digests: Mapping[str, str]) -> TensorMeta:
    digest = digests.get(tensor.name)
    if digest is None:
        return tensor
    return TensorMeta(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, digest=digest)


def _check_text(name: str) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ManifestError(f"tensor {name!r:.200}: expected a name in Unicode text, got {error.reason}") from error


def _merkle_root(level: list[bytes]) -> str:
    """Root of the binary tree over these leaves; an odd last one goes up as it is."""
    if not level:
        return xxhash.xxh3_128_hexdigest(_EMPTY)
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        above = [xxhash.xxh3_128_digest(_NODE + left + right) for left, right in pairs]
        level = above + level[len(above) * 2 :]
    return level[0].hex()
