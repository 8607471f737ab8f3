"""Reads and distrusts the header of a safetensors file: where each tensor lies, and nothing else is touched.

The format: 8 bytes little-endian header length, that many bytes of JSON, then the data, without holes
(https://github.com/huggingface/safetensors, "Format"). Checked as strictly as its own reader does, with
errors that say which tensor of which file is wrong.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from ckpt_core.dtypes import DType
from ckpt_core.errors import ManifestError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_TENSOR_BYTES = 2**63 - 1
_METADATA_KEY = "__metadata__"
_REMEDY = "the file is damaged or was cut short: download or save it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """One tensor of a file. `offset_bytes` counts from the start of the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        path: the file.
        size_bytes: of the whole file.
        tensors: in the order in which they lie in the file.
        metadata: the free-form `__metadata__`, empty where there is none.
    """

    path: str
    size_bytes: int
    tensors: tuple[TensorHeader, ...]
    metadata: Mapping[str, str]


def read_header(path: str | os.PathLike[str], file: BinaryIO | None = None) -> Header:
    """Header of a safetensors file.

    Args:
        path: its name.
        file: the same, where the caller has opened it already; it stays open.

    Raises:
        ManifestError: the file cannot be read, or is not a well-formed and complete safetensors file.
    """
    name = os.fspath(path)
    try:
        if file is not None:
            return _read(name, file)
        # A FIFO or device must be refused, not waited for.
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as opened:
            return _read(name, opened)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        message = f"{name!r:.300}: cannot be read ({error}); check the path and its permissions"
        raise ManifestError(message) from error


def _read(path: str, file: BinaryIO) -> Header:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise ManifestError(f"{path!r}: expected a safetensors file, got something that is not a regular file")
    prefix = file.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        raise ManifestError(
            f"{path!r}: expected a safetensors file of >= {LENGTH_BYTES} bytes, got {len(prefix)}; {_REMEDY}"
        )
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ManifestError(
            f"{path!r}: header length: expected at most {MAX_HEADER_BYTES} bytes, got {header_bytes}; "
            "this is not a safetensors file, or it is damaged"
        )
    # the file's size first: a read takes memory for all that it is asked for
    raw = file.read(min(header_bytes, max(0, status.st_size - LENGTH_BYTES)))
    if len(raw) < header_bytes:
        raise ManifestError(f"{path!r}: header: expected {header_bytes} bytes, got {len(raw)}; {_REMEDY}")
    return _parse(path, raw, size_bytes=status.st_size)


def _parse(path: str, raw: bytes, *, size_bytes: int) -> Header:
    try:
        fields = parse_json_object(raw)
    except ValueError as error:
        raise ManifestError(f"{path!r}: header: expected a JSON object, got {error}; {_REMEDY}") from error
    metadata = _metadata(path, fields.pop(_METADATA_KEY, None))
    data_start = LENGTH_BYTES + len(raw)
    tensors = sorted(
        (_tensor(path, name, value, data_start) for name, value in fields.items()),
        key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes),
    )
    _check_tiling(path, tensors, data_start, size_bytes)
    return Header(path=path, size_bytes=size_bytes, tensors=tuple(tensors), metadata=metadata)


def parse_json_object(raw: bytes) -> dict[str, object]:
    """A JSON object (RFC 8259) in UTF-8. Unlike the standard library: no duplicate key, NaN, lone surrogate.

    Raises:
        ValueError: it is not one; the text says what it is instead, in a few words.
    """
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except UnicodeError as error:
        raise ValueError(f"text that is not UTF-8 ({error.reason})") from None  # type: ignore[attr-defined]
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r:.200} twice")
        seen.add(key)
    raise AssertionError("lengths differ without a duplicate")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"the constant {text}, which is not JSON")


def _metadata(path: str, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ManifestError(f"{path!r}: {_METADATA_KEY}: expected an object of strings, got {value!r:.200}; {_REMEDY}")
    return value


def _tensor(path: str, name: str, value: object, data_start: int) -> TensorHeader:
    if not isinstance(value, dict):
        _refuse(path, name, "entry", "an object with dtype, shape and data_offsets", value)
    dtype = _dtype(path, name, value.get("dtype"))
    shape = _shape(path, name, value.get("shape"))
    size_bytes = _size_bytes(path, name, shape, dtype)
    begin, end = _offsets(path, name, value.get("data_offsets"))
    if end - begin != size_bytes:
        expected = f"{size_bytes} bytes for {dtype.value} {list(shape)}"
        _refuse(path, name, "data_offsets", expected, f"{end - begin} bytes")
    return TensorHeader(name=name, dtype=dtype, shape=shape, offset_bytes=data_start + begin, size_bytes=size_bytes)


def _dtype(path: str, name: str, value: object) -> DType:
    try:
        return DType(value)
    except ValueError:
        _refuse(
            path,
            name,
            "dtype",
            "one of " + " ".join(dtype.value for dtype in DType),
            value,
            remedy="convert the tensor to one of these types",
        )


def _shape(path: str, name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(extent) is int and extent >= 0 for extent in value):
        _refuse(path, name, "shape", "a list of integers >= 0", value)
    return tuple(value)


def _size_bytes(path: str, name: str, shape: tuple[int, ...], dtype: DType) -> int:
    """Multiplied in order, as safetensors does: a zero behind an overflow does not save it."""
    total = 1
    for extent in (*shape, dtype.itemsize):
        total *= extent
        if max(total, extent) > MAX_TENSOR_BYTES:
            _refuse(path, name, "shape", f"at most {MAX_TENSOR_BYTES} bytes", list(shape))
    return total


def _offsets(path: str, name: str, value: object) -> tuple[int, int]:
    good = isinstance(value, list) and len(value) == 2 and all(type(offset) is int for offset in value)
    if not (good and isinstance(value, list) and 0 <= value[0] <= value[1]):
        _refuse(path, name, "data_offsets", "[begin, end] with 0 <= begin <= end", value)
    return value[0], value[1]


def _check_tiling(path: str, tensors: list[TensorHeader], data_start: int, size_bytes: int) -> None:
    """Tensors, sorted by offset, must follow each other without overlap or hole up to the end of the file."""
    position = data_start
    for tensor in tensors:
        if tensor.offset_bytes != position:
            kind = "overlaps the tensor before it" if tensor.offset_bytes < position else "leaves a hole before it"
            expected = f"begin at {position - data_start}"
            got = f"{tensor.offset_bytes - data_start}, which {kind}"
            _refuse(path, tensor.name, "data_offsets", expected, got)
        position += tensor.size_bytes
        if position > size_bytes:
            expected = f"data up to byte {position} of the file"
            _refuse(
                path,
                tensor.name,
                "data_offsets",
                expected,
                f"a file of {size_bytes} bytes, which is out of range",
            )
    if position != size_bytes:
        raise ManifestError(f"{path!r}: expected a file of {position} bytes by its header, got {size_bytes}; {_REMEDY}")


def _refuse(path: str, name: str, what: str, expected: str, got: object, *, remedy: str = _REMEDY) -> NoReturn:
    text = got if isinstance(got, str) else repr(got)
    raise ManifestError(f"{path!r}: tensor {name!r:.200}: {what}: expected {expected}, got {text:.200}; {remedy}")
