"""The command `clipid`: the same conventions for every command."""

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_clip

import clipid_utils
from clipid_utils.__main__ import EXTRAS, MODEL, main
from clipid_utils.data import photographs
from clipid_utils.data.download import download
from clipid_utils.data.report import Report
from clipid_utils.data.translation import on_ray, translate
from clipid_utils.evaluation import command as evaluating
from clipid_utils.evaluation import suite
from clipid_utils.inference import command as searching
from clipid_utils.inference.index import build_index
from clipid_utils.inference.search import query_embeds
from clipid_utils.paths import CHECKPOINTS
from clipid_utils.terminal import short
from clipid_utils.training import command as training

LINES = [b'{"image_path": "a.png", "captions": ["seekor kucing"], "url": "http://localhost/a.png"}',
         b'{"image_path": "a.png", "captions": ["seekor anjing"], "url": "http://localhost/b.png"}']


def run(line: str, capsys, **words) -> tuple[object, str, str]:
    """Exit status, or the line that goes with status 1; stdout; stderr."""
    status = 0
    try:
        main([word.format(**words) for word in line.split()])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Records and a picture in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(LINES) + b"\r\n")  # as Windows' editors write it
    for number, line in enumerate(LINES):
        (tmp_path / "in" / f"part-{number}.jsonl").write_bytes(line.replace(b"a.png", b"../a.png"))
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """Stand-ins for the work of the commands; gives what each was called with."""
    seen = {}

    def fetch(rows, folder, **options):
        report = Report(kept=options["contact"] != "nobody")
        seen.update(rows=list(rows), **options)
        if any(row["captions"] for row in seen["rows"]):
            folder.mkdir()
            (folder / "captions.jsonl").touch()
        return report

    class Translator(translate.Translator):
        name, folder = "m", translate.SHIPPED
        workers = beam = 1

        def __init__(self, model, **options):
            seen.update(model=model, **options)

        def __call__(self, texts, tick=None):
            return [translate.Translation(f"id {text}") for text in texts]

    monkeypatch.setattr(download, "download", fetch)
    monkeypatch.setattr(translate, "Translator", Translator)
    monkeypatch.setattr(on_ray, "translate_on_ray", lambda *args, **options: seen.update(options, args=args))
    monkeypatch.setattr(on_ray, "map_shards", lambda *args, **options: seen.update(options, args=args) or 2)
    monkeypatch.setattr(training, "run", lambda recipe: seen.update(recipe=recipe) or recipe.seed != 13)
    return seen


def test_help_lists_the_commands(capsys):
    status, out, _ = run("--help", capsys)
    assert status == 0 and all(f"• {name} " in out for name in EXTRAS)


@pytest.mark.parametrize("name", EXTRAS)
def test_every_option_is_explained(name, capsys):
    status, out, _ = run(f"{name} --help", capsys)
    assert status == 0
    words = " ".join(out.replace("│", " ").split())
    assert not [part for part in words.split(" --")[1:] if part.partition(" ")[2].startswith("(default")], out


@pytest.mark.parametrize("line, words", [
    ("", "Expected one of {{prepare, check"), ("chek a", "did you mean check? (clipid --help)"),
    ("check", "INPUT"), ("check a --rot b", "did you mean --root? (clipid check --help)"), ("check a --root", "--root"),
    ("search a b -k many", "-k"), ("translate a b --device tpu", "cuda"), ("download a", "FOLDER"),
    ("check a b c", "b, c"), ("evaluate a --in b", "--in"), ("embed a b --worker 2", "did you mean --workers?"),
    ("train minni", "minni"), ("train mini --epochs 3", "did you mean --stages.0.fit.epochs? (clipid train --help)"),
    ("train indobert-base --dtype int8", "bfloat16"),
])
def test_wrong_usage_is_one_line_with_the_nearest_name_and_status_2(line, words, capsys):
    status, out, err = run(line, capsys)
    assert status == 2 and not out and err.count("\n") == 1 and words.format() in err


