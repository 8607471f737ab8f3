"""How a checkpoint fits a rank of SGLang: the layout, found by a dry run of the loader."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_core.errors import CkptError, EngineStateError
from ckpt_core.incoming import torch_dtype
from ckpt_core.layout import Layout, LayoutEntry, Mismatch
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_sglang.dry_run import DryRun, dry_run

_IGNORED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_DEFAULTED = re.compile(r"\.(k_scale|v_scale|q_scale)$")  # parameters that no checkpoint needs to have
_LAYER = re.compile(r"\.(\d+)\.")
_NUMBER = re.compile(r"\.\d+(?=\.)")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_EXPERT_PARTS = {"w13_": ("gate_proj", "up_proj"), "w2_": ("down_proj",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Attributes:
    layout: for the core.
    together: by name, all names that the loader must get in one call.
    clone: names that the loader writes to: it must not get the ring's own memory.
    """

    layout: Layout
    together: Mapping[str, frozenset[str]]
    clone: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of the engine's shape matters here.

    Attributes:
        tp_size: over how many ranks a tensor may be spread.
        whole: this rank holds a part of every tensor: no other pipeline stage, no other experts.
        model_path: what the engine started from; it need not have weights.
    """

    tp_size: int
    whole: bool
    model_path: str


def fit(clone: Any, live: Any, manifest: Manifest, shape: Shape) -> Fit:
    """Compare a checkpoint with a model.

    Args:
        clone: the model without data, in the shapes that are loaded.
        live: the model that serves.

    Raises:
        EngineStateError: the live parameters are not of the shapes that are loaded.
    """
    check_loadable(clone, live)
    seen = dry_run(clone, [(meta.name, meta.shape, meta.dtype) for meta in manifest.tensors])
    given = {meta.name: meta for meta in manifest.tensors}
    started_with = _Start(shape.model_path)
    taken = {name for copy in seen.copies for name in copy.sources}
    mismatched = dict(_mismatched(clone, seen, given, shape, started_with))
    strange = {name for name, error in seen.errors.items() if isinstance(error, KeyError)} - mismatched.keys()
    if shape.whole:
        strange |= {name for name in given if _is_strange(name, clone, taken, mismatched, started_with)}
    mismatched = {**dict(_uneven(clone, seen, given)), **mismatched}
    missing, short = _uncovered(clone, seen, given, started_with, mismatched.keys())
    for name in short:
        mismatched[name] = Mismatch(tensor=name, expected="a tensor that fills its parameter", got=_text(given[name]))
    together = _together(seen)
    groups = _groups(seen, together)
    return Fit(
        layout=Layout(
            entries=tuple(
                LayoutEntry(tensor=name, group=groups.get(name, name))
                for name in given
                if name in taken or name in mismatched
            ),
            missing=tuple(sorted(missing)),
            unknown=tuple(sorted(strange)),
            mismatched=tuple(mismatched.values()),
        ),
        together=together,
        clone=frozenset(seen.written_sources),
    )


def joined(layouts: Sequence[Layout]) -> Layout:
    """The target's layout with those of its draft models: what any of them takes is needed, what one knows is known.

    What a draft model lacks it shares with its target.
    """
    target, *drafts = layouts
    if not drafts:
        return target
    entries = {entry.tensor: entry for layout in layouts for entry in layout.entries}
    mismatched = {item.tensor: item for layout in layouts for item in layout.mismatched}
    unknown = set(target.unknown).intersection(*(layout.unknown for layout in drafts))
    return Layout(
        entries=tuple(entries.values()),
        missing=target.missing,
        unknown=tuple(sorted(unknown)),
        mismatched=tuple(mismatched.values()),
    )


def check_loadable(clone: Any, live: Any) -> None:
    """Raise where processing after a load left parameters that the loader cannot fill again.

    Raises:
        EngineStateError: names the first such parameter, and what was done to it.
    """
    now = dict(live.named_parameters())
    for name, wanted in clone.named_parameters():
        found = now.get(name)
        if found is not None and found.shape == wanted.shape and found.dtype == wanted.dtype:
            continue
        method = _quant_method(live, name)
        if _restores(method):
            continue
        is_now = "gone" if found is None else f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
        expected = f"{str(wanted.dtype).removeprefix('torch.')} {list(wanted.shape)}"
        raise EngineStateError(
            f"this model cannot be loaded again while it runs: after its first load {name} is {is_now}, where the loader "
            f"expects {expected} ({type(method).__name__} does not undo it); start SGLang without that quantisation or packing"
        )


class _Start:
    """Names and dtypes of the checkpoint that the engine was started on, read when they are first needed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._metas: dict[str, TensorMeta] | None = None

    @property
    def metas(self) -> dict[str, TensorMeta]:
        """By name; empty where it has no weights or is no directory."""
        if self._metas is None:
            self._metas = {}
            try:
                if Path(self._path).is_dir():
                    from ckpt_core.source import open_checkpoint

                    self._metas = {meta.name: meta for meta in Manifest.from_index(open_checkpoint(self._path)).tensors}
            except CkptError:
                pass  # a directory with a configuration and no weights is usual with dummy weights
        return self._metas

    def has_as(self, meta: TensorMeta) -> bool:
        """Whether it has a tensor of that name, shape and dtype."""
        found = self.metas.get(meta.name)
        return found is not None and found.shape == meta.shape and found.dtype == meta.dtype


