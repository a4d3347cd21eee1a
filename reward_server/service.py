"""The life of the model in a server: loading in the background, scoring, stopping."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from reward_server.batching import Batcher
from reward_server.errors import NotReady
from reward_server.metrics import Metrics
from reward_server.scorer import Scorer
from reward_server.settings import RewardServerSettings

logger = logging.getLogger(__name__)

LoadScorer = Callable[[RewardServerSettings], Scorer]


class RewardService:
    """Loads the scorer in a thread of its own and hands out the batcher once it can answer."""

    def __init__(self, settings: RewardServerSettings, load: LoadScorer) -> None:
        """`load` runs in another thread and may take minutes."""
        self.settings = settings
        self.metrics = Metrics()
        self.load_error: BaseException | None = None
        self._load = load
        self._batcher: Batcher | None = None
        self._stopped = False
        self._loaded = asyncio.Event()

    def start(self) -> None:
        """Begin to load; must be called in the event loop that will serve."""
        loop = asyncio.get_running_loop()

        def work() -> None:
            result: Scorer | BaseException
            try:
                result = self._load(self.settings)
            except BaseException as error:
                result = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._finish_loading, result)

        # A daemon, so that a server stopped while it loads (or downloads) ends at once.
        threading.Thread(target=work, name="load-reward-model", daemon=True).start()

    def batcher(self) -> Batcher:
        """Return the batcher. Raises `NotReady` with the reason where there is none (yet)."""
        if self._stopped:
            raise NotReady("The reward server stops.")
        if self.load_error is not None:
            raise NotReady(f"The reward model could not be loaded: {self.load_error}")
        if self._batcher is None:
            raise NotReady(f"The reward model '{self.settings.model}' is being loaded.")
        return self._batcher

    async def wait_loaded(self) -> None:
        """Wait until loading has ended, well or with `load_error`."""
        await self._loaded.wait()

    async def stop(self) -> None:
        """Answer every waiter and end."""
        self._stopped = True
        if self._batcher is not None:
            await self._batcher.stop()

    def _finish_loading(self, result: Scorer | BaseException) -> None:
        if isinstance(result, BaseException):
            self.load_error = result
            logger.error("The reward model could not be loaded: %s", result)
        elif not self._stopped:
            self._batcher = Batcher(
                result,
                token_budget=self.settings.batch_tokens,
                queue_size=self.settings.queue_size,
                metrics=self.metrics,
            )
            self._batcher.start()
        self._loaded.set()
