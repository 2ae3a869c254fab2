"""The recipes of `clipid train`: each is a frozen dataclass, and its fields are the command's options.

The two `ancestor-…` recipes are the runs of 2021 (galuhsahid/clip-indonesian) with their settings; the differences are
listed above `ANCESTOR`. `indobert-base`, `indobert-large` and `indonesian-roberta-base` train the same kinds of towers
in the way that is usual today. No run of that size has been made here.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from datasets import Dataset
from jax.sharding import Mesh
from tyro.conf import Suppress, arg

from clipid_utils import CLIPProcessor, HybridCLIP, load_clip, load_towers, save_clip
from clipid_utils.data.batches.loader import Feed, PicturePairs, load_pairs, load_records, records_feed, stream_feed
from clipid_utils.data.batches.streams import tar_stream
from clipid_utils.data.captions import read_captions
from clipid_utils.data.dictionary.build import load_picture_dictionary
from clipid_utils.files import HEAD, input_files, whole_folder, write_json
from clipid_utils.training.augment import AugmentConfig
from clipid_utils.training.distributed import jit_form, make_mesh, pmap_form, shard_map_form
from clipid_utils.training.features import cache_features
from clipid_utils.training.fit import FitConfig, FitResult, check_batch, fit
from clipid_utils.training.heads import ProjectionConfig, train_projections
from clipid_utils.training.log import RunLog
from clipid_utils.training.loop import fitting_batch
from clipid_utils.training.optimizers import adabelief, adamw, muon
from clipid_utils.training.photo import PhotoRecipe, run_photo
from clipid_utils.training.recipes import MINI, SOURCE_SIZE, new_mini, pairs_checksum
from clipid_utils.training.run_folder import check_same
from clipid_utils.training.tune import TuneRecipe, run_tune

FORMS = {"jit": jit_form, "shard_map": shard_map_form, "pmap": pmap_form}
OPTIMIZERS = {"adamw": adamw, "adabelief": adabelief, "muon": muon}
# Settings that must be the same when a run resumes; devices, forms and sinks may change.
SAME_ON_RESUME = ("train", "validation", "validation_pictures", "image_column", "caption_column", "vision", "text",
                  "logit_scale", "stages", "dtype", "seed")


@dataclass(frozen=True)
class Stage:
    """One stage of a run. It starts from the weights of the stage before it and has its own schedule."""

    # Settings. With a ProjectionConfig the towers are frozen, and the projections learn from their cached features.
    fit: FitConfig | ProjectionConfig = FitConfig()
    # AdaBelief with adaptive clipping was used in 2021; Muon takes the matrices of the blocks, AdamW the rest
    optimizer: Literal["adamw", "adabelief", "muon"] = "adamw"

    @property
    def on_features(self) -> bool:
        return isinstance(self.fit, ProjectionConfig)


@dataclass(frozen=True)
class Recipe:
    """A whole run of training."""

    out: Annotated[Path, arg(aliases=("-o",), help="folder of the run")]
    # Captions records (a .jsonl or .parquet file, a folder of part files, or a glob), the picture dictionary, or,
    # for stages without features, WebDataset tars ("shards/*.tar")
    train: str = "dictionary"
    # Captions records to measure recall on; the dictionary has its own
    validation: str | None = None
    # Ending of the pictures in tars, such as input.jpg; none: found automatically
    image_column: str | None = None
    # Ending of the captions in tars, such as outputs.txt; none: found automatically
    caption_column: str | None = None
    # Folder or hub id of the image tower; none: a mini model with random weights
    vision: str | None = "openai/clip-vit-base-patch32"
    # Folder or hub id of the text tower
    text: str = "indobenchmark/indobert-base-p2"
    # Factor on the cosines at the start; none: the one of CLIP
    logit_scale: float | None = None
    # Stages, one after the other
    stages: tuple[Stage, ...] = ()
    # Type in which the towers compute; parameters are float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    # How the step runs on several devices
    form: Literal["jit", "shard_map", "pmap"] = "jit"
    # Mesh axis along which parameters are split (only with jit; the optimizer's state is always split along data)
    shard: Literal["none", "data", "model"] = "none"
    # Devices along the mesh axis model
    model_devices: int = 1
    # For several processes: call jax.distributed.initialize(), which finds the others on a TPU pod or under Slurm
    hosts: bool = False
    # Processes that decode the pictures of captions records; 0: threads
    workers: int = 0
    # Largest number of validation records to measure recall on; the first ones are used
    validation_pictures: int = 2000
    # Queries; at each evaluation the first pictures found for them are saved
    samples: tuple[str, ...] = ("kucing", "gunung", "makanan", "orang di pantai")
    # Seed of all random choices: order of the data, captions, augmentations, first weights of a mini model
    seed: int = 0
    # Continue the run in the folder, if there is one
    resume: bool = False
    # Curves and pictures for TensorBoard, in the folders of the stages
    tensorboard: bool = False
    # Name of a Weights & Biases project
    wandb: str | None = None
    # Name of the recipe
    name: Suppress[str] = ""


# The runs of 2021: 20 epochs of 8 x 64 pairs of at most 96 tokens; AdaBelief, adaptive clipping at 0.01, no decay; the
# rate rises for a tenth of the steps and falls to 0 along a cosine; the scale is fixed at 20; first the projections
# learn, then everything else too. Faults of that run are not repeated: the loss sees the whole batch, not the part of
# each device; RoBERTa's positions begin where they did in its pretraining; a flip does not make kiri and kanan false;
# a resumed run is the same run. Other differences:
# - BERT's dropout of 0.1 was on in both stages; here there is none.
# - A random square of the picture is now the middle one; a shear along both axes is now along x; the grey (127) behind
#   a moved picture is now white; hue is turned in YIQ, not HSV. Perspective, autocontrast and equalize are absent.
# - The text projection began at a standard deviation of 0.02; here at one over the root of the width.
# - Every 1,000 steps (second stage: 500) the loss of the validation pairs was measured, and 5 checkpoints were kept;
#   here their recall is measured each epoch on the first ones (--validation-pictures), and 3 are kept.
# - The second stage began at a checkpoint chosen by hand (its scripts name steps 40,000 and 71,000 of 477,000) and
#   ended with its last weights; here each stage ends with the weights of the best recall, if recall is measured.
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
    Stage(ProjectionConfig(batch_size=4096)),
    Stage(FitConfig(
        epochs=10, batch_size=4096, chunks=8, learning_rate=2e-4, weight_decay=0.1, layer_decay=0.8, caption_tokens=64,
        rates={"*.projection.*": 2.0}, evaluate_every=1, log_every=20, checkpoint_every=500,
    )),
)
TEXTS = {"indobert-base": "indobenchmark/indobert-base-p2", "indobert-large": "indobenchmark/indobert-large-p2",
         "indonesian-roberta-base": "flax-community/indonesian-roberta-base"}


def _recipe(name: str, tower: str, words: str, **settings) -> tuple[str, tuple[str, Recipe]]:
    text = TEXTS[tower]
    return name, (words.format(text), Recipe(Path("runs", name), text=text, name=name, **settings))


_ANCESTOR_WORDS = "the run of 2021: ViT-B/32 and {}; first the projections, then the towers"
_TODAY_WORDS = "today: ViT-B/32 and {}; first cached features, then the towers, in large batches"
RECIPES = dict((  # by name: a description, and the settings
    ("tune", ("fine-tuning: a model that works already, on pictures and captions of your own", TuneRecipe())),
    ("photo", ("the shipped model for photographs: two frozen towers from packages, and heads that are trained",
               PhotoRecipe())),
    _recipe("mini", "indobert-base", "the shipped model: mini on the picture dictionary, from random weights",
            vision=None, stages=(Stage(dataclasses.replace(MINI, checkpoint_every=200), "muon"),)),
    *(_recipe(f"ancestor-{tower.removesuffix('-base')}", tower, _ANCESTOR_WORDS, logit_scale=20.0, stages=ANCESTOR)
      for tower in ("indobert-large", "indonesian-roberta-base")),
    *(_recipe(tower, tower, _TODAY_WORDS, stages=TODAY, dtype="bfloat16") for tower in TEXTS),
))


def is_tars(train: str) -> bool:
    """Whether the training data is WebDataset tars: by its ending, or a folder that has some."""
    return train.endswith(".tar") or any(Path(train).expanduser().glob("*.tar"))


def check_options(recipe: Recipe) -> None:
    """Raises ValueError for options that do not fit together, before anything is loaded."""
    tars, columns = is_tars(recipe.train), (recipe.image_column, recipe.caption_column)
    if recipe.shard != "none" and recipe.form != "jit":
        raise ValueError(f"--shard {recipe.shard} needs --form jit: the other forms keep all parameters on each device")
    if recipe.vision is None and recipe.train != "dictionary":
        raise ValueError(f"a mini model learns its tokenizer from the picture dictionary and can only train on it: "
                         f"leave --train {recipe.train} out, or train other towers on it with --vision and --text, or "
                         "with another recipe, such as indobert-base")
    if any(columns) and not tars:
        raise ValueError("--image-column and --caption-column are for tars")
    on_features = [number for number, stage in enumerate(recipe.stages, 1) if stage.on_features]
    if tars and on_features:
        raise ValueError(f"stage {on_features[0]} computes features of captions records, and --train {recipe.train} "
                         "names tars: take a recipe without such a stage, or name .jsonl or .parquet files")
    without_end = [number for number, stage in enumerate(recipe.stages) if tars and stage.fit.steps is None]
    if without_end:
        options = (f"--stages.{number}.fit.steps N --stages.{number}.fit.evaluate-every N" for number in without_end)
        raise ValueError(f"--train {recipe.train} is a stream, which has no epochs: give {' '.join(options)}, in steps "
                         "(an epoch has as many steps as there are pairs, divided by the batch size)")


def data_content(recipe: Recipe) -> dict[str, list[str]]:
    """Name, size and hash of each file of captions records or tars; of one that is not lines, the hash of its head.

    A copy of a file on a different machine has the same content, whatever its time.
    """
    content: dict[str, list[str]] = {}
    for option, given in (("train", recipe.train), ("validation", recipe.validation)):
        if given is None or given == "dictionary":
            continue
        for path in input_files(given, (".jsonl", ".jsonl.gz", ".parquet", ".tar")):
            head = path.stat().st_size if ".jsonl" in path.name else HEAD
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read(head)).hexdigest()[:16]
            content.setdefault(option, []).append(f"{path.name}: {path.stat().st_size} bytes, {digest}")
    return content


def claim_folder(recipe: Recipe) -> None:
    """Writes the recipe into the folder of a new run, as `recipe.json`.

    Raises FileExistsError if the folder has a run that is not to be resumed, and ValueError if it began with different
    settings or data.
    """
    path = recipe.out / "recipe.json"
    settings = dataclasses.asdict(recipe)
    if any(any(recipe.out.glob(f"stage-*/{kept}")) for kept in ("checkpoints/[0-9]*", "model")):
        if not recipe.resume:
            raise FileExistsError(f"{recipe.out} has a run already: continue it with --resume, or name a "
                                  "different folder with --out")
        if path.is_file():
            check_same(path, {name: settings[name] for name in SAME_ON_RESUME})
            check_same(path, {"content": data_content(recipe)})
    elif jax.process_index() == 0:
        write_json(path, {**settings, "out": str(recipe.out), "content": data_content(recipe)})


def new_model(recipe: Recipe, dictionary: Mapping[str, Dataset]) -> tuple[HybridCLIP, CLIPProcessor]:
    """The model that the first stage starts from, and its processor."""
    dtype = jnp.dtype(recipe.dtype)
    if recipe.vision is None:
        model, processor = new_mini(load_pairs(dictionary["train"], SOURCE_SIZE), seed=recipe.seed, dtype=dtype)
    else:
        model, processor = load_towers(recipe.vision, recipe.text, dtype=dtype)
    if recipe.logit_scale is not None:
        model.logit_scale[...] = jnp.asarray(math.log(recipe.logit_scale), jnp.float32)
    return model, processor


def load_data(recipe: Recipe, dictionary: Mapping[str, Dataset], processor: CLIPProcessor):
    """The data to train on, None if it is tars, and the pictures to measure recall on, if any."""
    data, validation, size, decode = None, None, processor.image_size, processor.decoder
    if recipe.train == "dictionary":
        data = load_pairs(dictionary["train"], *((SOURCE_SIZE,) if recipe.vision is None else (size, decode)))
        validation = load_pairs(dictionary["validation"], size, decode)
    elif not is_tars(recipe.train):
        data = read_captions(recipe.train)
    if recipe.validation is not None:
        validation = load_records(read_captions(recipe.validation), size, recipe.validation_pictures, decode)
    return data, validation


def make_feed(recipe: Recipe, config: FitConfig, records: Dataset | None, processor: CLIPProcessor) -> Feed:
    """Batches of captions records, or of the tars of `recipe.train`."""
    options = {"seed": recipe.seed, "length": config.caption_tokens, "decode": processor.decoder,
               "process_index": jax.process_index(), "process_count": jax.process_count()}
    settings = processor.tokenize, processor.image_size, config.batch_size
    if records is not None:
        return records_feed(records, *settings, workers=recipe.workers, **options)
    stream = tar_stream(input_files(recipe.train, (".tar",)))
    return stream_feed(stream, *settings, columns=(recipe.image_column, recipe.caption_column), **options)


def train_heads(recipe: Recipe, stage: Stage, model, processor, data, validation, folder: Path) -> FitResult:
    """A stage on features: computes or reads them, trains the projections, and keeps the model in the folder."""
    features = cache_features(model, processor, data, folder / "features")
    settings = dataclasses.asdict(stage.fit) | {"seed": recipe.seed}
    with contextlib.closing(RunLog(folder, settings, tensorboard=recipe.tensorboard, wandb=recipe.wandb)) as log:
        result = train_projections(model, features, stage.fit, seed=recipe.seed, optimizer=OPTIMIZERS[stage.optimizer],
                                   on_log=lambda history: log.log(history[-1]))
    if not result.interrupted and jax.process_index() == 0:
        with whole_folder(folder / "model") as made:
            save_clip(result.model, processor, made)
    return result


def fitting_stage(stage: Stage, data: Dataset | PicturePairs | None, mesh: Mesh) -> Stage:
    """The stage with a batch that the data fill and the devices share. Raises ValueError if there is none."""
    if stage.on_features:
        return stage
    if data is not None:
        size = fitting_batch(stage.fit.batch_size, len(data), multiple=mesh.shape["data"] * stage.fit.chunks)
        stage = dataclasses.replace(stage, fit=dataclasses.replace(stage.fit, batch_size=size))
    check_batch(stage.fit.batch_size, stage.fit.chunks, mesh)
    return stage


def train_model(recipe: Recipe, stage: Stage, model, processor, data, validation, folder: Path) -> FitResult:
    """A stage through the towers, with checkpoints."""
    mesh = make_mesh(model=recipe.model_devices)
    form = FORMS[recipe.form] if recipe.shard == "none" else functools.partial(jit_form, params=recipe.shard)
    feed = data if isinstance(data, PicturePairs) else make_feed(recipe, stage.fit, data, processor)
    return fit(model, processor, feed, validation, stage.fit, seed=recipe.seed, out=folder, form=form, mesh=mesh,
               optimizer=OPTIMIZERS[stage.optimizer], resume=recipe.resume, samples=recipe.samples,
               sinks={"tensorboard": recipe.tensorboard, "wandb": recipe.wandb})


def save_result(recipe: Recipe, model: HybridCLIP, processor: CLIPProcessor, data, validation) -> None:
    """Writes `out/model`: the weights, and the settings and the log of the last stage for the model card."""
    last = recipe.out / f"stage-{len(recipe.stages)}"
    with whole_folder(recipe.out / "model") as folder:
        save_clip(model, processor, folder)
        for name in ("fit.json", "metrics.jsonl"):
            shutil.copyfile(last / name, folder / name)
        if isinstance(data, PicturePairs):
            write_json(folder / "recipe.json", {
                "recipe": recipe.name, "seed": recipe.seed, "pictures": len(data),
                "train_sha256": pairs_checksum(data), "validation_sha256": pairs_checksum(validation)})


def run(recipe: Recipe | PhotoRecipe | TuneRecipe) -> bool:
    """Trains stage after stage, each in `out/stage-…`, and writes the model to `out/model`; False if it was stopped.

    The folder also gets `recipe.json`; a resumed run must have the same settings (`SAME_ON_RESUME`). With
    `recipe.resume` a stage continues from its last checkpoint, and a finished stage is read. A stage on features keeps
    its features and, in `stage-…/model`, its result, but no checkpoints: if it is stopped, its projections are trained
    again, in minutes, to the same weights. Raises ValueError for options that do not fit together, and what `fit`
    raises.
    """
    if isinstance(recipe, PhotoRecipe):
        return run_photo(recipe)
    if isinstance(recipe, TuneRecipe):
        return run_tune(recipe)
    check_options(recipe)
    if recipe.hosts:
        jax.distributed.initialize()
    claim_folder(recipe)
    dictionary = load_picture_dictionary() if recipe.train == "dictionary" else {}
    model, processor = new_model(recipe, dictionary)
    data, validation = load_data(recipe, dictionary, processor)
    mesh = make_mesh(model=recipe.model_devices)
    stages = [fitting_stage(stage, data, mesh) for stage in recipe.stages]  # an error comes before the first stage
    for number, stage in enumerate(stages, 1):
        folder = recipe.out / f"stage-{number}"
        print(f"stage {number} of {len(recipe.stages)}: {folder}; its first step is compiled, for 10 to 60 seconds")
        if recipe.resume and (folder / "model").is_dir():
            model, _ = load_clip(folder / "model", dtype=jnp.dtype(recipe.dtype))
            continue
        train_stage = train_heads if stage.on_features else train_model
        result = train_stage(recipe, stage, model, processor, data, validation, folder)
        if result.interrupted:
            return False
        model = result.model
    if jax.process_index() == 0:
        save_result(recipe, model, processor, data, validation)
    return True
