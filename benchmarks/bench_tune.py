"""Fine-tuning compared: heads, adapters, the last blocks and all, from `mini` to the drawn stamps of Tux Paint.

Each way starts from the shipped `mini` and learns the training stamps with their captions; the validation stamps choose
the best step, as `clipid train tune --validation` does it. The table shows recall at 1 and MRR before and after, on the
validation stamps and on the other artists' validation drawings (the old task, on which it may lose). Then it shows the
same for the best mixture of start and result (`--interpolate`), and the time and the peak of memory.

    python benchmarks/bench_tune.py [--ways heads lora blocks all] [--init mini] [--out build/bench/tune.json]
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WAYS = ("heads", "lora", "blocks", "all")


def write_stamps(folder: Path) -> dict[str, Path]:
    """The drawn stamps of the splits as captions records."""
    from clipid_utils.data.captions import write_captions
    from clipid_utils.data.dictionary.build import load_picture_dictionary

    paths = {}
    for split, rows in load_picture_dictionary().items():
        if split not in ("train", "validation"):
            continue
        records = []
        for number, row in enumerate(rows):
            if row["artist"] == "tuxpaint":
                picture = folder / f"{split}-{number}.png"
                row["image"].save(picture)
                records.append({"image_path": picture.name, "captions": [row["name_id"]]})
        paths[split] = folder / f"{split}.jsonl"
        write_captions(records, paths[split])
    return paths


def recalls(folder: str) -> dict[str, dict[str, float]]:
    """Text to picture on the validation drawings: the stamps, and those of the other artists."""
    from clipid_utils import load_clip, metrics
    from clipid_utils.data.dictionary.build import load_picture_dictionary
    from clipid_utils.model.embed import embed_images, embed_texts

    model, processor = load_clip(folder)
    rows, found = load_picture_dictionary()["validation"], {}
    artists = np.array(rows["artist"])
    for name, chosen in (("stamps", artists == "tuxpaint"), ("others", artists != "tuxpaint")):
        part = rows.select(np.flatnonzero(chosen))
        names = [text.lower() for text in part["name_id"]]
        different = sorted(set(names))
        similarity = embed_texts(model, processor, different) @ embed_images(
            model, processor, part["image"], progress=False).T
        ranks = metrics.ranks(similarity, np.array(different)[:, None] == np.array(names))
        found[name] = {"R@1": float(np.mean(ranks == 0)), "MRR": float(np.mean(1 / (1 + ranks)))}
    return found


def tune(way: str, init: str, records: dict[str, Path], out: Path) -> dict:
    """One way, in this process, with its time and memory."""
    from clipid_utils.training.tune import TuneRecipe, run_tune

    start = time.perf_counter()
    run_tune(TuneRecipe(train=str(records["train"]), validation=str(records["validation"]), init=init, learn=way,
                        out=out, batch_size=128))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"seconds": round(seconds, 1), "peak_mib": round(peak), "tuned": recalls(str(out / "model"))}
    from clipid_utils import load_clip, save_clip
    from clipid_utils.training.tune import mixture

    (first, processor), (second, _) = load_clip(init), load_clip(out / "model")
    found["mixtures"] = {}
    for share in (0.25, 0.5, 0.75):
        save_clip(mixture(first, second, share), processor, out / "mixed")
        found["mixtures"][str(share)] = recalls(str(out / "mixed"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--init", default="mini")
    parser.add_argument("--out", type=Path, default=Path("build/bench/tune.json"))
    parser.add_argument("--worker", nargs=3, metavar=("WAY", "FOLDER", "RESULT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        way, folder, result = options.worker
        records = {split: Path(folder) / f"{split}.jsonl" for split in ("train", "validation")}
        Path(result).write_text(json.dumps(tune(way, options.init, records, Path(folder) / way)))
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-tune-"))
    try:
        write_stamps(folder)
        found = {"before": recalls(options.init)}
        for way in options.ways:  # each in a process of its own, for its memory
            result = folder / f"{way}.json"
            command = [sys.executable, __file__, "--init", options.init, "--worker", way, str(folder), str(result)]
            subprocess.run(command,
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found[way] = json.loads(result.read_text())
    finally:
        shutil.rmtree(folder)
    print(f"{'':22}{'stamps R@1':>12}{'MRR':>8}{'others R@1':>12}{'MRR':>8}{'seconds':>9}{'MiB':>7}")
    rows = [("before", found["before"], {})]
    for way in options.ways:
        rows.append((way, found[way]["tuned"], found[way]))
        rows += [(f"  {share} of the way", row, {}) for share, row in found[way]["mixtures"].items()]
    for name, row, more in rows:
        print(f"{name:22}{row['stamps']['R@1']:12.3f}{row['stamps']['MRR']:8.3f}{row['others']['R@1']:12.3f}"
              f"{row['others']['MRR']:8.3f}{more.get('seconds', ''):>9}{more.get('peak_mib', ''):>7}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
