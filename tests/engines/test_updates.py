"""A server becomes, update by update, what a fresh start on the checkpoint is; also one that started on dummy weights."""

import pytest
from cases import CASES, EMPTY_CASES, SHORT, SMOLLM2

from ckpt_core import Outcome
from ckpt_core.contract import EndpointState

RELOADED = ("vllm",)  # its servers pack weights for CPUs: nothing can be copied past that
every_case = pytest.mark.parametrize("case", CASES, ids=str)
real_case = pytest.mark.parametrize("case", [case for case in CASES if case.model == SMOLLM2], ids=str)


@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_dummy_weights_become_a_fresh_start(deployment, updater_of):
    """The first update of the server: nothing of the checkpoint was ever read from disk by it."""
    fresh = deployment.fresh
    assert fresh.tokens["a"] != fresh.tokens["b"]
    assert deployment.babble not in (fresh.tokens["a"], fresh.tokens["b"])
    report = updater_of(deployment).update(deployment.checkpoints.a, version="A")
    assert report.outcome is Outcome.COMMITTED
    assert [rank.rank for rank in report.ranks] == list(range(deployment.case.tp))
    assert deployment.answers() == fresh.tokens["a"]
    status = deployment.status()
    assert (status.state, status.version, status.world_size) == (EndpointState.SERVING, "A", deployment.case.tp)


@every_case
def test_ten_updates_in_a_row(deployment, updater_of):
    assert deployment.fresh.tokens["a"] != deployment.fresh.tokens["b"]
    updater = updater_of(deployment)
    prints = {"a": set(), "b": set()}
    shares = set()
    for number in range(10):
        which = "ba"[number % 2]
        report = updater.update(deployment.checkpoints[which], version=f"{which}{number}")
        prints[which].add(tuple(rank.fingerprint for rank in report.ranks))
        shares.add(tuple(rank.stats.replayed_bytes / rank.stats.received_bytes for rank in report.ranks))
        prompt = deployment.checkpoints.prompts[number % len(deployment.checkpoints.prompts)]
        answer = deployment.client.generate(prompt, SHORT)
        assert answer.token_ids == deployment.fresh.short(which)[number % len(deployment.checkpoints.prompts)]
        assert {span.version for span in answer.spans} == {f"{which}{number}"}
    assert len(prints["a"]) == len(prints["b"]) == 1, "the same weights leave the same live bits, each time"
    assert deployment.answers() == deployment.fresh.tokens["a"]
    if deployment.engine not in RELOADED:
        assert max(shares) > (0.5,) * deployment.case.tp, "what could be copied was loaded"


@real_case
def test_a_real_model_makes_sense(deployment, updater_of):
    updater_of(deployment).update(deployment.checkpoints.a, version="real")
    (tokens,) = deployment.answers()
    assert "The capital of France is Paris." in deployment.checkpoints.decode(tokens)
