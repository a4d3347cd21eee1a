"""Which seed each title of a step is sampled with: the ones that ART's loop gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.titles.config import Profile
from tasks.titles.cursor import VALIDATION_STEP, Cursor, sampling_seed
from tasks.titles.story import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TitleSeeds:
    """Knows the step that is being rolled out, since TRL asks its sampler by prompt tokens alone."""

    def __init__(self, profile: Profile, tokenizer: PreTrainedTokenizerBase) -> None:
        self._run_seed = profile.seed
        self._tokenizer = tokenizer
        self._cursor = Cursor(profile.seed, "")
        self._stories: dict[tuple[int, ...], str] = {}

    def set_step(self, cursor: Cursor, prompts: Sequence[Prompt]) -> None:
        """Say that the titles of `prompts` come next, with the adapter of the step that `cursor` stands at."""
        self._cursor = cursor
        self._stories = {self.prompt_ids(prompt): prompt.story.id for prompt in prompts}

    def seed(self, prompt_ids: tuple[int, ...], generation: int) -> int:
        """Return the seed of title number `generation` of the story with that prompt; the canary's is no story's."""
        return sampling_seed(
            self._run_seed, self._cursor.epoch, self._cursor.step, self._stories.get(prompt_ids, ""), generation
        )

    def validation_seed(self, prompt: Prompt) -> int:
        """Return the seed of a story's validation title, the same at every checkpoint."""
        return sampling_seed(self._run_seed, 0, VALIDATION_STEP, prompt.story.id, 0)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Return a prompt's token ids."""
        return tuple(
            self._tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
