"""Filters of captions and pictures, each a plain function that says why something is to be left out, or None.

    rows = filter_captions(rows, report, length(), proper_nouns(load_tagger()), near_captions())
    rows = filter_pictures(rows, another_report, size(), flat(), near_pictures())

Rows are captions records and are streamed. What remembers (`repeated_…`, `near_…`) remembers hashes, never pictures,
and belongs last, so that it remembers only what has passed the others.
"""

import functools
import hashlib
import io
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import faiss
import numpy as np
from PIL import Image
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from rensa import RMinHash, RMinHashDeduplicator

from clipid_utils.data.cleaning.near_copies import MAX_BITS, MAX_DIFFERENCE, Signatures, near_copies, signatures
from clipid_utils.data.cleaning.proper_nouns import Tagger, split_words
from clipid_utils.data.report import Report
from clipid_utils.files import to_rgb

# Among these a caption is recognised: with all 97 of the library's a short one is taken for the oddest of them.
LANGUAGES = ("id", "ms", "en", "nl", "de", "fr", "es", "it", "pt")
SHOWN = 100  # characters of a caption that a report's example quotes


@dataclass(frozen=True)
class Picture:
    """A row's picture, opened once for all its checks: RGB, upright; the SHA-256 is its file's, or else its pixels'."""

    image: Image.Image
    sha256: bytes

    @functools.cached_property
    def signature(self) -> Signatures:
        """What near copies are found by."""
        return signatures([self.image])


CaptionCheck = Callable[[str], str | None]
PictureCheck = Callable[[Picture], str | None]


def filter_captions(rows: Iterable[dict], report: Report, *checks: CaptionCheck) -> Iterator[dict]:
    """The rows with those of their `captions` that pass every check; a row without one left is not yielded.

    The report counts captions: each is kept, or dropped for the first reason found.
    """
    for row in rows:
        kept = []
        for caption in row["captions"]:
            if reason := _first_reason(checks, caption):
                report.drop(reason, caption[:SHOWN])
            else:
                report.keep()
                kept.append(caption)
        if kept:
            yield {**row, "captions": kept}


def filter_pictures(rows: Iterable[dict], report: Report, *checks: PictureCheck) -> Iterator[dict]:
    """The rows whose picture opens and passes every check; the report counts rows.

    The picture is `image_path`, or `image`: Pillow's, the bytes of a file, or {"bytes", "path"}.
    """
    for row in rows:
        try:
            picture = open_picture(row)
        except Exception as error:  # a broken file can raise anything
            report.drop("a broken picture", f"{_name(row)}: {error}")
            continue
        if reason := _first_reason(checks, picture):
            report.drop(reason, _name(row))
        else:
            report.keep()
            yield row


def open_picture(row: dict) -> Picture:
    """Opens a row's picture, whole; raises what Pillow raises for a broken one."""
    content = row["image"] if row.get("image") is not None else row["image_path"]
    if isinstance(content, dict):
        content = content["bytes"] if content.get("bytes") is not None else content["path"]
    if isinstance(content, Image.Image):
        image = to_rgb(content)
        return Picture(image, hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest())
    if not isinstance(content, bytes):
        with open(content, "rb") as file:
            content = file.read()
    with Image.open(io.BytesIO(content)) as image:
        return Picture(to_rgb(image), hashlib.sha256(content).digest())


def _first_reason(checks: Iterable[Callable], subject) -> str | None:
    return next((reason for check in checks if (reason := check(subject))), None)


def _name(row: dict) -> str:
    """How a report names a row: by its file, else by its first caption."""
    return str(row.get("image_path") or next(iter(row.get("captions") or ()), "a picture"))[:SHOWN]


# Captions.


def length(words: tuple[int, int] = (2, 50), characters: tuple[int, int] = (5, 300)) -> CaptionCheck:
    """Drops captions with fewer or more words, or characters, than the two numbers allow, both included."""

    def check(caption: str) -> str | None:
        for unit, (least, most), count in (("words", words, len(split_words(caption))),
                                           ("characters", characters, len(caption.strip()))):
            if not least <= count <= most:
                return f"fewer than {least} {unit}" if count < least else f"more than {most} {unit}"
        return None

    return check


