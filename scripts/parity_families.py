"""Compares today's families with PyTorch: at full size SigLIP 2, Meta CLIP 2, open_clip with XLM-R, and M-CLIP; as
tiny models CLIP, and dual encoders of ViT or CLIP with BERT, RoBERTa or XLM-R.

    make parity    # python scripts/parity_families.py [family …] [--out build/parity]; needs torch and transformers 5

Each family's folder has random weights and the files and names of its published checkpoints. load_clip or load_towers
opens it, and both sides run the same batch: vectors and logits. For two families every gradient is compared. For these
and the tiny models the way back is tested too: transformers' own class opens the export of save_clip. open_clip and
multilingual-clip are not needed: their models are written here, with transformers' towers
(tests/golden/record_families.py recorded small ones of their own).

Prints a table and writes families.json to --out. The exit status is 1 if one of its limits is exceeded.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from flax import nnx
from parity import FORGOTTEN, FURTHER, LIMITS, Row, processor_for, row, to_torch
from safetensors.torch import save_file
from transformers.initialization import no_init_weights

from clipid_utils import CLIPProcessor, HybridCLIP, load_clip, load_towers, save_clip
from clipid_utils.model.pretrained.keys import TRANSFORMS, key_table
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.training.loss import clip_loss, siglip_loss

BATCH = 3
OUTPUTS = {"image": "image_embeds", "text": "text_embeds", "logits": "logits_per_image"}
LOGITS = 1e-4  # at scales of 100 and more; unit vectors and gradients have the limits of parity.py
LARGE_SCALE = 4.6052  # ln 100, where most published models end
ROBERTA = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
XLM_R = {"vocab_size": 250002, "max_position_embeddings": 514, **ROBERTA}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_VISION = {**TINY, "image_size": 32, "patch_size": 8}
TINY_TEXT = {**TINY, "vocab_size": 90, "max_position_embeddings": 20}
Batch = dict[str, np.ndarray]


# torch

def drawn(model: torch.nn.Module, **numbers: float) -> torch.nn.Module:
    """Random weights with which attention is not uniform and every bias and norm matters; `numbers` sets scalars."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if last in numbers:
                weight.fill_(numbers[last])
            elif weight.ndim == 1:
                weight.normal_(0, 0.1).add_(last == "weight")  # the norms' are near 1
            elif isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Embedding) or last == "probe":
                weight.normal_(0, 0.5)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5)  # outputs as large as inputs
    return model.eval()


def siglip2() -> torch.nn.Module:
    """B/16 at 224 pixels; its scale exceeds 100. Its bias is -1, not -17, so that negatives have gradients too."""
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config={"vocab_size": 256000}, vision_config={}))
    return drawn(model, logit_scale=4.73, logit_bias=-1.0)


def metaclip2(vision: dict, text: dict, embed_dim: int) -> torch.nn.Module:
    text = {"vocab_size": 901629, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2} | text
    config = transformers.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=embed_dim)
    return drawn(transformers.MetaClip2Model(config), logit_scale=LARGE_SCALE)


def metaclip2_s16() -> torch.nn.Module:
    """Its size but for the vocabulary: 50,000 tokens, to save minutes. B/32 has all of them."""
    small = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "hidden_act": "gelu"}
    return metaclip2(small | {"patch_size": 16}, small | {"vocab_size": 50000}, 384)


def tiny_clip(end: int) -> torch.nn.Module:
    """With 2 for the end of a text, as in configs of before 2023, the largest id is the end."""
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": end}
    config = transformers.CLIPConfig(text_config=TINY_TEXT | ids, vision_config=TINY_VISION, projection_dim=24)
    return drawn(transformers.CLIPModel(config), logit_scale=LARGE_SCALE)