def test_a_box_in_colour_is_read_too():
    box = "╭─ \x1b[1mValue error\x1b[0m ───╮\n│ Error parsing \x1b[91m--k\x1b[0m: no │\n│ ───── │\n│ Help │\n╰────╯\n"
    assert short(box, "search", EXTRAS) == "clipid search: Error parsing --k: no (clipid search --help)"


@pytest.mark.parametrize("line, words", [
    ("check nowhere", "nowhere: no such file"), ("check nothing/*.jsonl", "no file matches"),
    ("check {0}", "no file here ends in"), ("download nowhere {0}/out", "nowhere: no such file"),
    ("translate nowhere {0}/out", "nowhere: no such file"), ("embed nowhere {0}/out", "nowhere: no such file"),
    ("translate {0}/in {0}/out --ray a b", "--ray takes one address"), ("evaluate no/where", "no/where"),
    ("evaluate mini photo --on kamus", "no task 'kamus': name some of photographs"),
    ("evaluate mini photo mini --on pairs", "the model mini is named twice"),
    ("evaluate mini --on xm3600", "xm3600 needs files of yours: --on xm3600=captions.jsonl,FOLDER"),
    ("evaluate mini --on folders={0}/no", "/no: no such folder: name a folder with one subfolder"),
    ("search nowhere kucing", "nowhere is not a folder"), ("search {0}", "no pictures in"),
    ("train mini -o {0}/run --train {0}/a.jsonl", "learns its tokenizer from the picture dictionary"),
    ("train indobert-base -o {0}/run --train {0}/a.jsonl --image-column jpg", "--caption-column are for tars"),
])
def test_bad_input_is_one_line_and_status_1(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, _ = run(line.replace("{0}", str(tmp_path)), capsys)
    assert isinstance(status, str) and "\n" not in status and status.startswith(f"clipid {line.split()[0]}: ")
    assert words in status and "next:" not in out


@pytest.mark.parametrize("given", ["{0}/a.jsonl", "{0}/in", "{0}/in/part-*.jsonl", "~/a.jsonl"])
@pytest.mark.parametrize("name", ["check", "download", "translate"])
def test_input_is_a_file_a_folder_or_a_glob_with_any_line_ends(name, given, folder, asked, capsys):
    given, out = given.replace("{0}", str(folder)), folder / "out"
    status, said, _ = run(f"{name} {given}" + f" {out}" * (name != "check"), capsys)
    assert status == 0 and "next: clipid " in said
    if name == "download":
        assert [row["url"][-5] for row in asked["rows"]] == ["a", "b"] and asked["total"] == 2
        assert [row["row"] for row in asked["rows"]] == [0, 1]
    if name == "translate":  # its folder of part files is input for the next command
        assert run(f"check {out}", capsys)[0] == 0
        assert clipid_utils.data.captions.read_captions(out)["captions"][1] == ["id seekor anjing"]


@pytest.mark.parametrize("option", ["--root=~/pictures", "--root ~/pictures"])
def test_a_home_folder_is_expanded_in_options_too(option, folder, capsys):
    (folder / "a.png").rename((folder / "pictures").mkdir() or folder / "pictures" / "a.png")
    assert run(f"check ~/a.jsonl {option}", capsys)[0] == 0


def test_a_download_that_fetches_nothing_exits_with_1(folder, asked, capsys):
    status, out, _ = run(f"download ~/a.jsonl {folder}/out --contact nobody", capsys)
    assert status == 1 and "0 kept" in out and "next:" not in out


def test_records_are_named_only_if_there_are_some(folder, asked, capsys):
    (folder / "urls.txt").write_text("http://localhost/a.png\n")
    for name, count in (("a.jsonl", 2), ("urls.txt", 0)):
        assert run(f"download ~/{name} {folder}/{name}-out", capsys)[1].count("captions.jsonl") == count


def test_the_rows_of_a_compressed_list_are_counted(folder, asked, capsys):
    import gzip

    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(LINES * 500)))
    assert run(f"download ~/b.jsonl.gz {folder}/out", capsys)[0] == 0
    assert asked["total"] == len(asked["rows"]) == 1000


