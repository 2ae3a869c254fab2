"""An index of pictures: embedded once, with a cache that survives an interruption, and saved to one file.

    index = build_index(model, processor, "foto/", cache=CACHE / "search")   # or a datasets.Dataset
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from PIL import Image

from clipid_utils.files import whole_file
from clipid_utils.model.embed import embed_pictures, fingerprint, picture_identity
from clipid_utils.pictures import PICTURE_SUFFIXES, open_picture

SHOWN_SIDE = 512  # the short side of a picture that is shown: 64 photographs of a phone take 2 GB otherwise


@dataclass(frozen=True)
class PictureIndex:
    """Pictures that can be searched: row i of `embeds` [N, E] (unit length) belongs to `keys[i]` and `labels[i]`.

    A key is the picture's path inside the folder, or its row in the dataset. Pictures that cannot be read are not in
    the index; `skipped` has them as (key, reason). `fingerprint` is the model's, because vectors of two models cannot
    be compared.
    """

    embeds: Float[np.ndarray, "N E"]
    keys: list[str]
    labels: list[str]
    fingerprint: str
    source: object = None  # the folder or the dataset
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def picture(self, i: int | np.integer) -> Image.Image:
        """The i-th picture of the index, RGB. Raises ValueError if the index was loaded without its pictures."""
        if self.source is None:
            raise ValueError("this index was loaded without its pictures: load_index(path, source=folder_or_dataset)")
        is_folder = isinstance(self.source, Path)
        picture = self.source / self.keys[i] if is_folder else self.source[int(self.keys[i])]["image"]
        return open_picture(picture, short_side=SHOWN_SIDE)


def build_index(
    model: nnx.Module, processor: object, source: object, *, cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> PictureIndex:
    """Embeds all pictures of a folder (with its subfolders) or of a `datasets.Dataset` with an `image` column.

    With `cache`, a folder, an interrupted or repeated call embeds only the pictures that are new. A picture is known by
    its file's path, size, time and first bytes (in a dataset by its content), and a model by its fingerprint. Pictures
    that cannot be read are listed in `skipped`, and one line on stderr counts them. The labels, shown under results,
    are the `name_id` column or the paths. Raises FileNotFoundError if there is no such folder, ValueError if it has no
    picture that can be read.
    """
    source = Path(source).expanduser() if isinstance(source, str | os.PathLike) else source
    if isinstance(source, Path):
        keys = picture_files(source)
        pictures = contents = [source / key for key in keys]
    else:
        from datasets import Image as ImageFeature

        keys = [str(row) for row in range(len(source))]
        pictures, contents = source["image"], source.cast_column("image", ImageFeature(decode=False))["image"]
    if not keys:
        raise ValueError(f"no pictures in {source}: expected files that end in {' '.join(sorted(PICTURE_SUFFIXES))}")
    labels = list(source["name_id"]) if "name_id" in getattr(source, "column_names", ()) else keys
    mark = fingerprint(model, processor)
    embeds, skipped = embed_pictures(
        model, processor, pictures, cache=None if cache is None else Path(cache) / f"embeds-{mark}",
        identities=np.array([picture_identity(content) for content in contents], "S20"), batch_size=batch_size(model),
        progress=progress)
    if len(skipped) == len(keys):
        raise ValueError(f"none of {len(keys)} pictures in {source} can be read; the first is {keys[0]}: {skipped[0]}")
    rows = [row for row in range(len(keys)) if row not in skipped]
    return PictureIndex(
        embeds=embeds[rows], keys=[keys[row] for row in rows], labels=[str(labels[row]) for row in rows],
        fingerprint=mark, source=source, skipped=[(keys[row], reason) for row, reason in skipped.items()])


def batch_size(model: nnx.Module) -> int:
    """Pictures that are encoded at once: 64, or on a CPU fewer large ones, whose activations would need a gigabyte."""
    side = model.config.vision.image_size
    return 64 if jax.default_backend() != "cpu" else min(64, max(8, 16 * 224**2 // side**2))


def picture_files(folder: Path) -> list[str]:
    """The paths, inside the folder and in their order, of its picture files; hidden ones are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name the folder with the pictures")
    inside = (path.relative_to(folder) for path in sorted(folder.rglob("*"))
              if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    return [path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts)]


def save_index(index: PictureIndex, path: str | os.PathLike) -> None:
    """Writes vectors, keys, labels and the list of skipped pictures to one `.npz` file; the pictures stay in place."""
    notes = {"keys": index.keys, "labels": index.labels, "fingerprint": index.fingerprint, "skipped": index.skipped}
    with whole_file(path) as file:
        np.savez(file, embeds=index.embeds, notes=np.array(json.dumps(notes, ensure_ascii=False)))


def load_index(path: str | os.PathLike, source: object = None, expect: str | None = None) -> PictureIndex:
    """Reads a file of `save_index`; `source` is its folder or dataset, which is needed to show pictures.

    With `expect=fingerprint(model, processor)`, raises ValueError if the index was made by a different model.
    """
    with np.load(path, allow_pickle=False) as file:
        embeds, notes = file["embeds"], json.loads(file["notes"].item())
    if expect is not None and expect != notes["fingerprint"]:
        raise ValueError(f"{path} was made by checkpoint {notes['fingerprint']}, not {expect}: build it again with "
                         "build_index")
    source = Path(source).expanduser() if isinstance(source, str | os.PathLike) else source
    notes["skipped"] = [tuple(entry) for entry in notes["skipped"]]
    return PictureIndex(embeds=embeds, source=source, **notes)
