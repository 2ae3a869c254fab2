"""Translation on CTranslate2: the conversion against Marian's formulas, batching, and runs that resume."""

import gzip
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

from clipid_utils.data import shards
from clipid_utils.data.captions import check_captions
from clipid_utils.data.translation import marian, translate
from clipid_utils.data.translation.checks import loops
from clipid_utils.data.translation.marian import WEIGHTS, convert, converted_folder
from clipid_utils.data.translation.on_ray import TranslateTable, map_shards
from clipid_utils.data.translation.translate import Translation, Translator, batches_by_length, translate_rows
from clipid_utils.files import usable_cores

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
    """One sentence a batch: a translation cannot depend, through the last bit of a sum, on the rest of its batch."""
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


def test_a_model_is_converted_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(marian, "CACHE", tmp_path / "cache")
    folder = tiny_marian(tmp_path / "hf")
    first = converted_folder(folder, "int8")
    made = os.stat(first / "model.bin").st_mtime_ns
    assert converted_folder(folder, "int8") == first
    assert os.stat(first / "model.bin").st_mtime_ns == made
    assert converted_folder(folder, "float32") != first
    tiny_marian(tmp_path / "hf", seed=1)
    assert converted_folder(folder, "int8") != first
    assert converted_folder(first, "int8") == first  # converted already
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_folder_that_is_not_a_marian_model_is_refused_by_name(tmp_path, monkeypatch):
    def refused(error, words, **changes):
        with pytest.raises(error, match=words):
            Translator(tiny_marian(tmp_path / "hf", **changes))

    refused(ValueError, "model_type is 'bert'", model_type="bert")
    refused(ValueError, "share_encoder_decoder_embeddings is False", share_encoder_decoder_embeddings=False)
    refused(ValueError, "activation_function is 'elu', not one of .*swish", activation_function="elu")
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
    for name, error in ((str(tmp_path / "elsewhere" / "hf"), FileNotFoundError),
                        ("nobody/opus-mt-en-id", ConnectionError)):  # the tests are offline
        with pytest.raises(error, match=f"'{name}' is n.* a folder"):
            Translator(name)
    with pytest.raises(ValueError, match="0 GPUs"):
        monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: 0)
        Translator(tmp_path / "hf", device="cuda")


def test_a_damaged_converted_model_is_refused_by_name(folder, tmp_path):
    shutil.copytree(converted_folder(folder, "int8"), tmp_path / "ct2")
    (tmp_path / "ct2" / "model.bin").write_bytes((tmp_path / "ct2" / "model.bin").read_bytes()[:100])
    with pytest.raises(ValueError, match="ct2: CTranslate2 cannot open the model"):
        Translator(tmp_path / "ct2")


