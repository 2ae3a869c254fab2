"""The tasks of the suite, and the readers of their data.

A task has a name, such as "photographs" or "xm3600=captions.jsonl,pictures": the part after "=" names files that the
user has. `OFFLINE` are the tasks that need none. Picture sets are read when they are scored, one batch at a time.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Image
from jaxtyping import Int
from scipy.sparse import csr_array
from tqdm.auto import tqdm

from clipid_utils.data.captions import read_captions
from clipid_utils.data.dictionary.build import load_picture_dictionary
from clipid_utils.data.minimal_pairs import load_minimal_pairs
from clipid_utils.data.photographs import load_sample_photographs
from clipid_utils.data.report import Report
from clipid_utils.data.sources.coco import read_coco
from clipid_utils.data.sources.flickr import read_flickr, read_xflickrco, read_xm3600
from clipid_utils.files import read_json
from clipid_utils.inference.index import picture_files
from clipid_utils.inference.zeroshot import class_names
from clipid_utils.pictures import picture_source
from clipid_utils.wording import group_phrase

OFFLINE = ("photographs", "photographs:en", "unseen_artist", "unseen_concept", "groups", "foto-contoh", "pairs")


class Pictures:
    """Pictures in any form that the processor opens, each with an identity: a digest of the bytes of its file."""

    def __init__(self, stored: Sequence):
        """`stored` are paths, or the {"bytes", "path"} of `datasets`."""
        self.stored = stored
        digests = tqdm((_digest(picture) for picture in stored), "checksums", len(stored), unit=" pictures",
                       disable=None, leave=False)
        self.digests = np.array(list(digests), "S20")

    def __len__(self) -> int:
        return len(self.digests)


def _digest(picture: object) -> bytes:
    content = picture_source(picture)
    content = content if isinstance(content, bytes) else Path(content).read_bytes()
    return hashlib.blake2b(content, digest_size=10).hexdigest().encode()


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Texts and pictures that are searched in both directions. `positives` [T, N] says which belong together.

    `protocol` says in a few words how the queries were chosen. Texts and pictures of one cluster are not independent.
    """

    name: str
    pictures: Pictures
    texts: list[str]
    positives: csr_array
    text_clusters: list
    picture_clusters: list
    protocol: str


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """Pictures, each of one class. `names` are the classes', and `groups` help to choose their classifiers."""

    name: str
    pictures: Pictures
    labels: Int[np.ndarray, " N"]
    names: list[str]
    clusters: list
    protocol: str
    groups: list[str] | None = None


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pictures with a right and a wrong caption that differ in one thing, the phenomenon. Chance is 0.5."""

    name: str
    pictures: Pictures
    right: list[str]
    wrong: list[str]
    phenomena: list[str]
    clusters: list
    protocol: str = "the right caption must be nearer to the picture than the wrong one; a tie is wrong"


Task = Retrieval | ZeroShot | Pairs


@dataclass(frozen=True)
class Source:
    """A kind of task that needs files of the user: how they are read, where they are found, and their licence."""

    read: Callable[..., list[Task]]
    files: str
    where: str


def read_tasks(request: str) -> list[Task]:
    """The tasks of a name of `OFFLINE`, "validation", or of a name of `SOURCES` with its files.

    Raises ValueError for an unknown name; for one without its files, the error says where to get them.
    """
    name, _, files = request.partition("=")
    if name in SOURCES:
        source = SOURCES[name]
        if not files:
            raise ValueError(f"{name} needs files of yours: --on {name}={source.files}. {source.where}")
        parts = [Path(part).expanduser() for part in files.split(",")]
        try:
            inspect.signature(source.read).bind(name, *parts)
        except TypeError:
            raise ValueError(f"{request} names {len(parts)} files or folders: --on {name}={source.files}") from None
        return source.read(name, *parts)
    if files or name not in (*OFFLINE, "validation"):
        known = [*OFFLINE, "validation", *(f"{name}={source.files}" for name, source in SOURCES.items())]
        raise ValueError(f"no task {request!r}: name some of " + " ".join(known))
    if name == "foto-contoh":
        rows = load_sample_photographs()
        return caption_tasks(name, _stored(rows), list(rows["captions"]))
    if name == "pairs":
        rows = load_minimal_pairs()
        return [Pairs(name, _stored(rows), *(list(rows[key]) for key in ("right", "wrong", "phenomenon", "cluster")))]
    split, _, language = name.partition(":")
    rows = load_picture_dictionary()["unseen_artist" if name == "groups" else split]
    if not len(rows):
        raise ValueError(f"{name} has no pictures here, because a package of Debian could not be fetched: leave it out")
    return [_groups(rows) if name == "groups" else _named(name, rows, "name_" + (language or "id"))]


def _stored(rows: Dataset) -> Pictures:
    return Pictures(rows.cast_column("image", Image(decode=False))["image"])


def _named(name: str, rows: Dataset, column: str) -> Retrieval:
    """A split of the dictionary, by names. A picture of the same concept or of the same name is right."""
    concepts, names = list(rows["concept"]), [text.casefold() for text in rows[column]]
    texts = list(dict.fromkeys(zip(concepts, names, strict=True)))
    places: dict[tuple[str, str], list[int]] = {}
    for row, keys in enumerate(zip(concepts, names, strict=True)):
        for kind, key in zip(("concept", "name"), keys, strict=True):
            places.setdefault((kind, key), []).append(row)
    right = [sorted({*places["concept", concept], *places["name", text]}) for concept, text in texts]
    return Retrieval(name, _stored(rows), [text for _, text in texts], _sparse(right, len(rows)),
                     [concept for concept, _ in texts], concepts, "each name once; pictures of its concept or name")


def _groups(rows: Dataset) -> ZeroShot:
    groups, labels = np.unique(list(rows["group"]), return_inverse=True)
    names = {group: group_phrase(name) for group, name in zip(rows["group"], rows["group_id"], strict=True)}
    return ZeroShot("groups", _stored(rows), labels, [names[group] for group in groups], list(rows["concept"]),
                    "unseen_artist by group", groups.tolist())


def _sparse(right: Iterable[Sequence[int]], width: int) -> csr_array:
    """The positives of texts, given the rows of each one's pictures."""
    columns = [list(rows) for rows in right]
    starts = np.cumsum([0, *map(len, columns)])
    places = np.array([row for rows in columns for row in rows], np.int64)
    return csr_array((np.ones(len(places), np.bool_), places, starts), shape=(len(columns), width))


