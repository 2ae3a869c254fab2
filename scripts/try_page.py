"""Writes the page of `clipid export page` and uses it in Chromium as a person does; compares it with the library.

    python scripts/try_page.py SHOTS [PAGE]   # screenshots go to SHOTS; PAGE is a folder that is there already

It needs playwright and Chromium, which no extra installs; CLIPID_PYTHON names a Python with this package if it is not
the one that runs this. If an assertion fails, its message says which answer was wrong. The printed times are those of
this machine, and nothing depends on them.
"""

import base64
import functools
import http.server
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
WAIT = 120_000  # ms
TEXTS, PICTURES = 2000, 200
OWN = ["kucing", "anjing", "gedung tua"]
DROP = """([files]) => {
    const data = new DataTransfer()
    for (const { bytes, name, type } of files)
        data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, { type }))
    return data
}"""
IN_PAGE = "const app = await import(new URL('app.js', document.baseURI).href);"
VECTOR = f"""async (bytes) => {{ {IN_PAGE}
    const file = new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], 'foto')
    const canvas = await app.openPicture(file), context = canvas.getContext('2d')
    const pixels = app.square(context.getImageData(0, 0, canvas.width, canvas.height))
    return Array.from(await app.pictureVector(pixels))
}}"""


def reference(folder: Path, model: str) -> None:
    """Writes what the library computes, and the pictures it does it with. Run by a Python that has the library."""
    from PIL import Image

    from clipid_utils import load_clip
    from clipid_utils.data.dictionary.build import load_picture_dictionary
    from clipid_utils.files import json_lines, write_json
    from clipid_utils.inference.index import build_index
    from clipid_utils.inference.page import SAMPLES_FOLDER
    from clipid_utils.inference.search import query_embeds, search
    from clipid_utils.inference.zeroshot import classifier_weights
    from clipid_utils.model.embed import embed_pictures, embed_texts
    from clipid_utils.paths import DATA

    clip, processor = load_clip(model)
    records = [record for _, record, _ in json_lines(SAMPLES_FOLDER / "captions.jsonl")]
    texts = [text for record in records for text in record["captions"]]
    texts += [record["description"] for _, record, _ in json_lines(DATA / "class_names.jsonl")]
    texts += [f"{name.capitalize()}!" for name in load_picture_dictionary()["train"]["name_id"]]
    texts = list(dict.fromkeys(texts))[: TEXTS - 1] + ["kata yang sangat panjang " * 200]
    paths = sorted(path for path in SAMPLES_FOLDER.iterdir() if path.suffix in (".webp", ".png", ".jpg"))
    files = [path.read_bytes() for path in paths]
    for row in range(PICTURES - len(files)):  # larger, turned, transparent, grey
        image = Image.open(paths[row % len(paths)]).convert("RGB")
        out, exif, kind = io.BytesIO(), Image.Exif(), row % 4
        exif[0x112] = 1 + row % 8
        if kind == 0:
            scale = (8e6 / (image.width * image.height)) ** 0.5
            image.resize((round(image.width * scale), round(image.height * scale))).save(out, "jpeg", exif=exif)
        elif kind == 1:
            image.save(out, "jpeg", quality=85, exif=exif)
        elif kind == 2:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(out, "png")
        else:
            image.convert("L").save(out, "webp")
        files.append(out.getvalue())
    vectors, skipped = embed_pictures(clip, processor, files, progress=False, batch_size=20)
    assert not skipped, skipped
    index = build_index(clip, processor, SAMPLES_FOLDER, progress=False)
    query = query_embeds(clip, processor, "bangunan tua", paths[0], 0.7)
    (score,), (row,) = (found[0] for found in search(index, query, 1))
    captions = {record["image_path"]: record["captions"] for record in records}
    write_json(folder / "reference.json", {
        "texts": texts, "ids": [processor.tokenize([text])["input_ids"][0].tolist() for text in texts],
        "text_vectors": embed_texts(clip, processor, texts[:100]).tolist(),
        "own": classifier_weights(clip, processor, OWN).tolist(),
        "pictures": [base64.b64encode(file).decode() for file in files], "picture_vectors": vectors.tolist(),
        "name": paths[0].name, "both": [captions[index.keys[row]][0], float(score)],
    }, indent=None)


