"""Facts about processes, and deaths seen at once."""

import contextlib
import os
import select
import subprocess
import sys

import msgspec
import pytest

from ckpt_core import process
from ckpt_core.errors import TransportError
from ckpt_core.process import DeathWatch, ProcessMark, check_can_share


@pytest.fixture
def watch():
    with contextlib.closing(DeathWatch(process.current())) as made:
        yield made


@pytest.fixture
def child():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as made:
        yield made
        made.kill()


def of(child, **changes):
    return msgspec.structs.replace(process.current(), pid=child.pid, **changes)


def await_end(child):
    """Until the kernel says so, without reaping it."""
    fd = os.pidfd_open(child.pid)
    try:
        assert select.select([fd], [], [], 10.0)[0]
    finally:
        os.close(fd)


def test_current_is_this_process():
    mine = process.current()
    assert (mine.pid, mine.uid) == (os.getpid(), os.getuid())
    assert mine.boot_id
    assert mine.pid_namespace.startswith("pid:[")
    assert mine.ipc_namespace.startswith("ipc:[")
    check_can_share(mine, mine, "myself")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"boot_id": "b", "host": "far"}, "rank 3 runs on host far.*start agents on its own host"),
        ({"uid": 77777}, "rank 3 runs as uid 77777.*same user"),
        ({"ipc_namespace": "ipc:[7]"}, r"rank 3 is in another IPC namespace.*--ipc=host"),
    ],
)
def test_what_keeps_two_from_sharing_is_named(change, says):
    mine = process.current()
    with pytest.raises(TransportError, match=says):
        check_can_share(mine, msgspec.structs.replace(mine, **change), "rank 3")


def test_another_pid_namespace_does_not_matter_for_memory():
    mine = process.current()
    check_can_share(mine, msgspec.structs.replace(mine, pid_namespace="pid:[7]"), "rank 3")


@pytest.mark.parametrize("signal", [9, 15])
def test_a_killed_child_is_dead_at_once_even_unreaped(watch, child, signal):
    watch.add(of(child), "child")
    assert watch.dead() == []
    child.send_signal(signal)
    await_end(child)
    assert watch.dead() == ["child"]
    assert watch.dead() == ["child"]


def test_a_child_that_ends_by_itself_is_dead(watch, child):
    watch.add(of(child), "child")
    child.communicate(b"\n")
    assert watch.dead() == ["child"]


def test_who_was_gone_before_is_dead(watch, child):
    child.kill()
    child.wait()
    watch.add(of(child), "late")
    assert watch.dead() == ["late"]
    watch.drop("late")
    assert watch.dead() == []


@pytest.mark.parametrize("change", [{"boot_id": "other"}, {"pid_namespace": "pid:[7]"}])
def test_processes_out_of_sight_are_left_to_deadlines(watch, child, change):
    watch.add(of(child, **change), "far")
    child.kill()
    child.wait()
    assert watch.dead() == []


def test_dropped_ones_may_die_and_leave_no_descriptor(watch, child):
    before = len(os.listdir("/proc/self/fd"))
    watch.add(of(child), "child")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    watch.drop("child")
    watch.drop("child")
    watch.drop("never there")
    assert len(os.listdir("/proc/self/fd")) == before
    child.kill()
    await_end(child)
    assert watch.dead() == []


def test_several_are_told_apart_and_sorted(watch, child):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        watch.add(of(other), "b")
        watch.add(of(child), "a")
        watch.add(process.current(), "myself")
        other.kill()
        child.kill()
        await_end(other)
        await_end(child)
        assert watch.dead() == ["a", "b"]


def test_close_gives_descriptors_back():
    before = len(os.listdir("/proc/self/fd"))
    watch = DeathWatch(process.current())
    for number in range(5):
        watch.add(process.current(), str(number))
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- marks -----------------------------------------------------------------------------------------------------------
def test_a_mark_tells_the_living_from_the_gone(child):
    mine = ProcessMark.here()
    assert not mine.is_gone()
    assert msgspec.structs.replace(mine, start_ticks=mine.start_ticks - 1).is_gone()
    assert msgspec.structs.replace(mine, boot_id="another boot").is_gone()
    assert msgspec.json.decode(msgspec.json.encode(mine), type=ProcessMark) == mine


def test_a_process_that_ended_is_gone_before_anybody_reaps_it(child):
    with open(f"/proc/{child.pid}/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    mark = msgspec.structs.replace(ProcessMark.here(), pid=child.pid, start_ticks=ticks)
    assert not mark.is_gone()
    child.kill()
    await_end(child)
    assert mark.is_gone()
    child.wait()
    assert mark.is_gone()


def test_what_another_namespace_shows_proves_nothing():
    mark = msgspec.structs.replace(ProcessMark.here(), pid=2**22 + 1, pid_namespace="pid:[1]")
    assert not mark.is_gone()
