"""The pictures of a Parquet table as vectors beside them, for `data.translation.on_ray.map_shards`.

    map_shards(shards, out, EmbedPictures, {"checkpoint": "checkpoint", "root": str(Path(out).absolute())})
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from clipid_utils.model.embed import embed_images
from clipid_utils.model.pretrained.load import load_clip


class EmbedPictures:
    """Adds `image_embeds`, a list of float32 of unit length, to a table with pictures in `image` or `image_path`.

    `checkpoint` is what `load_clip` takes; a relative path starts at `root`, which is `out` where `map_shards` calls.
    `image` holds a picture's bytes, or {"bytes", "path"} as `datasets` stores it. A picture that cannot be read gets a
    null, so that no row is lost; ValueError where not one of a table's paths leads to a file. As many pictures as a
    batch has are in memory.
    """

    def __init__(self, checkpoint: str | os.PathLike, root: str | os.PathLike = ".", batch_size: int = 64):
        self.model, self.processor = load_clip(checkpoint)
        self.root, self.batch_size = Path(root), batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        name = next((name for name in ("image", "image_path") if name in table.column_names), None)
        if name is None:
            raise ValueError(f"the rows have the columns {', '.join(table.column_names)}, neither image nor image_path")
        self._check_root(table[name])
        readable = np.zeros(table.num_rows, bool)

        def pictures() -> Iterator[Image.Image]:
            for row, value in enumerate(table[name]):
                if (picture := self._opened(value.as_py())) is not None:
                    readable[row] = True
                    yield picture

        found = iter(embed_images(self.model, self.processor, pictures(), self.batch_size, progress=False))
        vectors = [np.asarray(next(found), np.float32) if good else None for good in readable]
        return table.append_column("image_embeds", pa.array(vectors, pa.list_(pa.float32())))

    def _check_root(self, column: pa.ChunkedArray) -> None:
        """Tells a folder that is not there from pictures that are missing."""
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        paths = [path for path in column.to_pylist() if path] if is_text else []
        if paths and not any((self.root / path).is_file() for path in paths):
            raise ValueError(f"none of {len(paths)} pictures is there, the first of them {str(self.root / paths[0])!r}"
                             ": say with root=… where their paths start")

    def _opened(self, value) -> Image.Image | None:
        if isinstance(value, dict):
            value = value["bytes"] or value["path"]
        try:
            picture = Image.open(io.BytesIO(value) if isinstance(value, bytes) else self.root / value)
            picture.load()
            return picture
        except Exception:  # a broken file can raise anything
            return None
