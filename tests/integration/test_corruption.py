"""Corruption on the way through real agents into an engine: caught before commit, every time.

Of the ring: a flipped bit, a dropped, repeated or swapped bucket, a slot reused early. Of the host pool: a bit flipped after it
was digested. Of live weights: a bit flipped after the copy. There is no P2P read yet, so nothing is done to one.

An update comes in three modes. FIRST: through the engine's loader by a new plan, compared as it arrives. FRESH: replayed by a new
plan, compared as it lives. KNOWN: replayed by the plan of last time. A seed makes one case, and is named where it fails;
CKPT_CORRUPTION_SEED=N runs that one alone.
"""
# ruff: noqa: PLR0917 (arguments are fixtures)

import itertools
import os
import sys
import threading
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random

import pytest
import torch

import ckpt_core.worker

sys.path.insert(0, str(Path(__file__).parent))  # modules beside this file, in an interpreter that imports tests by path

import test_corruption_rings
from spoiling import KINDS, Bytes, Way, spoil

from ckpt_conformance.models.tiny import make_tiny, perturb
from ckpt_conformance.reference.worker import Worker, WorkerOptions
from ckpt_core import Outcome, Target, Undo, UpdateAborted, UpdateConfig, Updater, open_checkpoint
from ckpt_core.agents import AgentGroup
from ckpt_core.config import VerifyLevel
from ckpt_core.content import Content
from ckpt_core.contract import EndpointState
from ckpt_core.errors import EngineStateError, VerificationError
from ckpt_core.layout import whole_layout
from ckpt_core.record.recorded import RecordedModel

CHUNK = 25
ALONE = os.environ.get("CKPT_CORRUPTION_SEED")


class Mode(Enum):
    """See the module. Value: whether the plan is new, whether anything is replayed."""

    FIRST = (True, False)
    FRESH = (True, True)
    KNOWN = (False, True)


RING = {
    (mode, kind): count
    for mode, flips, others in ((Mode.FIRST, 100, 50), (Mode.FRESH, 25, 25), (Mode.KNOWN, 75, 25))
    for kind, count in {**dict.fromkeys(KINDS, others), "flip": flips}.items()
}
COPY = {(Mode.FRESH,): 25, (Mode.KNOWN,): 50}
LIVE = {(Mode.FRESH, "finish"): 25, (Mode.KNOWN, "finish"): 25, (Mode.KNOWN, "finished"): 25}
POOL = {
    (Mode.FIRST, "planned"): 50,  # between digests of tensors and of parts
    (Mode.FIRST, "sending"): 50,  # between digests of parts and the first byte sent
    (Mode.FRESH, "planned"): 25,
    (Mode.FRESH, "sending"): 25,
    (Mode.KNOWN, "prepared"): 50,  # after all digests, before the pause
    (Mode.KNOWN, "sending"): 50,
}


def chunks(table, *engines):
    """Parameters of a test: those of the table, the first seed, and kinds of engines by turns."""
    turns = itertools.cycle(engines)
    found = [(*key, first) for key, count in table.items() for first in range(0, count, CHUNK)]
    return [(*chunk, next(turn for turn in turns if _can(turn, chunk))) for chunk in found]


def _can(engine, chunk):
    return {"roomy": "early" not in chunk, "quantised": Mode.FIRST in chunk}.get(engine, True)


def seeds_from(first):
    seeds = range(first, first + CHUNK)
    return seeds if ALONE is None else sorted({*seeds} & {int(ALONE)})


# -- engines -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is updated."""

    engines: int = 1
    arch: str = "llama"
    tied: bool = False
    quantise: bool = False
    ring_bytes: int = 1 << 16

    def worker(self, directory):
        return Worker(directory, WorkerOptions(quantise=self.quantise))


KINDS_OF_ENGINES = {
    "tight": Kind(),
    "two": Kind(engines=2),
    "roomy": Kind(ring_bytes=1 << 20),  # no slot is used again
    "tied": Kind(tied=True),
    "experts": Kind(arch="qwen3_moe"),
    "quantised": Kind(quantise=True),  # nothing is replayed
}


