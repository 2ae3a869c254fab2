"""Translation on CTranslate2: the conversion beside Marian's formulas, the batching's laws, runs killed and resumed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ctranslate2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_weights import ordered, stored, tensor, write_zip
from tiny_marian import CONFIG, ENGLISH, tiny_marian

from clipid_utils.data.captions import read_captions
from clipid_utils.data.shards import move_paths, read_tables
from clipid_utils.data.translation import marian
from clipid_utils.data.translation.marian import WEIGHTS, convert, converted_folder
from clipid_utils.data.translation.translate import (
    Translation,
    Translator,
    batches_by_length,
    loops,
    translate_rows,
    usable_cores,
)

WORDS = sorted({word for text in ENGLISH for word in text.split()})


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_marian(tmp_path_factory.mktemp("marian") / "hf")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(marian, "CACHE", tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture
def translator(folder, cache):
    return Translator(folder, threads=1)


@pytest.fixture
def alone(folder, cache):
    """A sentence a batch: what comes out cannot depend, through the last bit of a sum, on what else is in a batch."""
    return Translator(folder, threads=1, batch_tokens=1)


# --- The conversion ---------------------------------------------------------------------------------------------------


def reference_scores(folder: Path, source: list[str], target: list[str]) -> np.ndarray:
    """The log probability of each target token by Marian's formulas: post-norm, sinusoids, <pad> as the first input."""
    weights, vocabulary = load_file(folder / "model.safetensors"), json.loads((folder / "vocab.json").read_text())
    width, heads = CONFIG["d_model"], CONFIG["encoder_attention_heads"]
    rates = 10000 ** (-np.arange(width // 2) * 2 / width)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    def attention(x, memory, name, causal):
        parts = [linear(y, f"{name}.{part}_proj").reshape(len(y), heads, -1).transpose(1, 0, 2)
                 for y, part in ((x, "q"), (memory, "k"), (memory, "v"))]
        scores = parts[0] @ parts[1].transpose(0, 2, 1) / np.sqrt(width / heads)
        scores = np.where(np.tri(*scores.shape[1:], dtype=bool) | (not causal), scores, -np.inf)
        return linear((softmax(scores) @ parts[2]).transpose(1, 0, 2).reshape(len(x), width), f"{name}.out_proj")

    def embed(ids):
        angles = np.arange(len(ids))[:, None] * rates
        vectors = weights["model.shared.weight"][ids]
        return vectors * np.sqrt(width) + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    def layers(x, part, memory=None):
        for number in range(CONFIG[f"{part}_layers"]):
            name = f"model.{part}.layers.{number}."
            for kind in ("self_attn", "encoder_attn")[: 1 if memory is None else 2]:
                seen = memory if kind == "encoder_attn" else x
                own = attention(x, seen, name + kind, causal=part == "decoder" and kind == "self_attn")
                x = norm(x + own, f"{name}{kind}_layer_norm")
            inner = linear(x, f"{name}fc1")
            x = norm(x + linear(inner / (1 + np.exp(-inner)), f"{name}fc2"), f"{name}final_layer_norm")
        return x

    ids = [[vocabulary.get(token, vocabulary["<unk>"]) for token in tokens] for tokens in (source, target)]
    memory = layers(embed(ids[0]), "encoder")
    decoded = layers(embed([vocabulary["<pad>"], *ids[1][:-1]]), "decoder", memory)
    logits = decoded @ weights["model.shared.weight"].T + weights["final_logits_bias"]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "target.spm"))
    said = {pieces.id_to_piece(number) for number in range(pieces.vocab_size())}  # the target's, never <pad>
    logits[:, [number for token, number in vocabulary.items() if token not in said]] = -np.inf
    return np.log(softmax(logits)[np.arange(len(target)), ids[1]])


@pytest.mark.parametrize("trained_start", [False, True])
def test_a_converted_model_scores_as_marians_formulas_do(tmp_path, trained_start):
    folder = tiny_marian(tmp_path / "hf", trained_start=trained_start)
    convert(folder, tmp_path / "ct2", "float32")
    engine = ctranslate2.Translator(str(tmp_path / "ct2"), compute_type="float32")
    sides = [json.loads((tmp_path / "ct2" / f"{side}_vocabulary.json").read_text()) for side in ("source", "target")]
    rng = np.random.default_rng(0)
    for length in (1, 4, 9):
        source, target = ([*rng.choice(tokens[2:-1], length), "</s>"] for tokens in sides)
        (scores,) = engine.score_batch([source], [target[:-1]])
        np.testing.assert_allclose(scores.log_probs, reference_scores(folder, source, target), atol=2e-5)


