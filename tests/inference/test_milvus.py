"""Search in a Milvus database, on the engine inside this process: filling, resuming, labels, recall and errors."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

from clipid_utils.inference import milvus  # noqa: E402
from clipid_utils.inference.index import PictureIndex, save_index  # noqa: E402
from clipid_utils.inference.search import search, top_k  # noqa: E402

LABELS = ["kucing", "anjing", 'ikan "koi" \\ \'mas\'']


def clustered(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around 100 centres, which are the same for every seed."""
    centres = np.random.default_rng(9).normal(size=(100, width))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, 100, count)] + 0.5 * rng.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def picture_index(count: int, width: int = 8) -> PictureIndex:
    labels = [LABELS[i % 3] for i in range(count)]
    return PictureIndex(clustered(count, width), [f"{i}.png" for i in range(count)], labels, "model-a")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    with milvus.Milvus(tmp_path_factory.mktemp("milvus") / "made" / "foto.db") as opened:
        yield opened


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(milvus, "BATCH_BYTES", 100 * 4 * 8)  # 100 rows of width 8


@pytest.fixture(scope="module")
def index():
    return picture_index(250)


@pytest.fixture(scope="module")
def filled(database, index):
    database.fill("foto", index, progress=False)
    return database


def written(database, monkeypatch) -> list[int]:
    """The rows that are written from now on."""
    rows, upsert = [], database.client.upsert
    monkeypatch.setattr(database.client, "upsert",
                        lambda name, data: rows.extend(row["row"] for row in data) or upsert(name, data))
    return rows


def test_the_same_search_over_milvus(filled, index):
    queries = clustered(5, 8, seed=1)
    scores, rows = search(index, queries, 10, find=filled.finder("foto", index))
    expected = search(index, queries, 10)
    np.testing.assert_allclose(scores, expected[0], atol=1e-6)
    np.testing.assert_array_equal(rows, expected[1])
    assert search(index, queries, 999, find=filled.finder("foto", index))[1].shape == (5, 250)


@pytest.mark.parametrize("label", LABELS)
def test_a_label_filters(filled, index, label):
    members = np.flatnonzero(np.array(index.labels) == label)
    queries = clustered(5, 8, seed=1)
    scores, rows = search(index, queries, 10, find=filled.finder("foto", index, label=label))
    expected = top_k(index.embeds[members], queries, 10)
    np.testing.assert_array_equal(rows, members[expected[1]])
    np.testing.assert_allclose(scores, expected[0], atol=1e-6)
    _, rows = search(index, queries, 200, find=filled.finder("foto", index, label=label))
    assert all(set(row) == set(members) for row in rows)  # as many as the label has


def test_a_label_of_no_picture_is_an_error(filled, index):
    with pytest.raises(ValueError, match="no picture in collection foto has the label 'burung'"):
        filled.finder("foto", index, label="burung")


def test_a_second_call_writes_nothing(filled, index, monkeypatch):
    rows = written(filled, monkeypatch)
    filled.fill("foto", index, progress=False)
    assert rows == []


def test_an_interrupted_fill_continues_and_writes_a_half_batch_again(database, index, monkeypatch):
    upsert, calls = database.client.upsert, []

    def break_off(name, data):
        calls.append(len(data))
        upsert(name, data if len(calls) < 2 else data[::2])
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(database.client, "upsert", break_off)
        with pytest.raises(KeyboardInterrupt):
            database.fill("broken", index, progress=False)
    with pytest.raises(ValueError, match="150 of 250 pictures: call fill again"):
        database.finder("broken", index)
    rows = written(database, monkeypatch)
    database.fill("broken", index, progress=False)
    assert rows == list(range(100, 250))
    found = search(index, index.embeds, 1, find=database.finder("broken", index))[1]
    np.testing.assert_array_equal(found[:, 0], np.arange(250))


CHILD = """
import sys
from clipid_utils.inference import milvus
from clipid_utils.inference.index import load_index
milvus.BATCH_BYTES = 100 * 4 * 8
database = milvus.Milvus(sys.argv[1])
upsert, calls = database.client.upsert, []
def wait_in_the_third(name, data):
    calls.append(name)
    if len(calls) == 3:
        print("waiting", flush=True)
        sys.stdin.read()
    upsert(name, data)
database.client.upsert = wait_in_the_third
database.fill("foto", load_index(sys.argv[2]), progress=False)
"""


