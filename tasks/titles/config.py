"""Profiles (what a run does) and settings (where services are, secrets)."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tasks.services.state import services_in_use
from tasks.titles.errors import ConfigError

PROFILES_DIR = Path(__file__).resolve().parents[2] / "deployments" / "profiles"
EngineName = Literal["art", "trl"]
REGISTRY_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a model may be called in MLflow's registry: MLflow itself refuses slashes and colons."""
NEUTRAL_SETTINGS = frozenset(
    {
        "rollout_concurrency",
        "max_failed_share",
        "max_empty_batches",
        "canary_tolerance",
        "prefect_rollouts",
        "keep_checkpoints",
        "bootstrap_samples",
        "registered_name",
        "price_per_device_hour",
        "reward_training",
    }
)
"""Settings that change neither what a step computes nor what it is measured by."""


class PerEngine(BaseModel):
    """One number per engine, for the few settings that the two frameworks need different values of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    art: float = Field(gt=0, allow_inf_nan=False)
    trl: float = Field(gt=0, allow_inf_nan=False)


class Losses(BaseModel):
    """The loss of each engine, by the framework's own name.

    On titles of the present policy, with one update a step, ART's 'ppo' and TRL's 'grpo' are one formula: the
    clipped ratio, averaged over each title's tokens and then over titles.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    art: Literal["cispo", "ppo"] = "cispo"
    trl: Literal["dapo", "grpo", "cispo"] = "dapo"


class ArtSettings(BaseModel):
    """What only ART's backend on a GPU needs to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vllm_memory_share: float = Field(
        0.75, gt=0, lt=1, description="share of the GPU's memory for vLLM, which gives it back while the policy trains"
    )
    sleep: bool = Field(
        True,
        description="vLLM gives its memory back while the policy trains; false: both stay on the GPU, and what "
        "vllm_memory_share leaves has to hold the trainer",
    )
    load_in_4bit: bool = Field(
        False, description="train on 4-bit base weights, which need less memory; vLLM samples with 16-bit ones"
    )
    trainer_gpus: tuple[NonNegativeInt, ...] = Field(
        (), description="the GPU that trains, (0) alone, where vLLM has one of its own; unset: one GPU does both"
    )
    inference_gpus: tuple[NonNegativeInt, ...] = Field((), description="vLLM's own GPU, such as (1)")


class TrlSettings(BaseModel):
    """What only TRL's trainer needs to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises to its value")
    micro_batch: int = Field(
        12,
        ge=1,
        description="titles per forward and backward pass, on each device; more are faster and take more memory",
    )
    vllm_mode: Literal["colocate", "server"] = Field(
        "colocate", description="on a GPU: vLLM in the trainer's process, or a server on GPUs of its own"
    )
    vllm_memory_share: float = Field(0.3, gt=0, lt=1, description="share of the GPU's memory for vLLM")
    vllm_sleep: bool = Field(
        True, description="colocated vLLM gives its memory to the trainer between rollouts; false saves the time for it"
    )
    server_gpus: tuple[NonNegativeInt, ...] = Field(
        (), description="GPUs of a vLLM server that the run starts itself; unset: the server at VLLM_SERVER_URL"
    )
    trainer_gpus: tuple[NonNegativeInt, ...] = Field(
        (), description="the trainer's GPUs beside `server_gpus`, one for each of `devices`; unset: the first visible"
    )
    unsloth: bool = Field(False, description="on a GPU: load and train the model with Unsloth")


