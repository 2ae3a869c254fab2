"""Fine-tuning: trains any model that `load_clip` opens on your own pictures and captions.

    clipid train tune --init photo --train captions.jsonl

The defaults are safe. A part of the records is held out, the starting point is measured on it first, and the result
is the best model on it: the starting point itself if no step was better. `--interpolate` also tries the models between
the start and the result (WiSE-FT, Wortsman et al. 2022), which keep more of what the start could do.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from tyro.conf import Suppress, arg

from clipid_utils import HybridCLIP, load_clip, metrics, save_clip
from clipid_utils.data.batches.loader import load_records, records_feed, undecoded
from clipid_utils.data.captions import read_captions
from clipid_utils.files import whole_folder, write_json
from clipid_utils.model.adapters import add_adapters, merge_adapters
from clipid_utils.model.embed import embed_pictures, embed_texts
from clipid_utils.model.layers import ClassMixture
from clipid_utils.model.ops import normalize
from clipid_utils.training.augment import AugmentConfig
from clipid_utils.training.features import cache_features
from clipid_utils.training.fit import FitConfig, FitResult, fit
from clipid_utils.training.heads import ProjectionConfig, train_projections
from clipid_utils.training.log import RunLog
from clipid_utils.training.loop import fitting_batch
from clipid_utils.training.loss import clip_loss, siglip_loss
from clipid_utils.training.optimizers import check_patterns
from clipid_utils.training.run_folder import check_same

# Settings that must be the same when a run resumes
SAME_ON_RESUME = ("init", "tokenizer", "train", "validation", "learn", "freeze", "blocks", "rank", "learning_rate",
                  "steps", "batch_size", "seed")
# The peak of the learning rate for a tower of width 768; a narrower one learns in proportion faster
RATES = {"heads": 1e-3, "lora": 2e-4, "blocks": 2e-5, "all": 1e-5}
WIDTH = 768
PROJECTION_RATE = 10.0  # of the projections, where the towers learn too
EVALUATIONS = 20  # in a run
MIXTURES = tuple(round(0.1 * tenth, 1) for tenth in range(11))
GENTLE = AugmentConfig(degrees=3.0, shear=0.02, translate=0.05, scale=(0.95, 1.25), stretch=0.05, brightness=0.1,
                       contrast=0.1, saturation=0.1, hue=0.0, grey=0.0, shading=0.0)
MEASURE = "MRR"  # it decides which model is best; recall at 1 is too coarse for a few pictures


@dataclass(frozen=True)
class TuneRecipe:
    """Fine-tuning of a model on your own captions records."""

    # Captions records: a .jsonl or .parquet file, a folder of part files, or a glob
    train: str = ""
    # The model to start from: a folder, a run, the name of a shipped model, or an id on the hub
    init: str = "photo"
    # Folder or hub id with the tokenizer, for a model without one, such as Galuh/clip-indonesian
    tokenizer: str | None = None
    out: Annotated[Path, arg(aliases=("-o",), help="folder of the run")] = Path("runs/tune")
    # Captions records to choose on; none: a part of `train` is held out
    validation: str | None = None
    # Parts that learn: the heads on cached features (minutes), low-rank adapters in the towers, last blocks, or all
    learn: Literal["heads", "lora", "blocks", "all"] = "heads"
    # A tower that does not learn: with vision it is LiT (Zhai et al. 2022)
    freeze: Literal["none", "vision", "text"] = "none"
    # How many blocks of each tower learn with --learn blocks
    blocks: int = 2
    # Rank of the adapters of --learn lora
    rank: int = 8
    # Peak of the learning rate; none: one that fits `learn` and the towers' width
    learning_rate: float | None = None
    # Pairs a step; a smaller set of pictures is one batch
    batch_size: int = 256
    # Largest number of steps; none: 20 passes, between 100 and 2,000. A run ends early when it stops improving
    steps: int | None = None
    # Parts in which a batch goes through the towers, to save memory
    chunks: int = 1
    # Compute blocks again in the backward pass, to save memory on an accelerator
    remat: bool = False
    # Choose among the models between the start and the result
    interpolate: bool = False
    # Type in which the towers compute; parameters are float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Processes that decode pictures; 0: threads
    workers: int = 0
    # Seed of all random choices
    seed: int = 0
    # Continue the run in the folder
    resume: bool = False
    # Name of the recipe
    name: Suppress[str] = "tune"


class Judge(NamedTuple):
    """The held-out pictures and their captions: `right[t, n]` says that caption t belongs to picture n."""

    images: Callable[[HybridCLIP], Float[np.ndarray, "N E"]]
    texts: Callable[[HybridCLIP], Float[np.ndarray, "T E"]]
    right: np.ndarray

    def reciprocal_ranks(self, model: HybridCLIP) -> Float[np.ndarray, " queries"]:
        """1 / (rank of the first right answer), for each caption among the pictures and each picture among the
        captions."""
        similarity = self.texts(model) @ self.images(model).T
        both = (metrics.ranks(similarity, self.right), metrics.ranks(similarity.T, self.right.T))
        return np.concatenate([1 / (1 + ranks) for ranks in both])

    def score(self, model: HybridCLIP) -> float:
        return float(self.reciprocal_ranks(model).mean())


def held_out(count: int, seed: int) -> np.ndarray:
    """Rows to hold out: a tenth, of small sets up to a quarter, so that there are 50 if possible; at least 2."""
    if count < 8:
        raise ValueError(f"{count} pictures are too few to hold some out: give 8 or more, or name --validation")
    size = max(2, count // 10, min(50, count // 4))
    return np.sort(np.random.default_rng(seed).permutation(count)[:size])


def matches(captions: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """The different captions of some pictures, and which of them belong to which picture; case does not count."""
    different = list(dict.fromkeys(text.lower() for texts in captions for text in texts))
    place = {text: row for row, text in enumerate(different)}
    right = np.zeros((len(different), len(captions)), bool)
    for picture, texts in enumerate(captions):
        right[[place[text.lower()] for text in texts], picture] = True
    first = {text.lower(): text for texts in reversed(captions) for text in texts}
    return [first[text] for text in different], right


def trainable(model: HybridCLIP, learn: str, freeze: str = "none", blocks: int = 2) -> tuple[str, ...]:
    """Patterns of the parameters that learn. Raises ValueError if no parameter is left to learn."""
    sides = [side for side in ("vision", "text") if side != freeze]
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    patterns = ["logit_*"]
    for side in sides:
        tower = getattr(model, side)
        count = getattr(model.config, side).layers
        heads = [f"{side}.projection.*"]
        if isinstance(tower.projection, ClassMixture):  # as in the recipe of `photo`: names of classes, not classes
            heads = [f"{side}.projection.{'class_vectors' if side == 'vision' else 'classifier.*'}"]
        patterns += {
            "heads": heads,
            "lora": [f"{side}.*.lora_*", *heads],
            "blocks": [*(f"{side}.blocks.{count - 1 - back}.*" for back in range(min(blocks, count))),
                       f"{side}.ln_post.*", f"{side}.ln_final.*", f"{side}.pooler.*", f"{side}.head.*", *heads],
            "all": [f"{side}.*"],
        }[learn]
    fitting = tuple(pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names))
    if not set(fitting) - {"logit_*"}:
        raise ValueError(f"--learn {learn} --freeze {freeze} leaves nothing to learn in this model: choose a different "
                         "--learn, such as lora or all")
    check_patterns(nnx.state(model, nnx.Param), fitting)
    return fitting


def mixture(start: HybridCLIP, tuned: HybridCLIP, share: float) -> HybridCLIP:
    """The model whose weights are `share` of the way from the start to the tuned model (WiSE-FT, equation 1)."""
    graph, state = nnx.split(start)
    mixed = jax.tree.map(lambda a, b: ((1 - share) * a + share * b).astype(a.dtype), state, nnx.state(tuned))
    return nnx.merge(graph, mixed)


class Tuning:
    """A run: its data, its score, and the models that are compared. `run` does the work."""

    def __init__(self, recipe: TuneRecipe):
        self.recipe, self.out = recipe, Path(recipe.out).expanduser()
        if not recipe.train:
            raise ValueError("name the captions records: clipid train tune --train captions.jsonl (`clipid translate` "
                             "and `clipid download` write such files)")
        records = read_captions(recipe.train)
        if recipe.validation is None:
            rows = held_out(len(records), recipe.seed)
            self.data = records.select(np.setdiff1d(np.arange(len(records)), rows))
            self.validation = records.select(rows)
        else:
            self.data, self.validation = records, read_captions(recipe.validation)
        self.start, self.processor = load_clip(
            recipe.init, tokenizer=recipe.tokenizer, dtype=jnp.dtype(recipe.dtype))
        self.loss = clip_loss if self.start.logit_bias is None else siglip_loss
        self._claim()

    def _claim(self) -> None:
        path, settings = self.out / "recipe.json", dataclasses.asdict(self.recipe) | {"out": str(self.out)}
        began = (self.out / "model").is_dir() or (self.out / "fit" / "checkpoints").is_dir()
        if began and not self.recipe.resume:
            raise FileExistsError(f"{self.out} has a run already: continue it with --resume, or name a different "
                                  "folder with --out")
        if path.is_file() and self.recipe.resume:
            check_same(path, {name: settings[name] for name in SAME_ON_RESUME})
        else:
            write_json(path, settings)

    @property
    def rate(self) -> float:
        width = max(self.start.config.vision.width, self.start.config.text.width)
        scaled = RATES[self.recipe.learn] * (1.0 if self.recipe.learn == "heads" else WIDTH / width)
        return self.recipe.learning_rate or scaled

    def schedule(self, per_epoch: int) -> tuple[int, dict]:
        """The steps of the run, and the settings that both ways of training share."""
        steps = self.recipe.steps or min(max(20 * per_epoch, 100), 2000)
        return steps, {"epochs": -(-steps // per_epoch), "learning_rate": self.rate, "weight_decay": 0.0, "warmup": 0.1,
                       "log_every": max(1, steps // EVALUATIONS)}

    def run(self) -> bool:
        """Trains, compares with the start, writes `out/model` and `out/tune.json`; False if it was stopped."""
        recipe = self.recipe
        print(f"{len(self.data)} pictures to learn from, {len(self.validation)} to choose on; {recipe.learn} of "
              f"{recipe.init} at a rate of {self.rate:.1e}", flush=True)
        judge, train = self._on_features() if recipe.learn == "heads" else self._on_pictures()
        before = judge.reciprocal_ranks(self.start)
        print(f"before: {MEASURE} {before.mean():.3f}", flush=True)
        result = train(score=judge.score, start=float(before.mean()))
        if result.interrupted:
            return False
        tuned = merge_adapters(result.model)
        report = {"pictures": len(self.data), "validation_pictures": len(self.validation), "measure": MEASURE}
        if recipe.interpolate:
            tuned, report["interpolation"] = self._interpolated(judge, tuned)
        after = judge.reciprocal_ranks(tuned)
        low, high = metrics.bootstrap_interval(after - before)
        report |= {"before": float(before.mean()), "after": float(after.mean()), "learning_rate": self.rate,
                   "difference": {"value": float((after - before).mean()), "low": low, "high": high}}
        self._print_result(report)
        with whole_folder(self.out / "model") as folder:
            save_clip(tuned, self.processor, folder)
            write_json(folder / "tune.json", report)
        return True

    def _print_result(self, report: dict) -> None:
        change = report["difference"]
        print(f"after: {MEASURE} {report['after']:.3f} on {report['validation_pictures']} pictures; the change is "
              f"{change['value']:+.3f}, 95% interval [{change['low']:+.3f}, {change['high']:+.3f}]")
        if change["value"] <= 0:
            print("no step was better than the start, so the result is the starting model: give more pictures or "
                  "captions, a smaller --learning-rate, or a different --learn")
        elif change["low"] <= 0:
            print("the interval includes 0: with so few pictures to choose on, this may be chance")

    def _interpolated(self, judge: Judge, tuned: HybridCLIP) -> tuple[HybridCLIP, list[dict]]:
        """The best mixture of start and result, and the score of each."""
        curve = [{"share": share, MEASURE: judge.score(mixture(self.start, tuned, share))} for share in MIXTURES]
        for row in curve:
            print(f"  {row['share']:.1f} of the way: {MEASURE} {row[MEASURE]:.3f}")
        best = max(curve, key=lambda row: row[MEASURE])  # the first one: nearest to the start
        return mixture(self.start, tuned, best["share"]), curve

    # Heads, on cached features

    def _on_features(self) -> tuple[Judge, Callable[..., FitResult]]:
        recipe, features = self.recipe, {}
        for name, data in (("train", self.data), ("validation", self.validation)):
            features[name] = cache_features(self.start, self.processor, data, self.out / "features" / name,
                                            batch_size=16)  # more pictures at once only need more memory
        held = features["validation"]
        usable = np.flatnonzero(np.isfinite(held.images[:, 0]))
        said = list(undecoded(self.validation)["captions"])
        captions, right = matches([said[row] for row in usable])
        place = {text: row for row, text in enumerate(dict.fromkeys(text for texts in said for text in texts))}
        texts = np.asarray(held.texts, np.float32)[[place[text] for text in captions]]
        images = np.asarray(held.images, np.float32)[usable]
        judge = Judge(lambda model: np.asarray(normalize(model.vision.projection(jnp.asarray(images)))),
                      lambda model: np.asarray(normalize(model.text.projection(jnp.asarray(texts)))), right)
        count = int(np.isfinite(features["train"].images[:, 0]).sum())
        batch = fitting_batch(recipe.batch_size, count)
        config = ProjectionConfig(batch_size=batch, trainable=trainable(self.start, "heads", recipe.freeze),
                                  **self.schedule(count // batch)[1])

        def train(**options) -> FitResult:
            with contextlib.closing(RunLog(self.out / "fit", dataclasses.asdict(config))) as log:
                return train_projections(self.start, features["train"], config, seed=recipe.seed, loss=self.loss,
                                         on_log=lambda history: log.log(history[-1]), **options)

        return judge, train

    # Towers, on pictures

    def _on_pictures(self) -> tuple[Judge, Callable[..., FitResult]]:
        recipe, processor = self.recipe, self.processor
        pairs = load_records(self.validation, processor.image_size, len(self.validation), processor.decoder)
        captions, right = matches([[name, *more] for name, more in zip(pairs.names, pairs.keywords, strict=True)])
        judge = Judge(lambda model: embed_pictures(model, processor, pairs.images, progress=False)[0],
                      lambda model: embed_texts(model, processor, captions), right)
        batch = fitting_batch(recipe.batch_size, len(self.data), multiple=recipe.chunks)
        per_epoch = max(1, len(self.data) // batch)
        (steps, schedule), model = self.schedule(per_epoch), self.start
        if recipe.learn == "lora":
            sides = tuple(side for side in ("vision", "text") if side != recipe.freeze)
            model = add_adapters(model, recipe.rank, sides=sides, seed=recipe.seed)
        config = FitConfig(
            **schedule, batch_size=batch, evaluate_every=max(1, steps // EVALUATIONS // per_epoch),
            trainable=trainable(model, recipe.learn, recipe.freeze, recipe.blocks), average_decay=0.0,
            caption_tokens=min(64, processor.max_length), augmentation=GENTLE, chunks=recipe.chunks, remat=recipe.remat,
            layer_decay=0.75 if recipe.learn in ("blocks", "all") else 1.0, checkpoint_every=max(1, steps // 5),
            rates={} if recipe.learn == "lora" else {"*.projection.*": PROJECTION_RATE})
        feed = records_feed(self.data, processor.tokenize, processor.image_size, batch, seed=recipe.seed,
                            length=config.caption_tokens, decode=processor.decoder, workers=recipe.workers)
        return judge, functools.partial(fit, model, processor, feed, pairs, config, seed=recipe.seed,
                                        out=self.out / "fit", loss=self.loss, resume=recipe.resume)


def run_tune(recipe: TuneRecipe) -> bool:
    """Tunes a model; False if the run was stopped. Raises ValueError and FileExistsError for options that do not fit,
    and what `load_clip`, `read_captions` and `fit` raise."""
    return Tuning(recipe).run()
