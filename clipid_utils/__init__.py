"""CLIP for Bahasa Indonesia: the library under the course's notebooks.

The names below are all that most users need. Each is imported when it is first used, so that `import clipid_utils` and
`clipid --help` do not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipid_utils.model.clip import HybridCLIP
    from clipid_utils.model.config import PRESETS, CLIPConfig, TextConfig, VisionConfig
    from clipid_utils.model.pretrained.load import load_clip, load_towers
    from clipid_utils.model.pretrained.save import save_clip
    from clipid_utils.model.processor import CLIPProcessor

__version__ = "0.1.0"
__all__ = [
    "PRESETS", "CLIPConfig", "CLIPProcessor", "HybridCLIP", "TextConfig", "VisionConfig", "load_clip", "load_towers",
    "save_clip",
]
_MODULES = {
    "model.clip": ("HybridCLIP",),
    "model.config": ("PRESETS", "CLIPConfig", "TextConfig", "VisionConfig"),
    "model.pretrained.load": ("load_clip", "load_towers"),
    "model.pretrained.save": ("save_clip",),
    "model.processor": ("CLIPProcessor",),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            globals()[name] = getattr(importlib.import_module(f"clipid_utils.{module}"), name)
            return globals()[name]
    raise AttributeError(f"module 'clipid_utils' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
