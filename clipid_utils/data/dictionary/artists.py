"""The emoji of the picture dictionary: what each is called (CLDR), its group (OpenMoji), and who drew it where."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SKIN_TONES = {f"{code:x}" for code in range(0x1F3FB, 0x1F400)}
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def concept_id(codes: str) -> str:
    """The code points of an emoji as every set is joined on: lower case, four digits at least, without FE0F.

    "2764-FE0F" and "2764" -> "2764"; "23-FE0F-20E3" -> "0023-20e3".
    """
    return "-".join(code.zfill(4) for code in codes.lower().split("-") if code != "fe0f")


def has_skin_tone(concept: str) -> bool:
    """Whether an emoji is a skin-tone variant (or a bare tone); the dictionary holds none."""
    return not SKIN_TONES.isdisjoint(concept.split("-"))


def read_concepts(packages: dict[str, Path | None], groups: dict) -> dict[str, dict]:
    """Concept id -> its row without the picture, for every emoji of OpenMoji's list that CLDR names in both languages.

    Skin-tone variants and OpenMoji's own extras are left out, and so is what CLDR does not name in Indonesian.
    """
    indonesian, english = read_names(packages, "id"), read_names(packages, "en")
    listed = json.loads((packages["openmoji"] / "package/data/openmoji.json").read_text(encoding="utf-8"))
    concepts = {}
    for emoji in listed:
        concept = concept_id(emoji["hexcode"])
        if has_skin_tone(concept) or emoji["group"].startswith("extras"):
            continue
        if concept not in indonesian or concept not in english:
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
    """The entry of the longest prefix of a folder-like place: "a/b" before "a"; None where there is none."""
    parts = place.split("/")
    return next((table[key] for n in range(len(parts), 0, -1) if (key := "/".join(parts[:n])) in table), None)


def read_names(packages: dict[str, Path | None], language: str) -> dict[str, tuple[str, list[str]]]:
    """Concept id -> (name, keywords) of CLDR's annotations in a language, the derived ones (sequences) included."""
    names = {}
    parts = {"annotations": "cldr-annotations-full", "annotationsDerived": "cldr-annotations-derived-full"}
    for part, package in parts.items():
        path = packages[package] / f"package/{part}/{language}/annotations.json"
        for emoji, entry in json.loads(path.read_text(encoding="utf-8"))[part]["annotations"].items():
            if "tts" in entry:
                name = clean_name(entry["tts"][0], language)
                concept = concept_id("-".join(f"{ord(character):x}" for character in emoji))
                names[concept] = name, clean_keywords(entry.get("default", []), name)
    return names


# CLDR names a flag "bendera: Indonesia" and a keycap "keycap: 4"; nobody says so. All other names stay as they are.
SPOKEN = {
    "id": [(r"^bendera: ", "bendera "), (r"^keycap: ", "tombol angka ")],
    "en": [(r"^flag: ", "flag of "), (r"^keycap: ", "keycap ")],
}


def clean_name(name: str, language: str) -> str:
    """A CLDR name as one would say it: "bendera: Indonesia" -> "bendera Indonesia", "keycap: 4" -> "tombol angka 4"."""
    for pattern, spoken in SPOKEN[language]:
        name = re.sub(pattern, spoken, name)
    return " ".join(name.split())


def clean_keywords(keywords: list[str], name: str) -> list[str]:
    """The keywords in their order, each once, without the name itself and without those of signs alone (":)")."""
    cleaned = [" ".join(keyword.split()) for keyword in keywords]
    return [word for word in dict.fromkeys(cleaned) if word.lower() != name.lower() and any(map(str.isalnum, word))]


def find_drawings(packages: dict[str, Path | None]) -> dict[str, dict[str, str | Path]]:
    """Artist -> concept id -> the drawing, as a path (PNG, SVG) or as the SVG's text; none with a skin tone."""
    folders = {
        "openmoji": packages["openmoji"] / "package/color/svg",
        "twemoji": packages["@discordapp/twemoji"] / "package/dist/svg",
    }
    if packages["ruby-gemojione"]:
        folders["emojione"] = next(packages["ruby-gemojione"].rglob("assets/png"))
    drawings = {}
    for artist, folder in folders.items():
        drawings[artist] = {concept_id(path.stem): path for path in sorted(folder.iterdir())}
    # The sprite sheet has the flags, which the newer set lacks; where both have a drawing, the newer one is taken.
    drawings["noto"] = read_sprites(packages["@svgmoji/noto"]) | read_icons(packages["@iconify-json/noto"])
    return {
        artist: {concept: drawing for concept, drawing in sorted(found.items()) if not has_skin_tone(concept)}
        for artist, found in drawings.items()
    }


def read_sprites(package: Path) -> dict[str, str]:
    """Concept id -> SVG text of each symbol in a sprite sheet of nested <svg id="1F431"> elements."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    sheet = ElementTree.parse(package / "package/sprites/all.svg").getroot()
    symbols = [symbol for symbol in sheet.findall(f"{{{SVG}}}svg") if symbol.get("id")]
    return {concept_id(symbol.get("id")): ElementTree.tostring(symbol, encoding="unicode") for symbol in symbols}


def read_icons(package: Path) -> dict[str, str]:
    """Concept id -> SVG text of each icon of an Iconify collection: icons.json, with chars.json for code points."""
    collection = json.loads((package / "package/icons.json").read_text(encoding="utf-8"))
    characters = json.loads((package / "package/chars.json").read_text(encoding="utf-8"))
    drawings = {}
    for codes, name in characters.items():
        while name not in collection["icons"]:
            name = collection["aliases"][name]["parent"]
        icon = collection["icons"][name]
        width, height = (icon.get(side, collection.get(side, 16)) for side in ("width", "height"))
        head = f'<svg xmlns="{SVG}" xmlns:xlink="{XLINK}" viewBox="0 0 {width} {height}">'
        drawings[concept_id(codes)] = head + icon["body"] + "</svg>"
    return drawings
