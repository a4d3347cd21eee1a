"""TRL beside ART, on a policy that stays as it is: what both measure must be the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from resume_parts import without_times
from training_parts import open_tracker, request, titles_of, train_with_trl

from tasks.engines import art_loop
from tasks.engines.art_session import open_session
from tasks.engines.contract import GroupRollout, TrainingRequest
from tasks.engines.resume import journal_of, stored_state
from tasks.engines.training_state import first_state
from tasks.engines.trl_engine.trainer import draw_rows
from tasks.titles import metric_names as names
from tasks.titles.story import Prompt

STEPS = 4
"""An epoch of 7 stories ends after the third step of 2 groups."""
TOLERANCE = 1e-3
OWN_FORMULAS = {names.TRAIN_LOSS, names.TRAIN_GRAD_NORM, names.TRAIN_ENTROPY}
"""What each engine computes in a way of its own; ART's entropy is a mean over titles, TRL's one over all tokens."""


@dataclass
class Pair:
    """A training with each engine, at a learning rate that changes nothing."""

    art: TrainingRequest
    trl: TrainingRequest
    drawn: list[list[str]]
    """The stories that ART's loop rolled out, step by step."""

    def rows(self) -> list[dict[int, dict[str, float]]]:
        return [journal_of(asked.run_dir).rows() for asked in (self.art, self.trl)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, reward_server_url: str) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    still = {"max_steps": STEPS, "eval_steps": 1, "learning_rate": {"art": 1e-12, "trl": 1e-12}}
    asked = [request(folder / engine, reward_server_url, engine=engine, **still) for engine in ("art", "trl")]
    drawn: list[list[str]] = []

    async def map_groups(rollout: GroupRollout, prompts: Sequence[Prompt], step: int) -> list[Any]:
        drawn.append([prompt.story.id for prompt in prompts])
        return await art_loop.map_plainly(rollout, prompts, step)

    async def train_with_art() -> None:
        async with open_session(asked[0]) as (session, state):
            await art_loop.train(
                asked[0], session=session, state=state, tracker=open_tracker(asked[0]), map_groups=map_groups
            )

    async def train_with_both() -> None:
        await asyncio.gather(train_with_art(), train_with_trl(asked[1]))

    asyncio.run(train_with_both())
    return Pair(*asked, drawn)


def test_both_engines_measure_by_the_same_names(pair: Pair) -> None:
    art, trl = pair.rows()
    assert sorted(art) == sorted(trl) == list(range(STEPS + 1))
    for step in art:
        # Over HTTP the validator gives its answer, not its probabilities. ART's service times its parts on a GPU alone.
        only_trl = {names.VERDICT_NEITHER, names.TIME_SAVE, names.TIME_SYNC, names.TIME_SLEEP}
        assert trl[step].keys() - art[step].keys() == (only_trl if step else set())
        assert art[step].keys() - trl[step].keys() == set()


def test_both_engines_measure_the_same(pair: Pair) -> None:
    art, trl = (without_times(rows) for rows in pair.rows())
    # A batch without spread would be drawn anew by ART's loop, and be a step under TRL.
    assert [art[step][names.TRAIN_EMPTY_BATCHES] for step in range(1, STEPS + 1)] == [0] * STEPS
    for step, row in art.items():
        shared = {name: value for name, value in row.items() if name not in OWN_FORMULAS}
        assert {name: trl[step][name] for name in shared} == pytest.approx(shared, abs=TOLERANCE), f"step {step}"


@pytest.mark.parametrize(("kind", "steps"), [("validation", range(STEPS + 1)), ("rollouts", range(1, STEPS + 1))])
def test_both_engines_write_and_judge_the_same_titles(kind: str, steps: range, pair: Pair) -> None:
    judged = ("reward", "score", "advantage")
    for step in steps:
        art, trl = (titles_of(asked.run_dir, kind, step) for asked in (pair.art, pair.trl))
        assert len(art) == (3 if kind == "validation" else 6)
        for one, other in zip(art, trl, strict=True):
            numbers = {key: one.pop(key) for key in judged if key in one}
            assert {key: other.pop(key) for key in numbers} == pytest.approx(numbers, abs=TOLERANCE)
            assert one == other


def test_both_engines_go_through_the_stories_in_the_same_order(pair: Pair) -> None:
    stories, profile = pair.trl.train, pair.trl.profile
    rows = draw_rows(first_state(pair.trl, ""), stories, profile, STEPS)
    assert list(rows["story_id"]) == [story for step in pair.drawn for story in step]
    chats = {prompt.story.id: list(prompt.messages) for prompt in stories}
    assert [row["prompt"] for row in rows] == [chats[story] for story in rows["story_id"]]
    # In each of three steps of the first epoch two other stories; the fourth step begins the next epoch.
    assert [len(step) for step in pair.drawn] == [2] * STEPS
    assert len({story for step in pair.drawn[:3] for story in step}) == 6
    assert [
        list(dict.fromkeys(row["story_id"] for row in titles_of(pair.trl.run_dir, "rollouts", step)))
        for step in range(1, STEPS + 1)
    ] == pair.drawn
    # A later sitting goes on where its state stands.
    state = stored_state(pair.trl.run_dir, "trl")
    assert state is not None
    later = draw_rows(state, stories, profile, 2)
    assert list(later["story_id"]) == list(draw_rows(first_state(pair.trl, ""), stories, profile, 6)["story_id"])[8:]