def test_another_process_locks_the_path_and_a_killed_one_leaves_its_rows(tmp_path, index, monkeypatch):
    save_index(index, tmp_path / "index.npz")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "foto.db"), str(tmp_path / "index.npz")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "waiting\n"
            with pytest.raises(ConnectionError, match=r"foto.db cannot be opened: another process .*close the other"):
                milvus.Milvus(tmp_path / "foto.db")
        finally:
            child.kill()
    with milvus.Milvus(tmp_path / "foto.db") as database:
        rows = written(database, monkeypatch)
        database.fill("foto", index, progress=False)
        assert rows == list(range(200, 250))
        find = database.finder("foto", index)
        np.testing.assert_array_equal(search(index, index.embeds, 1, find=find)[1][:, 0], np.arange(250))


def test_a_collection_of_a_different_index_is_refused(filled, index):
    others = {
        "width 8, not 16": picture_index(250, width=16),
        "model model-a, not model-b": replace(index, fingerprint="model-b"),
        "pictures 250, not 200": picture_index(200),
        r"content \w+, not \w": replace(index, labels=index.labels[::-1]),
        r"content \w+, not ": replace(index, embeds=index.embeds[::-1]),
    }
    for message, other in others.items():
        for call in (filled.fill, filled.finder):
            with pytest.raises(ValueError, match=f"has a different index .{message}"):
                call("foto", other)


def test_a_collection_that_is_not_ours_is_refused(database, index):
    database.client.create_collection("foreign", dimension=8)
    with pytest.raises(ValueError, match="width unknown, not 8"):
        database.fill("foreign", index)
    with pytest.raises(ValueError, match="has no collection absent: fill it first"):
        database.finder("absent", index)


def test_one_process_may_open_a_path_twice(tmp_path, index):
    first, second = milvus.Milvus(tmp_path / "foto.db"), milvus.Milvus(tmp_path / "foto.db")
    first.fill("foto", index, progress=False)
    first.close()
    first.close()
    assert len(search(index, index.embeds[:1], 3, find=second.finder("foto", index))[1][0]) == 3
    second.close()
    with milvus.Milvus(tmp_path / "foto.db") as again:
        assert again._count("foto") == 250


def test_addresses_that_cannot_be_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(milvus, "TIMEOUT", 1.0)
    with pytest.raises(ConnectionError, match="no Milvus server answers at http://127.0.0.1:1 within 1 s") as error:
        milvus.Milvus("http://user:secret@127.0.0.1:1")
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="and not a path that ends in .db"):
        milvus.Milvus(tmp_path / "foto")
    (tmp_path / "file.db").write_text("an older engine's file")
    with pytest.raises(ConnectionError, match="file.db cannot be opened"):
        milvus.Milvus(tmp_path / "file.db")


@pytest.fixture
def address(tmp_path):
    """The address of a server, whose engine is the embedded one."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    server, engine, port = start_server_in_thread(str(tmp_path / "server"))
    yield f"http://127.0.0.1:{port}"
    server.stop(0).wait()
    engine.close()


def test_a_server_is_shared_and_its_graph_finds_more_with_more_effort(address, monkeypatch):
    monkeypatch.setattr(milvus, "SERVER_INDEX", {"index_type": "HNSW", "params": {"M": 4, "efConstruction": 8}})
    index, queries = picture_index(3000), clustered(50, 8, seed=1)
    exact = top_k(index.embeds, queries, 10)[1]
    with milvus.Milvus(address) as writer:
        writer.fill("graph", index, progress=False)
    with milvus.Milvus(address) as first, milvus.Milvus(address) as second:

        def recall(database, ef):
            rows = search(index, queries, 10, find=database.finder("graph", index, ef=ef))[1]
            return np.mean([np.isin(one, other).mean() for one, other in zip(rows, exact, strict=True)])

        assert recall(first, 10) < recall(second, 200) >= 0.95


def test_a_finder_that_finds_too_few_is_an_error(filled, index, monkeypatch):
    find = filled.finder("foto", index)
    monkeypatch.setattr(filled.client, "search", lambda *_, **__: [[{"row": 0, "distance": 1.0}]])
    with pytest.raises(ValueError, match="found fewer than 3 pictures"):
        search(index, index.embeds[:1], 3, find=find)


@pytest.mark.slow
def test_a_hundred_thousand_vectors(database, monkeypatch):
    monkeypatch.setattr(milvus, "BATCH_BYTES", 2**22)
    index, queries = picture_index(100_000, width=64), clustered(50, 64, seed=1)
    database.fill("large", index, progress=False)
    rows = search(index, queries, 10, find=database.finder("large", index))[1]
    exact = top_k(index.embeds, queries, 10)[1]
    assert np.mean([np.isin(one, other).mean() for one, other in zip(rows, exact, strict=True)]) >= 0.95