def test_only_pieces_of_the_target_language_are_said(folder, alone):
    def vocabulary(side):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        return {pieces.id_to_piece(number) for number in range(pieces.vocab_size())}

    stored = converted_folder(folder, "int8")
    assert set(json.loads((stored / "target_vocabulary.json").read_text())) - {"<pad>"} <= vocabulary("target")
    english = vocabulary("source") - vocabulary("target")
    assert english
    sentences = [[*words, "</s>"] for words in alone._source.encode(ENGLISH, out_type=str)]
    said = {piece for result in alone.engine.translate_batch(sentences, beam_size=4, num_hypotheses=4)
            for pieces in result.hypotheses for piece in pieces}
    assert len(said) > 5
    assert not said & english


def test_a_model_is_converted_once_until_it_changes(tmp_path):
    folder = tiny_marian(tmp_path / "hf")
    first = converted_folder(folder, "int8", tmp_path / "cache")
    made = os.stat(first / "model.bin").st_mtime_ns
    assert converted_folder(folder, "int8", tmp_path / "cache") == first
    assert os.stat(first / "model.bin").st_mtime_ns == made
    assert converted_folder(folder, "float32", tmp_path / "cache") != first
    tiny_marian(tmp_path / "hf", seed=1)
    assert converted_folder(folder, "int8", tmp_path / "cache") != first
    assert converted_folder(first, "int8", tmp_path / "cache") == first  # converted already
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_what_is_no_marian_model_is_refused_by_name(tmp_path, monkeypatch):
    def refused(error, words, **changes):
        with pytest.raises(error, match=words):
            Translator(tiny_marian(tmp_path / "hf", **changes))

    refused(ValueError, "model_type is 'bert'", model_type="bert")
    refused(ValueError, "embeddings of their own", share_encoder_decoder_embeddings=False)
    refused(ValueError, "activation_function 'elu' is none of", activation_function="elu")
    weights = load_file(tiny_marian(tmp_path / "hf") / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "0.fc1.bias" not in key},
              tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lack 'model\.encoder\.layers\.0\.fc1\.bias'"):
        Translator(tmp_path / "hf")
    vocabulary = json.loads((tiny_marian(tmp_path / "hf") / "vocab.json").read_text())
    others = {token if token == "<pad>" else f"{token}?": number for token, number in vocabulary.items()}
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(others))
    with pytest.raises(ValueError, match=r"target\.spm: none of its pieces is in vocab\.json"):
        Translator(tmp_path / "hf")
    (tmp_path / "hf" / "target.spm").unlink()
    with pytest.raises(FileNotFoundError, match="has no target.spm"):
        Translator(tmp_path / "hf")
    with pytest.raises(FileNotFoundError, match="neither a folder nor an id"):
        Translator(str(tmp_path / "elsewhere" / "hf"))
    with pytest.raises(FileNotFoundError, match="could not be fetched from the hub .*give a folder"):
        Translator("nobody/opus-mt-en-id")  # the tests are offline
    with pytest.raises(ValueError, match="0 GPUs"):
        monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: 0)
        Translator(tmp_path / "hf", device="cuda")


def write_bin(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """The weights as `torch.save` writes them."""
    state = {name: tensor(stored(key=str(key), numel=value.size), 0, value.shape,
                          tuple(stride // 4 for stride in value.strides))
             for key, (name, value) in enumerate(weights.items())}
    write_zip(folder, ordered(state), {str(key): value.tobytes() for key, value in enumerate(weights.values())})


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_comes_from_the_hub_by_its_id(folder, tmp_path, monkeypatch, form):
    asked, hub = [], tmp_path / "hub"
    shutil.copytree(folder, hub)
    if form == "pytorch_model.bin":
        write_bin(hub, load_file(folder / "model.safetensors"))
        (hub / "model.safetensors").unlink()

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        for file in hub.iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(marian.huggingface_hub, "snapshot_download", snapshot_download)
    assert Translator("Helsinki-NLP/opus-mt-en-id")(ENGLISH) == Translator(folder)(ENGLISH)
    assert not any(map(set(WEIGHTS).issubset, asked)) and form in asked[-1]  # the other only where there is not the one


# --- Texts ------------------------------------------------------------------------------------------------------------


def test_the_order_is_restored_and_each_text_is_translated_once(translator, alone, monkeypatch):
    submitted, submit = [], translator._submit
    monkeypatch.setattr(translator, "_submit", lambda batch: submitted.extend(map(tuple, batch)) or submit(batch))
    texts = sentences(200)
    first = translator(texts)
    assert translator(texts[::-1] + ["a cat"]) == first[::-1] + translator(["a cat"])
    assert max(Counter(submitted).values()) == 1
    assert len({translation.text for translation in first}) > 20  # what comes out depends on what goes in
    assert sum(map(Translation.__eq__, first, alone(texts))) >= 190  # another machine may round some otherwise


def test_as_many_batches_are_translated_at_once_as_there_are_cores_to_use(folder, monkeypatch):
    monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: 0)
    translator = Translator(folder)
    assert translator.workers == translator.engine.num_translators == usable_cores()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5}, raising=False)  # as under taskset
    translator = Translator(folder)
    assert translator.workers == translator.engine.num_translators == usable_cores() == 3
    assert Translator(folder, threads=1).engine.num_translators == 1