def tiny_dual_encoder(vision: str, text: str, **sizes: Any) -> torch.nn.Module:
    """`vision` and `text` are the names of transformers' configs."""
    vision, text = getattr(transformers, vision)(**TINY_VISION), getattr(transformers, text)(**TINY_TEXT, **sizes)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=24)
    return drawn(transformers.VisionTextDualEncoderModel(config), logit_scale=LARGE_SCALE)


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def whole(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    image, text = unit(image), unit(text)
    return {"image_embeds": image, "text_embeds": text, "logits_per_image": scale.exp() * image @ text.T}


class OpenClip(torch.nn.Module):
    """xlm-roberta-base-ViT-B-32 of open_clip: the mean of XLM-R's tokens, and two matrices with a GELU between them."""

    def __init__(self):
        super().__init__()
        self.image = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(hidden_act="gelu", projection_dim=512))
        self.transformer = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**XLM_R), add_pooling_layer=False)
        matrices = (torch.nn.Linear(*sizes, bias=False) for sizes in ((768, 640), (640, 512)))
        self.proj = torch.nn.Sequential(next(matrices), torch.nn.GELU(), next(matrices))
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values, input_ids, attention_mask):
        hidden = self.transformer(input_ids, attention_mask).last_hidden_state
        return whole(self.image(pixel_values).image_embeds, self.proj(mean(hidden, attention_mask)), self.logit_scale)

    def save_pretrained(self, folder: Path) -> None:
        self.transformer.config.save_pretrained(folder / "xlm-roberta-base")
        text = {"hf_model_name": str(folder / "xlm-roberta-base"), "hf_tokenizer_name": "xlm-roberta-base",
                "hf_pooler_type": "mean_pooler", "proj": "mlp"}
        vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
        config = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        tensors = {f"text.{name}": weight for name, weight in self.state_dict().items()
                   if name.startswith(("transformer.", "proj."))}
        tensors |= open_clip_image_names(self.image.state_dict()) | {"logit_scale": self.logit_scale.detach()}
        save_file(tensors, folder / "open_clip_model.safetensors")


