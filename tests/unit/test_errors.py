"""The tree of errors, and what the command line ends with for each."""

import inspect

import pytest

from ckpt_core import cli, errors
from ckpt_core.errors import CkptError, Outcome, UpdateAborted

EXIT_CODES = {
    "CkptError": 1,
    "ConfigError": 2,
    "ManifestError": 3,
    "PlanError": 4,
    "CapacityError": 4,
    "PluginError": 5,
    "PluginNotFound": 5,
    "PluginIncompatible": 5,
    "CapabilityMismatch": 5,
    "TransportError": 6,
    "RendezvousTimeout": 6,
    "TransferTimeout": 6,
    "PeerLost": 6,
    "WireError": 6,
    "EngineError": 7,
    "EngineUnavailable": 7,
    "EngineStateError": 7,
    "HookFailed": 7,
    "CoverageError": 3,
    "VerificationError": 8,
}
CLASSES = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, CkptError)}


def test_every_error_has_its_exit_code():
    assert {name: kind.exit_code for name, kind in CLASSES.items() if kind is not UpdateAborted} == EXIT_CODES


@pytest.mark.parametrize(("outcome", "code"), [(Outcome.CLEAN, 10), (Outcome.RESTORED, 11), (Outcome.POISONED, 12)])
def test_an_abort_ends_with_its_outcome(outcome, code):
    assert UpdateAborted("no", outcome=outcome).exit_code == code


def test_the_tree_is_drawn_as_it_is():
    for name, kind in CLASSES.items():
        assert name in (errors.__doc__ or ""), f"{name} is not in the tree"
        assert kind.__doc__


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12])
def test_the_command_line_documents_every_code(code):
    assert f" {code} " in (cli.__doc__ or "").replace("\n", " ")


def test_an_abort_says_what_each_engine_holds():
    cause = ValueError("why")
    error = UpdateAborted("no", outcome=Outcome.POISONED, by_endpoint={"a": Outcome.CLEAN}, causes=[cause])
    assert (error.by_endpoint, error.causes, str(error)) == ({"a": Outcome.CLEAN}, (cause,), "no")


def test_a_failed_hook_carries_the_remote_traceback():
    assert errors.HookFailed("no", remote_traceback="Traceback").remote_traceback == "Traceback"
