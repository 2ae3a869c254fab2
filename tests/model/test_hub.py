"""The hub: what is needed of a repository and no more, gone on from where it was cut, clear where it cannot be had.

A server on this machine answers as the hub does; nothing here asks the real one.
"""

import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from clipid_utils.model.pretrained import hub as library
from clipid_utils.model.pretrained import weights
from clipid_utils.model.pretrained.hub import fetch_checkpoint
from clipid_utils.model.pretrained.weights import read_weights

CHUNK = 2**16  # the bytes of which a cut leaves only whole multiples; huggingface_hub's own are 10 MB
SMALL = {"config.json": b'{"model_type": "clip"}', "preprocessor_config.json": b"{}", "tokenizer.json": b"[1]",
         "tokenizer_config.json": b"[2]", "vocab.txt": b"satu\ndua\n"}
NOISE = {"README.md": b"#", ".gitattributes": b"*", "tf_model.h5": b"h" * 99, "onnx/model.onnx": b"o" * 99,
         "model.fp16.safetensors": b"s" * 99, "onnx/config.json": b"{}", "training_args.bin": b"t" * 99}


def tensors(seed, count=3):
    rng = np.random.default_rng(seed)
    return {f"{seed}.{i}": rng.normal(size=50_000).astype(np.float32) for i in range(count)}


WHOLE = save(tensors(0))  # 600 kB: nine chunks
SINGLE = SMALL | {"model.safetensors": WHOLE}
SHARDED = SMALL | {
    "model-1.safetensors": save(tensors(1)), "model-2.safetensors": save(tensors(2)),
    "model.safetensors.index.json": json.dumps({"weight_map": {
        name: f"model-{seed}.safetensors" for seed in (1, 2) for name in tensors(seed)}}).encode(),
}


