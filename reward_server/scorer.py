"""The reward model itself: text in, predicted log upvotes out. It knows no HTTP."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from reward_server.encoding import cut_body, fast_encoder, padding_id, readable_length, text_of
from reward_server.model_files import ModelFiles, find_model, is_classifier
from reward_server.passes import DecoderPasses, why_no_passes
from reward_server.schemas import ScoreRequest
from reward_server.settings import RewardServerSettings
from tasks.titles.errors import ConfigError
from tasks.titles.prefixes import Run, best_runs, common_prefix

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""What `Scorer.score_tokens` raises where a smaller batch may do."""
_SAME = {torch.float32: 1e-3}
"""Largest difference between two ways to compute one score, by dtype."""
_SAME_SHARE = 0.25
"""The same in lower precision, as a share of the spread of the scores; wrong passes differ by about all of it."""


_AUTO = {"cpu": ("float32",), "cuda": ("float16", "bfloat16")}
"""What is tried by default. float16 rounds eight times finer than bfloat16, but ends at 65,504, which not every model
stays below."""
_SECOND_PASS_TOKENS = {"cpu": 0, "cuda": 2048}
"""Tokens that sharing must save to be worth its second pass, on a GPU a few milliseconds: of 10,900 tokens of 48 titles
sharing leaves 2,600, which took an H100 16 ms instead of 36."""


def silence_transformers() -> None:
    """Keep transformers' progress bars and load reports off the terminal and out of logs.

    Its report calls a head that the adapter brings «newly initialized»; `load_classifier` checks what is missing.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def prepare_device(device: str) -> None:
    """Choose how attention is computed: cuDNN would plan its kernel anew for every length of text.

    On an H100 that took 70 ms each, three times a forward pass of 2,000 tokens; PyTorch's own flash attention needs no
    plans.
    """
    if device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def load_classifier(files: ModelFiles, dtype: torch.dtype) -> Any:
    """Load the classifier of `files` on the CPU, its adapter unmerged; safetensors only, no remote code.

    Raises `ConfigError` where it cannot be loaded, has another number of outputs than one, or where part of it
    is in none of the files (transformers would fill the part with random numbers).
    """
    # A base that is no classifier gets its head from the adapter.
    labels = {} if is_classifier(files.base) else {"num_labels": 1}
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            files.base, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **labels
        )
        missing = set(info["missing_keys"])
        if files.adapter is not None:
            missing -= _adapter_shapes(files.adapter, missing)
        if missing:
            raise ConfigError(
                f"Reward model '{files.name}' is incomplete: {', '.join(sorted(missing)[:5])} are in none of its "
                "files. Save the classification head with it (PEFT: task_type SEQ_CLS)."
            )
        if files.adapter is not None:
            # PEFT would keep adapter weights in float32 beside a bfloat16 model; one dtype throughout is plainer.
            model = PeftModel.from_pretrained(model, str(files.adapter), autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"Reward model '{files.name}' cannot be loaded: {error}") from error
    return model.eval()


def _adapter_shapes(adapter: Path, wanted: set[str]) -> set[str]:
    """Return which of the `wanted` weights the adapter brings, after a look at their shapes."""
    found = set()
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            name = key.removeprefix("base_model.model.").replace("modules_to_save.", "")
            if name not in wanted:
                continue
            shape = file.get_slice(key).get_shape()
            if shape[0] != 1:
                raise ConfigError(
                    f"The adapter in {adapter} has a head with {shape[0]} outputs ({name}); a reward model has one."
                )
            found.add(name)
    return found


class Scorer:
    """A loaded reward model.

    Any number of threads may run `encode`, one at a time `score_tokens`.
    """

    def __init__(
        self, files: ModelFiles, *, device: str, dtype: torch.dtype, max_length: int, prefix_sharing: bool = True
    ) -> None:
        """Load the model onto `device`; `max_length` is in tokens and never above what the model can read.

        With `prefix_sharing` texts that begin alike share the work of their common prefix, where the model allows it.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda', but PyTorch sees no CUDA device. Use --device cpu.")
        prepare_device(device)
        self.name = files.name
        self.device = device
        self.dtype = str(dtype).removeprefix("torch.")
        self._tokenizer = AutoTokenizer.from_pretrained(files.tokenizer, trust_remote_code=False)
        if not self._tokenizer.is_fast:
            raise ConfigError(f"The tokenizer of '{files.name}' is a slow one; save its tokenizer.json with the model.")
        self._token_ids = fast_encoder(self._tokenizer)
        model = load_classifier(files, dtype)
        if files.adapter is not None and dtype == torch.float32:
            # Merged, the adapter costs no time. In bfloat16 the sum would round most of a small adapter away.
            model = model.merge_and_unload()
        config: Any = model.config
        self._pad_id = padding_id(self._tokenizer, config)
        # Decoder classifiers read their score at the last token that is not this one.
        config.pad_token_id = self._pad_id
        config.use_cache = False
        self.max_length = readable_length(max_length, self._tokenizer, config)
        self._model = _with_float32_head(model).to(device)
        self.version = files.version()
        self._probe = self.encode([ScoreRequest(title="A title", scraped_body="A body.")])
        self._passes = self._decoder_passes()
        self.shares_prefixes = prefix_sharing and self._passes is not None
        """Whether texts that begin alike are computed together for less."""
        logger.info(
            "Reward model %s (version %s) on %s in %s, reads %d tokens, %s",
            self.name, self.version, self.device, self.dtype, self.max_length,
            "shares prefixes" if self.shares_prefixes else "shares no prefixes",
        )  # fmt: skip

    def score_texts(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """Return the score of each request, in its order, all in one forward pass."""
        return self.score_tokens(self.encode(requests))

    def encode(self, requests: Sequence[ScoreRequest]) -> list[list[int]]:
        """Return the token ids of each request, at most `max_length`; a body that is too long loses its end.

        Raises `BadInput` where title, URL and submitter alone are too long.
        """
        texts = [text_of(request) for request in requests]
        return [
            ids if len(ids) <= self.max_length else cut_body(self._tokenizer, text, self.max_length)
            for text, ids in zip(texts, self._token_ids(texts), strict=True)
        ]

    def score_tokens(self, batch: Sequence[list[int]]) -> list[float]:
        """Return the score of each of `batch`, lists of token ids, computed together."""
        if self._passes is None:
            return self._plain_scores(batch)
        order = sorted(range(len(batch)), key=batch.__getitem__)
        texts = [batch[index] for index in order]
        scores = self._passes.scores(texts, self.divide(texts))
        return [score for _, score in sorted(zip(order, scores, strict=True))]

    def divide(self, texts: Sequence[list[int]], common: Sequence[int] | None = None) -> list[Run]:
        """Return how sorted `texts` share prefixes; not at all where that saves too little.

        `common` are the tokens that each shares with the next, where they are known.
        """
        lengths = [len(text) for text in texts]
        if self.shares_prefixes:
            runs = best_runs(lengths, common or [common_prefix(left, right) for left, right in pairwise(texts)])
            if sum(lengths) - sum(run.shared + run.rest for run in runs) >= _SECOND_PASS_TOKENS[self.device]:
                return runs
        return [Run(index, index + 1, length, 0) for index, length in enumerate(lengths)]

    def _plain_scores(self, batch: Sequence[list[int]]) -> list[float]:
        """Return the scores from one forward pass of the whole classifier with right padding."""
        longest = max(len(ids) for ids in batch)
        input_ids = torch.full((len(batch), longest), self._pad_id)
        mask = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        with torch.inference_mode():
            logits = self._model(input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device)).logits
        return logits[:, 0].float().tolist()

    def _decoder_passes(self) -> DecoderPasses | None:
        """Return the faster passes of a decoder, None where the model is no such decoder.

        What the configuration does not tell is tried: their scores must be those of the model's own forward pass.
        """
        classifier: Any = self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model
        reason = why_no_passes(classifier, self.max_length)
        if reason is None:
            passes = None
            texts = _sample_texts(classifier.config.vocab_size, self._pad_id)
            count = len(texts)
            # All of them take two passes, those that share a prefix one.
            texts += [ids for ids in texts if any(other is not ids and common_prefix(ids, other) for other in texts)]
            expected = [self._plain_scores([ids])[0] for ids in texts]
            try:
                passes = DecoderPasses(classifier, pad_id=self._pad_id, device=self.device)
                scores = []
                for chosen in (texts[:count], texts[count:]):
                    common = [common_prefix(left, right) for left, right in pairwise(chosen)]
                    scores += passes.scores(chosen, best_runs([len(ids) for ids in chosen], common))
            except Exception as error:  # whatever a model that was never meant for this raises
                reason = f"it failed with {type(error).__name__}: {error}"
            else:
                difference = max(abs(a - b) for a, b in zip(scores, expected, strict=True))
                allowed = _SAME.get(classifier.dtype, _SAME_SHARE * (max(expected) - min(expected)))
                if difference <= allowed:
                    return passes
                reason = f"its scores differ by {difference:.2g} from those of its own forward pass"
            if passes is not None:
                passes.undo()
        logger.warning("Reward model %s cannot share prefixes: %s. Texts are scored whole.", self.name, reason)
        return None

    def gives_numbers(self) -> bool:
        """Whether the scores of a few texts are finite."""
        texts = [*self._probe, *_sample_texts(len(self._tokenizer), self._pad_id)]
        return all(math.isfinite(score) for score in self.score_tokens(texts))

    def probe(self) -> float:
        """Return the score of a tiny text: the model works."""
        return self.score_tokens(self._probe)[0]


