"""Models on tasks: known answers, paired differences, checksums, runs that are interrupted, and the table."""

import copy
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from colour_model import COLOURS, ColourModel, colour_clip, spot
from datasets import Dataset, DatasetDict, Image
from PIL import Image as PillowImage
from test_evaluate import split

from clipid_utils.evaluation import suite, tasks
from clipid_utils.evaluation.suite import as_table, evaluate_models
from clipid_utils.files import read_json, write_json_lines
from clipid_utils.inference import evaluate
from clipid_utils.metrics import with_interval, with_intervals
from clipid_utils.model import embed
from clipid_utils.model.pretrained.hub import fetch_checkpoint
from clipid_utils.paths import DATA
from clipid_utils.plots.style import COLOURS as PLOTTED
from clipid_utils.wording import load_wording


class Blind(ColourModel):
    """The same vector for everything."""

    def encode_image(self, pixel_values):
        return jnp.full((len(pixel_values), 4), 0.5)

    def encode_text(self, input_ids, attention_mask):
        return jnp.full((len(input_ids), 4), 0.5)


def blind():
    _, processor = colour_clip()
    model = Blind(processor)
    model.table[...] += 1  # the cache knows a model by its weights
    return model, processor


def half():
    """It takes biru for hijau."""
    model, processor = colour_clip()
    biru, hijau = map(processor.tokenizer.token_to_id, ("biru", "hijau"))
    model.table[...] = model.table[...].at[biru].set(model.table[...][hijau])
    return model, processor


