"""Trains the starter base model: a small Qwen2 that writes and judges titles of the starter world."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from tasks.starter import lessons, world
from tasks.starter.lessons import ANSWER, BODY, TITLE, Lessons, Rows
from tasks.starter.tokenizer import train_tokenizer
from tasks.titles import prompts

logger = logging.getLogger(__name__)

CONTEXT = 2048
STEPS = 6500
ROWS_PER_STEP = 192
PEAK_LEARNING_RATE = 2e-3
WEIGHTS = {BODY: 0.2, TITLE: 1.0, ANSWER: 1.0}
"""How much the mean loss of each role counts."""


def tokenizer_texts(seed: int, tales: int = 6000) -> Iterator[str]:
    """Yield what the tokenizer is trained on: bodies, titles and the prompts around them."""
    frame = prompts.reward_model_text(title="a", by="regular1", time=None, scraped_body="b", url="https://a.example/20")
    for number in range(tales):
        rng = random.Random(f"tokenizer-{seed}-{number}")
        tale = world.tell(rng)
        yield tale.body
        yield "\n".join(world.human_title(rng, tale)[1] for _ in range(4))
        yield f"system\n{prompts.VALIDATOR_SYSTEM}\nuser\n{prompts.VALIDATOR_USER}\nassistant\nTrue\nassistant\nFalse\n"
        yield f"system\n{prompts.POLICY_SYSTEM}\nuser\n{prompts.POLICY_USER}\nassistant\n{frame}"


def new_tokenizer(seed: int) -> PreTrainedTokenizerBase:
    """Train the starter tokenizer from the seed."""
    return train_tokenizer(tokenizer_texts(seed), CONTEXT)


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """Return an untrained starter base model (5.2M parameters)."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=768,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def group_mask(groups: torch.Tensor) -> torch.Tensor:
    """Return which place may look at which: shape (rows, 1, length, length), bool.

    A token sees what came before it in the prompt (group 0) and in its own answer.
    """
    same = groups[:, :, None] == groups[:, None, :]
    prompt = (groups == 0)[:, None, :]
    causal = torch.ones(groups.shape[1], groups.shape[1], dtype=torch.bool, device=groups.device).tril()
    return (causal & (same | prompt))[:, None]


def losses(model: Qwen2ForCausalLM, rows: Rows, device: torch.device) -> dict[int, torch.Tensor]:
    """Return the mean loss of each role (in nats a token) over a batch of rows."""
    tokens, positions, groups, roles = (torch.as_tensor(part).to(device, non_blocking=True) for part in rows)
    hidden = model.model(
        input_ids=tokens, attention_mask=group_mask(groups), position_ids=positions, use_cache=False
    ).last_hidden_state
    # The next place predicts a token only where both belong to one answer (or to the prompt).
    follows = (groups[:, 1:] == groups[:, :-1]) & (roles[:, 1:] > 0)
    targets, target_roles = tokens[:, 1:][follows], roles[:, 1:][follows]
    per_token = functional.cross_entropy(model.lm_head(hidden[:, :-1][follows]).float(), targets, reduction="none")
    return {role: per_token[target_roles == role].mean() for role in WEIGHTS}


class _Batches(Dataset[Rows]):
    def __init__(self, source: Lessons, steps: int) -> None:
        self._source, self._steps = source, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Rows:
        return self._source[index]


def train_base(
    tokenizer: PreTrainedTokenizerBase, *, seed: int, device: str, steps: int = STEPS, workers: int = 2
) -> Qwen2ForCausalLM:
    """Train the base model for `steps` batches; the order of the lessons follows from the seed alone."""
    place = torch.device(device)
    model: Any = new_model(tokenizer, seed)
    model.to(place)
    if place.type == "cuda":
        model.model.compile(dynamic=False)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=place.type == "cuda",
    )
    warm_up = min(300, steps // 10 + 1)

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    batches: DataLoader[Rows] = DataLoader(
        _Batches(Lessons(tokenizer, seed, ROWS_PER_STEP), steps),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    started = time.monotonic()
    model.train()
    for step, rows in enumerate(batches):
        with torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda"):
            by_role = losses(model, rows, place)
        loss = sum((weight * by_role[role] for role, weight in WEIGHTS.items()), torch.zeros((), device=place))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            parts = {name: round(by_role[role].item(), 4) for role, name in _ROLE_NAMES.items()}
            logger.info("step %d of %d, %s, %.0f s", step, steps, parts, time.monotonic() - started)
    return model.eval()


_ROLE_NAMES = {BODY: "body", TITLE: "title", ANSWER: "verdict"}


@torch.inference_mode()
def verdict_accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, *, seed: int, batches: int, rows: int = 64
) -> dict[str, float]:
    """Return the share of right verdicts on supported and on unsupported titles of tales never trained on."""
    device = model.device
    true_id, false_id = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("True", "False"))
    right, asked = {true_id: 0, false_id: 0}, {true_id: 0, false_id: 0}
    source = Lessons(tokenizer, seed, rows)
    for number in range(batches):
        tokens, positions, groups, roles = (torch.as_tensor(part).to(device) for part in source[number])
        logits = model(
            input_ids=tokens, attention_mask=group_mask(groups), position_ids=positions, use_cache=False
        ).logits
        guesses = logits[:, :-1].argmax(-1)
        asked_here = roles[:, 1:] == lessons.ANSWER
        for verdict in right:
            here = asked_here & (tokens[:, 1:] == verdict)
            asked[verdict] += int(here.sum())
            right[verdict] += int((guesses[here] == verdict).sum())
    return {"supported": right[true_id] / asked[true_id], "unsupported": right[false_id] / asked[false_id]}


@torch.inference_mode()
def sampled_titles(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, *, seed: int, tales: int, temperature: float = 1.0
) -> list[tuple[world.Tale, str, bool]]:
    """Sample one title for each of `tales` new tales; the flag says whether it is one that the body supports."""
    torch.manual_seed(seed)
    told = [world.tell(random.Random(f"sampled-{seed}-{number}")) for number in range(tales)]
    chats = [Lessons(tokenizer, seed, 1).chat(prompts.policy_messages(tale.body)) for tale in told]
    result = []
    for start in range(0, tales, 128):
        batch = tokenizer(
            chats[start : start + 128], return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(model.device)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=40,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0,
            top_p=1.0,
        )
        titles = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for tale, title in zip(told[start : start + 128], titles, strict=True):
            supported = {text for found in world.supported_titles(tale).values() for text in found}
            result.append((tale, title, title in supported))
    return result
