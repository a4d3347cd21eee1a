"""Trains the starter reward models: a LoRA adapter and a head on the starter base, from scores alone."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tasks.starter.reward_labels import label, prediction_quality
from tasks.titles.prompts import reward_model_text
from tasks.titles.story import Story

logger = logging.getLogger(__name__)

EPOCHS = 4
BATCH = 32
PEAK_LEARNING_RATE = 1e-3


def half_of(story_id: str) -> int:
    """Return which half (0 or 1) of the train stories a story belongs to: one half for each reward model."""
    return int(hashlib.sha256(f"half-{story_id}".encode()).hexdigest()[:8], 16) % 2


def text_of(story: Story) -> str:
    """Return what the reward model reads of a story under its human title."""
    return reward_model_text(
        title=story.title, by=story.by, time=story.time, scraped_body=story.scraped_body, url=story.url
    )


def train_reward_model(
    base: Path, stories: Sequence[Story], *, half: int, seed: int, device: str, out: Path
) -> dict[str, float]:
    """Train on one half of the train stories, write the adapter to `out` and return its figures on the test split."""
    train = [story for story in stories if story.split == "train" and half_of(story.id) == half]
    test = [story for story in stories if story.split == "test"]
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    model = get_peft_model(
        classifier, LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", target_modules="all-linear")
    ).to(device)
    # The base in bf16 on disk serves every model here, so the adapter remembers it relative to itself.
    model.peft_config["default"].base_model_name_or_path = os.path.relpath(base, out)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.1)
    rng = random.Random(seed)
    model.train()
    step = 0
    for epoch in range(EPOCHS):
        order = rng.sample(train, len(train))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            wanted = torch.tensor([label(story.score) for story in batch], device=device)
            loss = functional.mse_loss(_predict(model, tokenizer, batch), wanted)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 100 == 0:
                logger.info("half %d, epoch %d, step %d of %d, loss %.3f", half, epoch, step, steps, loss.item())
    model.eval()
    with torch.inference_mode():
        parts = [_predict(model, tokenizer, test[start : start + 64]) for start in range(0, len(test), 64)]
        predicted = torch.cat(parts).tolist()
    mean = sum(label(story.score) for story in train) / len(train)
    figures = prediction_quality(predicted, [label(story.score) for story in test], mean)
    model.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    card = {"stories": len(train), "half": half, "seed": seed, "label_mean": mean, "test": figures}
    (out / "figures.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return figures


def _predict(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stories: Sequence[Story]
) -> torch.Tensor:
    batch = tokenizer(
        [text_of(story) for story in stories], return_tensors="pt", padding=True, padding_side="right"
    ).to(model.device)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].float()
