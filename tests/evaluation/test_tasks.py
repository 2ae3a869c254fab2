"""The tasks of the suite: each reader on small files in the published formats, and what an error says."""

import hashlib
import os
import shutil

import pytest
from colour_model import spot
from datasets import Dataset, DatasetDict, Image
from test_evaluate import split

from clipid_utils.data.captions import write_captions
from clipid_utils.evaluation import tasks
from clipid_utils.evaluation.tasks import OFFLINE, SOURCES, Pairs, Retrieval, ZeroShot, read_tasks
from clipid_utils.files import json_lines, write_json, write_json_lines
from clipid_utils.metrics import same_key
from clipid_utils.paths import DATA
from clipid_utils.wording import group_phrase


def digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=10).hexdigest().encode()


def keep(path, content: bytes | None = None) -> None:
    """A picture file. The readers of tasks do not decode pictures, so its bytes may be anything: here its own name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(path.name.encode() if content is None else content)


# Captions of pictures. Each function writes two pictures with two captions and one, and some lost ones, as in the true
# files; it returns the request and the names of the pictures.

def xm3600(folder):
    for key in ("000411001ff7dd4f", "cff633a4ebf8d8d6"):
        keep(folder / "gambar" / f"{key}.jpg")
    write_json_lines(folder / "captions.jsonl", [
        {"image/key": "000411001ff7dd4f", "image/locale": "cs", "en": {"caption": ["A plate"]},
         "id": {"caption": ["Sepiring kentang", "Dua kentang"], "caption/tokenized": ["x", "y"]}},
        {"image/key": "cff633a4ebf8d8d6", "image/locale": "id", "id": {"caption": ["Seekor kucing"]}},
        {"image/key": "ffff", "id": {"caption": ["hilang"]}}])
    return f"xm3600={folder}/captions.jsonl,{folder}/gambar", ["000411001ff7dd4f.jpg", "cff633a4ebf8d8d6.jpg"]


def xflickrco(folder):
    keep(folder / "flickr30k" / "1000092795.jpg")
    keep(folder / "val2014" / "COCO_val2014_000000391895.jpg")
    write_json_lines(folder / "test.jsonl", [
        {"sentences": ["Sepiring kentang", "Dua kentang"], "id": "1000092795", "img_path": "1000092795.jpg"},
        {"sentences": ["Seekor kucing"], "id": 391895, "img_path": "COCO_val2014_000000391895.jpg"},
        {"sentences": ["hilang"], "id": 2, "img_path": "2.jpg"}])
    return (f"xflickrco={folder}/test.jsonl,{folder}/flickr30k,{folder}/val2014",
            ["1000092795.jpg", "COCO_val2014_000000391895.jpg"])


def coco(folder):
    for number in (9, 25):
        keep(folder / "val2017" / f"{number:012d}.jpg")
    captions = ((25, "Sepiring kentang"), (9, "Seekor kucing"), (77, "hilang"), (25, "Dua kentang"))
    write_json(folder / "captions_val2017.json", {
        "info": {}, "images": [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (9, 25, 77)],
        "annotations": [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(captions)]})
    return (f"coco={folder}/captions_val2017.json,{folder}/val2017",
            ["000000000025.jpg", "000000000009.jpg"])


def flickr8k(folder):
    for name in ("1000268201_693b08cb0e.jpg", "3.jpg"):
        keep(folder / "Flicker8k_Dataset" / name)
    (folder / "Flickr8k.token.txt").write_text(
        "1000268201_693b08cb0e.jpg#0\tSepiring kentang\n1000268201_693b08cb0e.jpg#1\tDua kentang\n"
        "2258277193_586949ec62.jpg.1#0\thilang\n3.jpg#0\tSeekor kucing\n")
    return (f"flickr8k={folder}/Flickr8k.token.txt,{folder}/Flicker8k_Dataset",
            ["1000268201_693b08cb0e.jpg", "3.jpg"])


def flickr30k(folder):
    for name in ("1000092795.jpg", "2.jpg"):
        keep(folder / "flickr30k-images" / name)
    (folder / "flickr30k.tsv").write_text("caption\timage_name\nSepiring kentang\t1000092795.jpg\nhilang\t1.jpg\n"
                                          "Dua kentang\t1000092795.jpg\nSeekor kucing\t2.jpg\n")
    return f"flickr30k={folder}/flickr30k.tsv,{folder}/flickr30k-images", ["1000092795.jpg", "2.jpg"]


def records(folder):
    for name in ("b.png", "a.png"):
        keep(folder / "gambar" / name)
    write_captions([{"image_path": "gambar/b.png", "captions": ["Sepiring kentang", "Dua kentang"]},
                    {"image_path": "gambar/a.png", "captions": ["Seekor kucing"]}], folder / "captions.jsonl")
    return f"records={folder}/captions.jsonl", ["b.png", "a.png"]


def parquet(folder):
    write_captions([{"image": b"b.png", "captions": ["Sepiring kentang", "Dua kentang"]},
                    {"image": b"a.png", "captions": ["Seekor kucing"]}], folder / "captions.parquet")
    return f"records={folder}/captions.parquet", ["b.png", "a.png"]


PUBLISHED = (xm3600, xflickrco, coco, flickr8k, flickr30k)


@pytest.mark.parametrize("write", [*PUBLISHED, records, parquet], ids=lambda write: write.__name__)
def test_captions_become_two_tasks_with_all_captions_and_with_the_first_alone(write, tmp_path, capsys):
    request, names = write(tmp_path)
    both, first = read_tasks(request)
    name = request.partition("=")[0]
    assert (both.name, first.name) == (f"{name}:all", f"{name}:first")
    assert (both.protocol, first.protocol) == ("all captions", "the first caption of each picture")
    assert both.texts == ["Sepiring kentang", "Dua kentang", "Seekor kucing"] and first.texts == both.texts[::2]
    assert both.positives.toarray().tolist() == [[True, False], [True, False], [False, True]]
    assert first.positives.toarray().tolist() == [[True, False], [False, True]]
    assert (both.text_clusters, first.text_clusters) == ([0, 0, 1], [0, 1])
    assert both.picture_clusters == first.picture_clusters == [0, 1] and both.pictures is first.pictures
    assert both.pictures.digests.tolist() == [digest(name.encode()) for name in names]
    said = capsys.readouterr().out
    assert ("picture not found" in said) == (write in PUBLISHED) and said.startswith(f"{name}: " * bool(said))


@pytest.mark.parametrize("name", SOURCES)
def test_a_request_without_its_files_says_in_one_line_where_to_get_them(name):
    for request in (name, f"{name}="):
        with pytest.raises(ValueError) as found:
            read_tasks(request)
        said, source = str(found.value), SOURCES[name]
        assert said == f"{name} needs files of yours: --on {name}={source.files}. {source.where}"
        assert "\n" not in said and len(source.where) > 20 and source.where.endswith(".")


@pytest.mark.parametrize("request_", ["kamus", "", "photographs=a.jsonl", "photographs:jv", "train", "pairs:en"])
def test_an_unknown_name_lists_all(request_):
    with pytest.raises(ValueError, match=f"^no task '{request_}': name some of ") as found:
        read_tasks(request_)
    assert [word.partition("=")[0] for word in str(found.value).split("some of ")[1].split()] == [
        *OFFLINE, "validation", *SOURCES]


@pytest.mark.parametrize("write", PUBLISHED, ids=lambda write: write.__name__)
def test_folders_that_are_missing_or_have_none_of_the_pictures_are_named(write, tmp_path):
    request, _ = write(tmp_path)
    (tmp_path / "kosong").mkdir()
    head = request.split(",")[0]
    name = head.partition("=")[0]
    with pytest.raises(ValueError, match=f"names no folder of pictures: --on {name}=.*,F"):
        read_tasks(head)
    with pytest.raises(ValueError, match="hilang: no such folder"):
        read_tasks(f"{head},{tmp_path}/hilang")
    with pytest.raises(ValueError, match=f"{name}: none of the pictures of .* is in {tmp_path}/kosong"):
        read_tasks(f"{head},{tmp_path}/kosong")
    with pytest.raises(FileNotFoundError, match="tiada"):
        read_tasks(f"{name}={tmp_path}/tiada.json,{tmp_path}/kosong")


@pytest.mark.parametrize("request_, words", [
    ("records=a,b", "records=a,b names 2 files or folders: --on records=captions.jsonl"),
    ("folders=a,b", "2 files or folders: --on folders=FOLDER"), ("imagenet=a,b.json", "--on imagenet=FOLDER"),
    ("babel-imagenet=a", "babel-imagenet=a names 1 files or folders: --on babel-imagenet=FOLDER,babel_imagenet.json"),
])
def test_the_wrong_number_of_files_is_named(request_, words):
    with pytest.raises(ValueError, match=words):
        read_tasks(request_)


def test_paths_may_start_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    request, names = xflickrco(tmp_path)
    both, _ = read_tasks(request.replace(str(tmp_path), "~"))
    assert len(both.pictures) == 2


# Folders of folders

def test_subfolders_are_classes_and_their_names_have_spaces(tmp_path):
    for name in ("rumah_besar/2.png", "kucing/a.JPG", "rumah_besar/dalam/1.png", "kucing/.b.png", "kosong/catatan.txt",
                 "di luar.png"):
        keep(tmp_path / name)
    task, = read_tasks(f"folders={tmp_path}")
    assert isinstance(task, ZeroShot) and task.name == "folders" and task.names == ["kucing", "rumah besar"]
    assert task.pictures.digests.tolist() == [digest(name) for name in (b"a.JPG", b"2.png", b"1.png")]
    assert task.labels.tolist() == [0, 1, 1] and task.clusters == [0, 1, 2] and task.groups is None
    assert task.protocol == "classes are named by subfolders"


@pytest.mark.parametrize("names, error, message", [
    (None, FileNotFoundError, "no such folder: name a folder with one subfolder"),
    (["a/1.png", "b/1.txt"], ValueError, "has 1 subfolders with pictures: a class is a subfolder"),
    (["1.png"], ValueError, "has 0 subfolders with pictures"),
])
@pytest.mark.parametrize("kind", ["folders", "imagenet"])
def test_a_folder_without_classes_is_refused(kind, names, error, message, tmp_path):
    for name in names or ():
        keep(tmp_path / "kelas" / name)
    with pytest.raises(error, match=f"{tmp_path}/kelas.*{message}"):
        read_tasks(f"{kind}={tmp_path}/kelas")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A thousand folders of one picture each; the first has two."""
    root = tmp_path_factory.mktemp("imagenet")
    spot("merah").resize((4, 4)).save(root / "x.png")
    for number in range(1000):
        (root / "val" / f"n{number * 7 + 1440764:08d}").mkdir(parents=True)
        os.link(root / "x.png", root / "val" / f"n{number * 7 + 1440764:08d}" / f"ILSVRC2012_val_{number:08d}.JPEG")
    keep(root / "val" / "n01440764" / "ILSVRC2012_val_00009999.JPEG")
    return root / "val"


