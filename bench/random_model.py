"""A model of Qwen2.5-0.5B's size with random weights: enough to measure speed and memory by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

from reward_server.scorer import silence_transformers
from tasks.starter.paths import BASE_MODEL


def random_qwen(folder: Path, tokenizer_folder: Path = BASE_MODEL) -> str:
    """Save a classifier of Qwen2.5-0.5B's configuration with random weights, and return its folder.

    Its tokenizer is the starter model's where no other is given: the numbers of tokens are what counts.
    """
    silence_transformers()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, model_max_length=32768)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = Qwen2ForSequenceClassification(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
