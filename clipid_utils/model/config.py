"""The configs of a hybrid CLIP, frozen dataclasses, and the presets of the course."""

import math
from dataclasses import dataclass

MAX_LOGIT_SCALE = math.log(100.0)  # Radford et al. 2021, section 2.5


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image tower; field names and defaults are ViT-B/32's."""

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    ln_pre: bool = True  # these three are CLIP's; ViT has no norm before its blocks, a bias in its patches, a pooler
    patch_bias: bool = False
    pooling: str = "class"  # the class token after ln_post, or "pooler": tanh(linear) of that

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower; field names and defaults are IndoBERT base's (`indobenchmark/indobert-base-p2`)."""

    vocab_size: int = 50000
    max_length: int = 512
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-12
    token_types: int = 2
    position_offset: int = 0  # 2 for RoBERTa: it counts positions from its padding's id + 1, and skips padding
    pooling: str = "pooler"  # tanh(linear) of the first token, or "mean" over the tokens that are not padding


@dataclass(frozen=True)
class CLIPConfig:
    """A whole hybrid CLIP; `logit_bias` is None for the softmax loss and a number for SigLIP's.

    Training starts with `logit_scale`, which stays at most `max_logit_scale`.
    """

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    embed_dim: int = 512
    logit_scale: float = math.log(1 / 0.07)
    logit_bias: float | None = None
    max_logit_scale: float = MAX_LOGIT_SCALE

    @classmethod
    def from_dict(cls, values: dict) -> "CLIPConfig":
        values = dict(values)
        return cls(vision=VisionConfig(**values.pop("vision")), text=TextConfig(**values.pop("text")), **values)


PRESETS = {
    "mini": CLIPConfig(
        vision=VisionConfig(image_size=48, patch_size=8, width=128, layers=4, heads=4, mlp_dim=512),
        text=TextConfig(vocab_size=4000, max_length=64, width=128, layers=2, heads=4, mlp_dim=512),
        embed_dim=128,
    ),
    "vit_b32_indobert_base": CLIPConfig(),
    "vit_b32_indobert_large": CLIPConfig(
        text=TextConfig(vocab_size=30522, width=1024, layers=24, heads=16, mlp_dim=4096)
    ),
    "vit_b32_indonesian_roberta_base": CLIPConfig(
        text=TextConfig(vocab_size=50265, max_length=512, norm_eps=1e-5, token_types=1, position_offset=2)
    ),
}
