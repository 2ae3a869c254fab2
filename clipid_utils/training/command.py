"""`python -m clipid_utils train`: whole runs by name, each a frozen dataclass whose fields are the command's options.

The two `ancestor-…` recipes are the runs of 2021 (galuhsahid/clip-indonesian) with their settings; what differs is
listed above `ANCESTOR`. `indobert-base`, `indobert-large` and `indonesian-roberta-base` train towers of that kind with
what is known today. No run of such a size has been made here.
"""

import dataclasses
import functools
import glob
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro
from datasets import Dataset, load_dataset

from clipid_utils.data.batches.loader import Feed, load_pairs, load_records, records_feed, stream_feed
from clipid_utils.data.captions import read_captions
from clipid_utils.data.dictionary.build import load_picture_dictionary
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.pretrained.load import load_clip
from clipid_utils.model.pretrained.save import save_clip
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.training.augment import AugmentConfig
from clipid_utils.training.distributed import jit_form, make_mesh, pmap_form, shard_map_form
from clipid_utils.training.features import cache_features
from clipid_utils.training.fit import FitConfig, fit
from clipid_utils.training.heads import ProjectionConfig, train_projections
from clipid_utils.training.log import RunLog
from clipid_utils.training.optimizers import adabelief, adamw, muon
from clipid_utils.training.recipes import MINI, SOURCE_SIZE, new_mini
from clipid_utils.training.run import check_same

FORMS = {"jit": jit_form, "shard_map": shard_map_form, "pmap": pmap_form}
OPTIMIZERS = {"adamw": adamw, "adabelief": adabelief, "muon": muon}
# What a run that goes on must not change: of these its weights are made. Devices, forms and sinks may be others.
FIXED = ("train", "validation", "validation_pictures", "vision", "text", "logit_scale", "stages", "dtype", "seed")


@dataclass(frozen=True)
class Stage:
    """One stage of a run: from the weights of the one before it, with its own schedule."""

    fit: FitConfig | None = None
    optimizer: Literal["adamw", "adabelief", "muon"] = "adamw"
    """AdaBelief, with adaptive clipping, was the ancestor's; Muon takes the matrices in the blocks, AdamW the rest."""
    features: ProjectionConfig | None = None
    """In place of fit: the towers frozen, their features computed once, the projections trained on them."""


@dataclass(frozen=True)
class Recipe:
    """A whole run of training."""

    out: Annotated[Path, tyro.conf.arg(help="the run's folder")]
    train: str = "dictionary"
    """Captions records (JSONL or Parquet), the picture dictionary, or, for stages without features, WebDataset tars
    ("shards/*.tar")."""
    validation: str | None = None
    """Captions records; the dictionary's own where it is trained on."""
    vision: str | None = "openai/clip-vit-base-patch32"
    """Folder or hub id of the image tower; none: a mini model with random weights."""
    text: str = "indobenchmark/indobert-base-p2"
    """Folder or hub id of the text tower."""
    logit_scale: float | None = None
    """Factor on the cosines to start from; none: CLIP's."""
    stages: tuple[Stage, ...] = ()
    """One after the other."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the towers compute in; parameters are float32."""
    form: Literal["jit", "shard_map", "pmap"] = "jit"
    """How the step runs on several devices."""
    shard: Literal["none", "data", "model"] = "none"
    """The mesh axis along which parameters are cut (jit alone; the optimizer's state is always cut along data)."""
    model_devices: int = 1
    """Devices along the mesh axis model."""
    hosts: bool = False
    """Several processes: calls jax.distributed.initialize(), which finds the others on a TPU pod or under Slurm."""
    workers: int = 0
    """Processes that decode the pictures of captions records; 0: threads."""
    validation_pictures: int = 2000
    """The most of the validation records that are measured on: the first ones."""
    samples: tuple[str, ...] = ("kucing", "gunung", "makanan", "orang di pantai")
    """Queries whose first pictures are kept at each evaluation."""
    seed: int = 0
    """Of all that is drawn: the order of the data, captions, augmentations, a mini model's first weights."""
    resume: bool = False
    """Go on with the run in the folder, if there is one."""
    tensorboard: bool = False
    """Curves and pictures for TensorBoard, in the folders of the stages."""
    wandb: str | None = None
    """Name of a Weights & Biases project."""


