"""Routes of a vLLM server, answered by a stand-in for HTTP: what is called, in which order, and what answers mean."""

import json

import httpx
import pytest

from ckpt_core.contract import DeviceKind, EndpointState, PauseMode, Rendezvous
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import EngineError, EngineStateError, EngineUnavailable
from ckpt_vllm import control
from ckpt_vllm import native as native_session

RENDEZVOUS = Rendezvous(address="ipc:///x", token="secret", update_id="u", silence_timeout_s=1.0)  # noqa: S106
FACTS = {"known": True, "paused": False, "asleep": False, "weights_asleep": False, "unfinished": 3}
ROUTES = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
RANK = {"rank": 0, "poison": "", "updating": False, "version": "v7", "way": "", "reason": "", "engine": FACTS}


def server_config(*, backend=None, extension="", tp=2, dp=1, device="cpu"):
    return {
        "parallel_config": {"world_size": tp, "data_parallel_size": dp, "worker_extension_cls": extension},
        "device_config": {"device": device},
        "weight_transfer_config": {"backend": backend} if backend else None,
        "instance_id": "start-1",
    }


class Server:
    """Answers by path; remembers what was asked."""

    def __init__(self, config, ranks=None, **answers):
        self.asked = []
        self.answers = {
            "/health": httpx.Response(200),
            "/server_info": httpx.Response(200, json={"vllm_config": config}),
            "/collective_rpc": httpx.Response(200, json={"results": ranks if ranks is not None else [RANK, RANK]}),
            **{f"/{path}": answer for path, answer in answers.items()},
        }

    def __call__(self, request):
        self.asked.append((request.url.raw_path.decode(), json.loads(request.content) if request.content else None))
        answer = self.answers.get(request.url.path)
        return answer if answer is not None else httpx.Response(404, text="no such route")

    def endpoint(self):
        client = httpx.Client(base_url="http://vllm", transport=httpx.MockTransport(self))
        return Endpoint(url="http://vllm", engine="vllm", _client=client)


def ok(**body):
    return httpx.Response(200, json=body)


@pytest.fixture
def native():
    return Server(server_config(backend="ckpt"))


def test_ready_tells_the_road_the_ranks_and_the_version(native):
    status = control.ready(native.endpoint())
    assert (status.engine, status.state, status.world_size) == ("vllm", EndpointState.SERVING, 2)
    assert (status.device_kind, status.instance_id, status.version) == (DeviceKind.CPU, "start-1", "v7")
    assert "weight-transfer engine" in status.detail


def test_ready_prefers_the_native_road():
    both = server_config(backend="ckpt", extension="ckpt_vllm.extension.CkptWorkerExtension")
    assert "weight-transfer engine" in control.ready(Server(both).endpoint()).detail
    extension = server_config(extension="ckpt_vllm.extension.CkptWorkerExtension")
    assert "worker extension" in control.ready(Server(extension).endpoint()).detail


@pytest.mark.parametrize(
    ("rank", "state"),
    [
        ({"updating": True}, EndpointState.UPDATING),
        ({"poison": "half of it"}, EndpointState.POISONED),
        ({"poison": "vLLM was started to wait for its first weights"}, EndpointState.WAITING_FOR_WEIGHTS),
        ({"engine": {**FACTS, "paused": True}}, EndpointState.PAUSED),
        ({"engine": {**FACTS, "paused": True, "asleep": True, "weights_asleep": True}}, EndpointState.ASLEEP),
        ({"engine": {**FACTS, "paused": True, "asleep": True}}, EndpointState.PAUSED),
        ({"error": "ImportError"}, EndpointState.DEAD),
    ],
)
def test_states(rank, state):
    server = Server(server_config(backend="ckpt"), ranks=[{**RANK, **rank}, {**RANK, **rank}])
    assert control.ready(server.endpoint()).state is state


def test_one_poisoned_rank_is_enough():
    server = Server(server_config(backend="ckpt"), ranks=[RANK, {**RANK, "poison": "rank 1 only"}])
    status = control.ready(server.endpoint())
    assert status.state is EndpointState.POISONED
    assert "rank 1 only" in status.detail


def test_ranks_of_two_versions_have_none():
    ranks = [RANK, {**RANK, "version": "v8"}]
    assert control.ready(Server(server_config(backend="ckpt"), ranks=ranks).endpoint()).version == ""


def test_a_dead_engine_behind_a_live_server():
    server = Server(server_config(backend="ckpt"), health=httpx.Response(503))
    assert control.ready(server.endpoint()).state is EndpointState.DEAD


def test_a_server_without_control_routes_is_told_how_to_start():
    server = Server({}, server_info=httpx.Response(404))
    with pytest.raises(EngineUnavailable, match="VLLM_SERVER_DEV_MODE=1"):
        control.ready(server.endpoint())