def open_clip_image_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arrays of transformers' CLIP image tower, as open_clip has them."""
    found = {"visual.proj": state["visual_projection.weight"].T.contiguous()}
    names = {"embeddings.class_embedding": "class_embedding", "embeddings.position_embedding.weight":
             "positional_embedding", "embeddings.patch_embedding": "conv1", "pre_layrnorm": "ln_pre", "post_layernorm":
             "ln_post", "encoder.layers": "transformer.resblocks", "self_attn": "attn", "layer_norm1": "ln_1",
             "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for name, weight in state.items():
        if name == "visual_projection.weight" or re.search(r"[kv]_proj|position_ids", name):
            continue
        if "q_proj" in name:
            weight = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("q_proj.", "in_proj_")
        for theirs, open_clips in names.items():
            name = name.replace(theirs, open_clips)
        found[name.replace("vision_model", "visual")] = weight
    return found


class MClip(torch.nn.Module):
    """XLM-Roberta-Large-Vit-B-32 of multilingual-clip, and the whole CLIP whose image tower it was made for."""

    def __init__(self):
        super().__init__()
        config = transformers.XLMRobertaConfig(**XLM_R, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                               intermediate_size=4096)
        self.text = torch.nn.ModuleDict({"transformer": transformers.XLMRobertaModel(config),
                                         "LinearTransformation": torch.nn.Linear(1024, 512)})
        self.clip = transformers.CLIPModel(transformers.CLIPConfig(text_config={}, vision_config={}))

    def forward(self, pixel_values, input_ids, attention_mask):
        hidden = self.text["transformer"](input_ids, attention_mask).last_hidden_state
        text = self.text["LinearTransformation"](mean(hidden, attention_mask))
        return whole(self.clip.get_image_features(pixel_values).pooler_output, text, self.clip.logit_scale)

    def save_pretrained(self, folder: Path) -> None:
        self.clip.save_pretrained(folder / "image")
        self.text["transformer"].config.save_pretrained(folder / "xlm-roberta-large")
        processor_for("clip_bert").save(folder / "text")  # load_towers needs a tokenizer
        config = {"architectures": ["MultilingualCLIP"], "model_type": "M-CLIP", "numDims": 512,
                  "modelBase": str(folder / "xlm-roberta-large"), "transformerDimensions": 1024}
        (folder / "text/config.json").write_text(json.dumps(config))
        torch.save(self.text.state_dict(), folder / "text/pytorch_model.bin")


class Family(NamedTuple):
    """A model, how its texts look, and how it is opened. With a loss gradients are compared.

    `exported` says whether the export is compared too: it has a class of transformers.
    """

    model: Callable[[], torch.nn.Module]
    vocab_size: int
    tokens: int
    end: int | None = None  # the id at the end of each text
    masked: bool = True
    opened: Callable[[Path], tuple[HybridCLIP, CLIPProcessor]] = load_clip
    loss: Callable[..., jax.Array] | None = None
    exported: bool = False
    size: int = 224  # of a picture

    def batch(self) -> Batch:
        """Texts of different lengths. Without a mask padding is read too, and there is no other."""
        rng = np.random.default_rng(1)
        lengths = np.linspace(self.tokens, 3, BATCH).astype(int)
        mask = (np.arange(self.tokens) < lengths[:, None]).astype(np.int32)
        ids = np.where(mask == 1, rng.integers(5, self.vocab_size, mask.shape), int(self.masked)).astype(np.int32)
        if self.end is not None:
            ids[np.arange(BATCH), lengths - 1] = self.end
        pixels = rng.standard_normal((BATCH, self.size, self.size, 3), dtype=np.float32)
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


FAMILIES = {
    "siglip2_b16": Family(siglip2, 256000, 64, masked=False, loss=siglip_loss, exported=True),
    "metaclip2_s16": Family(metaclip2_s16, 50000, 77, end=2, loss=clip_loss, exported=True),
    "metaclip2_b32": Family(lambda: metaclip2({}, {}, 512), 901629, 77, end=2),
    "open_clip_xlm_r_b32": Family(lambda: drawn(OpenClip(), logit_scale=LARGE_SCALE), 250002, 77, end=2),
    "m_clip_xlm_r_large_b32": Family(
        lambda: drawn(MClip(), logit_scale=LARGE_SCALE), 250002, 77, end=2,
        opened=lambda folder: load_towers(vision=folder / "image", text=folder / "text")),
    **{f"tiny_{name}": Family(model, 89, 18, end=89, exported=True, size=32) for name, model in {
        "clip": lambda: tiny_clip(89),
        "clip_2022": lambda: tiny_clip(2),
        "vit_bert": lambda: tiny_dual_encoder("ViTConfig", "BertConfig", pad_token_id=1),
        "clip_roberta": lambda: tiny_dual_encoder("CLIPVisionConfig", "RobertaConfig", **ROBERTA),
        "clip_xlm_r": lambda: tiny_dual_encoder("CLIPVisionConfig", "XLMRobertaConfig", **ROBERTA)}.items()},
}


def forward(model: torch.nn.Module, family: Family, batch: Batch, dtype=torch.float32, **options: Any):
    inputs = to_torch(batch, dtype)
    if not family.masked:
        del inputs["attention_mask"]
    return model(**inputs, **options)


def their_outputs(model: torch.nn.Module, family: Family, batch: Batch) -> dict[str, np.ndarray]:
    with torch.no_grad():
        out = forward(model, family, batch)
    return {part: out[name].numpy() for part, name in OUTPUTS.items()}


def their_gradients(model: torch.nn.Module, family: Family, batch: Batch, names=None, dtype=torch.float32):
    """The gradients of transformers' loss for the weights with these `names`, by default all."""
    model.to(dtype).zero_grad(set_to_none=True)
    for name, weight in model.named_parameters():
        weight.requires_grad_(names is None or name in names)
    forward(model, family, batch, dtype, return_loss=True).loss.backward()
    return {name: weight.grad.numpy() for name, weight in model.named_parameters() if weight.grad is not None}


# Ours

def our_outputs(model: HybridCLIP, batch: Batch) -> dict[str, np.ndarray]:
    out = nnx.jit(lambda model: model(**batch))(model)
    return {part: np.asarray(getattr(out, name)) for part, name in OUTPUTS.items()}


def our_gradients(model: HybridCLIP, family: Family, batch: Batch) -> dict[str, np.ndarray]:
    """Under the files' names and in torch's shapes, by the key table; an array can be that of several parameters."""
    graph, params = nnx.split(model, nnx.Param)

    def loss(params):
        model = nnx.merge(graph, params)
        bias = () if model.logit_bias is None else (model.logit_bias[...],)
        image_embeds = model.encode_image(batch["pixel_values"])
        text_embeds = model.encode_text(batch["input_ids"], batch["attention_mask"])
        return family.loss(image_embeds, text_embeds, model.scale(), *bias)

    arrays, parts = flatten_params(jax.jit(jax.grad(loss))(params)), {}
    for key in key_table(model.config):
        array = TRANSFORMS[key.transform].to_torch(np.asarray(arrays.pop(key.nnx_path)), model.config.vision)
        parts.setdefault(key.hf_name, []).append(array)
    assert not arrays, f"not in the key table: {', '.join(arrays)}"
    return {name: found[0] if len(found) == 1 else np.concatenate(found) for name, found in parts.items()}


# Comparing

def compare_gradients(name: str, model: torch.nn.Module, family: Family, batch: Batch, ours: dict[str, np.ndarray]
                      ) -> tuple[list[Row], list[Row]]:
    """The weights within the limit, with torch's float32 in place of float64, and the others, measured with both.

    The model is float64 afterwards, to spare memory.
    """
    theirs = their_gradients(model, family, batch)
    assert ours.keys() == theirs.keys(), f"keys of one side only: {sorted(ours.keys() ^ theirs.keys())}"
    rows = [row(name, "gradients", key, ours[key], theirs[key], theirs[key]) for key in ours]
    others = {r.name: (ours[r.name], theirs[r.name]) for r in rows if not r.passes()}
    ours.clear()
    theirs.clear()
    exact = their_gradients(model, family, batch, others, torch.float64) if others else {}
    return [r for r in rows if r.name not in others], [
        row(name, "gradients", key, *both, exact[key]) for key, both in others.items()]


def check_export(model: HybridCLIP, processor: CLIPProcessor, folder: Path, source: torch.nn.Module, family: Family,
                 batch: Batch, expected: dict[str, np.ndarray]) -> list[str]:
    """Saves for transformers, opens it with the class of the source, and compares. Returns what is wrong, in words."""
    save_clip(model, processor, folder, format="transformers")
    exported, told = type(source).from_pretrained(folder, output_loading_info=True)
    wrong = [f"transformers reports problems with the export: {told}"] if any(told.values()) else []
    state = exported.state_dict()
    wrong += [f"{key} was changed on the way" for key, weight in source.state_dict().items()
              if not torch.equal(state[key], weight)]
    for part, found in their_outputs(exported.eval(), family, batch).items():
        if not (error := float(np.abs(found - expected[part]).max())) <= LIMITS["outputs"]:
            wrong.append(f"{part} of the exported model differ by {error:.1e}")
    return wrong


class Found(NamedTuple):
    family: str
    millions: float  # of parameters
    scale: float
    image: float  # the largest errors
    text: float
    logits: float
    gradients: float | None  # relative to the largest number of the array, of the `within` arrays in the limit
    within: int
    further: list[dict]  # arrays that exceed it, measured against float64
    wrong: list[str]


def run(name: str, folder: Path) -> Found:
    family = FAMILIES[name]
    with no_init_weights():
        model = family.model()
    batch = family.batch()
    model.save_pretrained(folder / "theirs")
    mine, processor = family.opened(folder / "theirs")
    shutil.rmtree(folder / "theirs")
    expected, found = their_outputs(model, family, batch), our_outputs(mine, batch)
    errors = {part: float(np.abs(found[part] - expected[part]).max()) for part in OUTPUTS}
    wrong = [f"{part} differ by {error:.1e}" for part, error in errors.items()
             if not error <= (LOGITS if part == "logits" else LIMITS["outputs"])]
    millions = sum(array.size for array in flatten_params(nnx.state(mine, nnx.Param)).values()) / 1e6
    scale = float(mine.scale())
    within, further = [], []
    if family.exported:
        wrong += check_export(mine, processor, folder / "export", model, family, batch, expected)
        shutil.rmtree(folder / "export")
    if family.loss is not None:
        gradients = our_gradients(mine, family, batch)
        del mine
        within, further = compare_gradients(name, model, family, batch, gradients)
        wrong += [f"gradient of {r.name}: {r.error:.1e}, {r.relative:.1e} of the largest" for r in further
                  if not r.passes()]
    largest = max((r.relative for r in within if not r.name.endswith(FORGOTTEN)), default=None)
    return Found(name, millions, scale, **errors, gradients=largest, within=len(within),
                 further=[r._asdict() for r in further], wrong=wrong)


def print_table(found: list[Found]) -> None:
    print(f"{'family':24} {'millions':>8} {'scale':>6} {'image':>8} {'text':>8} {'logits':>8} {'gradients':>9}")
    for f in found:
        errors = " ".join(f"{error:8.1e}" for error in (f.image, f.text, f.logits))
        gradients = "not compared" if f.gradients is None else f"{f.gradients:9.1e}"
        print(f"{f.family:24} {f.millions:8.1f} {f.scale:6.1f} {errors} {gradients}")
    for f in found:
        if f.gradients is not None:
            print(f"{f.family}: {f.within} of {f.within + len(f.further)} gradients within {LIMITS['gradients']:.0e}")
        for r in f.further:
            print(f"    {r['name']}: largest {r['largest']:.1e}, from float64 ours {r['error_of_ours']:.1e}, torch's "
                  f"{r['error_of_torch']:.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("build/parity"))
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it warns of its own default configs
    found = []
    for name in arguments.families or FAMILIES:
        print(f"--- {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(name, Path(folder)))
    print_table(found)
    arguments.out.mkdir(parents=True, exist_ok=True)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, jax, np)}
    limits = {"unit vectors": LIMITS["outputs"], "logits": LOGITS, "gradients": LIMITS["gradients"], "further": FURTHER}
    results = {"versions": versions, "limits": limits, "families": [f._asdict() for f in found]}
    (arguments.out / "families.json").write_text(json.dumps(results, indent=1) + "\n")
    wrong = [f"{f.family}: {text}" for f in found for text in f.wrong]
    print("\n".join(wrong) or f"all within the limits; {arguments.out}/families.json has the numbers")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
