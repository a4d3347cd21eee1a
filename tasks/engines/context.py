"""How many tokens the policy reads, and whether a profile's prompts fit."""

from __future__ import annotations

from tasks.titles.config import Profile
from tasks.titles.errors import ConfigError

VALIDATOR_EXTRA_TOKENS = 256
"""What the validator reads besides body and title is longer than what the policy reads; its prompt must fit, too."""


def positions(base_model: str) -> int:
    """Return how many tokens `base_model` can read at once."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(base_model).max_position_embeddings)


def context_tokens(base_model: str, profile: Profile) -> int:
    """Return how many tokens the policy's server reads at once.

    Raises `ConfigError` where the profile's longest prompt and title do not fit.
    """
    longest = positions(base_model)
    wanted = profile.max_prompt_tokens + profile.max_completion_tokens
    if wanted > longest:
        raise ConfigError(
            f"max_prompt_tokens + max_completion_tokens = {wanted} is more than the {longest} tokens that {base_model} "
            "reads. Lower one of them."
        )
    return longest if profile.device == "cpu" else min(longest, wanted + VALIDATOR_EXTRA_TOKENS)