@pytest.mark.parametrize("name", ["translate", "embed"])
@pytest.mark.parametrize("option, address", [("--ray", None), ("--ray ray://head:10001", "ray://head:10001")])
def test_ray_runs_here_or_on_a_cluster(name, option, address, folder, asked, capsys):
    (folder / "in" / "a.parquet").touch()
    assert run(f"{name} ~/in ~/out -m mini --workers 2 --cores 3 --gpus 0.5 {option}", capsys)[0] == 0
    options = {key: asked[key] for key in ("address", "workers", "cores", "gpus")}
    assert options == {"address": address, "workers": 2, "cores": 3, "gpus": 0.5}
    if name == "embed":
        files, out, _, settings = asked["args"]
        assert (files, out) == ([folder / "in" / "a.parquet"], folder / "out")
        assert settings == {"checkpoint": str(CHECKPOINTS / "mini"), "root": str(folder / "out")}


def test_a_run_that_was_stopped_says_how_to_continue(asked, tmp_path, capsys):
    assert run(f"train mini -o {tmp_path}/run", capsys)[:2] == (
        0, f"{tmp_path}/run/model: trained\nnext: clipid evaluate {tmp_path}/run, or "
           f'clipid search FOLDER "kucing" -m {tmp_path}/run\n')
    assert asked["recipe"].out == tmp_path / "run" and asked["recipe"].train == "dictionary"
    status, _, err = run("train mini --seed 13", capsys)
    assert status == 130 and err == "\nstopped: run the same command with --resume to continue\n"


def test_the_figures_of_a_run_are_written_beside_its_weights(tmp_path, monkeypatch, capsys):
    clipid_utils.save_clip(*tiny_clip(), tmp_path / "run" / "model")
    measured = {"retrieval": {"validation": 1}}
    monkeypatch.setattr(evaluating, "load_picture_dictionary", dict)
    monkeypatch.setattr(evaluating, "evaluate_checkpoint", lambda checkpoint, _: measured)
    assert run(f"evaluate {tmp_path}/run", capsys)[0] == 0
    assert run(f"evaluate {tmp_path}/run --out {tmp_path}/a.json", capsys)[0] == 0
    for path in (tmp_path / "run" / "model" / "metrics.json", tmp_path / "a.json"):
        assert json.loads(path.read_text()) == measured
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(evaluating, "evaluate_checkpoint", None)  # nothing is measured in vain
    status, *_ = run(f"evaluate {tmp_path}/run", capsys)
    assert "run/model cannot be written to: name a file elsewhere with --out" in status
    monkeypatch.undo()
    monkeypatch.setattr(evaluating, "evaluate_checkpoint", None)
    (tmp_path / "file").touch()
    status, *_ = run(f"evaluate {tmp_path}/run --out {tmp_path}/file/new/a.json", capsys)
    assert "file is a file, not a folder: name a file elsewhere with --out" in status


def test_figures_of_an_installed_or_fetched_model_are_written_here(tmp_path, monkeypatch, capsys):
    """The folders of an installed package and of the hub's cache belong to others."""
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(evaluating, "load_picture_dictionary", dict)
    monkeypatch.setattr(evaluating, "evaluate_checkpoint", lambda checkpoint, _: {"retrieval": {}})
    monkeypatch.setattr(evaluating, "fetch_checkpoint", lambda name: tmp_path / "checkpoints" / name)
    for checkpoints, in_clone, written in (("checkpoints", False, here), ("other", True, here),
                                           ("checkpoints", True, tmp_path / "checkpoints" / "mini")):
        monkeypatch.setattr(evaluating, "CHECKPOINTS", tmp_path / checkpoints)
        monkeypatch.setattr(evaluating, "IN_CLONE", in_clone)
        assert run("evaluate mini", capsys)[0] == 0
        (written / "metrics.json").unlink()