class RewardTraining(BaseModel):
    """How `hn-titles train-reward-model` trains a reward model; nothing else reads it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: str = Field("starter", description="'starter', a folder or a hub name")
    registered_name: str = Field(
        "hn-titles-reward-model",
        pattern=REGISTRY_NAME,
        description="the model's name in MLflow's registry",
    )
    minimum_score: int = Field(0, ge=0, description="stories below this many upvotes are left out")
    train_until: date | None = Field(
        None, description="last day of training, all later stories are test; unset: the source's own splits"
    )
    report_stories: int = Field(500, ge=2, description="stories of each split, at most, that figures are made of")
    epochs: float = Field(1.0, gt=0, allow_inf_nan=False, description="passes over the training stories")
    max_steps: int | None = Field(None, ge=1, description="updates at most; unset: as many as the epochs take")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    batch_size: int = Field(16, ge=1, description="stories per forward and backward pass")
    accumulate: int = Field(1, ge=1, description="passes per update")
    eval_batch_size: int = Field(32, ge=1, description="stories per forward pass when nothing is learned")
    max_length: int = Field(4096, ge=64, description="tokens of a story; a longer body is cut, a title never")
    lora_rank: int = Field(8, ge=1)
    lora_alpha: int = Field(16, ge=1)
    eval_steps: int = Field(50, ge=1, description="compare with the validation stories every this many steps")
    save_steps: int = Field(50, ge=1, description="write a checkpoint every this many steps")


class Profile(BaseModel):
    """Everything that decides what a run does. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    engine: EngineName = "art"
    seed: int = 1

    # stories
    stories: str = Field("starter", description="'starter', a .parquet or .jsonl file, or a hub data set's name")
    minimum_score: int = Field(20, ge=0, description="stories below this many upvotes are no prompts")
    train_stories: int = Field(description="training prompts at most", ge=1)
    val_stories: int = Field(description="validation prompts at most", ge=1)
    test_stories: int = Field(description="test prompts at most", ge=1)
    max_prompt_tokens: int = Field(ge=16)
    max_completion_tokens: int = Field(100, ge=1)

    # models
    base_model: str = Field("starter", description="'starter', a folder or a hub name")
    reward_model: str = Field("starter", description="'starter', a folder, a hub name or MLflow's models:/name@alias")
    heldout_reward_model: str | None = Field(
        None, description="a second reward model that training never sees; 'starter', a folder or a hub name"
    )
    device: Literal["cpu", "cuda"] = "cpu"

    # training
    group_size: int = Field(6, ge=2, description="titles per prompt")
    groups_per_step: int = Field(ge=1, description="prompts per policy update")
    max_steps: int = Field(ge=1)
    learning_rate: PerEngine
    lora_rank: int = Field(8, ge=1)
    lora_alpha: int = Field(8, ge=1)
    max_grad_norm: float = Field(0.1, gt=0)
    kl_beta: float = Field(0.0, ge=0)
    loss: Losses = Field(default_factory=Losses, description="each engine's loss; unset: the framework's default")
    updates_per_step: Literal["one", "per_sequence"] = Field(
        "one", description="ART: one optimiser update a step, or its own habit: one per packed sequence"
    )
    packed_sequence_length: int | None = Field(
        None,
        description="ART: tokens per packed training sequence; unset: 8,192 or a whole group's on a GPU, else, as with "
        "updates_per_step = per_sequence, a trajectory's rounded up to a multiple of 2,048",
    )
    art: ArtSettings = Field(
        default_factory=lambda: ArtSettings.model_validate({}), description="settings of ART's backend on a GPU alone"
    )
    trl: TrlSettings = Field(
        default_factory=lambda: TrlSettings.model_validate({}), description="settings of TRL's trainer alone"
    )
    reward_training: RewardTraining = Field(
        default_factory=lambda: RewardTraining.model_validate({}), description="how a reward model is trained"
    )
    devices: int = Field(1, ge=1, description="TRL: trainer processes, each with a GPU of its own; a CPU they share")
    price_per_device_hour: float = Field(0.0, ge=0, description="money that a device costs an hour, in any currency")

    # sampling while training: anything but these values biases the importance ratio
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    # guards
    rollout_concurrency: int = Field(64, ge=1, description="titles in the making at once")
    max_failed_share: float = Field(0.2, ge=0, le=1, description="share of failed trajectories that stops the run")
    max_empty_batches: int = Field(5, ge=1, description="batches without any spread of rewards that stop the run")
    canary_tolerance: float = Field(
        0.2,
        gt=0,
        description="how far sampler and trainer may be apart, in nats: mean over the canary's tokens of the "
        "difference of their log-probabilities; rounding to bfloat16 makes 0.02",
    )
    prefect_rollouts: bool = Field(True, description="one Prefect task run per trajectory group, or plain coroutines")

    # evaluation and checkpoints
    eval_steps: int = Field(10, ge=1, description="evaluate on the validation stories every this many steps")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints kept besides the best")
    bootstrap_samples: int = Field(2000, ge=100)
    registered_name: str = Field(
        "hn-titles-policy",
        pattern=REGISTRY_NAME,
        description="the policy's name in MLflow's registry; one name for each base model",
    )

    def validates(self, step: int) -> bool:
        """Return whether checkpoint `step`, from 0, is one that writes titles for the validation stories."""
        return step % self.eval_steps == 0 or step == self.max_steps

    @property
    def devices_in_use(self) -> int:
        """GPUs that a training holds, those of a vLLM of its own included; the CPU counts as one."""
        if self.device == "cpu":
            return 1
        if self.engine == "art":
            return len(self.art.trainer_gpus) + len(self.art.inference_gpus) or 1
        return self.devices + len(self.trl.server_gpus)

    @model_validator(mode="after")
    def _sampling_is_unbiased(self) -> Profile:
        wanted = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        wrong = {key: getattr(self, key) for key, value in wanted.items() if getattr(self, key) != value}
        if wrong:
            raise ValueError(
                f"training must sample with {wanted}, but {wrong} was set: truncated or tempered sampling "
                "biases the importance ratio. Remove the setting."
            )
        return self


