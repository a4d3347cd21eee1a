"""CUDA graphs of small passes: a GPU computes them faster than a CPU can start their kernels one by one.

A graph replays the kernels of one shape, so inputs are padded up to one of a few shapes. Graphs share their memory:
the result of each is read before the next is replayed.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from reward_server.passes import Inputs

logger = logging.getLogger(__name__)

MOST_TOKENS = 16384
"""Stem tokens, padding included, above which the kernels take longer than their starts."""
# Few shapes are captured soon, many are padded little.
_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_STEM_TOKENS = (*range(32, 256, 32), *range(256, 1024, 128), *range(1024, 4097, 256))
_BRANCH_TOKENS = (64, 96, 128, 160, 192, 256, 512)
_TEXTS_A_ROW = 8
_MOST_GRAPHS = 128
# Capturing takes longer than computing, so a shape is captured when it comes again; later where a graph of a larger
# shape serves it meanwhile.
_USES_ALONE = 2
_USES_SERVED = 6
_MOST_EXTRA = 1.5
"""Tokens of a larger shape, as a multiple, up to which its graph is faster than passes without one."""


@dataclass(frozen=True)
class Shape:
    """The shape that inputs are padded to."""

    rows: int
    stem_tokens: int
    branch_tokens: int
    """0 where nothing branches; otherwise all rows have branches, and up to `_TEXTS_A_ROW` texts each."""

    @property
    def tokens(self) -> int:
        """Tokens that both passes read."""
        return self.rows * (self.stem_tokens + self.branch_tokens)

    def holds(self, other: Shape) -> bool:
        """Whether inputs of shape `other` can be padded up to this one."""
        return (
            self.rows >= other.rows
            and self.stem_tokens >= other.stem_tokens
            and self.branch_tokens >= other.branch_tokens
            and bool(self.branch_tokens) == bool(other.branch_tokens)
        )


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    logits: torch.Tensor


def shape_of(inputs: Inputs) -> Shape | None:
    """Return the shape to which `inputs` are padded, None where they are too large for a graph."""
    rows = _next(_ROWS, inputs.stems.shape[0])
    stem_tokens = _next(_STEM_TOKENS, inputs.stems.shape[1])
    branch_tokens = _next(_BRANCH_TOKENS, inputs.branches.shape[1]) if len(inputs.branches) else 0
    if rows is None or stem_tokens is None or branch_tokens is None or rows * stem_tokens > MOST_TOKENS:
        return None
    return Shape(rows, stem_tokens, branch_tokens) if len(inputs.ends) <= rows * _TEXTS_A_ROW else None


def pad(inputs: Inputs, shape: Shape, pad_id: int, no_owner: int) -> Inputs:
    """Return `inputs` filled up to `shape`: further tokens are `pad_id` of no text, further texts are read in vain."""
    second = (shape.rows, shape.branch_tokens) if shape.branch_tokens else (0, 0)
    return inputs._replace(
        stems=_filled(inputs.stems, (shape.rows, shape.stem_tokens), pad_id),
        alone=_filled(inputs.alone, (shape.rows, 2), 0),
        branches=_filled(inputs.branches, second, pad_id),
        positions=_filled(inputs.positions, second, 0),
        owners=_filled(inputs.owners, second, no_owner),
        stem_lengths=_filled(inputs.stem_lengths, second[:1], 0),
        ends=_filled(inputs.ends, (second[0] * _TEXTS_A_ROW, 2), 0),
    )


def unpad(logits: torch.Tensor, inputs: Inputs, padded: Inputs) -> torch.Tensor:
    """Return what of the `logits` of `padded` belongs to the texts of `inputs`."""
    start = len(padded.alone)
    return torch.cat([logits[: len(inputs.alone)], logits[start : start + len(inputs.ends)]])


def shape_to_use(needed: Shape, captured: Collection[Shape], uses: int) -> Shape | None:
    """Return the shape whose graph serves `needed`, which came `uses` times without one of its own; None for no graph.

    One that is not in `captured` is to be captured.
    """
    larger = [shape for shape in captured if shape.holds(needed) and shape.tokens <= _MOST_EXTRA * needed.tokens]
    if needed in captured or uses >= (_USES_SERVED if larger else _USES_ALONE):
        return needed
    return min(larger, key=lambda shape: shape.tokens, default=None)


class Graphs:
    """Replays a function of `Inputs`, captured once for each shape that comes again."""

    def __init__(self, logits: Callable[[Inputs], torch.Tensor], pad_id: int, no_owner: int) -> None:
        """`logits` computes the scores of texts that share nothing and then of the others, on the device."""
        self._logits = logits
        self._pad_id = pad_id
        self._no_owner = no_owner
        self._captured: OrderedDict[Shape, _Captured] = OrderedDict()
        """The last used one last."""
        self._uses: Counter[Shape] = Counter()
        """How often each shape came that had no graph of its own."""
        self._pool = torch.cuda.graph_pool_handle()
        self._broken = False

    def logits(self, inputs: Inputs) -> torch.Tensor | None:
        """Return the scores [texts] on the CPU; None where no graph is to be used."""
        needed = None if self._broken else shape_of(inputs)
        if needed is None:
            return None
        if needed not in self._captured:
            self._uses[needed] += 1
        shape = shape_to_use(needed, self._captured, self._uses[needed])
        if shape is None:
            return None
        padded = pad(inputs, shape, self._pad_id, self._no_owner)
        captured = self._captured.get(shape) or self._capture(padded)
        if captured is None:
            return None
        self._captured[shape] = captured
        self._captured.move_to_end(shape)
        if len(self._captured) > _MOST_GRAPHS:
            self._captured.popitem(last=False)
        for static, value in zip(captured.inputs, padded, strict=True):
            static.copy_(value, non_blocking=True)
        captured.graph.replay()
        return unpad(captured.logits.cpu(), inputs, padded)

    def _capture(self, padded: Inputs) -> _Captured | None:
        """Return the graph for the shape of `padded`; None, now and for ever, where the model cannot be captured."""
        inputs = padded.to("cuda")
        try:
            # A pass before it lets libraries allocate what must not be allocated while capturing.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._logits(inputs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._logits(inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning("The reward model's passes cannot be captured as CUDA graphs: %s", error)
            self._broken = True
            return None
        return _Captured(graph, inputs, logits)


def _next(ladder: tuple[int, ...], value: int) -> int | None:
    """Return the smallest of the sorted `ladder` that is not below `value`."""
    place = bisect_left(ladder, value)
    return ladder[place] if place < len(ladder) else None


def _filled(tensor: torch.Tensor, shape: tuple[int, ...], value: int) -> torch.Tensor:
    """Return `tensor` in the upper left corner of one of `shape`, `value` elsewhere."""
    filled = torch.full(shape, value, dtype=tensor.dtype)
    filled[tuple(slice(size) for size in tensor.shape)] = tensor
    return filled
