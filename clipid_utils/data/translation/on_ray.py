"""Many Parquet shards through one function on a Ray cluster: translation, the embedding of pictures, or another.

    map_shards(sorted(Path("english").glob("*.parquet")), "indonesian", TranslateTable, {"model": OURS})

The unit is a shard, not a row: a worker reads one, works on it and writes one of the same name, which appears only when
it is whole. So a worker that dies costs its shard's work, which Ray gives to another, a run that was killed goes on
where it stopped, and pictures do not travel through Ray's memory. `pip install .[scale]`.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from clipid_utils.data.shards import move_paths, noted_settings, write_table
from clipid_utils.data.translation.translate import OURS, Translator, translate_table


class TranslateTable:
    """`translate_table` with a Translator of its own: what each worker of `map_shards` makes once and then calls.

    `threads` are the cores of one worker; `map_shards` is told of them by `cores`.
    """

    def __init__(self, model: str | os.PathLike = OURS, column: str = "captions", beam: int = 4, threads: int = 1):
        self.column, self.translator = column, Translator(model, beam=beam, threads=threads)

    def __call__(self, table: pa.Table) -> pa.Table:
        return translate_table(table, self.column, self.translator)


class _Worker:
    """What runs in Ray's processes: one shard in, one shard out."""

    def __init__(self, make: Callable[..., Callable[[pa.Table], pa.Table]], options: dict, out: str):
        self.function, self.settings = make(**options), _settings(make, options)
        self.out = Path(out)

    def __call__(self, row: dict) -> dict:
        source = Path(row["shard"])
        table = pq.read_table(source)
        made = self.function(move_paths(table, source.parent, self.out))
        if made.num_rows != table.num_rows:
            raise ValueError(f"{source}: {table.num_rows} rows went in and {made.num_rows} came out")
        write_table(made, self.out / source.name, self.settings)
        return {"shard": source.name, "rows": made.num_rows}


def map_shards(
    shards: Iterable[str | os.PathLike], out: str | os.PathLike, make: Callable[..., Callable[[pa.Table], pa.Table]],
    options: dict, *, workers: int | None = None, cores: int = 1, gpus: float = 0, progress: bool = True,
) -> int:
    """Writes `make(**options)(table)` of each Parquet shard to `out`, under the same name; returns the rows there.

    `make` and `options` are sent to the workers, each of which calls it once: by default as many as the cluster has
    room for, with `cores` cores and `gpus` GPUs each. `out`, the shards and a model's folder lie where all nodes see
    them. A relative `image_path` starts at `out`, for the function too. Ray is started here where it is not yet. Shards
    that are there already are left as they are, so that one call at a time may write to `out`. Raises ValueError where
    one was made by another `make` or with other options, or where two have the same name, and ModuleNotFoundError
    without Ray.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("map_shards needs Ray: pip install .[scale] in the repository's root") from error

    shards, out = [Path(shard).absolute() for shard in shards], Path(out).absolute()
    if len({shard.name for shard in shards}) != len(shards):
        raise ValueError("two shards have the same name, and would become one: rename them, or map folder by folder")
    out.mkdir(parents=True, exist_ok=True)
    for partial in out.glob("*.partial"):  # of workers that died while they wrote
        partial.unlink()
    settings = _settings(make, options)
    left = [shard for shard in shards if not _is_made(out / shard.name, settings)]
    rows = sum(pq.read_metadata(out / shard.name).num_rows for shard in shards if shard not in left)
    if not left:
        return rows
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    workers = workers or _most_workers(len(left), ray.cluster_resources(), cores, gpus)
    # A block for each shard, or one worker's death would cost several; no limit on how often one may die
    mapped = ray.data.from_items([{"shard": str(shard)} for shard in left], override_num_blocks=len(left)).map(
        _Worker, fn_constructor_args=(make, options, str(out)), num_cpus=cores, num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=workers), max_restarts=-1, max_task_retries=-1,
    )
    with tqdm(total=len(shards), initial=len(shards) - len(left), unit=" shards", disable=not progress) as bar:
        for row in mapped.iter_rows():
            rows += row["rows"]
            bar.update()
    return rows


def _most_workers(shards: int, cluster: dict, cores: int, gpus: float | int) -> int:
    """As many as there are shards and room for; one also where there is no room, for which Ray then waits."""
    room = [int(cluster.get(name, 0) / each + 1e-6) for name, each in (("CPU", cores), ("GPU", gpus)) if each]
    return max(1, min([shards, *room]))  # 1e-6: ten tenths of a GPU are a whole one, in floats too


def _settings(make: Callable, options: dict) -> dict:
    return {"make": f"{make.__module__}.{make.__qualname__}", **{key: str(value) for key, value in options.items()}}


def _is_made(shard: Path, settings: dict) -> bool:
    """Whether a shard is there; raises ValueError where it was made otherwise."""
    if not shard.exists():
        return False
    noted = noted_settings(shard)
    if noted != settings:
        raise ValueError(f"{shard} was made with {noted}, and now it is {settings}: name another folder, or delete it")
    return True