def test_a_server_without_a_way_in_is_told_how_to_start():
    with pytest.raises(EngineUnavailable, match="weight-transfer-config"):
        control.ready(Server(server_config(backend="nccl")).endpoint())
    assert all(path != "/collective_rpc" for path, _ in Server(server_config()).asked)


def test_something_else_at_the_address():
    with pytest.raises(EngineUnavailable, match="not as a vLLM server"):
        control.ready(Server(None).endpoint())


def test_a_server_without_the_plugin_is_never_asked_for_a_method_it_lacks():
    """A method that workers lack would desynchronise the ranks for good."""
    server = Server(server_config(backend="nccl"))
    with pytest.raises(EngineUnavailable):
        control.attach(server.endpoint(), RENDEZVOUS)
    assert [path.partition("?")[0] for path, _ in server.asked] == ["/server_info"]


def test_native_attach_is_one_call_between_bookkeeping():
    server = Server(server_config(backend="ckpt"), **{route: ok() for route in ROUTES})
    endpoint = server.endpoint()
    control.attach(endpoint, RENDEZVOUS)
    native_session.settle(endpoint)
    assert [path for path, _ in server.asked[1:]] == [f"/{route}" for route in ROUTES]
    assert server.asked[3][1]["update_info"]["rendezvous"]["update_id"] == "u"


def test_a_session_is_opened_during_the_pause_and_closed_by_the_resume():
    server = Server(server_config(backend="ckpt"), pause=ok(), resume=ok(), **{route: ok() for route in ROUTES})
    endpoint = server.endpoint()
    control.pause(endpoint, PauseMode.WAIT)
    opened = [path for path, _ in server.asked]
    assert {"/init_weight_transfer_engine", "/start_weight_update"} <= set(opened)
    control.attach(endpoint, RENDEZVOUS)
    control.resume(endpoint, None)
    later = [path for path, _ in server.asked[len(opened) :]]
    assert later[0] == "/update_weights"
    assert sorted(later[1:]) == ["/finish_weight_update", "/resume"]


def test_a_session_that_nothing_was_transferred_in_is_closed_by_the_resume():
    server = Server(server_config(backend="ckpt"), pause=ok(), resume=ok(), **{route: ok() for route in ROUTES})
    endpoint = server.endpoint()
    control.pause(endpoint, PauseMode.WAIT)
    control.resume(endpoint, None)
    assert [path for path, _ in server.asked[-2:]] == ["/resume", "/finish_weight_update"]


def test_a_session_that_cannot_be_closed_is_left_to_the_next_one():
    server = Server(server_config(backend="ckpt"), resume=ok(), **{route: ok() for route in ROUTES[:3]})
    endpoint = server.endpoint()
    control.attach(endpoint, RENDEZVOUS)
    control.resume(endpoint, None)
    control.attach(endpoint, RENDEZVOUS)
    assert [path for path, _ in server.asked].count("/init_weight_transfer_engine") == 2


def test_extension_attach_is_one_rpc_without_a_timeout():
    server = Server(server_config(extension="ckpt_vllm.extension.CkptWorkerExtension"))
    control.attach(server.endpoint(), RENDEZVOUS)
    path, body = server.asked[-1]
    assert path == "/collective_rpc"
    assert body["method"] == "ckpt_attach"
    assert body["kwargs"]["rendezvous"]["update_id"] == "u"
    assert "timeout" not in body


@pytest.mark.parametrize(
    ("mode", "query"),
    [
        (PauseMode.ABORT, "mode=abort&clear_cache=false"),
        (PauseMode.WAIT, "mode=wait&clear_cache=false"),
        (PauseMode.KEEP, "mode=keep&clear_cache=false"),
        (PauseMode.IN_PLACE, "mode=keep&clear_cache=false"),
        (PauseMode.RETRACT, "mode=keep&clear_cache=true"),
    ],
)
def test_pause_tells_how_many_requests_it_met(native, mode, query):
    for route in ("/pause", "/init_weight_transfer_engine", "/start_weight_update"):
        native.answers[route] = ok()
    native.answers["/collective_rpc"] = ok(results=[{**RANK, "engine": {**FACTS, "paused": True, "met": 3}}])
    assert control.pause(native.endpoint(), mode) == 3
    assert f"/pause?{query}" in [path for path, _ in native.asked]


@pytest.mark.parametrize(
    ("facts", "dp", "asked"),
    [
        ({"paused": True, "unfinished": 0, "met": 0}, 1, 1),
        ({"paused": True, "unfinished": 2, "met": 2}, 1, 2),
        ({"paused": False, "unfinished": 0}, 1, 2),
        ({"paused": True, "unfinished": 0, "met": 0}, 2, 2),
    ],
    ids=["idle", "busy", "not yet there", "only one of two cores told"],
)
def test_only_an_engine_that_was_idle_is_not_waited_for(facts, dp, asked):
    server = Server(server_config(backend="ckpt", dp=dp), [{**RANK, "engine": {**FACTS, **facts}}], resume=ok())
    for route in ("/pause", *(f"/{route}" for route in ROUTES)):
        server.answers[route] = ok()
    endpoint = server.endpoint()
    control.pause(endpoint, PauseMode.WAIT)
    assert [path for path, _ in server.asked].count("/collective_rpc") == asked
    control.resume(endpoint, None)
    assert any(path.startswith("/pause") for path, _ in server.asked)


