"""What a loader does beyond copies is found by the first update: nothing is replayed that a replay would make wrong."""

import types

import pytest
import torch
from torch import nn

from ckpt_core.contract import LoadTensor, RecordingTarget
from ckpt_core.dtypes import DType
from ckpt_core.layout import Box, whole_layout
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.record.recorded import RecordedModel

MANIFEST = Manifest(
    tensors=tuple(TensorMeta(name=name, dtype=DType.F32, shape=(8, 4)) for name in ("down.weight", "up.weight"))
)


FROZEN = {"up.weight": torch.zeros(8, 4)}


class Engine(nn.Module):
    """Two linears, of which this rank has the second half of the rows."""

    def __init__(self):
        super().__init__()
        for name in ("up", "down"):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
            setattr(self, name, layer)
        self.placement = ""
        self.excluded = {}

    def load_weights(self, weights):
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor[4:])

    def process(self):
        """After loading."""

    def target(self):
        return RecordingTarget(
            model=self, load=self.load_weights, live=self, placement=self.placement, excluded=self.excluded
        )


class Permuting(Engine):
    """Swaps halves in place, as kernels for experts want them."""

    def process(self):
        weight = self.up.weight.data
        weight.copy_(torch.cat([weight[2:], weight[:2]]))


class Deriving(Engine):
    """Keeps a matrix that it computed from a weight, in another module."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Module()
        self.attention.absorbed = torch.zeros(4, 4)

    def process(self):
        self.attention.absorbed.copy_(self.up.weight @ self.down.weight)


class Renewing(Engine):
    """Gives a parameter new storage at each load."""

    def process(self):
        self.up.weight = nn.Parameter(self.up.weight.data.clone(), requires_grad=False)


class Turning(Engine):
    """Lays a parameter out by columns, once, when it starts."""

    def __init__(self):
        super().__init__()
        self.up.weight = nn.Parameter(torch.empty_strided((4, 4), (1, 4)).zero_(), requires_grad=False)


class Listing(Engine):
    """Takes all tensors before it looks at the first, and stumbles over one that it does not know."""

    def load_weights(self, weights):
        given = sorted(weights, key=lambda item: item[0] != "down.weight")
        for name, tensor in given:
            if name == "down.weight" and type(tensor) is not torch.Tensor:  # only while it is recorded
                raise KeyError(name)
            super().load_weights([(name, tensor)])


class Batching(Engine):
    """Copies by a list."""

    def load_weights(self, weights):
        for name, tensor in weights:
            torch._foreach_copy_([self.get_parameter(name).data], [tensor[4:]])


class Balancing(Engine):
    """Has a table of which rows are where."""

    def __init__(self):
        super().__init__()
        self.up.register_buffer("rows", torch.tensor([4, 5, 6, 7]))

    def load_weights(self, weights):
        for name, tensor in weights:
            module, _, _ = name.rpartition(".")
            first = int(self.up.rows[0]) if module == "up" else 4
            self.get_parameter(name).data.copy_(tensor[first : first + 4])


@pytest.fixture
def recorded_of():
    """What is known of an engine; the worker is the engine itself."""

    def recorded_of(engine):
        hook = types.SimpleNamespace(ckpt_recording_target=lambda worker: worker.target())
        return RecordedModel(types.SimpleNamespace(hook=hook), engine)

    return recorded_of


def checkpoint(seed):
    torch.manual_seed(seed)
    return {meta.name: torch.randn(meta.shape) for meta in MANIFEST.tensors}


def update(engine, recorded, weights):
    """As a rank does it; names that were replayed, whether something was learned, and the layout."""
    recorded.still_holds()
    layout = recorded.layout(MANIFEST, whole_layout(MANIFEST), replay=True)
    recorded.begin()
    replayed = recorded.roots
    for number, entry in enumerate(layout.entries):
        tensor = weights[entry.tensor]
        if entry.box is not None:
            tensor = tensor[entry.box.slices].clone()
        item = LoadTensor(name=entry.tensor, tensor=tensor, box=entry.box)
        if entry.tensor in replayed:
            recorded.load(number, (item,))
        else:
            recorded.arrived([item])
            engine.load_weights([(entry.tensor, item.tensor)])
    engine.process()
    return replayed, recorded.finish(), layout


def same(engine, other):
    mine, its = dict(engine.named_parameters()), dict(other.named_parameters())
    return all(torch.equal(mine[name], its[name]) for name in its)


def fresh(kind, weights):
    engine = kind()
    engine.load_weights(weights.items())
    engine.process()
    return engine


def test_what_is_pure_is_replayed_from_the_second_update_on_and_only_its_slices_are_asked_for(recorded_of):
    engine = Engine()
    recorded = recorded_of(engine)
    assert update(engine, recorded, checkpoint(1))[:2] == (frozenset(), True)
    for seed in (2, 3):
        replayed, learned, layout = update(engine, recorded, checkpoint(seed))
        assert replayed == {"up.weight", "down.weight"}
        assert not learned
        assert {entry.box for entry in layout.entries} == {Box(start=(4, 0), shape=(4, 4))}
        assert same(engine, fresh(Engine, checkpoint(seed)))


def test_what_one_update_leaves_open_the_next_may_prove(recorded_of):
    """Those that undo another write much of what is there already."""
    engine = Engine()
    recorded = recorded_of(engine)
    assert update(engine, recorded, {**checkpoint(1), **FROZEN})[:2] == (frozenset(), True)
    assert update(engine, recorded, {**checkpoint(2), **FROZEN})[:2] == ({"down.weight"}, False)
    assert update(engine, recorded, checkpoint(3))[:2] == ({"down.weight"}, True)
    assert same(engine, fresh(Engine, checkpoint(3)))
    assert update(engine, recorded, checkpoint(4))[:2] == ({"down.weight", "up.weight"}, False)
    assert same(engine, fresh(Engine, checkpoint(4)))


def half_proved(engine, recorded):
    """One update that leaves a parameter as it was; `down` is replayed from then on."""
    assert update(engine, recorded, {**checkpoint(1), **FROZEN})[1]
    assert recorded.roots == {"down.weight"}


def test_what_spoke_against_a_parameter_counts_for_good(recorded_of):
    """Shards are scaled alike only where their scales differ, say."""
    engine = Engine()
    recorded = recorded_of(engine)
    engine.process = lambda: engine.up.weight.mul_(2)
    assert update(engine, recorded, checkpoint(1))[1]
    engine.process = lambda: None
    for seed in (2, 3, 4):
        assert update(engine, recorded, checkpoint(seed))[:2] == ({"down.weight"}, False)


def test_a_proof_that_fails_leaves_what_is_replayed(recorded_of, monkeypatch):
    engine = Engine()
    recorded = recorded_of(engine)
    half_proved(engine, recorded)

    def fail(*arguments):
        raise torch.OutOfMemoryError("no room for a sum")

    monkeypatch.setattr("ckpt_core.record.proof.checksum", fail)
    for seed in (2, 3):
        assert update(engine, recorded, checkpoint(seed))[:2] == ({"down.weight"}, False)
        assert same(engine, fresh(Engine, checkpoint(seed)))
    assert not recorded.lost


def test_a_replayed_parameter_that_moves_while_more_is_proved_ends_the_replay(recorded_of):
    engine = Engine()
    recorded = recorded_of(engine)
    half_proved(engine, recorded)
    engine.process = lambda: setattr(engine.down, "weight", nn.Parameter(engine.down.weight.t(), requires_grad=False))
    assert update(engine, recorded, checkpoint(2))[1] is False
    assert recorded.lost
    assert not recorded.roots


def test_what_turns_out_to_be_derived_ends_the_replay(recorded_of):
    """The matrix depends on both, and was nothing as long as one of them was."""
    engine = Deriving()
    recorded = recorded_of(engine)
    half_proved(engine, recorded)
    assert update(engine, recorded, checkpoint(2))[1] is False
    assert not recorded.roots
    for seed in (3, 4):
        update(engine, recorded, checkpoint(seed))
        assert same(engine, fresh(Deriving, checkpoint(seed)))


def test_what_does_not_change_is_not_watched_for_ever(recorded_of):
    engine = Engine()
    recorded = recorded_of(engine)
    for seed in range(1, 6):
        update(engine, recorded, {**checkpoint(seed), **FROZEN})
    assert update(engine, recorded, checkpoint(6))[:2] == ({"down.weight"}, False)
    assert not update(engine, recorded, checkpoint(7))[1]


@pytest.mark.parametrize("kind", [Permuting, Deriving, Renewing])
def test_what_a_replay_would_make_wrong_is_loaded(recorded_of, kind):
    engine = kind()
    recorded = recorded_of(engine)
    for seed in (1, 2, 3, 4, 5):
        replayed, _, _ = update(engine, recorded, checkpoint(seed))
        assert "up.weight" not in replayed
        assert same(engine, fresh(kind, checkpoint(seed)))
    assert recorded.verdict.why_not


def test_a_parameter_with_other_strides_than_the_recorded_one_is_not_scrambled(recorded_of):
    engine, blank = Turning(), Engine()
    engine.target = lambda: RecordingTarget(model=blank, load=blank.load_weights, live=engine)
    recorded = recorded_of(engine)
    for seed in (1, 2, 3):
        replayed, _, _ = update(engine, recorded, checkpoint(seed))
        assert "up.weight" not in replayed
        assert same(engine, fresh(Engine, checkpoint(seed)))


@pytest.mark.parametrize("kind", [Listing, Batching])
def test_what_the_recording_lost_sight_of_still_comes(recorded_of, kind):
    """Also where the update that proved the others did not change it."""
    engine = kind()
    recorded = recorded_of(engine)
    frozen = checkpoint(1)["up.weight"]
    for seed in (1, 2):
        update(engine, recorded, {**checkpoint(seed), "up.weight": frozen})
    update(engine, recorded, checkpoint(3))
    assert same(engine, fresh(Engine, checkpoint(3)))


def test_tables_in_lists_of_another_object_are_watched(recorded_of):
    engine = Balancing()
    engine.state = types.SimpleNamespace(map=torch.tensor([1, 2]))
    recorded = recorded_of(engine)
    update(engine, recorded, checkpoint(1))
    assert update(engine, recorded, checkpoint(2))[0]
    engine.state = types.SimpleNamespace(map=torch.tensor([2, 1]))
    assert not recorded.still_holds()


def test_a_replay_that_never_lasts_is_given_up(recorded_of):
    engine = Balancing()
    engine.up.counter = torch.zeros(1, dtype=torch.int64)
    recorded = recorded_of(engine)
    learned = []
    for seed in range(1, 12):
        learned.append(update(engine, recorded, checkpoint(seed))[1])
        engine.up.counter += 1  # while it serves
    assert 1 <= sum(learned) <= 3


def test_refused_begins_are_no_tries(recorded_of):
    engine = Engine()
    recorded = recorded_of(engine)
    recorded.layout(MANIFEST, whole_layout(MANIFEST), replay=True)
    for _ in range(5):
        recorded.begin()
    assert update(engine, recorded, checkpoint(1))[1]


def test_an_update_that_changes_nothing_proves_nothing(recorded_of):
    """The derived matrix stays as it is then, too."""
    engine = fresh(Deriving, checkpoint(1))
    recorded = recorded_of(engine)
    assert not update(engine, recorded, checkpoint(1))[1]
    assert not update(engine, recorded, checkpoint(2))[1]


def test_moved_experts_are_recorded_anew(recorded_of):
    engine = Balancing()
    recorded = recorded_of(engine)
    update(engine, recorded, checkpoint(1))
    assert update(engine, recorded, checkpoint(2))[0]
    engine.up.rows.sub_(4)  # in place
    replayed, _, _ = update(engine, recorded, checkpoint(3))
    assert not replayed
    assert torch.equal(engine.up.weight, checkpoint(3)["up.weight"][:4])
    assert update(engine, recorded, checkpoint(4))[0]
    assert torch.equal(engine.up.weight, checkpoint(4)["up.weight"][:4])
    engine.up.rows = torch.tensor([4, 5, 6, 7])  # another tensor
    update(engine, recorded, checkpoint(5))
    assert torch.equal(engine.up.weight, checkpoint(5)["up.weight"][4:])


@pytest.mark.parametrize(
    "change",
    [
        lambda engine: setattr(engine, "placement", "moved"),
        lambda engine: engine.excluded.update(up="packed"),
        lambda engine: setattr(engine.up, "weight", nn.Parameter(torch.zeros(4, 4), requires_grad=False)),
    ],
    ids=["placement", "excluded", "storage"],
)
def test_any_change_of_the_engine_ends_a_replay(recorded_of, change):
    engine = Engine()
    recorded = recorded_of(engine)
    update(engine, recorded, checkpoint(1))
    change(engine)
    assert not recorded.still_holds()
    replayed, _, _ = update(engine, recorded, checkpoint(2))
    assert not replayed
    assert same(engine, fresh(Engine, checkpoint(2)))


@pytest.mark.parametrize("hook", ["target", "load_weights"])
def test_an_engine_that_cannot_be_recorded_loads_as_ever(recorded_of, hook, caplog):
    engine = Engine()
    load = engine.load_weights

    def fail(*arguments):
        raise RuntimeError("a surprise")

    setattr(engine, hook, fail)
    recorded = recorded_of(engine)
    layout = recorded.layout(MANIFEST, whole_layout(MANIFEST), replay=True)
    assert layout == whole_layout(MANIFEST)
    assert not recorded.roots
    if hook == "target":
        assert "could not be recorded" in caplog.text
    recorded.begin()
    load(checkpoint(1).items())
    assert not recorded.finish()


def test_a_watch_that_fails_costs_nothing_but_the_replay(recorded_of, monkeypatch):
    engine = Engine()
    recorded = recorded_of(engine)

    def fail(*arguments):
        raise torch.OutOfMemoryError("no room for a sum")

    monkeypatch.setattr("ckpt_core.record.proof.checksum", fail)
    assert update(engine, recorded, checkpoint(1))[1] is False
    assert same(engine, fresh(Engine, checkpoint(1)))
    monkeypatch.undo()
    assert update(engine, recorded, checkpoint(2))[1]
