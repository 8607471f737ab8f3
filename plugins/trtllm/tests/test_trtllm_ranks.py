"""Whole updates of an engine with two ranks, one of which fails."""

from importlib.metadata import EntryPoint
from unittest.mock import patch

import pytest

from ckpt_core import plugins
from ckpt_core.api import Target, Updater
from ckpt_core.config import Undo, UpdateConfig
from ckpt_core.contract import EndpointState
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import EngineStateError, Outcome, UpdateAborted
from ckpt_trtllm import control
from ckpt_trtllm.rank import rank_of
from ckpt_trtllm.standin.llm import StandInLlm

PROMPT = list(range(2, 22))
CONFIG = UpdateConfig(ring_bytes=1 << 20, bucket_bytes=1 << 16, undo=Undo.NONE)


@pytest.fixture
def installed(monkeypatch):
    """Found by name also where the project was installed before this plugin was there."""
    point = EntryPoint(name="trtllm", value="ckpt_trtllm.plugin", group=plugins.ENTRY_POINT_GROUP)
    monkeypatch.setattr(plugins, "_entry_point", lambda name: point)


@pytest.fixture
def llm(bench):
    with StandInLlm(bench.checkpoint(1).path, tensor_parallel_size=2) as llm:
        yield llm


def tokens_of(path):
    with StandInLlm(path, tensor_parallel_size=2) as fresh:
        return fresh.generate(PROMPT, 4)


def test_both_ranks_are_silent_and_told_where_one_fails_and_the_next_update_mends(bench, llm, installed):
    handle = Endpoint(url="two", engine="trtllm", handle=llm)
    model = rank_of(llm.workers[1]).model
    failing = patch.object(model.reloadable_layers()[0], "post_load_weights", side_effect=RuntimeError("on purpose"))
    told = []
    for worker in llm.workers:
        worker.abort_update_weights = told.append
    with Updater([Target(engine="trtllm", url="two", handle=llm)], config=CONFIG) as updater:
        with failing, pytest.raises(UpdateAborted) as aborted:
            updater.update(bench.checkpoint(2).path, version="two")
        assert aborted.value.outcome is Outcome.POISONED
        assert "on purpose" in str(aborted.value)
        assert len(told) >= len(llm.workers)
        assert control.ready(handle).state is EndpointState.POISONED
        for ask in (lambda: control.resume(handle, None), lambda: llm.generate(PROMPT, 1)):
            with pytest.raises(EngineStateError):
                ask()
        updater.update(bench.checkpoint(2).path, version="three")
    status = control.ready(handle)
    assert (status.state, status.version) == (EndpointState.SERVING, "three")
    assert llm.generate(PROMPT, 4) == tokens_of(bench.checkpoint(2).path)
