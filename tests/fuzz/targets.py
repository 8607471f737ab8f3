"""What is fuzzed: each target takes bytes and returns, or raises what nobody expects."""

from __future__ import annotations

import atexit
import resource
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from ckpt_core import wire
from ckpt_core.dtypes import DType
from ckpt_core.errors import ManifestError, WireError
from ckpt_core.layout import whole_layout
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.plan import make_plan
from ckpt_core.safetensors_header import parse_json_object, read_header

MOST_BYTES = 4 << 30  # of address space: what a small input makes us take beyond that is a finding
_folder = Path(tempfile.mkdtemp(prefix="ckpt-fuzz-", dir="/dev/shm"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
_scratch = _folder / "x.safetensors"


def fuzz_wire(data: bytes) -> None:
    """A frame as it comes from a peer; and its body alone, behind an envelope that is right."""
    with suppress(WireError):
        envelope = wire.decode(data, tokens=["t"], last_seq=0)
        again = wire.encode(envelope.body, token="t", seq=1)  # noqa: S106
        assert wire.decode(again, tokens=["t"], last_seq=0).body == envelope.body or b"nan" in repr(envelope).encode()
    with suppress(WireError):
        wire.decode(head() + data, tokens=["t"], last_seq=0)


def fuzz_header(data: bytes) -> None:
    """A safetensors file; the JSON behind a length that is right; and that JSON alone."""
    for content in (data, len(data).to_bytes(8, "little") + data):
        _scratch.write_bytes(content)
        with suppress(ManifestError):
            found = read_header(_scratch)
            ends = [tensor.offset_bytes + tensor.size_bytes for tensor in found.tensors]
            assert all(0 <= end <= len(content) for end in ends)
    with suppress(ValueError):
        parse_json_object(data)


def fuzz_manifest(data: bytes) -> None:
    """A manifest in JSON; one that is taken survives a second way."""
    with suppress(ManifestError):
        manifest = Manifest.from_json(data)
        assert Manifest.from_json(manifest.to_json()) == manifest
        assert manifest.size_bytes >= 0
        _ = manifest.structure_digest


TARGETS: dict[str, Callable[[bytes], None]] = {
    "wire": fuzz_wire,
    "header": fuzz_header,
    "manifest": fuzz_manifest,
}


def head() -> bytes:
    """An envelope up to its body."""
    return msgspec.msgpack.encode([wire.PROTOCOL_VERSION, "t", 1, None])[:-1]


def seeds(target: str) -> list[bytes]:
    """Good inputs to begin with."""
    manifest = Manifest(
        tensors=(
            TensorMeta(name="a", dtype=DType.F32, shape=(2, 100), digest="0" * 32),
            TensorMeta(name="b.gewölbe", dtype=DType.BF16, shape=()),
        )
    )
    if target == "manifest":
        return [manifest.to_json(), Manifest(tensors=()).to_json()]
    if target == "header":
        body = (
            b'{"__metadata__":{"k":"v"},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
            b'"b":{"dtype":"F32","shape":[0],"data_offsets":[2,2]}}'
        )
        return [len(body).to_bytes(8, "little") + body + b"xx", body, b'{"a":"\\ud83d\\ude00","b":[1e5,NaN,-0]}', b"{}"]
    plan = make_plan(manifest, [whole_layout(manifest)], agents=1, ring_bytes=4096, bucket_bytes=1024)
    bodies = (
        wire.TakePlan(plan=plan),
        wire.AskLayout(manifest=manifest),
        wire.LayoutReply(layout=whole_layout(manifest)),
        wire.Failure(error="PlanError", message="no", phase="plan"),
        wire.Prepared(digests={"a": "0" * 32}, digest_s=0.1, locked_bytes=8, lock_s=0.2),
        wire.Ping(),
    )
    frames = [wire.encode(body, token="t", seq=1) for body in bodies]  # noqa: S106
    bodies_alone = [frame[len(head()) :] for frame in frames]
    return [*frames, *bodies_alone]


def bound_memory() -> None:
    """From here on, more than MOST_BYTES is a MemoryError."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
