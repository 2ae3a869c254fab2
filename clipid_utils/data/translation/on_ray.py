"""Many files through one function on a Ray cluster: translation, the embedding of pictures, or your own function.

    translate_on_ray("english/*.parquet", "indonesian")
    map_shards(input_files("pictures"), "/…/embedded", EmbedPictures, {"checkpoint": "mini", "root": "/…/embedded"})

The unit is a file, not a row: a worker reads a file, works on it, and writes a shard of the same name, which appears
only when it is whole. So a worker that dies costs the work of its file, which Ray gives to a different worker; a run
that was killed resumes where it stopped; and pictures do not travel through Ray's memory.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from clipid_utils.data import shards
from clipid_utils.data.report import Report
from clipid_utils.data.translation.marian import model_folder
from clipid_utils.data.translation.translate import SHIPPED, Translator, count_texts, translate_table
from clipid_utils.files import PARTIAL, file_identity, model_identity, need


class TranslateTable:
    """`translate_table` with a Translator: each worker of `map_shards` makes one and then calls it.

    `threads` is the number of cores of one worker, and must be the `cores` of `map_shards`.
    """

    def __init__(self, model: str | os.PathLike = SHIPPED, column: str = "captions", beam: int = 4, threads: int = 1):
        self.column, self.translator = column, Translator(model, beam=beam, threads=threads)

    def __call__(self, table: pa.Table) -> pa.Table:
        return translate_table(table, self.column, self.translator)


class _Worker:
    """Runs in Ray's processes: it reads one file and writes one shard."""

    def __init__(self, make: Callable[..., Callable[[pa.Table], pa.Table]], options: dict, settings: dict):
        self.function, self.settings = make(**options), settings

    def __call__(self, row: dict) -> dict:
        file, shard = Path(row["file"]), Path(row["shard"])
        settings = {**self.settings, "source": shards.with_content(file, file_identity(file))}
        rows = list(shards.read_rows(file, shard.parent))
        made = self.function(shards.as_table(rows, shards.parquet_schema(file)))
        if made.num_rows != len(rows):
            raise ValueError(f"{file}: {len(rows)} rows went in and {made.num_rows} came out")
        shards.write_table(made, shard, settings)
        return {"rows": len(rows)}


def translate_on_ray(
    source: str | os.PathLike, out: str | os.PathLike, *, model: str | os.PathLike = SHIPPED, column: str = "captions",
    beam: int = 4, cores: int = 1, **cluster,
) -> Report:
    """`translate_rows` on a Ray cluster: each file of `source` becomes a shard of the same name in `out`.

    `source` is a folder or a glob of .jsonl or .parquet files: split a large file into many first. `cores` and
    `cluster` are arguments of `map_shards`, such as `address`. The Report counts texts as `translate_rows` does.
    """
    files, report = shards.source_files(source), Report()
    folder = model_folder(model).absolute()  # workers may run in a different folder
    options = {"model": str(folder), "column": column, "beam": beam, "threads": cores}
    map_shards(files, out, TranslateTable, options, cores=cores, **cluster)
    for file in files:
        shard = Path(out).expanduser() / _shard_name(file)
        count_texts(report, pq.read_table(shard, columns=[f"{column}_en", f"{column}_mark"]), column)
    return report


def map_shards(
    files: Iterable[str | os.PathLike], out: str | os.PathLike, make: Callable[..., Callable[[pa.Table], pa.Table]],
    options: dict, *, address: str | None = None, workers: int | None = None, cores: int = 1, gpus: float = 0,
    progress: bool = True,
) -> int:
    """Writes `make(**options)(table)` of each file to `out`, under its name with .parquet; returns the rows there.

    The files are Parquet or JSON lines. Each worker gets `make` and `options`, and calls `make` once.
    A worker has `cores` cores and `gpus` GPUs; by default there are as many workers as the cluster has room for. `out`,
    the files and a model's folder (for a hub id: the hub's cache) must be on a disk that all nodes see. A relative
    `image_path` starts at `out`, for the function too. `address` is that of a running cluster; without it Ray starts on
    this machine, unless it runs already. Only one call at a time may write to `out`.

    A shard that is there already is not made again. Raises ValueError if it was made from a file or a model that has
    changed since, by a different `make`, or with different options, and if two files would become one shard. Raises
    ImportError without Ray.
    """
    files, out = [Path(file).absolute() for file in files], Path(out).expanduser().absolute()
    if len({_shard_name(file) for file in files}) != len(files):
        raise ValueError("two files have the same name, and would become one shard: rename them, or use a folder each")
    shards.check_apart(files, out)
    out.mkdir(parents=True, exist_ok=True)
    for partial in out.glob(f"*{PARTIAL}"):  # of workers that died while they wrote
        partial.unlink()
    settings, rows, left = _settings(make, options), 0, []
    for file in files:
        shard = out / _shard_name(file)
        if shard.exists():
            shards.check_settings(shard, {**settings, "source": shards.with_content(file, file_identity(file))})
            rows += pq.read_metadata(shard).num_rows
        else:
            left.append({"file": str(file), "shard": str(shard)})
    if not left:
        return rows
    ray = need("ray", "scale")
    need("ray.data", "scale")
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    workers = workers or _most_workers(len(left), ray.cluster_resources(), cores, gpus)
    # A block for each shard, or the death of one worker would cost several; no limit on how often one may die
    mapped = ray.data.from_items(left, override_num_blocks=len(left)).map(
        _Worker, fn_constructor_args=(make, options, settings), num_cpus=cores, num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=workers), max_restarts=-1, max_task_retries=-1)
    done = tqdm(mapped.iter_rows(), unit=" shards", total=len(files), initial=len(files) - len(left),
                disable=not progress)
    return rows + sum(row["rows"] for row in done)


def _most_workers(shards: int, cluster: dict, cores: int, gpus: float | int) -> int:
    """As many as there are shards and as fit; at least one, for which Ray waits if there is no room."""
    room = [int(cluster.get(name, 0) / size + 1e-6) for name, size in (("CPU", cores), ("GPU", gpus)) if size]
    return max(1, min([shards, *room]))  # 1e-6: ten tenths of a GPU are a whole one, also as floats


def _shard_name(file: Path) -> str:
    return file.name.split(".jsonl")[0].removesuffix(".parquet") + ".parquet"


def _settings(make: Callable, options: dict) -> dict:
    """`make` and its options as a shard notes them; a model's folder is known by its content."""
    settings = {"make": f"{make.__module__}.{make.__qualname__}"}
    for key, value in options.items():
        folder = Path(str(value)).expanduser()
        is_model = (folder / "config.json").is_file()
        settings[key] = shards.with_content(value, model_identity(folder)) if is_model else str(value)
    return settings