def proper_nouns(tagger: Tagger, limit: float = 0.8) -> CaptionCheck:
    """Drops captions of which at least `limit` of the words are proper nouns (clip-italian, arXiv 2108.08688).

    The shipped tagger is a cautious one: it finds a quarter of such captions and drops nearly no names of things
    (data/propn.json, "decision" and "things dropped").
    """
    reason = f"at least {limit:.0%} proper nouns"
    return lambda caption: reason if tagger.share(caption) >= limit else None


def language(wanted: str = "id", least: float = 0.3, among: tuple[str, ...] = LANGUAGES) -> CaptionCheck:
    """Drops captions that are `wanted` with a probability below `least`, by py3langid among the languages `among`.

    Malay counts as Indonesian: short captions in the two are often the same. Of captions of 8 words the default drops
    0.7% of the Indonesian and keeps 2% of the English ones, of 4 words 2.7% and 6.7% (scripts/measure_language.py on
    UD_Indonesian-GSD). One or two words tell little; a caption without a letter is kept.
    """
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(among)
    counted = {"id", "ms"} if wanted == "id" else {wanted}

    def check(caption: str) -> str | None:
        if not any(map(str.isalpha, caption)):
            return None
        ranked = identifier.rank(caption)
        share = sum(probability for name, probability in ranked if name in counted)
        return None if share >= least else f"not in {wanted}, probably in {ranked[0][0]}"

    return check


def repeated_captions() -> CaptionCheck:
    """Drops every caption after the first that is the same but for case, accents' form, punctuation and spaces."""
    return _repeated(caption_hash, "a repeated caption")


def common_captions(rows: Iterable[dict], most: int = 10) -> CaptionCheck:
    """Drops the captions that stand in more than `most` of the rows, such as a series' title; reads all rows first."""
    counts: dict[int, int] = {}
    for row in rows:
        for key in {caption_hash(caption) for caption in row["captions"]}:
            counts[key] = counts.get(key, 0) + 1
    common = {key for key, count in counts.items() if count > most}
    return lambda caption: f"a caption of more than {most} pictures" if caption_hash(caption) in common else None


def near_captions(threshold: float = 0.8, hashes: int = 64, letters: int = 4) -> CaptionCheck:
    """Drops a caption whose runs of `letters` letters agree with an earlier one's by a Jaccard index of `threshold`.

    MinHash with locality-sensitive hashing (Broder 1997), so that it is an estimate: near the threshold some pairs are
    missed and some taken. Short captions that differ in one word are far apart, as they should be.
    """
    seen, number = RMinHashDeduplicator(threshold=threshold, num_perm=hashes, use_lsh=True, seed=0), 0

    def check(caption: str) -> str | None:
        nonlocal number
        text = f" {normalise(caption) or caption.strip()} "
        sketch = RMinHash(num_perm=hashes, seed=0)
        sketch.update(sorted({text[i : i + letters] for i in range(max(1, len(text) - letters + 1))}))
        number += 1
        return None if seen.add(str(number), sketch) else "nearly a repeated caption"

    return check


def normalise(caption: str) -> str:
    """A caption without what does not count: in NFKC and small letters, its words alone, with one space between."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", caption).casefold()))


def caption_hash(caption: str) -> int:
    """64 bits of the hash of a normalised caption; of one without words, of the caption itself."""
    text = normalise(caption) or caption.strip()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


# Pictures.


def size(shortest: int = 32, ratio: float = 8.0) -> PictureCheck:
    """Drops pictures with a side below `shortest` pixels, or one side more than `ratio` times the other (banners)."""

    def check(picture: Picture) -> str | None:
        least, most = sorted(picture.image.size)
        if least < shortest:
            return f"a side of fewer than {shortest} pixels"
        return f"a side more than {ratio:g} times the other" if most > ratio * least else None

    return check


def flat(deviation: float = 4.0) -> PictureCheck:
    """Drops pictures of nearly one colour: the 32 x 32 thumbnail's largest standard deviation, of 255, is below."""

    def check(picture: Picture) -> str | None:
        thumbnail = picture.signature.thumbnails[0].reshape(-1, 3)
        return "nearly one colour" if thumbnail.std(0).max() < deviation else None

    return check


