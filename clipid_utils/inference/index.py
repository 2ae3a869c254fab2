"""An index of pictures: embedded once, in chunks that survive an interruption, saved to one file.

    index = build_index(model, processor, "foto/", cache=CACHE / "search")   # or a datasets.Dataset
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from PIL import Image
from tqdm.auto import tqdm

from clipid_utils.files import to_rgb
from clipid_utils.model.embed import embed_images

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".svg"}
SHORT_SIDE = 512  # larger pictures are reduced to this when opened: 64 photographs of a phone are 2 GB otherwise
CHUNK = 256  # pictures between two writes to the cache: what an interruption can cost at most


@dataclass(frozen=True)
class PictureIndex:
    """Pictures ready to be searched: row i of `embeds` [N, E] (unit length) belongs to `keys[i]` and `labels[i]`.

    `rows[i]` is the picture's place in the source; pictures that could not be read are absent and stand in `skipped` as
    (key, reason). `fingerprint` names the checkpoint, since embeddings of another one cannot be compared.
    """

    embeds: Float[np.ndarray, "N E"]
    keys: list[str]
    labels: list[str]
    rows: Int[np.ndarray, " N"]
    fingerprint: str
    source: object = None  # the folder or the dataset
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def picture(self, i: int | np.integer) -> Image.Image:
        """The i-th picture of the index, RGB; ValueError where the index was loaded without its pictures."""
        if self.source is None:
            raise ValueError("this index was loaded without its pictures: load_index(path, source=folder_or_dataset)")
        if isinstance(self.source, Path):
            return open_picture(self.source / self.keys[i])
        return tidy(self.source[int(self.rows[i])]["image"])


def fingerprint(model: nnx.Module, processor: object) -> str:
    """16 hexadecimal digits that change with any parameter of the model or with what the processor does to pictures."""
    digest = hashlib.sha256(repr(getattr(model, "config", "")).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    probe = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 30, 3))
    digest.update(np.ascontiguousarray(processor(images=[probe])["pixel_values"]).tobytes())
    return digest.hexdigest()[:16]


def tidy(image: Image.Image) -> Image.Image:
    """The picture as RGB, upright as its camera meant it, on white where transparent, its short side at most 512."""
    image = to_rgb(image)
    if min(image.size) <= SHORT_SIDE:
        return image
    size = [max(1, round(side * SHORT_SIDE / min(image.size))) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)


def open_picture(path: str | Path) -> Image.Image:
    """A picture file, opened and tidied (see `tidy`); raises what Pillow raises where it cannot be read."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * SHORT_SIDE, 2 * SHORT_SIDE))  # a large JPEG decodes straight to a smaller size, faster
        return tidy(image)


