"""The services as data: name, command, environment, address, and where their health is asked."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tasks.services.state import services_folder
from tasks.titles.config import ConfiguredSettings, default_tracking_uri
from tasks.titles.errors import ConfigError

TITLES = {
    "prefect": "Prefect server",
    "mlflow": "MLflow server",
    "reward": "reward server",
    "worker": "Prefect worker",
}
"""The services by name, in the order in which they start."""
# A server that listens everywhere is asked here.
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


class ServiceOptions(BaseSettings):
    """Where services listen and keep their data: from flags, the environment or `.env`."""

    model_config = SettingsConfigDict(env_prefix="HN_TITLES_", env_file=".env", extra="ignore", frozen=True)

    host: str = "127.0.0.1"
    port_prefect: int = Field(4200, ge=0, le=65535)
    port_mlflow: int = Field(5000, ge=0, le=65535)
    port_reward: int = Field(7000, ge=0, le=65535)
    port_worker: int = Field(4201, ge=0, le=65535)
    pool: str | None = Field(None, description="work pool of the worker; unset: cpu or gpu, by the profile's device")
    prefect_database: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL"),
    )
    mlflow_database: SecretStr | None = Field(None, validation_alias="MLFLOW_BACKEND_STORE_URI")

    @property
    def ports(self) -> dict[str, int]:
        """The wanted port of each service; 0: any free one."""
        return {name: int(getattr(self, f"port_{name}")) for name in TITLES}


def service_options(**flags: object) -> ServiceOptions:
    """Return the options: `flags` that are not None, above the environment and `.env`.

    Raises `ConfigError` naming each wrong one.
    """
    try:
        return ServiceOptions(**{name: value for name, value in flags.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError("The options of the services are not usable:\n" + "\n".join(lines)) from error


@dataclass(frozen=True)
class Service:
    """A service that can be started."""

    name: str
    command: tuple[str, ...]
    address: str
    health_url: str
    log: Path
    environment: Mapping[str, str | None] = field(default_factory=dict)
    """Variables that differ from this process's; None: not set."""
    after: str | None = None
    """The service that must be healthy before this one starts."""
    ready: tuple[str, str] | None = None
    """A URL and what its answer must contain before a service that has just started counts as ready."""
    reward_model: str | None = None

    @property
    def title(self) -> str:
        """What a person calls it."""
        return TITLES[self.name]


def configured_elsewhere(settings: ConfiguredSettings) -> dict[str, tuple[str, str]]:
    """Return which services the settings give an address of: name, variable and address."""
    addresses = {
        "prefect": ("PREFECT_API_URL", settings.prefect_api_url),
        "mlflow": ("MLFLOW_TRACKING_URI", settings.mlflow_tracking_uri),
        "reward": ("REWARD_MODEL_URL", settings.reward_model_url),
    }
    return {name: (variable, address) for name, (variable, address) in addresses.items() if address}