def load_scorer(settings: RewardServerSettings) -> Scorer:
    """Find and load the reward model that `settings` name. Raises `ConfigError` where that is not possible."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    files = find_model(settings.model)
    for dtype in _AUTO[settings.device] if settings.dtype == "auto" else (settings.dtype,):
        scorer = Scorer(
            files,
            device=settings.device,
            dtype=getattr(torch, dtype),
            max_length=settings.max_length,
            prefix_sharing=settings.prefix_sharing,
        )
        if scorer.gives_numbers():
            break
        logger.warning("Reward model %s computes no numbers in %s", scorer.name, dtype)
    return scorer


def _sample_texts(vocabulary: int, pad_id: int) -> list[list[int]]:
    """Return sorted texts of at most 16 tokens: three and two that begin alike, and one alone."""
    generator = random.Random(0)
    ids = [token for token in generator.choices(range(vocabulary), k=100) if token != pad_id]
    long, short, alone = ids[:10], ids[10:17], ids[17:30]
    branches = (ids[30:36], ids[36:37], ids[37:40], ids[40:45], ids[45:47])
    stems = (long, long, long, short, short)
    return sorted([alone, *(stem + branch for stem, branch in zip(stems, branches, strict=True))])


def _with_float32_head(model: torch.nn.Module) -> torch.nn.Module:
    """Compute the last product of a decoder classifier in float32: bfloat16 knows no number between 4 and 4.03."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "score":
            module.float()
            module.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
    return model