def test_the_memory_of_texts_is_bounded(folder, monkeypatch):
    monkeypatch.setattr("clipid_utils.data.translation.translate.REMEMBERED", 10)
    translator = Translator(folder)
    assert len(translator(sentences(50))) == 50 and len(translator._known) == 10


@given(st.lists(st.integers(0, 60)), st.integers(1, 100))
def test_batches_hold_every_sentence_once_within_the_budget(lengths, tokens):
    batches = list(batches_by_length(lengths, tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens or lengths[batch[0]] == 0


def test_what_cannot_be_translated_stays_english_and_says_why(translator):
    long = "cat " * 300
    found = translator(["  ", long, ""])
    assert found == [Translation("  ", "empty"), Translation(long, "too long"), Translation("", "empty")]
    marks = Counter(translation.mark for translation in translator(sentences(300)))
    assert set(marks) == {"", "loops"}  # random weights do both
    for text, (translated, mark) in zip(sentences(300), translator(sentences(300)), strict=True):
        assert (translated == text) if mark else translated and not loops(translated, text)


class Failing:
    """An engine that fails on batches with a certain piece in them."""

    def __init__(self, engine, piece):
        self.engine, self.piece = engine, piece

    def translate_batch(self, batch, **options):
        futures = self.engine.translate_batch(batch, **options)
        return [self] * len(batch) if any(self.piece in words for words in batch) else futures

    def result(self):
        raise RuntimeError("out of memory")


def test_a_sentence_on_which_the_engine_fails_takes_none_with_it(folder, alone):
    texts = [text for text in sentences(100) if "moon" not in text]
    translator = Translator(folder, batch_tokens=10_000)  # all in one batch, which fails: each is then asked alone
    (piece,) = {words[-1] for words in translator._source.encode(["moon"], out_type=str)}
    texts = [text for text in texts if piece not in translator._source.encode(text, out_type=str)]
    expected = alone(texts)
    translator.engine = Failing(translator.engine, piece)
    assert translator([*texts, "the moon"]) == [*expected, Translation("the moon", "failed")]


@pytest.mark.parametrize("text, source, expected", [
    ("kupu-kupu di atas bunga", "", False), ("kucing kucing", "", False), ("merah merah merah", "", True),
    ("sangat sangat sangat besar", "very very very big", False), ("seekor ikan, seekor ikan, seekor ikan", "", True),
    ("kukukukuku", "", True), ("hahaha", "", False), ("satu dua tiga satu dua tiga satu dua tiga", "", True),
    ("Merah merah MERAH", "", True), ("dan dan, danau", "", False), ("1000000", "", False),
])
def test_what_counts_as_a_loop(text, source, expected):
    assert loops(text, source) is expected


# --- Files ------------------------------------------------------------------------------------------------------------


def rows(count: int) -> list[dict]:
    texts = sentences(3 * count)
    return [{"image_path": f"pictures/{i}.jpg", "captions": texts[3 * i : 3 * i + 1 + i % 3], "source": None, "id": i}
            for i in range(count)]


def read_shards(out: Path) -> list[dict]:
    return [row for shard in sorted(out.glob("part-*.parquet")) for row in pq.read_table(shard).to_pylist()]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "records"])
def test_every_kind_of_source_gives_the_same_rows(translator, tmp_path, kind):
    source, out = rows(50), tmp_path / "somewhere" / "out"
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, source)))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(source), tmp_path / "a.parquet", row_group_size=7)
    report = translate_rows(source if kind == "records" else tmp_path / f"a.{kind}", out, translator, shard_rows=20)
    assert [pq.read_metadata(shard).num_rows for shard in sorted(out.glob("*.parquet"))] == [20, 20, 10]
    for row, made in zip(source, read_shards(out), strict=True):
        assert made["captions_en"] == row["captions"] and made["id"] == row["id"] and made["source"] is None
        assert made["captions"] == [translation.text for translation in translator(row["captions"])]
        assert made["captions_mark"] == [translation.mark for translation in translator(row["captions"])]
        start = "" if kind == "records" else os.path.relpath(tmp_path, out)
        assert made["image_path"] == os.path.join(start, row["image_path"])
    count = Counter(mark for row in read_shards(out) for mark in row["captions_mark"])
    assert report.kept == count[""] and report.dropped == {"loops": count["loops"]} and report.examples["loops"]
    assert len(read_captions(out / "part-00000.parquet", check_files=False)) == 20


