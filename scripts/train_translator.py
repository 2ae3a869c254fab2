"""Trains the small English to Indonesian model of data/translator, converts it, and measures it.

    .venv-bench/bin/python scripts/train_translator.py            # with torch; about half an hour on one core
    .venv-bench/bin/python scripts/train_translator.py --reverse  # the other direction, for the round trip check
    .venv-bench/bin/python scripts/train_translator.py --without 0  # without one half of the names; 1 for the other

It is a Marian model of Hugging Face's form, so it is converted and run by the same code as opus-mt. It learns from the
human pairs of translator_corpus.py and from sentences made of them. The float weights go to build/translator; the
int8 weights, the card's figures (metrics.json) and the pieces to data/translator.
"""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from sacrebleu.metrics import BLEU, CHRF
from tqdm.auto import tqdm
from transformers import MarianConfig, MarianMTModel, MarianTokenizer
from translator_corpus import Corpus, Maker, Pair, read_corpus, word_by_word

from clipid_utils.data.dictionary.build import load_picture_dictionary
from clipid_utils.data.translation.marian import convert
from clipid_utils.data.translation.translate import Translator
from clipid_utils.inference.evaluate import rounded
from clipid_utils.metrics import bootstrap_interval
from clipid_utils.paths import DATA

BUILD, HALVES = Path("build/translator"), Path("build/halves")
# How often each way of the Maker is chosen
SHARES = {"name": 0.15, "caption": 0.2, "keyword": 0.05, "template": 0.2, "swap": 0.28, "copied": 0.12}


