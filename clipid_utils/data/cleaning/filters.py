"""Filters of captions and pictures: plain functions that return the reason to leave something out, or None.

    rows = filter_captions(rows, report, length(), proper_nouns(load_tagger()), near_captions())
    rows = filter_pictures(rows, another_report, size(), flat(), near_pictures())

Rows are captions records and are streamed. Filters that remember (`repeated_…`, `near_…`) remember hashes, never
pictures. Name them last, so that they remember only what has passed the others.
"""

import functools
import hashlib
import itertools
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clipid_utils.data.cleaning.near_copies import THUMBNAIL, NearIndex, Signatures, signatures
from clipid_utils.data.cleaning.proper_nouns import Tagger, split_words
from clipid_utils.data.report import Report
from clipid_utils.files import need
from clipid_utils.pictures import PictureError, open_picture

# The languages from which a caption's language is chosen. Among all 97 of the library, a rare language is often chosen
# for a short caption.
LANGUAGES = ("id", "ms", "en", "nl", "de", "fr", "es", "it", "pt")
HASHES = 64  # of a caption's MinHash
SHOWN = 100  # characters of a caption in a report's example


@dataclass(frozen=True)
class Picture:
    """The picture of a row, RGB and upright, opened once for all its checks."""

    image: Image.Image

    @functools.cached_property
    def signature(self) -> Signatures:
        """The signatures that find near copies."""
        return signatures([self.image])


CaptionCheck = Callable[[str], str | None]
PictureCheck = Callable[[Picture], str | None]


def filter_captions(rows: Iterable[dict], report: Report, *checks: CaptionCheck) -> Iterator[dict]:
    """The rows with the captions that pass every check; a row without any such caption is left out.

    The report counts captions: each is kept, or dropped for the first reason found.
    """
    for row in rows:
        kept = [text for text in row["captions"] if report.count(_first_reason(checks, text), text[:SHOWN])]
        if kept:
            yield {**row, "captions": kept}


def filter_pictures(rows: Iterable[dict], report: Report, *checks: PictureCheck) -> Iterator[dict]:
    """The rows whose picture opens and passes every check. The report counts rows.

    The picture is in `image_path`, or in `image` in any form that `pictures.open_picture` takes.
    """
    for row in rows:
        try:
            picture = row_picture(row)
        except (PictureError, OSError) as error:
            report.drop("a broken picture", f"{_name(row)}: {error}")
        else:
            if report.count(_first_reason(checks, picture), _name(row)):
                yield row


def row_picture(row: dict) -> Picture:
    """The picture of a row. Raises PictureError if it cannot be read, FileNotFoundError if there is none."""
    return Picture(open_picture(row["image"] if row.get("image") is not None else row["image_path"]))


def _first_reason(checks: Iterable[Callable], subject) -> str | None:
    return next((reason for check in checks if (reason := check(subject))), None)


def _name(row: dict) -> str:
    """The name of a row in a report: its file, else its first caption."""
    return str(row.get("image_path") or next(iter(row.get("captions") or ()), "a picture"))[:SHOWN]


# Captions.


def length(words: tuple[int, int] = (2, 50), characters: tuple[int, int] = (5, 300)) -> CaptionCheck:
    """Drops captions with fewer or more words, or characters, than the two numbers allow (both included)."""

    def check(caption: str) -> str | None:
        counts = ("words", words, len(split_words(caption))), ("characters", characters, len(caption.strip()))
        for unit, (least, most), count in counts:
            if not least <= count <= most:
                return f"fewer than {least} {unit}" if count < least else f"more than {most} {unit}"
        return None

    return check


def proper_nouns(tagger: Tagger, limit: float = 0.8) -> CaptionCheck:
    """Drops captions if at least `limit` of their words are proper nouns (clip-italian, arXiv 2108.08688).

    The shipped tagger is cautious: it finds a quarter of such captions and drops nearly no names of things
    (data/propn.json, "decision" and "things dropped").
    """
    reason = f"at least {limit:.0%} proper nouns"
    return lambda caption: reason if tagger.share(caption) >= limit else None


def language(wanted: str = "id", least: float = 0.3) -> CaptionCheck:
    """Drops captions that are in `wanted` with a probability below `least`, by py3langid among LANGUAGES.

    Malay counts as Indonesian: short captions are often the same in both. Of captions of 8 words the default drops
    0.7% of the Indonesian and keeps 2% of the English ones; of 4 words 2.7% and 6.7% (scripts/measure_language.py on
    UD_Indonesian-GSD). One or two words say little about the language. A caption without a letter is kept.
    """
    identifier = language_identifier()
    counted = {"id", "ms"} if wanted == "id" else {wanted}

    def check(caption: str) -> str | None:
        if not any(map(str.isalpha, caption)):
            return None
        ranked = identifier.rank(caption)
        share = sum(probability for name, probability in ranked if name in counted)
        return None if share >= least else f"not in {wanted}, probably in {ranked[0][0]}"

    return check


def language_identifier():
    """py3langid's identifier of languages, among LANGUAGES."""
    langid = need("py3langid.langid", "data")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier


