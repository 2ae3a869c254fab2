"""Open Clip Art, from a miniature package in the true one's format; and the true one where it is prepared."""

import gzip
import hashlib
import json
from types import SimpleNamespace

import miniature
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import ImageOps

from clipid_utils.data.captions import write_captions
from clipid_utils.data.dictionary import fetch, openclipart
from clipid_utils.data.dictionary.openclipart import (
    FEATURES,
    load_openclipart,
    split_openclipart,
    tidy_title,
    to_records,
)
from clipid_utils.data.dictionary.rasterise import render_svg
from clipid_utils.files import read_json
from clipid_utils.paths import CACHE, DATA

PLACE = "./usr/share/openclipart/svg/"
METADATA = """<metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about=""><dc:title>{title}</dc:title>
 <dc:description>{description}</dc:description><dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
 <dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
 <dc:creator><cc:Agent><dc:title>Ani Lestari</dc:title></cc:Agent></dc:creator>
 <cc:license rdf:resource="{licence}"/><dc:language>{language}</dc:language></cc:Work></rdf:RDF></metadata>"""
SHAPES = '<rect x="9" y="9" width="{w}" height="20" fill="#{colour:06x}"/><circle cx="40" cy="40" r="{r}" fill="red"/>'


def drawing(title="", shapes=None, seed=0, keywords=(), description="", licence="http://web.resource.org/cc/PublicDomain",
            language="en") -> bytes:
    rng = np.random.default_rng(seed)
    shapes = shapes if shapes is not None else SHAPES.format(w=rng.integers(9, 60), colour=rng.integers(1 << 23),
                                                             r=rng.integers(5, 20))
    keywords = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    metadata = METADATA.format(**{**locals(), "keywords": keywords})
    return miniature.SVG.format(metadata + shapes).encode()


