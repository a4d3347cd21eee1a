"""CUDA graphs of the reward model's passes against plain forward passes, one text at a time."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from gpu_parts import needs

from reward_server.model_files import find_model
from reward_server.scorer import Scorer, load_scorer
from reward_server.settings import RewardServerSettings

pytestmark = needs()
TOLERANCE = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.1}


def texts_of(generator: random.Random, longest: int) -> list[list[int]]:
    """Return texts of which some begin alike, of random lengths."""
    texts = []
    for _ in range(generator.randint(1, 5)):
        body = [generator.randrange(2000) for _ in range(generator.randint(1, longest))]
        for _ in range(generator.choice((1, 1, 6))):
            texts.append(body + [generator.randrange(2000) for _ in range(generator.randint(1, 20))])
    return texts


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_replayed_passes_give_the_scores_of_plain_ones(dtype: str) -> None:
    scorer = Scorer(find_model("starter"), device="cuda", dtype=getattr(torch, dtype), max_length=2048)
    assert scorer.shares_prefixes
    generator = random.Random(3)
    largest = 0.0
    for number in range(60):
        texts = texts_of(generator, longest=(20, 200, 900)[number % 3])
        expected = [scorer._plain_scores([text])[0] for text in texts]
        # At first a shape is computed as it is or by a larger one's graph, then it is captured and replayed.
        for _ in range(8):
            scores = scorer.score_tokens(texts)
            largest = max(largest, *(abs(score - wanted) for score, wanted in zip(scores, expected, strict=True)))
    sys.stdout.write(f"{dtype}: {largest:.2g}\n")
    assert largest < TOLERANCE[dtype]
    graphs = scorer._passes._graphs
    assert not graphs._broken
    assert len(graphs._captured) > 20


def test_many_shapes_do_not_fill_the_memory() -> None:
    scorer = Scorer(find_model("starter"), device="cuda", dtype=torch.float16, max_length=2048)
    generator = random.Random(4)
    sizes = []
    for number in range(1200):
        texts = texts_of(generator, longest=(20, 200, 900)[number % 3])
        scorer.score_tokens(texts)
        if number >= 600:
            free, total = torch.cuda.mem_get_info()
            sizes.append(total - free)
    assert max(sizes) < 1.3 * sizes[0]


def test_the_default_is_a_dtype_that_gives_numbers() -> None:
    assert load_scorer(RewardServerSettings(device="cuda")).dtype == "float16"
