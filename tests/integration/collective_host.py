"""Processes that play the hosts of a fleet: the agents of a host, one a lane, and its ranks. `Fleet` starts them.

    python collective_host.py host JOB      prints one line of JSON for each update, and one when all is closed
    python collective_host.py rank JOB      one rank of a host with GPUs, where agents and ranks need processes of their own

On CPU agents and ranks are threads. Every host makes the same checkpoint and the same plan from a seed, but copies only the
buckets that the schedule gives it: what else is in its ring came from other hosts.
"""

import functools
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import torch
import xxhash

from ckpt_core.cuda import driver
from ckpt_core.devices import device_of
from ckpt_core.errors import CkptError, TransferTimeout, TransportError
from ckpt_core.layout import Box, Layout, LayoutEntry
from ckpt_core.manifest import Manifest
from ckpt_core.pipeline import Outgoing, receive, send
from ckpt_core.plan import check_plan, make_plan
from ckpt_core.polling import Poller
from ckpt_core.pool_file import stage_tensors
from ckpt_core.staging import HostPool
from ckpt_core.transport.collective import CollectiveRingWriter, Schedule
from ckpt_core.transport.groups import CollectiveGroup, MeetingPoint
from ckpt_core.transport.ipc import IpcRingReader
from ckpt_core.transport.peers import Membership
from ckpt_core.wanted import Wanted
from ckpt_core.wire import RingOffer

DEADLINE_S = 60.0
FLEET_DEADLINE_S = 90.0


class Job(msgspec.Struct, kw_only=True):
    """What a process is to do; `seeds` are (plan, content) of one update each.

    `hang` makes this host stop for ever in the first update: at its "first fill", at its third "fill", or at its third
    "broadcast", when it has told all others to go on. `other_sources` makes it expect all buckets from host 1.
    """

    host: int = 0
    hosts: int
    lanes: int = 2
    ranks: int = 2
    store: tuple[str, int]
    backend: str = "gloo"
    seeds: list[tuple[int, int]]
    timeout_s: float = 30.0
    hang: str = ""
    other_sources: bool = False
    directory: str
    # for a rank of its own process
    receiver: int = 0
    offers: list[RingOffer] = []


