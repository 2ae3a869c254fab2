"""Shards through a Ray cluster on this machine, with workers that die and runs that resume."""

import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import tiny_clip
from tiny_marian import ENGLISH, tiny_marian

from clipid_utils.data.translation import marian
from clipid_utils.data.translation.on_ray import (
    TranslateTable,
    _most_workers,
    _settings,
    _Worker,
    map_shards,
    translate_on_ray,
)
from clipid_utils.data.translation.translate import Translator, translate_rows
from clipid_utils.inference.embed_shards import EmbedPictures
from clipid_utils.model.embed import embed_pixels
from clipid_utils.model.pretrained.save import save_clip

try:
    import ray
except ModuleNotFoundError:
    ray = None

needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed: pip install .[scale]")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def cluster():
    """A cluster with room for two workers, whose processes find the modules of these tests."""
    here = Path(__file__).absolute()
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), *map(str, here.parents[:3])])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


class DiesOnce:
    """A function whose process is killed in the middle of the shard of row 30, the first time that it is there."""

    def __init__(self, function, marker: str):
        self.function, self.marker = function, Path(marker)

    def __call__(self, table: pa.Table) -> pa.Table:
        made = self.function(table)
        if 30 in table["id"].to_pylist() and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return made


class TranslatesAndDies(DiesOnce):
    def __init__(self, model: str, marker: str):
        super().__init__(TranslateTable(model), marker)
        self.function.translator.batch_tokens = 1  # what comes out cannot depend on what a worker remembers


class EmbedsAndDies(DiesOnce):
    def __init__(self, checkpoint: str, marker: str):
        super().__init__(EmbedPictures(checkpoint), marker)


