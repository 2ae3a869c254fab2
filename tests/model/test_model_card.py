"""The model card: its front matter is the hub's, its numbers are the run's own, and it says what it does not know."""

import json
import re
import shutil

import pytest
from colour_model import colour_clip
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from test_evaluate import split as small_split
from tiny import tiny_clip

from clipid_utils import save_clip
from clipid_utils.inference.evaluate import evaluate_checkpoint
from clipid_utils.model.pretrained.card import write_model_card
from clipid_utils.paths import CHECKPOINTS

SECTIONS = ["Use", "Intended use", "Training", "Results", "Limits and bias", "Dalam bahasa Indonesia", "Licence"]
MINI = CHECKPOINTS / "mini"


def read(name):
    return json.loads((MINI / f"{name}.json").read_text())


@pytest.fixture
def card_of(tmp_path):
    """The card of a folder with these files beside mini's; None leaves a file out. Options go to write_model_card."""
    def write(options=None, **changes):
        files = {part: read(part) for part in ("config", "metrics", "recipe", "fit")} | changes
        folder = tmp_path / "mini"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for part, value in files.items():
            if value is not None:
                (folder / f"{part}.json").write_text(json.dumps(value))
        return write_model_card(folder, **(options or {})).read_text()

    return write


def numbers_in(value):
    """Every number of a JSON value, as the card may write it: as it is, or with three decimals."""
    if isinstance(value, dict):
        return set().union(*map(numbers_in, value.values())) if value else set()
    if isinstance(value, list):
        return set().union(*map(numbers_in, value)) if value else set()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {str(value), f"{value:.3f}"}
    return set(re.findall(r"\d[\d.]*", value)) if isinstance(value, str) else set()


def body(card):
    return ModelCard(card).text


@pytest.fixture
def folder(tmp_path):
    save_clip(*tiny_clip(), tmp_path / "a-clip")
    return tmp_path / "a-clip"


