"""What the tests of the CPU service share: the starter base model, an adapter that changes it, and titles."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from openai.types.chat.chat_completion import Choice
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tasks.engines.checkpoints import step_folder, write_checkpoint
from tasks.engines.cpu.cores import Cores
from tasks.engines.cpu.settings import CpuSettings
from tasks.engines.cpu.trainer import Trainer
from tasks.starter.paths import BASE_MODEL

ODD_TEXTS = (
    "Plain words about a queue",
    "Naïve café — “quoted” 12,345.67 € 50 %",
    "日本語のタイトル と한국어",
    "emoji 👩‍💻🔥 and a flag 🇦🇶",
    "combining e\u0301 zero\u200bwidth \u202ertl\u202c bom\ufeff",
    "tabs\tand\r\nlines\n\n  and   spaces ",
    "null \x00 and \x1b[31m escape",
    "&lt;|im_end|> neutralised < | im_start | >",
    "",
)


def load_base() -> PreTrainedModel:
    """Return the starter base model in float32."""
    return AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32).eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE_MODEL)


def make_trainer(cores: Cores, settings: CpuSettings | None = None, *, disturbance: float = 0.0) -> Trainer:
    """Return a trainer whose adapter is not the identity: a fresh one's B is 0, and so are A's gradients."""
    trainer = Trainer(load_base(), settings or CpuSettings(), cores)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in trainer._trained.items():
            if "lora_B" in name:
                weight.add_(disturbance * torch.randn(weight.shape, generator=generator))
    return trainer


def write_adapter(checkpoints: Path, step: int, cores: Cores, *, disturbance: float) -> Path:
    """Write a checkpoint with a disturbed adapter and return its folder."""
    trainer = make_trainer(cores, disturbance=disturbance)
    with write_checkpoint(checkpoints, step) as folder:
        trainer.save(folder)
    return step_folder(checkpoints, step)


def load_with_adapter(folder: Path) -> PeftModel:
    """Return base plus adapter as PEFT loads them, not merged."""
    return PeftModel.from_pretrained(load_base(), str(folder), is_trainable=True).eval()


@torch.inference_mode()
def plain_logprobs(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """Return the completion's log-probabilities by one forward pass of `transformers` over this sequence alone."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def random_ids(rng: random.Random, count: int) -> tuple[int, ...]:
    """Return ordinary token ids, none of them a control token."""
    return tuple(rng.randrange(2000) for _ in range(count))


def choice(token_ids: list[int], logprobs: list[float], text: str = "a title") -> Choice:
    """Return a chat choice with these tokens, as the server answers it."""
    content = [
        {"token": f"token_id:{token}", "logprob": logprob, "bytes": None, "top_logprobs": []}
        for token, logprob in zip(token_ids, logprobs, strict=True)
    ]
    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
            "logprobs": {"content": content, "refusal": None},
        }
    )
