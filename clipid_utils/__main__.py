"""The command `clipid`: the library's long runs in a shell. `python -m clipid_utils` is the same."""

import contextlib
import functools
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

try:  # Ctrl-C here comes before `main` can catch it
    import tyro
    from tyro.conf import FlagCreatePairsOff, Positional, arg

    from clipid_utils.files import use_one_arena
    from clipid_utils.paths import CACHE
    from clipid_utils.terminal import short, stop, with_home
except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
    raise SystemExit(130) from None

# The extra that a command needs
EXTRAS = {"prepare": "data", "check": "data", "download": "download", "translate": "translate", "embed": "scale",
          "train": "train", "evaluate": "data", "search": "data", "demo": "demo", "export": "onnx"}
MODEL = "photo"  # the model of search and demo
SAMPLES = CACHE / "foto-contoh"  # where `load_sample_photographs` puts them
COMMANDS = tyro.extras.SubcommandApp()

Input = Annotated[Positional[str], arg(metavar="INPUT")]
Folder = Annotated[Positional[Path], arg(metavar="FOLDER")]
Model = Annotated[str, arg(aliases=("-m",), help="a shipped model by name, a run, a model's folder, or a hub id")]
Ray = Annotated[tuple[str, ...] | None, arg(metavar="[ADDRESS]")]


def command(function: Callable) -> Callable:
    """Makes a command of a function, whose parameters are the options. The parser returns a call to be made later."""
    @functools.wraps(function)
    def prepared(*args, **options):
        return functools.partial(function, *args, **options)

    COMMANDS.command(prepared)
    return function


@command
def prepare() -> None:
    """Fetch the picture dictionary and the sample photographs and prepare them under data/cache."""
    from clipid_utils.data.dictionary.build import load_picture_dictionary
    from clipid_utils.data.dictionary.fetch import FetchError
    from clipid_utils.data.dictionary.openclipart import load_openclipart
    from clipid_utils.data.photographs import NAME, load_sample_photographs

    for split, rows in load_picture_dictionary().items():
        print(f"{split:16} {len(rows):5} pictures")
    try:
        print(f"{'openclipart':16} {len(load_openclipart()[0]):5} pictures, named in English")
    except FetchError as error:  # without apt-get notebook 02 translates the dictionary's own English
        print(error)
    try:
        print(f"{NAME:16} {len(load_sample_photographs()):5} photographs to search: {CACHE / NAME}")
    except FetchError as error:
        print(error)


@command
def check(records: Input, root: Path | None = None, pictures: bool = True) -> None:
    """Name every bad record and every picture that cannot be read.

    Args:
        records: captions records: a .jsonl or .parquet file, a folder of part files, or a glob
        root: folder where relative picture paths start; by default the folder of the file
        pictures: do not open the pictures, only check that their files exist
    """
    from tqdm.auto import tqdm

    from clipid_utils.data.captions import check_captions

    count = bad = 0
    found = check_captions(records, root=root, pictures=pictures)
    for count, problem in enumerate(tqdm(found, "checking", unit=" records", disable=None), 1):  # noqa: B007
        if problem:
            bad += 1
            tqdm.write(problem)
    print(f"{records}: {count:,} records, {bad:,} bad", file=sys.stderr)
    if bad:
        raise SystemExit(1)
    print(f"next: clipid train RECIPE --train {records}")


@command
def download(
    rows: Input, folder: Folder, *, contact: str = "", connections: int = 32, per_host: int = 4, interval: float = 0.1
) -> None:
    """Fetch the pictures of a list of URLs. Run it again for those that are missing.

    Args:
        rows: list of URLs: a .jsonl or .txt file, a folder of them, or a glob; a line is {"url": …, "captions": […]}
        folder: where the pictures, the manifest and the captions records go
        contact: your mail address or page, so that the owners of the sites can write to you
        connections: largest number of connections at once
        per_host: largest number of connections to one host at once
        interval: seconds between two requests to one host
    """
    from clipid_utils.data.download.download import count_urls, download, read_urls
    from clipid_utils.data.download.fetcher import Limits

    limits = Limits(connections=connections, per_host=per_host, interval=interval)
    report = download(read_urls(rows), folder, limits=limits, contact=contact, total=count_urls(rows))
    captions = folder / "captions.jsonl"
    listed = "captions.jsonl lists the pictures, " if captions.is_file() else ""
    print(f"{report}\n{folder}: {listed}manifest.jsonl lists all rows")
    if not report.kept:
        raise SystemExit(1)
    if listed:  # rows without captions give none
        print(f"next: clipid check {captions}")


