"""Regions of a flat row of elements, as `torch.as_strided` describes them. No torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckpt_core.layout import Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A block of a region: its first index in the region, and its extent, by dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strided:
    """Elements `offset + sum(index[d] * stride[d])` for every index below `size`. Strides are not negative."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Strided:
        """A row-major tensor."""
        return cls(offset=0, size=tuple(shape), stride=row_major(shape))

    @property
    def numel(self) -> int:
        """Number of indexes; an expanded dimension counts its repetitions."""
        return math.prod(self.size)

    @property
    def reach(self) -> int:
        """One more than the last flat position; 0 where there is none."""
        if 0 in self.size:
            return 0
        return self.offset + sum((n - 1) * stride for n, stride in zip(self.size, self.stride, strict=True)) + 1

    def collapsed(self) -> Strided:
        """The same elements in the same order, in as few dimensions as possible."""
        merged: list[tuple[int, int]] = []
        for n, stride in zip(self.size, self.stride, strict=True):
            if n == 1:
                continue
            if merged and merged[-1][1] == stride * n:
                merged[-1] = (merged[-1][0] * n, stride)
            else:
                merged.append((n, stride))
        return Strided(offset=self.offset, size=tuple(n for n, _ in merged), stride=tuple(s for _, s in merged))

    def block(self, part: Part) -> Strided:
        """A part of it."""
        offset = self.offset + sum(map(int.__mul__, part.start, self.stride))
        return Strided(offset=offset, size=part.size, stride=self.stride)

    def shifted(self, by: int) -> Strided:
        """The same, counted from elsewhere."""
        return Strided(offset=self.offset + by, size=self.size, stride=self.stride)

    def parts_within(self, first: int, stop: int) -> Iterator[Part]:
        """Disjoint parts of all its elements with flat positions in [first, stop)."""
        if 0 not in self.size:
            yield from self._parts(first, stop, (0,) * len(self.size), self.size)

    def _parts(self, first: int, stop: int, start: tuple[int, ...], size: tuple[int, ...]) -> Iterator[Part]:
        low = self.offset + sum(map(int.__mul__, start, self.stride))
        high = low + sum((n - 1) * s for n, s in zip(size, self.stride, strict=True))
        if high < first or low >= stop:
            return
        if first <= low and high < stop:
            yield Part(start=start, size=size)
            return
        # cut along the dimension that reaches farthest: all of the row behind one of its indexes lies close together
        d = max((d for d, n in enumerate(size) if n > 1), key=lambda d: self.stride[d])
        step = self.stride[d]
        rest = high - low - (size[d] - 1) * step
        touched = range(max(0, -((low + rest - first) // step)), min(size[d], (stop - 1 - low) // step + 1))
        begin = max(0, -((low - first) // step))
        inside = range(begin, max(begin, min(size[d], (stop - 1 - rest - low) // step + 1)))
        if inside:
            yield Part(start=_with(start, d, start[d] + inside.start), size=_with(size, d, len(inside)))
        for index in touched:
            if index not in inside:
                yield from self._parts(first, stop, _with(start, d, start[d] + index), _with(size, d, 1))

    def parts_in_box(self, shape: Sequence[int], box: Box) -> Iterator[tuple[Part, Strided]]:
        """Disjoint parts of all its elements that are in a box of a row-major tensor of that shape.

        With each, the same elements counted from the first of the box, packed row-major.
        """
        if 0 in self.size or not box.size:
            return
        runs = box.byte_runs(shape, 1)
        walked = None if runs.count <= 1 else self._walked(shape)
        if walked is None:
            for number, first in enumerate(runs.offsets_bytes()):
                for part in self.parts_within(first, first + runs.run_bytes):
                    yield part, self.block(part).shifted(number * runs.run_bytes - first)
            return
        start, steps = walked
        packed = row_major(box.shape)
        low, high = [0] * len(self.size), list(self.size)
        axes = {d for d, step in steps if step}
        if any(not box.start[d] <= start[d] < box.stop[d] for d in range(len(shape)) if d not in axes):
            return
        for place, (d, step) in enumerate(steps):
            if step:
                low[place] = max(0, -((start[d] - box.start[d]) // step))
                high[place] = min(self.size[place], -((start[d] - box.stop[d]) // step))
        part = Part(start=tuple(low), size=tuple(map(int.__sub__, high, low)))
        if min(part.size, default=1) < 1:
            return
        reached = list(start)
        for (d, step), first in zip(steps, low, strict=True):
            reached[d] += step * first
        offset = sum((at - begin) * stride for at, begin, stride in zip(reached, box.start, packed, strict=True))
        yield part, Strided(offset=offset, size=part.size, stride=tuple(step * packed[d] for d, step in steps))

    def _walked(self, shape: Sequence[int]) -> tuple[tuple[int, ...], list[tuple[int, int]]] | None:
        """`_digits`, where each dimension of the shape is walked by one dimension at most, and not past its end."""
        digits = self._digits(shape)
        if digits is None:
            return None
        start, steps = digits
        axes = [d for d, step in steps if step]
        inside = all(start[d] + step * (n - 1) < shape[d] for (d, step), n in zip(steps, self.size, strict=True))
        return digits if inside and len(axes) == len(set(axes)) else None

    def box_in(self, shape: Sequence[int]) -> Box:
        """The smallest box of a row-major tensor of that shape that holds all its elements, or the whole tensor."""
        digits = self._digits(shape)
        if digits is None or 0 in self.size:
            return Box.whole(shape)
        start, steps = digits
        extent = [1] * len(shape)
        for (d, step), n in zip(steps, self.size, strict=True):
            extent[d] += (n - 1) * step
        if any(first + length > limit for first, length, limit in zip(start, extent, shape, strict=True)):
            return Box.whole(shape)
        return Box(start=start, shape=tuple(extent))

    def through(self, shape: Sequence[int], inner: Strided) -> Strided | None:
        """This region of a row-major copy (of that shape) of another region, as a region of where the other lies.

        None where it does not follow the copy's dimensions.
        """
        digits = self._digits(shape)
        if digits is None or 0 in self.size:
            return None
        start, steps = digits
        reach = list(start)
        for (d, step), n in zip(steps, self.size, strict=True):
            reach[d] += (n - 1) * step
        if any(last >= limit for last, limit in zip(reach, shape, strict=True)):
            return None
        return Strided(
            offset=inner.offset + sum(map(int.__mul__, start, inner.stride)),
            size=self.size,
            stride=tuple(step * inner.stride[d] if step else 0 for d, step in steps),
        )

    def _digits(self, shape: Sequence[int]) -> tuple[tuple[int, ...], list[tuple[int, int]]] | None:
        """Index of the first element in that shape; and for each dimension, which of the shape it walks, in which steps."""
        if not shape:
            return ((), []) if not self.size else None
        if 0 in shape:
            return None
        strides = row_major(shape)
        start, rest = [], self.offset
        for stride in strides:
            index, rest = divmod(rest, stride)
            start.append(index)
        steps = []
        for n, s in zip(self.size, self.stride, strict=True):
            if n == 1 or s == 0:
                steps.append((0, 0))
                continue
            d = next((d for d, stride in enumerate(strides) if shape[d] > 1 and stride <= s), None)
            if d is None or s % strides[d]:
                return None
            steps.append((d, s // strides[d]))
        return tuple(start), steps


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return _row_major(tuple(shape))


@functools.lru_cache(maxsize=4096)  # models repeat a few shapes
def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, stride = [], 1
    for length in reversed(shape):
        strides.append(stride)
        stride *= max(length, 1)
    return tuple(reversed(strides))


def _with(values: tuple[int, ...], position: int, value: int) -> tuple[int, ...]:
    return (*values[:position], value, *values[position + 1 :])
