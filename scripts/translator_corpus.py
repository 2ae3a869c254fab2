"""The human pairs that the small translator learns from, and more sentences made of them.

Pairs are (English, Indonesian). The names of the dictionary's `unseen_concept` split and the test lines of
data/parallel/captions.tsv are held out. Its validation lines and a twentieth of the other names are for choices during
training.
"""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from datasets import DatasetDict

from clipid_utils.data.dictionary.splits import share
from clipid_utils.data.translation.checks import words
from clipid_utils.paths import DATA
from clipid_utils.wording import classifier_for, counted

CAPTIONS = DATA / "parallel" / "captions.tsv"
Pair = tuple[str, str]


@dataclass
class Corpus:
    """Pairs by split, names and captions; and the group and the keywords of each training name."""

    names: dict[str, list[Pair]] = field(default_factory=lambda: defaultdict(list))
    captions: dict[str, list[Pair]] = field(default_factory=lambda: defaultdict(list))
    groups: dict[Pair, str] = field(default_factory=dict)
    keywords: list[tuple[list[str], list[str]]] = field(default_factory=list)


def bare(text: str) -> str:
    """A text without its article, case and final punctuation. Two texts with the same bare text count as one."""
    return re.sub(r"^(?:a|an|the|sebuah|seekor|seorang) ", "", text.lower().strip(" .!?"))


def half_of(name: str) -> int:
    """0 or 1, by a hash of a name: its half of the dictionary.

    Each half is translated by the model that was trained without it.
    """
    return int(share(f"half {bare(name)}") < 0.5)


