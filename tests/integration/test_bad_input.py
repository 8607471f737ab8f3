"""Bad input gets a clear error and nothing is touched: the live weights before are the live weights after."""
# ruff: noqa: PLR0917 (arguments are fixtures)

import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

from ckpt_core import CkptError, Outcome, Target, UpdateAborted, UpdateConfig, Updater
from ckpt_core.errors import CoverageError, EngineStateError, EngineUnavailable, ManifestError, PluginNotFound


@pytest.fixture(scope="module")
def shared_server(start_server, checkpoint_of):
    return start_server(checkpoint_of(which="a"), tp=2)


@pytest.fixture
def server(shared_server):
    """Whatever a test does with it, it must serve the same weights afterwards."""
    before = shared_server.live_digests()
    yield shared_server
    assert shared_server.live_digests() == before
    assert shared_server.status()["state"] == "serving"


@pytest.fixture
def good(checkpoint_of, tensors_of):
    """Tensors of checkpoint B, to be spoilt."""
    return tensors_of(checkpoint_of(which="b"))


# -- files -------------------------------------------------------------------------------------------------------
def header_of(entries, data=b""):
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(start, stop, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def cut(directory, good):
    save_file(good, directory / "model.safetensors")
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-1])


def twice(directory, good):
    names = sorted(good)
    save_file({name: good[name] for name in names[:5]}, directory / "1.safetensors")
    save_file({name: good[name] for name in names[4:]}, directory / "2.safetensors")


