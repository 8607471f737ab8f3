"""Opening checkpoints: directories, lists, indexes; what is wrong is said; tensors in memory keep their bits."""

import json
import os
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ckpt_core import source
from ckpt_core.dtypes import DType
from ckpt_core.errors import CapacityError, ConfigError, ManifestError
from ckpt_core.pool_file import stage_tensors
from ckpt_core.safetensors_header import read_header
from ckpt_core.source import DeviceRegion, Extent, SourceFile, SourceIndex, open_checkpoint
from ckpt_core.source_share import as_here, only


def save(path, *names, value=1.0):
    save_file({name: np.full((2, 3), value, dtype=np.float32) for name in names}, path)
    return path


def write_index(directory, weight_map, name="model.safetensors.index.json"):
    path = directory / name
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def read(index, name):
    extent = next(extent for extent in index.extents if extent.name == name)
    with open(index.files[extent.file].path, "rb") as file:
        file.seek(extent.offset_bytes)
        return file.read(extent.size_bytes)


def names(index):
    return [extent.name for extent in index.extents]


# -- directories and files ---------------------------------------------------------------------------------------
def test_a_directory_without_index_gives_all_its_files(tmp_path):
    save(tmp_path / "b.safetensors", "x", "c")
    save(tmp_path / "a.safetensors", "y")
    (tmp_path / "._a.safetensors").write_bytes(b"resource fork")
    (tmp_path / "config.json").write_text("{}")
    index = open_checkpoint(tmp_path)
    assert names(index) == ["c", "x", "y"]
    assert [os.path.basename(file.path) for file in index.files] == ["a.safetensors", "b.safetensors"]
    assert index.size_bytes == 3 * 24
    assert read(index, "x") == np.full(6, 1.0, dtype=np.float32).tobytes()


def test_a_file_and_a_list_of_files(tmp_path):
    one, two = save(tmp_path / "1.safetensors", "a"), save(tmp_path / "2.safetensors", "b")
    assert names(open_checkpoint(one)) == ["a"]
    assert names(open_checkpoint(str(one))) == ["a"]
    assert names(open_checkpoint([two, str(one)])) == ["a", "b"]


def test_an_index_gives_exactly_the_files_it_names(tmp_path):
    save(tmp_path / "model-1.safetensors", "a")
    save(tmp_path / "model-2.safetensors", "b")
    save(tmp_path / "consolidated.safetensors", "a", "b", value=2.0)
    path = write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    for location in (tmp_path, path):
        index = open_checkpoint(location)
        assert names(index) == ["a", "b"]
        assert len(index.files) == 2


def test_links_into_a_blob_store_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    blob = save(blobs / "0123abc", "a")
    (snapshot / "model.safetensors").symlink_to("../blobs/0123abc")
    index = open_checkpoint(snapshot)
    assert index.files[0].path == str(blob.resolve())


def linked(tmp_path, mode, uid=None):
    """A snapshot whose one file is a link to a blob of that mode and owner."""
    blob = save(tmp_path / "blob", "a")
    blob.chmod(mode)
    if uid is not None:
        os.chown(blob, uid, -1)
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "model.safetensors"
    link.symlink_to("../blob")
    return link


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o664])
def test_a_link_to_a_file_that_only_its_owner_and_his_group_write(tmp_path, mode):
    assert names(open_checkpoint(linked(tmp_path, mode).parent)) == ["a"]


