"""Which waiting texts are scored together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reward_server.batching import choose_batch

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def test_neighbours_in_length_come_first() -> None:
    #        oldest
    waiting = [100, 10, 400, 95, 110, 11]
    assert sorted(choose_batch(waiting, 330)) == [0, 3, 4]


def test_a_text_above_the_budget_goes_alone() -> None:
    assert choose_batch([500, 1, 2], 100) == [0]


@given(lengths, st.integers(1, 2000))
def test_the_oldest_is_in_and_the_budget_holds(waiting: list[int], budget: int) -> None:
    chosen = choose_batch(waiting, budget)
    assert 0 in chosen
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) == 1 or len(chosen) * max(waiting[index] for index in chosen) <= budget


@given(lengths, st.integers(1, 2000))
def test_no_text_that_would_fit_between_is_left_out(waiting: list[int], budget: int) -> None:
    chosen = choose_batch(waiting, budget)
    shortest, longest = min(waiting[i] for i in chosen), max(waiting[i] for i in chosen)
    left = [waiting[index] for index in range(len(waiting)) if index not in chosen]
    assert not [length for length in left if shortest < length < longest]
    if (len(chosen) + 1) * longest <= budget:
        assert not [length for length in left if length <= longest]


@given(lengths, st.integers(1, 2000))
def test_every_text_has_its_turn(waiting: list[int], budget: int) -> None:
    queue = list(enumerate(waiting))
    scored: list[int] = []
    while queue:
        chosen = set(choose_batch([length for _, length in queue], budget))
        scored += [queue[index][0] for index in chosen]
        queue = [entry for index, entry in enumerate(queue) if index not in chosen]
    assert sorted(scored) == list(range(len(waiting)))
