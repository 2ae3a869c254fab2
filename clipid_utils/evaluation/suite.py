"""Models on tasks: vectors that are computed once, figures with intervals, paired differences, a table and a figure.

    report = evaluate_models(["mini", "photo"], OFFLINE)
    print(as_table(report))

The same files give the same figures: the report has the checksums of pictures and texts, the versions and protocols.
"""

import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Float, Shaped

from clipid_utils import HybridCLIP, load_clip, load_towers
from clipid_utils.data.dictionary.fetch import FetchError
from clipid_utils.evaluation.scoring import ranks_both_ways
from clipid_utils.evaluation.tasks import OFFLINE, Pairs, Pictures, Retrieval, Task, ZeroShot, read_tasks
from clipid_utils.files import read_json
from clipid_utils.inference.evaluate import PACKAGES, rounded
from clipid_utils.inference.index import batch_size
from clipid_utils.inference.zeroshot import classifier_weights
from clipid_utils.metrics import hits_at_k, label_ranks, rank_figures, with_intervals
from clipid_utils.model.embed import embed_pictures, embed_resumably, embed_texts, fingerprint, text_fingerprint
from clipid_utils.model.pretrained.hub import fetch_checkpoint
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.paths import CACHE, DATA
from clipid_utils.pictures import picture_source
from clipid_utils.versions import versions
from clipid_utils.wording import load_wording

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT_BATCH, TEXT_CHUNK = 256, 8192  # texts that are encoded at once, and between two writes to the cache
ROWS = 4096  # pictures that are compared with all classes at once
CONFUSIONS = 10  # pairs of classes that the report names

Figures = dict[str, Shaped[np.ndarray, " items"]]  # name -> the figure of each item; its mean is reported


class Measured(NamedTuple):
    """A model's figures on a task: for each part, such as "text_to_image", those of its items, and their clusters."""

    parts: dict[str, tuple[Figures, Sequence]]
    more: dict


class Embedder:
    """A model that embeds each picture and each text once; a folder of the cache keeps the vectors."""

    def __init__(self, name: str, model: HybridCLIP, processor: CLIPProcessor, progress: bool = True):
        self.name, self.model, self.processor, self.progress = name, model, processor, progress
        self.fingerprint = fingerprint(model, processor)
        self.folder = CACHE / "evaluate" / self.fingerprint
        self.reading = text_fingerprint(processor)  # the fingerprint does not know the tokenizer

    def pictures(self, pictures: Pictures) -> Float[np.ndarray, "N E"]:
        """Raises ValueError for a picture that cannot be read, because all models must see the same."""
        vectors, skipped = embed_pictures(
            self.model, self.processor, pictures.stored, cache=self.folder / "pictures", identities=pictures.digests,
            batch_size=batch_size(self.model), progress=self.progress)
        if skipped:
            row, reason = next(iter(skipped.items()))
            source = picture_source(pictures.stored[row])
            name = f"number {row + 1}" if isinstance(source, bytes) else source
            raise ValueError(f"{len(skipped)} of {len(pictures)} pictures cannot be read; the first is {name}: "
                             f"{reason}: replace them, or leave them out of the data")
        return vectors

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "T E"]:
        out = np.empty((len(texts), self.model.config.embed_dim), np.float32)

        def batches(rows: np.ndarray):
            for start in range(0, len(rows), TEXT_BATCH):
                part = rows[start : start + TEXT_BATCH]
                vectors = embed_texts(self.model, self.processor, [texts[row] for row in part], TEXT_BATCH)
                yield vectors, np.ones(len(part), np.bool_)

        digests = np.array([hashlib.blake2b(text.encode(), digest_size=10).hexdigest() for text in texts], "S20")
        embed_resumably(out, digests, batches, self.folder / f"texts-{self.reading}", chunk=TEXT_CHUNK, unit="texts",
                        progress=self.progress)
        return out


def open_model(name: str) -> tuple[HybridCLIP, CLIPProcessor]:
    """The model of a name, folder or hub id for `load_clip`, or of two towers for `load_towers`, as "VISION+TEXT".

    Raises ValueError for towers that need a new layer, because a model with random weights has nothing to measure.
    """
    parts = parts_of(name)
    if len(parts) == 1:
        return load_clip(name)
    drawn = nnx.Rngs(0)
    opened = load_towers(*parts, rngs=drawn)
    if int(drawn.default.count[...]):
        raise ValueError(f"{name}: these towers have no projections to one space, and new ones are random: train the "
                         "model first (clipid train), and measure the trained model")
    return opened


