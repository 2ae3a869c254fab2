"""Miniature picture packages in the formats of the real ones, and clients (npm, apt-get, dpkg-deb) that serve them."""

import base64
import hashlib
import io
import json
import os
import stat
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{}</svg>'
# concept, Indonesian name, keywords, English name, group, subgroup
EMOJI = [
    ("1F431", "wajah kucing", ["hewan", "kucing", "meong", ":)"], "cat face", "animals-nature", "animal-mammal"),
    ("1F436", "wajah anjing", ["anjing", "wajah anjing"], "dog face", "animals-nature", "animal-mammal"),
    ("1F34E", "apel merah", ["apel", "buah"], "red apple", "food-drink", "food-fruit"),
    ("1F34C", "pisang", ["buah"], "banana", "food-drink", "food-fruit"),
    ("1F697", "mobil", ["kendaraan"], "automobile", "travel-places", "transport-ground"),
    ("2764-FE0F", "hati merah", ["cinta"], "red heart", "smileys-emotion", "heart"),
    ("0034-FE0F-20E3", "keycap: 4", ["4"], "keycap: 4", "symbols", "keycap"),
    ("1F1EE-1F1E9", "bendera: Indonesia", ["bendera"], "flag: Indonesia", "flags", "country-flag"),
    ("1F44B", "tangan melambai", ["dah"], "waving hand", "people-body", "hand-fingers-open"),
    ("1F44B-1F3FB", "tangan melambai: warna kulit cerah", ["dah"], "waving hand: light skin tone", "people-body", "x"),
    ("E000", "buatan sendiri", [], "made up", "extras-openmoji", "brand"),
    ("1F51F", None, [], "keycap: 10", "symbols", "keycap"),
]
STAMPS = {  # path without suffix: (English, Indonesian)
    "animals/cats/lion": ("A lion.", "Singa."),
    "animals/cats/cartoon/kitten": ("A white kitten.", "Kucing putih."),
    "animals/cats/cartoon/twice": ("A tiger.", "Harimau."),
    "animals/cats/untranslated": ("A puma.", "A puma."),
    "animals/cats/uncaptioned": (None, None),
    "animals/cats/english": ("A lynx.", None),
    "symbols/shapes/white": ("A white spot.", "Bercak putih."),
    "symbols/money/one": ("Dollar sign.", "Tanda dollar."),
}


def svg(seed: int) -> str:
    """A different drawing for each seed: rectangles of some colours."""
    rng = np.random.default_rng(seed)
    shapes = ""
    for x, y, w, h, colour in rng.integers([0, 0, 9, 9, 0], [60, 60, 50, 50, 1 << 24], (12, 5)):
        shapes += f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="#{colour:06x}"/>'
    return SVG.format(shapes)


