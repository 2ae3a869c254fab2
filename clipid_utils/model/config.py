"""The configs of a hybrid CLIP, frozen dataclasses, and the presets of the course."""

import math
from dataclasses import dataclass, field

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
    pooling: str = "class"  # the class token after ln_post; "pooler": tanh(linear) of that; "attention": SigLIP's head
    # Not in the repr, which is part of a model's fingerprint, so that older models keep theirs
    class_token: bool = field(default=True, repr=False)
    layer_scale: bool = field(default=False, repr=False)  # DINOv2 multiplies the output of each branch by a vector
    projection: str = field(default="linear", repr=False)  # a form of layers.projection

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


# EfficientNet-Lite0's stages: repeats, kernel, stride, expansion, channels in, channels out (Tan & Le 2019, table 1)
LITE_STAGES = (
    (1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112), (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320),
)  # fmt: skip


@dataclass(frozen=True)
class EfficientNetConfig:
    """Sizes of an EfficientNet-Lite image tower with its classifier; the defaults are Lite0's.

    `class_scale` multiplies the classifier's logits before the softmax: below 1 more classes take part.
    """

    image_size: int = 224
    width_factor: float = 1.0
    depth_factor: float = 1.0
    width: int = 1280
    classes: int = 1000
    class_scale: float = 1.0
    stem: int = 32

    @property
    def grid(self) -> int:
        """Cells of the last feature map along one side."""
        return -(-self.image_size // 32)

    @property
    def blocks(self) -> list[tuple[int, int, int, int, int]]:
        """Kernel, stride, expansion, channels in and channels out of each block."""
        blocks, last = [], len(LITE_STAGES) - 1
        for stage, (repeats, kernel, stride, expansion, d_in, d_out) in enumerate(LITE_STAGES):
            d_in, d_out = (self.stem if stage == 0 else self._channels(d_in)), self._channels(d_out)
            repeats = repeats if stage in (0, last) else math.ceil(repeats * self.depth_factor)
            blocks.append((kernel, stride, expansion, d_in, d_out))
            blocks += [(kernel, 1, expansion, d_out, d_out)] * (repeats - 1)
        return blocks

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def _channels(self, count: int) -> int:
        """The scaled number of channels: a multiple of 8, and not more than a tenth too small."""
        scaled = count * self.width_factor
        rounded = max(8, int(scaled + 4) // 8 * 8)
        return rounded if rounded >= 0.9 * scaled else rounded + 8


@dataclass(frozen=True)
class Rotary:
    """ModernBERT's positions and attention (Warner et al. 2024), in place of a table of positions.

    Layer k attends to all tokens if `layers[k]` is "global", and to at most `window` tokens on each side if it is
    "local". `global_theta` and `local_theta` are the bases of the two kinds' wavelengths (Su et al. 2021).
    """

    layers: tuple[str, ...]
    window: int = 64
    global_theta: float = 160_000.0
    local_theta: float = 10_000.0


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
    # "pooler": tanh(linear) of the first token; "first" token; "last" place; "mean" of the tokens that are not padding;
    # "end": the first place with the id `end_id`, or with the text's largest id if that is None
    pooling: str = "pooler"
    # Not in the repr, as above
    normalize_pooled: bool = field(default=False, repr=False)  # unit length before the projection, like e5
    classes: int = field(default=0, repr=False)  # if not 0, the projection goes through classes (layers.ClassMixture)
    class_scale: float = field(default=1.0, repr=False)
    pre_norm: bool = field(default=False, repr=False)  # CLIP and SigLIP: norms before each part, and one at the end
    mask: str = field(default="padding", repr=False)  # "causal" hides later tokens too; "none" hides nothing: texts
    end_id: int | None = field(default=None, repr=False)  # have exactly `max_length` tokens then, with padding
    projection: str = field(default="linear", repr=False)
    rotary: Rotary | None = field(default=None, repr=False)


@dataclass(frozen=True)
class CLIPConfig:
    """A whole hybrid CLIP; `logit_bias` is None for the softmax loss and a number for SigLIP's.

    Training starts with `logit_scale`, which stays at most `max_logit_scale`.
    """

    vision: VisionConfig | EfficientNetConfig = VisionConfig()
    text: TextConfig = TextConfig()
    embed_dim: int = 512
    logit_scale: float = math.log(1 / 0.07)
    logit_bias: float | None = None
    max_logit_scale: float = MAX_LOGIT_SCALE

    @classmethod
    def from_dict(cls, values: dict) -> "CLIPConfig":
        values = dict(values)
        vision = values.pop("vision")
        tower = EfficientNetConfig if "classes" in vision else VisionConfig
        text = dict(values.pop("text"))
        if rotary := text.get("rotary"):
            text["rotary"] = Rotary(**{**rotary, "layers": tuple(rotary["layers"])})
        return cls(vision=tower(**vision), text=TextConfig(**text), **values)


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
