"""What the author of an engine plugin implements, once, in some forty lines, to run the suite on his engine.

Required: five methods that make and read workers with tiny models. Everything else has a default that raises `NotOffered`:
the checks that need it are skipped, and say so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_conformance.levels import ModelKind
from ckpt_conformance.streams import Told
from ckpt_core.plugins import EnginePlugin

if TYPE_CHECKING:
    import torch

    from ckpt_core.api import Target


class NotOffered(Exception):
    """The harness does not offer something optional; checks that need it are skipped."""


class Generate(Protocol):
    """Greedy generation by a server."""

    def __call__(self, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """New token ids."""
        ...


class Stream(Protocol):
    """Greedy generation by a server, told as it goes on; an end token is no end."""

    def __call__(self, prompt_token_ids: Sequence[int], max_tokens: int) -> Iterator[Told]:
        """Tokens as they come. It ends with the request, however that ends."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server.

    Attributes:
        target: how an update addresses it.
        generate: greedy, over HTTP.
        digests: of every live tensor, by rank and name; None where the engine does not tell.
        stream: as generate, token after token; None where `Harness.streams` is not set.
        most_tokens: that an answer can have: a request that is to be in flight at an update asks for so many.
    """

    target: Target
    generate: Generate
    digests: Callable[[], Sequence[Mapping[str, str]]] | None = None
    stream: Stream | None = None
    most_tokens: int = 3000


class Harness(ABC):
    """See the module. An author subclasses it and registers an instance under the entry-point group `ckpt_core.conformance`.

    Attributes:
        engine: name of the engine and its plugin.
        plugin_module: importable module of the plugin.
        engine_modules: top modules that `ckpt_engine_info` must not import.
        kinds: which kinds of models the harness can make.
        streams: its servers have `Server.stream`.
        known_failures: reason by check id. A known failure that passes fails the run: strike it off.
    """

    engine: str
    plugin_module: str
    engine_modules: tuple[str, ...] = ("torch",)
    kinds: frozenset[ModelKind] = frozenset({ModelKind.PLAIN})
    streams: bool = False
    known_failures: Mapping[str, str] = {}

    # -- required --------------------------------------------------------------------------------------------------
    @abstractmethod
    def checkpoint(self, directory: Path, kind: ModelKind, seed: int) -> Path:
        """Write a tiny checkpoint into the directory and return its path: per kind one structure, per seed other values.

        Of more than five tensors, so that it takes more than one bucket.
        """

    @abstractmethod
    def make_worker(self, checkpoint: Path, kind: ModelKind) -> Any:
        """A worker for that model in this process, with dummy weights, paused: ready for `ckpt_begin`."""

    @abstractmethod
    def fresh(self, checkpoint: Path, kind: ModelKind) -> Any:
        """The oracle: a worker started on that checkpoint by the engine's own loading at start, serving."""

    @abstractmethod
    def live(self, worker: Any) -> Mapping[str, torch.Tensor]:
        """The storage of all that an update determines, by name, read from the engine and not through the plugin."""

    @abstractmethod
    def close(self, worker: Any) -> None:
        """Give a worker's memory back."""

    # -- defaults --------------------------------------------------------------------------------------------------
    def plugin(self) -> EnginePlugin:
        """The checked plugin."""
        return EnginePlugin(import_module(self.plugin_module), name=self.engine)

    # -- optional --------------------------------------------------------------------------------------------------
    def generate(self, worker: Any, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy new token ids. Raises where the worker may not produce tokens."""
        raise NotOffered("generate()")

    def serve(self, worker: Any) -> None:
        """Let a paused worker produce tokens. May raise where the engine refuses."""
        raise NotOffered("serve()")

    def sleep(self, worker: Any) -> None:
        """Put a paused worker to sleep, weights dropped."""
        raise NotOffered("sleep()")

    def waiting_worker(self, checkpoint: Path, kind: ModelKind) -> Any:
        """A worker that was started to wait for its first weights: paused, no token before a commit."""
        raise NotOffered("waiting_worker()")

    def failing_finish(self, worker: Any, error: Exception) -> AbstractContextManager[None]:
        """While entered, the engine's own post-processing (below the plugin) raises that error."""
        raise NotOffered("failing_finish()")

    def target(self, worker: Any) -> Target:
        """How a real update addresses a worker in this process."""
        raise NotOffered("target()")

    def server(self, checkpoint: Path, *, ranks: int, dummy: bool) -> AbstractContextManager[Server]:
        """Start a server of that many ranks on the checkpoint (or on dummy weights of its structure)."""
        raise NotOffered("server()")