@pytest.mark.parametrize("line, models, on", [
    ("a b", ("a", "b"), ()), ("v+t", ("v+t",), ()), ("a --on pairs groups", ("a",), ("pairs", "groups")),
    ("a b v+t --on xm3600=~/c.jsonl,~/x", ("a", "b", "v+t"), ("xm3600=~/c.jsonl,~/x",)),
])
def test_models_are_compared_on_tasks(line, models, on, tmp_path, monkeypatch, capsys):
    """By default on all that need no files of the user's. The figures go to a file and to a picture beside it."""
    asked, cell = [], {"value": 0.5, "low": 0.4, "high": 0.6}
    report = {"models": dict.fromkeys(models), "tasks": {"pairs": {
        "kind": "Pairs", "results": {name: {"all": {"accuracy": cell}} for name in models},
        "differences": {f"{name} - {models[0]}": {"all": {"accuracy": cell}} for name in models[1:]}}}}
    monkeypatch.setattr(evaluating, "evaluate_models", lambda *given: asked.append(given) or report)
    monkeypatch.chdir(tmp_path)
    for option, out in (("", "evaluation.json"), (f" --out {tmp_path}/b.json", "b.json")):
        status, said, _ = run(f"evaluate {line}{option}", capsys)
        assert status == 0 and said.startswith(suite.as_table(report)) and f"{out}, and as a picture" in said
        assert json.loads((tmp_path / out).read_text()) == report
        assert Image.open(tmp_path / out.replace("json", "png")).width > 500
    assert asked == [(models, on)] * 2
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(evaluating, "evaluate_models", None)  # nothing is measured in vain
    assert "name a file elsewhere with --out" in run(f"evaluate {line}", capsys)[0]


def test_two_models_are_measured_on_a_folder_of_classes(searched, tmp_path, monkeypatch, capsys):
    """All of it with true models, which differ in their weights alone."""
    clipid_utils.save_clip(*tiny_clip(1), tmp_path / "other")
    monkeypatch.setattr(suite, "CACHE", tmp_path / "cache")
    for name in "ab":
        (tmp_path / "kelas" / name).mkdir(parents=True)
        (tmp_path / "pictures" / f"{name}.png").rename(tmp_path / "kelas" / name / "1.png")
    models = [str(tmp_path / name) for name in ("model", "other")]
    status, said, _ = run(f"evaluate {' '.join(models)} --on folders={tmp_path}/kelas --out {tmp_path}/a.json", capsys)
    found = json.loads((tmp_path / "a.json").read_text())
    assert status == 0 and said.splitlines()[0].split()[2:4] == models and "templates top1" in said
    assert list(found["models"]) == models and found["tasks"]["folders"]["data"]["pictures"] == 2
    assert len({model["fingerprint"] for model in found["models"].values()}) == 2


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """A model's folder and a folder with three pictures and a broken one; gives "FOLDER -m MODEL" and the index."""
    model, processor = tiny_clip()
    clipid_utils.save_clip(model, processor, tmp_path / "model")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, colour in zip("abc", ("red", "green", "blue"), strict=True):
        Image.new("RGB", (30, 20), colour).save(pictures / f"{name}.png")
    (pictures / "d.png").write_bytes(b"not a picture")
    monkeypatch.setattr(searching, "CACHE", tmp_path / "cache")
    index = build_index(model, processor, pictures, progress=False)

    def expected(k, **query):
        scores = index.embeds @ query_embeds(model, processor, **query)[0]
        return [f"{scores[row]:.3f}  {pictures / index.keys[row]}" for row in np.argsort(-scores)[:k]]

    return f"{pictures} -m {tmp_path}/model", expected


def test_search_prints_scores_and_paths_the_best_first(searched, tmp_path, capsys):
    line, expected = searched
    picture = tmp_path / "pictures" / "b.png"
    for query, asked in (("kucing", {"text": "kucing"}), (f"-i {picture}", {"image": picture}),
                         (f"kucing -i {picture}", {"text": "kucing", "image": picture})):
        status, out, err = run(f"search {line} {query} -k 2", capsys)
        assert status == 0 and out.splitlines() == expected(2, **asked)
        assert "1 of 4 pictures could not be read: d.png" in err


