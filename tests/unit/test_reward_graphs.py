"""The shapes that small passes are padded to for CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from reward_server.graphs import MOST_TOKENS, Shape, pad, shape_of, shape_to_use
from reward_server.passes import Inputs

EMPTY = torch.zeros((0, 0), dtype=torch.long)


def inputs_of(rows: int, stem_tokens: int, branching: int = 0, branch_tokens: int = 0, texts: int = 0) -> Inputs:
    second = torch.ones((branching, branch_tokens), dtype=torch.long) if branching else EMPTY
    return Inputs(
        stems=torch.ones((rows, stem_tokens), dtype=torch.long),
        alone=torch.ones((rows - branching, 2), dtype=torch.long),
        branches=second,
        positions=second,
        owners=second,
        stem_lengths=torch.full((branching,), stem_tokens),
        ends=torch.ones((texts, 2), dtype=torch.long),
    )


@pytest.mark.parametrize(
    ("inputs", "shape"),
    [
        (inputs_of(1, 20), Shape(1, 32, 0)),
        (inputs_of(5, 200), Shape(6, 224, 0)),
        (inputs_of(3, 300), Shape(4, 384, 0)),
        (inputs_of(8, 2000, 8, 80, 48), Shape(8, 2048, 96)),
        (inputs_of(8, 2000, 2, 80, 12), Shape(8, 2048, 96)),
        (inputs_of(64, 257), None),  # more tokens than a graph is for
        (inputs_of(65, 10), None),
        (inputs_of(1, 5000), None),
        (inputs_of(1, 300, 1, 600, 6), None),  # branches too long
        (inputs_of(1, 300, 1, 200, 9), None),  # too many texts on one stem
    ],
)
def test_shapes(inputs: Inputs, shape: Shape | None) -> None:
    assert shape_of(inputs) == shape


def test_padding_keeps_what_is_there() -> None:
    inputs = inputs_of(5, 200, 3, 40, 18)
    shape = shape_of(inputs)
    assert shape is not None
    assert shape.rows * shape.stem_tokens <= MOST_TOKENS
    padded = pad(inputs, shape, 7, -1)
    assert padded.stems.shape == (6, 224)
    assert padded.stems[:5, :200].eq(1).all()
    assert padded.stems.sum() == 1000 + 7 * (6 * 224 - 1000)
    assert padded.alone.shape == (6, 2)
    assert padded.owners.shape == padded.branches.shape == padded.positions.shape == (6, 64)
    assert padded.owners.sum() == 3 * 40 - (6 * 64 - 120)
    assert padded.stem_lengths.tolist() == [200, 200, 200, 0, 0, 0]
    assert padded.ends.shape == (48, 2)


NEEDED = Shape(8, 2048, 96)


@pytest.mark.parametrize(
    ("captured", "uses", "shape"),
    [
        ((), 1, None),  # computed as it is: it may never come again
        ((), 2, NEEDED),
        ((NEEDED, Shape(8, 2304, 96)), 0, NEEDED),
        ((Shape(12, 2304, 96), Shape(8, 2304, 96), Shape(8, 2048, 128)), 1, Shape(8, 2048, 128)),
        ((Shape(8, 2304, 96),), 5, Shape(8, 2304, 96)),
        ((Shape(8, 2304, 96),), 6, NEEDED),
        ((Shape(8, 4096, 96), Shape(6, 2048, 96), Shape(8, 1792, 96), Shape(8, 2048, 64), Shape(8, 2048, 0)), 1, None),
    ],
)
def test_a_larger_shape_serves_until_one_came_often(captured: tuple[Shape, ...], uses: int, shape: Shape) -> None:
    assert shape_to_use(NEEDED, captured, uses) == shape