DRAWINGS = {
    "animals/cats/cat_01.svg": drawing("Black  cat", seed=1, description="A cat,\n asleep.",
                                       keywords=("cat", "hash", "house_pet", "Cat", "cat", "HASH(0x8)", "Ani Lestari")),
    "animals/zipped.svg": gzip.compress(drawing("Yellow bird", seed=2, description="HASH(0x85cd6ec)")),
    "computer/icons/theme/home.svg": drawing("Home", seed=3),
    "shapes/stars/star_01.svg": drawing("Star", seed=4),
    "food/untitled.svg": drawing("", seed=5),
    "food/gatto.svg": drawing("Gatto", seed=6, language="it-IT"),
    "food/all.svg": drawing("Soup", seed=7, language="All", licence="", description="Hashed"),
    "food/gpl.svg": drawing("Switch", seed=8, licence="http://creativecommons.org/licenses/GPL/2.0/"),
    "special/gradient.svg": drawing("Gradient", shapes=""),
    "special/white.svg": drawing("White", shapes='<rect width="50" height="50" fill="#fefefe"/>'),
    "special/broken.svg": b"<svg><metadata></svg>",
    "special/plain.svg": miniature.svg(9).encode(),
    "special/zipped.svg": gzip.compress(drawing("Bomb", description=9999 * "x")),
}  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A miniature package to be had through stand-in clients, with a data folder and an empty cache of their own."""
    archive = miniature.pack({PLACE + path: content for path, content in DRAWINGS.items()}, "w")
    registry = tmp_path / "registry"
    for folder in (registry, tmp_path / "bin", tmp_path / "data"):
        folder.mkdir()
    (registry / "online").touch()
    (registry / "openclipart-svg.deb").write_bytes(archive)
    (registry / "openclipart-svg.version").write_text("1:0.18-1")
    miniature.write_clients(tmp_path / "bin", registry)
    pin = read_json(DATA / "sources.json")["openclipart"]["openclipart-svg"]
    pin["versions"] = {"1:0.18-1": [hashlib.sha256(archive).hexdigest()]}
    (tmp_path / "data/sources.json").write_text(json.dumps({"openclipart": {"openclipart-svg": pin}}))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(openclipart, "DATA", tmp_path / "data")
    monkeypatch.setattr(openclipart, "MOST_UNZIPPED", 9999)
    return SimpleNamespace(cache=tmp_path / "cache", registry=registry, bin=tmp_path / "bin")


def test_rows_hold_what_the_files_say(world):
    rows, _ = load_openclipart(world.cache)
    assert rows.features == FEATURES
    assert rows["source"][:] == ["animals/cats/cat_01.svg", "animals/zipped.svg", "food/all.svg"]
    cat, bird, soup = rows
    assert (cat["title_en"], cat["description_en"]) == ("Black cat", "A cat, asleep.")
    assert cat["keywords_en"] == ["cat", "house pet", "Cat"]  # without "hash" and the author
    assert (cat["author"], cat["licence"]) == ("Ani Lestari", "public domain")
    assert (cat["group"], cat["folder"]) == ("animals", "animals/cats")
    assert (bird["title_en"], bird["description_en"], bird["keywords_en"]) == ("Yellow bird", "", [])
    assert soup["description_en"] == "Hashed"
    assert soup["licence"] == "public domain"  # none named: the package's holds


def test_pictures_are_cut_to_what_is_drawn_and_centred(world):
    for image in load_openclipart(world.cache)[0]["image"]:
        assert image.mode == "RGB" and image.size == (128, 128)
        ink = np.argwhere((np.asarray(image) < 250).any(-1))
        (top, left), (bottom, right) = ink.min(0), ink.max(0)
        assert max(bottom - top, right - left) in (118, 119) and abs(top - (127 - bottom)) <= 1


def test_what_is_left_out_is_reported_with_its_reason(world):
    _, report = load_openclipart(world.cache)
    reasons = {
        "a desktop icon": "computer/icons/theme/home.svg", "a star from a series": "shapes/stars/star_01.svg",
        "no title": "food/untitled.svg", "not in the public domain": "food/gpl.svg: ",
        "a title in another language, as its author says": "food/gatto.svg: it-IT Gatto",
    }  # fmt: skip
    assert all(report.examples[reason][0].startswith(example) for reason, example in reasons.items())
    assert report.examples["nothing to be seen on white"] == ["special/gradient.svg", "special/white.svg"]
    unread = report.examples["metadata that cannot be read"]
    assert unread[0].startswith("special/broken.svg: no SVG (") and unread[1] == "special/plain.svg: no cc:Work in it"
    assert unread[2] == "special/zipped.svg: no SVG (more than 9,999 bytes)"
    assert (report.read, report.kept) == (len(DRAWINGS), 3)
    assert report == load_openclipart(world.cache)[1]  # from the cache


def test_a_second_call_needs_no_client(world):
    first, _ = load_openclipart(world.cache)
    for client in world.bin.iterdir():
        client.unlink()
    assert load_openclipart(world.cache)[0].to_dict() == first.to_dict()


def test_without_apt_the_error_says_where_to_prepare_it(world, capsys):
    (world.bin / "apt-get").unlink()
    with pytest.raises(fetch.FetchError, match="the Debian package openclipart-svg.*Debian, Ubuntu, Colab"):
        load_openclipart(world.cache)
    assert "there is no apt-get here" in capsys.readouterr().out


@pytest.mark.parametrize("title, tidy", [
    ("Clipart by Nicu Buculei - arrow08_4", "arrow"), ("CayennePepper_01.svg", "Cayenne Pepper"),
    ("xbox-controller", "xbox controller"), ("France - Corsica", "France - Corsica"), ("2 dead frogs", "2 dead frogs"),
    ("pumpkin2", "pumpkin"), ("eMule Icon", "eMule Icon"), ("LED (Blue)", "LED (Blue)"), ("7", "7"), ("", ""),
])  # fmt: skip
def test_titles_are_tidied(title, tidy):
    assert tidy_title(title) == tidy


def test_records_are_captions_records(world, tmp_path):
    rows, _ = load_openclipart(world.cache)
    records = list(to_records(rows, "validation"))
    assert records[0]["captions"] == ["Black cat", "A cat, asleep."] and records[1]["captions"] == ["Yellow bird"]
    assert {(record["source"], record["split"]) for record in records} == {("openclipart", "validation")}
    write_captions(records, tmp_path / "records.parquet")  # refuses what is none


def dictionary(**splits) -> DatasetDict:
    """Splits of (picture, English name)s as the picture dictionary has them."""
    return DatasetDict({
        name: Dataset.from_dict({"image": [image for image, _ in rows], "name_en": [title for _, title in rows]})
        .cast_column("image", ImageFeature()) for name, rows in splits.items()
    })  # fmt: skip


def test_splits_leave_out_near_copies_and_unseen_names():
    pictures = [render_svg(miniature.svg(seed)) for seed in range(60)]
    titles = [f"thing {'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]}" for i in range(60)]
    titles[5] = "Clipart by Ani - Lion2"
    pictures[40] = ImageOps.mirror(pictures[50])  # a pair of their own
    rows = {name: [""] * 60 for name in FEATURES if name not in ("image", "title_en", "source", "keywords_en")}
    rows |= {"image": pictures, "title_en": titles, "source": [f"a/{i}.svg" for i in range(60)],
             "keywords_en": [[]] * 60}
    table = Dataset.from_dict({name: rows[name] for name in FEATURES}, features=FEATURES)
    train = [(pictures[0], "zero")]
    tested = {"validation": [(pictures[1], "one")], "unseen_concept": [(render_svg(miniature.svg(99)), "lion")],
              "unseen_artist": [(ImageOps.mirror(pictures[3]), "three")]}
    splits, report = split_openclipart(table, dictionary(train=train, **tested))
    assert report.examples == {"a near copy of a picture of validation": ["a/1.svg"],
                               "a near copy of a picture of unseen_artist": ["a/3.svg"],
                               "the name of an unseen concept": ["a/5.svg"]}
    drawn = [*splits["train"]["source"], *splits["validation"]["source"]]
    assert sorted(drawn) == sorted(f"a/{i}.svg" for i in range(60) if i not in (1, 3, 5)) and report.kept == 57
    assert 1 <= len(splits["validation"]) <= 15
    assert {"a/40.svg", "a/50.svg"} <= set(splits["train"]["source"])  # copies of one another stay together


PREPARED = next(CACHE.glob("openclipart-*/rows"), None)


@pytest.mark.skipif(PREPARED is None, reason="Open Clip Art is not prepared: load_openclipart() does so")
def test_the_true_one_has_its_size_and_no_row_without_a_title():
    rows, report = load_openclipart()
    assert report.kept == len(rows) and 4100 < len(rows) < 4300 and report.read == 7458
    assert all(rows["title_en"][:]) and len(set(rows["source"][:])) == len(rows)
    assert sum(map(bool, rows["keywords_en"][:])) > 3900 and sum(map(bool, rows["description_en"][:])) > 1200
    assert not any(source.startswith(("computer/icons", "shapes/stars")) for source in rows["source"])