def caption_tasks(name: str, pictures: Pictures, captions: list[list[str]]) -> list[Task]:
    """Two tasks: all captions of each picture, and the first one alone.

    Published results use both protocols. With all captions, picture to text is easier: any of its captions is right.
    """
    tasks = []
    for suffix, protocol, kept in ((":all", "all captions", captions),
                                   (":first", "the first caption of each picture", [own[:1] for own in captions])):
        owners = [row for row, own in enumerate(kept) for _ in own]
        tasks.append(Retrieval(name + suffix, pictures, [text for own in kept for text in own],
                               _sparse([[row] for row in owners], len(pictures)), owners, [*range(len(pictures))],
                               protocol))
    return tasks


def _from_source(read: Callable) -> Callable[..., list[Task]]:
    """A reader of `data.sources`, as a reader of tasks. It prints its report if captions were dropped."""

    def tasks(name: str, annotations: Path, *folders: Path) -> list[Task]:
        if not folders:
            raise ValueError(f"{name}={annotations} names no folder of pictures: --on {name}={SOURCES[name].files}")
        report = Report()
        records = list(read(annotations, folders, report))
        if report.dropped:
            print(f"{name}: {report}")
        if not records:
            raise ValueError(f"{name}: none of the pictures of {annotations} is in {', '.join(map(str, folders))}")
        return caption_tasks(name, Pictures([row["image_path"] for row in records]),
                             [row["captions"] for row in records])

    return tasks


def _records(name: str, file: Path) -> list[Task]:
    records = read_captions(file)
    pictures = _stored(records) if "image" in records.column_names else Pictures(list(records["image_path"]))
    return caption_tasks(name, pictures, list(records["captions"]))


