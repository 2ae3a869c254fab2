"""The emoji of the picture dictionary: their names (CLDR), their groups (OpenMoji) and their drawings."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from clipid_utils.files import read_json

SKIN_TONES = {f"{code:x}" for code in range(0x1F3FB, 0x1F400)}
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def concept_id(codes: str) -> str:
    """The key of an emoji in every set: its code points in lower case, at least four digits each, without FE0F.

    "2764-FE0F" and "2764" -> "2764"; "23-FE0F-20E3" -> "0023-20e3".
    """
    return "-".join(code.zfill(4) for code in codes.lower().split("-") if code != "fe0f")


def read_concepts(packages: dict[str, Path | None], groups: dict) -> dict[str, dict]:
    """Concept id -> its row without the picture, for every emoji of OpenMoji's list that CLDR names in both languages.

    Skin-tone variants, skin tones alone and OpenMoji's own extras are left out.
    """
    indonesian, english = read_names(packages, "id"), read_names(packages, "en")
    concepts = {}
    for emoji in read_json(packages["openmoji"] / "package/data/openmoji.json"):
        concept = concept_id(emoji["hexcode"])
        left_out = emoji["group"].startswith("extras") or not SKIN_TONES.isdisjoint(concept.split("-"))
        if left_out or concept not in indonesian or concept not in english:
            continue
        place = f"{emoji['group']}/{emoji['subgroups']}"
        concepts[concept] = {
            "source": emoji["emoji"],
            **dict(zip(("name_id", "keywords_id"), indonesian[concept], strict=True)),
            **dict(zip(("name_en", "keywords_en"), english[concept], strict=True)),
            "group": look_up(groups["openmoji"], place),
            "has_text": look_up(dict.fromkeys(groups["mirrored_reads_wrong"], True), place) or False,
            "kind": "drawing",
        }
    return concepts


def look_up(table: dict, place: str):
    """The entry of the longest prefix of a place, "a/b" before "a", or None."""
    parts = place.split("/")
    return next((table[key] for n in range(len(parts), 0, -1) if (key := "/".join(parts[:n])) in table), None)


def read_names(packages: dict[str, Path | None], language: str) -> dict[str, tuple[str, list[str]]]:
    """Concept id -> (name, keywords) of CLDR's annotations in a language, with the derived ones (sequences)."""
    names = {}
    parts = {"annotations": "cldr-annotations-full", "annotationsDerived": "cldr-annotations-derived-full"}
    for part, package in parts.items():
        path = packages[package] / f"package/{part}/{language}/annotations.json"
        for emoji, entry in read_json(path)[part]["annotations"].items():
            if "tts" in entry:
                name = clean_name(entry["tts"][0], language)
                concept = concept_id("-".join(f"{ord(character):x}" for character in emoji))
                names[concept] = name, clean_keywords(entry.get("default", []), name)
    return names


# Nobody says "bendera: Indonesia" or "keycap: 4", as CLDR does. All other names stay as they are.
SPOKEN = {
    "id": [(r"^bendera: ", "bendera "), (r"^keycap: ", "tombol angka ")],
    "en": [(r"^flag: ", "flag of "), (r"^keycap: ", "keycap ")],
}


def clean_name(name: str, language: str) -> str:
    """A CLDR name as people say it: "bendera: Indonesia" -> "bendera Indonesia", "keycap: 4" -> "tombol angka 4"."""
    for pattern, spoken in SPOKEN[language]:
        name = re.sub(pattern, spoken, name)
    return " ".join(name.split())


def clean_keywords(keywords: list[str], name: str) -> list[str]:
    """The keywords in their order, each once, without the name itself and without signs such as ":)"."""
    cleaned = [" ".join(keyword.split()) for keyword in keywords]
    return [word for word in dict.fromkeys(cleaned) if word.lower() != name.lower() and any(map(str.isalnum, word))]


def find_drawings(packages: dict[str, Path | None]) -> dict[str, dict[str, str | Path]]:
    """Artist -> concept id -> the drawing, as a path (PNG, SVG) or as the SVG's text."""
    folders = {
        "openmoji": packages["openmoji"] / "package/color/svg",
        "twemoji": packages["@discordapp/twemoji"] / "package/dist/svg",
    }
    if packages["ruby-gemojione"]:
        folders["emojione"] = next(packages["ruby-gemojione"].rglob("assets/png"))
    drawings = {artist: {concept_id(path.stem): path for path in sorted(folder.iterdir())}
                for artist, folder in folders.items()}
    # Only the sprite sheet has the flags. If both sets have a drawing, the newer one is taken.
    drawings["noto"] = read_sprites(packages["@svgmoji/noto"]) | read_icons(packages["@iconify-json/noto"])
    return drawings


def read_sprites(package: Path) -> dict[str, str]:
    """Concept id -> SVG text of each symbol in a sprite sheet of nested <svg id="1F431"> elements."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    sheet = ElementTree.parse(package / "package/sprites/all.svg").getroot()
    symbols = [symbol for symbol in sheet.findall(f"{{{SVG}}}svg") if symbol.get("id")]
    return {concept_id(symbol.get("id")): ElementTree.tostring(symbol, encoding="unicode") for symbol in symbols}


def read_icons(package: Path) -> dict[str, str]:
    """Concept id -> SVG text of each icon of an Iconify collection: icons.json, with chars.json for code points."""
    collection = read_json(package / "package/icons.json")
    drawings = {}
    for codes, name in read_json(package / "package/chars.json").items():
        while name not in collection["icons"]:
            name = collection["aliases"][name]["parent"]
        icon = collection["icons"][name]
        width, height = (icon.get(side, collection.get(side, 16)) for side in ("width", "height"))
        head = f'<svg xmlns="{SVG}" xmlns:xlink="{XLINK}" viewBox="0 0 {width} {height}">'
        drawings[concept_id(codes)] = head + icon["body"] + "</svg>"
    return drawings
