"""Gates for translated captions: what each stops, a pair of English and Indonesian that is likely not to say the same.

A gate takes the pairs and returns for each what is wrong with it, or "" where it passes. None needs a reference, and
none proves a translation right: they find what machines get wrong in ways that can be counted.

    report = Report()
    kept = list(pass_gates(pairs, GATES, report))
    print(report)                                      # each gate's count, with examples
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from clipid_utils.data.report import Report
from clipid_utils.data.translation.translate import loops

Pair = tuple[str, str]  # English, Indonesian
Gate = Callable[[list[Pair]], list[str]]
INDONESIAN = frozenset({"id", "ms", "jv", "su"})  # and what identifiers take it for: Malay, Javanese, Sundanese
LEAST_WORDS = 5  # of a text whose language is looked at: shorter ones are taken for anything
RATIO = 2.0  # of the lengths in letters, 8 added to both: of the dictionary's human pairs 11 in 2,691 are beyond
ENGLISH_ONLY = frozenset("the of and with is are was at an from his her their this that its for by".split())
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def words(text: str) -> list[str]:
    """The words of a text in small letters; "kupu-kupu" is one."""
    return _WORD.findall(text.lower())


def each(check: Callable[[str, str], str]) -> Gate:
    """A gate of what looks at one pair at a time."""
    return lambda pairs: [check(english, indonesian) for english, indonesian in pairs]


def pass_gates(
    pairs: Iterable[Pair], gates: dict[str, Gate], report: Report, chunk: int = 1000
) -> Iterator[tuple[int, str, str]]:
    """The pairs that pass all gates, each with its place in `pairs`, as a stream.

    A pair that does not is counted in the report for the first gate that stops it, in the order of `gates`.
    """
    numbered = enumerate(pairs)
    while rows := list(islice(numbered, chunk)):
        for name, gate in gates.items():
            if not rows:
                break
            said = gate([pair for _, pair in rows])
            for (_, (english, indonesian)), wrong in zip(rows, said, strict=True):
                if wrong:
                    report.drop(name, f"{english} → {indonesian} ({wrong})")
            rows = [row for row, wrong in zip(rows, said, strict=True) if not wrong]
        for number, (english, indonesian) in rows:
            report.keep()
            yield number, english, indonesian


def count_gates(pairs: list[Pair], gates: dict[str, Gate]) -> dict[str, Report]:
    """A report for each gate alone, as if there were no other."""
    reports = {}
    for name, gate in gates.items():
        reports[name] = Report()
        for _ in pass_gates(pairs, {name: gate}, reports[name]):
            pass
    return reports


# --- The gates --------------------------------------------------------------------------------------------------------


def language_gate(
    identify: Callable[[str], str] | None = None, accepted: frozenset[str] = INDONESIAN, least_words: int = LEAST_WORDS
) -> Gate:
    """Stops a translation of at least `least_words` words that `identify` takes for none of the accepted languages.

    Words that the English has too do not count: they are names, or for `check_copy` to find.
    `identify` returns the code of a text's language; by default it is py3langid's.
    """
    identify = identify or _identify

    def check(english: str, indonesian: str) -> str:
        own = [word for word in words(indonesian) if word not in words(english)]  # without names
        if len(own) < least_words:
            return ""
        language = identify(" ".join(own))
        return "" if language in accepted else f"taken for {language!r}"

    return each(check)


def _identify(text: str) -> str:
    import py3langid  # here, since it reads its model

    return py3langid.classify(text)[0]


def check_length(english: str, indonesian: str) -> str:
    """Stops what is more than RATIO times as long as the other, or nothing at all."""
    if not indonesian.strip():
        return "empty"
    ratio = (len(indonesian) + 8) / (len(english) + 8)
    return "" if 1 / RATIO <= ratio <= RATIO else f"{ratio:.1f} times as long"


def check_copy(english: str, indonesian: str) -> str:
    """Stops what is still English: words that only English has, all of two or more words copied, or more than half of
    the longer ones.

    Names may be copied, that is words with a capital letter inside the English text, and so may a single word: a robot
    is a robot in both languages.
    """
    found, source = words(indonesian), words(english)
    foreign = ENGLISH_ONLY.intersection(found)
    if foreign:
        return f"{sorted(foreign)[0]!r} is English"
    names = {word.lower() for word in _WORD.findall(english)[1:] if word[0].isupper()}
    plain = [word for word in found if word not in names]
    if len(plain) > 1 and found == source:
        return "copied whole"
    copied = [word for word in plain if len(word) > 2 and word in source]
    return f"copied: {' '.join(copied)}" if len(copied) >= 2 and 2 * len(copied) > len(plain) else ""


def check_repetition(english: str, indonesian: str) -> str:
    """Stops what says one thing over and over: `loops`, or eight words and more of which fewer than half differ, unless
    the English does it too."""
    if loops(indonesian, english):
        return "loops"
    found, source = words(indonesian), words(english)
    few = len(found) >= 8 and 2 * len(set(found)) < len(found)
    return "few different words" if few and 2 * len(set(source)) >= len(source) else ""


# --- Numbers ----------------------------------------------------------------------------------------------------------

_UNITS_EN = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen \
seventeen eighteen nineteen"
_TENS_EN = "twenty thirty forty fifty sixty seventy eighty ninety"
_UNITS_ID = dict(zip("satu dua tiga empat lima enam tujuh delapan sembilan".split(), range(1, 10), strict=True))
_SMALL = {word: number for number, word in enumerate(_UNITS_EN.split(), 1)} | _UNITS_ID
_SMALL |= {word: number for number, word in zip(range(20, 100, 10), _TENS_EN.split(), strict=True)}
_SMALL |= {"sepuluh": 10, "sebelas": 11, "seratus": 100, "seribu": 1000}
_SCALES = {"puluh": (10, 10), "ratus": (10, 100), "hundred": (10, 100), "ribu": (1000, 1000), "thousand": (1000, 1000),
           "juta": (10**6, 10**6), "million": (10**6, 10**6)}
# Said without being a number, or as a fraction: they may stand for it on the other side, and need not.
_LOOSE = {"both": 2, "pair": 2, "couple": 2, "twin": 2, "twins": 2, "double": 2, "second": 2, "half": 2, "triple": 3,
          "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10,
          "eleventh": 11, "twelfth": 12, "dozen": 12, "tricycle": 3, "triplets": 3, "quarters": 4, "twice": 2,
          "sepasang": 2, "pasangan": 2, "kembar": 2, "ganda": 2, "setengah": 2, "rangkap": 2, "lusin": 12,
          "selusin": 12, "hundred": 100, "thousand": 1000,
          **{f"{prefix}{word}": number for word, number in _UNITS_ID.items() for prefix in ("ke", "ber")}}
_TOKEN = re.compile(r"\d+(?:[.,]\d{3})*(?!\d)|[^\W\d_]+")
_NO_COUNT = re.compile(r"\b(?:kaki lima|segi (?:tiga|empat|lima|enam|delapan))\b")  # street vendors; polygons
_HOURS = [*_UNITS_ID, "sepuluh", "sebelas", "dua belas"]
_HALF_PAST = re.compile(rf"\b(?:jam|pukul) setengah ({'|'.join(_HOURS[::-1])})\b")  # setengah dua is 1.30, not 2.30


def numbers(text: str) -> tuple[set[int], set[int]]:
    """The numbers from two on that a text in either language says, in digits or words, and those it may mean ("second",
    "kedua", "sepasang"). One is left out: a, an, one, se- and satu stand for each other and for nothing."""
    said: list[int] = []
    loose: set[int] = set()
    begun = False  # whether the next word may belong to the last number
    text = _HALF_PAST.sub(lambda found: f"{_HOURS.index(found[1]) or 12} 30", _NO_COUNT.sub("", text.lower()))
    for token in _TOKEN.findall(text):
        if token in _SMALL:
            value = _SMALL[token]
            step = 10 ** len(str(value))
            if begun and said[-1] % step == 0 and (value > 9 or said[-1] % 100 != 10):
                said[-1] += value
            else:
                said.append(value)
            begun = True
        elif begun and token in _SCALES:
            base, scale = _SCALES[token]
            said[-1] += said[-1] % base * (scale - 1)
        elif begun and token == "belas":
            said[-1] += 10
        elif begun and token == "and" and said[-1] % 100 == 0:
            continue  # two hundred and five
        else:
            begun = token[0].isdecimal()
            if begun:
                said.append(int(re.sub(r"[.,]", "", token)[:18]))
            elif token in _LOOSE:
                loose.add(_LOOSE[token])
    return set(said) - {0, 1}, loose


def check_numbers(english: str, indonesian: str) -> str:
    """Stops a pair of which one side says a number that the other does not."""
    (said_en, loose_en), (said_id, loose_id) = numbers(english), numbers(indonesian)
    lost, added = said_en - said_id - loose_id, said_id - said_en - loose_en
    return f"without {min(lost)}" if lost else f"with {min(added)}" if added else ""


# --- Colours ----------------------------------------------------------------------------------------------------------

# English words of a colour, its Indonesian ones, and what else either side may say for the other's: garlic is bawang
# putih, sunglasses are kacamata hitam.
_COLOURS = [tuple(frozenset(part.split()) for part in line) for line in (
    ("red", "merah", "pink maroon crimson scarlet ruby ginger onion onions shallot shallots bean beans palm traffic",
     "marun memerah"),
    ("pink", "pink", "rose", "merah"),
    ("blue", "biru", "navy azure cyan sapphire teal", ""),
    ("green", "hijau", "emerald lime olive mung evergreen teal", "menghijau"),
    ("yellow", "kuning", "blond blonde golden egg amber brass", "pirang menguning"),
    ("black", "hitam", "dark ebony sunglasses shades record records blackboard", "gelap menghitam"),
    ("white", "putih", "egg ivory garlic whiteboard", "memutih"),
    ("orange", "oranye jingga", "", "jeruk oren"),
    ("brown", "cokelat coklat", "chocolate cocoa brunette tan", "sawo"),
    ("purple violet", "ungu", "lilac lavender mauve eggplant", "lembayung violet"),
    ("grey gray", "abu-abu kelabu", "ash silver", "beruban uban"),
    ("gold golden", "emas", "medal", "kuning"),
    ("silver", "perak", "medal", "abu-abu"),
)]

# sebiru: as blue as, kebiruan: bluish, birunya: its blue
_SHADE = re.compile(rf"^(?:ke|se)?({'|'.join(sorted(word for line in _COLOURS for word in line[1]))})(?:an|nya)?$")


def check_colours(english: str, indonesian: str) -> str:
    """Stops a pair of which one side names a colour that the other does not; what both spell alike is a name."""
    en = set(words(english.replace("-", " ")))
    ind = {_SHADE.sub(r"\1", word) for word in words(indonesian)}
    en, ind = en - ind, ind - en
    for says_en, says_id, may_en, may_id in _COLOURS:
        if says_en & en and not ind & (says_id | may_id):
            return f"without {min(says_en & en)}"
        if says_id & ind and not en & (says_en | may_en):
            return f"with {min(says_id & ind)}"
    return ""


# --- There and back ---------------------------------------------------------------------------------------------------


def round_trip_gate(back: Callable[[list[str]], list[str]], least: float = 30.0) -> Gate:
    """Stops a translation of whose way back less than `least` of chrF (Popović 2015, of 100) is the English again.

    `back` translates Indonesian texts into English, as a Translator with a model for that way round does. What passes
    two models may still be wrong: both can make the same mistake.
    """
    from sacrebleu.metrics import CHRF

    chrf = CHRF()

    def gate(pairs: list[Pair]) -> list[str]:
        returned = back([indonesian for _, indonesian in pairs])
        said = []
        for (english, _), again in zip(pairs, returned, strict=True):
            score = chrf.sentence_score(again.lower(), [english.lower()]).score
            said.append("" if score >= least else f"comes back as {again!r}, chrF {score:.0f}")
        return said

    return gate


GATES: dict[str, Gate] = {
    "length": each(check_length), "copy": each(check_copy), "repetition": each(check_repetition),
    "numbers": each(check_numbers), "colours": each(check_colours), "language": language_gate(),
}