@pytest.mark.parametrize("mode", [0o666, 0o646])
def test_a_link_to_a_file_that_everybody_writes_is_refused(tmp_path, mode):
    link = linked(tmp_path, mode)
    for location in (link, link.parent, [link]):
        with pytest.raises(
            ManifestError, match=rf"a link to .*blob', which others may write to \(mode {mode:04o}.*chmod go-w"
        ):
            open_checkpoint(location)
    (tmp_path / "blob").chmod(0o644)
    index = tmp_path / "index"
    write_index(tmp_path, {"a": "model.safetensors"}).rename(index)
    (link.parent / "model.safetensors.index.json").symlink_to(index)
    assert names(open_checkpoint(link.parent)) == ["a"]
    index.chmod(mode)
    with pytest.raises(ManifestError, match=r"a link to .*index', which others may write to"):
        open_checkpoint(link.parent)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_link_to_a_file_of_another_user(tmp_path):
    link = linked(tmp_path, 0o644, uid=12345)
    assert names(open_checkpoint(link)) == ["a"]
    (tmp_path / "blob").chmod(0o664)
    with pytest.raises(ManifestError, match=r"others may write to \(mode 0664, uid 12345"):
        open_checkpoint(link)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("target", ["fifo", "/dev/zero"])
def test_pipes_and_devices_are_refused_at_once(tmp_path, name, target):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).symlink_to(target if target.startswith("/") else tmp_path / target)
    with pytest.raises(ManifestError, match="regular file"):
        open_checkpoint(tmp_path / "d")


def test_an_index_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    save(tmp_path / "1.safetensors", "a")
    write_index(tmp_path, {"a": "1.safetensors"})
    monkeypatch.setattr(source, "_MAX_INDEX_BYTES", 10)
    with pytest.raises(ManifestError, match="more than 10 bytes"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("swap", ["another file", "a link", "a pipe"])
@pytest.mark.timeout(20)
def test_a_file_swapped_between_look_and_open_is_not_read(tmp_path, monkeypatch, swap):
    path, other = save(tmp_path / "1.safetensors", "a"), save(tmp_path / "2.safetensors", "b")
    file = SourceFile.of(path)
    if swap == "another file":
        other.replace(path)
    else:
        path.unlink()
        path.symlink_to(other) if swap == "a link" else os.mkfifo(path)
    with pytest.raises(ManifestError, match=r"changed since it was opened|cannot open .*symbolic links"):
        file.open()


def test_of_several_indexes_the_models_own_is_taken_else_one_must_be_named(tmp_path):
    save(tmp_path / "a.safetensors", "a")
    save(tmp_path / "b.safetensors", "b")
    first = write_index(tmp_path, {"a": "a.safetensors"}, "x.safetensors.index.json")
    write_index(tmp_path, {"b": "b.safetensors"}, "y.safetensors.index.json")
    with pytest.raises(ManifestError, match=r"expected one index, got x.*y.*name the index file"):
        open_checkpoint(tmp_path)
    assert names(open_checkpoint(first)) == ["a"]
    write_index(tmp_path, {"b": "b.safetensors"})
    assert names(open_checkpoint(tmp_path)) == ["b"]


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(ManifestError, match="does not exist; name a directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match="got none; check the path"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"convert pytorch_model\.bin to safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(ManifestError, match="an empty list of files"):
        open_checkpoint([])
    save(tmp_path / "a.safetensors")
    with pytest.raises(ManifestError, match="expected a checkpoint with tensors, got none"):
        open_checkpoint(tmp_path)
    with pytest.raises(ManifestError, match="regular file"):
        open_checkpoint([tmp_path])


def test_a_name_in_two_files_is_refused(tmp_path):
    save(tmp_path / "1.safetensors", "a", "b")
    save(tmp_path / "2.safetensors", "b")
    with pytest.raises(ManifestError, match=r"'b' is in two files, .*1\.safetensors.*2\.safetensors"):
        open_checkpoint(tmp_path)


def test_an_index_must_fit_its_files(tmp_path):
    save(tmp_path / "1.safetensors", "a")
    save(tmp_path / "2.safetensors", "b")
    write_index(tmp_path, {"a": "1.safetensors", "c": "3.safetensors"})
    with pytest.raises(ManifestError, match=r"names the file '3\.safetensors', which does not exist"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {"a": "1.safetensors", "gone": "2.safetensors"})
    with pytest.raises(ManifestError, match=r"'gone': expected it in '2\.safetensors', got no such tensor"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {"a": "2.safetensors", "b": "1.safetensors"})
    with pytest.raises(ManifestError, match=r"'a': expected it in '2\.safetensors', got it in '1\.safetensors'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../1.safetensors", "/etc/passwd", "sub/1.safetensors", "", "..", "a\0b", 7, None])
def test_an_index_must_not_point_elsewhere(tmp_path, name):
    save(tmp_path / "1.safetensors", "a")
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub" / "1.safetensors", "a")
    write_index(tmp_path / "sub", {"a": name})
    with pytest.raises(ManifestError, match="expected the plain name of a file"):
        open_checkpoint(tmp_path / "sub")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"a": 1, "a": 2}', "{"])