def _mismatched(
    clone: Any, seen: DryRun, given: Mapping[str, TensorMeta], shape: Shape, start: _Start
) -> Iterable[tuple[str, Mismatch]]:
    for name, error in seen.errors.items():
        if not isinstance(error, KeyError):
            why = str(error) or type(error).__name__
            yield name, Mismatch(tensor=name, expected=f"what SGLang's loader takes ({why})", got=_text(given[name]))
    room: dict[str, int] = {}
    for copy in seen.copies:
        for name in copy.sources:
            if (
                _vocabulary(clone, copy.parameter) is None
            ):  # the last ranks hold fewer rows, and the loader checks those
                room[name] = room.get(name, 0) + copy.elements
            meta = given[name]
            if copy.parameter_dtype != torch_dtype(meta.dtype) and not start.has_as(meta):
                wanted = str(copy.parameter_dtype).removeprefix("torch.")
                yield name, Mismatch(tensor=name, expected=wanted, got=_text(meta))
    for name, meta in given.items():
        before = start.metas.get(name)
        if before is not None and before.shape != meta.shape:
            yield name, Mismatch(tensor=name, expected=f"{list(before.shape)}, as at the start", got=_text(meta))
    for name, elements in room.items():
        total = _size(given[name])
        if elements * shape.tp_size < total:
            expected = f"at most {elements * shape.tp_size} elements"
            yield name, Mismatch(tensor=name, expected=expected, got=f"{total} in {_text(given[name])}")


def _uneven(clone: Any, seen: DryRun, given: Mapping[str, TensorMeta]) -> Iterable[tuple[str, Mismatch]]:
    """Tensors that are not of the shape of their like in other layers and experts, although their parameters are.

    Where SGLang pads parameters (on CPUs, and for some kernels) its loader takes any size and fills the rest with zeros.
    """
    parameters = dict(clone.named_parameters())
    alike: dict[tuple[str, Any], dict[tuple[int, ...], set[str]]] = {}
    for copy in seen.copies:
        for name in copy.sources:
            key = _NUMBER.sub(".N", name), tuple(parameters[copy.parameter].shape)
            alike.setdefault(key, {}).setdefault(given[name].shape, set()).add(name)
    for by_shape in alike.values():
        most = max(len(names) for names in by_shape.values())
        usual = [shape for shape, names in by_shape.items() if len(names) == most]
        for shape, names in by_shape.items():
            if len(by_shape) > 1 and (len(usual) > 1 or shape != usual[0]):
                for name in names:
                    expected = f"one shape with its like in other layers ({', '.join(str(list(u)) for u in usual)})"
                    yield name, Mismatch(tensor=name, expected=expected, got=_text(given[name]))


def _is_strange(name: str, clone: Any, taken: set[str], mismatched: Mapping[str, Mismatch], start: _Start) -> bool:
    if name in taken or name in mismatched or _IGNORED.search(name):
        return False
    if name.endswith("lm_head.weight") and getattr(getattr(clone, "config", None), "tie_word_embeddings", False):
        return False
    return name not in start.metas


def _uncovered(
    clone: Any, seen: DryRun, given: Mapping[str, TensorMeta], start: _Start, mismatched: Collection[str]
) -> tuple[set[str], set[str]]:
    """Names that are missing, and given ones that leave their parameter half empty. Padding leaves it so, too."""
    missing: set[str] = set()
    short: set[str] = set()
    names_of: dict[str, set[str]] = {}
    for copy in seen.copies:
        names_of.setdefault(copy.parameter, set()).update(copy.sources)
    for parameter, tensor in clone.named_parameters():
        filled, wanted = seen.filled.get(parameter, 0), _wanted(clone, parameter, tensor)
        if filled >= wanted or _DEFAULTED.search(parameter):
            continue
        expected = _names_for(parameter, tensor, names_of)
        absent = {name for name in expected if name not in given and (not start.metas or name in start.metas)}
        missing |= absent
        if not absent and expected.isdisjoint(mismatched) and filled + seen.padded.get(parameter, 0) < wanted:
            short |= names_of.get(parameter, set())
    return missing, short