def repeated_captions() -> CaptionCheck:
    """Drops captions that are the same as an earlier one, except for case, Unicode forms, punctuation and spaces."""
    return _repeated(caption_hash, "a repeated caption")


def common_captions(rows: Iterable[dict], most: int = 10) -> CaptionCheck:
    """Drops captions of more than `most` rows, such as the title of a series. Reads all rows first."""
    counts = Counter(key for row in rows for key in {caption_hash(caption) for caption in row["captions"]})
    common = {key for key, count in counts.items() if count > most}
    return lambda caption: f"a caption of more than {most} pictures" if caption_hash(caption) in common else None


def near_captions(threshold: float = 0.8) -> CaptionCheck:
    """Drops a caption whose runs of four letters agree with an earlier one's by a Jaccard index of `threshold`.

    This is an estimate by MinHash with locality-sensitive hashing (Broder 1997): near the threshold some pairs are
    missed and some are dropped. Short captions that differ in one word are kept.
    """
    rensa = need("rensa", "data")
    seen = rensa.RMinHashDeduplicator(threshold=threshold, num_perm=HASHES, use_lsh=True, seed=0)
    numbers = itertools.count()

    def check(caption: str) -> str | None:
        text = f" {normalise(caption) or caption.strip()} "
        sketch = rensa.RMinHash(num_perm=HASHES, seed=0)
        sketch.update(sorted({text[i : i + 4] for i in range(max(1, len(text) - 3))}))
        return None if seen.add(str(next(numbers)), sketch) else "nearly a repeated caption"

    return check


def normalise(caption: str) -> str:
    """A caption for comparison: its words in NFKC and lower case, with one space between, without punctuation."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", caption).casefold()))


def caption_hash(caption: str) -> int:
    """64 bits of a hash of the normalised caption, or of the caption itself if it has no words."""
    text = normalise(caption) or caption.strip()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


# Pictures.


def size(shortest: int = 32, ratio: float = 8.0) -> PictureCheck:
    """Drops pictures with a side below `shortest` pixels, or with one side more than `ratio` times the other."""

    def check(picture: Picture) -> str | None:
        least, most = sorted(picture.image.size)
        if least < shortest:
            return f"a side of fewer than {shortest} pixels"
        return f"a side more than {ratio:g} times the other" if most > ratio * least else None

    return check


def flat(deviation: float = 4.0) -> PictureCheck:
    """Drops pictures of nearly one colour: each channel of the thumbnail has a standard deviation below `deviation`."""

    def check(picture: Picture) -> str | None:
        thumbnail = picture.signature.thumbnails[0].reshape(-1, 3)
        return "nearly one colour" if thumbnail.std(0).max() < deviation else None

    return check


def repeated_pictures() -> PictureCheck:
    """Drops pictures that have the same pixels as an earlier one."""
    def pixels(picture: Picture) -> bytes:
        return hashlib.blake2b(f"{picture.image.size}".encode() + picture.image.tobytes(), digest_size=16).digest()

    return _repeated(pixels, "a repeated picture")


def near_pictures() -> PictureCheck:
    """Drops near copies (`near_copies`) of earlier pictures. Remembers 8 bytes a picture, and 3 KB on the disk."""
    number = _numbering()
    return lambda picture: None if number(picture)[1] else "nearly a repeated picture"


def placeholders(rows: Iterable[dict], most: int = 5) -> PictureCheck:
    """Drops pictures that have more than `most` different captions, such as "image not available", and near copies.

    Reads all rows first, and opens their pictures once more than the filter does.
    """
    number, first = _numbering(), []
    others: dict[int, set[int]] = {}  # only for pictures with a second caption: a set for each would be large
    for row in rows:
        try:
            picture = row_picture(row)
        except (PictureError, OSError):  # filter_pictures reports it
            continue
        caption, (group, is_new) = caption_hash(row["captions"][0]), number(picture)
        if is_new:
            first.append(caption)
        elif caption != first[group] and len(found := others.setdefault(group, set())) < most:
            found.add(caption)
    common = {group for group, found in others.items() if len(found) >= most}
    return lambda picture: f"a picture of more than {most} captions" if number(picture)[0] in common else None


def _numbering() -> Callable[[Picture], tuple[int, bool]]:
    """A function that numbers pictures from 0, and says whether one is new: a near copy has the number of the first.

    The thumbnails are in a temporary file.
    """
    stored = tempfile.TemporaryFile(buffering=0)
    index = NearIndex(lambda numbers: np.memmap(stored, np.uint8, "r").reshape(-1, *THUMBNAIL)[numbers])

    def number(picture: Picture) -> tuple[int, bool]:
        for _, found in index.find(picture.signature):
            return int(found[0]), False
        stored.write(picture.signature.thumbnails.tobytes())
        index.add(picture.signature.hashes)
        return index.hashes.ntotal - 1, True

    return number


def _repeated(key: Callable, reason: str) -> Callable:
    seen = set()

    def check(subject) -> str | None:
        found = key(subject)
        if found in seen:
            return reason
        seen.add(found)
        return None

    return check
