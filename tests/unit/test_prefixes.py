"""Which sequences are computed on top of one prefix."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tasks.titles.prefixes import LONGEST_RUN, SHARED_SHARE, best_runs, common_prefix

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@given(TOKENS, TOKENS)
def test_the_common_prefix_is_the_longest(left: list[int], right: list[int]) -> None:
    count = common_prefix(left, right)
    assert left[:count] == right[:count]
    assert count == min(len(left), len(right)) or left[count] != right[count]


@given(st.lists(TOKENS, max_size=12))
def test_runs_divide_the_sequences_and_save_tokens(sequences: list[list[int]]) -> None:
    ordered = sorted(sequences)
    lengths = [len(sequence) for sequence in ordered]
    runs = best_runs(lengths, [common_prefix(left, right) for left, right in pairwise(ordered)])
    assert [index for run in runs for index in range(run.start, run.end)] == list(range(len(ordered)))
    assert sum(run.shared + run.rest for run in runs) <= sum(lengths)
    for run in runs:
        members = ordered[run.start : run.end]
        assert all(member[: run.shared] == members[0][: run.shared] for member in members)
        assert run.shared * len(members) + run.rest == sum(len(member) for member in members)
        assert run.branches == (len(members) > 1)
        if run.branches:
            assert all(SHARED_SHARE * len(member) <= run.shared < len(member) for member in members)
        else:
            assert run.rest == 0


def test_a_run_ends_somewhere() -> None:
    count = 3 * LONGEST_RUN
    runs = best_runs([100] * count, [100] * (count - 1))
    assert max(run.end - run.start for run in runs) == LONGEST_RUN
    assert len(runs) == 3