def without_a_named_file(directory, good):
    save_file(good, directory / "1.safetensors")
    weight_map = dict.fromkeys(good, "1.safetensors") | {"more": "2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def file_of(data):
    return lambda directory, _good: (directory / "model.safetensors").write_bytes(data)


SPOILT = {
    "no such directory": (lambda directory, _good: directory.rmdir(), "does not exist"),
    "empty directory": (lambda _directory, _good: None, "safetensors"),
    "index names a missing file": (without_a_named_file, r"2\.safetensors"),
    "truncated": (cut, "model.safetensors"),
    "empty file": (file_of(b""), "model.safetensors"),
    "header longer than the file": (file_of(struct.pack("<Q", 1 << 40) + b"{}"), "model.safetensors"),
    "header is no JSON": (file_of(struct.pack("<Q", 4) + b"spam"), "model.safetensors"),
    "overlapping": (file_of(header_of({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12))), "'b'|'a'"),
    "out of range": (file_of(header_of({"a": entry(0, 80, [20])}, bytes(8))), "'a'|model.safetensors"),
    "unknown dtype": (file_of(header_of({"a": entry(0, 8, [2], "Q4_K")}, bytes(8))), "Q4_K"),
    "shape and bytes differ": (file_of(header_of({"a": entry(0, 8, [3])}, bytes(8))), "'a'"),
    "no tensors": (file_of(header_of({})), "model.safetensors|no tensors|empty"),
    "a name in two files": (twice, "1.safetensors|2.safetensors"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_checkpoint_is_refused(server, updater_of, good, tmp_path, fault):
    spoil, says = SPOILT[fault]
    directory = tmp_path / "model"
    directory.mkdir()
    spoil(directory, good)
    updater = updater_of(server)
    with pytest.raises(ManifestError, match=says):
        updater.update(directory)
    assert updater.agent_pids == ()  # refused before anything was started


def test_no_tensors_in_memory_are_refused(server, updater_of):
    with pytest.raises(ManifestError, match="give at least one"):
        updater_of(server).update({})


@pytest.mark.parametrize("value", [3, [1.0], None], ids=repr)
def test_what_is_no_tensor_is_refused_by_name(server, updater_of, good, value):
    with pytest.raises(ManifestError, match="'odd': expected a dense tensor"):
        updater_of(server).update({"odd": value, **good})


# -- what does not fit the engine --------------------------------------------------------------------------------
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def lack(good):
    good.pop(NORM)


def add(good):
    good["model.rotor.weight"] = torch.ones(3)


def reshape(good):
    good[EMBEDDING] = good[EMBEDDING][:-1].clone()


def transpose(good):
    good[EMBEDDING] = good[EMBEDDING].t().contiguous()


def retype(good):
    good[NORM] = good[NORM].float()


MISFITS = {
    "lacks one": (lack, [NORM, "missing", "--allow-missing"]),
    "has one more": (add, ["model.rotor.weight", "not known", "--allow-unexpected"]),
    "wrong shape": (reshape, [EMBEDDING, "[300, 96]", "[299, 96]"]),
    "transposed": (transpose, [EMBEDDING, "[300, 96]", "[96, 300]"]),
    "wrong dtype": (retype, [NORM, "BF16", "F32"]),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(server, updater_of, good, misfit):
    spoil, says = MISFITS[misfit]
    spoil(good)
    with pytest.raises(UpdateAborted) as caught:
        updater_of(server).update(good)
    assert caught.value.outcome is Outcome.CLEAN
    assert caught.value.by_endpoint == {server.url: Outcome.CLEAN}
    assert isinstance(caught.value.causes[0], CoverageError)
    for text in says:
        assert text in str(caught.value)


def test_what_is_allowed_is_taken(shared_server, updater_of, good, tensors_of, checkpoint_of):
    before = shared_server.live_digests()
    lack(good)
    add(good)
    updater = updater_of(shared_server, allow_missing=True, allow_unexpected=True)
    updater.update(good)
    after = shared_server.live_digests()
    kept = [name for ranks, now in zip(before, after, strict=True) for name in ranks if ranks[name] == now[name]]
    assert kept == [NORM, NORM]  # on both ranks it stays as it was, all others changed
    updater.update(checkpoint_of(which="a"))
    assert shared_server.live_digests() == before


# -- engines -----------------------------------------------------------------------------------------------------
class NoEngine(BaseHTTPRequestHandler):
    """A web server that says yes to everything."""

    def do_GET(self):
        body = self.server.body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 (named by http.server)

    def log_message(self, *_arguments):
        """Quiet."""


@pytest.fixture
def web_server():
    with ThreadingHTTPServer(("127.0.0.1", 0), NoEngine) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


OTHER = {
    "engine": "vllm",
    "state": "serving",
    "world_size": 1,
    "device_kind": "cpu",
    "instance_id": "",
    "version": "",
    "detail": "",
}


@pytest.mark.parametrize(
    "body",
    [b"<html>hello</html>", b"", b"[]", b"{}", json.dumps(OTHER).encode()],
    ids=["html", "empty", "list", "{}", "vllm"],
)
def test_what_is_not_that_engine_is_refused(updater_of, web_server, checkpoint_of, server, body):
    web_server.body = body
    with pytest.raises(EngineUnavailable):
        updater_of(server, f"http://127.0.0.1:{web_server.server_port}").update(checkpoint_of(which="b"))


def test_an_engine_that_is_down_is_refused(updater_of, web_server, checkpoint_of, server):
    with ThreadingHTTPServer(("127.0.0.1", 0), NoEngine) as gone:
        port = gone.server_port
    with pytest.raises(EngineUnavailable, match="is the server up"):
        updater_of(server, f"http://127.0.0.1:{port}").update(checkpoint_of(which="b"))


def test_an_engine_without_plugin_is_refused(server):
    with pytest.raises(PluginNotFound, match=r"no plugin for engine 'nosuch'; installed: .*reference"):
        Updater([Target(engine="nosuch", url=server.url)])


def test_an_engine_asleep_is_refused_and_stays_so(start_server, checkpoint_of, updater_of):
    server = start_server(checkpoint_of(which="a"))
    assert server.post("/pause", mode="abort").is_success
    assert server.post("/sleep", level="1").is_success
    with pytest.raises(EngineStateError, match=r"is asleep .*wake it first"):
        updater_of(server).update(checkpoint_of(which="b"))
    assert server.status()["state"] == "asleep"


def test_two_updates_at_once_exclude_each_other(server, checkpoint_of, updater_of, stall, monkeypatch, tmp_path):
    """The second is refused by this host's lock, and from another host by the engine; the first goes on to its end."""
    errors = []

    def try_second():
        try:
            updater_of(server).update(checkpoint_of(which="b"))
        except CkptError as error:
            errors.append(error)

    def in_the_middle():
        try_second()
        with monkeypatch.context() as patch:
            patch.setenv("CKPT_SOCKET_DIR", str(tmp_path))
            try_second()
        stall.go()

    stall.at_middle = in_the_middle
    report = updater_of(server, on_progress=stall.on_progress).update(checkpoint_of(which="a"))
    assert report.outcome is Outcome.COMMITTED
    assert [type(error) for error in errors] == [EngineStateError] * 2
    assert "another update of" in str(errors[0])
    assert "updating" in str(errors[1])


def test_an_engine_of_two_that_refuses_keeps_the_other_untouched(server, start_server, checkpoint_of, updater_of):
    asleep = start_server(checkpoint_of(which="a"))
    asleep.post("/pause", mode="abort")
    asleep.post("/sleep", level="1")
    with pytest.raises(EngineStateError):
        updater_of(server, asleep).update(checkpoint_of(which="b"))


def test_a_pause_that_does_not_come_in_time_ends_the_update(server, checkpoint_of):
    """A long request is in flight and mode wait lets it finish: the deadline of the pause ends the attempt."""
    stream = server.stream([5, 17], 400, ignore_eos=True)
    next(stream)  # it runs
    config = UpdateConfig(pause_timeout_s=0.1)
    with (
        Updater([Target(engine="reference", url=server.url)], config=config) as updater,
        pytest.raises(UpdateAborted) as caught,
    ):
        updater.update(checkpoint_of(which="b"))
    assert caught.value.outcome is Outcome.CLEAN
    assert [event for event in stream if "finish_reason" in event]
