"""The answer to one request, read as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from ckpt_conformance.streams import Told


class Answer:
    """What a server said so far.

    Attributes:
        token_ids: all that came.
        ended: nothing more comes.
    """

    def __init__(self, told: Iterator[Told]) -> None:
        self._told = told
        self._names: list[str] = []
        self.token_ids: list[int] = []
        self.ended = False

    def begin(self) -> None:
        """Read until there is a token, or the end."""
        self.read(until=lambda answer: bool(answer.token_ids))

    def read(self, *, until: Callable[[Answer], bool] = lambda _answer: False) -> None:
        """Read until that is so, or the end."""
        while not (self.ended or until(self)):
            told = next(self._told, None)
            if told is None:
                self.ended = True
            else:
                self._take(told)

    @property
    def versions(self) -> list[str]:
        """Of the tokens, in order, one for each run of the same; none where the server told none."""
        return [name for name, _ in groupby(self._names)] if any(self._names) else []

    def of(self, version: str) -> list[int]:
        """Tokens that were made by the weights of that version."""
        return [token for token, name in zip(self.token_ids, self._names, strict=True) if name == version]

    def _take(self, told: Told) -> None:
        self.token_ids += told.token_ids
        self._names += [""] * len(told.token_ids)
        for span in told.spans:
            self._names[span.start : span.end] = [span.version] * (span.end - span.start)