def build_index(
    model: nnx.Module,
    processor: object,
    source: object,
    *,
    labels: Sequence[str] | None = None,
    cache: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> PictureIndex:
    """Embed all pictures of a folder (with its subfolders) or of a `datasets.Dataset` with an `image` column.

    With `cache`, a folder, an interrupted or repeated run embeds only what is new: entries are keyed by the checkpoint
    and the file's path, size and time (the content, in a dataset) and written in chunks, each whole or not at all.
    Broken pictures are left out and listed in `skipped`. `labels`, one a picture of the source, are shown under
    results; without them the `name_id` column or the path. Raises ValueError where no picture is found or can be read.
    """
    source = Path(source) if isinstance(source, str | os.PathLike) else source
    entries = list(_folder_entries(source) if isinstance(source, Path) else _dataset_entries(source))
    if not entries:
        raise ValueError(f"no pictures found in {source}: expected files ending in {' '.join(sorted(SUFFIXES))}")
    if labels is not None and len(labels) != len(entries):
        raise ValueError(f"{len(labels)} labels for {len(entries)} pictures")
    if labels is None:
        named = not isinstance(source, Path) and "name_id" in source.column_names
        labels = source["name_id"] if named else [key for key, _, _ in entries]
    mark = fingerprint(model, processor)
    folder = None if cache is None else Path(cache) / f"embeds-{mark}"
    known = {} if folder is None else _read_cache(folder)
    missing = [entry for entry in entries if entry[1] not in known]
    reasons: dict[str, str] = {}
    with tqdm(total=len(entries), initial=len(entries) - len(missing), unit="pictures", disable=not progress) as bar:
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            embedded = _embed_chunk(model, processor, chunk, reasons, batch_size)
            known |= embedded
            if folder is not None and embedded:
                _write_chunk(folder, embedded)
            bar.update(len(chunk))
    rows = [row for row, (_, identity, _) in enumerate(entries) if identity in known]
    if not rows:
        raise ValueError(f"none of the {len(entries)} pictures could be read; the first: {next(iter(reasons.items()))}")
    return PictureIndex(
        embeds=np.stack([known[entries[row][1]] for row in rows]),
        keys=[entries[row][0] for row in rows],
        labels=[str(labels[row]) for row in rows],
        rows=np.array(rows),
        fingerprint=mark,
        source=source,
        skipped=[(key, reasons[identity]) for key, identity, _ in entries if identity in reasons],
    )


def _folder_entries(folder: Path) -> Iterator[tuple[str, str, Callable]]:
    """(path inside the folder, identity, opener) of each picture file, in the order of the paths."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in inside.parts):
            continue
        if path.is_file():
            stat = path.stat()
            identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
            yield inside.as_posix(), hashlib.sha1(identity.encode()).hexdigest(), lambda path=path: open_picture(path)


def _dataset_entries(dataset) -> Iterator[tuple[str, str, Callable]]:
    """(row number, identity, opener) of each row; the identity is the picture's content, so it outlives `select`."""
    from datasets import Image as ImageFeature

    for row, image in enumerate(dataset.cast_column("image", ImageFeature(decode=False))["image"]):
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        yield str(row), hashlib.sha1(content).hexdigest(), lambda row=row: tidy(dataset[row]["image"])


def _embed_chunk(model, processor, chunk, reasons: dict[str, str], batch_size: int) -> dict[str, np.ndarray]:
    pictures = {}
    for _, identity, opener in chunk:
        try:
            pictures[identity] = opener()
        except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, …
            reasons[identity] = f"{type(error).__name__}: {error}"
    if not pictures:
        return {}
    embeds = embed_images(model, processor, list(pictures.values()), batch_size=batch_size, progress=False)
    return dict(zip(pictures, np.asarray(embeds, np.float32), strict=True))


def _read_cache(folder: Path) -> dict[str, np.ndarray]:
    known: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("chunk-*.npz")):
        try:
            with np.load(path, allow_pickle=False) as chunk:
                known |= dict(zip(chunk["identities"].tolist(), chunk["embeds"], strict=True))
        except Exception as error:  # a damaged chunk costs its pictures' embedding again, never the run
            warnings.warn(f"{path.name} cannot be read ({error}); its pictures are embedded again", stacklevel=3)
            path.unlink()
    return known


def _write_chunk(folder: Path, embedded: dict[str, np.ndarray]) -> None:
    name = hashlib.sha1("".join(embedded).encode()).hexdigest()[:16]
    arrays = {"identities": np.array(list(embedded)), "embeds": np.stack(list(embedded.values()))}
    write_whole(folder / f"chunk-{name}.npz", lambda file: np.savez(file, **arrays))


def write_whole(path: Path, write: Callable) -> None:
    """Write a file under another name and rename it when complete: a reader sees the old or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_index(index: PictureIndex, path: str | Path) -> None:
    """Write embeddings, keys, labels and the skipped list to one `.npz` file; the pictures stay where they are."""
    notes = {"keys": index.keys, "labels": index.labels, "fingerprint": index.fingerprint, "skipped": index.skipped}
    arrays = {"embeds": index.embeds, "rows": index.rows, "notes": np.array(json.dumps(notes, ensure_ascii=False))}
    write_whole(Path(path), lambda file: np.savez(file, **arrays))


def load_index(path: str | Path, source: object = None, expect: str | None = None) -> PictureIndex:
    """Read what `save_index` wrote; `source` is the folder or dataset it was built from, needed to show pictures.

    With `expect=fingerprint(model, processor)` it raises ValueError where another checkpoint made the index.
    """
    with np.load(path, allow_pickle=False) as file:
        embeds, rows, notes = file["embeds"], file["rows"], json.loads(file["notes"].item())
    if expect is not None and expect != notes["fingerprint"]:
        raise ValueError(
            f"{path} was made by checkpoint {notes['fingerprint']}, not {expect}; build it again with build_index"
        )
    source = Path(source) if isinstance(source, str | os.PathLike) else source
    notes["skipped"] = [tuple(entry) for entry in notes["skipped"]]
    return PictureIndex(embeds=embeds, rows=rows, source=source, **notes)
