"""How long the policy's prompts are, in tokens of its own tokenizer and chat template."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.titles.config import export_hub_endpoint
from tasks.titles.errors import ConfigError
from tasks.titles.prompts import policy_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A fast tokenizer works on the rows of one call in parallel, one thread per core; this many keep all of them
# busy, and a row that it fails on costs no more than this many single calls.
BATCH = 256

Progress = Callable[[int, int], None]
"""Called with the number of prompts counted so far and of all."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model by folder or hub name; code that comes with a model is never run.

    Raises `ConfigError` where there is none or where it has no chat template.
    """
    export_hub_endpoint()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"base_model: no tokenizer could be loaded from '{name}' ({type(error).__name__}: {error}). Expected "
            "'starter', a folder with a model, or a hub name (check the network and HF_ENDPOINT)."
        ) from error
    if not tokenizer.chat_template:
        raise ConfigError(f"base_model: the tokenizer of '{name}' has no chat template. Choose an instruct model.")
    return tokenizer


def count_prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, bodies: Sequence[str], progress: Progress | None = None
) -> list[int | None]:
    """Return the tokens of the policy's prompt for each body, None where the tokenizer raised.

    A batch that it fails on is counted row by row, so that only the failing rows are lost.
    """
    lengths: list[int | None] = []
    failed, first_error = 0, ""
    for start in range(0, len(bodies), BATCH):
        batch = bodies[start : start + BATCH]
        try:
            lengths += _count(tokenizer, batch)
        except Exception:
            for body in batch:
                try:
                    lengths += _count(tokenizer, [body])
                except Exception as error:
                    lengths.append(None)
                    failed += 1
                    first_error = first_error or f"{type(error).__name__}: {error}"
        if progress is not None:
            progress(len(lengths), len(bodies))
    if failed:
        logger.warning("The tokenizer failed on %d of %d prompts; the first time: %s", failed, len(bodies), first_error)
    return lengths


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides how `tokenizer` turns a chat into tokens: its files."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _count(tokenizer: PreTrainedTokenizerBase, bodies: Sequence[str]) -> list[int]:
    chats = [list(policy_messages(body)) for body in bodies]
    encoded: Any = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        return_dict=False,
        tokenizer_kwargs={"verbose": False},  # no warning about long prompts: counting them is the point
    )
    return [len(row) for row in encoded]
