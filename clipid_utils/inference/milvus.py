"""Search in a Milvus database: for an index that many programs share, or that is larger than memory.

    with Milvus("foto.db") as database:  # the engine inside this process; "http://host:19530" is a server's address
        database.fill("foto", index)
        scores, rows = search(index, queries, k=10, find=database.finder("foto", index, label="kucing"))

The client is the same for both. The embedded engine (`milvus-lite`) keeps its vectors in memory, and only one process
can have its folder open. It looks at every row in Python, so that its search is exact and slower than `top_k`
(`benchmarks/bench_milvus.py`). A server has a graph (HNSW; Malkov and Yashunin 2018), and any number of programs.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from clipid_utils.files import need
from clipid_utils.inference.index import PictureIndex
from clipid_utils.inference.search import BLOCK, Find

if TYPE_CHECKING:
    from pymilvus import MilvusClient

BATCH_BYTES = 2**22  # the vectors of one request; with their labels it stays far below Milvus' 64 MB
CARD = "clipid.index"  # the property of a collection that identifies its index
TIMEOUT = 10.0  # seconds after which an address counts as unreachable
EMBEDDED_INDEX = {"index_type": "FLAT"}
SERVER_INDEX = {"index_type": "HNSW", "params": {"M": 16, "efConstruction": 200}}
_users: Counter[str] = Counter()  # of each embedded engine of this process: the last one closes it


class Milvus:
    """A Milvus database: a path that ends in `.db` for the embedded engine, or the address of a server.

    Raises ConnectionError if the server cannot be reached or a different process has the path open, ValueError for a
    path with a different ending.
    """

    def __init__(self, address: str | os.PathLike):
        self.path = None if "://" in str(address) else Path(address).expanduser().absolute()
        self.shown = re.sub("//[^@/]*@", "//", str(address))  # without a password
        self.client = self._server(str(address)) if self.path is None else self._embedded(str(self.path))

    def _server(self, address: str) -> "MilvusClient":
        pymilvus = need("pymilvus", "milvus")
        try:
            return pymilvus.MilvusClient(address, timeout=TIMEOUT)
        except pymilvus.MilvusException as error:
            raise ConnectionError(f"no Milvus server answers at {self.shown} within {TIMEOUT:g} seconds: start it, "
                                  f"correct the address, or give a path that ends in .db ({error})") from error

    def _embedded(self, path: str) -> "MilvusClient":
        if not path.endswith(".db"):
            raise ValueError(f"{self.shown} is not an address (http://host:19530), and not a path that ends in .db")
        pymilvus = need("pymilvus", "milvus")
        need("milvus_lite", "milvus")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        log, reasons = logging.getLogger("milvus_lite.server_manager"), []

        def keep(record: logging.LogRecord) -> bool:  # the engine writes the reason to its log only
            reasons.append(record.exc_info[1] if record.exc_info else record.getMessage())
            return False

        log.addFilter(keep)
        try:  # the engine refuses a client that asks every 10 seconds whether it is alive
            client = pymilvus.MilvusClient(path, timeout=TIMEOUT, grpc_options={"grpc.keepalive_time_ms": 600_000})
        except pymilvus.MilvusException as error:
            raise ConnectionError(f"{self.shown} cannot be opened: {reasons[0] if reasons else error}. Only one "
                                  "process can have it open: close the other one (the kernel of a notebook, too), or "
                                  "start a Milvus server for all of them") from error
        finally:
            log.removeFilter(keep)
        _users[path] += 1
        return client

    def __enter__(self) -> "Milvus":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the client and, with the last one of this process, the embedded engine. Its finders then fail."""
        client, self.client = self.client, None
        if client is None:
            return
        client.close()
        if self.path is not None:
            _users[str(self.path)] -= 1
            if not _users[str(self.path)]:
                need("milvus_lite.server_manager", "milvus").server_manager_instance.release_server(str(self.path))

    def fill(self, name: str, index: PictureIndex, *, progress: bool = True) -> None:
        """Writes vectors and labels of the index into a collection, in batches; row i has the primary key i.

        After an interruption a second call continues, and the batch that was perhaps half written is written again. A
        call for a complete collection changes nothing. While it is being filled, the collection cannot be searched.
        Raises ValueError if the collection has a different index.
        """
        width = index.embeds.shape[1]
        if self.client.has_collection(name):
            self._check(name, index)
        else:
            self._create(name, index)
        step = max(1, BATCH_BYTES // (4 * width))
        self.client.load_collection(name)
        done = self._count(name)
        if done == len(index):
            return
        self.client.release_collection(name)
        with tqdm(total=len(index), initial=done, desc=name, unit=" vectors", disable=not progress) as bar:
            for start in range(done // step * step, len(index), step):
                rows = range(start, min(start + step, len(index)))
                self.client.upsert(
                    name, [{"row": i, "vector": index.embeds[i], "label": index.labels[i]} for i in rows])
                bar.update(max(0, rows.stop - bar.n))
        self.client.flush(name)
        self.client.load_collection(name)

    def finder(self, name: str, index: PictureIndex, label: str | None = None, ef: int = 64) -> Find:
        """A `find` for `search`, over a collection that `fill` has filled from this index; with a label, over its rows.

        A label of fewer than k pictures gives as many results as it has. `ef` is the effort of a server's graph: more
        is slower and finds more of the nearest. Raises ValueError if the collection is absent or incomplete, if it has
        a different index, or if no picture has the label.
        """
        if not self.client.has_collection(name):
            raise ValueError(f"{self.shown} has no collection {name}: fill it first")
        self._check(name, index)
        self.client.load_collection(name)
        if (done := self._count(name)) != len(index):
            raise ValueError(f"collection {name} has {done} of {len(index)} pictures: call fill again, it continues")
        condition = "" if label is None else f"label == {json.dumps(label, ensure_ascii=False)}"
        known = self._count(name, condition)
        if not known:
            raise ValueError(f"no picture in collection {name} has the label {label!r}")

        def find(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            k = min(k, known)
            found = self.client.search(name, data=list(queries), limit=k, filter=condition, output_fields=["row"],
                                       search_params={"params": {"ef": max(ef, k)}}, anns_field="vector")
            scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
            for query, hits in enumerate(found):
                scores[query, : len(hits)] = [hit["distance"] for hit in hits]  # Milvus' name for the similarity
                rows[query, : len(hits)] = [hit["row"] for hit in hits]
            return scores, rows

        return find

    def _create(self, name: str, index: PictureIndex) -> None:
        from pymilvus import DataType

        schema = self.client.create_schema(enable_dynamic_field=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=index.embeds.shape[1])
        schema.add_field("label", DataType.VARCHAR, max_length=65535)
        params = self.client.prepare_index_params()
        params.add_index("vector", metric_type="COSINE", **(SERVER_INDEX if self.path is None else EMBEDDED_INDEX))
        self.client.create_collection(name, schema=schema, index_params=params, consistency_level="Strong",
                                      properties={CARD: json.dumps(_card(index))})

    def _check(self, name: str, index: PictureIndex) -> None:
        """Raises ValueError if a collection was not made for this index, with the first difference."""
        known = json.loads(self.client.describe_collection(name)["properties"].get(CARD, "{}"))
        for part, wanted in _card(index).items():
            if known.get(part) != wanted:
                raise ValueError(f"collection {name} of {self.shown} has a different index ({part} "
                                 f"{known.get(part, 'unknown')}, not {wanted}): use a different name, or remove it "
                                 f"with database.client.drop_collection({name!r})")

    def _count(self, name: str, condition: str = "") -> int:
        """The rows that meet a condition. A server's own statistics count replaced rows twice."""
        return self.client.query(name, filter=condition, output_fields=["count(*)"])[0]["count(*)"]


def _card(index: PictureIndex) -> dict[str, int | str]:
    """The marks of an index, in the order in which they are compared; the last one covers all that is stored."""
    content = hashlib.blake2b("\0".join([*index.keys, *index.labels]).encode(), digest_size=12)
    for start in range(0, len(index), BLOCK):
        content.update(np.ascontiguousarray(index.embeds[start : start + BLOCK]))
    return {"width": index.embeds.shape[1], "model": index.fingerprint, "pictures": len(index),
            "content": content.hexdigest()}
