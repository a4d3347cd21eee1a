"""`python -m reward_server.merge`: one folder without an adapter, which other engines such as vLLM can serve."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tasks.titles.errors import ConfigError, HnTitlesError, UserError

logger = logging.getLogger("reward_server.merge")


def merge(model: str, folder: Path, dtype: str = "float32") -> None:
    """Write `model` (as `--model` of the reward server names it) into the new `folder`, its adapter merged.

    The folder holds a classifier with one output as safetensors and its tokenizer, and is written whole or not at all.
    float32 holds the very numbers of the model, and vLLM still reads them as bfloat16 unless it is told otherwise;
    bfloat16 halves the files and rounds the weights, which moves the starter model's scores by up to 0.001.

    Raises `ConfigError` where the folder is there already, or the model cannot be loaded.
    """
    if folder.exists():
        raise ConfigError(f"{folder} is there already. Give a new folder, or delete it first.")
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from reward_server.encoding import padding_id
    from reward_server.model_files import find_model
    from reward_server.scorer import load_classifier, silence_transformers

    silence_transformers()
    files = find_model(model)
    # In bfloat16 the sum would round most of a small adapter away, so it is rounded afterwards, if at all.
    classifier = load_classifier(files, torch.float32)
    if isinstance(classifier, PeftModel):
        classifier = classifier.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(files.tokenizer, trust_remote_code=False)
    classifier.config.pad_token_id = padding_id(tokenizer, classifier.config)
    # The score is the output as it is: whoever serves the folder must not put it through a sigmoid.
    classifier.config.problem_type = "regression"

    scratch = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        classifier.to(getattr(torch, dtype)).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("%s (version %s) is in %s, in %s", model, files.version(), folder, dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge as the command line says and return the exit code: 0 when done, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m reward_server.merge",
        description="Merge a reward model's adapter into its base, as a folder that vLLM can serve.",
    )
    parser.add_argument("--model", default="starter", help="'starter', a folder, a hub name or models:/name@alias")
    parser.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="a folder that is not there yet")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        merge(options.model, options.to, options.dtype)
    except HnTitlesError as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        sys.stderr.write(f"{kind}{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