def test_imagenet_has_the_names_of_this_project(imagenet):
    task, = read_tasks(f"imagenet={imagenet}")
    assert task.names == [row["indonesian"][0] for _, row, _ in json_lines(DATA / "class_names.jsonl")]
    assert task.labels.tolist() == [0, *range(1000)] and len(task.pictures) == len(task.clusters) == 1001
    assert task.protocol == "1000 classes, named by this project" and task.names[1] == "ikan mas koki"


def test_babel_imagenet_lacks_classes_whose_pictures_are_left_out(imagenet, tmp_path):
    """The classes of the file may be in any order; a label is the place of its class among them."""
    numbers = [number for number in range(999, -1, -1) if number not in (0, 500)]
    write_json(tmp_path / "babel_imagenet.json", {"EN": [[0], ["tench"]],
                                                  "ID": [numbers, [f"nama {number}" for number in numbers]]})
    task, = read_tasks(f"babel-imagenet={imagenet},{tmp_path}/babel_imagenet.json")
    assert task.names == [f"nama {number}" for number in numbers]
    assert [task.names[label] for label in task.labels] == [f"nama {number}" for number in numbers[::-1]]
    assert [str(path)[-9:] for path in task.pictures.stored[:2]] == ["0001.JPEG", "0002.JPEG"]
    assert len(task.pictures) == len(task.clusters) == 998
    assert task.protocol == "998 classes, named by babel_imagenet.json"
    for value in ({"EN": [[0], ["tench"]]}, ["ID"]):
        write_json(tmp_path / "babel_imagenet.json", value)
        with pytest.raises(ValueError, match=r"babel_imagenet\.json has no key 'ID': take Babel-ImageNet's"):
            read_tasks(f"babel-imagenet={imagenet},{tmp_path}/babel_imagenet.json")