MODELS = {"tahu": colour_clip(), "buta": blind(), "setengah": half(), "setengah lagi": half()}
# right, wrong, phenomenon, cluster; a model that adds words up cannot tell their order: a tie
PAIRS = [("merah", "biru", "warna", "a"), ("merah biru", "biru merah", "urutan", "c"), ("hijau", "merah", "warna", "a"),
         ("foto biru", "foto hijau", "warna", "b")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """captions.jsonl with three pictures, and kelas, a folder of three folders with two pictures each."""
    root = tmp_path_factory.mktemp("data")
    for shade, colour in enumerate(COLOURS):
        (root / "kelas" / colour).mkdir(parents=True)
        spot(colour, shade=shade).save(root / f"{colour}.png")
        for number in (10, 20):
            spot(colour, shade=number + shade).save(root / "kelas" / colour / f"{number}.png")
    write_json_lines(root / "captions.jsonl", [
        {"image_path": f"{colour}.png", "captions": [colour, f"foto {colour}"]} for colour in COLOURS])
    return root


def requests(root) -> list[str]:
    return [f"records={root}/captions.jsonl", f"folders={root}/kelas", "pairs"]


def pairs() -> Dataset:
    right, wrong, phenomena, clusters = zip(*PAIRS, strict=True)
    images = [spot(text.split()[-1], shade=30 + i) for i, text in enumerate(right)]
    rows = {"image": images, "right": right, "wrong": wrong, "phenomenon": phenomena, "cluster": clusters}
    return Dataset.from_dict(rows).cast_column("image", Image())


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    """The models by their names, and a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "load_clip", MODELS.__getitem__)
        patch.setattr(suite, "fetch_checkpoint", lambda name, weights: None)
        patch.setattr(suite, "CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(suite, "ROWS", 4)  # six pictures are two blocks
        patch.setattr(tasks, "load_minimal_pairs", pairs)
        yield


@pytest.fixture(scope="module")
def report(data):
    return evaluate_models(["tahu", "buta", "setengah"], requests(data), progress=False)


@pytest.fixture
def encoded(monkeypatch):
    """(model, method, rows) of each batch that is encoded; `stop_at` is a number of batches."""
    calls, encoder = [], embed.encoder

    def counting(model, method):
        encode = encoder(model, method)

        def run(*batch):
            if len(calls) == calls_until[0]:
                raise KeyboardInterrupt
            calls.append((next(name for name, own in MODELS.items() if own[0] is model), method, len(batch[0])))
            return encode(*batch)

        return run

    calls_until = [-1]
    monkeypatch.setattr(embed, "encoder", counting)
    return calls, calls_until


def value(report: dict, task: str, model: str, part: str, figure: str):
    return report["tasks"][task]["results"][model][part][figure]["value"]


SURE = {"value": 1.0, "low": 1.0, "high": 1.0}


def test_a_model_that_knows_gets_everything_right_in_each_kind_of_task(report):
    found = {name: task["results"]["tahu"] for name, task in report["tasks"].items()}
    for name in ("records:all", "records:first"):
        for direction in ("text_to_image", "image_to_text"):
            assert found[name][direction] == dict.fromkeys(("R@1", "R@5", "R@10", "MRR@10"), SURE)
    for key in ("naive", "templates"):
        assert found["folders"][key] == {"top1": SURE}  # three classes: among five would always be right
    assert found["folders"]["per_class"] == dict.fromkeys(sorted(COLOURS), 1.0) and not found["folders"]["confusions"]
    assert found["pairs"]["warna"] == {"accuracy": SURE}


def test_a_blind_model_is_at_chance_or_below(report):
    """All similarities are ties, and these count against a model."""
    for name, part, figure, most in (
            ("records:all", "text_to_image", "R@1", 0), ("records:first", "image_to_text", "R@1", 0),
            ("folders", "naive", "top1", 1 / 3), ("folders", "templates", "top1", 1 / 3),
            ("pairs", "all", "accuracy", 0)):
        assert value(report, name, "buta", part, figure) <= most


def test_a_tie_of_a_pair_is_wrong(report):
    """The colour model adds words up, so it cannot tell merah biru from biru merah."""
    found = report["tasks"]["pairs"]["results"]["tahu"]
    assert found["urutan"]["accuracy"]["value"] == 0 and found["all"]["accuracy"]["value"] == 0.75
    assert list(found) == ["all", "warna", "urutan"]


def test_each_phenomenon_has_the_hits_and_clusters_of_its_pairs():
    task, = tasks.read_tasks("pairs")
    parts, more = suite.measure(suite.Embedder("tahu", *MODELS["tahu"], progress=False), task)
    found = {part: (figures["accuracy"].tolist(), clusters) for part, (figures, clusters) in parts.items()}
    assert found == {"all": ([1, 0, 1, 1], ["a", "c", "a", "b"]), "warna": ([1, 1, 1], ["a", "a", "b"]),
                     "urutan": ([0], ["c"])}
    assert more == {}


def test_classes_and_confusions_are_named(report):
    """`setengah` sees no difference between biru and hijau, and a tie is wrong."""
    found = report["tasks"]["folders"]["results"]["setengah"]
    assert found["per_class"] == {"biru": 0.0, "hijau": 0.0, "merah": 1.0}
    assert found["templates"]["top1"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert {"true": "hijau", "found": "biru", "pictures": 2} in found["confusions"]
    assert all(row["true"] != row["found"] for row in found["confusions"])


def test_the_report_names_data_protocols_versions_and_models(report):
    assert json.loads(json.dumps(report)) == report
    assert {name: task["kind"] for name, task in report["tasks"].items()} == {
        "records:all": "Retrieval", "records:first": "Retrieval", "folders": "ZeroShot", "pairs": "Pairs"}
    sizes = {name: {key: size for key, size in task["data"].items() if key != "sha256"}
             for name, task in report["tasks"].items()}
    assert sizes == {"records:all": {"pictures": 3, "texts": 6}, "records:first": {"pictures": 3, "texts": 3},
                     "folders": {"pictures": 6, "names": 3}, "pairs": {"pictures": 4, "right": 4, "wrong": 4}}
    assert len({task["data"]["sha256"] for task in report["tasks"].values()}) == 4
    assert list(report["models"]) == ["tahu", "buta", "setengah"]
    for key, different in (("fingerprint", 3), ("tokenizer", 1)):
        marks = {model[key] for model in report["models"].values()}
        assert len(marks) == different and {len(mark) for mark in marks} == {16}
    assert report["seed"] == 0 and {"python", "jax", "numpy"} <= set(report["versions"])
    assert report["tasks"]["records:all"]["protocol"] == "all captions"


def test_figures_are_those_of_evaluate_checkpoint(monkeypatch):
    """On the picture dictionary both measure the same. Pictures are noise, so that some are found and some are not."""
    rng, count = np.random.default_rng(0), 24
    drawn = [str(name) for name in rng.choice(["merah", "hijau", "biru"], count)]
    noise = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    rows = split(drawn, "noto", image=[PillowImage.fromarray(pixels) for pixels in noise], group=drawn, group_id=drawn,
                 name_id=[name.title() for name in drawn], concept=[f"c{i % 9}" for i in range(count)],
                 name_en=drawn[::-1])
    dictionary = DatasetDict(unseen_artist=rows, photographs=rows)
    monkeypatch.setattr(tasks, "load_picture_dictionary", lambda: dictionary)
    asked, weights = [], suite.classifier_weights
    monkeypatch.setattr(suite, "classifier_weights", lambda *given, embed: asked.append(given[2:]) or weights(*given))
    found = evaluate_models(["tahu"], ["unseen_artist", "photographs:en", "groups"], seed=3, progress=False)["tasks"]
    english = rows.remove_columns("name_id").rename_column("name_en", "name_id")
    expected = evaluate.evaluate_checkpoint(MODELS["tahu"], dictionary | {"photographs": english}, seed=3,
                                            splits=("unseen_artist", "photographs"), progress=False)

    def without_sizes(figures):
        return {part: {key: cell for key, cell in cells.items() if isinstance(cell, dict)}
                for part, cells in figures.items() if part not in ("per_class", "confusions")}

    for name, wanted in (("unseen_artist", expected["retrieval"]["unseen_artist"]),
                         ("photographs:en", expected["retrieval"]["photographs"]),
                         ("groups", expected["zero_shot"]["unseen_artist"]["group"])):
        figures = without_sizes(found[name]["results"]["tahu"])
        wanted = without_sizes(wanted)
        if name == "groups":  # of fewer than five classes
            wanted = {part: {"top1": cells["top1"]} for part, cells in wanted.items()}
        assert figures == wanted
        assert all(0 < list(cells.values())[0]["value"] < 1 for cells in figures.values())
    groups, wording = sorted(set(drawn)), load_wording()
    assert asked == [(groups, wording[key], groups) for key in ("naive", "templates")]  # each is its own name here


# Differences

def test_a_model_has_no_difference_from_itself(data):
    found = evaluate_models(["setengah", "setengah lagi"], requests(data), progress=False)
    seen = 0
    for task in found["tasks"].values():
        (pair, parts), = task["differences"].items()
        assert pair == "setengah lagi - setengah"
        for part, figures in parts.items():
            assert figures.keys() == task["results"]["setengah"][part].keys()
            for cell in figures.values():
                assert cell == {"value": 0, "low": 0, "high": 0}
                seen += 1
    assert seen == 2 * 2 * 4 + 2 * 1 + 3
    assert 0 < value(found, "records:all", "setengah", "text_to_image", "R@1") < 1


def test_differences_are_of_each_later_model_from_the_first(report):
    for task in report["tasks"].values():
        assert list(task["differences"]) == ["buta - tahu", "setengah - tahu"]
    cell = report["tasks"]["records:all"]["differences"]["setengah - tahu"]["text_to_image"]["R@1"]
    assert cell["value"] == pytest.approx(value(report, "records:all", "setengah", "text_to_image", "R@1") - 1)
    assert report["tasks"]["pairs"]["differences"]["buta - tahu"]["warna"]["accuracy"] == {
        "value": -1, "low": -1, "high": -1}


def test_paired_differences_have_narrower_intervals_than_two_samples(monkeypatch):
    """Two models that are right on nearly the same items: their common hits do not widen the interval."""
    rng = np.random.default_rng(0)
    hits = (rng.random(400) < 0.5).astype(float)
    per_model = {"tahu": hits, "setengah": np.where(rng.random(400) < 0.05, 1 - hits, hits)}
    clusters = [i // 2 for i in range(400)]
    monkeypatch.setattr(suite, "measure", lambda embedder, task: suite.Measured(
        {"all": ({"accuracy": per_model[embedder.name]}, clusters)}, {}))
    task = evaluate_models(list(per_model), ["pairs"], seed=2)["tasks"]["pairs"]
    alone = [task["results"][name]["all"]["accuracy"] for name in per_model]
    cell = task["differences"]["setengah - tahu"]["all"]["accuracy"]
    assert cell["high"] - cell["low"] < np.hypot(*(one["high"] - one["low"] for one in alone)) / 2
    for found, values in ((cell, per_model["setengah"] - hits), (alone[0], hits)):
        assert found == pytest.approx(with_interval(values, 2, clusters), abs=1e-6)
        for other in (with_interval(values, 2), with_interval(values, 0, clusters)):
            assert found != pytest.approx(other, abs=1e-6)


def test_figures_of_one_item_are_drawn_together():
    """The figures of a direction come from the same draws: an item that is drawn counts in all of them."""
    rng = np.random.default_rng(0)
    first, clusters = rng.random(60), rng.integers(9, size=60).tolist()
    found = with_intervals({"a": first, "b": first > 0.5, "c": 1 - first}, 4, clusters)
    assert found["a"] == with_interval(first, 4, clusters)
    assert found["b"] == with_interval((first > 0.5).astype(float), 4, clusters)
    assert found["c"]["low"] == pytest.approx(1 - found["a"]["high"])
    for bad in (np.array([]), np.array([0.5, np.nan])):
        with pytest.raises(ValueError, match="b has no items, or a NaN"):
            with_intervals({"a": np.ones(2), "b": bad})
    with pytest.raises(ValueError, match="2 clusters for 60 items"):
        with_intervals({"a": first}, clusters=[0, 1])


# The same again

def test_the_same_files_elsewhere_give_the_same_report(report, data, tmp_path, monkeypatch, encoded):
    """Other folder, other times; the second time nothing but the sentences of classes is encoded."""
    copy = tmp_path / "lain"
    shutil.copytree(data, copy)
    for path in copy.rglob("*"):
        os.utime(path, (10**9, 10**9))
    monkeypatch.setattr(suite, "CACHE", tmp_path / "cache")
    names, calls = ["tahu", "buta", "setengah"], encoded[0]
    assert evaluate_models(names, requests(copy), progress=False) == report and calls
    calls.clear()
    asked = [request for request in requests(data) if not request.startswith("folders")]
    assert evaluate_models(names, asked, progress=False)["tasks"]["pairs"] == report["tasks"]["pairs"] and not calls


def test_a_run_that_is_interrupted_in_the_second_model_embeds_nothing_of_the_first_again(
        data, tmp_path, monkeypatch, encoded):
    monkeypatch.setattr(suite, "CACHE", tmp_path)
    monkeypatch.setattr(suite, "TEXT_BATCH", 2)
    monkeypatch.setattr(suite, "TEXT_CHUNK", 2)
    asked, names, (calls, stop) = [f"records={data}/captions.jsonl", "pairs"], ["tahu", "setengah"], encoded

    def texts(name):
        return sum(rows for model, method, rows in calls if (model, method) == (name, "encode_text"))

    whole = evaluate_models(names[:1], asked, progress=False)
    once, unique = len(calls), 6 + 2  # most texts of the pairs are captions too
    assert texts("tahu") == unique
    stop[0] = once + 3  # the pictures of records, then two batches of their texts
    with pytest.raises(KeyboardInterrupt):
        evaluate_models(names, asked, progress=False)
    assert [call[0] for call in calls[once:]] == ["setengah"] * 3
    assert [call[1] for call in calls[once:]] == ["encode_image", "encode_text", "encode_text"]
    stop[0] = -1
    del calls[:]
    found = evaluate_models(names, asked, progress=False)
    assert not [call for call in calls if call[0] == "tahu"]
    assert [call[1] for call in calls].count("encode_image") == 1 and texts("setengah") == unique - 4
    assert found["tasks"]["pairs"]["results"]["tahu"] == whole["tasks"]["pairs"]["results"]["tahu"]


def changed_caption(root):
    text = (root / "captions.jsonl").read_text()
    (root / "captions.jsonl").write_text(text.replace("foto merah", "gambar merah"))


def moved_caption(root):
    """The last caption of the first picture becomes the first one of the second."""
    text = (root / "captions.jsonl").read_text()
    (root / "captions.jsonl").write_text(text.replace(', "foto merah"', "").replace('["hijau', '["foto merah", "hijau'))


def changed_picture(root):
    spot("merah", shade=1).save(root / "merah.png")


def renamed_class(root):
    (root / "kelas" / "merah").rename(root / "kelas" / "ungu")


def moved_picture(root):
    """The last picture of the first class becomes the first one of the second: the order of all stays."""
    (root / "kelas" / "biru" / "20.png").rename(root / "kelas" / "hijau" / "0.png")


@pytest.mark.parametrize("change, differs", [
    (changed_caption, {"records:all"}), (moved_caption, {"records:all", "records:first"}),
    (changed_picture, {"records:all", "records:first"}), (renamed_class, {"folders"}), (moved_picture, {"folders"}),
])
def test_the_checksum_sees_captions_pictures_classes_and_their_links(change, differs, report, data, tmp_path):
    copy = tmp_path / "lain"
    shutil.copytree(data, copy)
    change(copy)
    found = {task.name: suite._data(task)["sha256"] for request in requests(copy) for task in tasks.read_tasks(request)}
    assert {name for name, checksum in found.items() if checksum != report["tasks"][name]["data"]["sha256"]} == differs


# Errors

def test_a_picture_that_cannot_be_read_is_one_clear_error(data, tmp_path):
    shutil.copytree(data, tmp_path / "lain")
    broken = tmp_path / "lain" / "hijau.png"
    broken.write_bytes(broken.read_bytes()[:60])
    message = r"1 of 3 pictures cannot be read; the first is .*/hijau\.png: not a picture that can be read"
    with pytest.raises(ValueError, match=message) as found:
        evaluate_models(["tahu"], requests(tmp_path / "lain"), progress=False)
    assert "\n" not in str(found.value) and str(found.value).endswith("replace them, or leave them out of the data")
    stored = [{"bytes": (data / "merah.png").read_bytes(), "path": None}, {"bytes": b"x", "path": None}]
    with pytest.raises(ValueError, match="1 of 2 pictures cannot be read; the first is number 2: "):
        suite.Embedder("tahu", *MODELS["tahu"], progress=False).pictures(tasks.Pictures(stored))


def test_texts_are_embedded_again_for_a_different_tokenizer(tmp_path, monkeypatch):
    """The weights are the same, and so the pictures' vectors serve both."""
    monkeypatch.setattr(suite, "CACHE", tmp_path)
    (model, processor), (_, short) = MODELS["tahu"], colour_clip()
    short.max_length = 1
    first, second = (suite.Embedder("tahu", model, reader, progress=False) for reader in (processor, short))
    whole, one = first.texts(["merah biru", "merah"])
    with pytest.warns(UserWarning, match="cut"):
        cut, again = second.texts(["merah biru", "merah"])
    assert (cut == one).all() and (again == one).all() and (whole != one).any() and first.folder == second.folder
    short.tokenizer = None
    with pytest.raises(ValueError, match="this checkpoint came without a tokenizer"):
        suite.Embedder("tahu", model, short, progress=False).texts(["merah"])


@pytest.mark.parametrize("names, asked, message", [
    ([], ["pairs"], "name at least one model"), (["tahu", "buta", "tahu"], ["pairs"], "the model tahu is named twice"),
    (["tahu"], ["kamus"], "no task 'kamus'"),
    (["tahu"], ["folders={0}/kelas", "folders={0}/kelas/"], "folders is asked for with two sets of files"),
])
def test_a_wrong_request_ends_before_a_model_is_opened(names, asked, message, data, monkeypatch):
    monkeypatch.setattr(suite, "load_clip", None)
    with pytest.raises(ValueError, match=message):
        evaluate_models(names, [request.format(data) for request in asked])


def test_a_wrong_name_of_a_later_model_ends_before_the_first_is_opened(monkeypatch):
    monkeypatch.setattr(suite, "load_clip", None)
    monkeypatch.setattr(suite, "fetch_checkpoint", fetch_checkpoint)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate_models(["mini", "./nowhere"], ["pairs"])


def test_a_task_that_is_named_twice_is_measured_once(report):
    assert evaluate_models(["tahu"], ["pairs", "pairs"], progress=False)["tasks"]["pairs"]["data"] == (
        report["tasks"]["pairs"]["data"])


def test_two_towers_are_joined(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(suite, "load_towers", lambda *names, rngs: asked.append(names) or MODELS["tahu"])
    monkeypatch.setattr(suite, "load_clip", lambda name: asked.append(name) or MODELS["buta"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c++").mkdir()
    assert suite.open_model("org/vision+org/text") is MODELS["tahu"] and suite.open_model("mini") is MODELS["buta"]
    assert suite.open_model("c++") is MODELS["buta"]  # a folder
    assert asked == [("org/vision", "org/text"), "mini", "c++"]
    monkeypatch.setattr(suite, "load_towers", lambda *names, rngs: rngs.params())
    with pytest.raises(ValueError, match=r"vision\+text: these towers have no projections .* train the model first"):
        suite.open_model("vision+text")


# The table and the figure

def cell(value: float, low: float, high: float) -> dict:
    return {"value": value, "low": low, "high": high}


def hand_made(name: str, *deltas: dict) -> dict:
    """A report of two models on a set of captions; `deltas` are differences at R@1 and R@10, to image and to text."""
    parts = ("text_to_image", "image_to_text")
    figures = {part: {"R@1": cell(0.5, 0.4, 0.6), "R@5": cell(0.7, 0.6, 0.8), "R@10": cell(0.81, 0.71, 0.91)}
               for part in parts}
    differences = {part: {"R@1": first, "R@5": first, "R@10": second}
                   for part, first, second in zip(parts, deltas[::2], deltas[1::2], strict=True)}
    return {"models": {"satu": {}, "dua": {}}, "tasks": {name: {
        "kind": "Retrieval", "results": {"satu": figures, "dua": figures}, "differences": {"dua - satu": differences}}}}


def test_only_differences_whose_interval_leaves_out_0_are_marked():
    found = hand_made("records:all", cell(0.1, 0.01, 0.2), cell(0.1, -0.01, 0.2), cell(-0.1, -0.2, -0.01),
                      cell(0.1, 0.0, 0.2))
    (head, *values), (second_head, *lines) = (block.splitlines() for block in as_table(found).split("\n\n"))
    assert head.split() == ["task", "figure", "satu", "dua"]
    assert second_head.split() == ["task", "figure", "dua", "-", "satu"]
    assert [line.endswith("*") for line in lines] == [True, False, True, False] and "*" not in "".join(values)
    assert values[0] == "records:all  text_to_image R@1   0.500 [0.400, 0.600]  0.500 [0.400, 0.600]"
    assert lines[0] == "records:all  text_to_image R@1   +0.100 [+0.010, +0.200] *"
    assert values[3].endswith("image_to_text R@10  0.810 [0.710, 0.910]  0.810 [0.710, 0.910]")
    assert lines[3].endswith("image_to_text R@10  +0.100 [+0.000, +0.200]")
    assert "R@5" not in "".join(lines + values)


def test_a_table_of_all_kinds_has_a_line_for_each_figure(report):
    first, second = (block.splitlines() for block in as_table(report).split("\n\n"))
    for (head, *lines), names in ((second, ("buta - tahu", "setengah - tahu")), (first, ("tahu", "buta", "setengah"))):
        places = [head.index(word) for word in ("figure", *names)]
        assert len(lines) == 2 * 4 + 2 + 3
        for line in lines:
            assert all(line[place - 2 : place] == "  " and line[place] != " " for place in places)
    assert [line[places[0] : places[1]].strip() for line in lines[8:]] == [
        "naive top1", "templates top1", "all accuracy", "warna accuracy",
        "urutan accuracy"]
    assert "ublished" not in as_table(report)


@pytest.mark.parametrize("name", ["xm3600", "xflickrco"])
def test_published_figures_stand_apart_and_only_for_their_sets(name):
    same = [cell(0.0, -0.1, 0.1)] * 4
    table, _, apart = as_table(hand_made(f"{name}:all", *same)).split("\n\n")
    title, *lines = apart.splitlines()
    rows = [row for row in read_json(DATA / "published.json") if row["set"] == name]
    assert title == "Published by others, in percent, not computed here:" and len(lines) == len(rows) > 0
    for line, row in zip(lines, rows, strict=True):
        assert line.startswith(f"  {row['model']}: text to image R@1 {row['text_to_image']}, image to text R@1 "
                               f"{row['image_to_text']} ({name}; ")
    assert len(table.splitlines()) == 5 and not any(row["model"] in table for row in rows)
    assert as_table(hand_made("photographs", *same)).count("\n\n") == 1


def test_the_figure_has_a_panel_for_each_task(report):
    figure = suite.figure(report)
    assert [axis.get_title(loc="left") for axis in figure.axes] == list(report["tasks"])
    assert [[text.get_text() for text in axis.get_yticklabels()] for axis in figure.axes] == [
        *[["text to image R@1", "image to text R@1"]] * 2, ["naive top1", "templates top1"],
        ["all", "warna", "urutan"]]
    chance = [[list(line.get_xdata()) for line in axis.lines if line.get_linestyle() == "--"] for axis in figure.axes]
    assert chance == [[], [], [], [[0.5, 0.5]]]
    points = [line for line in figure.axes[2].lines if len(line.get_xdata()) == 1]
    assert [float(point.get_xdata()[0]) for point in points[:2]] == [1.0, 1.0]
    assert {point.get_color() for point in points} == set(PLOTTED[:3])


def test_by_default_a_task_without_pictures_is_left_out(monkeypatch, capsys):
    empty = Dataset.from_dict({"image": [], "concept": [], "name_id": []}).cast_column("image", Image())
    splits = dict.fromkeys(("photographs", "unseen_artist"), empty)
    monkeypatch.setattr(tasks, "load_picture_dictionary", lambda: splits)
    monkeypatch.setattr(suite, "OFFLINE", ("photographs", "groups", "pairs"))
    assert list(evaluate_models(["tahu"], progress=False)["tasks"]) == ["pairs"]
    assert capsys.readouterr().err.count("has no pictures here, because a package of Debian could not be fetched") == 2
    with pytest.raises(ValueError, match="groups has no pictures here"):
        evaluate_models(["tahu"], ["groups"], progress=False)


@pytest.mark.parametrize("setting, new", [("padding_side", "left"), ("truncation_side", "left"), ("max_length", 5)])
def test_texts_that_are_read_in_a_different_way_are_embedded_again(setting, new):
    model, processor = MODELS["tahu"]
    other = copy.copy(processor)
    setattr(other, setting, new)
    readings = {suite.Embedder("tahu", model, one, progress=False).reading for one in (processor, other)}
    assert len(readings) == 2
