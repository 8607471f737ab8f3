"""How answers of a server become results and typed errors."""

import json

import httpx
import pytest

from ckpt_core.contract import DeviceKind, EndpointState, PauseMode, Rendezvous
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import EngineError, EngineStateError, EngineUnavailable
from ckpt_sglang.client import HandleClient, HttpClient, client_of

STATUS = {
    "engine": "sglang",
    "state": "serving",
    "world_size": 2,
    "device_kind": "cpu",
    "instance_id": "abc",
    "version": "one",
    "detail": "",
}
RENDEZVOUS = Rendezvous(address="ipc:///x", token="secret", update_id="u", silence_timeout_s=1.0)  # noqa: S106


@pytest.fixture
def endpoint_of():
    made = []

    def endpoint_of(routes):
        def answer(request):
            found = routes.get(f"{request.method} {request.url.path}", httpx.Response(404))
            return found(request) if callable(found) else found

        endpoint = Endpoint(url="http://engine", engine="sglang")
        endpoint._client = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://engine")
        made.append(endpoint)
        return endpoint

    yield endpoint_of
    for endpoint in made:
        endpoint.close()


def test_status(endpoint_of):
    status = client_of(endpoint_of({"GET /ckpt/status": httpx.Response(200, json=STATUS)})).status()
    assert (status.state, status.world_size, status.device_kind) == (EndpointState.SERVING, 2, DeviceKind.CPU)
    assert status.version == "one"


@pytest.mark.parametrize("answer", [httpx.Response(200, text="hello"), httpx.Response(200, json={"engine": "sglang"})])
def test_status_of_something_else(endpoint_of, answer):
    with pytest.raises(EngineUnavailable, match="check the address"):
        HttpClient(endpoint_of({"GET /ckpt/status": answer})).status()


def test_a_server_without_the_plugin_is_told_from_another_server(endpoint_of):
    with pytest.raises(EngineUnavailable, match="without the ckpt plugin"):
        HttpClient(endpoint_of({"GET /model_info": httpx.Response(200, json={})})).status()
    with pytest.raises(EngineUnavailable, match="no SGLang server"):
        HttpClient(endpoint_of({})).status()


def test_attach_carries_the_rendezvous_and_neither_flush_nor_version(endpoint_of):
    seen = []

    def attach(request):
        seen.append(json.loads(request.content))
        return httpx.Response(200, json={"success": True})

    HttpClient(endpoint_of({"POST /update_weights_from_ipc": attach})).attach(RENDEZVOUS)
    (body,) = seen
    assert body["flush_cache"] is False
    assert body["weight_version"] is None
    assert json.loads(body["zmq_handles"]["ckpt"])["token"] == RENDEZVOUS.token


def test_an_attach_that_did_not_commit_says_why(endpoint_of):
    refused = httpx.Response(400, json={"success": False, "message": "ckpt: rank 0 ended reloadable: boom"})
    with pytest.raises(EngineError, match="boom"):
        HttpClient(endpoint_of({"POST /update_weights_from_ipc": refused})).attach(RENDEZVOUS)


def test_refusals_are_errors_of_state(endpoint_of):
    routes = {
        "POST /ckpt/resume": httpx.Response(409, json={"message": "not resumed"}),
        "POST /ckpt/pause": httpx.Response(409, json={"message": "did not end"}),
    }
    client = HttpClient(endpoint_of(routes))
    with pytest.raises(EngineStateError, match="not resumed"):
        client.resume("v")
    with pytest.raises(EngineStateError, match="did not end"):
        client.pause(PauseMode.WAIT)


def test_a_refused_flush_is_an_error_that_can_be_retried(endpoint_of):
    with pytest.raises(EngineError):
        HttpClient(endpoint_of({"POST /flush_cache": httpx.Response(400, text="Flush cache failed.")})).flush()


def test_pause_tells_how_many_were_in_flight_and_hands_on_mode_and_deadline(endpoint_of):
    asked = []

    def pause(request):
        asked.append(dict(request.url.params))
        return httpx.Response(200, json={"in_flight": 3})

    endpoint = endpoint_of({"POST /ckpt/pause": pause})
    assert HttpClient(endpoint).pause(PauseMode.RETRACT) == 3
    assert asked == [{"mode": "retract", "timeout_s": str(endpoint.options.pause_timeout_s)}]


def test_a_handle_that_is_no_engine():
    endpoint = Endpoint(url="label", engine="sglang", handle=object())
    with pytest.raises(EngineError, match=r"expected an sglang\.Engine"):
        HandleClient(endpoint.handle, endpoint)