def test_progress_shows_captions_a_second_and_the_time_left(translator, tmp_path, capsys, monkeypatch):
    now, translate = [0.0], translator._translate

    def slow(texts):
        for found in translate(texts):
            now[0] += 0.5
            yield found

    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(translator, "_translate", slow)
    source = [{"captions": [f"a cat {2 * number}", f"a cat {2 * number + 1}"]} for number in range(40)]
    translate_rows(source, tmp_path, translator, shard_rows=10)
    shown = capsys.readouterr().err
    assert re.search(r"translating: +50%.* 40/80 \[00:20<00:20, +2\.00 captions/s\]", shown)
    assert re.search(r"translating: +100%.* 80/80 \[00:40<00:00, +2\.00 captions/s\]", shown)


def test_a_column_of_plain_texts_and_a_null_in_it(translator, tmp_path):
    pq.write_table(pa.table({"title": ["a cat", None, "two red cars"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    translate_rows(tmp_path / "a.parquet", tmp_path / "out", translator, column="title")
    (first, null, _) = read_shards(tmp_path / "out")
    assert first["title_en"] == "a cat" and first["title"] == translator(["a cat"])[0].text and first["n"] == 1
    assert (null["title_en"], null["title"], null["title_mark"]) == (None, "", "empty")
    with pytest.raises(ValueError, match=r"columns title, n and no 'captions': name the English's"):
        translate_rows(tmp_path / "a.parquet", tmp_path / "other", translator)


KILLED = """
import os, sys
import pyarrow.parquet as pq
from clipid_utils.data.translation import marian
from clipid_utils.data.translation.translate import Translator, translate_rows

folder, source, out, cache, moment = sys.argv[1:]
marian.CACHE = __import__("pathlib").Path(cache)
write_table, replace = pq.write_table, os.replace

def dies_in_the_middle(table, file):
    write_table(table, file)
    if file.name.endswith(".partial") and "part-00002" in file.name:
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), 9)

def dies_afterwards(partial, path):
    replace(partial, path)
    if str(path).endswith("part-00004.parquet"):
        os.kill(os.getpid(), 9)

if moment == "middle":
    pq.write_table = dies_in_the_middle
elif moment == "afterwards":
    os.replace = dies_afterwards
report = translate_rows(source, out, Translator(folder, threads=1, batch_tokens=1), shard_rows=10, progress=False)
print(report.read, report.kept)
"""


def test_a_killed_run_goes_on_and_loses_or_repeats_no_row(folder, alone, tmp_path):
    source = tmp_path / "captions.jsonl"
    source.write_text("\n".join(map(json.dumps, rows(75))))
    expected = translate_rows(source, tmp_path / "unbroken", alone, shard_rows=10)
    (tmp_path / "killed.py").write_text(KILLED)

    def run(moment):
        return subprocess.run(
            [sys.executable, tmp_path / "killed.py", folder, source, tmp_path / "out", marian.CACHE, moment],
            capture_output=True, text=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])},
        )

    assert run("middle").returncode == -signal.SIGKILL
    *shards, partial = sorted((tmp_path / "out").glob("part*"))
    assert [shard.name for shard in shards] == ["part-00000.parquet", "part-00001.parquet"]
    assert partial.name.startswith("part-00002.parquet.")
    with pytest.raises(pa.ArrowInvalid):
        pq.read_table(partial)  # half of it
    assert run("afterwards").returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("part*.parquet"))) == 5
    last = run("never")
    assert last.returncode == 0, last.stderr
    assert last.stdout.split() == [str(expected.read), str(expected.kept)]
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "unbroken")
    assert [row["id"] for row in read_shards(tmp_path / "out")] == list(range(75))
    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "out").glob("part*")}
    again = translate_rows(source, tmp_path / "out", alone, shard_rows=10)
    assert again == expected and before == {path: os.stat(path).st_mtime_ns for path in before}  # nothing left to do


