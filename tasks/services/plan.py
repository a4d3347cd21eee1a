"""The services as data: name, command, environment, address, and where their health is asked."""

from __future__ import annotations

import base64
import os
import platform
import socket
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
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
# What MLflow answers to unless it is told otherwise: this machine and addresses of private networks.
_MLFLOW_HOSTS = (
    *("localhost:*", "127.0.0.1:*", "[[]::1]:*", "0.0.0.0:*", "192.168.*", "10.*", "fc00:*", "fd00:*"),
    *(f"172.{number}.*" for number in range(16, 32)),
)


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
    prefect_password: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"),
        description="user:password that Prefect's server asks for; unset: it lets everybody in",
    )

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
    environment: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    """Variables that differ from this process's; None: not set."""
    after: str | None = None
    """The service that must be healthy before this one starts."""
    ready: tuple[str, str] | None = None
    """A URL and what its answer must contain before a service that has just started counts as ready."""
    ready_headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What a request for it carries."""
    reward_model: str | None = None

    @property
    def title(self) -> str:
        """What a person calls it."""
        return TITLES[self.name]


def pool_name(options: ServiceOptions, device: str) -> str:
    """Return the work pool that this machine's worker is for."""
    return options.pool or ("gpu" if device == "cuda" else "cpu")


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
    job_template: Path | None = None,
) -> list[Service]:
    """Return the services of the names in `ports`, in the order in which they start.

    `reward_model` and `device` are the reward server's; `settings` say where the worker finds what is not in `ports`.
    `job_template` is a JSON file of what the worker's pool is to be where there is none yet.
    """
    host = _EVERYWHERE.get(options.host, options.host)
    urls = {name: f"http://{host}:{port}" for name, port in ports.items()}
    folder = services_folder(settings.runs_dir).resolve()
    api = f"{urls['prefect']}/api" if "prefect" in urls else settings.prefect_api_url
    pool = pool_name(options, device)
    listen = {name: ("--host", options.host, "--port", str(port)) for name, port in ports.items()}
    database, password = options.prefect_database, options.prefect_password
    services = {}
    if "prefect" in urls:
        services["prefect"] = Service(
            "prefect",
            (sys.executable, "-m", "prefect", "server", "start", *listen["prefect"]),
            urls["prefect"],
            f"{api}/health",
            folder / "prefect.log",
            {
                # The address of a client would be taken for the server's own.
                "PREFECT_API_URL": None,
                # Relative, so that the UI finds its API by whatever name or tunnel a browser has come.
                "PREFECT_UI_API_URL": os.environ.get("PREFECT_UI_API_URL", "/api"),
                # What links in notifications begin with.
                "PREFECT_UI_URL": os.environ.get("PREFECT_UI_URL", urls["prefect"]),
                "PREFECT_SERVER_API_AUTH_STRING": password.get_secret_value() if password else None,
                # In memory, the slots of runs that die while the server restarts would stay taken for ever.
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
                # Where it keeps them: two servers must not share it, as each gives the other's slots back.
                "PREFECT_HOME": str(folder / "prefect"),
                "PREFECT_PROFILES_PATH": _prefect_profiles(),
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
                **_mlflow_hosts(options.host),
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
                *(("--base-job-template", str(job_template)) if job_template else ()),
            ),
            urls["worker"],
            f"{urls['worker']}/health",
            folder / "worker.log",
            {
                "PREFECT_API_URL": api,
                "PREFECT_API_AUTH_STRING": password.get_secret_value() if password else None,
                "PREFECT_WORKER_WEBSERVER_HOST": options.host,
                "PREFECT_WORKER_WEBSERVER_PORT": str(ports["worker"]),
                **_settings_for_flow_runs(settings),
            },
            after="prefect" if own else None,
            # Its health is well from the moment it starts; the pool is ready once it has spoken to Prefect.
            ready=(f"{api}/work_pools/{pool}", '"status":"READY"') if own else None,
            ready_headers=_basic_auth(password),
        )
    return [services[name] for name in TITLES if name in services]


def health_headers(name: str, settings: ConfiguredSettings) -> dict[str, str]:
    """Return what a request for the health of a service carries."""
    if name == "reward" and settings.reward_model_api_key is not None:
        return {"Authorization": f"Bearer {settings.reward_model_api_key.get_secret_value()}"}
    return {}


def _basic_auth(password: SecretStr | None) -> dict[str, str]:
    if password is None:
        return {}
    return {"Authorization": f"Basic {base64.b64encode(password.get_secret_value().encode()).decode()}"}


def _prefect_profiles() -> str:
    """Prefect's profiles of this user, which the server reads although its home is another."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    return os.environ.get("PREFECT_PROFILES_PATH", str(home / "profiles.toml"))


def _mlflow_hosts(host: str) -> dict[str, str]:
    """MLflow refuses requests by other names than those it knows; here it also knows this machine's own."""
    import psutil

    if host in _LOOPBACK or "MLFLOW_SERVER_ALLOWED_HOSTS" in os.environ:
        return {}
    own = [
        one.address for all_of_it in psutil.net_if_addrs().values() for one in all_of_it if one.family == socket.AF_INET
    ]
    names = dict.fromkeys((socket.gethostname(), socket.getfqdn(), host, *own))
    return {"MLFLOW_SERVER_ALLOWED_HOSTS": ",".join((*_MLFLOW_HOSTS, *(f"{name}:*" for name in names)))}


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