class ConfiguredSettings(BaseSettings):
    """Addresses and secrets, from the environment or `.env`; never from flow parameters."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore")

    reward_model_url: str | None = Field(
        default=None,
        description="a reward server, http://host:port, or vLLM's pooling runner, vllm+http://host:port; "
        "unset: the run starts its own",
    )
    reward_model_api_key: SecretStr | None = None
    heldout_reward_model_url: str | None = None
    vllm_server_url: str | None = Field(default=None, description="TRL's vLLM server, for trl.vllm_mode = 'server'")
    hf_endpoint: str | None = None
    trl_python: Path | None = Field(
        default=None,
        description="the Python that TRL's trainer runs in, such as .venv-gpu-trl/bin/python; unset: this one",
    )
    art_vllm_runtime_bin: str | None = Field(
        default=None,
        description="the command of the vLLM server that ART starts, such as "
        "'.venv-gpu-trl/bin/python -m art_vllm_runtime.dedicated_server'; unset: ART installs one of its own",
    )
    mlflow_tracking_uri: str | None = Field(default=None, description="unset: SQLite in the runs directory")
    prefect_api_url: str | None = None
    dask_scheduler_address: str | None = Field(
        default=None, description="a Dask cluster for ART's rollouts, tcp://host:port; unset: they run with the loop"
    )
    notification_webhook_url: SecretStr | None = Field(
        default=None,
        description="where `hn-titles deploy` has failed and stuck runs told: JSON with a text, as Slack takes",
    )
    runs_dir: Path = Path("runs")
    """One folder per run, and MLflow's database where no tracking server is given."""


class Settings(ConfiguredSettings):
    """What commands and flows go by: the configured addresses, and else those of the services of `hn-titles up`."""

    @model_validator(mode="after")
    def _use_running_services(self) -> Settings:
        services = services_in_use(self.runs_dir)
        if self.prefect_api_url is None and "prefect" in services:
            self.prefect_api_url = f"{services['prefect'].address}/api"
        if self.mlflow_tracking_uri is None and "mlflow" in services:
            self.mlflow_tracking_uri = services["mlflow"].address
        return self

    def reward_server_of(self, model: str) -> str | None:
        """Return the address of the reward server to ask, None where the run has to start its own.

        It is the configured one, whatever that serves, and else the running one if it serves `model`.
        """
        running = services_in_use(self.runs_dir).get("reward")
        if self.reward_model_url is None and running is not None and running.reward_model == model:
            return running.address
        return self.reward_model_url

    @property
    def tracking_uri(self) -> str:
        """Where MLflow keeps runs and registered models."""
        return self.mlflow_tracking_uri or default_tracking_uri(self.runs_dir)


def default_tracking_uri(runs_dir: Path) -> str:
    """Return the SQLite database that runs are stored in where `MLFLOW_TRACKING_URI` is not set."""
    return f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"


def export_hub_endpoint() -> None:
    """Give `HF_ENDPOINT` from `.env` to the hub's client, which reads only the environment, once, at its import."""
    endpoint = Settings().hf_endpoint
    if endpoint:
        os.environ.setdefault("HF_ENDPOINT", endpoint)


def profile_names() -> list[str]:
    """Return the names of the profiles that come with the project."""
    return sorted(path.stem for path in PROFILES_DIR.glob("*.toml"))


def load_profile(name_or_path: str, overrides: Sequence[str] = ()) -> Profile:
    """Read a profile by name or path, apply `key=value` overrides and check it.

    A dotted key reaches into a table (`learning_rate.art=1e-3`). A value is read as JSON where it is
    JSON (`5`, `true`, `null`, `1e-3`) and as a string otherwise.

    Raises `ConfigError` for an unknown profile, an unknown key or a value out of range.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = PROFILES_DIR / f"{name_or_path}.toml"
    if not path.is_file():
        raise ConfigError(
            f"No profile '{name_or_path}'. Expected one of {', '.join(profile_names())}, or the path of a .toml file."
        )
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    values.setdefault("name", path.stem)
    _override(values, overrides)
    return parse_profile(values, source=str(path.name))


def override_profile(profile: Profile, overrides: Sequence[str]) -> Profile:
    """Return `profile` with `key=value` overrides; raise `ConfigError` as `load_profile` does."""
    values = profile.model_dump(mode="json")
    _override(values, overrides)
    return parse_profile(values, source=profile.name)


def _override(values: dict[str, Any], overrides: Sequence[str]) -> None:
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set expects key=value, got '{override}'.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *tables, last = key.strip().split(".")
        table = values
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {override}: '{part}' is not a table.")
        table[last] = value


def parse_profile(values: dict[str, Any], *, source: str) -> Profile:
    """Check plain values against `Profile`; raise `ConfigError` naming each wrong key."""
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "profile"
            problem = (
                "no such setting" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
            )
            came = "" if item["type"] in {"missing", "value_error"} else f" (got {item['input']!r})"
            lines.append(f"  {key}: {problem}{came}")
        known = ", ".join(Profile.model_fields)
        raise ConfigError(f"Profile {source} is not usable:\n" + "\n".join(lines) + f"\nSettings: {known}") from error
