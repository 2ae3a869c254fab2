"""The cost of the ancestor's loss: negatives from each device's own pairs, or from the whole batch, on the dictionary.

    python scripts/per_device_loss.py    # about 40 minutes on 2 cores; writes data/per_device_loss.json

In the run of 2021 each of eight devices computed the loss over its own pairs only, and the eight gradients were
averaged. Here mini is trained twice for each seed: with the loss over the batch of 256, and with the mean of the losses
of eight shares of 32. Initial weights, batches, augmentation, optimizer and number of steps are the same. Recipe and
optimizer are those of the shipped checkpoint, with two exceptions: pictures of one concept are not put into one batch,
and there is no loss between pictures. Both need the whole batch, and the ancestor did not have them.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Bool, Float
from recall_of_runs import Ranks, difference, line, recalls, text_ranks

from clipid_utils import paths
from clipid_utils.data.batches.loader import load_pairs
from clipid_utils.data.dictionary.build import load_picture_dictionary
from clipid_utils.inference.evaluate import PACKAGES, rounded
from clipid_utils.training.fit import fit
from clipid_utils.training.loss import clip_loss
from clipid_utils.training.optimizers import muon
from clipid_utils.training.recipes import MINI, SOURCE_SIZE, new_mini
from clipid_utils.versions import versions

DEVICES = 8
SPLITS = ("validation", "unseen_artist", "unseen_concept")


def per_device_loss(
    image_embeds: Float[Array, "B E"], text_embeds: Float[Array, "B E"], scale: Float[Array, ""],
    positives: Bool[Array, "B B"] | None = None, axis: str | None = None,
) -> Float[Array, ""]:
    """The mean of `clip_loss` over the shares of `DEVICES` devices, computed on one device."""
    assert axis is None and positives is not None
    shares = [x.reshape(DEVICES, -1, x.shape[-1]) for x in (image_embeds, text_embeds)]  # [devices, b, E]
    b = len(image_embeds) // DEVICES
    own = np.arange(DEVICES)
    blocks = positives.reshape(DEVICES, b, DEVICES, b)[own, :, own, :]  # [devices, b, b]
    return jax.vmap(lambda images, texts, right: clip_loss(images, texts, scale, right))(*shares, blocks).mean()


LOSSES = {"whole batch": clip_loss, "per device": per_device_loss}


def summary(ranks: dict[str, Ranks], pictures: int) -> dict:
    """The recall with each loss, and the difference query by query."""
    whole, parts = ranks.values()
    return {"queries": len(whole[0]), "candidates": pictures, **{loss: recalls(of) for loss, of in ranks.items()},
            "difference": difference(whole, parts)}


def run(options: argparse.Namespace) -> dict:
    """The whole experiment, as one dict."""
    dictionary, started = load_picture_dictionary(), time.time()
    train = load_pairs(dictionary["train"], SOURCE_SIZE)
    config = dataclasses.replace(MINI, epochs=options.epochs, image_image=0.0, group_concepts=False, log_every=18,
                                 evaluate_every=options.epochs)
    ranks: dict = {split: {loss: [] for loss in LOSSES} for split in SPLITS}
    last: dict = {loss: [] for loss in LOSSES}
    for seed in range(options.seeds):
        for name, loss in LOSSES.items():
            model, processor = new_mini(train, seed=seed)
            result = fit(model, processor, train, None, config, seed=seed, loss=loss, optimizer=muon, progress=False)
            end = [line for line in result.history if "loss" in line][-1]
            last[name].append({key: end[key] for key in ("step", "loss", "logit_scale")})
            for split in SPLITS:
                ranks[split][name].append(text_ranks(result.model, processor, dictionary[split]))
            print(f"seed {seed}, {name}: loss {end['loss']:.3f}, validation R@1 "
                  f"{(ranks['validation'][name][-1] == 0).mean():.3f}, {(time.time() - started) / 60:.1f} minutes",
                  flush=True)
    settings = {"devices": DEVICES, "seeds": options.seeds, "optimizer": "muon", "fit": dataclasses.asdict(config)}
    return {"settings": settings, "versions": versions(PACKAGES), "pictures": len(train),
            "minutes": round((time.time() - started) / 60, 1), "end_of_training": last,
            "text_to_image": {split: summary(ranks[split], len(dictionary[split])) for split in SPLITS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=paths.DATA / "per_device_loss.json")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    report = rounded(run(options), 4)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for split, found in report["text_to_image"].items():
        for name in (*LOSSES, "difference"):
            print(f"{split:14} {name:12} {line(found[name])}")
    print(f"{report['minutes']:.1f} minutes, all figures in {options.out}")


if __name__ == "__main__":
    main()
