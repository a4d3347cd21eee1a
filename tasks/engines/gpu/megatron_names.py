"""Empty stand-ins for the names of Megatron that ART imports with its list of models, and uses for none trained here.

ART 0.5.18 imports them on its way to the configuration of any policy; its own extra for Unsloth does not install
Megatron, which is built for each machine.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_BRIDGE = "megatron.bridge.models"
NAMES = {
    "megatron.core.models.gpt.gpt_model": ("GPTModel",),
    "megatron.core.ssm.gated_delta_net": ("GatedDeltaNet",),
    "megatron.core.transformer.spec_utils": ("ModuleSpec",),
    "megatron.core.transformer.module": ("MegatronModule",),
    f"{_BRIDGE}.conversion.model_bridge": ("MegatronModelBridge",),
    f"{_BRIDGE}.qwen_vl.qwen3_vl_bridge": ("FusedExpertMapping", "FusedGatedExpertMapping"),
    f"{_BRIDGE}.qwen_vl.qwen35_vl_bridge": ("Qwen35VLBridge", "Qwen35VLMoEBridge"),
    f"{_BRIDGE}.qwen_vl.qwen35_vl_provider": ("Qwen35VLModelProvider", "Qwen35VLMoEModelProvider"),
}
"""What is imported where."""


@contextmanager
def megatron_names() -> Iterator[None]:
    """Let ART's modules be imported inside this context; where Megatron is installed, its own are."""
    if importlib.util.find_spec("megatron") is not None:
        yield
        return
    modules: dict[str, ModuleType] = {}
    for path, names in NAMES.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in modules:
                modules[name] = _package(name)
        for name in names:
            setattr(modules[path], name, type(name, (), {"register_bridge": staticmethod(_unchanged)}))
    for name in ("_QWEN3_5_DENSE_HF_CLASS_NAME", "_QWEN3_5_MOE_HF_CLASS_NAME"):
        setattr(modules[f"{_BRIDGE}.qwen_vl.qwen35_vl_bridge"], name, "")
    sys.modules.update(modules)
    try:
        yield
    finally:
        # Others ask whether Megatron is there, and would find these.
        for name in modules:
            sys.modules.pop(name, None)


def _package(name: str) -> ModuleType:
    module = ModuleType(name, __doc__)
    module.__path__ = []
    return module


def _unchanged(**_: Any) -> Any:
    """What ART decorates classes with."""
    return lambda decorated: decorated