def parts_of(name: str) -> list[str]:
    """The name, or the names of the two towers of "VISION+TEXT"."""
    return [name] if Path(name).exists() else name.split("+", 1)


def evaluate_models(
    models: Sequence[str], requests: Sequence[str] = (), *, seed: int = 0, progress: bool = True
) -> dict:
    """Every model on every task, as one dict for JSON; `requests` are names for `tasks.read_tasks`, without one all
    of `OFFLINE` whose pictures are there.

    Each figure has its mean and a 95% bootstrap interval. If there are several models, `differences` has those of each
    later one from the first, paired item by item. Whole clusters are drawn (see `metrics.bootstrap_interval`). Vectors
    are kept in the cache, so an interrupted run continues. Raises the errors of `open_model` and `read_tasks`.
    """
    repeated = [name for name, count in Counter(models).items() if count > 1]
    if repeated or not models:
        raise ValueError(f"the model {repeated[0]} is named twice" if repeated else "name at least one model")
    for part in (part for name in models for part in parts_of(name)):
        fetch_checkpoint(part, weights=False)  # a wrong name is an error now, not after the first model was measured
    tasks = _read(requests)
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is asked for with two sets of files: measure each in a call of its own")
    report: dict = {"seed": seed, "versions": versions(PACKAGES), "models": {}, "tasks": {
        task.name: {"kind": type(task).__name__, "protocol": task.protocol, "data": _data(task), "results": {},
                    "differences": {}} for task in tasks}}
    measured: dict[str, list[Measured]] = {task.name: [] for task in tasks}
    for name in models:  # one model is in memory at a time
        embedder = Embedder(name, *open_model(name), progress)
        report["models"][name] = {"fingerprint": embedder.fingerprint, "tokenizer": embedder.reading}
        for task in tasks:
            found = measure(embedder, task)
            measured[task.name].append(found)
            report["tasks"][task.name]["results"][name] = found.more | {
                part: with_intervals(figures, seed, clusters) for part, (figures, clusters) in found.parts.items()}
        del embedder  # before the next model is opened
    for task in tasks:
        first, *others = measured[task.name]
        for name, other in zip(models[1:], others, strict=True):
            report["tasks"][task.name]["differences"][f"{name} - {models[0]}"] = {
                part: with_intervals({key: other.parts[part][0][key] - values for key, values in figures.items()}, seed,
                                     clusters) for part, (figures, clusters) in first.parts.items()}
    return rounded(report)


def _read(requests: Sequence[str]) -> list[Task]:
    found = []
    for request in dict.fromkeys(requests or OFFLINE):
        try:
            found += read_tasks(request)
        except (ValueError, FetchError) as error:  # a package that cannot be had here
            if requests:
                raise
            print(f"{request} is left out: {error}", file=sys.stderr)
    return found


def _data(task: Task) -> dict:
    texts = {Retrieval: ("texts",), ZeroShot: ("names",), Pairs: ("right", "wrong")}[type(task)]
    checksum = hashlib.sha256(task.pictures.digests.tobytes())
    for text in itertools.chain.from_iterable(getattr(task, name) for name in texts):
        checksum.update(text.encode() + b"\0")
    links = task.positives.nonzero() if isinstance(task, Retrieval) else [getattr(task, "labels", [])]
    checksum.update(np.stack(links).astype("<i8").tobytes())
    return {"pictures": len(task.pictures), **{name: len(getattr(task, name)) for name in texts},
            "sha256": checksum.hexdigest()}


def measure(embedder: Embedder, task: Task) -> Measured:
    """The figures of one model on one task."""
    pictures = embedder.pictures(task.pictures)
    if isinstance(task, Retrieval):
        texts, found = ranks_both_ways(embedder.texts(task.texts), pictures, task.positives)
        return Measured({"text_to_image": (rank_figures(texts), task.text_clusters),
                         "image_to_text": (rank_figures(found), task.picture_clusters)}, {})
    if isinstance(task, Pairs):
        right, wrong = (np.einsum("ij,ij->i", pictures, embedder.texts(texts)) for texts in (task.right, task.wrong))
        hits, phenomena = (right > wrong + 1e-6).astype(np.float64), np.array(task.phenomena)
        parts = {"all": ({"accuracy": hits}, task.clusters)}
        for phenomenon in dict.fromkeys(task.phenomena):
            rows = phenomena == phenomenon
            parts[phenomenon] = ({"accuracy": hits[rows]}, list(itertools.compress(task.clusters, rows)))
        return Measured(parts, {})
    return _zero_shot(embedder, task, pictures)


