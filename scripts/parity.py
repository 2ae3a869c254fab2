"""Compares the model with PyTorch at full size: every stage and every gradient, one Hugging Face key after the other.

    make parity    # python scripts/parity.py [pair …] [--out build/parity]; needs torch and transformers 5

For each pair of towers, save_pretrained writes a VisionTextDualEncoderModel of transformers with random weights, and
load_clip reads it. Both sides run the same batch, forward and backward through the contrastive loss. torch also runs it
in float64, which shows the rounding of each side: two float32 programs that add in different orders agree no better
than each agrees with the exact value. Then it tests the way back: transformers' own model and processor, and load_clip,
open the export of save_clip.

Writes parity.json and parity.csv (the key table with its errors) to --out. The exit status is 1 if a limit below is
exceeded.
"""

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
import transformers
from flax import nnx
from PIL import Image
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import RobertaProcessing

from clipid_utils import CLIPProcessor, HybridCLIP, load_clip, save_clip
from clipid_utils.model.pretrained.keys import TRANSFORMS, key_table
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.model.processor import train_wordpiece
from clipid_utils.training.loss import clip_loss

PAIRS = {  # the sizes of openai/clip-vit-base-patch32 with those of BERT base and of RoBERTa base
    "clip_bert": (transformers.CLIPVisionConfig, transformers.BertConfig, {}),
    "clip_roberta": (transformers.CLIPVisionConfig, transformers.RobertaConfig, {
        "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
}
BATCH, TOKENS = 4, 16
CAPTIONS = ["seekor kucing tidur di atas meja", "sebuah mobil merah", "anak-anak bermain bola", "gunung dan laut biru"]
# Unit vectors, logits and features are compared absolutely; hidden states and gradients relative to the largest number
# of the array. A gradient is a sum over every token of the batch through 24 layers, with rounding of 1e-6 to 1e-5
# in float32: rounding never exceeds 1e-4, and a wrong term always does. With random weights the last text layers attend
# to all tokens equally, so the gradients of their queries and keys are ten thousand times smaller than the others.
# float32 has few digits left there, in torch too, and ours may be FURTHER times as far from float64 as torch's.
FURTHER = 4
LIMITS = {"outputs": 1e-5, "hidden states": 1e-5, "gradients": 1e-4}
FORGOTTEN = "key.bias", "k_proj.bias"  # softmax ignores them: their gradient is 0, plus rounding


class Side(NamedTuple):
    """The results of one program for the batch."""

    stages: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


# torch

def random_dual_encoder(pair: str) -> torch.nn.Module:
    """Random weights as transformers draws them, also for biases and norms, so that a forgotten one shows."""
    vision, text, sizes = PAIRS[pair]
    torch.manual_seed(0)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision(), text(**sizes))
    model = transformers.VisionTextDualEncoderModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * (0.1 if name.endswith("weight") else 0.05))
            elif weight.ndim == 2 and "embedding" not in name:
                weight.mul_(2)  # with a deviation of 0.02 attention would be nearly uniform
    return model.eval()


def random_batch(vocab_size: int, pad: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    lengths = np.linspace(TOKENS, 3, BATCH).astype(int)
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int32)
    ids = np.where(mask == 1, rng.integers(5, vocab_size, mask.shape), pad).astype(np.int32)
    pixels = rng.standard_normal((BATCH, 224, 224, 3), dtype=np.float32)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


