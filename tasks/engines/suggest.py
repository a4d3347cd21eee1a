"""Titles for one text by a checkpoint: which one, and the servers that write and judge them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tasks.engines.checkpoints import complete_steps
from tasks.engines.context import context_tokens
from tasks.engines.judge_server import open_judge
from tasks.engines.policy_registry import PolicyRegistry
from tasks.engines.policy_server import serve_checkpoints
from tasks.engines.resume import adapter_folder, checkpoints_folder, stored_state
from tasks.starter.paths import BASE_MODEL, resolve
from tasks.titles.config import Profile, Settings, override_profile
from tasks.titles.errors import CheckpointError, ConfigError
from tasks.titles.given_text import GivenText
from tasks.titles.prompts import policy_messages
from tasks.titles.rollout import Roller
from tasks.titles.run_directory import find_run
from tasks.titles.suggestions import Suggestions, fitting_prompt, write_titles
from tasks.titles.tokens import count_prompt_tokens, load_tokenizer

Progress = Callable[[str, float, float | None], None]
"""Hears a stage's name, how far it has come and how far it goes (None: unknown)."""
_POLICY = "policy"


@dataclass(frozen=True, slots=True)
class TitleWriter:
    """Who writes: a checkpoint, or the base model where there is no folder."""

    name: str
    profile: Profile
    adapter: Path | None
    version: str | None = None


@contextmanager
def chosen_writer(
    profile: Profile,
    overrides: Sequence[str],
    settings: Settings,
    *,
    run_name: str | None = None,
    step: int | None = None,
) -> Iterator[TitleWriter]:
    """Yield the named run's checkpoint (its best where no step is given), else the champion, else the base model.

    The champion is that of `profile.registered_name`, and writes with the profile that it was trained with;
    `overrides` apply to whatever profile it is.

    Raises `DataError` for a run that is not there, `CheckpointError` for a checkpoint that is not,
    `ConfigError` for a step without a run and `ServiceUnavailable` where MLflow does not answer.
    """
    if run_name is not None:
        yield _of_run(settings.runs_dir, run_name, step, overrides)
        return
    if step is not None:
        raise ConfigError(f"--step {step} needs --run-name: a step is one of a run's checkpoints.")
    registry = PolicyRegistry(profile.registered_name, settings.tracking_uri)
    champion = registry.champion()
    if champion is None:
        name = f"the base model ({profile.base_model}), as {registry.name} has no champion yet"
        yield TitleWriter(name, profile, None)
        return
    with registry.adapter(champion) as folder:
        own = override_profile(champion.policy.profile, overrides)
        yield TitleWriter(f"the champion ({champion.policy.name})", own, folder, champion.uri)


async def suggest(
    writer: TitleWriter, given: GivenText, count: int, settings: Settings, *, log_folder: Path, on_progress: Progress
) -> Suggestions:
    """Have `count` titles of a text written and judged; the reward server's log goes to `log_folder`.

    Raises what the servers raise, `DataError` for a text that makes no prompt, and `TooManyFailures`.
    """
    profile = writer.profile
    base_model = resolve(profile.base_model, BASE_MODEL)
    tokenizer = load_tokenizer(base_model)
    prompt = fitting_prompt(
        given,
        profile.max_prompt_tokens,
        lambda body: (policy_messages(body), count_prompt_tokens(tokenizer, [body])[0]),
    )
    folders = {_POLICY: writer.adapter} if writer.adapter else {}
    async with (
        open_judge(
            profile,
            settings,
            "reward-model",
            log_folder=log_folder,
            on_waiting=lambda waited: on_progress("judges", waited, None),
        ) as judge,
        serve_checkpoints(profile, base_model, folders) as server,
        Roller(
            endpoint=server,
            reward_client=judge,
            max_completion_tokens=profile.max_completion_tokens,
            context_tokens=context_tokens(base_model, profile),
            concurrency=profile.rollout_concurrency,
        ) as roller,
    ):
        on_progress("judges", 1, 1)
        on_progress("titles", 0, None)
        model = server.names.get(_POLICY, server.base_model_name)
        titles, written, failures = await write_titles(roller, prompt, profile, model=model, count=count)
        on_progress("titles", 1, 1)
    return Suggestions(
        source=given.source,
        writer=writer.name,
        version=writer.version,
        titles=titles,
        written=len(written),
        blank=sum(rollout.empty for rollout in written),
        failed=len(failures),
        characters=len(given.text),
        read=len(prompt.story.scraped_body),
    )


def _of_run(runs_dir: Path, run_name: str, step: int | None, overrides: Sequence[str]) -> TitleWriter:
    run = find_run(runs_dir, run_name=run_name, overrides=overrides)
    steps = complete_steps(checkpoints_folder(run.path, run.profile.engine))
    state = stored_state(run.path, run.profile.engine)
    if state is None:
        raise CheckpointError(f"Run '{run_name}' has no complete checkpoint. Train it with: hn-titles train")
    wanted = state.best_step if step is None else step
    if wanted not in steps:
        kept = ", ".join(map(str, steps))
        raise CheckpointError(
            f"Run '{run_name}' holds no checkpoint of step {wanted}. There are those of steps {kept}."
        )
    which = "best checkpoint" if step is None else "checkpoint"
    name = f"{which} of {run_name}, step {wanted}"
    return TitleWriter(name, run.profile, adapter_folder(run.path, run.profile.engine, wanted))
