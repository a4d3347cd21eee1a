"""The data cursor: no story twice in an epoch, and a resumed run sees what a straight one sees."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.titles.cursor import Cursor, sampling_seed, stories_fingerprint
from tasks.titles.errors import CheckpointError, DataError

seeds = st.integers(0, 2**31 - 1)
counts = st.integers(1, 40)
batch_sizes = st.integers(1, 12)


def draw(cursor: Cursor, stories: list[str], size: int, batches: int) -> tuple[list[list[str]], Cursor]:
    drawn = []
    for _ in range(batches):
        batch, cursor = cursor.next_batch(stories, size)
        drawn.append(batch)
    return drawn, cursor


@given(seeds, counts, batch_sizes, st.integers(1, 3))
def test_no_story_comes_twice_in_an_epoch_and_every_batch_is_full(
    seed: int, count: int, size: int, epochs: int
) -> None:
    stories = [f"story-{number}" for number in range(count)]
    cursor = Cursor(seed=seed, fingerprint="f")
    for epoch in range(epochs):
        assert (cursor.epoch, cursor.index) == (epoch, 0)
        drawn: list[str] = []
        while cursor.epoch == epoch:
            batch, cursor = cursor.next_batch(stories, size)
            assert len(batch) == min(size, count)
            drawn += batch
        assert len(set(drawn)) == len(drawn) > count - size


@given(seeds, counts, batch_sizes, st.integers(0, 15), st.integers(0, 15))
def test_resuming_anywhere_equals_going_straight(seed: int, count: int, size: int, before: int, after: int) -> None:
    stories = [f"story-{number}" for number in range(count)]
    start = Cursor(seed=seed, fingerprint=stories_fingerprint(stories))
    straight, end = draw(start, stories, size, before + after)
    first, stopped = draw(start, stories, size, before)
    restored = Cursor.from_json(json.loads(json.dumps(stopped.to_json())))
    second, resumed_end = draw(restored, stories, size, after)
    assert first + second == straight
    assert resumed_end == end


@given(seeds, st.integers(20, 40))
def test_epochs_and_seeds_have_orders_of_their_own(seed: int, count: int) -> None:
    stories = [f"story-{number}" for number in range(count)]
    start = Cursor(seed=seed, fingerprint="f")
    (first,), after = draw(start, stories, count, 1)
    (second,), _ = draw(after, stories, count, 1)
    (other,), _ = draw(Cursor(seed=seed + 1, fingerprint="f"), stories, count, 1)
    assert first != second
    assert first != other


def test_order_is_pinned() -> None:
    # A run that is resumed after an upgrade must see the same order: this pins it.
    batch, _ = Cursor(seed=1, fingerprint="f").next_batch(list(range(8)), 8)
    assert batch == [1, 5, 4, 2, 7, 0, 3, 6]


def test_only_a_policy_update_is_a_step() -> None:
    cursor = Cursor(seed=1, fingerprint="f")
    _, moved = cursor.next_batch(["a", "b", "c", "d"], 2)
    assert (moved.step, moved.index) == (0, 2)
    assert moved.stepped().step == 1


def test_no_stories_is_an_error() -> None:
    with pytest.raises(DataError):
        Cursor(seed=1, fingerprint="f").next_batch([], 2)


@pytest.mark.parametrize("key", ["seed", "fingerprint", "epoch", "index", "step"])
@pytest.mark.parametrize("value", [None, "3", 1.5, True])
def test_a_damaged_cursor_is_refused_by_name(key: str, value: object) -> None:
    values = Cursor(seed=1, fingerprint="f").to_json()
    if key == "fingerprint" and isinstance(value, str):
        value = 3
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        Cursor.from_json({**values, key: value})
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        Cursor.from_json({name: kept for name, kept in values.items() if name != key})


def test_fingerprint_tells_stories_apart() -> None:
    prints = [["a", "b"], ["b", "a"], ["ab"], ["a"], ["a", "b", "c"], ["", "ab"], []]
    assert len({stories_fingerprint(ids) for ids in prints}) == len(prints)
    assert stories_fingerprint(["a", "b"]) == stories_fingerprint(iter(["a", "b"]))


@given(seeds, st.integers(0, 5), st.integers(0, 500), st.text(max_size=10), st.integers(0, 10))
def test_sampling_seeds(seed: int, epoch: int, step: int, story: str, generation: int) -> None:
    own = sampling_seed(seed, epoch, step, story, generation)
    assert 0 <= own < 2**31
    assert own == sampling_seed(seed, epoch, step, story, 0) + generation
    others = {
        sampling_seed(seed + 1, epoch, step, story, generation),
        sampling_seed(seed, epoch + 1, step, story, generation),
        sampling_seed(seed, epoch, step + 1, story, generation),
        sampling_seed(seed, epoch, step, story + "x", generation),
        sampling_seed(seed, epoch, step, story, generation + 1),
    }
    assert own not in others