def plan(
    options: ServiceOptions,
    settings: ConfiguredSettings,
    ports: Mapping[str, int],
    *,
    reward_model: str,
    device: str,
) -> list[Service]:
    """Return the services of the names in `ports`, in the order in which they start.

    `reward_model` and `device` are the reward server's; `settings` say where the worker finds what is not in `ports`.
    """
    host = _EVERYWHERE.get(options.host, options.host)
    urls = {name: f"http://{host}:{port}" for name, port in ports.items()}
    folder = services_folder(settings.runs_dir).resolve()
    api = f"{urls['prefect']}/api" if "prefect" in urls else settings.prefect_api_url
    pool = options.pool or ("gpu" if device == "cuda" else "cpu")
    listen = {name: ("--host", options.host, "--port", str(port)) for name, port in ports.items()}
    database = options.prefect_database
    services = {}
    if "prefect" in urls:
        services["prefect"] = Service(
            "prefect",
            (sys.executable, "-m", "prefect", "server", "start", *listen["prefect"]),
            urls["prefect"],
            f"{api}/health",
            folder / "prefect.log",
            {
                # The address of a client would be taken for the server's own. A browser elsewhere may need another one.
                "PREFECT_API_URL": None,
                "PREFECT_UI_API_URL": os.environ.get("PREFECT_UI_API_URL", api),
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": None,
                "PREFECT_API_DATABASE_CONNECTION_URL": database.get_secret_value()
                if database
                else f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
            },
        )
    if "mlflow" in urls:
        services["mlflow"] = Service(
            "mlflow",
            (sys.executable, "-m", "mlflow", "server", *listen["mlflow"], *_mlflow_storage(options, settings)),
            urls["mlflow"],
            f"{urls['mlflow']}/health",
            folder / "mlflow.log",
            {
                "MLFLOW_TRACKING_URI": None,
                # The address of a database may hold a password, which a command line would show to everybody.
                "MLFLOW_BACKEND_STORE_URI": _mlflow_database(options, settings),
                # It would start a queue of evaluation jobs, five processes that nothing here asks for.
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
        )
    if "reward" in urls:
        key = settings.reward_model_api_key
        services["reward"] = Service(
            "reward",
            (
                *(sys.executable, "-m", "reward_server", *listen["reward"]),
                *("--model", reward_model, "--device", device),
            ),
            urls["reward"],
            f"{urls['reward']}/health",
            folder / "reward.log",
            {"REWARD_SERVER_API_KEY": key.get_secret_value() if key else ""},
            reward_model=reward_model,
        )
    if "worker" in urls:
        own = "prefect" in urls
        services["worker"] = Service(
            "worker",
            (
                *(sys.executable, "-m", "prefect", "worker", "start", "--with-healthcheck"),
                *("--type", "process", "--pool", pool, "--name", f"{platform.node()}-{pool}"),
            ),
            urls["worker"],
            f"{urls['worker']}/health",
            folder / "worker.log",
            {
                "PREFECT_API_URL": api,
                "PREFECT_WORKER_WEBSERVER_HOST": options.host,
                "PREFECT_WORKER_WEBSERVER_PORT": str(ports["worker"]),
                **_settings_for_flow_runs(settings),
            },
            after="prefect" if own else None,
            # Its health is well from the moment it starts; the pool is ready once it has spoken to Prefect.
            ready=(f"{api}/work_pools/{pool}", '"status":"READY"') if own else None,
        )
    return [services[name] for name in TITLES if name in services]


def health_headers(name: str, settings: ConfiguredSettings) -> dict[str, str]:
    """Return what a request for the health of a service carries."""
    if name == "reward" and settings.reward_model_api_key is not None:
        return {"Authorization": f"Bearer {settings.reward_model_api_key.get_secret_value()}"}
    return {}


def _settings_for_flow_runs(settings: ConfiguredSettings) -> dict[str, str]:
    """Flow runs work in folders of their own, where no `.env` is, and find the other services through RUNS_DIR."""
    values = settings.model_dump(exclude_none=True, exclude={"runs_dir", "prefect_api_url"})
    texts = {
        name.upper(): value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        for name, value in values.items()
    }
    return {**texts, "RUNS_DIR": str(settings.runs_dir.resolve())}


def _mlflow_database(options: ServiceOptions, settings: ConfiguredSettings) -> str:
    """The database that runs are in while no server runs, so that they go on in the other way."""
    return (
        options.mlflow_database.get_secret_value()
        if options.mlflow_database
        else default_tracking_uri(settings.runs_dir)
    )


def _mlflow_storage(options: ServiceOptions, settings: ConfiguredSettings) -> tuple[str, ...]:
    artifacts = (settings.runs_dir / "mlartifacts").resolve().as_uri()
    storage = ("--serve-artifacts", "--artifacts-destination", artifacts)
    if options.mlflow_database:
        return storage
    # In the embedded database files have the address that they have without a server too, and one process is enough.
    return (*storage, "--default-artifact-root", artifacts, "--workers", "1")