class Uneven:
    def __call__(self, table: pa.Table) -> pa.Table:
        return table.slice(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marian")
    marian.convert(tiny_marian(folder / "hf"), folder / "int8", "int8")
    return folder / "int8"


def write_shards(folder: Path, count: int = 8, rows: int = 10) -> list[Path]:
    folder.mkdir()
    for shard in range(count):
        ids = range(shard * rows, (shard + 1) * rows)
        captions = [[ENGLISH[i % 12], f"{ENGLISH[i % 7]} and {ENGLISH[i % 5]}"] for i in ids]
        table = pa.table({"id": ids, "captions": captions, "image_path": [f"pictures/{i}.jpg" for i in ids]})
        pq.write_table(table, folder / f"part-{shard:05}.parquet")
    return sorted(folder.glob("*.parquet"))


def read_shards(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@needs_ray
def test_a_killed_worker_costs_no_row_and_doubles_none(cluster, model, tmp_path):
    shards = write_shards(tmp_path / "english")
    options = {"model": str(model), "marker": str(tmp_path / "died")}
    assert map_shards(shards, tmp_path / "out", TranslatesAndDies, options, workers=2, progress=False) == 80
    assert (tmp_path / "died").exists()
    made = read_shards(tmp_path / "out")
    assert [row["id"] for row in made] == list(range(80))
    translator = Translator(model, batch_tokens=1)
    for shard in shards:  # the same as one machine's function makes of each
        translate_rows(shard, tmp_path / "alone" / shard.stem, translator, progress=False)
    alone = [row for shard in shards for row in read_shards(tmp_path / "alone" / shard.stem)]
    for here, there in zip(made, alone, strict=True):
        assert os.path.normpath(tmp_path / "out" / here.pop("image_path")) == os.path.normpath(
            tmp_path / "alone" / "part-00000" / there.pop("image_path"))
        assert here == there
    # A second run makes only the two shards that are left
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    for name in ("part-00002.parquet", "part-00005.parquet"):
        (tmp_path / "out" / name).rename(tmp_path / "out" / f"{name}.123.partial")  # its worker died
    assert map_shards(shards, tmp_path / "out", TranslatesAndDies, options, workers=1, progress=False) == 80
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert {name for name in after if after[name] != before[name]} == {"part-00002.parquet", "part-00005.parquet"}
    assert [row["id"] for row in read_shards(tmp_path / "out")] == list(range(80))
    assert not list((tmp_path / "out").glob("*.partial"))
    with pytest.raises(ValueError, match="part-00000.parquet was made with make .*TranslatesAndDies.*: restore"):
        map_shards(shards, tmp_path / "out", TranslateTable, {"model": str(model)})


@needs_ray
def test_captions_are_translated_as_on_one_machine(cluster, model, tmp_path):
    (tmp_path / "in").mkdir()
    for part in range(2):
        rows = [{"id": 2 * part + i, "captions": [ENGLISH[2 * part + i]]} for i in range(2)]
        (tmp_path / "in" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for _ in range(2):  # the second run finds all shards made
        report = translate_on_ray(tmp_path / "in", tmp_path / "out", model=model, progress=False)
        assert report == translate_rows(tmp_path / "in", tmp_path / "alone", Translator(model), progress=False)
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "alone")


def test_a_file_or_a_model_that_changed_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(marian, "CACHE", tmp_path / "cache")
    files, options = write_shards(tmp_path / "in", 2), {"model": str(tiny_marian(tmp_path / "hf"))}
    worker = _Worker(TranslateTable, options, _settings(TranslateTable, options))
    (tmp_path / "out").mkdir()
    for file in files:
        worker({"file": str(file), "shard": str(tmp_path / "out" / file.name)})
    assert map_shards(files, tmp_path / "out", TranslateTable, options) == 20  # nothing is left for Ray
    tiny_marian(tmp_path / "hf", seed=1)
    with pytest.raises(ValueError, match="part-00000.parquet was made with model '.*hf .content .*: restore"):
        map_shards(files, tmp_path / "out", TranslateTable, options)
    tiny_marian(tmp_path / "hf")
    pq.write_table(pq.read_table(files[1]).slice(1), files[1])
    with pytest.raises(ValueError, match="part-00001.parquet was made with source '.*in/part-00001.parquet .content"):
        map_shards(files, tmp_path / "out", TranslateTable, options)


@needs_ray
@pytest.mark.parametrize("killed", [False, True])
def test_pictures_are_embedded_and_neither_a_broken_one_nor_a_killed_worker_loses_a_row(cluster, killed, tmp_path):
    clip, processor = tiny_clip()
    save_clip(clip, processor, tmp_path / "clip", format="native")
    rng, pictures = np.random.default_rng(0), []
    (tmp_path / "in").mkdir()
    for shard in range(4):
        rows = []
        for _ in range(9):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(data := io.BytesIO(), "PNG")
            pictures.append(data.getvalue())
            rows.append({"bytes": pictures[-1], "path": None})
        rows.insert(2, {"bytes": b"<svg/>", "path": None})
        pq.write_table(pa.table({"id": range(shard * 10, shard * 10 + 10), "image": rows}),
                       tmp_path / "in" / f"{shard}.parquet")
    shards, options = sorted((tmp_path / "in").glob("*.parquet")), {"checkpoint": str(tmp_path / "clip")}
    if killed:
        options["marker"] = str(tmp_path / "died")
    make = EmbedsAndDies if killed else EmbedPictures
    assert map_shards(shards, tmp_path / "out", make, options, progress=False) == 40
    assert (tmp_path / "died").exists() == killed
    made = read_shards(tmp_path / "out")
    assert [row["id"] for row in made] == list(range(40))
    assert [row["id"] for row in made if row["image_embeds"] is None] == [2, 12, 22, 32]
    found = np.array([row["image_embeds"] for row in made if row["image_embeds"]], np.float32)
    pixels = processor.normalize(np.stack([processor.decoder(picture) for picture in pictures]))
    np.testing.assert_allclose(found, embed_pixels(clip, pixels), atol=1e-5)


@needs_ray
def test_pictures_beside_their_shards_are_found_from_out(cluster, tmp_path):
    clip, processor = tiny_clip()
    save_clip(clip, processor, tmp_path / "clip", format="native")
    (tmp_path / "in" / "pictures").mkdir(parents=True)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "in" / "pictures" / "a.png")
    pq.write_table(pa.table({"image_path": ["pictures/a.png", "pictures/gone.png"]}), tmp_path / "in" / "0.parquet")
    options, out = {"checkpoint": str(tmp_path / "clip"), "root": str(tmp_path / "out")}, tmp_path / "out"
    assert map_shards([tmp_path / "in" / "0.parquet"], out, EmbedPictures, options, progress=False) == 2
    made = read_shards(out)
    assert [row["image_embeds"] is None for row in made] == [False, True]
    assert (out / made[0]["image_path"]).is_file()


@needs_ray
def test_a_function_that_loses_a_row_is_caught(cluster, tmp_path):
    with pytest.raises(Exception, match="10 rows went in and 9 came out"):
        map_shards(write_shards(tmp_path / "in", 1), tmp_path / "out", Uneven, {}, progress=False)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_without_ray_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"this needs ray, .*\[scale\]"):
        map_shards(["a.parquet"], tmp_path, TranslateTable, {})


@pytest.mark.parametrize("shards, cluster, cores, gpus, workers", [
    (100, {"CPU": 16.0}, 1, 0, 16), (100, {"CPU": 16.0}, 3, 0, 5), (4, {"CPU": 16.0}, 1, 0, 4),
    (100, {"CPU": 16.0, "GPU": 2.0}, 1, 1, 2), (100, {"CPU": 16.0, "GPU": 1.0}, 1, 0.1, 10),
    (100, {"CPU": 2.0, "GPU": 8.0}, 1, 1, 2), (100, {"CPU": 16.0}, 1, 1, 1), (100, {"CPU": 1.0}, 2, 0, 1),
    (7, {}, 0, 0, 7),
])
def test_no_more_workers_than_there_are_shards_cores_and_gpus_for(shards, cluster, cores, gpus, workers):
    assert _most_workers(shards, cluster, cores, gpus) == workers


def test_two_files_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two files have the same name"):
        map_shards([tmp_path / "a" / "0.parquet", tmp_path / "b" / "0.parquet"], tmp_path / "out", TranslateTable, {})
