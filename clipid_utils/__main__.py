"""The course's long runs in a shell: `python -m clipid_utils prepare | check | download | translate | …`."""

import argparse
import json
import sys
from pathlib import Path

from clipid_utils.paths import CHECKPOINTS


def prepare(options: argparse.Namespace) -> None:
    from clipid_utils.data.dictionary.build import load_picture_dictionary
    from clipid_utils.data.dictionary.fetch import FetchError
    from clipid_utils.data.dictionary.openclipart import load_openclipart

    for split, rows in load_picture_dictionary().items():
        print(f"{split:16} {len(rows):5} pictures")
    try:
        print(f"{'openclipart':16} {len(load_openclipart()[0]):5} pictures, named in English")
    except FetchError as error:  # without apt-get: notebook 02 then translates the dictionary's own English
        print(error)


def check(options: argparse.Namespace) -> None:
    from clipid_utils.data.captions import check_captions

    count, bad = 0, 0
    try:
        for count, problem in enumerate(check_captions(options.file, root=options.root), 1):  # noqa: B007
            if problem:
                bad += 1
                print(problem)
    except (OSError, ValueError) as error:  # no such file, no Parquet
        raise SystemExit(f"{options.file}: {error}") from None
    print(f"{options.file}: {count:,} records, {bad:,} bad", file=sys.stderr)
    if bad or not count:
        raise SystemExit(1)


def download(options: argparse.Namespace) -> None:
    from clipid_utils.data.download.download import count_urls, download, read_urls
    from clipid_utils.data.download.fetcher import Limits

    limits = Limits(connections=options.connections, per_host=options.per_host, interval=options.interval)
    try:
        report = download(read_urls(options.rows), options.folder, limits=limits, contact=options.contact,
                          total=count_urls(options.rows))
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on where it stopped") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    print(f"{report}\n{options.folder}: manifest.jsonl lists all rows, captions.jsonl the pictures with captions")
    if not report.kept:
        raise SystemExit("no picture was fetched: the reasons are above")


def translate(options: argparse.Namespace) -> None:
    from clipid_utils.data.translation.translate import SHIPPED, Translator, translate_rows

    if options.model is None:
        print("by the small model of data/translator, which is there to try this out: for captions to train on name "
              "another, such as --model Helsinki-NLP/opus-mt-en-id", file=sys.stderr)
    try:
        translator = Translator(options.model or SHIPPED, beam=options.beam, device=options.device)
        report = translate_rows(options.file, options.folder, translator, column=options.column)
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on where it stopped") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    print(f"{report}\n{options.folder}: part-*.parquet; dropped are the captions that stayed English, each marked so")


def train_mini(options: argparse.Namespace) -> None:
    from clipid_utils.data.dictionary.build import load_picture_dictionary
    from clipid_utils.training.recipes import train_mini

    result = train_mini(load_picture_dictionary(), options.out, seed=options.seed)
    if result.interrupted:
        raise SystemExit(f"{options.out} is as it was")
    print(f"{options.out}: trained; `python -m clipid_utils evaluate {options.out}` measures it")


def evaluate(options: argparse.Namespace) -> None:
    from clipid_utils.data.dictionary.build import load_picture_dictionary
    from clipid_utils.inference.evaluate import evaluate_checkpoint

    out = options.checkpoint / "metrics.json"
    report = evaluate_checkpoint(options.checkpoint, load_picture_dictionary(), out=out)
    print(json.dumps(report["retrieval"], indent=1))
    print(f"all figures: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m clipid_utils", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare", help="fetch and prepare the picture dictionary under data/cache")
    command.set_defaults(run=prepare)
    command = commands.add_parser("check", help="name every bad line of a file of captions records")
    command.add_argument("file", type=Path, help="a .jsonl or .parquet file")
    command.add_argument("--root", type=Path, help="where relative paths start, if not at the file's folder")
    command.set_defaults(run=check)
    command = commands.add_parser("download", help="fetch the pictures of a list of URLs; again: what is not done yet")
    command.add_argument("rows", type=Path, help='JSON lines: {"url": …, "captions": […]}')
    command.add_argument("folder", type=Path, help="where the pictures, the manifest and the captions records go")
    command.add_argument("--contact", default="", help="a mail address or a page for the sites that are asked")
    command.add_argument("--connections", type=int, default=32, help="at once")
    command.add_argument("--per-host", type=int, default=4, help="connections to one host at once")
    command.add_argument("--interval", type=float, default=0.1, help="seconds between two requests to one host")
    command.set_defaults(run=download)
    command = commands.add_parser("translate", help="English captions into Indonesian; again: what is not done yet")
    command.add_argument("file", type=Path, help="a .jsonl or .parquet file")
    command.add_argument("folder", type=Path, help="where the Parquet shards go")
    command.add_argument("--model", default=None, help="a folder or an id such as Helsinki-NLP/opus-mt-en-id; by "
                         "default the small model of data/translator")
    command.add_argument("--column", default="captions", help="the one with the English")
    command.add_argument("--beam", type=int, default=4)
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    command.set_defaults(run=translate)
    command = commands.add_parser("train-mini", help="train by the shipped checkpoint's recipe")
    command.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=train_mini)
    command = commands.add_parser("evaluate", help="measure a checkpoint into its metrics.json")
    command.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINTS / "mini")
    command.set_defaults(run=evaluate)
    commands.add_parser("train", help="train by a recipe; `train --help` lists them", add_help=False)
    if sys.argv[1:2] == ["train"]:
        from clipid_utils.training.command import main as train

        return train(sys.argv[2:])
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