def is_large(file):
    return file.endswith((".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".model"))


class Hub(ThreadingHTTPServer):
    """Repositories, how they misbehave, and a log of what was asked, as (method, file or "list", Range)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}  # id: {revision: {file: bytes}}
        self.renamed, self.private, self.gated = {}, set(), set()
        self.cuts = defaultdict(list)  # file: how many bytes each next body has before it is cut
        self.reset = False  # whether a cut is a connection reset, and not only closed
        self.stall = None  # an event that is waited for where a body would be cut
        self.stumbles = {}  # "list" or a file: how many more times the answer is 503
        self.whole_only = False  # knows no ranges
        self.damaged = False
        self.contents = {}  # by sha256: where the redirects lead
        self.log, self.tokens = [], []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, repository, files, revision="main"):
        self.repositories.setdefault(repository, {})[revision] = files

    def asked(self, method="GET"):
        return [file for how, file, _ in self.log if how == method]

    def ranges(self, file):
        return [span for how, name, span in self.log if how == "GET" and name == file]

    def stop(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):  # a client that is gone
        pass


def commit_of(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.server.tokens.append((self.headers["Host"].split(":")[0], self.headers.get("Authorization")))
        if match := re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path):
            self.answer(*match.groups(), "list")
        elif match := re.fullmatch(r"/cdn/([^/]+)/(.+)", path):
            self.body(*match.groups())
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self.answer(*match.groups())
        else:
            self.reply(404)

    def answer(self, repository, revision, file):
        server, large = self.server, is_large(file)
        if not (large and self.command == "GET"):  # which the redirect will log
            server.log.append((self.command, file, self.headers.get("Range")))
        if server.stumbles.get(file, 0):
            server.stumbles[file] -= 1
            return self.reply(503)
        if repository in server.renamed:
            return self.reply(307, {"Location": self.path.replace(repository, server.renamed[repository])})
        revisions = server.repositories.get(repository)
        closed = repository in server.private and self.headers.get("Authorization") != "Bearer right"
        if revisions is None or closed:
            return self.reply(401 if closed else 404, {"X-Error-Code": "RepoNotFound"})
        files = revisions.get(revision) or next((f for f in revisions.values() if commit_of(f) == revision), None)
        if files is None:
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        if file == "list":
            return self.listing(repository, files)
        if repository in server.gated:
            return self.reply(403, {"X-Error-Code": "GatedRepo"})
        if file not in files:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        content, commit = files[file], {"X-Repo-Commit": commit_of(files)}
        if not large:
            return self.reply(200, commit | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content)
        sha256 = hashlib.sha256(content).hexdigest()
        server.contents[sha256] = content
        self.reply(302, commit | {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content)),
                                  "Location": f"http://localhost:{server.server_port}/cdn/{sha256}/{file}"})

    def listing(self, repository, files):
        siblings = []
        for file, content in files.items():
            entry = {"rfilename": file, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            if is_large(file):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        answer = {"id": repository, "sha": commit_of(files), "siblings": siblings, "private": False}
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def body(self, sha256, file):
        server, span, content = self.server, self.headers.get("Range"), self.server.contents[sha256]
        server.log.append((self.command, file, span))
        if server.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"ETag": f'"{sha256}"'}
        if not span or server.whole_only:
            return self.reply(200, headers, content, file)
        start = int(re.fullmatch(r"bytes=(\d+)-", span)[1])
        if start >= len(content):
            return self.reply(416)
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206, headers, content[start:], file)

    def reply(self, status, headers=None, content=b"", file=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if not self.server.cuts[file]:
            self.wfile.write(content)
            return
        self.wfile.write(content[: self.server.cuts[file].pop(0)])
        if self.server.stall:
            self.server.stall.wait()
        if self.server.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


@pytest.fixture(scope="module", autouse=True)
def no_proxy():
    """The connections, which huggingface_hub makes once for all tests, lead to this machine itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.close_session()
        yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that huggingface_hub takes for its own, with an empty cache in tmp_path/hub."""
    server = Hub()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, 60)  # seconds: a machine may be busy
    yield server
    server.stop()


def use(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def holds(folder, files):
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def leftovers(tmp_path):
    return sorted(path.name.partition(".")[2] for path in tmp_path.glob("hub/models--*/blobs/*.*"))


# --- What comes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-base-uncased", "openai/clip-vit-base-patch32"])
def test_a_repository_comes_once_and_whole(hub, name):
    hub.add(name, SINGLE | NOISE)
    folder = fetch_checkpoint(name)
    holds(folder, SINGLE)
    found = read_weights(folder)
    assert all(np.array_equal(found[key], value) for key, value in tensors(0).items())
    assert sorted(hub.asked()) == sorted(["list", *SINGLE])  # each once
    hub.log.clear()
    assert fetch_checkpoint(name) == folder
    assert hub.log == [("GET", "list", None)]


OTHER = {"flax_model.msgpack": b"f" * 1000, "pytorch_model.bin": b"p" * 1000, "pytorch_model-1.bin": b"q" * 1000,
         "pytorch_model.bin.index.json": b'{"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-1.bin"}}'}


@pytest.mark.parametrize("there, taken", [
    (SINGLE | SHARDED | OTHER, ["model.safetensors"]),
    (SHARDED | OTHER, ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]),
    (SMALL | OTHER, ["flax_model.msgpack"]),
    (SMALL | {"pytorch_model.bin": b"p"} | NOISE, ["pytorch_model.bin"]),
    (SMALL | {name: OTHER[name] for name in ("pytorch_model.bin.index.json", "pytorch_model-1.bin")},
     ["pytorch_model.bin.index.json", "pytorch_model-1.bin"]),
])
def test_one_form_of_the_weights_comes(hub, there, taken):
    hub.add("a/b", there)
    holds(fetch_checkpoint("a/b"), SMALL | {name: there[name] for name in taken})
    assert {name for name in hub.asked() if name not in SMALL} == {"list", *taken}


def test_the_forms_are_those_of_read_weights():
    assert list(library.WEIGHTS) == list(weights._READERS)


def test_without_weights_and_then_with_them(hub):
    hub.add("a/b", SINGLE | {"sentencepiece.bpe.model": b"s" * 5000})
    folder = fetch_checkpoint("a/b", weights=False)
    holds(folder, SMALL | {"sentencepiece.bpe.model": b"s" * 5000})
    hub.log.clear()
    assert fetch_checkpoint("a/b") == folder
    assert hub.asked() == ["list", "model.safetensors"]
    hub.add("a/processor", SMALL)
    holds(fetch_checkpoint("a/processor", weights=False), SMALL)


def test_revisions(hub):
    newer = SMALL | {"config.json": b"{}", "model.safetensors": save(tensors(5))}
    hub.add("a/b", SINGLE)
    hub.add("a/b", newer, "refs/pr/1")
    folders = [fetch_checkpoint("a/b", revision=revision) for revision in (None, "refs/pr/1", commit_of(newer))]
    for folder, files in zip(folders, (SINGLE, newer, newer), strict=True):
        holds(folder, files)
        assert folder.name == commit_of(files)
    hub.add("a/b", newer)  # the branch moves on
    hub.log.clear()
    assert fetch_checkpoint("a/b") == folders[1]
    assert hub.log == [("GET", "list", None)]
    with pytest.raises(FileNotFoundError, match="'a/b' has no revision 'v9': give a branch, tag or commit"):
        fetch_checkpoint("a/b", revision="v9")


def test_a_renamed_repository_is_followed(hub):
    hub.add("new/name", SINGLE)
    hub.renamed["old/name"] = "new/name"  # by a redirect within the hub
    holds(fetch_checkpoint("old/name"), SINGLE)


def test_a_token_opens_what_is_private_and_stays_with_the_hub(hub, monkeypatch):
    hub.add("a/b", SINGLE)
    hub.private.add("a/b")
    with pytest.raises(FileNotFoundError, match="'a/b' is no folder, and the hub shows no such.*private, set HF_TOKEN"):
        fetch_checkpoint("a/b")
    monkeypatch.setenv("HF_TOKEN", "right")
    hub.tokens.clear()
    holds(fetch_checkpoint("a/b"), SINGLE)
    assert {token for host, token in hub.tokens if host == "127.0.0.1"} == {"Bearer right"}
    assert [token for host, token in hub.tokens if host == "localhost"] == [None]  # where the large file lies


# --- The hub out of reach ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["offline", "down", "stumbling", "another's page"])
def unreachable(request, monkeypatch):
    """A function that takes the hub away."""

    def take(hub):
        if request.param == "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        elif request.param == "down":
            hub.stop()
            huggingface_hub.close_session()  # lest a connection that is still open be used
        elif request.param == "stumbling":
            hub.stumbles["list"] = 10**6
        else:  # as a network's page to log in
            monkeypatch.setattr(Answer, "do_GET", lambda self: self.reply(200, None, b"<html>log in</html>"))
        hub.log.clear()

    take.offline = request.param == "offline"
    return take


def test_what_is_in_the_cache_opens_without_the_hub(hub, unreachable):
    hub.add("a/b", SHARDED)
    hub.add("a/b", SINGLE | {"config.json": b"{}"}, "v1")
    folders = [fetch_checkpoint("a/b", revision=revision) for revision in (None, "v1")]
    unreachable(hub)
    assert [fetch_checkpoint("a/b", revision=revision) for revision in (None, "v1")] == folders
    assert fetch_checkpoint("a/b", revision=commit_of(SHARDED)) == folders[0]
    assert fetch_checkpoint("a/b", weights=False) == folders[0]
    assert set(hub.asked()) <= {"list"} and not (unreachable.offline and hub.log)


def test_what_is_not_in_the_cache_is_said(hub, unreachable):
    hub.add("a/b", SHARDED)
    folder = fetch_checkpoint("a/b")
    (folder / "model-2.safetensors").unlink()
    hub.add("a/small", SINGLE)
    fetch_checkpoint("a/small", weights=False)
    unreachable(hub)
    for name, revision in ("a/b", "main"), ("a/small", "main"), ("a/b", "v1"), ("a/none", "main"):
        say = ("is not whole in the cache .*HF_HUB_OFFLINE.*unset" if unreachable.offline
               else "could not be fetched .*call again once the network")
        with pytest.raises(ConnectionError, match=rf"'{name}' at revision '{revision}' {say}.* give a folder"):
            fetch_checkpoint(name, revision=revision)


def test_a_fetch_that_broke_off_leaves_the_older_whole_one_for_offline_days(hub, monkeypatch):
    hub.add("a/b", SINGLE)
    older = fetch_checkpoint("a/b")
    hub.add("a/b", SMALL | {"model.safetensors": save(tensors(7))})
    hub.cuts["model.safetensors"] = [0] * 100
    with pytest.raises(ConnectionError, match=r"^model\.safetensors of 'a/b' at revision 'main' could not be fetched"):
        fetch_checkpoint("a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_checkpoint("a/b") == older


def test_a_server_that_stumbles_is_asked_again(hub):
    hub.add("a/b", SINGLE)
    hub.stumbles = {"list": 3, "config.json": 2, "model.safetensors": 3}
    holds(fetch_checkpoint("a/b"), SINGLE)
    assert not any(hub.stumbles.values())


# --- Cut downloads ----------------------------------------------------------------------------------------------------


def test_a_cut_is_gone_on_from_within_the_call(hub, tmp_path):
    hub.add("a/b", SINGLE)
    hub.cuts["model.safetensors"] = [3 * CHUNK + 5, 2 * CHUNK]
    holds(fetch_checkpoint("a/b"), SINGLE)
    assert hub.ranges("model.safetensors") == [None, f"bytes={3 * CHUNK}-", f"bytes={5 * CHUNK}-"]
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_is_gone_on_from_in_the_next_call(hub, tmp_path, reset):
    hub.add("a/b", SINGLE)
    hub.reset = reset
    hub.cuts["model.safetensors"] = [4 * CHUNK + 5] + [0] * 100
    with pytest.raises(ConnectionError, match=r"^model\.safetensors of 'a/b' .* goes on where this stopped"):
        fetch_checkpoint("a/b")
    assert leftovers(tmp_path) == ["incomplete"] and not list(tmp_path.glob("hub/*/snapshots/*/model.safetensors"))
    (part,) = tmp_path.glob("hub/*/blobs/*.incomplete")
    there = part.stat().st_size
    assert there in ({0, CHUNK, 2 * CHUNK, 3 * CHUNK, 4 * CHUNK} if reset else {4 * CHUNK})  # a reset outruns bytes
    hub.cuts.clear()
    hub.log.clear()
    holds(fetch_checkpoint("a/b"), SINGLE)
    assert hub.ranges("model.safetensors") == [f"bytes={there}-" if there else None]
    assert not leftovers(tmp_path)


def partial_file(tmp_path, content):
    path = tmp_path / "hub" / "models--a--b" / "blobs" / f"{hashlib.sha256(WHOLE).hexdigest()}.incomplete"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_server_without_ranges_sends_it_anew(hub, tmp_path):
    hub.add("a/b", SINGLE)
    hub.whole_only = True
    partial_file(tmp_path, WHOLE[:1000])
    holds(fetch_checkpoint("a/b"), SINGLE)


@pytest.mark.parametrize("content, asked", [(WHOLE, []), (WHOLE + b"more", [None])])
def test_a_partial_file_that_is_whole_or_too_long(hub, tmp_path, content, asked):
    hub.add("a/b", SINGLE)
    partial_file(tmp_path, content)
    holds(fetch_checkpoint("a/b"), SINGLE)
    assert hub.ranges("model.safetensors") == asked


def test_bytes_that_are_not_those_of_the_file_are_thrown_away(hub, tmp_path):
    hub.add("a/b", SINGLE)
    partial_file(tmp_path, bytes(1000))  # of the right length only
    for damaged in False, True:
        hub.damaged = damaged
        with pytest.raises(ConnectionError, match=r"^model\.safetensors of 'a/b' .*damaged and was thrown away"):
            fetch_checkpoint("a/b")
        assert not leftovers(tmp_path) and not list(tmp_path.glob("hub/*/snapshots/*/model.safetensors"))
    assert len(hub.ranges("model.safetensors")) == 2  # once a call: it is not fetched again and again
    hub.damaged = False
    holds(fetch_checkpoint("a/b"), SINGLE)


def test_those_that_fetch_at_once_share_one_download(hub):
    hub.add("a/b", SINGLE)
    with ThreadPoolExecutor(4) as threads:
        folders = list(threads.map(fetch_checkpoint, ["a/b"] * 4))
    assert len(set(folders)) == 1
    holds(folders[0], SINGLE)
    assert len(hub.ranges("model.safetensors")) == 1


# --- What is not there ------------------------------------------------------------------------------------------------


def test_a_repository_that_is_not_there(hub):
    with pytest.raises(FileNotFoundError, match="'a/c' is no folder, and the hub shows no such.*correct the name"):
        fetch_checkpoint("a/c")


def test_a_gated_repository(hub):
    hub.add("a/b", SINGLE)
    hub.gated.add("a/b")
    with pytest.raises(PermissionError, match="of 'a/b' for those whom it let in.*ask for access.*set HF_TOKEN"):
        fetch_checkpoint("a/b")


@pytest.mark.parametrize("files, message", [
    ({"model.safetensors": WHOLE}, "has no config.json at revision 'main': give another"),
    (SMALL | NOISE, r"has no model\.safetensors at revision 'main', nor .*, pytorch_model\.bin\.index\.json: give ano"),
    ({name: SHARDED[name] for name in SHARDED if name != "model-2.safetensors"},
     r"has no model-2\.safetensors at revision 'main', which its model\.safetensors\.index\.json names: give another"),
])
def test_a_repository_without_what_a_checkpoint_has(hub, files, message):
    hub.add("a/b", files)
    with pytest.raises(FileNotFoundError, match="the hub's 'a/b' " + message):
        fetch_checkpoint("a/b")


@pytest.mark.parametrize("index", [b"{", b"[]", b"{}", b'{"weight_map": {"a": [1]}}'])
def test_an_index_that_is_none(hub, index):
    hub.add("a/b", SMALL | {"model.safetensors.index.json": index})
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of weights .*another revision"):
        fetch_checkpoint("a/b")


def test_a_listed_file_that_the_hub_lacks(hub, monkeypatch):
    listing = Answer.listing
    hub.add("a/b", SINGLE)
    monkeypatch.setattr(Answer, "listing", lambda self, name, files: listing(self, name, files | {"vocab.json": b"1"}))
    monkeypatch.setitem(hub.repositories["a/b"], commit_of(SINGLE | {"vocab.json": b"1"}), SINGLE)
    with pytest.raises(FileNotFoundError, match=r"the hub has not got vocab\.json of 'a/b' at revision 'main'"):
        fetch_checkpoint("a/b")


def test_the_disks_own_errors_are_raised_as_they_are(hub, tmp_path):
    hub.add("a/b", SINGLE)
    (tmp_path / "hub").write_text("a file where the cache should be")
    with pytest.raises(OSError) as caught:
        fetch_checkpoint("a/b")
    assert caught.value.errno and not isinstance(caught.value, ConnectionError)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_returned_as_it_is(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "openai" / "clip").mkdir(parents=True)
    for given in "openai/clip", "openai", Path("openai/clip"), str(tmp_path / "openai"), "./openai/", ".":
        assert fetch_checkpoint(given) == Path(given)
    assert fetch_checkpoint("~/openai") == tmp_path / "openai"
    with pytest.raises(ValueError, match="openai is a folder and has no revision 'v1': leave the revision out"):
        fetch_checkpoint("openai", revision="v1")
    assert not hub.log


@pytest.mark.parametrize("name", ["data/checkpoints/mni", "checkpoints/mni", "./mni", "../mni", "/mni", "~/mni", "mni/",
                                  "a\\b", "", "notes.txt", Path("openai/clip")])
def test_a_path_that_is_no_folder_never_asks_the_hub(hub, tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="is no folder: correct the path, or give a repository on the hub"):
        fetch_checkpoint(name)
    assert not hub.log


@pytest.mark.parametrize("name", ["two words", "a/b--c", "model?", "ab.git"])
def test_a_name_that_no_repository_has(hub, name):
    with pytest.raises(FileNotFoundError, match=f"'{re.escape(name)}' is neither a folder nor an id on the hub"):
        fetch_checkpoint(name)
    assert not hub.log


# --- With the environment that a user sets, in a process of its own ---------------------------------------------------

SCRIPT = """
import importlib.util, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = int(sys.argv[2])
spec = importlib.util.spec_from_file_location("hub", sys.argv[1])
hub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)
print(hub.fetch_checkpoint("a/b"))
"""


def start(hub, tmp_path, **env):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "right", **env}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, library.__file__, str(CHUNK)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_killed_amid_a_file_and_gone_on_from_then_opened_offline(hub, tmp_path):
    hub.add("a/b", SINGLE)
    hub.private.add("a/b")
    hub.cuts["model.safetensors"], hub.stall = [5 * CHUNK], threading.Event()
    process = start(hub, tmp_path)
    deadline = time.monotonic() + 300
    while not any(part.stat().st_size >= 5 * CHUNK for part in tmp_path.glob("hub/*/blobs/*.incomplete")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        threading.Event().wait(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.stall.set()
    hub.log.clear()
    said, errors = start(hub, tmp_path).communicate()
    assert said.strip(), errors
    holds(Path(said.strip()), SINGLE)
    assert hub.ranges("model.safetensors") == [f"bytes={5 * CHUNK}-"] and not leftovers(tmp_path)
    hub.log.clear()
    assert start(hub, tmp_path, HF_HUB_OFFLINE="1").communicate()[0] == said
    assert not hub.log
