"""A bare `GRPOTrainer`: `python -m bench.gpu_trl_bare REQUEST OUT STEPS`. What TRL itself takes for a step.

The same arguments of TRL, model, adapter, optimiser, prompts and judges as this project's loop, and nothing else: no
checkpoints, no checks, no canary. OUT gets a line for each step: `at` (time.time() at its end), `rollout_s` (until
its titles are judged; TRL reads them once more before, for the trainer's own log-probabilities), `train_s` and
`tokens` (sampled).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tasks.engines.trl_engine.arguments import grpo_arguments
from tasks.engines.trl_engine.request_file import read_request
from tasks.engines.trl_engine.trainer import load_policy, make_optimizer
from tasks.titles.child_process import end_with_stdin
from tasks.titles.prompts import validator_messages
from tasks.titles.story import Prompt


class Judges:
    """The reward server and the base model, asked one after the other for all titles of a step."""

    __name__ = "judges"

    def __init__(self, model: Any, tokenizer: Any, stories: Sequence[Prompt], url: str, batch: int) -> None:
        self._model, self._tokenizer, self._batch = model, tokenizer, batch
        self._stories = {prompt.story.id: prompt.story for prompt in stories}
        self._client = httpx.Client(base_url=url, timeout=60.0)
        self.tokens = 0
        """Sampled for the last step."""
        self.judged = 0.0
        """When the last title was."""

    def __call__(self, completions: Any, completion_ids: Any, story_id: Sequence[str], **_: Any) -> list[float | None]:
        """Return the score of each title; the verdict is waited for and left out, as in ART's bare loop."""
        stories = [self._stories[one] for one in story_id]
        titles = [completion[0]["content"].strip() or "-" for completion in completions]
        asked = [
            {
                "title": title,
                "scraped_body": story.scraped_body,
                "by": story.by,
                "time": story.time.isoformat() if story.time else None,
                "url": story.url,
            }
            for story, title in zip(stories, titles, strict=True)
        ]
        answer = self._client.post("/score/batch", json=asked)
        answer.raise_for_status()
        chats = [validator_messages(story.scraped_body, title) for story, title in zip(stories, titles, strict=True)]
        for start in range(0, len(chats), self._batch):
            self._verdicts(chats[start : start + self._batch])
        self.tokens, self.judged = sum(len(ids) for ids in completion_ids), time.time()
        return [float(one["score"]) for one in answer.json()]

    @torch.no_grad()
    def _verdicts(self, chats: Sequence[Any]) -> list[int]:
        rows = self._tokenizer.apply_chat_template(
            list(chats), add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        ).to(self._model.device)
        self._model.eval()
        with self._model.disable_adapter():
            logits = self._model(**rows, logits_to_keep=1, use_cache=False).logits[:, -1]
        self._model.train()
        found: list[int] = logits.argmax(-1).tolist()
        return found


class Clock(TrainerCallback):
    """Writes what each step took."""

    def __init__(self, judges: Judges, out: Path) -> None:
        self._judges, self._out, self._last = judges, out, time.time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the time since the last step's end, with all that TRL does in between."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.time()
        row = {
            "at": now,
            "rollout_s": round(self._judges.judged - self._last, 4),
            "train_s": round(now - self._judges.judged, 4),
            "tokens": self._judges.tokens,
        }
        with self._out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._last = now


def main(request_path: str, out: str, steps: str) -> None:
    end_with_stdin()
    request = read_request(Path(request_path))
    profile = request.profile
    model, tokenizer = load_policy(request)
    judges = Judges(model, tokenizer, request.train, request.reward_model_url, profile.trl.micro_batch)
    rows = [{"prompt": list(one.messages), "story_id": one.story.id} for one in request.train]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[judges],
        args=GRPOConfig(**grpo_arguments(profile, steps=int(steps), output_dir=Path(out).parent)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock(judges, Path(out))],
        optimizers=(make_optimizer(model, profile), None),
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
