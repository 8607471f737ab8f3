"""No token from weights that are not one checkpoint; pause, drain, resume; several ranks together."""

import asyncio
import threading

import pytest

from ckpt_core.contract import EndpointState, PauseMode
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import ConfigError, EngineStateError, EngineUnavailable
from ckpt_trtllm import control
from ckpt_trtllm.handles import AsyncHandle, LocalHandle, SyncHandle, handle_of
from ckpt_trtllm.rank import rank_of
from ckpt_trtllm.standin.llm import StandInLlm
from ckpt_trtllm.standin.worker import StandInWorker

PROMPT = list(range(2, 22))


def endpoint_of(handle):
    return Endpoint(url="x", engine="trtllm", handle=handle)


@pytest.fixture
def llm(bench):
    with StandInLlm(bench.checkpoint(1).path, tensor_parallel_size=2) as llm:
        yield llm


def test_the_forward_pass_raises_and_the_executor_lives(bench):
    worker = bench.worker_on(1)
    bench.harness.serve(worker)
    usual = bench.tokens(worker)
    worker.set_poison("mixed")
    with pytest.raises(EngineStateError, match="rank 0 produces no token: mixed"):
        worker.worker.engine.model_engine.forward(None)
    with pytest.raises(EngineStateError, match="the request failed: rank 0 produces no token: mixed"):
        bench.tokens(worker)
    worker.set_poison(None)
    assert bench.tokens(worker) == usual


def test_a_rank_that_may_not_serve_keeps_all_ranks_parked(llm):
    endpoint = endpoint_of(llm)
    control.ready(endpoint)
    control.pause(endpoint, PauseMode.WAIT)
    rank_of(llm.workers[1]).set_poison("mixed")
    with pytest.raises(EngineStateError, match="rank 1: mixed"):
        control.resume(endpoint, None)
    assert [rank_of(worker).hold.taken for worker in llm.workers] == [True, True]
    status = control.ready(endpoint)
    assert (status.state, status.world_size) == (EndpointState.POISONED, 2)
    rank_of(llm.workers[1]).set_poison(None)
    control.resume(endpoint, "v2")
    assert control.ready(endpoint).version == "v2"
    assert len(llm.generate(PROMPT, 3)) == 3


def test_ranks_take_the_instance_that_the_first_who_asks_brings(llm):
    first, second = (control.ready(endpoint_of(llm)).instance_id for _ in range(2))
    assert first == second
    assert {rank_of(worker).identity.info().instance_id for worker in llm.workers} == {first}


def test_no_client_of_the_engine_can_end_the_pause(bench):
    worker = bench.worker_on(1)
    request = worker.worker.engine.enqueue_request(PROMPT, 3)
    assert worker.worker.engine.run_once() is False
    assert not request.new


def test_wait_lets_requests_finish_and_abort_does_not(bench):
    for mode, finished in ((PauseMode.WAIT, True), (PauseMode.ABORT, False)):
        worker = bench.worker_on(1)
        bench.harness.serve(worker)
        request = worker.worker.engine.enqueue_request(PROMPT, 3)
        assert control.pause(endpoint_of(LocalHandle(worker.worker)), mode) == int(finished)
        assert (len(request.new) == 3) is finished
        assert bool(request.error) is not finished


def test_pausing_again_changes_nothing(bench):
    endpoint = endpoint_of(LocalHandle(bench.worker_on(1).worker))
    for mode in (PauseMode.WAIT, PauseMode.ABORT, PauseMode.WAIT):
        control.pause(endpoint, mode)
    assert control.ready(endpoint).state is EndpointState.PAUSED


@pytest.mark.parametrize("mode", [PauseMode.KEEP, PauseMode.RETRACT, PauseMode.IN_PLACE])
def test_pauses_that_are_not_there_are_refused(bench, mode):
    with pytest.raises(EngineStateError, match=f"pause mode {mode.value} is not there"):
        control.pause(endpoint_of(LocalHandle(bench.worker().worker)), mode)


def test_an_engine_that_cannot_abort_requests_says_so(bench, monkeypatch):
    worker = bench.worker_on(1)
    bench.harness.serve(worker)
    monkeypatch.setattr(worker.worker.engine, "abort_all_requests", None)
    with pytest.raises(EngineStateError, match="use pause mode wait"):
        control.pause(endpoint_of(LocalHandle(worker.worker)), PauseMode.ABORT)
    assert not worker.hold.taken


def test_a_flush_of_an_engine_that_serves_parks_it_for_that_moment(bench):
    worker = bench.worker_on(1)
    bench.harness.serve(worker)
    bench.tokens(worker)
    prefix = worker.worker.engine.model_engine.kv.prefix
    assert len(prefix)
    control.flush_cache(endpoint_of(LocalHandle(worker.worker)))
    assert not len(prefix)
    assert not worker.hold.taken


def test_dummy_weights_never_serve(bench):
    """Armed before anybody calls: by the class that the engine derives."""
    waiting = "ckpt_trtllm.extension.WaitingWorkerExtension"
    with StandInLlm(bench.checkpoint(1).path, load_format="dummy", ray_worker_extension_cls=waiting) as llm:
        with pytest.raises(EngineStateError, match="wait for its first weights"):
            llm.generate(PROMPT, 1)
        assert control.ready(endpoint_of(llm)).state is EndpointState.WAITING_FOR_WEIGHTS


# -- handles -----------------------------------------------------------------------------------------------------------
class AsyncLlm:
    """`AsyncLLM`'s calls, on the stand-in."""

    def __init__(self, llm):
        self._llm = llm
        self.paused = False

    async def collective_rpc(self, method, args=(), kwargs=None):
        return self._llm._collective_rpc(method, args, kwargs)

    async def pause_generation(self):
        self.paused = True

    async def resume_generation(self):
        self.paused = False


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_an_async_engine_and_its_loop(llm, loop):
    engine = AsyncLlm(llm)
    endpoint = endpoint_of(AsyncHandle(engine, loop))
    assert control.ready(endpoint).state is EndpointState.SERVING
    control.pause(endpoint, PauseMode.ABORT)
    assert engine.paused
    assert control.ready(endpoint).state is EndpointState.PAUSED
    control.resume(endpoint, None)
    assert not engine.paused


def test_which_handle_is_for_what(llm, loop, bench):
    assert isinstance(handle_of(llm), SyncHandle)
    assert isinstance(handle_of(AsyncHandle(llm, loop)), AsyncHandle)

    class SingleProcess:
        _executor = bench.worker().worker

        def _collective_rpc(self): ...

    assert isinstance(handle_of(SingleProcess()), LocalHandle)
    with pytest.raises(ConfigError, match="AsyncHandle"):
        handle_of(AsyncLlm(llm))
    with pytest.raises(ConfigError, match="no HTTP route"):
        handle_of(object())
    with pytest.raises(ConfigError, match="handle=llm"):
        control.ready(endpoint_of(None))


def test_an_engine_without_our_extension_is_told_how_to_start(bench):
    class Plain(StandInLlm):
        def _collective_rpc(self, method, args=(), kwargs=None):
            return [getattr(StandInWorker, method)]

    endpoint = endpoint_of(Plain.__new__(Plain))
    with pytest.raises(EngineUnavailable, match="ray_worker_extension_cls"):
        control.ready(endpoint)


def test_an_engine_that_does_not_answer_in_time(bench):
    free = threading.Event()

    class Busy:
        def _collective_rpc(self, method, args=()):
            free.wait(10)

    with pytest.raises(EngineUnavailable, match="an update may be running"):
        SyncHandle(Busy()).rpc("ckpt_status", (), 0.05)
    free.set()
