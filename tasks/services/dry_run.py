"""What a training would take, and whether it fits, before anything starts; nothing is written."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tasks.engines.art_session import check_art_settings
from tasks.engines.checkpoints import latest_complete
from tasks.engines.resume import checkpoints_folder, journal_of
from tasks.engines.training_state import MAY_CHANGE
from tasks.engines.trl_engine.arguments import check_trl_settings
from tasks.services.doctor import gb, obstacles, stories_are_here
from tasks.services.machine import TITLE_OF, Machine
from tasks.starter.paths import BASE_MODEL, HELDOUT_REWARD_MODEL, REWARD_MODEL, resolve
from tasks.titles import metric_names as names
from tasks.titles.config import Profile, Settings
from tasks.titles.errors import ConfigError, HnTitlesError
from tasks.titles.hub_files import ModelFiles, model_files
from tasks.titles.memory_estimate import GB, Estimate, adapter_bytes, checkpoints_kept, estimate, weight_bytes
from tasks.titles.prepare import PreparedPrompts, prepare_prompts
from tasks.titles.run_directory import RunDirectory, newest_first, run_to_continue
from tasks.titles.tokens import Progress
from tasks.titles.training_progress import duration

USUAL_GPU = 80 * GB
"""The GPU that memory is told for where there is none: the one that the profiles' settings were published for."""
ALIKE = ("engine", "base_model", "device", "devices", "groups_per_step", "group_size", "max_prompt_tokens",
         "max_completion_tokens", "stories", "updates_per_step", "packed_sequence_length", "kl_beta", "art",
         "trl")  # fmt: skip
"""Settings that decide how long a step takes; a former run that differs in one says nothing."""


@dataclass
class DryRun:
    """What was found: lines of a table by their name, and why it would not run."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    memory: list[tuple[str, str, str]] = field(default_factory=list)
    """Phase, part and size; a part that is empty is the phase's sum."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the training could start."""
        return not self.problems


