"""Which waiting texts are scored together."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from reward_server.waiting import Batch, Waiter, WaitingTexts, choose_batch
from tasks.titles.prefixes import Run, best_runs, common_prefix

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)
TEXTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=30)
BUDGET = st.integers(1, 2000)


def apart(lengths: list[int]) -> list[Run]:
    """Return runs of texts that share nothing."""
    return [Run(index, index + 1, length, 0) for index, length in enumerate(lengths)]


def shared(texts: list[list[int]]) -> list[Run]:
    """Return the runs of sorted `texts`."""
    return best_runs([len(text) for text in texts], [common_prefix(left, right) for left, right in pairwise(texts)])


def test_neighbours_in_length_come_first() -> None:
    #        oldest
    waiting = [100, 10, 400, 95, 110, 11]
    assert choose_batch(apart(waiting), waiting, 0, 330) == Batch([0, 3, 4], 330, 0)


def test_a_text_above_the_budget_goes_alone() -> None:
    assert choose_batch(apart([500, 1, 2]), [500, 1, 2], 0, 100) == Batch([0], 500, 0)


def test_titles_of_a_body_come_together() -> None:
    bodies = [[body] * length for body, length in enumerate((80, 200, 90, 85))]
    texts = sorted([*body, 9, title] for body in bodies for title in range(6))
    for oldest in (0, 3, 5):
        batch = choose_batch(shared(texts), [len(text) for text in texts], oldest, 180)
        assert batch == Batch([*range(6), *range(18, 24)], 2 * 86 + 2 * 6, 5 * 81 + 5 * 86)


def test_more_titles_than_the_budget_holds_are_cut() -> None:
    texts = sorted([0] * 80 + [title] * 20 for title in range(1, 11))
    batch = choose_batch(shared(texts), [len(text) for text in texts], 7, 100)
    assert batch == Batch([0, 1, 2, 3, 7], 80 + 5 * 20, 4 * 80)


@given(LENGTHS, BUDGET, st.data())
def test_the_oldest_is_in_and_the_budget_holds(waiting: list[int], budget: int, data: st.DataObject) -> None:
    oldest = data.draw(st.integers(0, len(waiting) - 1))
    batch = choose_batch(apart(waiting), waiting, oldest, budget)
    assert oldest in batch.members
    assert batch.members == sorted(set(batch.members))
    assert batch.computed == len(batch.members) * max(waiting[index] for index in batch.members)
    assert len(batch.members) == 1 or batch.computed <= budget


@given(TEXTS, st.integers(1, 60), st.data())
def test_the_budget_counts_what_the_model_reads(texts: list[list[int]], budget: int, data: st.DataObject) -> None:
    texts = sorted(texts)
    oldest = data.draw(st.integers(0, len(texts) - 1))
    batch = choose_batch(shared(texts), [len(text) for text in texts], oldest, budget)
    assert oldest in batch.members
    total = sum(len(texts[index]) for index in batch.members)
    assert total - batch.shared <= batch.computed
    if len(texts[oldest]) <= budget:
        assert batch.computed <= 2 * budget  # stems and branches


@given(LENGTHS, BUDGET)
def test_no_text_that_would_fit_between_is_left_out(waiting: list[int], budget: int) -> None:
    chosen = choose_batch(apart(waiting), waiting, 0, budget).members
    shortest, longest = min(waiting[i] for i in chosen), max(waiting[i] for i in chosen)
    left = [waiting[index] for index in range(len(waiting)) if index not in chosen]
    assert not [length for length in left if shortest < length < longest]
    if (len(chosen) + 1) * longest <= budget:
        assert not [length for length in left if length <= longest]


@given(TEXTS, st.integers(1, 60))
def test_every_text_has_its_turn_and_the_queue_stays_sorted(texts: list[list[int]], budget: int) -> None:
    loop = asyncio.new_event_loop()
    waiting = WaitingTexts()
    for number, tokens in enumerate(texts):
        waiting.add(Waiter(tokens, loop.create_future(), number, body=""))
    loop.close()
    turns: list[int] = []
    while waiting:
        ordered = [waiter.tokens for waiter in waiting.sorted]
        assert ordered == sorted(ordered)
        common = [waiter.common for waiter in waiting.sorted[:-1]]
        assert common == [common_prefix(left, right) for left, right in pairwise(ordered)]
        lengths = [len(tokens) for tokens in ordered]
        oldest = waiting.oldest()
        batch = choose_batch(best_runs(lengths, common), lengths, waiting.sorted.index(oldest), budget)
        taken = [waiting.sorted[index] for index in batch.members]
        assert oldest in taken
        assert waiting.remove(taken) == len(taken)
        turns += [waiter.number for waiter in taken]
    assert sorted(turns) == list(range(len(texts)))
