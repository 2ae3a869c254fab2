"""A page that searches pictures in the visitor's browser: a folder of files for any web server, without a program.

    write_page("halaman", model="photo", pictures="foto/")   # then: python -m http.server -d halaman

| file | content |
|---|---|
| `index.html`, `app.js`, `style.css` | the page; `app.js` computes everything |
| `page.json` | the pictures' names and credits, the labels, and Indonesian wording |
| `model/` | both towers (ONNX, int8), `tokenizer.json`, `preprocessor_config.json` |
| `pictures/` | the pictures, reduced |
| `vectors/pictures.bin`, `vectors/labels.bin` | int8 [N, E] and [C, E]: each row is a vector, not of unit length |
| `library/` | onnxruntime-web and tokenizers in JavaScript, with their licences |
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx
from jaxtyping import Float, Int8

from clipid_utils.data.captions import check_captions
from clipid_utils.data.dictionary.fetch import fetch_npm
from clipid_utils.files import json_lines, read_json, whole_file, whole_folder, write_json
from clipid_utils.inference.index import PictureIndex, build_index
from clipid_utils.inference.zeroshot import class_names, classifier_weights
from clipid_utils.model.embed import fingerprint, text_fingerprint
from clipid_utils.model.pretrained.load import load_clip
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.paths import CACHE, DATA
from clipid_utils.pictures import open_picture
from clipid_utils.wording import load_wording

SAMPLES_FOLDER = CACHE / "foto-contoh"  # where `load_sample_photographs` puts them
FILES = Path(__file__).with_name("page_files")
SIDE = 480  # the long side of a picture on the page, in pixels
FILTERS = (2, 3)  # of Pillow: bilinear and bicubic, which app.js has
# The normalizer Nmt of `tokenizers`, which its JavaScript lacks, as two replacements
NMT = (("[\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f]", ""),
       ("[\t\n\x0c\r\u1680\u200b-\u200f\u2028\u2029\u2581\ufeff\ufffd]", " "))


def write_page(
    folder: str | os.PathLike, model: str | os.PathLike = "photo", pictures: str | os.PathLike = SAMPLES_FOLDER
) -> Path:
    """Writes the page into a new `folder` and returns its path. After an error or an interruption there is no folder.

    `model` is an argument of `load_clip`, and `pictures` a folder with its subfolders. If that has a `captions.jsonl`
    (captions records), the page shows the captions, `credit` and `licence` of its pictures, else their paths. The first
    page needs a network for npm.

    Raises FileExistsError if `folder` has anything in it, FileNotFoundError or ValueError if there are no pictures,
    FetchError without npm or a network, and the errors of `load_clip` and `export_onnx`.
    """
    from clipid_utils.model.pretrained.onnx import export_onnx

    folder, pictures = Path(folder).expanduser(), Path(pictures).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists: name a new folder for the page, or delete this one")
    if not pictures.is_dir():
        raise FileNotFoundError(f"{pictures} is not a folder: name the folder with the pictures")
    libraries = fetch_libraries(CACHE)
    clip, processor = load_clip(model)
    if processor.resample not in FILTERS:
        raise ValueError(f"{model} resizes pictures with Pillow's filter {processor.resample}, and the page has only "
                         "bilinear and bicubic (2 and 3)")
    index = build_index(clip, processor, pictures, cache=CACHE / "search")
    names = class_names()
    labels = label_vectors(clip, processor, names, CACHE / "search")
    with whole_folder(folder) as partial:
        shutil.copytree(FILES, partial, dirs_exist_ok=True)
        (partial / "library").mkdir()
        for path in libraries:
            shutil.copyfile(path, partial / "library" / path.name)
        towers = export_onnx(clip, partial / "model", processor, quantize=True)
        if large := [path.name for path in (partial / "model").glob("*.onnx.data")]:
            raise ValueError(f"{' and '.join(large)} would be too large for a browser: export a smaller model")
        tokenizer = partial / "model" / "tokenizer.json"
        stored = read_json(tokenizer)
        write_json(tokenizer, stored | {"normalizer": without_nmt(stored["normalizer"])}, indent=None)
        for name, vectors in (("pictures", index.embeds), ("labels", labels)):
            with whole_file(partial / "vectors" / f"{name}.bin") as file:
                file.write(eight_bits(vectors).tobytes())
        (partial / "pictures").mkdir()
        wording = load_wording()
        write_json(partial / "page.json", {
            "model": Path(model).name, "scale": float(clip.scale()), "fixed_length": processor.fixed_length,
            "unknown": processor.special_tokens.get("unk_token"), "pictures": list(_pictures(index, partial)),
            "size": sum(path.stat().st_size for path in towers), "labels": names, "templates": wording["templates"],
            "classifiers": list(wording["classifiers"]), "heads": wording["heads"],
        }, indent=None)
    return folder


def fetch_libraries(cache: Path) -> list[Path]:
    """The files of the JavaScript libraries, pinned in data/sources.json."""
    pins = read_json(DATA / "sources.json")["page"]
    folders = {name: fetch_npm(name, pin, cache) for name, pin in pins.items()}
    return [next(folders[name].glob(f"**/{member}")) for name, pin in pins.items() for member in pin["members"]]


def label_vectors(
    model: nnx.Module, processor: CLIPProcessor, names: list[str], cache: Path
) -> Float[np.ndarray, "C E"]:
    """`classifier_weights` of the names, kept in `cache` for the next page: they take minutes."""
    key = [fingerprint(model, processor), text_fingerprint(processor), load_wording()["templates"],
           load_wording()["classifiers"], names]
    path = Path(cache) / f"labels-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npz"
    if path.is_file():
        with np.load(path) as stored:
            if stored["names"].tolist() == names:
                return stored["vectors"]
    vectors = classifier_weights(model, processor, names)
    with whole_file(path) as file:
        np.savez(file, names=np.array(names), vectors=vectors)
    return vectors


def eight_bits(vectors: Float[np.ndarray, "N E"]) -> Int8[np.ndarray, "N E"]:
    """The vectors as integers from -127 to 127. Each row has its own scale, which is not stored, because the vectors
    have unit length."""
    largest = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-12)
    return np.rint(vectors * (127 / largest)).astype(np.int8)


def without_nmt(normalizer: dict | None) -> dict | None:
    """The JSON of a tokenizer's normalizer with replacements for each Nmt, which do the same."""
    if normalizer and normalizer["type"] == "Sequence":
        return normalizer | {"normalizers": [without_nmt(part) for part in normalizer["normalizers"]]}
    if not normalizer or normalizer["type"] != "Nmt":
        return normalizer
    return {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"Regex": pattern}, "content": content} for pattern, content in NMT]}