def dry_run(
    profile: Profile,
    settings: Settings,
    machine: Machine,
    *,
    run_name: str | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> DryRun:
    """Return what a training of `profile` would take here; every reason against it is among the problems."""
    found = DryRun(problems=obstacles(profile, machine, settings))
    done = _done(profile, settings.runs_dir, run_name, fresh, found)
    prepared = _prompts(profile, settings, found, progress) if _can_be_read(profile, machine) else None
    _work(profile, prepared, done, found)
    _settings(profile, settings, found)
    files = model_files(resolve(profile.base_model, BASE_MODEL))
    if files.shape is None:
        found.problems.append(files.problem or "The model's size is not known.")
    else:
        _context(profile, files, found)
        _memory(profile, files, machine, found)
        _disk(profile, files, machine, found)
    _services(machine, found)
    _time(profile, settings.runs_dir, profile.max_steps - done, found)
    return found


def _done(profile: Profile, runs_dir: Path, run_name: str | None, fresh: bool, found: DryRun) -> int:
    """Return the steps that the run to continue has made, 0 for a new one."""
    try:
        run = run_to_continue(
            profile, runs_dir=runs_dir, run_name=run_name, fresh=fresh, until="trained", may_change=MAY_CHANGE
        )
    except HnTitlesError as error:
        found.problems.append(str(error))
        return 0
    if run is None:
        found.facts.append(("run", "a new one"))
        return 0
    step = latest_complete(checkpoints_folder(run.path, profile.engine)) or 0
    found.facts.append(("run", f"continues {run.name} after step {step}"))
    return step


def _can_be_read(profile: Profile, machine: Machine) -> bool:
    """Whether asking for stories and tokenizer has any hope; the hub's client would try for half a minute."""
    return machine.answer("hub").well or (
        stories_are_here(profile) and model_files(resolve(profile.base_model, BASE_MODEL)).here
    )


def _prompts(profile: Profile, settings: Settings, found: DryRun, progress: Progress | None) -> PreparedPrompts | None:
    try:
        prepared = prepare_prompts(profile, cache_dir=settings.runs_dir / ".cache", progress=progress, keep=False)
    except HnTitlesError as error:
        found.problems.append(str(error))
        return None
    report, longest = prepared.report, max(prompt.tokens for prompt in (*prepared.train, *prepared.val))
    found.facts += [
        ("stories", f"{report.total_came:,} rows in {report.source}, {report.total_dropped:,} dropped"),
        ("prompts", f"{len(prepared.train):,} to train on, {len(prepared.val):,} to validate with"),
        ("longest prompt", f"{longest:,} of {profile.max_prompt_tokens:,} tokens"),
    ]
    return prepared


def _work(profile: Profile, prepared: PreparedPrompts | None, done: int, found: DryRun) -> None:
    steps = profile.max_steps - done
    groups = min(profile.groups_per_step, len(prepared.train)) if prepared else profile.groups_per_step
    titles = steps * groups * profile.group_size
    validations = _validations(profile, done)
    val = len(prepared.val) if prepared else profile.val_stories
    judged = titles + validations * val
    passes = f", {steps * groups / len(prepared.train):.2g} times through the prompts" if prepared else ""
    found.facts += [
        ("steps", f"{steps:,} of {groups} x {profile.group_size} titles{passes}"),
        ("titles", f"{titles:,} to train on, {validations * val:,} in {validations} validations"),
        ("judges", f"{judged:,} scores and {judged:,} verdicts"),
        ("tokens written", f"{judged * profile.max_completion_tokens:,} at most"),
    ]
    if prepared:
        mean = statistics.fmean(prompt.tokens for prompt in prepared.train)
        read = steps * groups * mean
        found.facts.append(("tokens read", f"about {read:,.0f} of prompts, once for each group"))


def _validations(profile: Profile, done: int) -> int:
    """Return how many are left after step `done`; a new run begins with one."""
    return sum(profile.validates(step) for step in range(done + 1 if done else 0, profile.max_steps + 1))


def _settings(profile: Profile, settings: Settings, found: DryRun) -> None:
    try:
        if profile.engine == "art":
            check_art_settings(profile)
        else:
            check_trl_settings(profile, vllm_server_url=settings.vllm_server_url)
    except ConfigError as error:
        found.problems.append(str(error))


def _context(profile: Profile, files: ModelFiles, found: DryRun) -> None:
    assert files.shape is not None
    wanted, there = profile.max_prompt_tokens + profile.max_completion_tokens, files.shape.max_positions
    found.facts.append(("context", f"{wanted:,} of the {there:,} tokens that the model reads"))
    if wanted > there:
        found.problems.append(
            f"max_prompt_tokens + max_completion_tokens = {wanted:,} is more than the {there:,} tokens that "
            f"{profile.base_model} reads. Lower one of them."
        )


def _memory(profile: Profile, files: ModelFiles, machine: Machine, found: DryRun) -> None:
    assert files.shape is not None
    gpu = max(machine.gpus.found, key=lambda one: one.memory_bytes, default=None)
    gpu_bytes, free_bytes = (gpu.memory_bytes, gpu.free_bytes) if gpu else (USUAL_GPU, USUAL_GPU)
    judges = _judges(profile)
    longest = min(files.shape.max_positions, profile.max_prompt_tokens + profile.max_completion_tokens)
    needed = estimate(
        profile, files.shape, gpu_bytes=gpu_bytes, free_bytes=free_bytes, longest=longest, judge_bytes=judges
    )
    for phase in needed.phases:
        found.memory += [(phase.name, part.name, gb(part.bytes)) for part in phase.parts]
        found.memory.append((phase.name, "", gb(phase.bytes)))
    on_gpu = profile.device == "cuda"
    if on_gpu and gpu is None:
        found.notes.append(f"No GPU is here: memory is told for one of {gb(USUAL_GPU)}.")
    there = free_bytes if on_gpu else machine.available_bytes
    where = "the GPU" if on_gpu else "memory"
    for phase in needed.phases:
        if phase.bytes > there:
            found.problems.append(
                f"{phase.name.capitalize()}: about {gb(phase.bytes)}, but {gb(there)} of {where} are free. "
                f"{_lower(profile, phase.name)}"
            )
    _cache(profile, needed, found)


def _lower(profile: Profile, phase: str) -> str:
    if profile.device == "cpu":
        return "End other programs, or lower rollout_concurrency."
    if phase == "rollouts":
        return f"Lower {profile.engine}.vllm_memory_share, or end what holds the GPU."
    if profile.engine == "trl":
        return "Lower trl.micro_batch or max_prompt_tokens."
    return "Lower max_prompt_tokens (and packed_sequence_length), or set art.load_in_4bit."


def _cache(profile: Profile, needed: Estimate, found: DryRun) -> None:
    if needed.cache is None:
        return
    at_once = needed.cache.at_once
    found.facts.append(
        ("vLLM's cache", f"{needed.cache.tokens:,} tokens: {at_once:.1f} texts of {needed.cache.longest:,} at once")
    )
    if at_once < 1:
        found.problems.append(
            f"vLLM's share of the GPU holds no text of {needed.cache.longest:,} tokens beside the weights. Raise "
            f"{profile.engine}.vllm_memory_share, or lower max_prompt_tokens."
        )


def _judges(profile: Profile) -> float:
    """Return the bytes of the reward models' weights that are on this disk; others are not counted."""
    named = [(profile.reward_model, REWARD_MODEL), (profile.heldout_reward_model, HELDOUT_REWARD_MODEL)]
    sizes = [model_files(resolve(name, starter)).weight_bytes for name, starter in named if name]
    return float(sum(size for size in sizes if size))


def _disk(profile: Profile, files: ModelFiles, machine: Machine, found: DryRun) -> None:
    assert files.shape is not None
    adapter, optimizer = adapter_bytes(profile, files.shape)
    kept = checkpoints_kept(profile)
    found.facts.append(
        (
            "checkpoints",
            f"{kept} kept, {gb(adapter + optimizer)} each; {gb(kept * (2 * adapter + optimizer))} with MLflow's copies",
        )
    )
    found.facts.append(("disk", f"{gb(machine.place('runs').free_bytes)} free for runs"))
    if not files.here:
        hub = machine.place("hub cache")
        size = gb(weight_bytes(files.shape))
        found.facts.append(("download", f"{size} of weights; {gb(hub.free_bytes)} free"))


def _services(machine: Machine, found: DryRun) -> None:
    for answer in machine.answers:
        if answer.service == "hub":
            continue
        found.facts.append((TITLE_OF[answer.service], answer.state if answer.address else "the run starts its own"))
        usable = answer.well or answer.state in ("not started", "not asked")
        if not usable and answer.service != "reward":  # which is among the obstacles
            found.problems.append(f"{TITLE_OF[answer.service]} at {answer.address}: {answer.state}. Start it.")


def _time(profile: Profile, runs_dir: Path, steps: int, found: DryRun) -> None:
    run = next((run for run in newest_first(runs_dir) if _alike(run.profile, profile) and _steps_of(run)), None)
    if run is None:
        found.facts.append(("time", "not known: no former run here has steps of this size"))
        return
    rows = _steps_of(run)
    step = statistics.median(rows)
    every = list(_values(run, names.TIME_EVAL))
    validation = statistics.median(every) if every else 0.0
    seconds = steps * step + _validations(profile, profile.max_steps - steps) * validation
    found.facts.append(
        ("time", f"about {duration(seconds)} of steps and validations: {step:.2g} s a step in {run.name}")
    )
    peak = run.record().peak_memory_mb
    if peak:
        found.facts.append(("memory then", f"{run.name} took {gb(peak * 1e6)} at its peak"))


def _alike(theirs: Profile, ours: Profile) -> bool:
    return all(getattr(theirs, name) == getattr(ours, name) for name in ALIKE)


def _steps_of(run: RunDirectory) -> list[float]:
    return list(_values(run, names.TIME_STEP))


def _values(run: RunDirectory, name: str) -> Iterable[float]:
    try:
        return [row[name] for row in journal_of(run.path).rows().values() if name in row]
    except HnTitlesError:
        return []  # a damaged journal says nothing of time