def repeated_pictures() -> PictureCheck:
    """Drops every picture after the first with the same SHA-256."""
    return _repeated(lambda picture: picture.sha256[:16], "a repeated picture")


def near_pictures(max_bits: int = MAX_BITS, max_difference: float = MAX_DIFFERENCE) -> PictureCheck:
    """Drops near copies, as `near_copies` has them, of a picture that came before; remembers what NearIndex does."""
    index = NearIndex(max_bits, max_difference)

    def check(picture: Picture) -> str | None:
        if index.find(picture.signature) is not None:
            return "nearly a repeated picture"
        index.add(picture.signature)
        return None

    return check


def placeholders(rows: Iterable[dict], most: int = 5) -> PictureCheck:
    """Drops a picture that stands under more than `most` different captions, as "image not available" does, and its
    near copies; reads all rows first, and opens their pictures once more than the filter does."""
    index, first = NearIndex(), []
    others: dict[int, set[int]] = {}  # of the few that stand under a second caption; a set for each would be large
    for row in rows:
        try:
            signature = open_picture(row).signature
        except Exception:  # broken: filter_pictures reports it
            continue
        caption, group = caption_hash(row["captions"][0]), index.find(signature)
        if group is None:
            index.add(signature)
            first.append(caption)
        elif caption != first[group] and len(found := others.setdefault(group, set())) < most:
            found.add(caption)
    common = {group for group, found in others.items() if len(found) >= most}
    return lambda picture: (f"a picture of more than {most} captions"
                            if index.find(picture.signature) in common else None)


class NearIndex:
    """Signatures by number, found again by near copies of them without comparing all with all.

    FAISS looks a perceptual hash up in four tables of 16 bits each: hashes that differ in at most 11 of 64 bits differ
    in at most 2 of some 16, so that none is missed and few others are looked at. In memory are the hashes and numbers;
    the thumbnails, 3 kB each, are in a temporary file.
    """

    RECORD = np.dtype([("hash", "<u8"), ("thumbnail", "u1", (32, 32, 3))])

    def __init__(self, max_bits: int = MAX_BITS, max_difference: float = MAX_DIFFERENCE):
        self.limits = max_bits, max_difference
        self.index = faiss.IndexBinaryMultiHash(64, 4, 16)
        self.index.nflip = max_bits // 4
        self.stored = tempfile.TemporaryFile()

    def find(self, signature: Signatures) -> int | None:
        """The number of the first near copy of the one signature, None where there is none."""
        _, _, rows = self.index.range_search(self._code(signature), self.limits[0] + 1)
        for row in sorted(rows.tolist()):
            self.stored.seek(row * self.RECORD.itemsize)
            found = np.frombuffer(self.stored.read(self.RECORD.itemsize), self.RECORD)
            other = Signatures(found["hash"].astype(np.uint64), found["thumbnail"])
            if len(near_copies(signature, other, *self.limits)):
                return row
        return None

    def add(self, signature: Signatures) -> None:
        """Gives the one signature the next number, from 0."""
        self.stored.seek(0, io.SEEK_END)
        record = np.array([(signature.hashes[0], signature.thumbnails[0])], self.RECORD)
        self.stored.write(record.tobytes())
        self.index.add(self._code(signature))

    @staticmethod
    def _code(signature: Signatures) -> np.ndarray:
        return signature.hashes.astype("<u8").view(np.uint8).reshape(1, 8)


def _repeated(key: Callable, reason: str) -> Callable:
    seen = set()

    def check(subject) -> str | None:
        found = key(subject)
        if found in seen:
            return reason
        seen.add(found)
        return None

    return check