def read_corpus(dictionary: DatasetDict, without: int | None = None) -> Corpus:
    """All pairs, split. A training pair is left out if it says a held-out text in either language.

    With `without`, one half of the dictionary's names is held out too, by `half_of` of the English name.
    """
    corpus, rows = Corpus(), {}
    for split, part in dictionary.items():
        columns = ("concept", "name_en", "name_id", "keywords_en", "keywords_id", "group")
        for concept, *row in zip(*(part[column] for column in columns), strict=True):
            held_out = split == "unseen_concept" or half_of(row[0]) == without
            rows.setdefault(concept, ("test" if held_out else "train", *row))
    with open(CAPTIONS, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            corpus.captions[row["split"]].append((row["en"], row["id"]))
    for split, english, indonesian, *_ in rows.values():
        if split == "test":
            corpus.names["test"].append((english, indonesian))
    hidden = [{bare(pair[side]) for pair in (*corpus.names["test"], *corpus.captions["test"])} for side in (0, 1)]

    def shown(english: str, indonesian: str) -> bool:
        return bare(english) not in hidden[0] and bare(indonesian) not in hidden[1]

    corpus.captions["train"] = [pair for pair in corpus.captions["train"] if shown(*pair)]
    for split, english, indonesian, keywords_en, keywords_id, group in rows.values():
        if split == "test" or not shown(english, indonesian):
            continue
        split = "validation" if share(f"translator {bare(indonesian)}") < 0.05 else "train"
        corpus.names[split].append((english, indonesian))
        if split == "train":
            corpus.groups[english, indonesian] = group
            sides = ((english, keywords_en, 0), (indonesian, keywords_id, 1))
            corpus.keywords.append(tuple([name, *(word for word in keywords if bare(word) not in hidden[side])]
                                         for name, keywords, side in sides))
    for split in corpus.names:
        corpus.names[split] = list(dict.fromkeys(corpus.names[split]))
    return corpus


# --- Which words are translations of each other ----------------------------------------------------------------------


def ibm1(pairs: Iterable[tuple[list[str], list[str]]], rounds: int = 8) -> dict[str, dict[str, float]]:
    """The probability of each target unit, given a source unit or None, from pairs of bags of units.

    IBM model 1 (Brown et al. 1993).
    """
    pairs = [([None, *source], target) for source, target in pairs]
    table: dict = {}
    for _ in range(rounds):
        counts: dict = defaultdict(Counter)
        for source, target in pairs:
            for t in target:
                weights = [table[s].get(t, 0.0) if table else 1.0 for s in source]
                total = sum(weights) or 1.0
                for s, weight in zip(source, weights, strict=True):
                    counts[s][t] += weight / total
        table = {s: {t: n / found.total() for t, n in found.items() if n > 1e-4} for s, found in counts.items()}
    return table


def mutual(pairs: list[tuple[list[str], list[str]]], least: float) -> dict[str, str]:
    """The units that are each other's most probable partners.

    They must be so in at least two pairs, with both probabilities at least `least`.
    """
    forward, backward = ibm1(pairs), ibm1([(target, source) for source, target in pairs])
    together = Counter((s, t) for source, target in pairs for s in set(source) for t in set(target))
    found = {}
    for s, row in forward.items():
        t = max(row, key=row.get) if s is not None and row else None
        back = backward.get(t, {})
        if t is not None and max(back, key=back.get) == s and together[s, t] > 1 and min(row[t], back[s]) >= least:
            found[s] = t
    return found


def keyword_lexicon(corpus: Corpus) -> list[Pair]:
    """Keywords that are translations of each other.

    CLDR's two lists of one concept are not aligned, but the lists of many concepts together are.
    """
    pairs = [([word.lower() for word in en], [word.lower() for word in ind]) for en, ind in corpus.keywords]
    return sorted(mutual(pairs, 0.3).items())


def word_by_word(corpus: Corpus) -> Callable[[str], str]:
    """The baseline, from left to right: the longest name or keyword of the training pairs that fits.

    If none fits, it takes the most probable translation of the word, or else the word itself.
    """
    training = [*corpus.names["train"], *corpus.captions["train"]]
    table = ibm1([(words(english), words(indonesian)) for english, indonesian in training])
    single = {s: max(row, key=row.get) for s, row in table.items() if s is not None and row}
    phrases = dict(keyword_lexicon(corpus)) | {bare(english): bare(indonesian) for english, indonesian in training}

    def translate(text: str) -> str:
        tokens, out = re.findall(r"[\w'’-]+|[^\w\s]", text), []
        while tokens:
            for length in range(min(6, len(tokens)), 0, -1):
                phrase = " ".join(tokens[:length]).lower()
                if phrase in phrases or length == 1:
                    out.append(phrases.get(phrase) or single.get(phrase, tokens[0]))
                    tokens = tokens[length:]
                    break
        joined = re.sub(r" (?=[.,!?])", "", " ".join(out))
        return joined[:1].upper() + joined[1:] if text[:1].isupper() else joined

    return translate


# --- More sentences out of the same words -----------------------------------------------------------------------------

ADJECTIVES = {
    "colour": "red merah, blue biru, green hijau, yellow kuning, black hitam, white putih, orange oranye, "
              "brown cokelat, purple ungu, grey abu-abu, gray abu-abu, pink merah muda",
    "kind": "big besar, large besar, small kecil, little kecil, old tua, new baru, long panjang, short pendek, "
            "beautiful indah, cute lucu, broken rusak, clean bersih, dirty kotor, tall tinggi, round bundar",
    "number": "two dua, three tiga, four empat, five lima, six enam, seven tujuh, eight delapan, nine sembilan, "
              "ten sepuluh",
}
NOUNS = ("animals", "plants", "food", "vehicles", "objects", "clothes", "music", "places", "sky")  # as groups call them
# {a} is the English with its article, {n} without; {c} the Indonesian with its classifier, {n} without.
TEMPLATES = [tuple(line.split(" = ")) for line in """
{a} = {c}
{n} = {n}
a picture of {a} = gambar {c}
a photo of {a} = foto {c}
photo of {n} = foto {n}
a drawing of {a} = gambar {c}
a painting of {a} = lukisan {c}
clip art of {a} = klip art {n}
cartoon of {a} = kartun {n}
a cartoon {n} = kartun {n}
{n} icon = ikon {n}
{n} logo = logo {n}
{n} silhouette = siluet {n}
silhouette of {a} = siluet {c}
outline of {a} = garis luar {n}
vector illustration of {a} = ilustrasi vektor {n}
a statue of {a} = patung {n}
this is {a} = ini {c}
{a} on a white background = {c} di atas latar putih
{a} on the table = {c} di atas meja
{a} in the garden = {c} di taman
{a} in a box = {c} di dalam kotak
a box with {a} = kotak berisi {c}
a man with {a} = seorang pria dengan {c}
a woman with {a} = seorang wanita dengan {c}
a girl is holding {a} = seorang anak perempuan sedang memegang {c}
a boy is looking at {a} = seorang anak laki-laki sedang melihat {c}
a close-up of {a} = foto dekat {c}
{a} without a shadow = {c} tanpa bayangan
side view of {a} = {c} dilihat dari samping
""".strip().splitlines()]
PAIRED = [tuple(line.split(" = ")) for line in """
{a} and {b} = {c} dan {d}
{a} with {b} = {c} dengan {d}
{a} next to {b} = {c} di samping {d}
{a} beside {b} = {c} di sebelah {d}
{a} behind {b} = {c} di belakang {d}
{a} in front of {b} = {c} di depan {d}
{a} under {b} = {c} di bawah {d}
{a} above {b} = {c} di atas {d}
{a} near {b} = {c} di dekat {d}
{a} or {b} = {c} atau {d}
{a} is bigger than {b} = {c} lebih besar daripada {d}
""".strip().splitlines()]


def with_article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def plural(noun: str) -> str:
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(?:s|x|z|ch|sh)$", noun) else "s")


def phrases(text: str) -> Counter:
    """All runs of one to four words, and how often each occurs."""
    found = re.findall(r"[\w'’-]+", text.lower())
    return Counter(" ".join(found[i:j]) for i in range(len(found)) for j in range(i + 1, min(i + 4, len(found)) + 1))


class Maker:
    """Makes new pairs of the training pairs, in several ways: one method for each way."""

    def __init__(self, corpus: Corpus, rng: np.random.Generator):
        self.rng, self.names, self.captions = rng, corpus.names["train"], corpus.captions["train"]
        self.lexicon = keyword_lexicon(corpus)
        self.classes: dict[str, list[Pair]] = {
            name: [tuple(item.split(" ", 1)) for item in line.split(", ")] for name, line in ADJECTIVES.items()}
        for (english, indonesian), group in corpus.groups.items():
            english, indonesian = re.sub(r"^(?:an?|the) ", "", english), bare(indonesian)
            # not those in the plural, as scissors
            if group in NOUNS and re.fullmatch(r"[a-z -]{2,}(?:[a-rt-z]|ss|us)", english) and english.count(" ") < 3:
                kind = f"{group} {classifier_for(indonesian, group)}"
                self.classes.setdefault(kind, []).append((english, indonesian))
        self.group_of = {pair: kind for kind, pairs in self.classes.items() if kind not in ADJECTIVES for pair in pairs}
        self.nouns = sorted(self.group_of)
        self.forms: dict[str, list] = defaultdict(list)
        for kind, members in self.classes.items():
            for member in members:
                self.forms[member[0]].append((kind, member, False))
                if kind not in ADJECTIVES:
                    self.forms[plural(member[0])].append((kind, member, True))
        self.slots = [(pair, found) for pair in (*self.captions, *self.names) if (found := self.find_slots(pair))]
        self.known = {word for pair in (*self.captions, *self.names) for side in pair for word in words(side)}
        self.words = sorted({word for english, _ in (*self.captions, *self.names) for word in words(english)
                             if len(word) > 3 and word.isascii()})

    def pick(self, items):
        return items[int(self.rng.integers(len(items)))]

    def name(self) -> Pair:
        return self.pick(self.names)

    def caption(self) -> Pair:
        return self.pick(self.captions)

    def keyword(self) -> Pair:
        return self.pick(self.lexicon)

    def noun(self) -> tuple[str, str, str, str]:
        """A noun with its article and without, then in Indonesian with its classifier and without.

        Some nouns get an adjective.
        """
        english, indonesian = pair = self.pick(self.nouns)
        group = self.group_of[pair].split(" ")[0]
        if self.rng.random() < 0.4:
            adjective = self.pick(self.classes[("colour", "kind")[int(self.rng.integers(2))]])
            joint = " berwarna " if adjective in self.classes["colour"] and self.rng.random() < 0.2 else " "
            english, indonesian = f"{adjective[0]} {english}", f"{indonesian}{joint}{adjective[1]}"
        return with_article(english), english, counted(indonesian, group), indonesian

    def template(self) -> Pair:
        """One noun in a template, or two nouns, or a number of one noun."""
        way = self.rng.random()
        if way < 0.5:
            a, n, c, bare_c = self.noun()
            english, indonesian = self.pick(TEMPLATES)
            return english.format(a=a, n=n), indonesian.format(c=c, n=bare_c)
        if way < 0.85:
            (a, _, c, _), (b, _, d, _) = self.noun(), self.noun()
            english, indonesian = self.pick(PAIRED)
            return english.format(a=a, b=b), indonesian.format(c=c, d=d)
        number, (_, n, c, bare_c) = self.pick(self.classes["number"]), self.noun()
        ekor = " ekor" if c.startswith("seekor") else " buah" if c.startswith("sebuah") and way < 0.9 else ""
        return f"{number[0]} {plural(n)}", f"{number[1]}{ekor} {bare_c}"

    def find_slots(self, pair: Pair) -> list[tuple[str, Pair, bool]]:
        """The members of a class that occur once on each side of a pair, and whether the English is plural."""
        english, indonesian = (phrases(side) for side in pair)
        return [(kind, member, many) for phrase, count in english.items() if count == 1
                for kind, member, many in self.forms.get(phrase, ()) if indonesian[member[1]] == 1]

    def swap(self) -> Pair:
        """A caption or a name with a different word of the same class in one place, or in two places of two classes."""
        pair, slots = self.pick(self.slots)
        for index in self.rng.permutation(len(slots))[: int(self.rng.integers(1, 3))]:
            pair = put(pair, slots[index], self.pick(self.classes[slots[index][0]]))
        return pair

    def copied(self) -> Pair:
        """A caption, a name or a template's sentence with an invented word in place of a noun, the same on both sides.

        From such pairs the model learns not to change an unknown word, so that a check finds it (Currey et al. 2017).
        """
        word = self.stranger()
        if self.rng.random() < 0.3:
            english, indonesian = self.pick(TEMPLATES)
            return english.format(a=with_article(word), n=word), indonesian.format(c=word, n=word)
        pair, slots = self.pick(self.slots)
        slots = [slot for slot in slots if slot[0] not in ADJECTIVES]
        return put(pair, self.pick(slots), (word, word)) if slots else self.copied()

    def stranger(self) -> str:
        """A word that does not exist: the beginning of one English word and the end of a different one."""
        while True:
            (first, second), share = (self.pick(self.words) for _ in range(2)), self.rng.uniform(0.3, 0.7)
            word = first[: round(share * len(first))] + second[round(share * len(second)) :]
            if len(word) > 3 and word not in self.known:
                return word

    def cased(self, pair: Pair) -> Pair:
        """The pair as others would write it: with a different first letter or full stop, in capitals, as a title."""
        (english, indonesian), way = pair, self.rng.random()
        if way < 0.3:
            return english[:1].swapcase() + english[1:], indonesian[:1].swapcase() + indonesian[1:]
        if way < 0.4 and english[-1:] not in ".!?" and indonesian[-1:] not in ".!?":
            return english + ".", indonesian + "."
        if way < 0.46:
            return english.title(), indonesian[:1].upper() + indonesian[1:]
        return (english.upper(), indonesian.upper()) if way < 0.48 else (english, indonesian)


def put(pair: Pair, slot: tuple[str, Pair, bool], new: Pair) -> Pair:
    """The pair with `new` in place of the two words of a slot of `find_slots`, in the same number and with the
    article."""
    (english, indonesian), (_, (en, ind), many) = pair, slot
    old, word = (plural(en), plural(new[0])) if many else (en, new[0])
    for article in ("an ", "a ", ""):  # the longer form first, as the shorter one is a part of it
        english = swapped(english, article + old, with_article(word) if article else word)
    return english, swapped(indonesian, ind, new[1])


def cased(old: str, new: str) -> str:
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


def swapped(text: str, old: str, new: str) -> str:
    return re.sub(rf"(?i)\b{re.escape(old)}\b", lambda found: cased(found[0], new), text)
