"""What the policy receives for a title."""

from __future__ import annotations


def reward(score: float, verdict: bool) -> float:
    """Return the reward: the score (predicted log upvotes) of a supported title, 0 of an unsupported one."""
    return score if verdict else 0.0
