"""Damages inputs by what they mean: most bytes of a frame or a JSON text, changed at random, are refused at once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec

_HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63 - 1,
    -(2**63),
    2**64 - 1,
    0.5,
    1e308,
    float("nan"),
    "",
    "a",
    "\x00",
    "\ud83d\ude00",
    "é" * 300,
    "0" * 32,
    "F32",
    "F4",
    "__metadata__",
    [],
    {},
    [[]],
    {"type": "Ping"},
    [0, 2],
    [2, 0],
    [2**62, 2**62],
    [0] * 70,
)


def mutator(target: str) -> Callable[[bytes, int, int], bytes]:
    """For `atheris.Setup`: half of the time changes a value inside, else bytes. (atheris.Mutate fails in the wheels of 3.x.)"""
    decode, encode = (_from_frame, _to_frame) if target == "wire" else (json.loads, _to_json)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.5:
            try:
                prefix, text = _split(target, data)
                made = encode(_changed(decode(text), draw))
            except (ValueError, RecursionError, OverflowError, TypeError, msgspec.MsgspecError):
                return _bytes_changed(data, draw)[:max_size]
            if prefix:
                prefix = len(made).to_bytes(8, "little")
                made += data[8 + len(text) :]
            return (prefix + made)[:max_size]
        return _bytes_changed(data, draw)[:max_size]

    return mutate


def _bytes_changed(data: bytes, draw: random.Random) -> bytes:
    """A few bytes replaced, put in, taken out, or repeated."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(len(made) + 1)
        fate = draw.random()
        if fate < 0.4:
            made[place : place + 1] = bytes(
                [draw.choice((draw.randrange(256), 0xDD, 0xDF, 0xDB, 0xFF, 0x94, 0x5B, 0x7B))]
            )
        elif fate < 0.6:
            made[place:place] = draw.randbytes(draw.choice((1, 2, 4, 8)))
        elif fate < 0.8:
            del made[place : place + draw.choice((1, 2, 8, 64))]
        else:
            first = draw.randrange(len(made) + 1)
            made[place:place] = made[first : first + draw.choice((1, 8, 64))] * draw.choice((1, 1, 3, 100))
    return bytes(made)


def _changed(value: Any, draw: random.Random) -> Any:
    """The same with one place in it replaced, repeated, dropped or nested deeper."""
    if value and draw.random() < 0.8:
        if isinstance(value, dict):
            return _changed_object(value, draw)
        if isinstance(value, list):
            return _changed_list(value, draw)
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 8, 1 << 20))
    if draw.random() < 0.05:
        for _ in range(draw.choice((3, 200, 3000))):
            value = [value]
        return value
    return draw.choice(_HOSTILE)


def _changed_object(value: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    key, made, fate = draw.choice(list(value)), dict(value), draw.random()
    if fate < 0.15:
        del made[key]
    elif fate < 0.3:
        made[draw.choice(("a", "b", "zz", "", "shape", "type"))] = made[key]
    else:
        made[key] = _changed(made[key], draw)
    return made


def _changed_list(value: list[Any], draw: random.Random) -> list[Any]:
    place, fate = draw.randrange(len(value)), draw.random()
    if fate < 0.1:
        return value[:place] + value[place + 1 :]
    if fate < 0.25:
        return value[:place] + [value[place]] * draw.choice((2, 3, 50)) + value[place:]
    return [*value[:place], _changed(value[place], draw), *value[place + 1 :]]


def _split(target: str, data: bytes) -> tuple[bytes, bytes]:
    """Length and text of a header; any other input as it is."""
    size = int.from_bytes(data[:8], "little")
    if target == "header" and 0 < size <= len(data) - 8:
        return data[:8], data[8 : 8 + size]
    return b"", data


def _from_frame(data: bytes) -> Any:
    return msgspec.msgpack.decode(data)


def _to_frame(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def _to_json(value: Any) -> bytes:
    return json.dumps(value).encode()