# The runs of 2021: 20 epochs of 8 x 64 pairs, of at most 96 tokens; AdaBelief, adaptive clipping at 0.01, no decay; a
# tenth of the steps to the peak, then a cosine to 0; the scale fixed at 20; first the projections, then all else too.
# What was a fault is not repeated: the loss sees the whole batch, not each device's part, RoBERTa's positions begin
# where they did in its pretraining, a flip does not make kiri and kanan false, and a resumed run is the same run. What
# else differs:
# - BERT's dropout of 0.1 was on, in both stages; here is none.
# - A random square of the picture became the middle one, a shear along both axes one along x, the grey (127) behind a
#   moved picture white, and a hue turned in HSV one turned in YIQ. Perspective, autocontrast and equalize are absent.
# - The text projection began at a standard deviation of 0.02; here at one over the root of the width.
# - Every 1,000 steps, in the second stage 500, the loss of the validation pairs was measured, and 5 checkpoints were
#   kept; here each epoch their recall, of the first of them (--validation-pictures), and 3. The log is as it was.
# - The second stage began at a checkpoint that was chosen by hand (its scripts name steps 40,000 and 71,000 of 477,000)
#   and ended with its last weights; here each ends with those of the best recall, where it is measured.
_ANCESTOR = FitConfig(
    epochs=20, batch_size=512, learning_rate=5e-5, weight_decay=0.0, warmup=0.1, clip_norm=0.01, caption_tokens=96,
    average_decay=0.0, evaluate_every=1, log_every=200, checkpoint_every=1000, trainable=("*.projection.*",),
    augmentation=AugmentConfig(degrees=15.0, shear=0.26, translate=0.1, scale=(0.8, 1.2), stretch=0.0, hue=0.1,
                               grey=0.0, brightness=0.0, contrast=0.0, saturation=0.0, shading=0.0),
)
ANCESTOR = (
    Stage(_ANCESTOR, "adabelief"),
    Stage(dataclasses.replace(_ANCESTOR, learning_rate=1e-5, trainable=("vision.*", "text.*"), log_every=100,
                              checkpoint_every=500), "adabelief"),
)
TODAY = (
    Stage(features=ProjectionConfig(batch_size=4096)),
    Stage(FitConfig(
        epochs=10, batch_size=4096, chunks=8, learning_rate=2e-4, weight_decay=0.1, layer_decay=0.8, caption_tokens=64,
        rates={"*.projection.*": 2.0}, evaluate_every=1, log_every=20, checkpoint_every=500,
    )),
)
_HERE = Path("runs")
RECIPES = {
    "mini": (
        "the shipped checkpoint's recipe: mini on the picture dictionary, from random weights",
        Recipe(_HERE / "mini", vision=None, stages=(Stage(dataclasses.replace(MINI, checkpoint_every=200), "muon"),)),
    ),
    "ancestor-indobert-large": (
        "the run of 2021: ViT-B/32 and IndoBERT large; frozen, then unfrozen",
        Recipe(_HERE / "ancestor-indobert-large", text="indobenchmark/indobert-large-p2", logit_scale=20.0,
               stages=ANCESTOR),
    ),
    "ancestor-indonesian-roberta": (
        "the run of 2021: ViT-B/32 and Indonesian RoBERTa base; frozen, then unfrozen",
        Recipe(_HERE / "ancestor-indonesian-roberta", text="flax-community/indonesian-roberta-base", logit_scale=20.0,
               stages=ANCESTOR),
    ),
    "indobert-base": (
        "today: ViT-B/32 and IndoBERT base; stage 1 on cached features, batches of 4,096, a learned scale, layer decay",
        Recipe(_HERE / "indobert-base", stages=TODAY, dtype="bfloat16"),
    ),
    "indobert-large": (
        "today: ViT-B/32 and IndoBERT large, as indobert-base",
        Recipe(_HERE / "indobert-large", text="indobenchmark/indobert-large-p2", stages=TODAY, dtype="bfloat16"),
    ),
    "indonesian-roberta-base": (
        "today: ViT-B/32 and Indonesian RoBERTa base, as indobert-base",
        Recipe(_HERE / "indonesian-roberta-base", text="flax-community/indonesian-roberta-base", stages=TODAY,
               dtype="bfloat16"),
    ),
}


