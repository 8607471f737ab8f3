"""The targets of the fuzzer, by Hypothesis: typed errors only, and no more memory or time than the input is worth."""

import contextlib
import json
import sys
import time
import tracemalloc
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckpt_core import wire
from ckpt_core.errors import ManifestError, WireError
from ckpt_core.manifest import Manifest
from ckpt_core.safetensors_header import MAX_HEADER_BYTES, parse_json_object, read_header

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
sys.path.insert(0, str(FUZZ))
try:
    from mutator import mutator
    from targets import TARGETS, head, seeds
finally:
    sys.path.remove(str(FUZZ))

MIB = 1 << 20


@contextlib.contextmanager
def cheap(most_bytes=16 * MIB, most_s=10.0):
    """Fails where more memory was held at once, or more time went by."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < most_s


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.binary(max_size=600))
def test_any_bytes(target, data):
    TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=400)
@given(seed=st.integers(0, 2**32), place=st.integers(0, 11), rounds=st.integers(1, 4), cut=st.integers(0, 50))
def test_good_inputs_with_something_wrong_in_them(target, seed, place, rounds, cut):
    good = seeds(target)
    data = good[place % len(good)]
    for number in range(rounds):
        data = mutator(target)(data, 4096, seed + number)
    TARGETS[target](data)
    TARGETS[target](data[: len(data) - cut])


@pytest.mark.parametrize(
    "path", sorted((FUZZ / "corpus").glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_what_the_fuzzer_found_stays_mended(path):
    with cheap():
        TARGETS[path.parent.name](path.read_bytes())


# -- frames ------------------------------------------------------------------------------------------------------------
lengths = st.sampled_from(
    [b"\xdc", b"\xdd", b"\xde", b"\xdf", b"\xc4", b"\xc5", b"\xc6", b"\xd9", b"\xda", b"\xdb", b"\xc9"]
)


@given(
    lengths,
    st.binary(min_size=4, max_size=4),
    st.sampled_from(["Prepare", "TakePlan", "AskLayout", "Prepared", "LayoutReply", "Ping"]),
    st.sampled_from(["digest", "plan", "manifest", "digests", "layout", "index"]),
)
@example(b"\xdd", b"\xff\xff\xff\xff", "Prepare", "digest")
@example(b"\xdf", b"\xff\xff\xff\xff", "Prepared", "digests")
def test_lengths_that_are_not_there(kind, size, tag, field):
    body = b"\x82" + msgspec.msgpack.encode("type") + msgspec.msgpack.encode(tag) + msgspec.msgpack.encode(field)
    with cheap(), pytest.raises(WireError):
        wire.decode(head() + body + kind + size, tokens=["t"], last_seq=0)


@pytest.mark.parametrize("depth", [10, 1000, 100_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x81\xa5index"])
def test_nesting_of_frames(depth, opening):
    for frame in (opening * depth + b"\x00", head() + b"\x82\xa4type\xa4Ping\xa1x" + opening * depth + b"\x00"):
        with cheap(), contextlib.suppress(WireError):
            wire.decode(frame, tokens=["t"], last_seq=0)


# -- headers -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("headers") / "x.safetensors"


@given(size=st.integers(0, 2**64 - 1), data=st.binary(max_size=64))
@example(2**64 - 1, b"{}")
@example(MAX_HEADER_BYTES + 1, b"{}")
@example(2**63, b"")
def test_header_lengths_that_are_not_there(path, size, data):
    path.write_bytes(size.to_bytes(8, "little") + data)
    with cheap(), contextlib.suppress(ManifestError):
        read_header(path)
        assert size <= len(data)


def test_a_header_length_of_all_that_is_allowed_reads_what_is_there(path):
    path.write_bytes(MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}")
    with cheap(), pytest.raises(ManifestError, match="expected 100000000 bytes, got 2"):
        read_header(path)


numbers = st.sampled_from(
    [-1, 0, 1, 2, 8, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, 1.0, 1e400, float("nan"), True, None, "1"]
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F4", "u8", "", 8, None, ["U8"]]),
        "shape": st.lists(numbers, max_size=4) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | numbers,
    },
)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "__metadata__", "", "\x00"]), entries), max_size=4),
    st.binary(max_size=16),
)
def test_headers_of_hostile_numbers_and_repeated_names(path, fields, data):
    # by hand: json.dumps of a dict has no name twice
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in fields) + "}"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
    with cheap(), contextlib.suppress(ManifestError):
        header = read_header(path)
        assert len({name for name, _ in fields}) == len(fields)
        assert sum(tensor.size_bytes for tensor in header.tensors) == len(data)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [100, 10_000, 1_000_000])
def test_nesting_of_json(path, opening, depth):
    text = ('{"a":' + opening * depth).encode()
    with cheap(64 * MIB), pytest.raises(ValueError, match=r"nested too deeply|Expecting value"):
        parse_json_object(text)
    with cheap(64 * MIB), pytest.raises(ManifestError):
        Manifest.from_json(text)


@pytest.mark.parametrize("digits", [400, 4_000, 5_000, 1_000_000])
def test_integers_without_end(path, digits):
    text = f'{{"a":{{"dtype":"U8","shape":[{"9" * digits}],"data_offsets":[0,{"9" * digits}]}}}}'.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with cheap(64 * MIB), pytest.raises(ManifestError):
        read_header(path)
    with cheap(64 * MIB), pytest.raises(ManifestError):
        Manifest.from_json(text)


def test_many_zeros_in_a_shape(path):
    """A product over many extents grows with their number squared if nothing stops it."""
    text = f'{{"a":{{"dtype":"U8","shape":[{",".join(["2"] * 300_000)},0],"data_offsets":[0,0]}}}}'.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with cheap(64 * MIB), pytest.raises(ManifestError):
        read_header(path)
    tensors = [{"name": "a", "dtype": "U8", "shape": [2**62] * 100_000, "digest": ""}]
    text = json.dumps({"format": "ckpt-manifest", "format_version": 1, "tensors": tensors}).encode()
    with cheap(64 * MIB), pytest.raises(ManifestError):
        Manifest.from_json(text)