def folder_of_folders(folder: Path) -> tuple[list[str], list[Path], Int[np.ndarray, " N"]]:
    """The names of the subfolders, in their order, all pictures in them, and the subfolder of each.

    Raises FileNotFoundError for a missing folder, ValueError if fewer than two subfolders have pictures.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder: name a folder with one subfolder for each class")
    found = {path.name: [path / name for name in picture_files(path)] for path in sorted(folder.iterdir())
             if path.is_dir()}
    found = {name: pictures for name, pictures in found.items() if pictures}
    if len(found) < 2:
        raise ValueError(f"{folder} has {len(found)} subfolders with pictures: a class is a subfolder, and two are "
                         "needed")
    labels = np.repeat(np.arange(len(found)), [len(pictures) for pictures in found.values()])
    return list(found), [picture for pictures in found.values() for picture in pictures], labels


def _folders(name: str, folder: Path) -> list[Task]:
    """Zero-shot over a folder of folders; a subfolder's name, with _ as a space, is the name of its class."""
    classes, paths, labels = folder_of_folders(folder)
    names = [found.replace("_", " ") for found in classes]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two subfolders of {folder} have the name {repeated[0]!r}: put their pictures together")
    return [ZeroShot(name, Pictures(paths), labels, names, [*range(len(paths))], "classes are named by subfolders")]


def _imagenet(name: str, folder: Path, labels_file: Path | None) -> list[Task]:
    """Zero-shot over ImageNet's 1,000 folders, with this project's names, or with those of Babel-ImageNet.

    The folders are sorted, as ImageNet's classes are. Babel-ImageNet lacks some classes, whose pictures are left out.
    """
    classes, paths, labels = folder_of_folders(folder)
    names = dict(enumerate(class_names()))
    if len(classes) != len(names):
        raise ValueError(f"{folder} has {len(classes)} subfolders with pictures, and ImageNet has {len(names)} "
                         "classes: unpack all of them, or use --on folders= with subfolders named in Indonesian")
    if labels_file is not None:
        found = read_json(labels_file)
        if not isinstance(found, dict) or "ID" not in found:
            raise ValueError(f"{labels_file} has no key 'ID': take Babel-ImageNet's babel_imagenet.json")
        names = dict(zip(*found["ID"], strict=True))
    kept = np.isin(labels, list(names))
    different = list(dict.fromkeys(names.values()))  # classes of one name are one class
    order = {number: different.index(name) for number, name in names.items()}
    named_by = labels_file.name if labels_file else "this project"
    return [ZeroShot(name, Pictures([path for path, keep in zip(paths, kept, strict=True) if keep]),
                     np.array([order[label] for label in labels[kept].tolist()]), different,
                     [*range(int(kept.sum()))], f"{len(names)} classes, named by {named_by}")]


SOURCES = {
    "xm3600": Source(_from_source(read_xm3600), "captions.jsonl,FOLDER",
                     "google.github.io/crossmodal-3600 has both (CC BY 4.0)."),
    "xflickrco": Source(_from_source(read_xflickrco), "test.jsonl,FLICKR30K,COCO",
                        "The captions are in IGLUE's repository (MIT), xFlickrCO/annotations/id; the pictures are "
                        "those of Flickr30k (research only) and COCO (Flickr's terms)."),
    "coco": Source(_from_source(read_coco), "captions,FOLDER[,FOLDER]",
                   "Pictures and English captions: cocodataset.org (CC BY 4.0; pictures under Flickr's terms); for "
                   "Indonesian name the translated TSV (notebook 02)."),
    "flickr8k": Source(_from_source(lambda *given: read_flickr(*given, source="flickr8k")), "captions,FOLDER",
                       "The pictures are given on request by the University of Illinois (research only); for "
                       "Indonesian name the translated captions (notebook 02)."),
    "flickr30k": Source(_from_source(lambda *given: read_flickr(*given, source="flickr30k")), "captions,FOLDER",
                        "The pictures are given on request by the University of Illinois (research only); for "
                        "Indonesian name the translated captions (notebook 02)."),
    "records": Source(_records, "captions.jsonl", "Captions records are described in the README."),
    "folders": Source(_folders, "FOLDER", "It has one subfolder for each class, named in Indonesian."),
    "imagenet": Source(lambda name, folder: _imagenet(name, folder, None), "FOLDER",
                       "image-net.org gives ILSVRC2012's validation pictures on request (research only); sort them "
                       "into the 1,000 folders of their synsets."),
    "babel-imagenet": Source(_imagenet, "FOLDER,babel_imagenet.json", "The names are in the repository Babel-ImageNet "
                             "(CC BY-NC-SA 4.0: not for commercial use); the pictures are ImageNet's."),
}  # fmt: skip
