"""Serves the base model and any checkpoints, of either engine's runs, for evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tasks.engines.art_session import BASE_MODEL_NAME, open_backend
from tasks.engines.resume import ART_MODEL
from tasks.titles.config import Profile


@dataclass
class PolicyServer:
    """An OpenAI-compatible server: implements `rollout.Endpoint`."""

    base_url: str
    api_key: str
    base_model_name: str
    names: Mapping[str, str]
    """The name that each checkpoint is served under."""


@asynccontextmanager
async def serve_checkpoints(
    profile: Profile, base_model: str, checkpoints: Mapping[str, Path]
) -> AsyncIterator[PolicyServer]:
    """Serve `base_model` and the adapters in the folders of `checkpoints`; the runs they belong to stay untouched.

    The backend is the one that ART's policies are served by, in a folder of its own that is removed afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="hn-titles-") as scratch:
        # One more than there are checkpoints: the backend's own untrained adapter.
        opened = open_backend(profile, base_model, Path(scratch), adapters_in_memory=len(checkpoints) + 1)
        async with opened as (backend, model):
            service = await backend._get_service(model)
            names = {}
            for place, (name, folder) in enumerate(checkpoints.items(), start=1):
                await service.register_lora_for_step(place, str(folder))
                names[name] = f"{ART_MODEL}@{place}"
            yield PolicyServer(model.inference_base_url, model.inference_api_key, BASE_MODEL_NAME, names)
