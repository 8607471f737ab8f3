"""Laws of manifests, and of the reader of headers that nobody may trust."""

import json
import struct

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from ckpt_core.dtypes import DType
from ckpt_core.errors import ManifestError
from ckpt_core.manifest import Manifest, TensorMeta, diff
from ckpt_core.safetensors_header import read_header

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
shapes = st.lists(st.integers(0, 300), max_size=4).map(tuple)
digests = st.text("0123456789abcdef", min_size=32, max_size=32)


def metas(digest=digests):
    return st.builds(TensorMeta, name=names, dtype=st.sampled_from(DType), shape=shapes, digest=digest)


def manifests(least=0, digest=digests):
    lists = st.lists(metas(digest), min_size=least, max_size=9, unique_by=lambda tensor: tensor.name)
    return lists.map(lambda found: Manifest(tensors=tuple(sorted(found, key=lambda tensor: tensor.name))))


@given(manifests(digest=digests | st.just("")))
def test_manifests_survive_every_road(manifest):
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).to_json() == text
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(manifest), type=Manifest) == manifest
    assert Manifest.from_json(text).structure_digest == manifest.structure_digest
    assert [manifest.index_of(tensor.name) for tensor in manifest.tensors] == list(range(len(manifest.tensors)))


@given(manifests(least=1), st.data())
def test_any_single_change_changes_the_digest(manifest, data):
    position = data.draw(st.integers(0, len(manifest.tensors) - 1))
    old = manifest.tensors[position]
    field = data.draw(st.sampled_from(["name", "dtype", "shape", "digest", "gone"]))
    others = [tensor for tensor in manifest.tensors if tensor is not old]
    if field != "gone":
        values = {"name": names, "dtype": st.sampled_from(DType), "shape": shapes, "digest": digests}
        new = replace(old, **{field: data.draw(values[field])})
        assume(new != old)
        assume(new.name not in {tensor.name for tensor in others})
        others.append(new)
    changed = Manifest(tensors=tuple(sorted(others, key=lambda tensor: tensor.name)))
    assert changed.digest != manifest.digest
    assert (changed.structure_digest != manifest.structure_digest) == (field != "digest")


@given(manifests(), manifests())
def test_diff_names_every_tensor_once(old, new):
    found = diff(old, new)
    assert not set(found.removed) & {tensor.name for tensor in new.tensors}
    after = [*found.added, *found.reshaped, *found.changed, *found.unchanged]
    assert sorted(after) == [tensor.name for tensor in new.tensors]
    before = [*found.removed, *found.reshaped, *found.changed, *found.unchanged]
    assert sorted(before) == [tensor.name for tensor in old.tensors]
    for name in found.unchanged:
        assert old.tensors[old.index_of(name)] == new.tensors[new.index_of(name)]
    assert diff(new, new).unchanged == tuple(tensor.name for tensor in new.tensors)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_json_or_manifest_error(data):
    with pytest.raises(ManifestError):
        Manifest.from_json(data)


# -- headers -----------------------------------------------------------------------------------------------------
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
near_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F4", "I64"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    },
)
near_headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), near_entries | json_values, max_size=3)


def safetensors_says(raw):
    """What the format's own reader finds: name to (dtype, shape, bytes); None where it refuses."""
    try:
        return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in deserialize(raw)}
    except SafetensorError:
        return None


def we_say(path):
    try:
        header = read_header(path)
    except ManifestError:
        return None
    raw = path.read_bytes()
    return {
        t.name: (t.dtype.value, t.shape, raw[t.offset_bytes : t.offset_bytes + t.size_bytes]) for t in header.tensors
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("headers") / "model.safetensors"


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_read_or_refused(path, raw):
    path.write_bytes(raw)
    assert we_say(path) is None or we_say(path) == safetensors_says(raw)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(near_headers, st.binary(max_size=60))
def test_what_we_accept_safetensors_accepts_and_reads_the_same(path, header, data):
    text = json.dumps(header).encode()
    raw = struct.pack("<Q", len(text)) + text + data
    path.write_bytes(raw)
    found = we_say(path)
    assert found is None or found == safetensors_says(raw)


arrays = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).integers(0, 255, shape).astype(dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(["uint8", "int8", "uint16", "float16", "float32", "int64", "float64", "bool"]),
    st.integers(0, 2**32),
)


@given(
    st.dictionaries(names.filter(lambda name: name != "__metadata__"), arrays, max_size=6),
    # safetensors 0.8 writes a header that it cannot read for no tensors and empty metadata.
    st.none() | st.dictionaries(names, names, min_size=1, max_size=3),
    st.data(),
)
def test_valid_files_are_read_as_safetensors_does_and_no_cut_one_is(path, tensors, metadata, data):
    raw = save(tensors, metadata)
    path.write_bytes(raw)
    found = we_say(path)
    assert found is not None
    assert found == safetensors_says(raw)
    assert {name: (shape, data) for name, (_, shape, data) in found.items()} == {
        name: (array.shape, array.tobytes()) for name, array in tensors.items()
    }
    assert read_header(path).metadata == (metadata or {})
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    assert we_say(path) is None


@given(st.data())
def test_a_damaged_byte_never_breaks_the_reader(path, data):
    raw = bytearray(save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.int8)}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    found = we_say(path)
    assert found is None or found == safetensors_says(bytes(raw))