def test_it_goes_on_with_shards_of_another_size_and_with_types_that_only_the_first_rows_show(translator, tmp_path):
    source = rows(40)
    source[3]["source"] = "coco"  # null in all the others
    translate_rows(source[:10], tmp_path / "out", translator, shard_rows=10)
    translate_rows(source, tmp_path / "out", translator, shard_rows=7)
    assert [row["id"] for row in read_shards(tmp_path / "out")] == list(range(40))
    assert len({pq.read_schema(shard).remove_metadata() for shard in (tmp_path / "out").glob("*.parquet")}) == 1


def test_a_folder_that_does_not_fit_is_refused(folder, translator, tmp_path):
    translate_rows(rows(30), tmp_path, translator, shard_rows=10)
    with pytest.raises(ValueError, match="part-00000.parquet was made with beam 4, and now it is 2: name another"):
        translate_rows(rows(30), tmp_path, Translator(folder, beam=2))
    (tmp_path / "part-00001.parquet").rename(tmp_path / "aside")
    with pytest.raises(ValueError, match="has part-00002.parquet and no part-00001.parquet: delete the later"):
        translate_rows(rows(30), tmp_path, translator)
    (tmp_path / "part-00001.parquet").write_bytes((tmp_path / "aside").read_bytes()[:100])
    with pytest.raises(ValueError, match="part-00001.parquet is damaged"):
        translate_rows(rows(30), tmp_path, translator)


def test_two_processes_do_not_write_to_one_folder(translator, tmp_path):
    from clipid_utils.data.shards import only_writer

    with only_writer(tmp_path), pytest.raises(RuntimeError, match="another process is writing to"):
        translate_rows(rows(3), tmp_path, translator)


def test_a_stream_is_read_no_further_than_the_shard_that_is_made(translator, tmp_path):
    ahead = []

    def stream():
        for number, row in enumerate(rows(50)):
            ahead.append(number - 10 * len(list(tmp_path.glob("part*"))))
            yield row

    translate_rows(stream(), tmp_path, translator, shard_rows=10, progress=False)
    assert max(ahead) < 10 and len(read_shards(tmp_path)) == 50


def test_bad_rows_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"captions": ["a"]}\n{"captions": ["a"]\n')
    with pytest.raises(ValueError, match="a.jsonl:2: no JSON"):
        list(read_tables(path, 10))
    path.write_text('{"captions": ["a"]}\n3\n')
    with pytest.raises(ValueError, match="a.jsonl:2: '3.*is no record"):
        list(read_tables(path, 10))
    path.write_text('{"captions": ["a"]}\n{"captions": "a"}\n')
    with pytest.raises(ValueError, match="a.jsonl: in rows 2 to 2: "):
        list(read_tables(path, 1))
    with pytest.raises(ValueError, match="records: in rows 2 to 2: the key 'x', which the rows before have not"):
        list(read_tables([{"a": 1}, {"a": 1, "x": 2}], 1))
    with pytest.raises(ValueError, match="records: in rows 1 to 2: .*All rows need the same keys"):
        list(read_tables([{"a": 1}, {"a": "b"}], 2))


def test_the_types_of_the_first_rows_are_looked_for_once_a_key(monkeypatch):
    """Once a row, a shard of a machine with many cores would take hours."""
    looked, array = [], pa.array
    monkeypatch.setattr("clipid_utils.data.shards.pa.array", lambda values: looked.append(1) or array(values))
    (table,) = read_tables(rows(100), 100)
    assert table.num_rows == 100 and len(looked) == 4


def test_pictures_are_found_from_a_folder_behind_a_link(tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "deep")
    (tmp_path / "a.jpg").touch()
    table = move_paths(pa.table({"image_path": ["a.jpg"]}), tmp_path, tmp_path / "data")
    assert (tmp_path / "data" / table["image_path"][0].as_py()).samefile(tmp_path / "a.jpg")


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    from clipid_utils.__main__ import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["clipid_utils", "translate", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows(20))))
    said = run(tmp_path / "a.jsonl", tmp_path / "out", "--model", folder, "--beam", 2, "--device", "cpu")
    kept = sum(mark == "" for row in read_shards(tmp_path / "out") for mark in row["captions_mark"])
    assert f" {kept} kept, " in said and "stayed English" in said
    with pytest.raises(SystemExit, match="was made with beam 2, and now it is 4"):
        run(tmp_path / "a.jsonl", tmp_path / "out", "--model", folder)
    with pytest.raises(SystemExit, match="no 'title': name the English's"):
        run(tmp_path / "a.jsonl", tmp_path / "other", "--model", folder, "--column", "title")
    monkeypatch.setattr(sys, "argv", ["clipid_utils", "translate", str(tmp_path / "a.jsonl"), str(tmp_path / "ours")])
    main()
    assert "by the small model of data/translator, which is there to try this out" in capsys.readouterr().err