def test_an_index_that_is_none(tmp_path, text):
    save(tmp_path / "1.safetensors", "a")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ManifestError, match=r"index\.json.*expected .* object"):
        open_checkpoint(tmp_path)


def test_a_changed_file_is_noticed(tmp_path):
    path = save(tmp_path / "1.safetensors", "a")
    index = open_checkpoint(path)
    index.check()
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(ManifestError, match=r"changed since it was opened: expected size_bytes \d+.*got size_bytes"):
        index.check()
    path.unlink()
    with pytest.raises(ManifestError, match="No such file"):
        index.check()


def test_a_file_that_changes_while_it_is_opened_is_noticed(tmp_path, monkeypatch):
    path = save(tmp_path / "1.safetensors", "a")

    def read_and_write(path, file):
        header = read_header(path, file)
        os.utime(path, ns=(0, 0))
        return header

    monkeypatch.setattr(source, "read_header", read_and_write)
    with pytest.raises(ManifestError, match="changed since it was opened"):
        open_checkpoint(path)


def test_a_file_replaced_by_an_equal_one_is_noticed(tmp_path):
    path = save(tmp_path / "1.safetensors", "a")
    before = SourceFile.of(path)
    other = save(tmp_path / "2.safetensors", "a")
    os.utime(other, ns=(before.mtime_ns, before.mtime_ns))
    other.replace(path)
    with pytest.raises(ManifestError, match="expected inode"):
        before.check()


# -- parts, and other hosts ----------------------------------------------------------------------------------------
def test_only_some_tensors_need_only_their_files(tmp_path):
    for number, kept in enumerate(("ab", "c", "d")):
        save(tmp_path / f"{number}.safetensors", *kept, value=float(number))
    index = open_checkpoint(tmp_path)
    part = only(index, {"a", "d", "unknown"})
    assert names(part) == ["a", "d"]
    assert part.files == (index.files[0], index.files[2])
    assert [extent.file for extent in part.extents] == [0, 1]
    for name in ("a", "d"):
        assert read(part, name) == read(index, name)
    assert only(index, names(index)) == index
    nothing = only(index, ())
    assert (nothing.files, nothing.extents, nothing.size_bytes) == ((), (), 0)


def test_only_some_tensors_need_only_their_device_memory():
    regions = tuple(DeviceRegion(uuid="GPU-0", handle=f"{n:02x}", size_bytes=64) for n in range(3))
    file = SourceFile(path="/f", size_bytes=64, mtime_ns=1, inode=2, device=3)
    extents = tuple(
        Extent(name=name, dtype=DType.U8, shape=(8,), file=number, offset_bytes=8, size_bytes=8)
        for number, name in enumerate("abcd")  # a in the file, the others in regions
    )
    index = SourceIndex(files=(file,), extents=extents, regions=regions)
    for kept, files, of in (("bd", 0, (0, 2)), ("ac", 1, (1,)), ("d", 0, (2,)), ("a", 1, ())):
        part = only(index, kept)
        assert len(part.files) == files
        assert part.regions == tuple(regions[number] for number in of)
        assert [extent.file for extent in part.extents] == list(range(len(kept)))


