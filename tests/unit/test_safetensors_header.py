"""Headers: what a good file says, and that each kind of damage is named."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckpt_core.dtypes import DType
from ckpt_core.errors import ManifestError
from ckpt_core.safetensors_header import MAX_HEADER_BYTES, TensorHeader, parse_json_object, read_header


def entry(dtype="U8", shape=(2,), offsets=(0, 2)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write(path, header, data=b"", *, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_reads_names_dtypes_shapes_offsets_and_metadata(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float16),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.size_bytes == path.stat().st_size
    found = {tensor.name: tensor for tensor in header.tensors}
    assert (found["b"].dtype, found["b"].shape, found["b"].size_bytes) == (DType.F32, (2, 3), 24)
    assert (found["scalar"].shape, found["scalar"].size_bytes) == ((), 8)
    assert (found["empty"].shape, found["empty"].size_bytes) == ((0, 4), 0)
    raw = path.read_bytes()
    for name in ("b", "scalar"):
        place = found[name]
        assert raw[place.offset_bytes : place.offset_bytes + place.size_bytes] == tensors[name].tobytes()


def test_no_tensors_and_padding_are_fine(tmp_path):
    header = read_header(write(tmp_path / "a", b"{}      "))
    assert header.tensors == ()
    assert header.metadata == {}


def test_an_empty_tensor_may_lie_where_another_begins(tmp_path):
    fields = {"a": entry(), "empty": entry(shape=(0,), offsets=(0, 0))}
    header = read_header(write(tmp_path / "a", fields, b"aa"))
    assert [tensor.name for tensor in header.tensors] == ["empty", "a"]


def test_tensors_come_in_file_order(tmp_path):
    fields = {"a": entry(offsets=(2, 4)), "z": entry(offsets=(0, 2))}
    header = read_header(write(tmp_path / "a", fields, b"zzaa"))
    first = header.tensors[0]
    assert first == TensorHeader(name="z", dtype=DType.U8, shape=(2,), offset_bytes=header.size_bytes - 4, size_bytes=2)


@pytest.mark.parametrize(
    ("fields", "data", "what"),
    [
        ({"a": entry(dtype="F7")}, b"ab", "dtype: expected one of BOOL"),
        ({"a": entry(dtype=None)}, b"ab", "dtype"),
        ({"a": entry(dtype=["U8"])}, b"ab", "dtype"),
        ({"a": entry(shape=(-2,))}, b"ab", "shape: expected a list of integers >= 0, got [-2]"),
        ({"a": entry(shape=(True, 2))}, b"ab", "shape"),
        ({"a": entry(shape=(2.0,))}, b"ab", "shape"),
        ({"a": {**entry(), "shape": 2}}, b"ab", "shape"),
        ({"a": entry(shape=(2**40, 2**40))}, b"ab", "shape: expected at most"),
        ({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}, b"", "shape: expected at most"),
        ({"a": entry(shape=(2**70, 0), offsets=(0, 0))}, b"", "shape: expected at most"),
        ({"a": entry(shape=(0, 2**70), offsets=(0, 0))}, b"", "shape: expected at most"),
        ({"a": {"dtype": "U8", "shape": [2]}}, b"ab", "data_offsets: expected [begin, end]"),
        ({"a": entry(offsets=(2, 0))}, b"ab", "data_offsets: expected [begin, end]"),
        ({"a": entry(offsets=(-2, 0))}, b"ab", "data_offsets: expected [begin, end]"),
        ({"a": entry(offsets=(False, 2))}, b"ab", "data_offsets: expected [begin, end]"),
        ({"a": entry(offsets=(0, 1, 2))}, b"ab", "data_offsets: expected [begin, end]"),
        ({"a": entry(offsets=(0, 3))}, b"abc", "expected 2 bytes for U8 [2], got 3 bytes"),
        ({"a": entry(shape=(9,), offsets=(0, 9))}, b"ab", "out of range"),
        ({"a": entry(), "b": entry(offsets=(1, 3))}, b"abc", "tensor 'b': data_offsets: expected begin at 2, got 1"),
        ({"a": entry(), "b": entry(offsets=(3, 5))}, b"abcde", "leaves a hole before it"),
        ({"a": entry(offsets=(1, 3))}, b"abc", "leaves a hole before it"),
        ({"a": entry(), "b": entry(shape=(0,), offsets=(1, 1))}, b"ab", "overlaps"),
        ({"a": entry()}, b"abc", "expected a file of"),
        ({"a": 5}, b"", "entry: expected an object"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__: expected an object of strings"),
        ({"__metadata__": []}, b"", "__metadata__: expected an object of strings"),
    ],
)
def test_bad_entries_name_file_tensor_and_fault(tmp_path, fields, data, what):
    path = write(tmp_path / "bad.safetensors", fields, data)
    with pytest.raises(ManifestError) as caught:
        read_header(path)
    message = str(caught.value)
    assert what in message
    assert str(path) in message
    assert message.rpartition(";")[2].strip(), "says what to do"


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b"[]", "a JSON list"),
        (b"nonsense", "Expecting value"),
        (b"\xff{}", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a":1,"a":2}', "the key 'a' twice"),
        (b'{"a":{"shape":[],"shape":[]}}', "the key 'shape' twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"\\ud800":1}', "surrogates"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' + b"9" * 10_000 + b"}", "digits"),
        (b"{}\0\0", "Extra data"),
        (b"", "Expecting value"),
    ],
)
def test_bad_json_is_named(tmp_path, header, what):
    with pytest.raises(ManifestError, match="header: expected a JSON object") as caught:
        read_header(write(tmp_path / "bad", header))
    assert what in str(caught.value)


def test_header_length_is_checked_before_anything_is_read(tmp_path):
    with pytest.raises(ManifestError, match=f"at most {MAX_HEADER_BYTES} bytes, got 18446744073709551615"):
        read_header(write(tmp_path / "huge", b"{}", length=2**64 - 1))
    with pytest.raises(ManifestError, match="header: expected 50 bytes, got 2"):
        read_header(write(tmp_path / "long", b"{}", length=50))
    (tmp_path / "short").write_bytes(b"1234567")
    with pytest.raises(ManifestError, match="of >= 8 bytes, got 7"):
        read_header(tmp_path / "short")


def test_what_is_no_readable_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, what in (
        (tmp_path / "missing", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "fifo", "not a regular file"),
        ("a\0b", "null"),
    ):
        with pytest.raises(ManifestError, match=what):
            read_header(path)


def test_escapes_of_whole_characters_are_text():
    assert parse_json_object(b'{"\\ud83d\\ude00": "\\u00e4"}') == {"\U0001f600": "ä"}
