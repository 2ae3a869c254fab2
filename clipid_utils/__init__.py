"""CLIP for Bahasa Indonesia: the thin library under the course's notebooks."""

import importlib

__version__ = "0.1.0"
_MODULES = {  # imported at the first use, so that the command `clipid` starts at once
    "PRESETS": "model.config", "CLIPConfig": "model.config", "TextConfig": "model.config",
    "VisionConfig": "model.config", "CLIPProcessor": "model.processor", "HybridCLIP": "model.clip",
    "load_clip": "model.pretrained.convert", "save_clip": "model.pretrained.convert",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
