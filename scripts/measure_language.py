"""Measure the language filter on short captions: Indonesian, English and Malay, at several thresholds.

    python scripts/measure_language.py id_gsd-ud-dev.conllu id_gsd-ud-test.conllu

The files are from UD_Indonesian-GSD: their sentences, and the English translations beside them, are cut to their first
4, 8 or 12 words. If Tux Paint's package is in data/cache, its captions in three languages are measured too. For each
language it prints the share of captions that pass filters.language("id"), and the share nearer to Malay.
"""

import argparse
from pathlib import Path

from clipid_utils.data.cleaning.filters import language_identifier
from clipid_utils.paths import CACHE

THRESHOLDS = (0.1, 0.3, 0.5)


def read_texts(paths: list[Path], key: str, words: int) -> list[str]:
    """The first `words` words of each text after "# key = " that has as many."""
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [line.split(" = ", 1)[1].split() for line in lines if line.startswith(f"# {key} = ")]
    return [" ".join(text[:words]) for text in texts if len(text) >= words]


def read_stamps(key: str) -> list[str]:
    """Tux Paint's captions in one language, of at least four words."""
    captions = set()
    for path in CACHE.glob("packages/tuxpaint-stamps-default@*/**/*.txt"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        captions |= {lines[0]} if key == "en" and lines else {
            line.split("=", 1)[1] for line in lines if line.startswith(f"{key}.utf8=")}
    return sorted(caption for caption in captions if len(caption.split()) >= 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("files", type=Path, nargs="+")
    files = parser.parse_args().files
    sets = {(f"{words} words", name): read_texts(files, key, words)
            for words in (4, 8, 12) for name, key in (("id", "text"), ("en", "text_en"))}
    sets |= {("8 words, small letters", name): [text.lower() for text in sets["8 words", name]]
             for name in ("id", "en")}
    sets |= {("Tux Paint, 4 words and more", name): read_stamps(name) for name in ("id", "ms", "en")}
    identifier = language_identifier()
    print(f"{'captions':29} in  count", *(f" pass at {least}" for least in THRESHOLDS), "   nearer ms")
    for (kind, name), texts in sets.items():
        ranks = [dict(identifier.rank(text)) for text in texts]
        if ranks:
            passed = [sum(rank["id"] + rank["ms"] >= least for rank in ranks) / len(ranks) for least in THRESHOLDS]
            malay = sum(rank["ms"] > rank["id"] for rank in ranks) / len(ranks)
            print(f"{kind:29} {name} {len(ranks):6}", *(f"{share:12.3f}" for share in [*passed, malay]), flush=True)


if __name__ == "__main__":
    main()