def test_files_are_the_same_on_another_host_whatever_their_numbers_there(tmp_path):
    path = save(tmp_path / "1.safetensors", "a")
    here = open_checkpoint(path)
    elsewhere = replace(here, files=tuple(replace(file, inode=1, device=2) for file in here.files))
    with pytest.raises(ManifestError, match="changed"):
        elsewhere.check()
    assert as_here(elsewhere) == here
    assert as_here(here) == here


@pytest.mark.parametrize("changed", [{"size_bytes": 1}, {"mtime_ns": 1}])
def test_another_file_of_that_name_on_another_host_is_noticed(tmp_path, changed):
    path = save(tmp_path / "1.safetensors", "a")
    here = open_checkpoint(path)
    elsewhere = replace(here, files=tuple(replace(file, inode=1, **changed) for file in here.files))
    (name,) = changed
    with pytest.raises(ManifestError, match=rf"1\.safetensors' changed since it was opened: expected {name} 1"):
        as_here(elsewhere)
    path.unlink()
    with pytest.raises(ManifestError, match="No such file"):
        as_here(elsewhere)


# -- tensors in memory -------------------------------------------------------------------------------------------
def test_staged_tensors_keep_their_bits_whatever_their_strides(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tied = torch.nn.Parameter(base.clone())
    tensors = {
        "transposed": base.t(),
        "strided": base[::2, 1::2].to(torch.bfloat16),
        "view": base[1:3].view(torch.int32),
        "expanded": torch.tensor([3], dtype=torch.int8).expand(5),
        "float8": torch.randn(5, 3).to(torch.float8_e4m3fn).t(),
        "flags": torch.tensor([True, False]),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "tied.a": tied,
        "tied.b": tied,
    }
    index = stage_tensors(tensors, tmp_path)
    assert names(index) == sorted(tensors)
    for extent in index.extents:
        tensor = tensors[extent.name].detach().resolve_conj().contiguous()
        assert extent.shape == tuple(tensor.shape)
        assert extent.dtype == DType.from_torch_name(str(tensor.dtype))
        assert extent.offset_bytes % 256 == 0
        assert read(index, extent.name) == bytes(tensor.reshape(-1).view(torch.uint8).numpy().data)
    index.check()


def test_the_pool_is_one_private_file(tmp_path):
    index = stage_tensors({"a": torch.ones(3), "b": torch.ones(1000)}, tmp_path)
    (path,) = tmp_path.iterdir()
    assert index.files[0].path == str(path.resolve())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == 256 + 4000
    assert index.extents[1] == Extent(
        name="b", dtype=DType.F32, shape=(1000,), file=0, offset_bytes=256, size_bytes=4000
    )
    stage_tensors({"a": torch.ones(3)}, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "every pool is a file of its own"


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.zeros(2, dtype=torch.complex128), "complex128; convert"),
        (torch.eye(2).to_sparse(), "to_dense"),
        (torch.empty(2, device="meta"), "meta tensor"),
        (np.zeros(2), "give torch tensors"),
    ],
)
def test_tensors_that_no_checkpoint_can_hold(tmp_path, tensor, what):
    with pytest.raises(ManifestError, match=f"tensor 'bad': expected a dense tensor with data, got .*{what}"):
        stage_tensors({"good": torch.ones(2), "bad": tensor}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_staging_needs_tensors_a_place_and_room(tmp_path, monkeypatch):
    with pytest.raises(ManifestError, match="got none"):
        stage_tensors({}, tmp_path)
    with pytest.raises(ConfigError, match="name a writable directory"):
        stage_tensors({"a": torch.ones(2)}, tmp_path / "nowhere")

    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match="expected 8 free bytes"):
        stage_tensors({"a": torch.ones(2)}, tmp_path)
    assert list(tmp_path.iterdir()) == []