def test_some_of_imagenets_folders_are_not_enough(tmp_path):
    for name in ("n01440764/a.JPEG", "n01443537/a.JPEG"):
        keep(tmp_path / name)
    with pytest.raises(ValueError, match="has 2 subfolders with pictures, and ImageNet has 1000 classes: unpack all"):
        read_tasks(f"imagenet={tmp_path}")


# Tasks that need no files

NAMES = ["merah", "hijau", "biru", "Merah", "hijau"]
CONCEPTS = ["c-merah", "c-hijau", "c-biru", "c-mawar", "c-hijau"]  # two concepts are called merah


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Small stand-ins for all data that is embedded or fetched."""
    rows = split([name.casefold() for name in NAMES], "noto", name_id=NAMES, concept=CONCEPTS)
    other = split(["biru", "merah"], "tuxpaint", name_en=["Blue", "red"])
    for name in ("1.png", "2.png"):
        keep(tmp_path / name)
    pictures = [str(tmp_path / name) for name in ("1.png", "2.png")]
    pairs = {"right": ["merah", "biru"], "wrong": ["biru", "merah"], "phenomenon": ["warna", "warna"],
             "key": ["warna/a/1", "warna/a/2"], "cluster": ["a", "a"], "source": ["noto", "noto"]}
    samples = {"captions": [["seekor kucing", "kucing"], ["rumah"]]}
    monkeypatch.setattr(tasks, "load_picture_dictionary", lambda: DatasetDict(
        unseen_artist=rows, validation=other, photographs=other, unseen_concept=other))
    for name, columns in (("load_minimal_pairs", pairs), ("load_sample_photographs", samples)):
        made = Dataset.from_dict({"image": pictures, **columns}).cast_column("image", Image())
        monkeypatch.setattr(tasks, name, lambda made=made: made)
    return rows


@pytest.mark.parametrize("name", [*OFFLINE, "validation"])
def test_each_name_gives_tasks_without_files(name, offline):
    found = read_tasks(name)
    assert [task.name for task in found] == (["foto-contoh:all", "foto-contoh:first"] if name == "foto-contoh" else
                                             [name])
    assert isinstance(found[0], {"groups": ZeroShot, "pairs": Pairs}.get(name, Retrieval))
    assert len(found[0].pictures) == (5 if name in ("unseen_artist", "groups") else 2)


def test_names_of_the_dictionary_find_pictures_of_their_concept_or_name(offline):
    task, = read_tasks("unseen_artist")
    concepts = ["c-merah", "c-hijau", "c-biru", "c-mawar"]
    assert task.texts == ["merah", "hijau", "biru", "merah"] and task.text_clusters == concepts
    assert task.picture_clusters == CONCEPTS
    expected = same_key(concepts, CONCEPTS, (task.texts, [name.casefold() for name in NAMES]))
    assert task.positives.toarray().tolist() == expected.tolist() and expected[0].tolist() == [1, 0, 0, 1, 0]
    assert read_tasks("photographs")[0].texts == ["biru", "merah"]
    english, = read_tasks("photographs:en")
    assert english.texts == ["blue", "red"] and english.name == "photographs:en"


def test_groups_of_the_dictionary_are_classes(offline):
    task, = read_tasks("groups")
    names = dict(zip(offline["group"], map(group_phrase, offline["group_id"]), strict=True))
    assert task.groups == sorted(names) and task.names == [names[group] for group in task.groups]
    assert [task.groups[label] for label in task.labels] == list(offline["group"]) and task.clusters == CONCEPTS


def test_pairs_have_a_right_and_a_wrong_caption(offline):
    task, = read_tasks("pairs")
    assert (task.right, task.wrong) == (["merah", "biru"], ["biru", "merah"])
    assert (task.phenomena, task.clusters) == (["warna", "warna"], ["a", "a"])
    assert task.pictures.digests.tolist() == [digest(b"1.png"), digest(b"2.png")]


def test_the_sample_photographs_have_both_protocols(offline):
    both, first = read_tasks("foto-contoh")
    assert both.texts == ["seekor kucing", "kucing", "rumah"] and first.texts == ["seekor kucing", "rumah"]


def test_a_picture_is_known_by_its_bytes_alone(tmp_path):
    keep(tmp_path / "a.png", b"isi")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    os.utime(tmp_path / "b.png", (0, 0))
    stored = [tmp_path / "a.png", str(tmp_path / "b.png"), {"bytes": b"isi", "path": "c.png"},
              {"bytes": None, "path": str(tmp_path / "a.png")}]
    assert set(tasks.Pictures(stored).digests.tolist()) == {digest(b"isi")}
    assert tasks.Pictures([{"bytes": b"isi ", "path": None}]).digests.tolist() != [digest(b"isi")]


def test_two_subfolders_of_one_name_are_refused(tmp_path):
    for name in ("kucing_hitam", "kucing hitam", "anjing"):
        (tmp_path / name).mkdir()
        spot("merah").save(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match="two subfolders of .* have the name 'kucing hitam'"):
        read_tasks(f"folders={tmp_path}")