def png(seed: int, noise: bool = False, size: int = 64) -> bytes:
    """A cut-out picture, transparent around a square of noise (to the rule a photograph) or of flat blocks."""
    rng = np.random.default_rng(seed)
    rgba = np.zeros((size, size, 4), np.uint8)
    colours = rng.integers(0, 256, (4, 4, 3)).repeat(size // 8, 0).repeat(size // 8, 1)
    middle = slice(size // 4, size // 4 + size // 2)
    rgba[middle, middle, :3] = rng.integers(0, 256, (size // 2, size // 2, 3)) if noise else colours
    rgba[middle, middle, 3] = 255
    return encode(rgba)


def encode(pixels: np.ndarray) -> bytes:
    """PNG bytes of an array of pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def npm_members() -> dict[str, dict[str, str]]:
    """Package name -> path -> text, as `npm pack` packs it."""
    listed = [{"emoji": emoji(codes), "hexcode": codes, "group": group, "subgroups": part}
              for codes, *_, group, part in EMOJI]  # fmt: skip
    openmoji = {f"color/svg/{codes}.svg": svg(i) for i, (codes, *_) in enumerate(EMOJI)}
    short = [codes.lower().replace("-fe0f", "") for codes, *_ in EMOJI]
    twemoji = {f"dist/svg/{codes}.svg": svg(100 + i) for i, codes in enumerate(short)}
    nested = "".join(
        svg(200 + i).replace("<svg ", f'<svg id="{codes}" ') for i, (codes, *_) in enumerate(EMOJI) if "1F1EE" in codes
    )
    icons = {f"icon-{i}": {"body": svg(300 + i)[len(SVG.split("{}")[0]) : -len("</svg>")]} for i in range(len(EMOJI))}
    characters = {codes.lstrip("0"): f"icon-{i}" for i, codes in enumerate(short)}
    del characters["1f1ee-1f1e9"]  # as in the real set, flags are only in the sprite sheet
    characters["1f431"], aliases = "cat", {"cat": {"parent": "icon-0"}}
    noto = {"width": 72, "height": 72, "icons": icons, "aliases": aliases}
    members = {
        "openmoji": {"data/openmoji.json": json.dumps(listed), **openmoji},
        "@discordapp/twemoji": twemoji,
        "@iconify-json/noto": {"icons.json": json.dumps(noto), "chars.json": json.dumps(characters)},
        "@svgmoji/noto": {"sprites/all.svg": SVG.format(nested)},
        "cldr-annotations-full": {},
        "cldr-annotations-derived-full": {},
    }
    for place, language in ((1, "id"), (3, "en")):
        named = {emoji(e[0]).replace("\ufe0f", ""): {"tts": [e[place]], "default": e[2]} for e in EMOJI if e[place]}
        for part in ("annotations", "annotationsDerived"):
            package = "cldr-annotations-full" if part == "annotations" else "cldr-annotations-derived-full"
            share = {key: value for key, value in named.items() if (len(key) > 1) == (part == "annotationsDerived")}
            members[package][f"{part}/{language}/annotations.json"] = json.dumps({part: {"annotations": share}})
    return members


def emoji(codes: str) -> str:
    """The characters of "1F431-FE0F"."""
    return "".join(chr(int(code, 16)) for code in codes.split("-"))


def debian_members() -> dict[str, dict[str, bytes]]:
    """Package name -> path -> bytes, as in the .deb."""
    gem = "./usr/share/gems/gemojione-3.3.0/assets/png/"
    members = {
        "ruby-gemojione": {f"{gem}{e[0].replace('-FE0F', '')}.png": png(400 + i) for i, e in enumerate(EMOJI[:6])},
        "tuxpaint-stamps-default": {},
    }
    stamps = members["tuxpaint-stamps-default"]
    for i, (path, (english, indonesian)) in enumerate(STAMPS.items()):
        place = "./usr/share/tuxpaint/stamps/" + path
        stamps[place + ".png"] = png(500 + i, noise="cartoon" not in path)
        if english:
            captions = [english, "de.utf8=Etwas."] + [f"id.utf8={indonesian}"] * bool(indonesian)
            stamps[place + ".txt"] = "\n".join(captions).encode()
    stamps["./usr/share/tuxpaint/stamps/animals/cats/lion.dat"] = b"noflip\nnomirror\n"
    stamps["./usr/share/tuxpaint/stamps/animals/cats/lion_desc.ogg"] = b"a sound, not wanted"
    twice = svg(600).replace('viewBox="0 0 72 72"', 'width="72pt" height="36pt"')  # a size in pt and no viewBox
    stamps["./usr/share/tuxpaint/stamps/animals/cats/cartoon/twice.svg"] = twice.encode()
    text = SVG.format("<text>$</text>")
    stamps["./usr/share/tuxpaint/stamps/symbols/money/one.svg"] = text.encode()
    stamps["./usr/share/tuxpaint/stamps/symbols/shapes/white.png"] = encode(np.full((9, 9, 4), 255, np.uint8))
    return members


def pack(members: dict, mode: str, prefix: str = "") -> bytes:
    """The members as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for path, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(prefix + path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def build(folder: Path, data: Path) -> dict:
    """Writes the registry, the clients (folder/bin) and the JSON files of the data folder; returns the pinned list."""
    sources = json.loads((data / "sources.json").read_text(encoding="utf-8"))
    registry, clients, own = folder / "registry", folder / "bin", folder / "data"
    for place in (registry, clients, own):
        place.mkdir()
    for name, members in npm_members().items():
        archive = pack(members, "w:gz", "package/")
        (registry / f"{name.replace('/', '+')}.tgz").write_bytes(archive)
        digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
        sources["npm"][name] |= {"version": "1.0.0", "integrity": f"sha512-{digest}"}
    for name, members in debian_members().items():
        archive = pack(members, "w")
        (registry / f"{name}.deb").write_bytes(archive)
        version = f"{sources['debian'][name]['series']}0-1"
        sources["debian"][name]["versions"] = {version: [hashlib.sha256(archive).hexdigest()]}
        (registry / f"{name}.version").write_text(version)
    write_clients(clients, registry)
    (own / "sources.json").write_text(json.dumps(sources), encoding="utf-8")
    for name in ("groups.json", "stamp_kinds.json"):
        (own / name).write_bytes((data / name).read_bytes())
    return sources


CLIENTS = {
    "npm": """
name, version = sys.argv[2].rsplit("@", 1)
if not (registry / "online").exists():
    sys.exit("npm error network request failed")
shutil.copy(registry / (name.replace("/", "+") + ".tgz"), "package.tgz")
""",
    "apt-get": """
if sys.argv[1] != "download":
    if "update" in sys.argv:
        (registry / "updated").touch()
    if "download" not in sys.argv:
        sys.exit()
name, _, version = sys.argv[-1].partition("=")
found = (registry / (name + ".version")).read_text()
needs_lists = (registry / "no-lists").exists() and not (registry / "updated").exists()
if needs_lists or not (registry / "online").exists() or (version and version != found):
    sys.exit("E: Unable to locate package " + name)
shutil.copy(registry / (name + ".deb"), name + "_" + found.replace(":", "%3a") + "_all.deb")
""",
    "dpkg-deb": """
sys.stdout.buffer.write(pathlib.Path(sys.argv[2]).read_bytes())
""",
}


def write_clients(folder: Path, registry: Path) -> None:
    """Writes executable stand-ins for npm, apt-get and dpkg-deb; each call is noted in registry/calls."""
    for name, body in CLIENTS.items():
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nimport pathlib, shutil, sys\nregistry = pathlib.Path({os.fspath(registry)!r})\n"
            f'(registry / "calls").open("a").write({name!r} + " " + " ".join(sys.argv[1:]) + "\\n")\n{body}'
        )
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
