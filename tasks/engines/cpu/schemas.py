"""The requests that the server takes: OpenAI's, without what it cannot do.

An option that would change what is sampled is refused unless it is at its neutral value; an unknown
one is refused by name. Nothing is ignored in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False, None),
    "top_p": (1, None),
    "top_k": (0, -1, None),
    "min_p": (0, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "repetition_penalty": (1, None),
    "stop": (None, []),
    "logit_bias": (None, {}),
    "top_logprobs": (0, None),
    "best_of": (1, None),
    "suffix": (None,),
}
"""Options that are accepted at these values only."""
MOST_CHOICES = 64
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    seed: Seed | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key, accepted in NEUTRAL.items():
            if key in values and key not in cls.model_fields and values[key] not in accepted:
                raise ValueError(f"'{key}' is not supported: expected {accepted[0]!r} or nothing, got {values[key]!r}")
        return {key: value for key, value in values.items() if key not in NEUTRAL or key in cls.model_fields}

    @field_validator("temperature", "n", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any) -> Any:
        return 1 if value is None else value


class Message(BaseModel):
    """One chat message of plain text."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=64)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False


class CompletionRequest(_Request):
    """`POST /v1/completions`, with one prompt as text or token ids."""

    prompt: str | list[Annotated[int, Field(ge=0)]]
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=1)