def start(recipe: Recipe, pictures: Dataset | None) -> tuple[HybridCLIP, CLIPProcessor]:
    """The model that the first stage starts from, and its processor."""
    if recipe.vision is None:
        if pictures is None:
            raise ValueError("a mini model learns its tokenizer from the picture dictionary: name the towers with "
                             "--vision and --text to train on other data")
        model, processor = new_mini(load_pairs(pictures, SOURCE_SIZE), seed=recipe.seed,
                                    dtype=jnp.dtype(recipe.dtype))
    else:
        model = HybridCLIP.from_towers(recipe.vision, recipe.text, dtype=jnp.dtype(recipe.dtype))
        processor = CLIPProcessor.from_towers(recipe.vision, recipe.text)
    if recipe.logit_scale is not None:
        model.logit_scale[...] = jnp.asarray(math.log(recipe.logit_scale), jnp.float32)
    return model, processor


def check(recipe: Recipe) -> None:
    """Raises ValueError for options that do not go together, before anything is loaded."""
    if recipe.shard != "none" and recipe.form != "jit":
        raise ValueError(f"--shard {recipe.shard} needs --form jit: the others keep a copy of all on each device")
    for number, stage in enumerate(recipe.stages, 1):
        if (stage.fit is None) == (stage.features is None):
            raise ValueError(f"stage {number} has {'neither' if stage.fit is None else 'both'} of fit and features: "
                             "give one")
        if stage.features is not None and recipe.train.endswith(".tar"):
            raise ValueError(f"stage {number} computes features of captions records, which --train {recipe.train} are "
                             "not: take a recipe without such a stage, or name a .jsonl or .parquet file")
    if recipe.train.endswith(".tar"):
        endless = [number for number, stage in enumerate(recipe.stages) if stage.fit.steps is None]
        options = " ".join(f"--stages.{number}.fit.steps N --stages.{number}.fit.evaluate-every N"
                           for number in endless)
        if endless:
            raise ValueError(f"--train {recipe.train} is a stream, which has no epochs to count: give {options}, in "
                             "steps (an epoch has as many as there are pairs, divided by the batch size)")


def keep(recipe: Recipe) -> None:
    """Writes the whole recipe into its folder, as `recipe.json`, where no run has begun there.

    Raises FileExistsError where one has and is not to go on, ValueError where it is to go on with another recipe.
    """
    path = recipe.out / "recipe.json"
    settings = dataclasses.asdict(recipe)
    if any(any(recipe.out.glob(f"stage-*/{kept}")) for kept in ("checkpoints/[0-9]*", "model")):
        if not recipe.resume:
            raise FileExistsError(f"{recipe.out} holds a run: go on with it (--resume), or name another folder (--out)")
        if path.is_file():
            check_same(path, {name: settings[name] for name in FIXED})
    elif jax.process_index() == 0:
        recipe.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")


