"""How long the sequences are that ART trains on: several titles in each, a group's behind one copy of their prompt."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.titles.config import Profile

LOGPROB_CHUNK = 1024
"""Tokens of which ART computes the log-probabilities at once; its packed sequences are multiples of it."""
GPU_TOKENS = 8192
"""Tokens of a packed sequence that a GPU is busy with, whatever the model's size."""
ALIGNED = 64
"""What the longest sequence is rounded up to: a GPU's attention wants masks whose rows begin at round addresses."""


@dataclass(frozen=True, slots=True)
class LongestSequence:
    """The largest that a training pass can have before it."""

    tokens: int
    scored: int
    """Tokens of it that the policy wrote: those whose probabilities the loss asks for."""


def packed_length(profile: Profile, positions: int) -> int | None:
    """Return the tokens of a packed sequence at most; None leaves it to ART.

    On a GPU with one update a step and no length in the profile: as many as keep the GPU busy, or a whole group where
    that is more, so that its prompt is read once; never more than the `positions` that the model reads.
    """
    if profile.packed_sequence_length or profile.device != "cuda" or profile.updates_per_step != "one":
        return profile.packed_sequence_length
    return min(max(GPU_TOKENS, _round_up(_group_tokens(profile), ALIGNED)), positions)


def padded_text(profile: Profile) -> int:
    """Return the tokens of a sequence that ART makes of the longest text by itself."""
    return _round_up(profile.max_prompt_tokens + profile.max_completion_tokens, 2048)


def longest_sequence(profile: Profile, positions: int) -> LongestSequence:
    """Return the longest sequence that a step can have, of a model that reads `positions` tokens."""
    tokens = packed_length(profile, positions) or padded_text(profile)
    if profile.device == "cuda" and profile.updates_per_step == "per_sequence":
        # ART itself trains on one trajectory at a time, and fills its sequence up.
        return LongestSequence(tokens, profile.max_completion_tokens)
    written = profile.groups_per_step * profile.group_size * profile.max_completion_tokens
    step = _round_up(profile.groups_per_step * _group_tokens(profile), ALIGNED)
    return LongestSequence(min(tokens, step), min(tokens, written))


def _group_tokens(profile: Profile) -> int:
    """Return the tokens of a group at most: each title comes with the last token of its prompt."""
    return profile.max_prompt_tokens + profile.group_size * (profile.max_completion_tokens + 1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