def test_an_engine_that_was_seen_idle_is_resumed_though_its_pause_failed(native):
    native.answers |= {f"/{route}": ok() for route in (*ROUTES, "resume")} | {"/pause": httpx.Response(500)}
    native.answers["/collective_rpc"] = ok(
        results=[{**RANK, "engine": {**FACTS, "paused": True, "unfinished": 0, "met": 0}}]
    )
    endpoint = native.endpoint()
    assert control.pause(endpoint, PauseMode.WAIT) == 0
    control.resume(endpoint, None)
    assert "/resume" in [path for path, _ in native.asked]


def test_a_session_that_cannot_be_opened_ends_the_pause_after_vllm_answered(native):
    native.answers |= {"/pause": ok(), "/init_weight_transfer_engine": httpx.Response(500)}
    with pytest.raises(EngineError, match="init_weight_transfer_engine"):
        control.pause(native.endpoint(), PauseMode.WAIT)
    assert any(path.startswith("/pause") for path, _ in native.asked)


def test_a_refused_pause_is_an_error(native):
    native.answers |= {
        "/pause": httpx.Response(500),
        "/init_weight_transfer_engine": ok(),
        "/start_weight_update": ok(),
    }
    with pytest.raises(EngineError, match="/pause"):
        control.pause(native.endpoint(), PauseMode.ABORT)


def test_flush_drops_all_three_caches(native):
    native.answers |= {
        "/reset_prefix_cache": ok(success=True),
        "/reset_mm_cache": httpx.Response(200),
        "/reset_encoder_cache": httpx.Response(200),
    }
    control.flush_cache(native.endpoint())
    assert {path for path, _ in native.asked[1:]} == {"/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"}


def test_a_model_of_text_has_one_cache():
    config = {**server_config(backend="ckpt"), "model_config": {"multimodal_config": None}}
    server = Server(config, reset_prefix_cache=ok(success=True))
    control.flush_cache(server.endpoint())
    assert [path for path, _ in server.asked[1:]] == ["/reset_prefix_cache"]


def test_a_refused_flush_is_an_error(native):
    native.answers |= {"/reset_mm_cache": ok(), "/reset_encoder_cache": ok(), "/reset_prefix_cache": ok(success=False)}
    with pytest.raises(EngineError, match="prefix cache"):
        control.flush_cache(native.endpoint())


def test_resume_sets_the_version_first(native):
    native.answers |= {"/resume": ok(), "/update_weight_version": ok()}
    control.resume(native.endpoint(), "v8")
    assert native.asked == [("/update_weight_version", {"new_version": "v8"}), ("/resume", None)]


def test_resume_without_a_version_leaves_it(native):
    native.answers["/resume"] = ok()
    control.resume(native.endpoint(), None)
    assert [path for path, _ in native.asked] == ["/resume"]


def test_a_vllm_without_versions_is_asked_once(native):
    native.answers["/resume"] = ok()
    endpoint = native.endpoint()
    control.resume(endpoint, "v8")
    control.resume(endpoint, "v9")
    assert [path for path, _ in native.asked] == ["/update_weight_version", "/health", "/resume", "/resume"]


def test_a_refused_resume_is_an_error(native):
    native.answers["/resume"] = httpx.Response(500, json={"error": "refused"})
    with pytest.raises(EngineError, match="refused"):
        control.resume(native.endpoint(), None)


def test_wake_by_tags(native):
    native.answers["/wake_up"] = ok()
    control.wake(native.endpoint(), ("weights", "kv_cache"))
    control.wake(native.endpoint(), ())
    assert [path for path, _ in native.asked] == ["/wake_up?tags=weights&tags=kv_cache", "/wake_up"]


def test_facts_refuse_an_update_at_the_wrong_time():
    from ckpt_vllm.facts import EngineFacts

    EngineFacts().check_updatable()  # nobody looked
    EngineFacts(known=True, paused=True).check_updatable()
    EngineFacts(known=True, paused=True, asleep=True).check_updatable()  # only the KV cache sleeps
    for wrong in (EngineFacts(known=True), EngineFacts(known=True, paused=True, asleep=True, weights_asleep=True)):
        with pytest.raises(EngineStateError):
            wrong.check_updatable()


def test_facts_of_another_plugin_version_are_read():
    from ckpt_vllm.facts import EngineFacts

    facts = EngineFacts(known=True, unfinished=2)
    assert EngineFacts.from_json({**facts.to_json(), "new": 1}) == facts
