"""What a machine can run: each finding with what to do about it, and a verdict on each profile."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tasks.services.environments import COMMANDS, EXTRAS, Environment
from tasks.services.machine import TITLE_OF, Machine
from tasks.starter.paths import BASE_MODEL, resolve
from tasks.titles.config import ConfiguredSettings, EngineName, Profile
from tasks.titles.hub_files import data_set_is_here, model_files
from tasks.titles.memory_estimate import GB, adapter_bytes, checkpoints_kept, estimate, weight_bytes

State = Literal["ok", "note", "wrong"]
NEWEST_CUDA = (13, 0)
"""PyTorch's wheels of the GPU environments are built for CUDA 13.0."""
RUN_FILES = 0.5 * GB
"""What a run writes besides checkpoints: databases, logs and titles. Rough."""
LISTED = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    area: str
    what: str
    state: State
    to_do: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a profile can run here, with either engine."""

    profile: str
    engines: dict[str, tuple[str, ...]]
    """By engine what keeps it from running, each with what to do; empty: it can run."""

    @property
    def can_run(self) -> bool:
        """Whether one engine can."""
        return any(not reasons for reasons in self.engines.values())


def findings(machine: Machine) -> list[Finding]:
    """Return what is to be said of the machine itself, whatever is to be run."""
    return [
        Finding("system", f"{machine.system}, Python {machine.python}", "ok"),
        Finding("processor", f"{machine.cores} cores", *_enough(machine.cores >= 2, "two make the starter run pay")),
        Finding("memory", f"{gb(machine.memory_bytes)}, {gb(machine.available_bytes)} free", "ok"),
        *_gpu_findings(machine),
        *(_environment_finding(one) for one in machine.environments),
        *_places(machine),
        *_ports(machine),
        *_services(machine),
    ]


def verdict(profile: Profile, machine: Machine, settings: ConfiguredSettings) -> Verdict:
    """Return whether `profile` can run here with each engine."""
    engines = {}
    for engine in get_args(EngineName):
        own = profile.model_copy(update={"engine": engine})
        engines[engine] = tuple([*obstacles(own, machine, settings), *_memory(own, machine)])
    return Verdict(profile.name, engines)


def obstacles(profile: Profile, machine: Machine, settings: ConfiguredSettings) -> list[str]:
    """Return what keeps `profile` with its engine from running here, memory left aside: each with what to do."""
    own = _cpu(machine) if profile.device == "cpu" else _gpu(profile, machine, settings)
    return [*own, *_disk(profile, machine), *_sources(profile, machine, settings)]


def stories_are_here(profile: Profile) -> bool:
    """Return whether the profile's stories are on this disk: the starter's, a file, or a data set in the cache."""
    local = profile.stories == "starter" or Path(profile.stories).expanduser().exists()
    return local or data_set_is_here(profile.stories)


def missing(environment: Environment) -> str:
    """Return what an environment lacks, in a few words."""
    if environment.place is None:
        return "not there"
    names = [
        f"{package.name} {'is missing' if package.found is None else f'is {package.found}, not {package.wanted}'}"
        for package in environment.amiss
    ]
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest


def _gpu_findings(machine: Machine) -> Iterable[Finding]:
    gpus = machine.gpus
    if gpus.problem:
        yield Finding("GPU", gpus.problem, "note", "for GPU profiles: install NVIDIA's driver, 580 or newer")
        return
    for gpu in gpus.found:
        used = gpu.memory_bytes - gpu.free_bytes
        taken = used > 0.1 * gpu.memory_bytes
        yield Finding(
            "GPU",
            f"{gpu.index}: {gpu.name}, {gb(gpu.memory_bytes)}, {gb(gpu.free_bytes)} free",
            "note" if taken else "ok",
            "something holds its memory: nvidia-smi shows what" if taken else "",
        )
    cuda = f", CUDA up to {gpus.cuda[0]}.{gpus.cuda[1]}" if gpus.cuda else ""
    old = gpus.cuda is not None and gpus.cuda < NEWEST_CUDA
    yield Finding("GPU", f"driver {gpus.driver}{cuda}", "wrong" if old else "ok", _driver_advice() if old else "")


def _environment_finding(environment: Environment) -> Finding:
    title = f"{EXTRAS[environment.extra]} ({environment.extra})"
    if environment.usable:
        return Finding("packages", f"{title}: all {len(environment.packages)} as pinned, {environment.place}", "ok")
    return Finding("packages", f"{title}: {missing(environment)}", "note", COMMANDS[environment.extra])


def _places(machine: Machine) -> Iterable[Finding]:
    for place in machine.places:
        short = place.free_bytes < 2 * GB
        to_do = "make room, or set RUNS_DIR" if place.title == "runs" else "make room, or set HF_HOME"
        if not place.writable:
            yield Finding("disk", f"{place.title}: {place.path} cannot be written", "wrong", to_do)
        else:
            what = f"{place.title}: {gb(place.free_bytes)} free at {place.path}"
            yield Finding("disk", what, "wrong" if short else "ok", to_do if short else "")


def _ports(machine: Machine) -> Iterable[Finding]:
    free = [f"{port.number} ({port.service})" for port in machine.ports if port.held_by is None]
    if free:
        yield Finding("ports", f"free: {', '.join(free)}", "ok")
    for port in machine.ports:
        if port.own:
            yield Finding("ports", f"{port.number}: {port.held_by}", "ok")
        elif port.held_by:
            to_do = f"for hn-titles up: --port-{port.service} 0, or stop what holds it"
            yield Finding("ports", f"{port.number} ({port.service}) is held by {port.held_by}", "note", to_do)


def _services(machine: Machine) -> Iterable[Finding]:
    for answer in machine.answers:
        title = TITLE_OF[answer.service]
        where = f" at {answer.address}" if answer.address else ""
        if answer.state == "not started":
            yield Finding("services", f"{title}: not started; a run brings its own", "ok")
        elif answer.service == "hub":
            what = f"{title}{where}: {'reachable' if answer.well else answer.state}"
            to_do = "" if answer.well else "needed for models and stories of the hub alone; HF_ENDPOINT names a mirror"
            yield Finding("services", what, "ok" if answer.well else "note", to_do)
        else:
            to_do = "" if answer.well else "start it, or unset its address; hn-titles up starts those of this machine"
            yield Finding("services", f"{title}{where}: {answer.state}", "ok" if answer.well else "wrong", to_do)


def _cpu(machine: Machine) -> Iterable[str]:
    environment = machine.environment("cpu")
    if not environment.usable:
        yield f"packages: {missing(environment)}; {COMMANDS['cpu']} installs them"


def _gpu(profile: Profile, machine: Machine, settings: ConfiguredSettings) -> Iterable[str]:
    gpus = machine.gpus
    if not gpus.found:
        yield f"{gpus.problem}; it needs an NVIDIA GPU"
    elif len(gpus.found) < profile.devices:
        yield f"it wants {profile.devices} GPUs, {len(gpus.found)} are here; lower devices"
    if gpus.cuda is not None and gpus.cuda < NEWEST_CUDA:
        yield _driver_advice()
    yield from _gpu_packages(profile.engine, machine, settings)


def _memory(profile: Profile, machine: Machine) -> Iterable[str]:
    files = model_files(resolve(profile.base_model, BASE_MODEL))
    if profile.device == "cuda" and not machine.gpus.found:
        return
    if files.shape is None:
        yield files.problem or "the model's size is not known"
        return
    largest = max((gpu.memory_bytes for gpu in machine.gpus.found), default=0)
    there = largest if profile.device == "cuda" else machine.available_bytes
    longest = profile.max_prompt_tokens + profile.max_completion_tokens
    needed = estimate(profile, files.shape, gpu_bytes=largest, free_bytes=largest, longest=longest, judge_bytes=0)
    peak = max(needed.phases, key=lambda phase: phase.bytes)
    if peak.bytes > there:
        yield f"{peak.name}: about {gb(peak.bytes)} of memory, {gb(there)} are there; train --dry-run shows of what"
    elif needed.cache is not None and needed.cache.at_once < 1:
        yield f"vLLM's share holds no text of {longest} tokens; raise {profile.engine}.vllm_memory_share"


def _gpu_packages(engine: EngineName, machine: Machine, settings: ConfiguredSettings) -> Iterable[str]:
    trl = machine.environment("gpu-trl")
    wanted = [machine.environment("gpu-art")] if engine == "art" else [trl]
    # vLLM, which ART starts in an environment of its own.
    if engine == "art" and not (settings.art_vllm_runtime_bin or os.environ.get("ART_VLLM_RUNTIME_BIN")):
        wanted.append(trl)
    for environment in wanted:
        if not environment.usable:
            yield f"packages of {environment.extra}: {missing(environment)}; {COMMANDS[environment.extra]}"


def _disk(profile: Profile, machine: Machine) -> Iterable[str]:
    files = model_files(resolve(profile.base_model, BASE_MODEL))
    if files.shape is None:
        return
    runs, hub = machine.place("runs"), machine.place("hub cache")
    adapter, optimizer = adapter_bytes(profile, files.shape)
    written = RUN_FILES + checkpoints_kept(profile) * (2 * adapter + optimizer)
    if not runs.writable:
        yield f"{runs.path} cannot be written; set RUNS_DIR"
    elif runs.free_bytes < written:
        yield f"it writes about {gb(written)}, {gb(runs.free_bytes)} are free at {runs.path}; make room or set RUNS_DIR"
    if not files.here and hub.free_bytes < weight_bytes(files.shape):
        needed, free = gb(weight_bytes(files.shape)), gb(hub.free_bytes)
        yield f"the model is {needed} to download, {free} are free at {hub.path}; make room or set HF_HOME"


def _sources(profile: Profile, machine: Machine, settings: ConfiguredSettings) -> Iterable[str]:
    hub = machine.answer("hub")
    if not hub.well:
        if not model_files(resolve(profile.base_model, BASE_MODEL)).here:
            yield f"{profile.base_model} is not on this disk and the hub does not answer ({hub.state}); get a network"
        if not stories_are_here(profile):
            yield f"the stories {profile.stories} are not on this disk and the hub does not answer; --set stories=FILE"
    reward = machine.answer("reward")
    if settings.reward_model_url:
        if not (reward.well or reward.state == "not asked"):
            yield f"the reward server at {reward.address}: {reward.state}; start it or unset REWARD_MODEL_URL"
    elif _is_missing_folder(profile.reward_model):
        yield (
            f"there is no reward model {profile.reward_model}; train one with hn-titles train-reward-model, or give "
            "another: --set reward_model=models:/hn-titles-reward-model@newest, or REWARD_MODEL_URL"
        )


def _is_missing_folder(reward_model: str) -> bool:
    """Whether a profile names a folder of its own that is not there; `models:/…` is MLflow's, `owner/name` a hub's."""
    own = reward_model.startswith(("models/", "runs/", ".", "/", "~"))
    return own and not Path(reward_model).expanduser().is_dir()


def _driver_advice() -> str:
    return f"the driver runs no CUDA {NEWEST_CUDA[0]}.{NEWEST_CUDA[1]}; install NVIDIA's driver 580 or newer"


def _enough(enough: bool, why: str) -> tuple[State, str]:
    return ("ok", "") if enough else ("note", why)


def gb(count: float) -> str:
    """Return bytes as a person reads them, in powers of ten."""
    if count < 0.1 * GB:
        return f"{count / 10**6:,.0f} MB"
    return f"{count / GB:,.{0 if count >= 10 * GB else 1}f} GB"