def _wanted(clone: Any, parameter: str, tensor: Any) -> int:
    """Elements that a load fills; the padding of a vocabulary is filled otherwise, or not at all."""
    indices = _vocabulary(clone, parameter)
    if indices is None:
        return int(tensor.numel())
    return int(indices.num_org_elements) * (int(tensor.numel()) // max(1, int(tensor.shape[0])))


def _vocabulary(clone: Any, parameter: str) -> Any:
    """Which rows of a vocabulary are in a parameter; None where it holds something else."""
    indices = getattr(clone.get_submodule(parameter.rpartition(".")[0]), "shard_indices", None)
    return indices if hasattr(indices, "num_org_elements") else None


def _names_for(parameter: str, tensor: Any, names_of: Mapping[str, set[str]]) -> set[str]:
    """Checkpoint names of a parameter, by what is there: as for the same parameter of other layers, as for its other experts;
    and by what the parts of fused parameters are usually called."""
    there = names_of.get(parameter, set())
    pattern = _LAYER.sub(".N.", parameter)
    alike = [other for other in names_of if other != parameter and _LAYER.sub(".N.", other) == pattern]
    expected = set(there)
    if alike:
        fullest = max(alike, key=lambda other: len(names_of[other]))
        expected |= {_moved(name, fullest, parameter) for name in names_of[fullest]}
    experts = {_EXPERT.sub(r".experts.{}.", name) for name in there if _EXPERT.search(name)}
    expected |= {text.format(expert) for text in experts for expert in range(int(tensor.shape[0]))}
    usual = set(_split(parameter, tensor))
    return expected | usual if not expected or usual & expected else expected


def _moved(name: str, from_parameter: str, to_parameter: str) -> str:
    """A name of one layer's parameter, as it is in another layer."""
    old, new = _LAYER.findall(from_parameter), _LAYER.findall(to_parameter)
    return name.replace(f".{old[0]}.", f".{new[0]}.", 1) if old and new else name


def _split(parameter: str, tensor: Any) -> Iterable[str]:
    prefix, _, leaf = parameter.rpartition(".")
    for start, parts in _EXPERT_PARTS.items():
        if leaf.startswith(start) and prefix.endswith("experts"):
            for expert in range(int(tensor.shape[0])):
                yield from (f"{prefix}.{expert}.{part}.{leaf.removeprefix(start)}" for part in parts)
            return
    owner, _, module = prefix.rpartition(".")
    if module in _PARTS:
        yield from (f"{owner}.{part}.{leaf}" for part in _PARTS[module])
        return
    yield parameter


def _together(seen: DryRun) -> dict[str, frozenset[str]]:
    joined: dict[str, frozenset[str]] = {}
    for copy in seen.copies:
        if len(copy.sources) > 1:
            names = copy.sources.union(*(joined.get(name, frozenset()) for name in copy.sources))
            joined.update(dict.fromkeys(names, names))
    return joined


def _groups(seen: DryRun, together: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """By name: the engine's module that it goes to; one for all that must go together."""
    groups: dict[str, str] = {}
    for copy in seen.copies:
        for name in copy.sources:
            groups.setdefault(min(together.get(name, {name})), copy.parameter.rpartition(".")[0])
    return {name: groups[min(together.get(name, {name}))] for copy in seen.copies for name in copy.sources}


def _quant_method(model: Any, parameter: str) -> Any:
    return getattr(model.get_submodule(parameter.rpartition(".")[0]), "quant_method", None)


def _restores(method: Any) -> bool:
    """Whether a quantisation method undoes its packing before a load: by its own function, not the base's empty one."""
    own = getattr(type(method), "restore_weights_before_loading", None)
    return own is not None and not own.__qualname__.startswith("QuantizeMethodBase.")


def _size(meta: TensorMeta) -> int:
    size = 1
    for length in meta.shape:
        size *= length
    return size


def _text(meta: TensorMeta) -> str:
    return f"{meta.dtype.value} {list(meta.shape)}"
