"""What the search found in the controller, and was mended since: the shortest run of each."""

from __future__ import annotations

from dataclasses import dataclass

Named = tuple[tuple[str, str], ...]  # the first point of that label after the fault before, and what happens there


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """One: what was wrong, and the script that showed it."""

    name: str
    was: str
    script: Named


MENDED = (
    Mended(
        name="go_back_serves_what_only_some_committed",
        was="engine 0 committed B, engine 1 did not; the replay of A ends before its begin, calls engine 0 CLEAN and "
        "resumes it: it serves B under the label A beside a poisoned one",
        script=(
            ("before: Commit to rank 0 of engine 1", "interrupt"),
            ("rank 0 of engine 0: asked for a layout", "fail"),
        ),
    ),
    Mended(
        name="go_back_keeps_committed_after_a_failed_replay",
        was="by_endpoint says COMMITTED of an engine that the failed replay has left mixed or with A",
        script=(("before: Commit to rank 0 of engine 1", "interrupt"), ("agent 0: sends", "fail")),
    ),
    Mended(
        name="go_back_calls_serving_engines_poisoned",
        was="the replay committed A on all, one engine could not be flushed or resumed: the others serve A and are "
        "called POISONED, and nothing is recorded of them",
        script=(("rank 0 of engine 0: told to begin", "break"), ("engine 1: flush", "no answer")),
    ),
    Mended(
        name="recover_moves_engines_one_by_one",
        was="engine 0 is resumed with B before engine 1 verified it; where that fails they serve A and B",
        script=(("before: Commit to rank 0 of engine 1", "kill"), ("engine 0: flush", "no answer")),
    ),
    Mended(
        name="recover_tries_again_without_a_look",
        was="the attempt at the old version goes by the status before the first attempt: it ends before its begin, "
        "calls the engine CLEAN and resumes it with what the first one left",
        script=(("before: Commit to rank 0 of engine 1", "kill"), ("rank 0 of engine 0: told to begin", "mute")),
    ),
    Mended(
        name="undo_resumes_a_restarted_engine",
        was="the way back resumes what it calls CLEAN without a look at the instance; flush does look",
        script=(("engine 0: pause", "restart"),),
    ),
    Mended(
        name="an_interrupt_of_the_way_back_ends_it",
        was="Ctrl-C while undoing or going back, or before the commit is recorded: no outcome, ranks and tokens are "
        "not dismissed, the update stays in flight with a living controller or ends without outcomes",
        script=(("rank 0 of engine 0: told to begin", "break"), ("before: hear", "interrupt")),
    ),
    Mended(
        name="agents_that_came_before_a_failed_start_stay",
        was="AgentGroup.stop dismisses `peers`, which is empty until all joined: they are pinged for ever",
        script=(("agent 0: started", "die"),),
    ),
)