def test_without_a_query_each_line_is_one(searched, tmp_path, monkeypatch, capsys):
    """An empty line is no query, and one that cannot be answered does not end the command."""
    line, expected = searched
    picture = tmp_path / "pictures" / "b.png"
    lines = f"kucing\n\n  \nk\udcff\ngambar: nowhere.png\n Gambar :{picture} \nanjing laut"  # the last without its end
    typed = io.TextIOWrapper(io.BytesIO(lines.encode(errors="surrogateescape")), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    status, out, err = run(f"search {line} -k 2 --sheet {tmp_path}/a.html", capsys)
    answers = [{"text": "kucing"}, {"image": picture}, {"text": "anjing laut"}]
    assert status == 0 and out.split("\n\n") == ["\n".join(expected(2, **asked)) for asked in answers] + [""]
    said = err[err.index("one query a line"):].splitlines()
    assert len(said) == 3 and "gambar: foto.jpg" in said[0]
    assert "not valid Unicode" in said[1] and "nowhere.png: no such picture" in said[2]
    assert "<h1>anjing laut</h1>" in (tmp_path / "a.html").read_text()


def test_a_sheet_that_cannot_be_written_does_not_end_the_prompt(searched, tmp_path, monkeypatch, capsys):
    line, expected = searched
    monkeypatch.setattr(sys, "stdin", io.StringIO("kucing\nanjing"))
    (tmp_path / "a.html").mkdir()
    status, out, err = run(f"search {line} -k 2 --sheet {tmp_path}/a.html", capsys)
    assert status == 0 and err.count("clipid search: ") == 2
    assert out.splitlines() == expected(2, text="kucing") + expected(2, text="anjing")


def test_nothing_is_indexed_for_a_query_or_a_sheet_that_is_wrong(searched, tmp_path, monkeypatch, capsys):
    line, _ = searched
    monkeypatch.setattr(searching, "build_index", None)
    for options, words in (
        ("kucing --sheet a.gif", "a.gif: a sheet ends in .html or .png, not in '.gif'"),
        ("k\udcff", "'k\\udcff' is not valid Unicode"),
        (f"kucing --sheet {tmp_path}/no/a.png", "no is not a folder"), ("kucing -k 0", "-k must be 1 or more, not 0"),
        (f"kucing --sheet {tmp_path}/pictures/a.png", "is inside"), ("-i nowhere.jpg", "nowhere.jpg: no such picture"),
    ):
        status, out, _ = run(f"search {line} {options}", capsys)
        assert isinstance(status, str) and status.startswith("clipid search: ") and words in status and not out


def test_a_terminal_has_a_prompt_that_ctrl_c_and_ctrl_d_end():
    pty = pytest.importorskip("pty")  # Windows has none
    code = ("import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C there is for this process\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background ignores it\n"
            "from clipid_utils import __main__\nfrom clipid_utils.inference import command\n"
            "__main__.parse = lambda words: lambda: [print(query) for query in command._queries()]\n"
            "for _ in range(2):\n"
            "    try:\n        __main__.main(['search'])\n"
            "    except SystemExit as stop:\n        print('status', stop.code)\n")
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs,
                               start_new_session=True)
    os.close(theirs)
    limit = threading.Timer(120, process.kill)  # a lost key must not hang the tests
    limit.start()
    seen = b""
    with open(ours, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # Linux's end of a terminal
        for count, keys in enumerate((b"kucing\n", b"\x03", b"anjing\n", b"\x04"), 1):
            while seen.count(b"cari> ") < count and (more := screen.read(1024)):
                seen += more
            os.write(ours, keys)
            while keys == b"\x03" and not select.select([ours], [], [], 3)[0]:
                os.write(ours, keys)  # Python loses a Ctrl-C between the prompt and its wait for a key
        while more := screen.read(1024):
            seen += more
    limit.cancel()
    assert process.wait(timeout=60) == 0, seen
    said = [line for line in seen.decode().splitlines() if line and not line.startswith("cari> ")]
    assert said == ["('kucing', None)", "stopped: run the same command to continue", "status 130", "('anjing', None)"]


@pytest.mark.parametrize("line, there, fetched", [("", True, 0), ("", False, 1), ("{0}/mine", False, 0)])
def test_demo_fetches_the_sample_photographs_only_if_it_needs_them(line, there, fetched, tmp_path, monkeypatch, capsys):
    calls, samples = [], tmp_path / "foto-contoh"
    monkeypatch.setitem(sys.modules, "clipid_utils.inference.demo", mock.Mock(
        serve=lambda folder, **options: calls.append((folder, options))))
    monkeypatch.setattr(photographs, "load_sample_photographs", lambda: calls.append("fetched"))
    monkeypatch.setattr(sys.modules["clipid_utils.__main__"], "SAMPLES", samples)
    if there:
        samples.mkdir()
    folder = tmp_path / "mine" if line else samples
    assert run(f"demo {line.format(tmp_path) or samples} --port 7000", capsys)[0] == 0
    assert calls == ["fetched"] * fetched + [(folder, {"model": MODEL, "port": 7000})]


def test_a_warning_is_one_line(monkeypatch, capsys):
    import warnings

    monkeypatch.setattr(training, "run", lambda recipe: not warnings.warn("the loss is stuck", stacklevel=1))
    assert run("train mini", capsys)[2] == "warning: the loss is stuck\n"


# In processes of their own


@pytest.mark.parametrize("module", ["tyro.", "jax.", None])
def test_ctrl_c_is_one_line_at_any_moment(module, tmp_path):
    """While a module of this name is imported; None: while the command works."""
    if module is None:
        code = ("import time; from clipid_utils import __main__\n"
                "__main__.parse = lambda words: lambda: print('import time: working', flush=True) or time.sleep(60)\n"
                "__main__.main(['check'])")
        line = [sys.executable, "-c", code]
    else:
        line = [sys.executable, "-X", "importtime", "-m", "clipid_utils", "train", "--help"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job ignores it
    for text in process.stdout:
        if text.strip() and text.split()[-1].startswith(module or "working"):
            process.send_signal(signal.SIGINT)
            break
    rest = [text for text in process.communicate(timeout=120)[0].splitlines() if not text.startswith("import time:")]
    # A shell shows 130 for both: Python ends itself by the signal if Ctrl-C came into code that `exec` runs
    assert process.returncode in (130, -signal.SIGINT), rest
    assert [text.split(":")[0] for text in rest if text] == ["stopped"]


ABSENT = """
import select
import sys
from importlib.abc import MetaPathFinder
ABSENT = {absent}

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ABSENT:
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, Absent())
from clipid_utils.__main__ import main
for line in {lines}:
    try:
        main(line.split())
    except SystemExit as stop:
        print(line, "->", stop.code)
print(sorted({{"jax", "numpy", "PIL"}} & set(sys.modules)))
"""


def test_a_core_install_shows_help_and_names_the_extra_that_a_command_needs():
    absent = "datasets", "pyarrow", "optax", "orbax", "grain", "ctranslate2", "sentencepiece", "httpx2", "ray"
    wanted = {"check a": "data", "train mini": "train", "download a b": "download", "translate a b": "translate"}

    def printed(lines):
        code = ABSENT.format(absent=absent, lines=lines)
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
        return found.stdout.splitlines(), found.stderr

    lines, err = printed(["--help", "check --help", "search --help"])
    assert lines[-1] == "[]" and [line for line in lines if "->" in line] == [
        "--help -> 0", "check --help -> 0", "search --help -> 0"], err  # and nothing slow was imported
    lines, err = printed(list(wanted))
    for line, (text, extra) in zip(lines, wanted.items(), strict=False):
        assert line.startswith(f"{text} -> clipid {text.split()[0]} needs ") and f"[{extra}]" in line, (line, err)


def test_the_module_is_the_command():
    found = subprocess.run([sys.executable, "-m", "clipid_utils", "chek"], capture_output=True, text=True,
                           env=os.environ | {"COLUMNS": "60"})
    assert (found.returncode, found.stdout) == (2, "") and "did you mean check?" in found.stderr