def write_pieces(folder: Path, texts: list[str], size: int) -> dict[str, int]:
    """Writes one SentencePiece model for both languages, so that a name has the same pieces in both.

    Returns the vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "source"), vocab_size=size, hard_vocab_limit=False,
        character_coverage=1.0, split_digits=True, minloglevel=2,
    )
    (folder / "source.model").replace(folder / "source.spm")
    (folder / "source.vocab").unlink()
    shutil.copyfile(folder / "source.spm", folder / "target.spm")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.spm"))
    pieces = [model.id_to_piece(number) for number in range(3, model.vocab_size())]
    vocabulary = {piece: number for number, piece in enumerate(["</s>", "<unk>", *pieces, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    return vocabulary


class Batches:
    """An endless stream of batches (source, labels) [B, L] of sentences with similar lengths."""

    def __init__(self, corpus: Corpus, folder: Path, vocabulary: dict[str, int], start: int, options):
        self.rng = np.random.default_rng([options.seed, start])
        self.maker, self.tokens = Maker(corpus, self.rng), options.tokens
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.spm"))
        self.vocabulary, self.reverse = vocabulary, options.reverse
        self.ways, self.odds = list(SHARES), np.array(list(SHARES.values())) / sum(SHARES.values())

    def encode(self, text: str) -> list[int]:
        return [self.vocabulary.get(piece, 1) for piece in self.pieces.encode(text, out_type=str)] + [0]

    def pair(self) -> Pair:
        pair = self.maker.cased(getattr(self.maker, self.ways[self.rng.choice(len(self.ways), p=self.odds)])())
        return pair[::-1] if self.reverse else pair

    def __iter__(self):
        while True:
            pairs = [tuple(map(self.encode, self.pair())) for _ in range(1500)]
            pairs.sort(key=lambda pair: max(map(len, pair)))
            batches = [[]]
            for pair in pairs:
                if (len(batches[-1]) + 1) * max(map(len, pair)) > self.tokens:
                    batches.append([])
                batches[-1].append(pair)
            for index in self.rng.permutation(len(batches)):
                yield tuple(self.padded(side) for side in zip(*batches[index], strict=True))

    def padded(self, rows) -> torch.Tensor:
        array = np.full((len(rows), max(map(len, rows))), self.vocabulary["<pad>"])
        for row, ids in zip(array, rows, strict=True):
            row[: len(ids)] = ids
        return torch.from_numpy(array)


def new_model(vocabulary: dict[str, int], options) -> MarianMTModel:
    torch.manual_seed(options.seed)
    pad = vocabulary["<pad>"]
    width = options.width
    model = MarianMTModel(MarianConfig(
        vocab_size=len(vocabulary), d_model=width, encoder_layers=options.layers, decoder_layers=options.layers,
        encoder_attention_heads=options.heads, decoder_attention_heads=options.heads, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, max_position_embeddings=256, activation_function="swish", scale_embedding=True,
        dropout=options.dropout, attention_dropout=0.0, activation_dropout=0.0, init_std=0.02, pad_token_id=pad,
        eos_token_id=0, forced_eos_token_id=0, decoder_start_token_id=pad,
    ))
    model.generation_config.update(num_beams=4, max_length=256)  # transformers 5 accepts them only here
    return model


class Optimizers(list):
    """Muon for the matrices of the blocks and AdamW for the rest, each with its own peak rate."""

    def __init__(self, model: MarianMTModel, options):
        matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and ".layers." in name]
        others = [value for name, value in model.named_parameters() if value.ndim != 2 or ".layers." not in name]
        super().__init__((
            torch.optim.Muon(matrices, lr=options.muon_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01),
        ))
        self.peaks = options.muon_rate, options.rate

    def step(self, fraction: float) -> None:
        for optimizer, peak in zip(self, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * fraction
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def train(corpus: Corpus, folder: Path, steps: int, options) -> Path:
    """Trains a model for `steps` steps and writes its averaged weights as a folder of Hugging Face's form."""
    pairs = [*corpus.names["train"], *corpus.captions["train"], *corpus.keywords]
    texts = [text for pair in pairs for side in pair for text in ([side] if isinstance(side, str) else side)]
    vocabulary = write_pieces(folder, texts, options.vocabulary)
    model = new_model(vocabulary, options)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizers = Optimizers(model, options)
    kept, start = folder / f"state-{steps}.pt", 0
    if kept.is_file():  # an interrupted run resumes, with different sentences
        state = torch.load(kept)
        start = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        average = state["average"]
    pad, batches = vocabulary["<pad>"], iter(Batches(corpus, folder, vocabulary, start, options))
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=folder.name, mininterval=10)
    for step in bar:
        if step > start and step % 200 == 0:
            torch.save({"step": step, "model": model.state_dict(), "average": average,
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers]},
                       kept.with_suffix(".partial"))
            os.replace(kept.with_suffix(".partial"), kept)
        fraction = min((step + 1) / options.warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        source, labels = next(batches)
        shifted = torch.cat([torch.full((len(labels), 1), pad), labels[:, :-1]], dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=source, attention_mask=source != pad, decoder_input_ids=shifted).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=pad,
                                                 label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(fraction)
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in model.named_parameters():
                average[name].lerp_(value, 1 - decay)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.load_state_dict(average, strict=False)
    model.save_pretrained(folder)
    files = (str(folder / name) for name in ("source.spm", "target.spm", "vocab.json"))
    MarianTokenizer(*files).save_pretrained(folder)
    kept.unlink(missing_ok=True)
    return folder


def scores(found: list[str], expected: list[str]) -> dict:
    """chrF and BLEU of the corpus with their signatures, and chrF's 95% interval (bootstrap over the sentences)."""
    chrf, bleu = CHRF(), BLEU()
    low, high = bootstrap_interval(
        np.arange(len(found)), samples=300,
        statistic=lambda rows: chrf.corpus_score([found[i] for i in rows], [[expected[i] for i in rows]]).score)
    return {"chrF": {"value": chrf.corpus_score(found, [expected]).score, "low": low, "high": high},
            "BLEU": bleu.corpus_score(found, [expected]).score, "sentences": len(found),
            "exact": float(np.mean([f.lower() == e.lower() for f, e in zip(found, expected, strict=True)])),
            "signatures": [str(chrf.get_signature()), str(bleu.get_signature())]}


def translated(translate, pairs: list[Pair]) -> list[str]:
    return [translation.text for translation in translate([source for source, _ in pairs])]


def measured(folder: Path, sets: dict[str, list[Pair]]) -> dict:
    """The scores on each set after conversion to int8 and with beam 4, as the model is used."""
    convert(folder, folder / "int8", "int8")
    translate = Translator(folder / "int8")
    return {name: scores(translated(translate, pairs), [target for _, target in pairs]) for name, pairs in sets.items()}


def examples(translate, baseline, pairs: list[Pair]) -> dict:
    """Five translations each of the best, middling and worst chrF, among the sentences of at least four words."""
    pairs = [pair for pair in pairs if pair[0].count(" ") > 2]
    found, chrf = translated(translate, pairs), CHRF()
    rows = [{"source": source, "expected": target, "found": text, "word_by_word": baseline(source),
             "chrF": round(chrf.sentence_score(text, [target]).score, 1)}
            for (source, target), text in zip(pairs, found, strict=True)]
    rows.sort(key=lambda row: -row["chrF"])
    middle = len(rows) // 2
    return {"good": rows[:5], "middling": rows[middle - 2 : middle + 3], "bad": rows[-5:]}


def report(folder: Path, corpus: Corpus, sets: dict[str, list[Pair]], options) -> dict:
    """The figures on the test pairs, those of the baseline, and examples."""
    model, found = measured(folder, sets), {}
    if options.reverse:
        corpus = reversed_corpus(corpus)
    baseline = word_by_word(corpus)
    for name, pairs in sets.items():
        plain = scores([baseline(source) for source, _ in pairs], [target for _, target in pairs])
        found[name] = {"model": model[name], "word_by_word": plain}
    translate = Translator(folder / "int8")
    return {"test": found, "examples": {name: examples(translate, baseline, pairs) for name, pairs in sets.items()}}


def parameters(folder: Path) -> int:
    return MarianMTModel.from_pretrained(folder).num_parameters()


def reversed_corpus(corpus: Corpus) -> Corpus:
    def turned(pairs):
        return [pair[::-1] for pair in pairs]

    return Corpus({split: turned(pairs) for split, pairs in corpus.names.items()},
                  {split: turned(pairs) for split, pairs in corpus.captions.items()}, {}, turned(corpus.keywords))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="data/translator, data/translator-back for --reverse, or build/halves "
                        "for --without")
    parser.add_argument("--reverse", action="store_true", help="Indonesian to English")
    parser.add_argument("--without", type=int, choices=(0, 1), help="half of the dictionary's names to hold out more, "
                        "for scripts/added_pictures.py")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch, on either side")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--rate", type=float, default=2e-3, help="of AdamW, for embeddings, norms and biases")
    parser.add_argument("--muon-rate", type=float, default=6e-3, help="of Muon, for the matrices of the blocks")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours = DATA / ("translator-back" if options.reverse else "translator")
    out = options.out or (ours if options.without is None else HALVES / f"half-{options.without}")
    corpus = read_corpus(load_picture_dictionary(), options.without)
    turned = reversed_corpus(corpus) if options.reverse else corpus
    choosing, testing = ({"captions": turned.captions[split], "names": turned.names[split]}
                         for split in ("validation", "test"))
    started, cpu = time.time(), time.process_time()
    folder = train(corpus, BUILD / out.name, options.steps, options)
    seconds = {"wall": round(time.time() - started), "cpu": round(time.process_time() - cpu)}
    found = report(folder, corpus, testing, options)
    for split, names in found["test"].items():
        print(split, {name: (round(row["chrF"]["value"], 1), round(row["BLEU"], 1)) for name, row in names.items()})
    figures = {
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "threads")},
        "seconds": seconds, "parameters": parameters(folder),
        "versions": {library.__name__: library.__version__ for library in (torch, sentencepiece)},
        "pairs": {"names": {split: len(pairs) for split, pairs in corpus.names.items()},
                  "captions": {split: len(pairs) for split, pairs in corpus.captions.items()}},
        "validation": {name: row for name, row in measured(folder, choosing).items()}, **found,
    }
    shutil.copytree(folder / "int8", out, dirs_exist_ok=True)
    text = json.dumps(rounded(figures, 4), indent=1, ensure_ascii=False) + "\n"
    (out / "metrics.json").write_text(text, encoding="utf-8")
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