def _pictures(index: PictureIndex, page: Path) -> Iterator[dict]:
    """Writes the reduced pictures, and returns the texts that the page shows with each."""
    records = _records(index.source)
    for row, key in enumerate(index.keys):
        image = open_picture(index.source / key, draft=2 * SIDE)
        image.thumbnail((SIDE, SIDE))
        name, record = f"pictures/{row:05}.webp", records.get(key, {})
        image.save(page / name, quality=80, method=6)
        texts = record.get("captions") or [key]
        yield {"file": name, "width": image.width, "height": image.height, "name": texts[0], "alt": texts[-1],
               **{field: str(record[field]) for field in ("credit", "licence") if record.get(field)}}


def _records(folder: Path) -> dict[str, dict]:
    """The captions records of the folder by the keys of an index. One warning reports the bad ones, which are left out.
    """
    path, found, bad = folder / "captions.jsonl", {}, []
    if not path.is_file():
        return found
    for (_, record, _), problem in zip(json_lines(path), check_captions(path), strict=False):
        if problem:
            bad.append(problem)
        else:
            found[os.path.relpath(folder / record["image_path"], folder).replace(os.sep, "/")] = record
    if bad:
        warnings.warn(f"{len(bad)} records of {path} are left out of the page. The first: {bad[0]}. clipid check lists "
                      "all", stacklevel=2)
    return found
