"""Models of Qwen2.5-0.5B's and 7B's size with random weights: enough to measure speed and memory by.

`python -m bench.random_model FOLDER --tokenizer FOLDER [--size 7b]` saves one that writes titles.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from reward_server.scorer import silence_transformers
from tasks.starter.paths import BASE_MODEL

SIZES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
"""The configurations of Qwen2.5-Instruct."""
END_OF_TURN, END_OF_TEXT = 151645, 151643
"""Of Qwen2.5's tokenizer."""


def random_qwen(folder: Path, tokenizer_folder: Path = BASE_MODEL) -> str:
    """Save a classifier of Qwen2.5-0.5B's configuration with random weights, and return its folder.

    Its tokenizer is the starter model's where no other is given: the numbers of tokens are what counts.
    """
    silence_transformers()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, model_max_length=32768)
    config = _config("0.5b", num_labels=1, pad_token_id=tokenizer.pad_token_id)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen2ForSequenceClassification(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_policy(folder: Path, tokenizer_folder: Path, size: str = "0.5b") -> int:
    """Save a causal language model of Qwen2.5's configuration with random weights; return how many they are.

    `tokenizer_folder` holds Qwen2.5's tokenizer, whose files are copied.
    """
    silence_transformers()
    torch.manual_seed(0)
    config = _config(size, bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TURN)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model: Any = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT, eos_token_id=[END_OF_TURN, END_OF_TEXT], pad_token_id=END_OF_TEXT, do_sample=True
    )
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder / file.name)
    return int(model.num_parameters())


def _config(size: str, **changes: Any) -> Qwen2Config:
    rope: Any = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen2Config(**SIZES[size], max_position_embeddings=32768, rope_parameters=rope, **changes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.random_model", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with Qwen2.5's tokenizer")
    parser.add_argument("--size", choices=sorted(SIZES), default="0.5b")
    options = parser.parse_args()
    weights = random_policy(options.folder, options.tokenizer, options.size)
    print(f"{weights:,} random weights in {options.folder}")  # noqa: T201


if __name__ == "__main__":
    main()
