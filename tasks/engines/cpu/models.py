"""Which models the service has, and their weights arranged for sampling."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from tasks.engines.checkpoints import step_folder, steps_on_disk
from tasks.engines.cpu.decoder import Decoder
from tasks.engines.cpu.weights import decoder_weights, merge_adapter

logger = logging.getLogger(__name__)


class UnknownModel(Exception):
    """No model is served under that name."""


class ServedModels:
    """The base model and every checkpoint of one run, by name.

    The base model answers to `base` and to the name that the run gives it; checkpoint N to
    `{run}@{N}`. Checkpoints are read from disk when they are asked for, and the ones used last stay in
    memory. Safe to use from several threads.
    """

    def __init__(
        self,
        base: Mapping[str, torch.Tensor],
        config: PreTrainedConfig,
        *,
        base_name: str,
        run_name: str,
        checkpoints: Path,
        adapters_in_memory: int,
    ) -> None:
        self._base = base
        self._config = config
        self._base_names = ("base", base_name)
        self._run_name = run_name
        self._checkpoints = checkpoints
        self._elsewhere: dict[int, Path] = {}
        """Folders of steps that do not lie in `checkpoints`."""
        self._limit = adapters_in_memory
        self._lock = threading.Lock()
        self._base_decoder = Decoder(decoder_weights(base, config))
        self._adapters: OrderedDict[int, Decoder] = OrderedDict()

    @property
    def context(self) -> int:
        """The longest sequence in tokens, of every model."""
        return self._base_decoder.context

    @property
    def vocabulary(self) -> int:
        """Token ids are below this number."""
        return self._base_decoder.weights.embedding.shape[0]

    def names(self) -> list[str]:
        """Return every name that answers now."""
        steps = sorted({*steps_on_disk(self._checkpoints), *self._elsewhere})
        return [*self._base_names, *(f"{self._run_name}@{step}" for step in steps)]

    def check(self, name: str) -> None:
        """Raise `UnknownModel` where `name` is neither the base model nor a checkpoint on disk."""
        step = self._step(name)
        if step is not None and step not in self._adapters and not self._folder(step).is_dir():
            raise self._unknown(name)

    def decoder(self, name: str) -> Decoder:
        """Return the model behind `name`, reading its adapter from disk where needed.

        Raises `UnknownModel`, or `CheckpointError` for a folder that holds no adapter of this model.
        """
        step = self._step(name)
        if step is None:
            return self._base_decoder
        with self._lock:
            if step not in self._adapters:
                folder = self._folder(step)
                if not folder.is_dir():
                    raise self._unknown(name)
                self._adapters[step] = Decoder(decoder_weights(merge_adapter(self._base, folder), self._config))
                logger.debug("serving %s from %s", name, folder)
            self._adapters.move_to_end(step)
            while len(self._adapters) > self._limit:
                self._adapters.popitem(last=False)
            return self._adapters[step]

    def load_step(self, step: int, folder: Path | None = None) -> None:
        """Read checkpoint `step` again, also where an older one of that number is in memory.

        `folder` is where it lies, if not among the run's own checkpoints.
        """
        with self._lock:
            self._adapters.pop(step, None)
            if folder is not None and folder.resolve() != step_folder(self._checkpoints, step).resolve():
                self._elsewhere[step] = folder
        self.decoder(f"{self._run_name}@{step}")

    def retain(self, steps: Collection[int]) -> None:
        """Let go of every adapter in memory but those of `steps`."""
        with self._lock:
            for step in set(self._adapters) - set(steps):
                del self._adapters[step]

    def _folder(self, step: int) -> Path:
        return self._elsewhere.get(step, step_folder(self._checkpoints, step))

    def _step(self, name: str) -> int | None:
        """Return the checkpoint's step, or None for the base model."""
        if name in self._base_names:
            return None
        run, _, step = name.rpartition("@")
        if run != self._run_name or not (step.isascii() and step.isdigit()):
            raise self._unknown(name)
        return int(step)

    def _unknown(self, name: str) -> UnknownModel:
        return UnknownModel(f"There is no model '{name}'. Served: {', '.join(self.names())}.")