def cosine(a: list[float], b: list[float]) -> float:
    dots = [sum(x * y for x, y in zip(*pair, strict=True)) for pair in ((a, b), (a, a), (b, b))]
    return dots[0] / (dots[1] * dots[2]) ** 0.5


def serve(folder: Path) -> tuple[http.server.ThreadingHTTPServer, str]:
    """A plain static server, as `python -m http.server` is, and its address."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


def compare(page, known: dict) -> None:
    """The page's token ids and vectors beside the library's."""
    ids = page.evaluate(f"async (texts) => {{ {IN_PAGE} return texts.map((text) => app.tokens(text).ids) }}",
                        known["texts"])
    wrong = [text for text, mine, its in zip(known["texts"], ids, known["ids"], strict=True) if mine != its]
    assert not wrong and len(ids) == TEXTS, f"{len(wrong)} of {len(ids)} texts have different ids: {wrong[:3]}"
    print(f"{len(ids)} texts: the same ids")
    texts = page.evaluate(f"""async (texts) => {{ {IN_PAGE} const all = []
        for (const text of texts) all.push(Array.from(await app.textVector(text)))
        return all }}""", known["texts"][:100])
    found = [cosine(*pair) for pair in zip(texts, known["text_vectors"], strict=True)]
    print(f"{len(found)} texts: cosine with the library's vectors {statistics.mean(found):.4f}, least {min(found):.4f}")
    assert statistics.mean(found) > 0.98
    own = [page.evaluate(f"async (name) => {{ {IN_PAGE} return Array.from(await app.labelVector(name)) }}", name)
           for name in OWN]
    found = [cosine(*pair) for pair in zip(own, known["own"], strict=True)]
    print(f"{len(found)} labels: cosine {statistics.mean(found):.4f}")
    assert min(found) > 0.98
    found = [cosine(page.evaluate(VECTOR, picture), vector)
             for picture, vector in zip(known["pictures"], known["picture_vectors"], strict=True)]
    print(f"{len(found)} pictures: cosine {statistics.mean(found):.4f}, least {min(found):.4f}")
    assert len(found) == PICTURES and statistics.mean(found) >= 0.99


def huge() -> bytes:
    """A PNG of 120 megapixels and few bytes."""
    import struct
    import zlib

    width, height = 12_000, 10_000
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width // 8)) for _ in range(height)) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks)


def use(page, known: dict, shots: Path) -> None:
    from playwright.sync_api import expect

    heading, status, problems = page.locator("#heading"), page.locator("#status"), page.locator("#problems")
    results, words = page.locator("#results li"), page.get_by_label("Kata yang dicari")

    def shot(name: str) -> None:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for width in (1280, 400):
                page.set_viewport_size({"width": width, "height": 900})
                page.wait_for_timeout(300)
                page.screenshot(path=shots / f"{name}-{width}-{scheme}.png")
                assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name}: wider than {width} px"
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": 1280, "height": 900})

    def drop(*files: tuple[str, bytes]) -> None:
        data = [{"bytes": base64.b64encode(content).decode(), "name": name, "type": "image/jpeg"}
                for name, content in files]
        page.locator("body").dispatch_event("drop", {"dataTransfer": page.evaluate_handle(DROP, [data])})

    def ask(text: str) -> list[str]:
        words.fill(text)
        words.press("Enter")
        expect(heading).to_contain_text(f"“{text}”", timeout=WAIT)
        expect(status).to_contain_text("diurutkan", timeout=WAIT)
        return results.all_inner_texts()

    pictures = [base64.b64decode(picture) for picture in known["pictures"]]
    old, cats = ask("bangunan tua"), ask("kucing tidur")
    assert old[0] != cats[0] and all(re.match(r"-?\d,\d\d\s+\S", line) for line in cats), cats[:3]
    print("kucing tidur:", *cats[:3], sep="\n  ")
    shot("1-words")
    ask("\N{SNOWMAN}\N{CAT FACE}")
    expect(problems).to_contain_text("tidak mengenal")

    drop((known["name"], pictures[0]))
    expect(heading).to_contain_text(f"dan foto “{known['name']}”", timeout=WAIT)
    ask("bangunan tua")
    page.locator("#weight").fill("0")
    expect(page.locator("#weight-text")).to_have_text("foto 100%, kata 0%")
    expect(results.first).to_contain_text("1,00", timeout=WAIT)
    page.locator("#weight").fill("0.7")
    expect(results.first).not_to_contain_text("1,00", timeout=WAIT)
    both = page.locator("#results li:not(.mine)").first
    name, score = known["both"]
    shown = float(both.inner_text().split()[0].replace(",", "."))
    print(f"bangunan tua, and {known['name']}: {both.inner_text()!r}; the library: {name} {score:.3f}")
    assert name in both.inner_text() and abs(shown - score) < 0.03
    shot("2-both")
    page.get_by_role("button", name="Hapus foto").click()
    expect(page.locator("#like")).to_be_hidden()

    drop(("rusak.jpg", b"\xff\xd8\xff bukan gambar"))
    expect(problems).to_contain_text("“rusak.jpg” tidak dapat dibaca", timeout=WAIT)
    drop(("besar.png", huge()))
    expect(problems).to_contain_text("120 megapiksel", timeout=WAIT)
    count = len(pictures[:89]) + 1
    drop(*((f"foto-{i}.jpg", picture) for i, picture in enumerate(pictures[90:100])), ("rusak.jpg", b"GIF89a"))
    expect(status).to_contain_text("10 foto ditambahkan", timeout=WAIT)
    expect(problems).to_contain_text("rusak.jpg")
    expect(heading).to_have_text(f"{count + 10} gambar")
    shot("3-added")

    ask("kucing")
    results.first.get_by_role("button").click()
    labels = page.locator("#labels li")
    expect(labels).to_have_count(5)
    print("labels:", *labels.all_inner_texts(), sep="\n  ")
    shot("4-labels")
    own = page.get_by_label("label Anda")
    own.fill("kucing")
    own.press("Enter")
    expect(page.locator("#label-note")).to_contain_text("Tulis 2 sampai 20 label")
    own.fill(", ".join(OWN))
    own.press("Enter")
    expect(labels).to_have_count(3, timeout=WAIT)
    assert labels.first.inner_text().startswith("kucing"), labels.first.inner_text()
    page.get_by_role("button", name="Cari yang mirip").click()
    expect(heading).to_contain_text("dan foto", timeout=WAIT)

    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Find pictures")
    expect(heading).to_contain_text("and the photo")
    assert page.locator("html").get_attribute("lang") == "en" and re.match(r"\d\.\d\d", results.first.inner_text())
    shot("5-english")
    page.get_by_role("button", name="Bahasa Indonesia").click()
    page.get_by_role("button", name="Tampilkan semua gambar").click()
    expect(heading).to_have_text(f"{count + 10} gambar")
    page.get_by_role("button", name="Tampilkan lebih banyak").click()
    expect(results).to_have_count(48)


def keyboard(page) -> None:
    """Search, open, compare and close without a mouse, from the top of a fresh page."""
    from playwright.sync_api import expect

    press = page.keyboard.press
    focused = "document.activeElement.id || document.activeElement.className"
    for wanted in ("skip", "language", "words"):
        press("Tab")
        assert page.evaluate(focused) == wanted, (wanted, page.evaluate(focused))
        styles = page.evaluate("""[document.activeElement, document.activeElement.parentElement]
            .map((element) => getComputedStyle(element).outlineStyle)""")
        assert "solid" in styles, f"{wanted}: its focus cannot be seen"
    page.keyboard.type("perahu di laut")
    press("Enter")
    expect(page.locator("#heading")).to_contain_text("perahu di laut", timeout=WAIT)
    for _ in range(12):
        press("Tab")
        if page.evaluate(focused) == "picture":
            break
    press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate(focused) == "picture", "the focus is lost when the dialog closes"
    unnamed = page.evaluate("""[...document.querySelectorAll('button, input')].filter((e) => e.checkVisibility()
        && !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)""")
    assert not unnamed, unnamed
    print("keyboard: search, open, close")


def offline(page) -> None:
    from playwright.sync_api import expect

    page.context.set_offline(True)
    words = page.get_by_label("Kata yang dicari")
    words.fill("jembatan batu")
    words.press("Enter")
    expect(page.locator("#heading")).to_contain_text("jembatan batu", timeout=WAIT)
    page.wait_for_timeout(500)
    broken = page.evaluate("""[...document.querySelectorAll('#results img')].slice(0, 8)
        .filter((image) => !image.naturalWidth).length""")
    assert not broken, f"{broken} pictures are missing without a network"
    page.context.set_offline(False)
    print("without a network: search and pictures work")


def times(page, address: str) -> None:
    """Prints the seconds from the address to the first result, and the median of ten queries in milliseconds."""
    from playwright.sync_api import expect

    start = time.monotonic()
    page.goto(address)
    expect(page.locator("#heading")).to_contain_text("gambar", timeout=WAIT)
    page.locator("#words").fill("kucing")
    page.locator("#words").press("Enter")
    expect(page.locator("#heading")).to_contain_text("“kucing”", timeout=WAIT)
    first = time.monotonic() - start
    page.locator("body[data-ready=all]").wait_for(state="attached", timeout=WAIT)
    print(f"first result after {first:.1f} s, everything loaded after {time.monotonic() - start:.1f} s")
    took = page.evaluate(f"""async () => {{ {IN_PAGE} const took = []
        for (let i = 0; i < 11; i++) {{
            const start = performance.now()
            await app.textVector(`seekor anjing cokelat berlari di tepi pantai ${{i}}`)
            took.push(performance.now() - start)
        }}
        return took.slice(1) }}""")
    print(f"a query takes {statistics.median(took):.0f} ms")


def main() -> None:
    from playwright.sync_api import sync_playwright

    shots = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp())
    shots.mkdir(parents=True, exist_ok=True)
    python, hosts = os.environ.get("CLIPID_PYTHON", sys.executable), set()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        target = Path(sys.argv[2]).resolve() if sys.argv[2:] else place / "bawah" / "halaman"
        if not target.is_dir():
            code = f"from clipid_utils.inference.page import write_page; write_page({str(target)!r})"
            subprocess.run([python, "-c", code], cwd=ROOT, check=True)
        total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        print(f"{target}: {total / 1e6:.1f} MB")
        assert total <= 60e6, "more than 60 MB"
        model = json.loads((target / "page.json").read_text(encoding="utf-8"))["model"]
        subprocess.run([python, __file__, "--reference", folder, model], cwd=ROOT, check=True,
                       env=os.environ | {"PYTHONPATH": str(ROOT)})
        known = json.loads((place / "reference.json").read_text(encoding="utf-8"))
        server, address = serve(target.parent)
        address += f"/{target.name}/"
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
            page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="id-ID")
            errors: list[str] = []
            page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            times(page, address)
            page.goto("about:blank")
            page.goto(address)
            page.locator("body[data-ready=all]").wait_for(state="attached", timeout=WAIT)
            keyboard(page)
            use(page, known, shots)
            offline(page)
            compare(page, known)
            browser.close()
        server.shutdown()
        assert not errors, errors
        assert hosts - {""} == {urlsplit(address).netloc}, f"requests went to {hosts}"
        print(f"all requests went to 127.0.0.1; screenshots: {shots}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reference"]:
        reference(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
