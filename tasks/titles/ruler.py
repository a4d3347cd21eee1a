"""What titles are measured with: two evaluations can be compared only where it was the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tasks.titles.config import Profile
from tasks.titles.evaluation import SAMPLED_TITLES
from tasks.titles.prompts import validator_messages
from tasks.titles.story import Prompt


@dataclass(frozen=True, slots=True)
class Ruler:
    """Stories, judges and sampling of an evaluation."""

    stories: str
    """Hash of the test stories and of what the policy reads of them."""
    reward_model: str
    """The version that the reward server reports: a hash of the weights."""
    validator: str
    """The base model and a hash of what it is asked."""
    sampling: str
    """Temperature, length, titles a story and seed."""

    def as_dict(self) -> dict[str, str]:
        """Return the fields by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ruler:
        """Return what `as_dict` was made of; raise `KeyError` where a field is missing."""
        return cls(**{name: str(values[name]) for name in cls.__slots__})

    def differences(self, other: Ruler) -> list[str]:
        """Return the names of what differs, as a sentence would call them."""
        mine, others = self.as_dict(), other.as_dict()
        return [name.replace("_", " ") for name in mine if mine[name] != others[name]]


def ruler_of(profile: Profile, prompts: Sequence[Prompt], reward_model_version: str) -> Ruler:
    """Return what an evaluation of `prompts` with this profile is measured with."""
    sampling = {
        "temperature": profile.temperature,
        "max_completion_tokens": profile.max_completion_tokens,
        "titles": SAMPLED_TITLES,
        "seed": profile.seed,
    }
    return Ruler(
        stories=_hash([(repr(prompt.story), prompt.messages) for prompt in prompts]),
        reward_model=reward_model_version,
        validator=f"{profile.base_model} {_hash(validator_messages('{body}', '{title}'))}",
        sampling=json.dumps(sampling),
    )


def _hash(values: Any) -> str:
    text = json.dumps(values, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