class Frugal(Updater):
    """Its agents outlive a failed update, where they did all they were asked to: a new process costs a quarter of a second."""

    closing = False

    def _stop_agents(self):
        if self.closing or self._agents is None or not self._agents.alive:
            super()._stop_agents()
        else:
            self._known_plan = None
            self._talk.watches.clear()

    def __exit__(self, *error):
        self.closing = True
        super().__exit__(*error)


class Engines:
    """One or two of a kind, moved together between checkpoints of which no two have a tensor in common."""

    def __init__(self, kind, checkpoints, **options):
        self.kind, self.checkpoints = kind, checkpoints
        self.workers = [kind.worker(checkpoints[0]) for _ in range(kind.engines)]
        targets = [
            Target(engine="reference", url=f"corrupted-{os.getpid()}-{number}", handle=worker)
            for number, worker in enumerate(self.workers)
        ]
        config = UpdateConfig(
            ring_bytes=kind.ring_bytes,
            bucket_bytes=1 << 14,
            attach_timeout_s=20.0,
            transfer_timeout_s=30.0,
            commit_timeout_s=10.0,
            pause_timeout_s=20.0,
            undo=Undo.NONE,
            **options,
        )
        self.updater = Frugal(targets, config=config)
        self.good = 0

    def make_ready(self, mode):
        """The next update is of that mode, and by checkpoint 1."""
        if mode is not Mode.FIRST:
            assert self.update(2).ranks[0].stats.learned
        if mode is Mode.KNOWN:
            self.update(0)

    def update(self, which):
        self.good += 1
        report = self.updater.update(self.checkpoints[which], version=f"good {self.good}")
        assert report.outcome is Outcome.COMMITTED
        assert {worker.version for worker in self.workers} == {f"good {self.good}"}
        return report

    def assert_as_started_fresh(self):
        """After one good update: on every engine, bit for bit."""
        self.update(0)
        fresh = self.kind.worker(self.checkpoints[0]).live()
        for worker in self.workers:
            live = worker.live()
            assert live.keys() == fresh.keys()
            assert all(torch.equal(bytes_of(live[name]), bytes_of(fresh[name])) for name in fresh)
            assert len(worker.generate([5, 17], 3)) == 3


def bytes_of(live):
    return live.tensor.detach().reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def checkpoints_of(tmp_path_factory):
    """Three of one structure."""
    made = {}

    def checkpoints_of(kind):
        key = (kind.arch, kind.tied)
        if key not in made:
            base = tmp_path_factory.mktemp("checkpoints")
            first = make_tiny(base / "0", arch=kind.arch, seed=1, tied=kind.tied, experts=2)
            made[key] = [first, perturb(first, base / "1", seed=2), perturb(first, base / "2", seed=3)]
        return made[key]

    return checkpoints_of


@pytest.fixture
def engines_of(checkpoints_of):
    with ExitStack() as stack:

        def engines_of(name, **options):
            kind = KINDS_OF_ENGINES[name]
            made = Engines(kind, checkpoints_of(kind), **options)
            stack.enter_context(made.updater)
            return made

        yield engines_of


# -- where a fault strikes ---------------------------------------------------------------------------------------------
class Points:
    """Calls `fault` by the name of a point, where it has one of that name, and notes what kind of update this is."""

    def __init__(self):
        self.fault, self.planned, self.replayed = None, False, False

    def reach(self, point, *args):
        self.planned = self.planned or point == "planned"
        self.replayed = self.replayed or point == "copy"
        if self.fault is not None:
            getattr(self.fault, point, lambda *_args: None)(*args)

    @contextmanager
    def armed(self, fault):
        self.fault, self.planned, self.replayed = fault, False, False
        try:
            yield
        finally:
            self.fault = None


