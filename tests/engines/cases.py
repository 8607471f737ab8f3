"""Which models at which degree of tensor parallelism; their checkpoints A and B; what a fresh start says on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from engine_clients import Answer
from tokenizers import Tokenizer

from ckpt_conformance.models import smollm2
from ckpt_conformance.models.tiny import make_tiny, perturb

SMOLLM2 = "smollm2"
# sizes that engines have kernels for on CPUs
_TINY = {
    "vocab": 512,
    "hidden": 128,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 256,
    "moe_intermediate": 64,
}
_LAYERS = {"llama": 4}
_TINY_PROMPTS = ((5, 17, 42, 8), (9, 3, 200, 77, 150), (12,))
_QUESTION = "What is the capital of France?"
SHORT, FRESH = 16, 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of server.

    Attributes:
        streams: is asked for answers of seconds, which updates find unfinished; see Client.long_answers.
        empty: starts on dummy weights; else on A, and what it says then is what a fresh start on A says.
    """

    model: str
    tp: int
    streams: bool = False
    empty: bool = False

    def __str__(self) -> str:
        return f"{self.model}-tp{self.tp}"

    @property
    def tokens(self) -> int:
        """Length of a fresh answer: enough of a long one to tell its version."""
        return FRESH if self.streams else SHORT


# each starts two servers, or three: every model once, and the plain one at both degrees; benchmarks/model_kinds.py runs more
CASES = (
    Case(model="llama", tp=1, streams=True, empty=True),
    Case(model="qwen3", tp=1),
    Case(model=SMOLLM2, tp=1),
    Case(model="llama", tp=2, streams=True, empty=True),
    Case(model="qwen3_moe", tp=2),
)
LONG_CASES = tuple(case for case in CASES if case.streams)
EMPTY_CASES = tuple(case for case in CASES if case.empty)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """A and B: every tensor of a tiny model differs, of the real one a part of each layer.

    Attributes:
        decode: token ids to text; None where tokens mean nothing.
    """

    a: Path
    b: Path
    prompts: tuple[tuple[int, ...], ...]
    decode: Callable[[list[int]], str] | None = None

    def __getitem__(self, which: str) -> Path:
        return {"a": self.a, "b": self.b}[which]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fresh:
    """Tokens of fresh starts by checkpoint, one list a prompt."""

    tokens: dict[str, list[list[int]]] = field(default_factory=dict)

    def short(self, which: str) -> list[list[int]]:
        """The first tokens of every answer."""
        return [tokens[:SHORT] for tokens in self.tokens[which]]

    def is_prefix(self, which: str, prompt: int, answer: Answer, end: int | None = None) -> bool:
        """Whether an answer, up to `end`, is what the fresh start says, as far as that is known."""
        got, known = answer.token_ids[:end], self.tokens[which][prompt]
        known_length = min(len(got), len(known))
        return got[:known_length] == known[:known_length]


def make_checkpoints(model: str, directory: Path, cache: Path) -> Checkpoints:
    """Write them."""
    if model == SMOLLM2:
        return _smollm2(directory, cache)
    first = make_tiny(directory / "a", model, seed=1, **_TINY, layers=_LAYERS.get(model, 2))
    return Checkpoints(a=first, b=perturb(first, directory / "b", seed=2), prompts=_TINY_PROMPTS)


def _smollm2(directory: Path, cache: Path) -> Checkpoints:
    first = smollm2.fetch(cache)
    second = perturb(first, directory / "b", seed=2, names=".mlp.")
    tokenizer = Tokenizer.from_file(str(first / "tokenizer.json"))
    prompt = tokenizer.encode(smollm2.chat_prompt(_QUESTION), add_special_tokens=False).ids
    return Checkpoints(a=first, b=second, prompts=(tuple(prompt),), decode=tokenizer.decode)
