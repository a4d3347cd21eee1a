"""How long a packed sequence is at most, and what the longest one of a step holds."""

from __future__ import annotations

import pytest

from tasks.titles.config import Profile, load_profile
from tasks.titles.packed_sequences import LongestSequence, longest_sequence, packed_length

QWEN_READS = 32_768


def on_gpu(*changes: str) -> Profile:
    return load_profile("starter", ["device=cuda", "packed_sequence_length=null", *changes])


@pytest.mark.parametrize(
    ("profile", "positions", "tokens"),
    [
        (on_gpu(), 2048, 2048),  # the model reads no more
        (on_gpu("packed_sequence_length=512"), 2048, 512),
        (on_gpu("updates_per_step=per_sequence"), 2048, None),
        (on_gpu("device=cpu"), 2048, None),
        (load_profile("qwen-0.5b"), QWEN_READS, 8704),  # a whole group
        (load_profile("qwen-0.5b", ["max_prompt_tokens=1948"]), QWEN_READS, 8192),
    ],
)
def test_how_long_a_packed_sequence_is(profile: Profile, positions: int, tokens: int | None) -> None:
    assert packed_length(profile, positions) == tokens


@pytest.mark.parametrize(
    ("name", "changes", "tokens", "scored"),
    [
        ("qwen-0.5b", [], 8704, 600),
        # One short group fills no sequence: 1,948 + 6 x 101 tokens, rounded up to 64.
        ("qwen-0.5b", ["max_prompt_tokens=1948"], 2560, 600),
        ("qwen-0.5b", ["max_prompt_tokens=1948", "groups_per_step=8"], 8192, 4800),
        ("qwen-0.5b", ["updates_per_step=per_sequence"], 8192, 100),
        ("qwen-0.5b", ["updates_per_step=per_sequence", "max_prompt_tokens=8093"], 10_240, 100),
        # More titles than a sequence holds.
        ("starter", [], 1024, 1024),
        ("starter", ["groups_per_step=1", "max_prompt_tokens=400"], 704, 240),
    ],
)
def test_the_longest_sequence_of_a_step(name: str, changes: list[str], tokens: int, scored: int) -> None:
    assert longest_sequence(load_profile(name, changes), QWEN_READS) == LongestSequence(tokens, scored)
