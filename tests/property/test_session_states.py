"""All that can happen to an update, one fault at every step and a second one on the way back, tried on the real controller.

Never routable when mixed; published implies verified; an outcome is always reached. See states_story.py for what is checked.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # modules beside this file, in an interpreter that imports tests by path

from states_driver import Lab, install
from states_explorer import Point, Script, explore
from states_mended import MENDED, Mended, Named
from states_story import Story

from ckpt_core.config import Undo, UpdateConfig
from ckpt_core.errors import Outcome, UpdateAborted
from ckpt_core.metrics import UpdateReport

_EVERY = bool(os.environ.get("CKPT_STATES_EVERY"))  # also pairs that differ in names only: twice the time


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        made = Lab(tmp_path_factory.mktemp("lab"))
        install(made, patch)
        made.start()
        logging.disable()  # thousands of tracebacks
        yield made
        logging.disable(logging.NOTSET)
        made.history.close()


def _assert_sound(story: Story, *, pairs: bool, at_least: int) -> None:
    start, runs, found = time.perf_counter(), 0, []
    points: list[Point] = []

    def run(script: Script) -> list[Point]:
        points[:] = story.run(script)
        return list(points)

    for script in explore(run, pairs=pairs, every=_EVERY):
        runs += 1
        found += [f"{violation}: {story.explain(script, points)}" for violation in story.found[:1]]
    print(f"\n{runs} runs in {time.perf_counter() - start:.1f} s: {story.outcomes}")  # noqa: T201
    assert not found, f"{len(found)} runs\n" + "\n".join(sorted(found, key=len)[:5])
    assert runs >= at_least


@pytest.mark.parametrize("known_plan", [False, True], ids=["new plan", "known plan"])
@pytest.mark.parametrize("undo", Undo, ids=lambda undo: undo.value)
def test_every_single_fault(lab: Lab, undo: Undo, known_plan: bool) -> None:
    _assert_sound(Story(lab, UpdateConfig(undo=undo), known_plan=known_plan), pairs=False, at_least=200)


@pytest.mark.timeout(600)
def test_every_pair_of_faults(lab: Lab) -> None:
    """The second one while serving again, undoing, going back or recovering, from each state in which that begins."""
    story = Story(lab, UpdateConfig())
    _assert_sound(story, pairs=True, at_least=3000)
    expected = {"UpdateReport", "clean", "restored", "poisoned", "killed, clean", "killed, committed"}
    assert story.outcomes.keys() >= expected


def _numbered(story: Story, named: Named) -> Script:
    """The script of faults by their labels."""
    script: Script = ()
    for label, picked in named:
        points, after = story.run(script), script[-1][0] if script else -1
        number = next(n for n, point in enumerate(points) if n > after and point.label == label)
        script = (*script, (number, picked))
    return script


@pytest.mark.parametrize("mended", MENDED, ids=lambda mended: mended.name)
def test_what_the_search_once_found(lab: Lab, mended: Mended) -> None:
    """The shortest runs; the searches above have them all."""
    story = Story(lab, UpdateConfig())
    script = _numbered(story, mended.script)
    points = story.run(script)
    assert not story.found, story.explain(script, points)


def test_the_search_sees_what_it_is_to_see(lab: Lab) -> None:
    """Without a fault: committed; with a rank that breaks: restored by the version before."""
    story = Story(lab, UpdateConfig())
    story.run(())
    assert isinstance(story.result, UpdateReport)
    assert [engine.label for engine in story.world.engines] == ["C", "C"]
    story.run(_numbered(story, (("rank 1 of engine 1: told to begin", "break"),)))
    assert isinstance(story.result, UpdateAborted)
    assert story.result.outcome is Outcome.RESTORED
    assert story.found == []