@pytest.fixture
def points(monkeypatch):
    made = Points()

    def wrap(owner, name, *, before="", after=""):
        original = getattr(owner, name)

        def call(*args, **options):
            if before:
                made.reach(before, *args)
            result = original(*args, **options)
            if after:
                made.reach(after, *args)
            return result

        monkeypatch.setattr(owner, name, call)

    wrap(Content, "prepare", after="prepared")
    wrap(Content, "take_plan", before="planned")
    wrap(AgentGroup, "start_sending", before="sending")
    wrap(RecordedModel, "load", before="copy")
    wrap(Worker, "finish_update", before="finish", after="finished")
    receive = ckpt_core.worker.receive

    def receiving(plan, receiver, *, readers, consume, **options):
        made.reach("receiving", plan, receiver, readers)

        def consume_then(step):
            made.reach("consume", receiver, step)
            consume(step)

        receive(plan, receiver, readers=readers, consume=consume_then, **options)

    monkeypatch.setattr(ckpt_core.worker, "receive", receiving)
    return made


class RingFault:
    """One rank finds other bytes in a ring: when it is about to look at them, or not before it copies them."""

    def __init__(self, kind, rng, directory, engines, *, late=False):
        self.kind, self.rng, self.late = kind, rng, late
        self.index = open_checkpoint(directory)
        self.victim = rng.randrange(len(engines.workers))
        self.thread = None
        self.struck = ""

    def receiving(self, plan, receiver, readers):
        if receiver != self.victim:
            return
        self.thread, self.plan, self.readers = threading.get_ident(), plan, readers
        with closing(Bytes(self.index)) as sent:
            way = Way(plan=plan, receiver=receiver, layout=whole_layout(sent.manifest), sent=sent)
            self.spoilt = spoil(self.kind, self.rng, way)

    def consume(self, receiver, step):
        if receiver == self.victim and not self.late:
            self.strike(step.index)

    def copy(self, _recorded, index, _items):
        if self.late and threading.get_ident() == self.thread:
            self.strike(index)

    def strike(self, index):
        if (data := (self.spoilt or {}).get(index)) is not None:
            step = self.plan.steps[index]
            self.readers[step.owner].view(step.ring_offset_bytes, data.size).copy_(torch.from_numpy(data))
            self.struck += f"bucket {index} ({self.kind}) for rank {self.victim}; "


class LiveFault:
    """A bit of a live weight flips: before the engine finishes, or before the rank looks at what lives."""

    def __init__(self, point, rng, engines):
        self.rng = rng
        self.victim = rng.choice(engines.workers)
        self.struck = ""
        setattr(self, point, self.strike)

    def strike(self, worker, _update):
        if worker is self.victim:
            name, live = self.rng.choice(sorted(worker.live().items()))
            data = bytes_of(live)
            at, bit = self.rng.randrange(data.numel()), self.rng.randrange(8)
            data[at] ^= 1 << bit
            self.struck = f"bit {bit} of byte {at} of live {name}"


class PoolFault:
    """A bit of the checkpoint flips in memory, and neither size nor time of its file tell; `undo` flips it back."""

    def __init__(self, point, rng, directory):
        self.extent = rng.choice(open_checkpoint(directory).extents)
        self.path = directory / "model.safetensors"
        self.at, self.bit = self.extent.offset_bytes + rng.randrange(self.extent.size_bytes), rng.randrange(8)
        self.struck = ""
        setattr(self, point, self.strike)

    def strike(self, *_args):
        self.flip()
        self.struck = f"bit {self.bit} of byte {self.at} of the file, in {self.extent.name}"

    def undo(self):
        if self.struck:
            self.flip()

    def flip(self):
        before = self.path.stat()
        with self.path.open("r+b", buffering=0) as file:
            (byte,) = os.pread(file.fileno(), 1, self.at)
            os.pwrite(file.fileno(), bytes([byte ^ 1 << self.bit]), self.at)
        os.utime(self.path, ns=(before.st_atime_ns, before.st_mtime_ns))


