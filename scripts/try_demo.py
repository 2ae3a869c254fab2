"""Starts `clipid demo` and uses it in Chromium as a person does: it types, drops pictures and reads the answers.

    python scripts/try_demo.py SHOTS [FOLDER]   # screenshots go to SHOTS; FOLDER has the pictures to search

It needs playwright and Chromium, which no extra installs; CLIPID_PYTHON names a Python with this package if it is not
the one that runs this. If an assertion fails, its message says which answer was wrong. No request may leave 127.0.0.1.
"""

import base64
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

from playwright.sync_api import Locator, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
WAIT = 180_000  # ms; the first answer of each kind compiles a program
DROP = """({ bytes, name, type }) => {
    const data = new DataTransfer()
    data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, { type }))
    return data
}"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder: Path, port: int) -> subprocess.Popen:
    """The demo in a process of its own, when its page answers."""
    python = os.environ.get("CLIPID_PYTHON", sys.executable)
    demo = subprocess.Popen([python, "-m", "clipid_utils", "demo", folder, "--port", str(port)], cwd=ROOT)
    for _ in range(300):
        time.sleep(1)
        if demo.poll() is not None:
            raise SystemExit(f"the demo ended with status {demo.returncode}")
        try:
            urlopen(f"http://127.0.0.1:{port}").close()
            return demo
        except OSError:
            continue
    demo.kill()
    raise SystemExit("no page after 5 minutes")


def drop(tab: Locator, name: str, content: bytes) -> None:
    """Drops a file on the tab's empty picture area, as a mouse does."""
    file = {"bytes": base64.b64encode(content).decode(), "name": name, "type": "image/jpeg"}
    data = tab.page.evaluate_handle(DROP, file)
    tab.get_by_text("Letakkan gambar di sini").dispatch_event("drop", {"dataTransfer": data})


def found(page: Page, label: str) -> list[str]:
    """The captions of the results, once they are those of the query."""
    results = page.locator("#results")
    expect(results).to_contain_text(label, timeout=WAIT)
    return results.locator(".caption-label").all_inner_texts()


def toast(page: Page, words: str) -> None:
    """Waits for a message and closes it."""
    message = page.get_by_test_id("toast-body").filter(has_text=words)
    expect(message).to_be_visible(timeout=WAIT)
    message.get_by_test_id("toast-close").click()
    expect(message).to_be_hidden()


def use(page: Page, folder: Path, shots: Path) -> None:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png", ".webp"))
    tabs = {name: page.get_by_role("tabpanel").filter(has_text=word) for name, word in
            (("search", "Kata yang dicari"), ("labels", "Label sendiri"), ("heat", "Frasa"))}

    def shot(name: str) -> None:
        page.wait_for_timeout(1000)  # pictures fade in
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(500)
            page.screenshot(path=shots / f"{name}-{width}.png", full_page=True)
        page.set_viewport_size({"width": 1280, "height": 900})

    tab = tabs["search"]
    shot("1-start")
    tab.get_by_role("button", name="Cari").click()
    toast(page, "Tulis kata yang dicari")
    query = tab.get_by_label("Kata yang dicari")
    query.fill("bangunan tua")
    query.press("Enter")
    words = found(page, "Hasil untuk “bangunan tua”")
    assert len(words) == 12 and all(re.match(r"-?\d,\d\d · \S", caption) for caption in words), words
    tab.get_by_role("button", name="kucing tidur").click()
    cats = found(page, "Hasil untuk “kucing tidur”")
    assert cats != words, "two queries have the same results"
    print("kucing tidur:", *cats[:3], sep="\n  ")
    shot("2-words")
    query.fill("\N{CAT FACE}")
    query.press("Enter")
    toast(page, "Model tidak mengenal")
    query.fill("")
    drop(tab, "rusak.jpg", b"\xff\xd8\xff no picture")
    toast(page, "tidak dapat dibaca")
    tab.get_by_label("Remove Image").click()
    example = pictures[len(pictures) // 2]
    drop(tab, example.name, example.read_bytes())
    alike = found(page, "Hasil untuk gambar")
    assert example.relative_to(folder).as_posix() in alike[0] and alike[0].startswith("1,00"), alike[:3]
    query.fill("kucing tidur")
    query.press("Enter")
    both = found(page, "Hasil untuk “kucing tidur” dan gambar")
    assert both not in (cats, alike), "a picture with words has the results of one of them"
    print(f"kucing tidur, and {example.name}:", *both[:3], sep="\n  ")
    shot("3-both")

    page.get_by_role("tab", name="Tebak isi").click()
    tab = tabs["labels"]
    cat = folder / "cat.webp" if (folder / "cat.webp").is_file() else example
    drop(tab, cat.name, cat.read_bytes())
    answer = tab.get_by_test_id("label-output-value")
    expect(answer).to_be_visible(timeout=WAIT)
    print(f"{cat.name} among 1,000 names: {answer.inner_text()}")
    assert tab.locator(".confidence-set").count() == 5
    shot("4-names")
    own = tab.get_by_label("Label sendiri, dipisahkan koma")
    own.fill("kucing")
    own.press("Enter")
    toast(page, "paling sedikit dua label")
    own.fill("kucing, bangunan,  alat musik")
    own.press("Enter")
    expect(tab.locator(".confidence-set")).to_have_count(3, timeout=WAIT)
    assert answer.inner_text() in ("kucing", "bangunan", "alat musik")
    print(f"{cat.name} among three labels: {answer.inner_text()}")
    shot("5-own-labels")

    page.get_by_role("tab", name="Peta panas").click()
    tab = tabs["heat"]
    tab.get_by_role("button", name="Buat peta").click()
    toast(page, "Letakkan sebuah gambar dan tulis frasanya")
    drop(tab, cat.name, cat.read_bytes())
    tab.get_by_label("Frasa").fill("kucing")
    maps = []
    for way in ("Tutup bagian gambar satu per satu", "Bandingkan tiap petak"):
        tab.get_by_label(way).check()
        tab.get_by_role("button", name="Buat peta").click()
        drawn = tab.locator("img[src^='data:image']")
        expect(drawn).to_be_visible(timeout=WAIT)
        if maps:
            expect(drawn).not_to_have_attribute("src", maps[0], timeout=WAIT)
        maps.append(drawn.get_attribute("src"))
        shot(f"6-heat-{len(maps)}")


def main() -> None:
    shots = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp())
    shots.mkdir(parents=True, exist_ok=True)
    folder = Path(sys.argv[2] if sys.argv[2:] else ROOT / "data" / "cache" / "foto-contoh").resolve()
    port, hosts = free_port(), set()
    demo = start(folder, port)
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="id-ID")
            page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
            page.on("pageerror", lambda error: print("page error:", error))
            page.goto(f"http://127.0.0.1:{port}")
            expect(page.get_by_label("Kata yang dicari")).to_be_visible(timeout=WAIT)
            use(page, folder, shots)
            browser.close()
        assert hosts - {""} == {f"127.0.0.1:{port}"}, f"requests went to {hosts}"  # data: and blob: have no host
        print(f"all requests went to 127.0.0.1; screenshots: {shots}")
    finally:
        demo.terminate()
        demo.wait(30)


if __name__ == "__main__":
    main()