@command
def translate(
    rows: Input, folder: Folder, *, model: Annotated[str | None, arg(aliases=("-m",))] = None, column: str = "captions",
    beam: int = 4, device: Literal["auto", "cpu", "cuda"] = "auto", ray: Ray = None, workers: int | None = None,
    cores: int = 1, gpus: float = 0.0,
) -> None:
    """Translate English captions into Indonesian. Run it again to continue.

    Args:
        rows: a .jsonl or .parquet file, a folder of part files, or a glob
        folder: where the Parquet shards go
        model: a folder, or a hub id such as Helsinki-NLP/opus-mt-en-id; by default the small model of this project
        column: the column with the English texts
        beam: hypotheses of the beam search
        device: where to compute, without Ray
        ray: run on Ray: on this machine, or on the cluster at ADDRESS; write it last
        workers: processes on Ray; by default as many as fit
        cores: cores of one process on Ray
        gpus: GPUs of one process on Ray
    """
    from clipid_utils.data.translation.translate import SHIPPED, Translator, translate_rows

    if model is None:
        print("the small model of data/translator is only for trying this out: for captions to train on, name a larger "
              "model, such as --model Helsinki-NLP/opus-mt-en-id", file=sys.stderr)
    if ray is None:
        report = translate_rows(rows, folder, Translator(model or SHIPPED, beam=beam, device=device), column=column)
    else:
        from clipid_utils.data.translation.on_ray import translate_on_ray

        report = translate_on_ray(rows, folder, model=model or SHIPPED, column=column, beam=beam, workers=workers,
                                  cores=cores, gpus=gpus, address=cluster(ray))
    print(f"{report}\n{folder}: part files; captions that stayed English are marked\nnext: clipid check {folder}")


@command
def embed(
    rows: Input, folder: Folder, *, model: Model = "mini", ray: Ray = None, workers: int | None = None, cores: int = 1,
    gpus: float = 0.0,
) -> None:
    """Add the column image_embeds to Parquet shards, on Ray. Run it again to continue.

    Args:
        rows: Parquet shards with the column image or image_path: a file, a folder, or a glob
        folder: where shards of the same names go
        ray: run on the cluster at ADDRESS, not on this machine; write it last
        workers: processes; by default as many as fit
        cores: cores of one process
        gpus: GPUs of one process
    """
    from clipid_utils.data.translation.on_ray import map_shards
    from clipid_utils.files import input_files
    from clipid_utils.inference.embed_shards import EmbedPictures
    from clipid_utils.model.pretrained.hub import fetch_checkpoint

    checkpoint = fetch_checkpoint(model).absolute()  # shards are known by its content; workers have other folders
    options = {"checkpoint": str(checkpoint), "root": str(folder.absolute())}
    count = map_shards(input_files(rows, (".parquet",)), folder, EmbedPictures, options, workers=workers, cores=cores,
                       gpus=gpus, address=cluster(ray or ()))
    print(f"{folder}: {count:,} rows with image_embeds")


def cluster(ray: tuple[str, ...]) -> str | None:
    """The address that follows --ray, if any."""
    if len(ray) > 1:
        raise ValueError(f"--ray takes one address, not {' '.join(ray)}: write it after the files and folders")
    return next(iter(ray), None)


@command
def train(recipe: Annotated[Positional[str], arg(metavar="RECIPE")]) -> None:
    """Train by a recipe; `clipid train --help` lists the recipes."""
    # `parse` calls run_recipe: the options of a recipe need the whole library


def run_recipe(recipe) -> None:
    """Trains by a `training.command.Recipe`."""
    from clipid_utils.training.command import run

    if not run(recipe):
        raise KeyboardInterrupt
    print(f"{recipe.out / 'model'}: trained\nnext: clipid evaluate {recipe.out}, or clipid search FOLDER \"kucing\" -m "
          f"{recipe.out}")


@command
def evaluate(
    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL …")] = ("mini",), *,
    on: Annotated[tuple[str, ...], arg(metavar="TASK …")] = (), out: Path | None = None,
) -> None:
    """Measure models. One model alone is measured on the picture dictionary, into its metrics.json. Several models, or
    one with --on, are measured on tasks and compared: a table, and the same figures in a file.

    Args:
        models: shipped models by name, runs, models' folders, hub ids, or two towers as VISION+TEXT
        on: tasks, by default all that need no files of yours: photographs photographs:en unseen_artist unseen_concept
            groups foto-contoh pairs; with your files xm3600=captions.jsonl,FOLDER and others (a wrong name lists them)
        out: file for all figures; by default metrics.json in the model's folder, or evaluation.json here
    """
    from clipid_utils.evaluation.command import evaluate_one, evaluate_several
    from clipid_utils.evaluation.suite import parts_of

    single = len(models) == 1 and not on and len(parts_of(models[0])) == 1
    evaluate_one(models[0], out) if single else evaluate_several(models, on, out)