def checkpoint(shape_seed, content_seed):
    """Tensors of any shapes, also empty ones."""
    chance = random.Random(shape_seed)
    generator = torch.Generator().manual_seed(content_seed)
    tensors = {}
    for number in range(chance.randint(4, 30)):
        shape = [chance.choice((0, 1, 3, 17, 64, 200)) for _ in range(chance.randint(1, 3))]
        if torch.Size(shape).numel() < 1 << 19:
            tensors[f"m{number % 4}.t{number}"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    tensors["m0.large"] = torch.randint(0, 256, (300, 700), dtype=torch.uint8, generator=generator)
    return tensors


def layout(chance, tensors):
    """Some tensors whole, some rows of others, some not at all."""
    entries = []
    for name, tensor in tensors.items():
        rows = tensor.shape[0]
        kind = chance.choice(("whole", "rows", "rows", "none"))
        first, last = sorted((chance.randint(0, rows), chance.randint(0, rows)))
        box = Box(start=(first, *[0] * (tensor.dim() - 1)), shape=(last - first, *tensor.shape[1:]))
        if kind != "none":
            entries.append(LayoutEntry(tensor=name, box=box if kind == "rows" else None, cut=chance.random() < 0.7))
    return Layout(entries=tuple(entries))


def plan_of(job, shape_seed, manifest, tensors):
    chance = random.Random(shape_seed + 1)
    layouts = [layout(chance, tensors) for _ in range(job.ranks)]
    bucket_bytes = chance.choice((256, 1000, 5000, 40000))
    ring_bytes = bucket_bytes * chance.choice((1, 2, 5, 20, 100))
    plan = make_plan(manifest, layouts, agents=job.lanes, ring_bytes=ring_bytes, bucket_bytes=bucket_bytes)
    check_plan(plan, manifest, {number: Wanted(manifest, layout) for number, layout in enumerate(layouts)})
    return plan


def schedule_of(job, plan, lane, shape_seed):
    """Half of the plans deal sources, half are told them; some have small batches."""
    chance = random.Random(shape_seed + 2 + lane)
    steps = [step for step in plan.steps if step.owner == lane]
    given = [chance.randrange(job.hosts) for _ in steps] if chance.random() < 0.5 else None
    batch_bytes = chance.choice((None, 1, 3000, plan.ring_bytes))
    if job.other_sources:
        given = [1] * len(steps)
    return Schedule.of(steps, hosts=job.hosts, ring_bytes=plan.ring_bytes, sources=given, batch_bytes=batch_bytes)


def poller(check):
    return Poller(
        check=check,
        deadline=time.monotonic() + DEADLINE_S,
        expired=lambda what: TransferTimeout(f"waited for {what}"),
    )


def run_rank(plan, tensors, manifest, receiver, offers, *, check=lambda: None):
    """Take one update; how many pieces were wrong, and a digest of all."""
    wrong, digest = 0, xxhash.xxh3_128()

    def consume(step):
        nonlocal wrong
        reader = readers[step.owner]
        for piece in step.bucket.pieces:
            got = reader.view(step.ring_offset_bytes + piece.offset_bytes, piece.size_bytes).cpu().numpy().tobytes()
            tensor = tensors[manifest.tensors[piece.tensor].name]
            part = tensor if piece.box is None else tensor[piece.box.slices]
            wrong += got != part.contiguous().numpy().tobytes()
            digest.update(got)

    readers = []
    try:
        for offer in offers:
            index = driver.ordinal_of(offer.device) if offer.device != "cpu" else 0
            readers.append(IpcRingReader(offer, receiver=receiver, receivers=plan.receivers, device_index=index))
        receive(plan, receiver, readers=readers, consume=consume, poller=poller(check))
    finally:
        for reader in readers:
            reader.close()
    return wrong, digest.hexdigest()


def say(what):
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def hang():
    say({"here": True})
    sys.stdin.buffer.read()
    raise SystemExit("the test went away")


def hang_at(number, target, name):
    """Replace a method by one that never returns from that call."""
    call, calls = getattr(target, name), []

    def method(*args):
        calls.append(args)
        return hang() if len(calls) == number else call(*args)

    setattr(target, name, method)


class Host:
    """Groups that are kept, and one update after the other."""

    def __init__(self, job):
        self.job = job
        on_gpu = job.backend == "nccl"
        device = torch.device("cuda", job.host) if on_gpu else torch.device("cpu")
        self.device = device_of(driver.device_uuid(job.host) if on_gpu else "cpu")
        self.groups = [
            CollectiveGroup.join(
                Membership(lane=f"lane-{lane}", host=job.host, hosts=job.hosts, address="127.0.0.1"),
                backend=job.backend,
                device=device,
                store=job.store,
                timeout_s=DEADLINE_S,
            )
            for lane in range(job.lanes)
        ]

    def update(self, shape_seed, content_seed):
        """One update; what each rank got, and the errors."""
        part = Part(self, shape_seed, content_seed)
        try:
            part.open()
            part.run()
        finally:
            part.close()
        return part.outcome()

    def close(self):
        for group in self.groups:
            group.close()
            group.close()


class Part:
    """One host's part in one update: its agents and ranks, each a thread."""

    def __init__(self, host, shape_seed, content_seed):
        self.job, self.device, self.groups = host.job, host.device, host.groups
        self.seeds = (shape_seed, content_seed)
        self.errors, self.results, self.stop = {}, {}, threading.Event()
        self.directory = Path(self.job.directory) / f"{self.job.host}-{shape_seed}-{content_seed}"
        self.directory.mkdir()
        self.tensors = checkpoint(shape_seed, content_seed)
        self.index = stage_tensors(self.tensors, self.directory)
        self.manifest = Manifest.from_index(self.index)
        self.plan = plan_of(self.job, shape_seed, self.manifest, self.tensors)
        self.schedules = [schedule_of(self.job, self.plan, lane, shape_seed) for lane in range(self.job.lanes)]
        self.pool = HostPool(self.device)
        self.writers = []

    def open(self):
        self.pool.adopt(self.index)
        for lane, group in enumerate(self.groups):
            writer = CollectiveRingWriter(
                owner=lane,
                receivers=self.plan.receivers,
                ring_bytes=self.plan.ring_bytes,
                device=self.device,
                directory=self.directory,
                group=group,
                schedule=self.schedules[lane],
                timeout_s=self.job.timeout_s,
            )
            self.writers.append(writer)
            if lane == 0:
                self.hang_where_asked(writer, group)

    def hang_where_asked(self, writer, group):
        if self.job.hang == "first fill":
            hang_at(1, writer, "fill")
        if self.job.hang == "fill":
            hang_at(3, writer, "fill")
        if self.job.hang == "broadcast":
            hang_at(3, group, "broadcast")

    def run(self):
        calls = [(f"agent {lane}", self.agent, lane) for lane in range(self.job.lanes)]
        calls += [(f"rank {number}", self.rank, number) for number in range(self.job.ranks)]
        threads = [threading.Thread(target=self.attempt, args=call, daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def attempt(self, name, call, number):
        try:
            call(number)
        except Exception as error:  # noqa: BLE001 the test sees it
            self.errors[name] = error
            self.stop.set()

    def check(self):
        if self.stop.is_set():
            raise TransportError("aborted")

    def agent(self, lane):
        if self.device.name != "cpu":
            torch.cuda.set_device(self.job.host)
            torch.cuda.synchronize()  # makes the context current in this thread
        is_source = functools.partial(self.schedules[lane].is_from, self.job.host)
        outgoing = Outgoing(self.plan, lane, self.pool, self.manifest, is_source=is_source)
        send(outgoing, writer=self.writers[lane], poller=poller(self.check))

    def rank(self, receiver):
        offers = [writer.offer() for writer in self.writers]
        if self.device.name == "cpu":
            got = run_rank(self.plan, self.tensors, self.manifest, receiver, offers, check=self.check)
        else:
            got = self.rank_process(receiver, offers)
        self.results[receiver] = got

    def rank_process(self, receiver, offers):
        """What a rank in a process of its own got."""
        self.manifest.save(self.directory / "manifest.json")
        mine = msgspec.structs.replace(
            self.job, receiver=receiver, offers=offers, seeds=[self.seeds], directory=str(self.directory)
        )
        command = [sys.executable, __file__, "rank", msgspec.json.encode(mine).decode()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                if self.stop.wait(0.02):
                    process.kill()
            out, failure = process.communicate()
        self.check()
        if process.returncode:
            raise TransportError(failure)
        return tuple(json.loads(out))

    def close(self):
        for writer in self.writers:
            writer.close()
            writer.close()
        self.pool.close()

    def outcome(self):
        """What each rank got, the errors, and what is left."""
        pool_files = ("ckpt-pool", "manifest")
        return {
            "ranks": [self.results.get(number) for number in range(self.job.ranks)],
            "errors": {name: [type(error).__name__, str(error)] for name, error in self.errors.items()},
            "broken": [group.broken for group in self.groups],
            "batches": [len(schedule.batches) for schedule in self.schedules],
            "steps": len(self.plan.steps),
            "left": sorted(path.name for path in self.directory.iterdir() if not path.name.startswith(pool_files)),
        }


class Fleet:
    """One process a host. Whatever happens, none is left."""

    def __init__(self, directory, hosts, **options):
        self.meeting = MeetingPoint("127.0.0.1", timeout_s=FLEET_DEADLINE_S)
        last = {name: options.pop(name) for name in ("hang", "other_sources") if name in options}
        self.processes = []
        for host in range(hosts):
            job = {
                "host": host,
                "hosts": hosts,
                "store": [self.meeting.address, self.meeting.port],
                "directory": str(directory),
                **options,
                **(last if host == hosts - 1 else {}),
            }
            command = [sys.executable, __file__, "host", json.dumps(job)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self.processes.append(subprocess.Popen(command, text=True, **pipes))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()
        self.meeting.close()

    def line(self, host):
        """The next line of that host."""
        text = self.processes[host].stdout.readline()
        assert text, self.processes[host].communicate()[1]
        return json.loads(text)

    def rest(self, host):
        """All further lines of that host, which ends well."""
        out, errors = self.processes[host].communicate(timeout=FLEET_DEADLINE_S)
        assert self.processes[host].returncode == 0, errors
        return [json.loads(line) for line in out.splitlines()]


def main():
    job = msgspec.json.decode(sys.argv[2], type=Job)
    if sys.argv[1] == "rank":
        manifest = Manifest.load(Path(job.directory) / "manifest.json")
        tensors = checkpoint(*job.seeds[0])
        plan = plan_of(job, job.seeds[0][0], manifest, tensors)
        say(run_rank(plan, tensors, manifest, job.receiver, job.offers))
        return
    try:
        host = Host(job)
    except CkptError as error:
        say({"join": [type(error).__name__, str(error)]})
        return
    for seeds in job.seeds:
        outcome = host.update(*seeds)
        say(outcome)
        if outcome["errors"]:
            break
    host.close()
    say({"closed": True})


if __name__ == "__main__":
    main()
