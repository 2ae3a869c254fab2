"""Today's families by their ids, from a local server in the hub's format. No file comes that is not needed."""

import json
from pathlib import Path

import numpy as np
import pytest
import test_hub
import transformers
from huggingface_hub import constants
from reference import assert_outputs, cases, close, compiled
from safetensors.numpy import load
from test_family_processors import bert, clip, unpacked, write_files, xlm_r

from clipid_utils import load_clip, load_towers
from clipid_utils.model.pretrained.hub import fetch_checkpoint

hub = test_hub.hub  # a fixture

PICTURES = {"preprocessor_config_json": {"image_processor_type": "CLIPImageProcessor", "size": 16, "crop_size": 16}}
NOISE = {"README.md": b"#", "tf_model.h5": b"h", "rust_model.ot": b"r", "onnx/model.onnx": b"o", ".gitattributes": b"g",
         "model.fp16.safetensors": b"s", "training_args.bin": b"t", "openvino/openvino_model.bin": b"v"}
WHOLE_NOISE = {"open_clip_pytorch_model.bin": b"w", "flax_model.msgpack": b"f", "pytorch_model.bin": b"p"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def repository(folder: Path, name: str, files: dict, at: str = "", changes: dict | None = None) -> dict[str, bytes]:
    """The files of a recorded model with a tokenizer, and with changes of its configs' texts."""
    write_files(unpacked(name, folder, at) / at, files)
    found = files_of(folder)
    for before, after in (changes or {}).items():
        found = {name: content.replace(before.encode(), after.encode()) if name.endswith(".json") else content
                 for name, content in found.items()}
    return found


def cached(name: str) -> set[str]:
    """The files that came from a repository."""
    [snapshot] = (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()
    return set(files_of(snapshot))


def base_files(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    """Takes the config of the base model out of the files, and makes a repository of it."""
    config = files.pop(f"{folder}/config.json")
    return {"config.json": config, "model.safetensors": b"weights that nobody needs", "pytorch_model.bin": b"nor these"}


def assert_features(model, name: str) -> None:
    call = type(model.text).pooled if name == "st_bert_mean" else type(model.text).__call__
    expected = cases(name)["right"]
    close(compiled(call, model.text, expected["input_ids"], expected["attention_mask"]), expected["features"], name)


def test_open_clip_with_a_text_tower_of_a_different_repository(hub, monkeypatch, tmp_path):
    name = "open_clip_mean_mlp"
    files = repository(tmp_path / "both", name, xlm_r(), changes={'"text"': '"org/base"'})
    base = base_files(files, "text")
    hub.repositories.update({"org/both": {"main": files | NOISE | {"open_clip_pytorch_model.bin": b"w"}},
                             "org/base": {"main": base | NOISE}})
    model, processor = load_clip("org/both")
    assert_outputs(model, name)
    assert cached("org/both") == set(files) and cached("org/base") == {"config.json"}
    batch = processor(text="kucing tidur")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again, processor = load_clip("org/both")
    np.testing.assert_array_equal(processor(text="kucing tidur")["input_ids"], batch["input_ids"])
    np.testing.assert_array_equal(again.text.projection.fc2.kernel[...], model.text.projection.fc2.kernel[...])


def test_open_clip_with_its_own_towers(hub, tmp_path):
    files = repository(tmp_path, "open_clip_own_text", clip())
    hub.repositories["org/own"] = {"main": files | NOISE | {"open_clip_pytorch_model.bin": b"w"}}
    load_clip("org/own")
    assert cached("org/own") == set(files)


def test_a_repository_of_both_formats_comes_in_one(hub, tmp_path):
    """transformers' weights, as most of open_clip's repositories have them too."""
    files = repository(tmp_path, "clip_whole", clip() | PICTURES)
    rest = {"open_clip_config.json": b"{}", "open_clip_model.safetensors": b"w"}
    hub.repositories["org/clip"] = {"main": files | rest | WHOLE_NOISE | NOISE}
    load_clip("org/clip")
    assert cached("org/clip") == {*files, "open_clip_config.json"}


def towers(hub, tmp_path: Path, text: dict[str, bytes]) -> None:
    """Puts an image tower and a text tower into the hub."""
    vision = repository(tmp_path / "vision", "clip_whole", PICTURES)
    hub.repositories.update({"org/vision": {"main": vision | WHOLE_NOISE | NOISE}, "org/text": {"main": text}})


def test_m_clip_with_the_config_of_its_base(hub, monkeypatch, tmp_path):
    files = repository(tmp_path / "text", "m_clip", xlm_r(), changes={'"base"': '"xlm-base"'})
    hub.repositories["xlm-base"] = {"main": base_files(files, "base") | NOISE}
    towers(hub, tmp_path, files | NOISE | {"pytorch_model.bin": b"p"})
    model, processor = load_towers("org/vision", "org/text")
    assert_features(model, "m_clip")
    assert cached("org/text") == set(files) and cached("xlm-base") == {"config.json"}
    assert cached("org/vision") == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert processor(text="kucing")["input_ids"][0, 0] == 0 and processor.image_size == 16
    fetched = len(hub.fetched)
    load_towers("org/vision", "org/text")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_towers("org/vision", "org/text")
    assert len(hub.fetched) == fetched


def sentence_files(folder: Path, name: str, at: str) -> dict[str, bytes]:
    """A repository of sentence-transformers; `at` is its transformer's folder."""
    settings = {"sentence_bert_config_json": {"max_seq_length": 12, "do_lower_case": False}}
    files = repository(folder, name, bert() | settings, at)
    modules = json.loads(files["modules.json"])
    modules[0]["path"] = at
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    return files | {"modules.json": json.dumps(modules).encode(),
                    "config_sentence_transformers.json": json.dumps(prompts).encode()}


@pytest.mark.parametrize("name, at", [("st_distilbert_dense", ""), ("st_bert_mean", "0_Transformer")])
def test_sentence_transformers(hub, tmp_path, name, at):
    files = sentence_files(tmp_path / "text", name, at)
    towers(hub, tmp_path, files | NOISE | ({} if at else {"pytorch_model.bin": b"p"}))
    model, processor = load_towers("org/vision", "org/text")
    assert_features(model, name)
    assert cached("org/text") == set(files)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path / "text" / at)
    np.testing.assert_array_equal(processor(text="kucing")["input_ids"], [theirs("query: kucing")["input_ids"]])
    assert processor.max_length == 12


@pytest.mark.parametrize("weights", [True, False])
def test_the_folders_of_modules_bring_one_form_of_the_weights(hub, tmp_path, weights):
    files = sentence_files(tmp_path / "text", "st_bert_mean", "0_Transformer")
    rest = {f"0_Transformer/{name}": content for name, content in (NOISE | WHOLE_NOISE).items()}
    towers(hub, tmp_path, files | rest)
    fetch_checkpoint("org/text", weights=weights)
    assert cached("org/text") == {name for name in files if weights or "safetensors" not in name}


def test_a_dense_layer_in_a_different_form_than_the_transformer(hub, tmp_path):
    name = "st_distilbert_dense"
    files = sentence_files(tmp_path / "text", name, "")
    shard = files.pop("model.safetensors")
    index = {"weight_map": dict.fromkeys(load(shard), "model-00001-of-00001.safetensors")}
    files |= {"model.safetensors.index.json": json.dumps(index).encode(), "model-00001-of-00001.safetensors": shard}
    towers(hub, tmp_path, files | NOISE)
    assert_features(load_towers("org/vision", "org/text")[0], name)
    assert cached("org/text") == set(files)
