"""Adds the pictures' vectors to a Parquet table, for `data.translation.on_ray.map_shards`.

    map_shards(shards, out, EmbedPictures, {"checkpoint": "checkpoint", "root": str(Path(out).absolute())})
"""

import os
from pathlib import Path

import pyarrow as pa

from clipid_utils.model.embed import embed_pictures
from clipid_utils.model.pretrained.load import load_clip
from clipid_utils.pictures import picture_source


class EmbedPictures:
    """Adds `image_embeds`, a list of float32 of unit length, to a table with pictures in `image` or `image_path`.

    `checkpoint` is an argument of `load_clip`. Relative paths start at `root`, which is the folder `out` of a call to
    `map_shards`. `image` is a picture's bytes, or {"bytes", "path"} as `datasets` stores it. A picture that cannot be
    read gets a null, so that no row is lost. Raises ValueError if no path of a table leads to a file.
    """

    def __init__(self, checkpoint: str | os.PathLike, root: str | os.PathLike = "."):
        self.model, self.processor = load_clip(checkpoint)
        self.root = Path(root)

    def __call__(self, table: pa.Table) -> pa.Table:
        name = next((name for name in ("image", "image_path") if name in table.column_names), None)
        if name is None:
            raise ValueError(f"the rows have the columns {', '.join(table.column_names)}, but not image or image_path")
        pictures = [self._placed(picture) for picture in table[name].to_pylist()]
        paths = [picture for picture in pictures if isinstance(picture, Path)]
        if paths and not any(path.is_file() for path in paths):
            raise ValueError(f"none of {len(paths)} pictures is there, the first of them {str(paths[0])!r}: "
                             "say with root=… where their paths start")
        vectors, skipped = embed_pictures(self.model, self.processor, pictures, progress=False)
        rows = [None if row in skipped else vector for row, vector in enumerate(vectors)]
        return table.append_column("image_embeds", pa.array(rows, pa.list_(pa.float32())))

    def _placed(self, picture: object) -> object:
        """The bytes of a picture, or its path from `root`."""
        picture = picture_source(picture)
        return self.root / picture if isinstance(picture, str) else picture
