"""CLIP for Bahasa Indonesia: the thin library under the course's notebooks."""

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import PRESETS, CLIPConfig, TextConfig, VisionConfig
from clipid_utils.model.pretrained.convert import load_clip, save_clip
from clipid_utils.model.processor import CLIPProcessor

__version__ = "0.1.0"
__all__ = [
    "PRESETS", "CLIPConfig", "CLIPProcessor", "HybridCLIP", "TextConfig", "VisionConfig", "load_clip", "save_clip",
]
