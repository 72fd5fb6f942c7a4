"""Qwen-VL in JAX: from video files to a trained model and its answers.

Names are loaded when they are first used, so that importing this package costs little beyond importing JAX and Flax.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenvl_jax.batch import Batch, KVCache, VisionRows
    from qwenvl_jax.config import QwenVLConfig, RopeConfig, TextConfig, VisionConfig
    from qwenvl_jax.data.processor import Processor
    from qwenvl_jax.data.video import VideoFrames
    from qwenvl_jax.errors import (
        CheckpointError,
        ConfigError,
        ConversationError,
        DataError,
        MediaError,
        QwenVLError,
    )
    from qwenvl_jax.generate import Answer, generate
    from qwenvl_jax.models.qwenvl import QwenVL
    from qwenvl_jax.presets import PRESETS, preset

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Answer",
    "Batch",
    "CheckpointError",
    "ConfigError",
    "ConversationError",
    "DataError",
    "KVCache",
    "MediaError",
    "Processor",
    "QwenVL",
    "QwenVLConfig",
    "QwenVLError",
    "RopeConfig",
    "TextConfig",
    "VideoFrames",
    "VisionConfig",
    "VisionRows",
    "generate",
    "preset",
]

_HOME = {
    "batch": ("Batch", "KVCache", "VisionRows"),
    "config": ("QwenVLConfig", "RopeConfig", "TextConfig", "VisionConfig"),
    "data.processor": ("Processor",),
    "data.video": ("VideoFrames",),
    "errors": ("CheckpointError", "ConfigError", "ConversationError", "DataError", "MediaError", "QwenVLError"),
    "generate": ("Answer", "generate"),
    "models.qwenvl": ("QwenVL",),
    "presets": ("PRESETS", "preset"),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _HOME.items() for name in names}


class _Package(types.ModuleType):
    """This package. `generate` names a module and, for users, the function in it: the name is bound to the function.

    Python binds a submodule to its package whenever it is first imported, by anyone; without this, what
    `qwenvl_jax.generate` is would depend on who came first. `from qwenvl_jax.generate import ...` works either way.
    """

    def __setattr__(self, name, value):
        if name == "generate" and isinstance(value, types.ModuleType):
            value = value.generate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
