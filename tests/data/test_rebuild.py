"""The data card's recipe for the ancestor's sources: its code runs unchanged on miniatures of the published files."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from picture_server import Near, PictureServer, picture, resolve
from PIL import Image
from test_conceptual import sample, write_tar
from test_wit import row, write

from clipid_utils.__main__ import main
from clipid_utils.data.captions import read_captions, write_captions
from clipid_utils.data.download import download
from clipid_utils.data.download.addresses import PublicNetwork
from clipid_utils.data.report import Report
from clipid_utils.data.sources.flickr import read_xflickrco, read_xm3600
from clipid_utils.data.translation.translate import SHIPPED
from clipid_utils.paths import DATA

# By the number of its picture, whose content it decides
COCO = {10: ("seekor kucing di atas meja", "kucing itu tidur"), 11: ("dua anjing di rumput",), 12: ("sebuah vas biru",)}
FLICKR = {20: ("seorang anak di tangga", "anak itu memanjat"), 21: ("seorang pria bersepeda",)}
WIT = dict(enumerate((
    "seekor kucing hitam tidur di atas kursi kayu", "dua ekor anjing berlari di kebun yang luas",
    "seorang anak perempuan membaca buku di bawah pohon", "perahu putih di tepi sungai yang tenang",
    "sepiring nasi dengan sayur dan telur rebus", "seorang pria mengendarai sepeda di jalan raya",
    "rumah tua dengan atap merah di lereng bukit", "beberapa burung kecil bertengger di dahan pohon"), 30))
CC12M = dict(enumerate((
    "a black cat on a red chair", "two dogs in the garden", "a small fish in the sea", "a woman with a green hat",
    "three birds on a tree", "a man on a bicycle", "a white boat on the river", "a child with a blue ball",
    "a plate of rice", "an old house"), 40))

KILLED = """
import itertools, os
import picture_server
from clipid_utils.__main__ import main
from clipid_utils.data.download import addresses, download
from clipid_utils.data.translation import translate

def dies_after(times, function):
    calls = itertools.count(1)
    def called(*arguments):
        function(*arguments)
        if next(calls) == times:
            os.kill(os.getpid(), 9)
    return called

translate.ROWS_A_CORE, translate.usable_cores = 2, lambda: 2
translate.shards.write_table = dies_after(1, translate.shards.write_table)
download.Manifest.add = dies_after(3, download.Manifest.add)
download.PublicNetwork = lambda: addresses.PublicNetwork(picture_server.resolve, picture_server.Near())
main()
"""


def steps() -> list[tuple[str, str]]:
    """The language and the text of each block of code in the card's recipe.

    The small model replaces opus-mt, and a larger share of validation replaces 0.02, since there are few pictures.
    """
    card = (DATA / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## [^\n]*a recipe\n.*?(?=^## )", card, re.MULTILINE | re.DOTALL)
    for text, here in (("Helsinki-NLP/opus-mt-en-id", str(SHIPPED)), ("validation_share=0.02", "validation_share=0.4")):
        assert text in section
        section = section.replace(text, here)
    return re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The arguments of the package's own commands, except `train`."""
    lines = (shlex.split(line) for line in block.replace("\\\n", " ").splitlines())
    return [line[3:] for line in lines if line[:3] == ["python", "-m", "clipid_utils"] and line[3] != "train"]


def write_published(server: PictureServer) -> None:
    """Writes the files that step 1 fetches, and the records of the test sets, to the current folder."""
    for folder in ("translated", "train2017", "Flicker8k_Dataset", "wit", "cc12m-wds"):
        Path(folder).mkdir()
    for number in COCO:
        Path(f"train2017/{number:012d}.jpg").write_bytes(picture(number, seed=number))
    for number in FLICKR:
        Path(f"Flicker8k_Dataset/{number}.jpg").write_bytes(picture(number, seed=number))
    Path("translated/coco.tsv").write_text("caption\timage_name\nhilang\t000000000099.jpg\n" + "".join(
        f"{text}\t{number:012d}.jpg\n" for number, texts in COCO.items() for text in texts))
    Path("translated/flickr8k.json").write_text(json.dumps(
        {f"{number}.jpg": [f"<start> {text} <end>" for text in texts] for number, texts in FLICKR.items()}))
    address = "http://a.id/{}.jpg".format
    Path("cc12m.tsv").write_text("".join(f"{address(number)}\t{text}\n" for number, text in CC12M.items())
                                 + f"{address(40)}\tagain\n{address(60)}\t\nhttp://a.id/1.svg\ta map\n")
    Path("translated/cc12m_translate_final.tsv").write_text(
        f"caption\turl\nseekor kucing hitam di kursi merah\t{address(40)}\nlogo\t{address(41)}\n")
    for tar, numbers in enumerate(((40, 41, 42, 43, 60), (44, 45, 46, 47, 48, 49))):
        samples = (sample(f"{number:08d}", "a caption", picture(number, seed=number), url=address(number))
                   for number in numbers)
        write_tar(f"cc12m-wds/cc12m-train-{tar:04d}.tar", dict(chain.from_iterable(map(dict.items, samples))))
    rows = [row("", text) | {"image_url": server.url("own", number)} for number, text in WIT.items()]
    rows += [row("", "sebuah candi") | {"image_url": server.url("gone", 9)}, rows[0], row("a.jpg", "A temple", "en")]
    for part in range(2):
        write(Path(f"wit/wit_v1.train.all-{part:05d}-of-00010.tsv.gz"), rows[part::2])

    # COCO's twelfth is a test picture too, in another file
    for name, number in (("ff.jpg", 70), ("COCO_val2014_000000000012.jpg", 12)):
        Path(name).write_bytes(picture(0, kind="PNG", seed=number))
    Path("xm.jsonl").write_text('{"image/key": "ff", "id": {"caption": ["sebuah danau"]}}')
    Path("co.jsonl").write_text('{"sentences": ["vas"], "id": 12, "img_path": "COCO_val2014_000000000012.jpg"}')
    write_captions(read_xm3600("xm.jsonl", ".", Report()), "xm3600.jsonl")
    write_captions(read_xflickrco("co.jsonl", ".", Report()), "xflickrco.jsonl")