# --- The shipped checkpoint -------------------------------------------------------------------------------------------


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    shutil.copytree(MINI, tmp_path / "mini", ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    path = write_model_card(tmp_path / "mini", license="apache-2.0")
    assert path == tmp_path / "mini" / "README.md"
    card = ModelCard.load(path)
    assert isinstance(card.data, ModelCardData)
    wanted = {"language": "id", "license": "apache-2.0", "library_name": "clip-indonesian",
              "pipeline_tag": "zero-shot-image-classification"}
    assert {key: card.data[key] for key in wanted} == wanted
    assert {"clip", "indonesian"} <= set(card.data.tags)
    assert set(metadata_load(path)) == {"language", "license", "library_name", "pipeline_tag", "tags"}
    assert str(card) == path.read_text()


def test_every_number_is_the_runs_own(card_of):
    known = set().union(*(numbers_in(read(name)) for name in ("config", "metrics", "recipe", "fit")))
    words = re.sub(r"MRR@10|R@\d+|Top-1|top-1|95%", "", body(card_of()))  # the names of the figures
    words = re.sub(r"`[^`]*`|\|[^|]*_sha256 \|[^|]*\|", "", words)  # checksums
    words = re.sub(r"(\d),(\d)", r"\1.\2", words)  # as Indonesian writes them
    shown = re.findall(r"(?<![\w.])\d+(?:\.\d+)*", words)
    assert len(shown) > 100
    assert set(shown) <= known


def test_the_prose_of_every_recipe_holds_no_number(card_of):
    for recipe in ("mini", "another"):
        text = body(card_of(metrics=None, recipe={"recipe": recipe}, fit=None))
        assert not re.search(r"\d", text.replace(text.split("## Use")[0], ""))


def test_a_changed_figure_changes_the_card(card_of):
    metrics = read("metrics")
    metrics["retrieval"]["photographs"]["text_to_image"]["R@1"] = {"value": 0.123456, "low": 0.1, "high": 0.9}
    assert card_of(metrics=metrics).count("0.123 [0.100, 0.900]") == 2  # the table, and the limits
    assert card_of(metrics=metrics).count("0,123 [0,100; 0,900]") == 1  # in Indonesian
    assert "0.123" not in card_of()


def test_it_says_what_the_model_is_not_for(card_of):
    card = card_of({"license": "apache-2.0"})
    text = " ".join(body(card).split())
    assert [line[3:] for line in card.splitlines() if line.startswith("## ")] == SECTIONS
    metrics = read("metrics")
    for split in ("photographs", "unseen_artist", "unseen_concept"):
        assert f"{metrics['retrieval'][split]['text_to_image']['R@1']['value']:.3f}" in text.split("## Limits")[1]
    for word in ("skin-tone", "*pria*", "*wanita*", "olloquial", "machine translated", "surveillance", "CC BY-SA"):
        assert word in text
    assert "The weights: apache-2.0." in text


# --- Other checkpoints ------------------------------------------------------------------------------------------------


def test_without_metrics_the_card_says_that_nothing_was_measured(folder):
    card = ModelCard.load(write_model_card(folder))
    assert card.data.license is None and "None is stated" in card.text
    assert "Nothing was measured" in card.text and "**Not measured.**" in card.text
    assert "not recorded" in card.text and "emoji" not in card.text
    assert "# a-clip\n" in card.text and 'load_clip("a-clip")' in card.text


def test_what_the_caller_knows_goes_in(folder):
    path = write_model_card(folder, name="satu", base_model=["a/vision", "b/text"], training_data="Gambar pasar.")
    card = ModelCard.load(path)
    assert card.data.base_model == ["a/vision", "b/text"]
    assert "Gambar pasar." in card.text
    assert "started from a/vision and b/text, so the model has their biases" in card.text
    assert "not recorded" not in card.text and "# satu\n" in card.text


def test_a_checkpoint_of_transformers_is_said_to_be_one(card_of):
    card = ModelCard(card_of(config={"model_type": "vision-text-dual-encoder", "vision_config": {}}, metrics=None))
    assert card.data.library_name == "transformers" and "sizes are in `config.json`" in card.text


def test_a_split_without_pictures_is_not_measured(card_of):
    metrics = read("metrics")
    metrics["data"]["photographs"] = {"pictures": 0}
    del metrics["retrieval"]["photographs"], metrics["zero_shot"]["photographs"]
    text = card_of(metrics=metrics)
    assert "| photographs | none: not measured |" in text
    assert "**Photographs** were not measured" in text and "| validation | 394 | 429 |" in text


def test_an_evaluation_becomes_a_card(card_of):
    """The keys are those that evaluate.py writes today, not those that it wrote when mini was made."""
    dictionary = {"validation": small_split(["merah", "hijau", "biru"], "twemoji")}
    metrics = evaluate_checkpoint(colour_clip(), dictionary, splits=["validation"], progress=False)
    text = card_of(metrics=metrics)
    assert "| validation | 3 | 3 | 1.000 [1.000, 1.000] |" in text and metrics["checkpoint"]["fingerprint"] in text


# --- What is wrong ----------------------------------------------------------------------------------------------------


def test_a_card_that_is_there_is_kept(folder):
    (folder / "README.md").write_text("written by hand")
    with pytest.raises(FileExistsError, match="README.md exists.*overwrite=True"):
        write_model_card(folder)
    assert (folder / "README.md").read_text() == "written by hand"
    assert "# a-clip" in write_model_card(folder, overwrite=True).read_text()


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json not found: give write_model_card a checkpoint"):
        write_model_card(tmp_path)


@pytest.mark.parametrize("content", ["{ half a", "[1, 2]", ""])
def test_metrics_that_cannot_be_read_are_named(folder, content):
    (folder / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json"):
        write_model_card(folder)
    assert not (folder / "README.md").exists()


def test_metrics_of_another_kind(card_of):
    with pytest.raises(ValueError, match=r"metrics\.json has no checkpoint, data, retrieval.*clipid evaluate` writes"):
        card_of(metrics={"seed": 1, "versions": {}, "accuracy": 0.9})
