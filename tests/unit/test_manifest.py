"""Manifests: canonical, digested, saved, compared."""

import os

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from ckpt_core.dtypes import DType
from ckpt_core.errors import ManifestError
from ckpt_core.manifest import Manifest, ManifestDiff, TensorMeta, content_digest, diff
from ckpt_core.source import open_checkpoint


def meta(name, shape=(2,), dtype=DType.F32, digest=""):
    return TensorMeta(name=name, dtype=dtype, shape=shape, digest=digest)


def manifest(*tensors):
    return Manifest(tensors=tensors)


A, B = content_digest(b"a"), content_digest(b"b")


def test_from_a_checkpoint(tmp_path):
    save_file({"b": np.zeros((2, 3), np.float32), "a": np.zeros((), np.int8)}, tmp_path / "model.safetensors")
    found = Manifest.from_index(open_checkpoint(tmp_path), {"a": A})
    assert found == manifest(meta("a", (), DType.I8, A), meta("b", (2, 3)))
    assert found.size_bytes == 25
    assert found.index_of("b") == 1
    assert "a" in found
    assert "c" not in found


def test_a_tensor_that_is_not_there():
    with pytest.raises(ManifestError, match="'c': expected in the checkpoint, got 1 others"):
        manifest(meta("a")).index_of("c")


@pytest.mark.parametrize(("names", "what"), [("aa", "it twice"), ("ba", "it after 'b'")])
def test_names_are_unique_and_in_order(names, what):
    with pytest.raises(ManifestError, match=what):
        manifest(*map(meta, names))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"shape": (2, -1)}, "shape"),
        ({"shape": (2**40, 2**40)}, "shape"),
        ({"digest": "abc"}, "digest: expected 32 hex"),
        ({"digest": A.upper()}, "digest: expected 32 hex"),
        ({"name": "\ud800"}, "Unicode"),
    ],
)
def test_a_tensor_that_cannot_be(fields, what):
    with pytest.raises(ManifestError, match=what):
        meta(**{"name": "a", **fields})


def test_digest_needs_every_content_digest():
    half = manifest(meta("a", digest=A), meta("b"), meta("c"))
    assert not half.has_content
    with pytest.raises(ManifestError, match="'b' and 1 others: expected a digest"):
        half.digest  # noqa: B018
    full = half.with_digests({"b": B, "c": B})
    assert full.has_content
    assert full.tensors[0].digest == A
    assert full.structure_digest == half.structure_digest
    with pytest.raises(ManifestError, match="'x': expected in the checkpoint"):
        half.with_digests({"x": A})
    with pytest.raises(ManifestError, match="32 hex digits"):
        half.with_digests({"b": "nonsense"})


def test_digests_are_the_same_in_every_release():
    """Digests are stored and compared between releases: a new value is a break of the format."""
    fixed = manifest(meta("a", (), DType.BF16, A), meta("b", (0, 2), DType.F32, B), meta("c", (3,), DType.U8, A))
    assert content_digest(b"a") == "a96faf705af16834e6c632b61e964e1f"
    assert fixed.structure_digest == "3ee57c2d7abe67c24fe7dccdb53ae259"
    assert fixed.digest == "d34962e2210bf2e90cf8a777946d7ffe"
    assert manifest().digest == "e3ab152fcb1762bfc9f42e6c9e93dfff"


def test_json_is_byte_stable_and_survives():
    original = manifest(meta("a", (), DType.BF16, A), meta("ä", (0, 2)))
    assert (
        original.to_json()
        == (
            '{"format":"ckpt-manifest","format_version":1,"tensors":['
            f'{{"name":"a","dtype":"BF16","shape":[],"digest":"{A}"}},'
            '{"name":"ä","dtype":"F32","shape":[0,2],"digest":""}]}\n'
        ).encode()
    )
    assert Manifest.from_json(original.to_json()) == original
    assert Manifest.from_json(original.to_json().decode()) == original


def test_caches_do_not_travel():
    original = manifest(meta("a", digest=A))
    assert original.digest
    assert original.index_of("a") == 0
    raw = msgspec.msgpack.encode(original)
    assert raw == msgspec.msgpack.encode(manifest(meta("a", digest=A)))
    assert msgspec.msgpack.decode(raw, type=Manifest) == original


TENSOR = '{"name":"a","dtype":"F32","shape":[2],"digest":""}'


def file_of(*tensors):
    return '{"format":"ckpt-manifest","format_version":1,"tensors":[' + ",".join(tensors) + "]}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "{}",
        '{"format":"other","format_version":1,"tensors":[]}',
        '{"format":"ckpt-manifest","format_version":2,"tensors":[]}',
        '{"format":"ckpt-manifest","format_version":1,"tensors":{}}',
        file_of(TENSOR, TENSOR),
        file_of(TENSOR.replace("F32", "F33")),
        file_of(TENSOR.replace("[2]", "[-2]")),
        file_of(TENSOR.replace("[2]", "[2.5]")),
        file_of(TENSOR.replace("[2]", '"2"')),
        '{"x":' + "[" * 100_000,
    ],
)
def test_json_that_is_no_manifest(text):
    with pytest.raises(ManifestError, match="expected"):
        Manifest.from_json(text)


def test_save_and_load(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text("old")
    original = manifest(meta("a", digest=A))
    original.save(path)
    assert Manifest.load(path) == original
    assert list(tmp_path.iterdir()) == [path], "nothing temporary stays"
    with pytest.raises(ManifestError, match=r"gone\.json.*cannot be read"):
        Manifest.load(tmp_path / "gone.json")
    with pytest.raises(ManifestError, match="cannot be written"):
        original.save(tmp_path / "nowhere" / "manifest.json")
    path.write_bytes(b"\xff")
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        Manifest.load(path)


def test_diff():
    old = manifest(
        meta("changed", digest=A), meta("dtype"), meta("gone"), meta("same", digest=A), meta("shape"), meta("unknown")
    )
    new = manifest(
        meta("changed", digest=B),
        meta("dtype", dtype=DType.I32),
        meta("new"),
        meta("same", digest=A),
        meta("shape", (1, 2)),
        meta("unknown"),
    )
    assert diff(old, new) == ManifestDiff(
        added=("new",),
        removed=("gone",),
        reshaped=("dtype", "shape"),
        changed=("changed", "unknown"),
        unchanged=("same",),
    )


@pytest.mark.timeout(20)
def test_a_manifest_is_a_regular_file_of_some_size(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("fifo", "zero", "nul\0"):
        with pytest.raises(ManifestError, match="cannot be read"):
            Manifest.load(tmp_path / name)
    (tmp_path / "good").write_bytes(Manifest(tensors=()).to_json())
    assert Manifest.load(tmp_path / "good") == Manifest(tensors=())
    monkeypatch.setattr("ckpt_core.manifest._MAX_FILE_BYTES", 10)
    with pytest.raises(ManifestError, match="more than 10 bytes"):
        Manifest.load(tmp_path / "good")
    with pytest.raises(ManifestError, match="at most 10 bytes"):
        Manifest.from_json(bytes(11))