# -- cases -------------------------------------------------------------------------------------------------------------
def assert_caught(engines, points, mode, fault, seed):
    """The next update fails by verification; no engine commits, and none produces a token."""
    versions, who = [worker.version for worker in engines.workers], f"{mode.name}, seed {seed}"
    with points.armed(fault):
        try:
            engines.updater.update(engines.checkpoints[1], version=f"spoilt {seed}")
        except UpdateAborted as error:
            aborted = error
        else:
            pytest.fail(f"{who}: committed, although {fault.struck or 'nothing'} was spoilt")
    who = f"{who}, {fault.struck or 'nothing'} spoilt"
    assert fault.struck, f"{who}: {aborted.causes}"
    assert isinstance(aborted.causes[0], VerificationError), f"{who}: {aborted.causes}"
    assert aborted.outcome is Outcome.POISONED, f"{who}: {aborted}"
    assert (points.planned, points.replayed) == mode.value, f"{who}: it was another mode"
    assert [worker.version for worker in engines.workers] == versions, who
    for worker in engines.workers:
        assert worker.poison_cause is not None, who
        assert worker.state is EndpointState.POISONED, who
        with pytest.raises(EngineStateError):
            worker.generate([5, 17], 1)


def run(engines, points, mode, first, fault_of):
    """A chunk of seeds, and a good update at the end. `fault_of` makes the fault of one generator."""
    for seed in seeds_from(first):
        engines.make_ready(mode)
        fault = fault_of(Random(f"{mode.name} {seed}"))
        try:
            assert_caught(engines, points, mode, fault, seed)
        finally:
            getattr(fault, "undo", lambda: None)()
    engines.assert_as_started_fresh()


@pytest.mark.parametrize(("mode", "kind", "first", "engines"), chunks(RING, *KINDS_OF_ENGINES))
def test_corruption_of_a_ring(engines_of, points, mode, kind, first, engines):
    made = engines_of(engines)
    run(made, points, mode, first, lambda rng: RingFault(kind, rng, made.checkpoints[1], made))


@pytest.mark.parametrize(("mode", "first", "engines"), chunks(COPY, "tight", "two", "tied"))
def test_corruption_between_arrival_and_copy(engines_of, points, mode, first, engines):
    made = engines_of(engines)
    run(made, points, mode, first, lambda rng: RingFault("flip", rng, made.checkpoints[1], made, late=True))


@pytest.mark.parametrize(("mode", "point", "first", "engines"), chunks(LIVE, "tight", "two", "experts"))
def test_corruption_of_what_lives(engines_of, points, mode, point, first, engines):
    made = engines_of(engines)
    run(made, points, mode, first, lambda rng: LiveFault(point, rng, made))


@pytest.mark.parametrize(("mode", "point", "first", "engines"), chunks(POOL, *KINDS_OF_ENGINES))
def test_corruption_of_the_pool(engines_of, points, mode, point, first, engines):
    made = engines_of(engines)
    run(made, points, mode, first, lambda rng: PoolFault(point, rng, made.checkpoints[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_unverified_it_would_be_committed(engines_of, points, kind):
    """What is done to the rings reaches the weights: it is the digests that stop it."""
    engines = engines_of("tight", verify=VerifyLevel.NONE)
    fresh = engines.kind.worker(engines.checkpoints[1]).live()
    engines.make_ready(Mode.KNOWN)
    fault = RingFault(kind, Random(kind), engines.checkpoints[1], engines)
    with points.armed(fault):
        engines.update(1)
    assert fault.struck
    live = engines.workers[0].live()
    assert not all(torch.equal(bytes_of(live[name]), bytes_of(fresh[name])) for name in fresh)
    engines.assert_as_started_fresh()


def test_they_are_a_thousand():
    """What the tests above run, and those of random plans."""
    here = sum(sum(table.values()) for table in (RING, COPY, LIVE, POOL))
    assert here % CHUNK == 0
    assert here >= 1000
    assert here + sum(test_corruption_rings.CASES.values()) >= 1500
