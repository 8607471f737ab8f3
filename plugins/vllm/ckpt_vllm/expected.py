"""Which checkpoint tensors a vLLM model wants: names, shapes and dtypes, read off its modules in load format.

vLLM keeps no such list. It follows from the layer classes that all its models share: fused linears (their parts are named by
the model's `packed_modules_mapping`), parallel linears, vocabulary embeddings, packed experts; anything else has the shape that
its parameter has. A model that renames otherwise is found out by the files it was started from: they do not fit this list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_vllm import compat, compat_layers

_EXPERT_PARTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
_IGNORED_PARTS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "rotary_pos_emb.inv_freq")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTensor:
    """A tensor that the model wants.

    Attributes:
        group: the vLLM module that it lands in.
        shape, dtype: in the checkpoint; None where the plugin does not know. dtype as torch calls it, e.g. "bfloat16".
        required: the model cannot do without it.
    """

    group: str
    shape: tuple[int, ...] | None
    dtype: str | None
    required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedCheckpoint:
    """What a model wants on this rank.

    Attributes:
        tensors: by name, as the checkpoint has it after the model's renamings.
        aliases: names that share another's storage (a tied head): not needed.
        fused_experts: names that may come instead of all single experts of a module, with that module.
    """

    tensors: Mapping[str, ExpectedTensor]
    aliases: frozenset[str]
    fused_experts: Mapping[str, str]


def expected_of(model: Any, model_config: Any) -> ExpectedCheckpoint:
    """Read the list off a model."""
    tensors: dict[str, ExpectedTensor] = {}
    fused: dict[str, str] = {}
    first_with: dict[int, str] = {}
    aliases = set()
    parts = _packed_parts(model)
    for path, module in model.named_modules():
        for name, parameter in compat.load_format(module).items():
            full = f"{path}.{name}" if path else name
            live = module._parameters.get(name)
            if live is not None and first_with.setdefault(id(live), full) != full:
                aliases.add(full)
                continue
            if compat_layers.is_experts(module):
                base = path.removesuffix(".routed_experts")
                tensors.update(_experts(module, name, parameter, path=path, base=base, model_config=model_config))
                fused.update({f"{base}.gate_up_proj": path, f"{base}.down_proj": path})
                continue
            tensors.update(_of_module(module, name, parameter, path=path, parts=parts, model_dtype=model_config.dtype))
    return ExpectedCheckpoint(tensors=tensors, aliases=frozenset(aliases), fused_experts=fused)


def is_ignorable(name: str) -> bool:
    """Leftovers in old checkpoints that vLLM drops, too."""
    return any(part in name for part in _IGNORED_PARTS)


def _packed_parts(model: Any) -> dict[str, list[str]]:
    """Parts of fused modules by the last part of their name; inner models (language models of multimodal ones) included."""
    found: dict[str, list[str]] = {}
    for module in model.modules():
        for fused, parts in (getattr(module, "packed_modules_mapping", None) or {}).items():
            if len(parts) > 1:
                found.setdefault(fused, list(parts))
    return found


def _of_module(
    module: Any, name: str, parameter: Any, *, path: str, parts: Mapping[str, list[str]], model_dtype: Any
) -> Iterator[tuple[str, ExpectedTensor]]:
    leaf = path.rpartition(".")[2]
    # what is quantised only after it was loaded comes as the model's own type; other quantised tensors are the method's matter
    named = name in ("weight", "bias")
    plain = named and (compat.is_plain(module) or parameter.dtype == model_dtype)
    dtype = _dtype(parameter) if plain else None
    required = named and not compat.is_attention(module)
    sizes = compat_layers.fused_sizes(module)
    if leaf in parts and sizes and len(sizes) == len(parts[leaf]):
        for part, rows in zip(parts[leaf], sizes, strict=True):
            shape = (rows, *parameter.shape[1:]) if plain else None
            yield (
                f"{path.removesuffix(leaf)}{part}.{name}",
                ExpectedTensor(group=path, shape=shape, dtype=dtype, required=required),
            )
        return
    shape = compat_layers.whole_shape(module, name, parameter) if plain else None
    yield f"{path}.{name}", ExpectedTensor(group=path, shape=shape, dtype=dtype, required=required)


def _experts(
    module: Any, name: str, parameter: Any, *, path: str, base: str, model_config: Any
) -> Iterator[tuple[str, ExpectedTensor]]:
    kind, _, what = name.partition("_")
    plain = what == "weight" and bool(compat.expert_backend(module))
    inner, hidden = compat_layers.expert_sizes(module, parameter, kind, model_config) if plain else (None, None)
    names = compat_layers.expert_names(module)
    for expert in range(compat_layers.expert_count(module)):
        for part in _EXPERT_PARTS.get(kind, ()):
            shape = None
            if inner is not None and hidden is not None:
                shape = (hidden, inner) if kind == "w2" else (inner, hidden)
            yield (
                f"{base}.{expert}.{names.get(part, part)}.{what}",
                ExpectedTensor(group=path, shape=shape, dtype=_dtype(parameter) if plain else None, required=plain),
            )


def _dtype(parameter: Any) -> str:
    return str(parameter.dtype).removeprefix("torch.")