def write_bin(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """Writes the weights as `torch.save` does."""
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

    def snapshot_download(name, revision, allow_patterns):
        asked.append(allow_patterns)
        for file in hub.iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert Translator("Helsinki-NLP/opus-mt-en-id")(ENGLISH) == Translator(folder)(ENGLISH)
    assert not any(map(set(WEIGHTS).issubset, asked)) and form in asked[-1]  # the second only without the first


# --- Texts ------------------------------------------------------------------------------------------------------------


def test_the_order_is_restored_and_each_text_is_translated_once(translator, alone, monkeypatch):
    submitted, submit = [], translator._submit
    monkeypatch.setattr(translator, "_submit", lambda batch: submitted.extend(map(tuple, batch)) or submit(batch))
    texts = sentences(200)
    first = translator(texts)
    assert translator(texts[::-1] + ["a cat"]) == first[::-1] + translator(["a cat"])
    assert max(Counter(submitted).values()) == 1
    assert len({translation.text for translation in first}) > 20  # translations depend on their texts
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
    monkeypatch.setattr(translate, "REMEMBERED", 10)
    translator = Translator(folder)
    assert len(translator(sentences(50))) == 50 and len(translator._known) == 10


@given(st.lists(st.integers(0, 60)), st.integers(1, 100))
def test_batches_hold_every_sentence_once_within_the_budget(lengths, tokens):
    batches = list(batches_by_length(lengths, tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens or lengths[batch[0]] == 0


def test_a_text_that_cannot_be_translated_stays_english_and_says_why(translator):
    long = "cat " * 300
    found = translator(["  ", long, ""])
    assert found == [Translation("  ", "empty"), Translation(long, "too long"), Translation("", "empty")]
    marks = Counter(translation.mark for translation in translator(sentences(300)))
    assert set(marks) == {"", "loops"}  # random weights do both
    for text, (translated, mark) in zip(sentences(300), translator(sentences(300)), strict=True):
        assert (translated == text) if mark else translated and not loops(translated, text)


class Says:
    """An engine that says the same pieces to every sentence."""

    def __init__(self, pieces):
        self.hypotheses = [pieces]

    def translate_batch(self, batch, **options):
        self.options = options
        return [self] * len(batch)

    def result(self):
        return self


def test_a_translation_that_does_not_end_is_a_loop(folder, translator):
    count = len(translator._source.encode("a cat", out_type=str))
    limit, pieces = 2 * count + 16, [translator._target.id_to_piece(number) for number in range(3, 50)]
    for length, mark in ((limit, "loops"), (limit - 1, "")):
        translator = Translator(folder, threads=1)
        translator.engine = Says(pieces[:length])
        assert translator(["a cat"])[0].mark == mark and translator.engine.options["max_decoding_length"] == limit
    assert translate._limit(["cat"] * 150) == translate.MAX_TARGET


def test_a_text_that_repeats_a_word_may_be_translated_so(folder, translator):
    translator.engine = Says(translator._target.encode("anjing anjing anjing", out_type=str))
    assert translator(["a dog", "dog dog dog"]) == [
        Translation("a dog", "loops"), Translation("anjing anjing anjing")]


class Failing:
    """An engine that fails on batches with a certain piece in them."""

    def __init__(self, engine, piece):
        self.engine, self.piece = engine, piece

    def translate_batch(self, batch, **options):
        futures = self.engine.translate_batch(batch, **options)
        return [self] * len(batch) if any(self.piece in words for words in batch) else futures

    def result(self):
        raise RuntimeError("out of memory")


def test_a_sentence_on_which_the_engine_fails_fails_alone_and_is_tried_again(folder, alone):
    texts = [text for text in sentences(100) if "moon" not in text]
    translator = Translator(folder, batch_tokens=10_000)  # all in one batch, which fails: each is then asked alone
    (piece,) = {words[-1] for words in translator._source.encode(["moon"], out_type=str)}
    texts = [text for text in texts if piece not in translator._source.encode(text, out_type=str)]
    engine, translator.engine = translator.engine, Failing(translator.engine, piece)
    assert translator([*texts, "the moon"]) == [*alone(texts), Translation("the moon", "failed")]
    translator.engine = engine
    assert translator(["the moon"]) == alone(["the moon"]) != [Translation("the moon", "failed")]


# --- Files ------------------------------------------------------------------------------------------------------------


def rows(count: int) -> list[dict]:
    texts = sentences(3 * count)
    return [{"image_path": f"pictures/{i}.jpg", "captions": texts[3 * i : 3 * i + 1 + i % 3], "source": None, "id": i}
            for i in range(count)]


def read_shards(out: Path) -> list[dict]:
    return [row for shard in sorted(out.glob("part-*.parquet")) for row in pq.read_table(shard).to_pylist()]


KINDS = ["jsonl", "windows", "parquet", "records", "folder", "glob"]


def write_source(folder: Path, kind: str, source: list[dict]):
    """The rows as a source of one kind."""
    def lines(rows: list[dict], end: str = "\n") -> bytes:
        return end.join(map(json.dumps, rows)).encode()

    if kind == "records":
        return source
    parts = folder / "parts"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(source), parts / "a.parquet", row_group_size=7)
    elif kind == "jsonl":
        (parts / "a.jsonl").write_bytes(lines(source, "\n\n"))
    elif kind == "windows":  # with a byte-order mark
        (parts / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(source, "\r\n"))
    else:
        (parts / "1.jsonl").write_bytes(lines(source[:15]))
        (parts / "2.jsonl.gz").write_bytes(gzip.compress(lines(source[15:27])))
        pq.write_table(pa.Table.from_pylist(source[27:]), parts / "3.parquet")
        return parts if kind == "folder" else str(parts / "*")
    return next(parts.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_rows(translator, tmp_path, kind):
    rows_in, out = rows(50), tmp_path / "somewhere" / "out"
    source = write_source(tmp_path, kind, rows_in)
    report = translate_rows(source, out, translator, shard_rows=20)
    assert [pq.read_metadata(shard).num_rows for shard in sorted(out.glob("*.parquet"))] == [20, 20, 10]
    for row, made in zip(rows_in, read_shards(out), strict=True):
        assert made["captions_en"] == row["captions"] and made["id"] == row["id"] and made["source"] is None
        assert made["captions"] == [translation.text for translation in translator(row["captions"])]
        assert made["captions_mark"] == [translation.mark for translation in translator(row["captions"])]
        assert made["image_path"] == os.path.join("" if kind == "records" else "../../parts", row["image_path"])
    count = Counter(mark for row in read_shards(out) for mark in row["captions_mark"])
    assert report.kept == count[""] and report.dropped == {"loops": count["loops"]} and report.examples["loops"]
    assert ["not found under" in problem for problem in check_captions(out / "part-00000.parquet")] == [True] * 20
    assert translate_rows(source, out, translator, shard_rows=20) == report  # nothing is left to do


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
    with pytest.raises(ValueError, match=r"columns title, n and no 'captions': name the column of the English"):
        translate_rows(tmp_path / "a.parquet", tmp_path / "other", translator)
    with pytest.raises(ValueError, match="columns title, title_en, title_mark, n and title_en already"):
        translate_rows(tmp_path / "out", tmp_path / "other", translator, column="title")


def test_nulls_in_lists_of_captions(translator, tmp_path):
    given = [["a cat", None], None, [], ["a dog"]]
    translate_rows([{"captions": captions} for captions in given], tmp_path, translator)
    assert [row["captions_en"] for row in read_shards(tmp_path)] == given
    cat, dog = (translation.text for translation in translator(["a cat", "a dog"]))
    assert [row["captions"] for row in read_shards(tmp_path)] == [[cat, ""], [], [], [dog]]


KILLED = """
import os, sys
from pathlib import Path
import pyarrow.parquet as pq
from clipid_utils.data.translation import marian
from clipid_utils.data.translation.translate import Translator, translate_rows

folder, source, out, cache = sys.argv[1:]
marian.CACHE, write_table = Path(cache), pq.write_table

def dies_in_the_middle(table, file):
    write_table(table, file)
    if "part-00002" in file.name:
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), 9)

pq.write_table = dies_in_the_middle
translate_rows(source, out, Translator(folder, threads=1, batch_tokens=1), shard_rows=10, progress=False)
"""


def test_a_killed_run_resumes_and_loses_or_repeats_no_row(folder, alone, tmp_path, monkeypatch):
    source, out = tmp_path / "captions.jsonl", tmp_path / "out"
    source.write_text("\n".join(map(json.dumps, rows(75))))
    (tmp_path / "killed.py").write_text(KILLED)
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run([sys.executable, tmp_path / "killed.py", folder, source, out, marian.CACHE],
                            env={**os.environ, "PYTHONPATH": paths}, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    *done, partial = sorted(out.glob("part*"))
    assert [shard.name for shard in done] == ["part-00000.parquet", "part-00001.parquet"]
    assert partial.name.startswith("part-00002.parquet.")
    with pytest.raises(pa.ArrowInvalid):
        pq.read_table(partial)  # half of it

    replace = os.replace

    def dies_afterwards(partial, path):
        replace(partial, path)
        if str(path).endswith("part-00004.parquet"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", dies_afterwards)
        translate_rows(source, out, alone, shard_rows=10)
    assert [path.name for path in sorted(out.glob("part*"))] == [f"part-0000{number}.parquet" for number in range(5)]
    last = translate_rows(source, out, alone, shard_rows=10)
    assert last == translate_rows(source, tmp_path / "unbroken", alone, shard_rows=10)
    assert read_shards(out) == read_shards(tmp_path / "unbroken")
    assert [row["id"] for row in read_shards(out)] == list(range(75))
    before = {path: os.stat(path).st_mtime_ns for path in out.glob("part*")}
    assert translate_rows(source, out, alone, shard_rows=10) == last
    assert before == {path: os.stat(path).st_mtime_ns for path in before}  # nothing was left to do


def test_it_resumes_with_shards_of_a_different_size_and_with_types_that_only_the_first_rows_show(translator, tmp_path):
    source = rows(40)
    source[3]["source"] = "coco"  # null in all the others
    translate_rows(source[:10], tmp_path / "out", translator, shard_rows=10)
    translate_rows(source, tmp_path / "out", translator, shard_rows=7)
    assert [row["id"] for row in read_shards(tmp_path / "out")] == list(range(40))
    assert len({pq.read_schema(shard).remove_metadata() for shard in (tmp_path / "out").glob("*.parquet")}) == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "records", "folder"])
@pytest.mark.parametrize("change", ["a new first row", "a different caption", "a row less", "fewer rows than done"])
def test_a_source_that_changed_in_the_rows_that_are_done_is_refused(folder, translator, tmp_path, kind, change):
    source = write_source(tmp_path, kind, rows(50))
    translate_rows(rows(40) if kind == "records" else source, tmp_path / "out", translator, shard_rows=10)
    (tmp_path / "out" / "part-00004.parquet").unlink(missing_ok=True)  # as if it had been killed there
    before = read_shards(tmp_path / "out")
    changed = rows(50)
    if change == "a new first row":
        changed.insert(0, {**changed[0], "captions": ["a new cat"]})
    elif change == "a different caption":
        changed[35]["captions"] = [*changed[35]["captions"][:-1], "a different cat"]
    elif change == "a row less":
        del changed[12]
    else:
        del changed[30:]
    source = write_source(tmp_path, kind, changed)
    name = "the records" if kind == "records" else re.escape(str(source))
    shard = {"a different caption": 3, "a row less": 1, "fewer rows than done": 3}.get(change, 0)
    with pytest.raises(ValueError, match=f"^{name}: .*part-0000{shard}.parquet was made from different rows than those "
                                         f"after row {10 * shard}: restore them, delete this shard and the later ones"):
        translate_rows(source, tmp_path / "out", translator, shard_rows=10)
    assert read_shards(tmp_path / "out") == before
    if change == "a different caption":  # the way out that the message names
        (tmp_path / "out" / "part-00003.parquet").unlink()
        translate_rows(source, tmp_path / "out", translator, shard_rows=10)
        assert [row["captions_en"] for row in read_shards(tmp_path / "out")] == [row["captions"] for row in changed]


def test_rows_that_were_added_at_the_end_are_translated(translator, tmp_path):
    translate_rows(write_source(tmp_path, "jsonl", rows(20)), tmp_path / "out", translator, shard_rows=10)
    translate_rows(write_source(tmp_path, "jsonl", rows(30)), tmp_path / "out", translator, shard_rows=10)
    assert [row["id"] for row in read_shards(tmp_path / "out")] == list(range(30))


def test_a_model_that_changed_under_its_name_is_refused_and_one_that_moved_is_not(tmp_path):
    model, out = tiny_marian(tmp_path / "hf"), tmp_path / "out"
    translate_rows(rows(10), out, Translator(model), shard_rows=5)
    model.rename(tmp_path / "moved")
    translate_rows(rows(20), out, Translator(tmp_path / "moved"), shard_rows=5)
    tiny_marian(model, seed=1)
    known = f"'{model} .content [0-9a-f]+.'"
    with pytest.raises(ValueError, match=f"part-00000.parquet was made with model {known}, and now it is {known}: "):
        translate_rows(rows(20), out, Translator(model))


def test_a_folder_that_does_not_fit_is_refused(folder, translator, tmp_path):
    translate_rows(rows(30), tmp_path, translator, shard_rows=10)
    with pytest.raises(ValueError, match="part-00000.parquet was made with beam 4, and now it is 2: restore"):
        translate_rows(rows(30), tmp_path, Translator(folder, beam=2))
    (tmp_path / "part-00001.parquet").rename(tmp_path / "aside")
    with pytest.raises(ValueError, match="has part-00002.parquet and no part-00001.parquet: delete the later"):
        translate_rows(rows(30), tmp_path, translator)
    (tmp_path / "part-00001.parquet").write_bytes((tmp_path / "aside").read_bytes()[:100])
    with pytest.raises(ValueError, match="part-00001.parquet is damaged"):
        translate_rows(rows(30), tmp_path, translator)


def test_a_folder_with_the_source_is_refused_before_anything_is_written(translator, tmp_path):
    pq.write_table(pa.table({"captions": [["a cat"]]}), tmp_path / "part-00000.parquet")
    before = (tmp_path / "part-00000.parquet").read_bytes()
    with pytest.raises(ValueError, match="part-00000.parquet is in the folder of the result.*: name a different"):
        translate_rows(tmp_path, tmp_path, translator)
    with pytest.raises(ValueError, match="part-00000.parquet is in the folder of the result"):
        map_shards([tmp_path / "part-00000.parquet"], tmp_path, TranslateTable, {})
    assert (tmp_path / "part-00000.parquet").read_bytes() == before


@pytest.mark.parametrize("value", [{"en": "a cat"}, 3, [3], {"bytes": b"x", "path": None}])
def test_a_column_without_texts_is_named(translator, tmp_path, value):
    with pytest.raises(ValueError, match="'captions' has .*, not texts or lists of texts: name the column"):
        translate_rows([{"captions": value}], tmp_path, translator)


def test_a_shard_ends_where_its_pictures_are_large(monkeypatch):
    monkeypatch.setattr(shards, "MOST_BYTES", 100)
    rows = [("", {"image": picture}) for picture in ({"bytes": bytes(60)}, bytes(60), None, 3)]
    stream = iter(rows)
    assert [len(shards.next_rows(stream, 3)) for _ in range(3)] == [2, 2, 0]
    assert len(shards.next_rows(iter(rows[2:] * 5), 3)) == 3


def test_two_processes_do_not_write_to_one_folder(translator, tmp_path):
    with shards.only_writer(tmp_path), pytest.raises(OSError, match="another process is writing to"):
        translate_rows(rows(3), tmp_path, translator)


def test_a_stream_is_read_no_further_than_the_shard_that_is_made(translator, tmp_path):
    ahead = []

    def stream():
        for number, row in enumerate(rows(50)):
            ahead.append(number - 10 * len(list(tmp_path.glob("part*"))))
            yield row

    translate_rows(stream(), tmp_path, translator, shard_rows=10, progress=False)
    assert max(ahead) < 10 and len(read_shards(tmp_path)) == 50


@pytest.mark.parametrize("second, message", [
    ('{"captions": ["a"]', "a.jsonl:2: not valid JSON"), ("3", "a.jsonl:2: '3' is not a record"),
    ('{"captions": "a cat"}', "a.jsonl:2: captions is 'a cat': give a list with at least one text"),
    ('{"captions": ["a"], "x": 2}', "a.jsonl:2: 'x' is not a key of the first rows"),
    ('{"captions": [1]}', "a.jsonl:2 to a.jsonl:2: .*all rows need the same keys with the same types"),
    ('{"captions": ["\\ud83d"]}', "a.jsonl:2 to a.jsonl:2: .*surrogates not allowed"),
])
def test_bad_rows_are_named(translator, tmp_path, second, message):
    (tmp_path / "a.jsonl").write_text(f'{{"captions": ["a"]}}\n{second}\n')
    with pytest.raises(ValueError, match=message):
        translate_rows(tmp_path / "a.jsonl", tmp_path / "out", translator, shard_rows=1)


@pytest.mark.parametrize("values, message", [
    (["a", "b"], "records:1: captions is 'a': give a list"), ([["a"], 3], "records:1 to records:2: .*the same types"),
])
def test_bad_first_rows_are_named(translator, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        translate_rows([{"captions": value} for value in values], tmp_path, translator)


def test_the_types_of_the_first_rows_are_looked_for_once_a_key(tmp_path, monkeypatch):
    """Once a row, a shard of a machine with many cores would take hours."""
    looked, array = [], pa.array
    monkeypatch.setattr("clipid_utils.data.shards.pa.array", lambda values: looked.append(1) or array(values))
    assert shards.as_table(list(shards.read_rows(rows(100), tmp_path))).num_rows == 100 and len(looked) == 4


def test_pictures_are_found_from_a_folder_behind_a_link(tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "deep")
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.jsonl").write_text('{"image_path": "a.jpg"}')
    ((_, row),) = shards.read_rows(tmp_path / "a.jsonl", tmp_path / "data")
    assert (tmp_path / "data" / row["image_path"]).samefile(tmp_path / "a.jpg")


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    from clipid_utils.__main__ import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["clipid_utils", "translate", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows(20))))
    monkeypatch.setenv("HOME", str(tmp_path))
    said = run("~/a.jsonl", "~/out", "--model", folder, "--beam", 2, "--device", "cpu")
    kept = sum(mark == "" for row in read_shards(tmp_path / "out") for mark in row["captions_mark"])
    assert f" {kept} kept, " in said and "stayed English" in said
    with pytest.raises(SystemExit, match="was made with beam 2, and now it is 4"):
        run(tmp_path / "a.jsonl", tmp_path / "out", "--model", folder)
    with pytest.raises(SystemExit, match="no 'title': name the column of the English"):
        run(tmp_path / "a.jsonl", tmp_path / "other", "--model", folder, "--column", "title")
    monkeypatch.setattr(sys, "argv", ["clipid_utils", "translate", str(tmp_path / "a.jsonl"), str(tmp_path / "ours")])
    main()
    assert "the small model of data/translator is only for trying this out" in capsys.readouterr().err
