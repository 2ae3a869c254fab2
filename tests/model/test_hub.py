"""Where a checkpoint comes from: a folder, a shipped name, or the hub, here a local server in its format."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants
from tiny import tiny_clip

from clipid_utils import load_clip, save_clip
from clipid_utils.model.pretrained import hub as library
from clipid_utils.model.pretrained import weights
from clipid_utils.model.pretrained.hub import fetch_checkpoint
from clipid_utils.paths import CHECKPOINTS

SMALL = {"config.json": b'{"model_type": "clip"}', "preprocessor_config.json": b"{}", "tokenizer.json": b"[1]",
         "tokenizer_config.json": b"[2]", "vocab.txt": b"satu\ndua\n"}
NOISE = {"README.md": b"#", "tf_model.h5": b"h" * 99, "onnx/model.onnx": b"o" * 99, "onnx/config.json": b"{}",
         "model.fp16.safetensors": b"s" * 99, "training_args.bin": b"t" * 99}
SINGLE = {"model.safetensors": b"s" * 1000}
SHARDED = {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"1",
           "model-00002-of-00002.safetensors": b"2"}
FLAX = {"flax_model.msgpack": b"f"}
TORCH = {"pytorch_model.bin": b"p"}
TORCH_SHARDED = {"pytorch_model.bin.index.json": b"{}", "pytorch_model-00001-of-00001.bin": b"q"}


class Answer(BaseHTTPRequestHandler):
    """Repositories by id and revision, and those that are private or gated."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, unquote(self.path.partition("?")[0])
        match = re.fullmatch(r"/(?:api/models/)?(.+?)/(revision|tree|resolve)/([^/]+)(?:/(.*))?", path)
        if match is None:
            return self.reply(404)
        name, kind, revision, file = match.groups()
        if name in server.private or name not in server.repositories:
            return self.reply(401 if name in server.private else 404, {"X-Error-Code": "RepoNotFound"})
        commits = {commit_of(files): files for files in server.repositories[name].values()}
        files = server.repositories[name].get(revision, commits.get(revision))
        if files is None:
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        if kind == "revision":
            return self.reply(200, {}, json.dumps({"id": name, "sha": commit_of(files), "siblings": []}))
        if kind == "tree":
            tree = [{"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in files.items()]
            return self.reply(200, {}, json.dumps(tree))
        if name in server.gated:
            return self.reply(403, {"X-Error-Code": "GatedRepo"})
        server.fetched.append(file)
        tag = {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"', "X-Repo-Commit": commit_of(files)}
        return self.reply(200, tag, files[file])

    def reply(self, status, headers=None, content=b""):
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def commit_of(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that huggingface_hub takes for the real one, with an empty cache in tmp_path/hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.repositories, server.private, server.gated, server.fetched = {}, set(), set(), []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    url = f"http://127.0.0.1:{server.server_port}"
    changes = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
               "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_OFFLINE": False}
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("there, taken", [
    (SINGLE | SHARDED | FLAX | TORCH, SINGLE), (SHARDED | FLAX | TORCH, SHARDED), (FLAX | TORCH, FLAX),
    (TORCH | TORCH_SHARDED, TORCH), (TORCH_SHARDED, TORCH_SHARDED),
])
def test_one_form_of_the_weights_comes_and_is_used_without_a_network(hub, monkeypatch, there, taken):
    hub.repositories["a/b"] = {"main": SMALL | there | NOISE}
    folder = fetch_checkpoint("a/b")
    assert files_of(folder) == SMALL | taken
    assert sorted(set(hub.fetched)) == sorted(SMALL | taken)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_checkpoint("a/b") == folder


def test_the_forms_are_those_of_read_weights():
    assert [form[0] for form in library.WEIGHTS] == list(weights._READERS)


def test_without_weights_and_then_with_them(hub):
    hub.repositories["gpt"] = {"main": SMALL | SINGLE}
    assert files_of(fetch_checkpoint("gpt", weights=False)) == SMALL
    assert files_of(fetch_checkpoint("gpt")) == SMALL | SINGLE


def test_revisions(hub):
    newer = SMALL | {"model.safetensors": b"new"}
    hub.repositories["a/b"] = {"main": SMALL | SINGLE, "v2": newer}
    assert files_of(fetch_checkpoint("a/b")) == SMALL | SINGLE
    for revision in ("v2", commit_of(newer)):
        assert files_of(fetch_checkpoint("a/b", revision=revision)) == newer
    with pytest.raises(FileNotFoundError, match="the hub has no 'a/b' at revision 'v9': name a branch, tag or commit"):
        fetch_checkpoint("a/b", revision="v9")


def test_a_checkpoint_is_loaded_by_its_id(hub, tmp_path):
    save_clip(*tiny_clip(), tmp_path / "saved")
    hub.repositories["a/b"] = {"main": files_of(tmp_path / "saved")}
    assert load_clip("a/b")[0].config == tiny_clip()[0].config


# Errors

@pytest.mark.parametrize("name, error, message", [
    ("a/unknown", FileNotFoundError, "is not a folder, and the hub shows no such repository: correct the name"),
    ("a/private", FileNotFoundError, "if it is private, set HF_TOKEN to a token"),
    ("a/gated", PermissionError, "only to people who have access: ask for access"),
    ("a/empty", FileNotFoundError, "'a/empty' has no config.json at revision 'main'"),
    ("a/no-weights", FileNotFoundError, "'a/no-weights' has no model.safetensors or .*: name a different revision"),
    ("./nowhere", FileNotFoundError, "is not a folder, and the hub shows no such repository: correct the name"),
    ("runs/of/mine", FileNotFoundError, "is not a folder, and the hub shows no such repository"),
    ("", FileNotFoundError, "is not a folder, and the hub shows no such repository"),
])
def test_what_is_not_there_is_said_with_the_remedy(hub, name, error, message):
    for name_there, files in {"a/gated": SMALL | SINGLE, "a/empty": NOISE, "a/no-weights": SMALL}.items():
        hub.repositories[name_there] = {"main": files}
    hub.private.add("a/private")
    hub.gated.add("a/gated")
    with pytest.raises(error, match=message):
        fetch_checkpoint(name)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("offline", [False, True])
def test_no_network_and_an_incomplete_cache(hub, monkeypatch, offline, cached):
    hub.repositories["a/b"] = {"main": SMALL | SINGLE}
    if cached:
        fetch_checkpoint("a/b", weights=False)
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.shutdown()
        hub.server_close()
    with pytest.raises(ConnectionError, match="'a/b' is not a folder, and .* could not be fetched and is not complete"):
        fetch_checkpoint("a/b")


def test_a_full_disk_is_not_taken_for_a_bad_network(hub, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        fetch_checkpoint("a/b")


# Folders

def checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_named_like_an_owner_does_not_block_the_hub(hub, tmp_path):
    (tmp_path / "openai").mkdir()
    hub.repositories["openai/clip"] = {"main": SMALL | SINGLE}
    assert files_of(fetch_checkpoint("openai/clip")) == SMALL | SINGLE
    local = checkpoint(tmp_path / "openai" / "clip")
    assert fetch_checkpoint("openai/clip").resolve() == local


def test_shipped_names_runs_and_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mini").mkdir()  # not a checkpoint
    assert fetch_checkpoint("mini") == CHECKPOINTS / "mini"
    own = checkpoint(tmp_path / "mini" / "model").parent
    assert fetch_checkpoint("mini").resolve() == own / "model"
    run = checkpoint(tmp_path / "runs" / "x" / "model")
    assert fetch_checkpoint("runs/x").resolve() == fetch_checkpoint(tmp_path / "runs" / "x") == run
    assert fetch_checkpoint("~/runs/x") == run
    with pytest.raises(ValueError, match="is a folder and has no revision 'v2': leave the revision out"):
        fetch_checkpoint("runs/x", revision="v2")
    with pytest.raises(FileNotFoundError, match="nowhere' is not a folder: correct the path"):
        fetch_checkpoint(tmp_path / "nowhere")


def test_mini_opens_by_name():
    model, processor = load_clip("mini")
    assert model.config.embed_dim == 128 and processor.tokenizer.get_vocab_size() == model.config.text.vocab_size