def to_torch(batch: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    pixels = torch.from_numpy(batch["pixel_values"].transpose(0, 3, 1, 2).copy()).to(dtype)
    return {"pixel_values": pixels} | {
        key: torch.from_numpy(value).long() for key, value in batch.items() if key != "pixel_values"}


def theirs(model: torch.nn.Module, batch: dict[str, np.ndarray], dtype: torch.dtype) -> Side:
    model.to(dtype).zero_grad(set_to_none=True)
    out = model(**to_torch(batch, dtype), return_loss=True, output_hidden_states=True)
    out.loss.backward()
    stages = {f"image hidden {i}": state for i, state in enumerate(out.vision_model_output.hidden_states)}
    stages |= {f"text hidden {i}": state for i, state in enumerate(out.text_model_output.hidden_states)}
    stages |= {"image features": model.visual_projection(out.vision_model_output.pooler_output),
               "text features": model.text_projection(out.text_model_output.pooler_output)}
    stages |= {name: out[name] for name in ("image_embeds", "text_embeds", "logits_per_image", "loss")}
    gradients = {name: weight.grad.numpy() for name, weight in model.named_parameters() if weight.grad is not None}
    return Side({name: stage.detach().numpy() for name, stage in stages.items()}, gradients)


# Ours

def stages_of(model: HybridCLIP, pixel_values, input_ids, attention_mask) -> dict[str, jax.Array]:
    vision, text = model.vision, model.text
    blocks, vision.blocks = vision.blocks, type(vision.blocks)([])
    image, words = [vision.tokens(pixel_values)], [text.embeddings(input_ids)]
    vision.blocks = blocks
    for block in vision.blocks:
        image.append(block(image[-1]))
    for block in text.blocks:
        words.append(block(words[-1], attention_mask.astype(bool)[:, None, :]))
    out = model(pixel_values, input_ids, attention_mask)
    stages = {f"image hidden {i}": state for i, state in enumerate(image)}
    stages |= {f"text hidden {i}": state for i, state in enumerate(words)}
    stages |= {"image features": vision(pixel_values), "text features": text(input_ids, attention_mask)}
    stages |= {name: getattr(out, name) for name in ("image_embeds", "text_embeds", "logits_per_image")}
    return stages | {"loss": clip_loss(out.image_embeds, out.text_embeds, model.scale())}


def ours(model: HybridCLIP, batch: dict[str, np.ndarray]) -> Side:
    """Gradients under Hugging Face's names and in torch's shapes, by the key table."""
    graph, params = nnx.split(model, nnx.Param)

    def loss(params):
        model = nnx.merge(graph, params)
        image_embeds = model.encode_image(batch["pixel_values"])
        text_embeds = model.encode_text(batch["input_ids"], batch["attention_mask"])
        return clip_loss(image_embeds, text_embeds, model.scale())

    stages = jax.jit(lambda params: stages_of(nnx.merge(graph, params), **batch))(params)
    return Side({name: np.asarray(stage) for name, stage in stages.items()},
                by_hf_name(model, flatten_params(jax.jit(jax.grad(loss))(params))))


def by_hf_name(model: HybridCLIP, arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    table = key_table(model.config)
    assert {key.nnx_path for key in table} == arrays.keys()
    return {key.hf_name: TRANSFORMS[key.transform].to_torch(np.asarray(arrays[key.nnx_path]), model.config.vision)
            for key in table}


# Comparing

class Row(NamedTuple):
    """One array: the largest number in it, and the largest differences."""

    pair: str
    kind: str
    name: str
    largest: float
    error: float  # ours from torch's
    relative: float
    error_of_ours: float  # from float64
    error_of_torch: float  # from float64

    def passes(self) -> bool:
        if self.kind == "gradients":
            rounding = self.name.endswith(FORGOTTEN) and self.error < 1e-7
            as_torch = self.error_of_ours <= FURTHER * self.error_of_torch
            limit = LIMITS[self.kind] * (10 if self.name == "logit_scale" else 1)  # a single sum of terms of both signs
            return rounding or as_torch or self.relative <= limit
        return (self.relative if self.kind == "hidden states" else self.error) <= LIMITS[self.kind]


def compare(pair: str, sides: tuple[Side, Side, Side], mask: np.ndarray) -> Iterator[Row]:
    ours, theirs, exact = sides
    assert ours.stages.keys() == theirs.stages.keys() and ours.gradients.keys() == theirs.gradients.keys()
    for name in ours.stages:
        kind = "hidden states" if "hidden" in name else "outputs"
        used = mask.astype(bool) if "text hidden" in name else ...  # values at padded places are never used
        yield row(pair, kind, name, *(side.stages[name][used] for side in sides))
    for name in ours.gradients:
        yield row(pair, "gradients", name, *(side.gradients[name] for side in sides))


def row(pair: str, kind: str, name: str, ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray) -> Row:
    assert ours.shape == theirs.shape, f"{name}: {ours.shape} and {theirs.shape}"
    largest, error = float(np.abs(exact).max()), float(np.abs(ours - theirs).max())
    from_exact = (float(np.abs(side - exact).max()) for side in (ours, theirs))
    return Row(pair, kind, name, largest, error, error / largest if largest else error, *from_exact)


def print_table(rows: list[Row]) -> None:
    print(f"{'':72} {'largest':>9} {'error':>9} {'relative':>9} {'ours-f64':>9} {'torch-f64':>9}")
    for r in rows:
        numbers = (r.largest, r.error, r.relative, r.error_of_ours, r.error_of_torch)
        print(f"{r.name:72} {' '.join(f'{number:9.1e}' for number in numbers)}{'' if r.passes() else '  TOO LARGE'}")


def summary(rows: list[Row]) -> None:
    for kind, limit in LIMITS.items():
        some = [r for r in rows if r.kind == kind and not r.name.endswith(FORGOTTEN)]
        measure: Callable[[Row], float] = (lambda r: r.error) if kind == "outputs" else (lambda r: r.relative)
        worst = max([r for r in some if kind != "gradients" or r.largest > 1e-4], key=measure)
        nearer = sum(r.error_of_ours <= r.error_of_torch for r in some)
        print(f"{worst.pair}, {kind}: at most {measure(worst):.1e} (limit {limit:.0e}) at {worst.name}"
              f"{' of those that exceed 1e-4' if kind == 'gradients' else ''}; "
              f"{nearer} of {len(some)} nearer to float64 than torch")


# The way out

def processor_for(pair: str) -> CLIPProcessor:
    if pair == "clip_bert":
        return CLIPProcessor(train_wordpiece(CAPTIONS, 300), 224, 512)
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(CAPTIONS, 400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer = Tokenizer.from_str(learner.to_str())
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    return CLIPProcessor(tokenizer, 224, 512, special_tokens={f"{key}_token": name for key, name in names.items()})


def check_export(pair: str, folder: Path, model: HybridCLIP, source: dict[str, torch.Tensor]) -> list[str]:
    """Saves for transformers, opens it with transformers, and compares. Returns what is wrong, in words."""
    processor = processor_for(pair)
    save_clip(model, processor, folder, format="vision-text-dual-encoder")
    wrong = []
    again, _ = load_clip(folder)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(again, nnx.Param), nnx.state(model, nnx.Param))
    if not all(jax.tree.leaves(same)):
        wrong.append("load_clip does not read back the parameters that save_clip was given")
    del again
    exported, told = transformers.VisionTextDualEncoderModel.from_pretrained(folder, output_loading_info=True)
    if any(told.values()):
        wrong.append(f"transformers reports problems with the export: {told}")
    state = exported.state_dict()
    wrong += [f"{key} was changed on the way" for key in source if not torch.equal(state[key], source[key])]
    their_processor = transformers.VisionTextDualEncoderProcessor.from_pretrained(folder)
    pictures = [Image.effect_mandelbrot((300 + 50 * i, 260), (-3, -2.5, 2, 2.5), 20 + i) for i in range(len(CAPTIONS))]
    mine = processor(images=pictures, text=CAPTIONS)
    other = their_processor(images=[picture.convert("RGB") for picture in pictures], text=CAPTIONS, return_tensors="pt",
                            padding=True)
    for key in ("input_ids", "attention_mask"):
        if not np.array_equal(mine[key], other[key].numpy()):
            wrong.append(f"the exported processor makes different {key}")
    with torch.no_grad():
        out = exported.eval()(**{key: other[key] for key in ("pixel_values", "input_ids", "attention_mask")})
    jitted = nnx.jit(lambda model, batch: model(**batch))(model, mine)
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        error = float(np.abs(np.asarray(getattr(jitted, name)) - out[name].numpy()).max())
        print(f"{pair}, exported and opened by transformers: {name} differ by at most {error:.1e}")
        if not error <= LIMITS["outputs"]:
            wrong.append(f"the exported model's {name} differ by {error:.1e}")
    return wrong


def run(pair: str, folder: Path) -> tuple[list[Row], list[str]]:
    print(f"--- {pair}", flush=True)
    model = random_dual_encoder(pair)
    model.save_pretrained(folder / "theirs")
    batch = random_batch(model.config.text_config.vocab_size, model.config.text_config.pad_token_id)
    single = theirs(model, batch, torch.float32)
    source = {name: weight.clone() for name, weight in model.state_dict().items()}
    exact = theirs(model, batch, torch.float64)
    del model
    mine, _ = load_clip(folder / "theirs")
    rows = list(compare(pair, (ours(mine, batch), single, exact), batch["attention_mask"]))
    print_table(rows)
    return rows, check_export(pair, folder / "export", mine, source)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", metavar="pair", help=f"of {', '.join(PAIRS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("build/parity"))
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    wrong: list[str] = []
    for pair in arguments.pairs or PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            its_rows, its_wrong = run(pair, Path(folder))
        rows, wrong = rows + its_rows, wrong + [f"{pair}: {text}" for text in its_wrong]
    for pair in dict.fromkeys(r.pair for r in rows):
        summary([r for r in rows if r.pair == pair])
    wrong += [f"{r.pair}: {r.kind}, {r.name}: {r.error:.1e}, {r.relative:.1e} of the largest" for r in rows
              if not r.passes()]
    write(rows, wrong, arguments.out)
    print("\n".join(wrong) or f"all within the limits; {arguments.out}/parity.csv has the table")
    return int(bool(wrong))


def write(rows: list[Row], wrong: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, jax, np)}
    found = {"versions": versions, "limits": LIMITS, "wrong": wrong, "rows": [r._asdict() for r in rows]}
    (folder / "parity.json").write_text(json.dumps(found, indent=1) + "\n")
    with open(folder / "parity.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(Row._fields)
        table.writerows([f"{value:.2e}" if isinstance(value, float) else value for value in r] for r in rows)


if __name__ == "__main__":
    sys.exit(main())
