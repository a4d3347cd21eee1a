"""The benchmark's parts: its loads reach the server whole, and what it compares with is right."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from serving import serving, serving_scorer, starter_scorer
from transformers import AutoTokenizer

from bench.load import STORIES, TITLES, Stories, send_singly
from bench.plain import PlainScorer, plain_app
from bench.reward_server import Load, Measured, row_of, texts_of
from reward_server.schemas import ScoreRequest
from tasks.starter.paths import BASE_MODEL

pytestmark = pytest.mark.usefixtures("no_settings_around")


def stories() -> Stories:
    return Stories(AutoTokenizer.from_pretrained(BASE_MODEL))


def test_a_step_has_fresh_bodies_of_the_wanted_length() -> None:
    source = stories()
    titles = [*source.steps(1, 200), *source.steps(1, 200)]
    assert len(titles) == 2 * STORIES * TITLES
    assert len({title["scraped_body"] for title in titles}) == 2 * STORIES
    lengths = [len(ids) for ids in starter_scorer().encode([ScoreRequest.model_validate(title) for title in titles])]
    assert min(lengths) >= 200
    assert max(lengths) < 300


@pytest.mark.parametrize(("kind", "clients"), [("titles", 1), ("titles", 64), ("burst", 48), ("batch", 1)])
async def test_every_load_is_answered_in_order_by_both_servers(kind: str, clients: int) -> None:
    titles = stories().steps(1, 40)
    load = Load(kind, 40, clients)
    plain = PlainScorer("starter", "cpu", "float32")
    async with serving_scorer(starter_scorer()) as (ours, _), serving(plain_app(plain)) as other:
        answers = await load.send(ours, titles)
        plainly = await load.send(other, titles)
    assert answers.scores == pytest.approx(plainly.scores, abs=1e-3)
    assert len(set(answers.scores)) == len(titles)
    assert len(answers.latencies) == (1 if kind == "batch" else len(titles))
    assert plain.sorted_scores(texts_of(titles), 16)[0] == pytest.approx(plainly.scores, abs=1e-3)


async def test_a_refusal_ends_the_benchmark() -> None:
    async with serving_scorer(starter_scorer()) as (url, _):
        with pytest.raises(RuntimeError, match="422"):
            await send_singly(url, [{"title": "", "scraped_body": "A body."}], clients=1)


def test_a_row_holds_medians() -> None:
    rates = {"ours": [1.0, 9.0, 2.0], "ours_prefix": [5.0], "plain": [3.0, 1.0, 2.0], "limit": [4.0, 4.0]}
    row = row_of(Load("burst", 200, 48), "cpu", Measured(rates, [0.001 * number for number in range(101)], 0.00012345))
    assert json.loads(json.dumps(asdict(row))) == {
        "name": "burst body=200", "device": "cpu", "clients": 48, "ours_rps": 2.0, "plain_rps": 2.0, "limit_rps": 4.0,
        "ours_prefix_rps": 5.0, "p50_ms": 50.0, "p99_ms": 99.0, "max_abs_diff": 0.000123,
    }  # fmt: skip