@command
def search(
    folder: Folder, query: Annotated[Positional[str], arg(metavar="QUERY")] = "", *,
    image: Annotated[Path | None, arg(aliases=("-i",), metavar="PICTURE")] = None, model: Model = MODEL,
    k: Annotated[int, arg(aliases=("-k",))] = 12, sheet: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Find pictures in a folder by words, by a picture, or by both. Without a query, each line of stdin is one.

    Args:
        folder: folder of pictures, with its subfolders
        query: words, such as "kucing tidur"
        image: a picture to find similar ones
        k: number of pictures to print, the best first
        sheet: file for a contact sheet of the results: a web page (.html) or a figure (.png)
    """
    from clipid_utils.inference.command import search_folder

    search_folder(folder, query, image, model=model, k=k, sheet=sheet)


@command
def export(
    kind: Annotated[Positional[Literal["page", "onnx"]], arg(metavar="page|onnx")],
    out: Annotated[Positional[Path], arg(metavar="OUT")], *, model: Model = MODEL, pictures: Path = SAMPLES,
) -> None:
    """Write a model for use without Python: a web page that searches pictures, or ONNX files.

    Args:
        kind: a page with its pictures, or the two towers alone
        out: a new folder
        pictures: folder of pictures for the page; by default the sample photographs
    """
    if kind == "onnx":
        from clipid_utils import load_clip
        from clipid_utils.model.pretrained.onnx import export_onnx

        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out} is there already: name a new folder")
        for path in export_onnx((clip := load_clip(model))[0], out, clip[1]):
            print(path)
        return
    from clipid_utils.inference.page import write_page

    print(f"{write_page(out, model, _fetched(pictures))}: the page\nnext: python -m http.server -d {out}")


@command
def demo(folder: Folder = SAMPLES, *, model: Model = MODEL, port: int = 7860) -> None:
    """Search a folder of pictures in the browser.

    Args:
        folder: folder of pictures, with its subfolders; by default the sample photographs
        port: the page is at http://127.0.0.1:PORT
    """
    from clipid_utils.inference.demo import serve

    serve(_fetched(folder), model=model, port=port)


def _fetched(folder: Path) -> Path:
    """The folder; the sample photographs are fetched first if the folder is theirs and does not exist."""
    if folder == SAMPLES and not folder.is_dir():
        from clipid_utils.data.photographs import load_sample_photographs

        load_sample_photographs()
    return folder


def parse(arguments: list[str]) -> Callable[[], None]:
    """The call that the arguments ask for. Wrong arguments give one line and exit status 2."""
    name, cli, prog, words = next(iter(arguments), ""), COMMANDS.cli, "clipid", __doc__.partition(".")[0]
    if name == "train":
        from clipid_utils.training.command import RECIPES

        chosen = {key: RECIPES[key] for key in arguments[1:2] if key in RECIPES}  # its own options are suggested
        cli = functools.partial(tyro.extras.overridable_config_cli, chosen or RECIPES)
        prog, words, arguments = "clipid train", "Train by a recipe, with changes of your own.", arguments[1:]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = cli(prog=prog, description=words, args=arguments, config=(FlagCreatePairsOff,))
    except SystemExit as ended:
        if ended.code:
            print(short(said.getvalue(), name, EXTRAS), file=sys.stderr)
        raise
    return functools.partial(run_recipe, parsed) if name == "train" else parsed


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status: 0 done, 1 bad input or nothing fetched, 2 wrong usage, 130 stopped by Ctrl-C."""
    use_one_arena()
    words = list(map(with_home, sys.argv[1:] if arguments is None else arguments))
    name, before = next(iter(words), ""), signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            parse(words)()
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"\nstopped: run the same command{' with --resume' * (name == 'train')} to continue", file=sys.stderr)
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        from clipid_utils.files import install_line

        raise SystemExit(f"clipid {name} needs {error.name}: {install_line(EXTRAS[name])}") from error
    except (ValueError, OSError, RuntimeError, ImportError, ArithmeticError) as error:
        raise SystemExit(f"clipid {name}: {error}") from error
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
