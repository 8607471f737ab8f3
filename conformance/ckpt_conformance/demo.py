"""`ckpt demo`: two running engines, dummy weights, a real small model put in, a second version, and back."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

import ckpt_core
from ckpt_conformance.models import smollm2
from ckpt_conformance.models.tiny import make_tiny, perturb
from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_core.errors import ConfigError
from ckpt_core.render import report_tables

_QUESTION = "What is the capital of France?"
_ANSWER = "The capital of France is Paris"
_CHANGED_LAYER = "model.layers.0.mlp.down_proj"


def run_demo(cache: Path, *, generated: bool, console: Console) -> None:
    """The main job, on this machine, on real processes.

    Args:
        cache: where the model is kept between runs.
        generated: do not fetch a model, make one.
        console: where to tell it.

    Raises:
        CkptError: something did not hold; the demo checks what it shows.
    """
    with TemporaryDirectory(prefix="ckpt-demo-") as temporary:
        first, prompt, real = _checkpoint(cache, Path(temporary), generated=generated, console=console)
        console.print("making a second version: the values of one layer's projection changed")
        second = perturb(first, Path(temporary) / "second", seed=7, names=_CHANGED_LAYER)
        _serve_and_update(first, second, prompt, real=real, console=console)


def _checkpoint(cache: Path, temporary: Path, *, generated: bool, console: Console) -> tuple[Path, str, bool]:
    """Directory of the first version, a prompt, and whether it is the real model."""
    if not generated:
        try:
            path = smollm2.fetch(cache, on_step=lambda step: console.print(f"[dim]{step}[/]"))
        except ConfigError as error:
            console.print(
                f"[yellow]SmolLM2 cannot be had ({error}); going on with a generated model[/]", soft_wrap=True
            )
        else:
            return path, smollm2.chat_prompt(_QUESTION), True
    return make_tiny(temporary / "first", arch="qwen3", seed=1, hidden=384, layers=8, vocab=1000), "w5 w6 w7", False


def _serve_and_update(first: Path, second: Path, prompt: str, *, real: bool, console: Console) -> None:
    console.rule("two engines, dummy weights")
    with ReferenceServer(first, load_format="dummy") as one, ReferenceServer(first, load_format="dummy") as two:
        engines = (one, two)
        targets = [ckpt_core.Target(engine="reference", url=engine.url) for engine in engines]
        for engine in engines:
            console.print(f"reference engine at {engine.url}, pid {engine.pid}")
        before = _ask(engines, prompt, console)
        with ckpt_core.Updater(targets) as updater:
            answers = [before]
            for version, path in (("first", first), ("second", second), ("first-again", first)):
                console.rule(f"ckpt update: version {version!r}")
                report = updater.update(path, version=version)
                for table in report_tables(report):
                    console.print(table)
                answers.append(_ask(engines, prompt, console))
        _check(answers, real=real)
    console.rule("done: new weights, other weights, and the first again, in engines that kept running")


def _ask(engines: tuple[ReferenceServer, ...], prompt: str, console: Console) -> str:
    """The answer, which must be the same from all."""
    answers = []
    for engine in engines:
        answer = engine.generate(prompt, max_tokens=24)
        answers.append(answer["text"])
        console.print(
            f"{engine.url} ({answer['version'] or 'no version'}): [bold]{answer['text']!r}[/]", soft_wrap=True
        )
    if len(set(answers)) != 1:
        raise ConfigError(f"engines with the same weights answered differently: {answers}")
    return str(answers[0])


def _check(answers: list[str], *, real: bool) -> None:
    dummy, first, second, again = answers
    if first in (dummy, second) or again != first:
        raise ConfigError(f"the answers do not follow the weights: {answers}")
    if real and _ANSWER not in first:
        raise ConfigError(f"expected {_ANSWER!r} from the real weights, got {first!r}")