def json_rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def shard_rows() -> list[dict]:
    shards = sorted(Path("cc12m-id").glob("part-*.parquet"))
    return [found for shard in shards for found in pq.read_table(shard).to_pylist()]


@pytest.mark.slow
def test_the_recipe_loses_and_doubles_no_row_though_it_is_killed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "PublicNetwork", lambda: PublicNetwork(resolve, Near()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    names, run, left = {}, [], {}
    with PictureServer() as server:
        write_published(server)
        for language, block in steps():
            if "cc12m_translate_final" in block:  # the other of two ways, here beside the first
                block = block.replace('"cc12m.jsonl"', '"as-they-are.jsonl"')
            if language == "python":
                exec(compile(block, "data/README.md", "exec"), names)
            for command in commands(block) if language == "sh" else ():
                if command[0] in ("translate", "download"):
                    done = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, text=True)
                    assert done.returncode == -signal.SIGKILL, done.stderr
                    left[command[0]] = shard_rows() if command[0] == "translate" else json_rows("wit/manifest.jsonl")
                monkeypatch.setattr(sys, "argv", ["clipid_utils", *command])
                main()
                run.append(command[0])
    assert run == ["translate", "download", "check"]
    assert re.search(r"train\.parquet: \d+ records, 0 bad", capsys.readouterr().err)

    # Translated: each row once, in order, and each that did not come through was counted
    rows = shard_rows()
    assert [found["captions_en"] for found in rows] == [[text] for text in CC12M.values()]
    assert 0 < len(left["translate"]) < len(rows) and left["translate"] == rows[: len(left["translate"])]
    checked, filtered, kept = names["checked"], names["filtered"], json_rows("cc12m.jsonl")
    assert checked.read == sum(found["captions_mark"] == [""] for found in rows) and len(kept) > 5
    assert filtered.read == checked.kept + 2 + len(WIT) + 1
    assert {found["url"]: found["captions"] for found in kept}.items() <= {
        found["url"]: found["captions"] for found in rows}.items()
    assert [found["url"] for found in json_rows("as-they-are.jsonl")] == ["http://a.id/40.jpg"]  # the other is a word

    # Downloaded: each address once, and what was done before the kill was not asked for again
    lines = json_rows("wit/manifest.jsonl")
    assert sorted(line["url"] for line in lines) == sorted(found["url"] for found in json_rows("wit.jsonl"))
    assert Counter(line["status"] for line in lines) == {"kept": len(WIT), "refused": 1}
    assert left["download"] == lines[:3]
    assert all(server.asked[re.sub(r"http://|:\d+", "", line["url"])] == 1 for line in lines[:3])

    # Joined: each picture with its own captions, on one side, as often as its source weighs
    expected = {("coco", texts): number for number, texts in COCO.items() if number != 12}
    expected |= {("flickr8k", texts): number for number, texts in FLICKR.items()}
    expected |= {("wit", (text,)): number for number, text in WIT.items()}
    expected |= {("cc12m", tuple(found["captions"])): int(Path(found["url"]).stem) for found in kept}
    times = {"train": Counter(), "validation": Counter()}
    for side, counted in times.items():
        for found in read_captions(f"{side}.parquet"):
            key = found["source"], tuple(found["captions"])
            counted[key] += 1
            original = np.asarray(Image.open(io.BytesIO(picture(0, seed=expected[key]))), float)
            assert np.abs(original - np.asarray(found["image"])).mean() < 5
    assert times["train"] and times["validation"] and times["train"].keys().isdisjoint(times["validation"])
    assert times["train"].keys() | times["validation"].keys() == expected.keys()
    assert set(times["validation"].values()) == {1}
    assert all(count == (2 if source == "wit" else 1) for (source, _), count in times["train"].items())
    assert names["report"].dropped == {"copy of a picture that is held out": 1}
    assert names["report"].kept == len(expected)
