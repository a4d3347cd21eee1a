"""How a reward server runs: from flags, `REWARD_SERVER_*` variables, `.env` or the defaults, in this order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from reward_server.schemas import MAX_BATCH
from tasks.titles.errors import ConfigError


class RewardServerSettings(BaseSettings):
    """Scores Hacker News titles over HTTP with a Hugging Face sequence classifier.

    Every flag can be set as an environment variable REWARD_SERVER_<FLAG>; the key should be.
    """

    model_config = SettingsConfigDict(
        env_prefix="REWARD_SERVER_",
        env_file=".env",
        extra="ignore",
        frozen=True,
        cli_prog_name="python -m reward_server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(7000, ge=0, le=65535, description="0: any free port")
    model: str = Field(
        "starter",
        description="'starter', a folder, a hub name or MLflow's models:/name@alias; with or without a PEFT adapter",
    )
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: float32 on a CPU; float16 on a GPU, or bfloat16, which is coarser, where a model needs it",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the model; unset: PyTorch decides")
    max_length: int = Field(4096, ge=16, description="tokens of one text; a longer body is cut, a title never")
    token_budget: int | None = Field(
        None,
        ge=16,
        description="tokens that the model reads at a time, padding included; unset: 1,024 on a CPU, 65,536 on a GPU",
    )
    prefix_sharing: bool = Field(
        True, description="compute what texts have in common at their beginning once, where the model allows it"
    )
    queue_size: int = Field(1024, ge=MAX_BATCH, description="texts that may wait; one more is refused with 429")
    max_request_bytes: int = Field(16 * 2**20, ge=1024, description="a larger request is refused with 413")
    api_key: SecretStr | None = Field(None, description="bearer key that every request must carry; unset: none")
    fd: int | None = Field(None, ge=0, description="listen on this inherited socket instead of host and port")
    stop_with_stdin: bool = Field(False, description="stop when standard input ends: when the parent process is gone")

    @property
    def batch_tokens(self) -> int:
        """Tokens that the model reads at a time, padding included.

        A GPU wants work: the titles of eight long bodies at once. A CPU gains nothing from wide batches and loses a
        third to their padding and memory traffic.
        """
        if self.token_budget is not None:
            return self.token_budget
        return 1024 if self.device == "cpu" else 65536

    @field_validator("api_key", mode="before")
    @classmethod
    def _empty_key_is_none(cls, value: object) -> object:
        return None if value == "" else value


def read_settings(arguments: Sequence[str]) -> RewardServerSettings:
    """Return the settings that command line `arguments` and the environment say.

    Raises `ConfigError` naming each wrong setting. `--help` and unknown flags end the process as argparse does.
    """
    try:
        return RewardServerSettings(_cli_parse_args=list(arguments))  # type: ignore[call-arg]
    except ValidationError as error:
        lines = [f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise ConfigError("The reward server's settings are not usable:\n" + "\n".join(lines)) from error