def _zero_shot(embedder: Embedder, task: ZeroShot, pictures: Float[np.ndarray, "N E"]) -> Measured:
    parts, more, wording = {}, {}, load_wording()
    for key in ("naive", "templates"):
        weights = classifier_weights(embedder.model, embedder.processor, task.names, wording[key], task.groups,
                                     embed=embedder.texts)
        ranks, guesses = [], []
        for start in range(0, len(pictures), ROWS):
            scores = pictures[start : start + ROWS] @ weights.T
            ranks.append(label_ranks(scores, task.labels[start : start + ROWS]))
            guesses.append(scores.argmax(axis=1))
        hits = {f"top{k}": hits_at_k(np.concatenate(ranks), k) for k in (1, 5) if k < len(task.names)}
        parts[key] = (hits, task.clusters)
    found = Counter(zip(task.labels.tolist(), np.concatenate(guesses).tolist(), strict=True))
    wrong = ((pair, count) for pair, count in found.most_common() if pair[0] != pair[1])
    more["per_class"] = {task.names[label]: hits["top1"][task.labels == label].mean()
                         for label in np.unique(task.labels)}
    more["confusions"] = [{"true": task.names[true], "found": task.names[guess], "pictures": count}
                          for (true, guess), count in itertools.islice(wrong, CONFUSIONS)]
    return Measured(parts, more)


def as_table(report: dict) -> str:
    """The main figures as plain text: a line for each figure, a column for each model, with 95% intervals.

    A second table has the differences from the first model. A difference is marked with * if its interval does not
    include 0. Figures that others published come last.
    """
    models = list(report["models"])
    pairs = [f"{name} - {models[0]}" for name in models[1:]]
    lines, deltas = [["task", "figure", *models]], [["task", "figure", *pairs]]
    for name, task in report["tasks"].items():
        for part, keys in _main_figures(task).items():
            for key in keys:
                label = [name, f"{part} {key}"]
                lines.append([*label, *(_cell(task["results"][model][part][key]) for model in models)])
                found = [task["differences"][pair][part][key] for pair in pairs]
                deltas.append([*label, *(_cell(delta, "+") + _mark(delta) for delta in found)])
    blocks = [_columns(lines), _columns(deltas) if pairs else "", published(report["tasks"])]
    return "\n\n".join(filter(None, blocks))


def _columns(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)


def _cell(figure: dict, sign: str = "") -> str:
    return "{value:{form}} [{low:{form}}, {high:{form}}]".format(form=f"{sign}.3f", **figure)


def _mark(difference: dict) -> str:
    return " *" if difference["low"] > 0 or difference["high"] < 0 else ""


def _main_figures(task: dict) -> dict[str, list[str]]:
    parts = {part: figures for part, figures in next(iter(task["results"].values())).items()
             if part not in ("per_class", "confusions")}
    wanted = {"Retrieval": ["R@1", "R@10"], "ZeroShot": ["top1", "top5"], "Pairs": ["accuracy"]}[task["kind"]]
    return {part: [key for key in wanted if key in figures] for part, figures in parts.items()}


def published(tasks: dict) -> str:
    """The figures that others published for these tasks, as plain text; they were not computed here."""
    rows = read_json(DATA / "published.json")
    wanted = {name.partition(":")[0] for name in tasks}
    lines = [f"  {row['model']}: text to image R@1 {row['text_to_image']}, image to text R@1 {row['image_to_text']} "
             f"({row['set']}; {row['source']})" for row in rows if row["set"] in wanted]
    return "\n".join(["Published by others, in percent, not computed here:", *lines]) if lines else ""


def figure(report: dict) -> "Figure":
    """The main figures of all models as points with their intervals, a panel for each task."""
    from clipid_utils.plots import suite_points

    models, panels = list(report["models"]), {}
    for name, task in report["tasks"].items():
        panels[name] = {
            part if task["kind"] == "Pairs" else f"{part} {keys[0]}": {
                model: task["results"][model][part][keys[0]] for model in models}
            for part, keys in _main_figures(task).items()}
    return suite_points(panels, {name: 0.5 for name, task in report["tasks"].items() if task["kind"] == "Pairs"})