def make_feed(recipe: Recipe, stage: Stage, size: int, tokenize) -> Feed:
    """Batches of `recipe.train`: captions records, or tars."""
    options = {"seed": recipe.seed, "length": stage.fit.caption_tokens, "process_index": jax.process_index(),
               "process_count": jax.process_count()}
    if recipe.train.endswith(".tar"):
        files = sorted(glob.glob(recipe.train))
        if not files:
            raise FileNotFoundError(f"no file fits --train {recipe.train}")
        stream = load_dataset("webdataset", data_files=files, split="train", streaming=True)
        return stream_feed(stream, tokenize, size, stage.fit.batch_size, **options)
    return records_feed(read_captions(Path(recipe.train)), tokenize, size, stage.fit.batch_size,
                        workers=recipe.workers, **options)


def run(recipe: Recipe) -> bool:
    """Trains stage after stage, each in `out/stage-…`, into the checkpoint `out/model`; whether it came to the end.

    The folder also gets `recipe.json`, from which a run that goes on may not differ in what its weights are made of.
    With `recipe.resume` a stage goes on from its last checkpoint, and one that is finished is read; a stage on features
    keeps its features and, in `stage-…/model`, what it ended with, but no checkpoints: stopped, its projections are
    trained anew, in minutes, to the same weights. Raises what `fit` raises.
    """
    check(recipe)
    if recipe.hosts:
        jax.distributed.initialize()
    keep(recipe)
    dictionary = load_picture_dictionary() if recipe.train == "dictionary" else {}
    model, processor = start(recipe, dictionary.get("train"))
    size, pairs, validation = model.config.vision.image_size, None, None
    if dictionary:
        pairs = load_pairs(dictionary["train"], SOURCE_SIZE if recipe.vision is None else size)
        validation = load_pairs(dictionary["validation"], size)
    if recipe.validation is not None:
        validation = load_records(read_captions(Path(recipe.validation)), size, recipe.validation_pictures)
    mesh = make_mesh(model=recipe.model_devices)
    sinks = {"tensorboard": recipe.tensorboard, "wandb": recipe.wandb}
    for number, stage in enumerate(recipe.stages, 1):
        out = recipe.out / f"stage-{number}"
        print(f"stage {number} of {len(recipe.stages)}: {out}")
        if recipe.resume and (out / "model").is_dir():
            model, _ = load_clip(out / "model", dtype=jnp.dtype(recipe.dtype))
            continue
        if stage.features is not None:
            data = read_captions(Path(recipe.train)) if pairs is None else pairs
            features = cache_features(model, processor, data, out / "features")
            log = RunLog(out, dataclasses.asdict(stage.features) | {"seed": recipe.seed}, **sinks)
            try:
                result = train_projections(model, features, stage.features, seed=recipe.seed,
                                           optimizer=OPTIMIZERS[stage.optimizer],
                                           on_log=lambda history, log=log: log.log(history[-1]))
            finally:
                log.close()
        else:
            form = FORMS[recipe.form] if recipe.shard == "none" else functools.partial(jit_form, params=recipe.shard)
            feed = pairs if pairs is not None else make_feed(recipe, stage, size, processor.tokenize)
            result = fit(model, processor, feed, validation, stage.fit, seed=recipe.seed, out=out, form=form, mesh=mesh,
                         optimizer=OPTIMIZERS[stage.optimizer], resume=recipe.resume, samples=recipe.samples,
                         sinks=sinks)
        if result.interrupted:
            return False
        model = result.model
        if stage.features is not None and jax.process_index() == 0:
            save_clip(model, processor, out / "model.part")
            (out / "model.part").replace(out / "model")
    if jax.process_index() == 0:
        save_clip(model, processor, recipe.out / "model")
    return True


def main(arguments: list[str]) -> None:
    recipe = tyro.extras.overridable_config_cli(RECIPES, prog="python -m clipid_utils train", args=arguments,
                                                description="Train a CLIP, by a named recipe with changes of your own.")
    try:
        finished = run(recipe)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if not finished:
        raise SystemExit(f"stopped: the same command with --resume goes on from where {recipe.out} is")
    print(f"{recipe.out / 'model'}: trained")
