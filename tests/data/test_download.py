"""Downloading pictures: from a server on this machine that fails in every way, killed, interrupted and resumed."""

import asyncio
import hashlib
import io
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from email.utils import formatdate
from ipaddress import IPv6Address
from pathlib import Path

import anyio
import httpcore2
import picture_server
import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture_server import KINDS, PUBLIC, Near, PictureServer, bomb, client_tls, picture, resolve
from PIL import ExifTags, Image

from clipid_utils.__main__ import main
from clipid_utils.data.captions import read_captions
from clipid_utils.data.download import download as module
from clipid_utils.data.download.addresses import NotPublic, PublicNetwork, is_public
from clipid_utils.data.download.download import Manifest, download, read_urls
from clipid_utils.data.download.fetcher import MOST_SILENCES, Hosts, Limits, Refused, parse_url, retry_after, to_jpeg

# Seconds that a stall of a busy machine does not use up: only what a test is about is to be too late
FAST = dict(interval=0.0, per_host=8, tries=2, backoff=0.2, seconds=30.0, silence=30.0, patience=5.0,
            most_bytes=1_000_000)
LATE = 6.0  # seconds after which the run of 5,000 gives up


@pytest.fixture(scope="module")
def server():
    with PictureServer() as server:
        yield server


def rows_of(urls: list) -> list[dict]:
    return [{"url": url, "captions": [f"gambar {row}"], "source": "uji", "split": "train", "row": row}
            for row, url in enumerate(urls)]


def fetch(urls: list, folder: Path, near: Near | None = None, tls=None, **limits):
    return download(iter(rows_of(urls)), folder, limits=Limits(**{**FAST, **limits}), progress=False, tls=tls,
                    network=PublicNetwork(resolve, near or Near()))


def manifest(folder: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({line["row"] for line in lines}) == len(lines)
    return {line["row"]: line for line in lines}


# Whole runs

def whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def start(server: PictureServer, count: int, folder: Path, **limits) -> subprocess.Popen:
    command = [sys.executable, picture_server.__file__, json.dumps(server.ports), str(count), str(folder),
               json.dumps({**FAST, **limits})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop_at(process: subprocess.Popen, lines: int, folder: Path, how: signal.Signals) -> None:
    process.stdout.readline()
    while len(whole_lines(folder / "manifest.jsonl")) < lines:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(how)


@pytest.mark.slow
def test_five_thousand_urls_with_every_fault_killed_twice_and_resumed(server, tmp_path):
    rows, final, before = picture_server.rows(server.ports, 5000), {}, server.asked.copy()
    assert {row["url"].split("/")[3] for row in rows if ".test:" in row["url"]} >= KINDS.keys()
    # What does not answer or end is given up while the others are in work, of which none takes so long
    limits = dict(seconds=LATE, silence=LATE)
    for lines in (1200, 3000):
        process = start(server, len(rows), tmp_path, **limits)
        stop_at(process, lines, tmp_path, signal.SIGKILL)
        process.communicate()
        for path in (tmp_path / "pictures").rglob("*.jpg"):
            with Image.open(path) as image:
                image.load()  # no half-written picture
        done = [json.loads(line) for line in whole_lines(tmp_path / "manifest.jsonl")]
        assert len(done) >= lines and all((tmp_path / line["path"]).exists() for line in done if line["path"])
        final |= {line["url"]: server.asked[asked(line["url"])] for line in done if line["status"] != "failed"}
    process = start(server, len(rows), tmp_path, **limits)
    output, errors = process.communicate()
    assert process.returncode == 0, errors

    found = manifest(tmp_path)
    assert sorted(found) == list(range(5000))  # no row lost; none doubled, as manifest() sees to
    for row, line in zip(rows, (found[number] for number in range(5000)), strict=True):
        assert {key: line[key] for key in row} == row
        status, reason = picture_server.expected(row["url"])
        assert line["status"] == status and (line["error"] or "").startswith(reason or ""), line
        if status == "kept":
            assert line["width"] <= 597 and line["height"] <= 512 and len(line["sha256"]) == 64
            kind, number = row["url"].split("/")[3:]
            if kind == "ok":
                assert line["sha256"] == hashlib.sha256(picture(int(number))).hexdigest()
                assert line["bytes"] == len(picture(0)) and (line["width"], line["height"]) == (96, 64)
            if kind == "turned":
                assert (line["width"], line["height"]) == (64, 96)
                with Image.open(tmp_path / line["path"]) as image:  # upright: blue is above, red below
                    assert image.size == (64, 96) and not image.getexif()
                    assert image.getpixel((32, 20))[2] > 200 and image.getpixel((32, 76))[0] > 200
    kept = [number for number in range(5000) if found[number]["status"] == "kept"]
    records = read_captions(tmp_path / "captions.jsonl")
    assert records["captions"] == [rows[number]["captions"] for number in kept]
    assert records["image_path"] == [str(tmp_path / found[number]["path"]) for number in kept]
    assert output.splitlines()[1] == f"5,000 read, {len(kept):,} kept, {5000 - len(kept):,} dropped"

    # What was done was not asked for again, and of the rest at most what two kills found in work
    counts = server.asked - before
    assert all(server.asked[asked(url)] == count for url, count in final.items() if ".test:" in url)
    good = {key: count for key, count in counts.items() if "/ok/" in key and key.startswith("h")}
    assert sum(good.values()) - len(good) <= 2 * Limits().connections
    assert not (tmp_path / ".parts").exists() and not (tmp_path / ".index").exists()


def asked(url: str) -> str:
    """The key under which the server counts a URL."""
    host, _, path = url.partition("://")[2].partition("/")
    return f"{host.split(':')[0]}/{path}"


def test_ctrl_c_ends_cleanly_and_the_next_run_goes_on(server, tmp_path):
    process = start(server, 1200, tmp_path)  # "mute" is waited for a minute, however late the signal comes
    stop_at(process, 20, tmp_path, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert errors.strip().splitlines()[-1] == "interrupted"
    assert (tmp_path / "manifest.jsonl").read_bytes().endswith(b"\n") and not (tmp_path / ".parts").exists()
    seen, before = manifest(tmp_path), server.asked.copy()
    rows = [row for row in picture_server.rows(server.ports, 1200)
            if "/drip/" not in row["url"] and "/mute/" not in row["url"]]
    download(iter(rows), tmp_path, limits=Limits(**FAST), progress=False, network=PublicNetwork(resolve, Near()))
    assert sorted(manifest(tmp_path)) == [row["row"] for row in rows]
    assert all(server.asked[asked(line["url"])] == before[asked(line["url"])]
               for line in seen.values() if line["status"] != "failed")


def test_only_what_failed_is_tried_again(server, tmp_path):
    kinds = ["ok", "gone", "html", "down", "loopback"]
    urls = [server.url(kind, 20) for kind in kinds]
    first = fetch(urls, tmp_path)
    assert first.kept == 1 and first.dropped == {"answer 404": 1, "HTML": 1, "answer 500 (may pass)": 1,
                                                 "no public address": 1}
    asked_first = [server.asked[asked(url)] for url in urls]
    assert asked_first == [1, 1, 1, 2, 1]  # a 500 twice, as FAST has two tries; a 404 once
    again = fetch(urls, tmp_path)
    assert (again.kept, again.dropped) == (first.kept, first.dropped)
    assert [server.asked[asked(url)] for url in urls] == [1, 1, 1, 4, 1]


def test_the_wait_before_another_try_doubles_with_jitter(server, tmp_path, monkeypatch):
    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    url = server.url("down", 25)
    fetch([url], tmp_path, tries=8, backoff=3.0)
    assert server.asked[asked(url)] == 8 and len(waits) == 7  # none after the last try
    jitter = [wait / (3.0 * 2**number) for number, wait in enumerate(waits)]
    assert 0.5 <= min(jitter) < max(jitter) <= 1.5


def test_a_url_is_fetched_once_however_many_rows_name_it_and_twins_show_in_the_manifest(server, tmp_path):
    one, gone = server.url("ok", 30), server.url("gone", 30)
    fetch([one, gone, f" {one}#part", server.url("same", 1), server.url("same", 2), gone, one], tmp_path)
    fetch([one, gone, f" {one}#part", server.url("same", 1), server.url("same", 2), gone, one, one], tmp_path)
    assert server.asked[asked(one)] == server.asked[asked(gone)] == 1
    lines = manifest(tmp_path)
    assert [lines[row]["path"] for row in (2, 6, 7)] == [lines[0]["path"]] * 3 and lines[5]["status"] == "refused"
    assert [lines[row]["tries"] for row in range(8)].count(0) == 4
    assert len(read_captions(tmp_path / "captions.jsonl")) == 6
    twins = [line["url"] for line in lines.values() if line["row"] in (3, 4)]
    assert twins[0] != twins[1] and lines[3]["sha256"] == lines[4]["sha256"] != lines[0]["sha256"]


def test_the_same_url_waiting_behind_itself_is_not_fetched_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AHEAD", 1)
    url = server.url("ok", 35)
    assert fetch([url] * 4, tmp_path).kept == 4 and server.asked[asked(url)] == 1


def test_rows_are_read_only_as_they_are_needed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AHEAD", 20)
    started, most = sum(server.asked.values()), 0

    def rows():
        nonlocal most
        for row in rows_of([server.url("ok", 100 + number) for number in range(300)]):
            yield row
            most = max(most, row["row"] - (sum(server.asked.values()) - started))

    download(rows(), tmp_path, limits=Limits(**FAST), progress=False, network=PublicNetwork(resolve, Near()))
    assert 0 < most <= 20


def test_pictures_are_decoded_outside_the_loop(server, tmp_path, monkeypatch):
    loops = []

    def watched(*args):
        try:
            loops.append(asyncio.get_running_loop())
        except RuntimeError:
            loops.append(None)
        return to_jpeg(*args)

    monkeypatch.setattr(module, "to_jpeg", watched)
    fetch([server.url("ok", number) for number in range(5)], tmp_path)
    assert loops == [None] * 5


# What is sent, and to whom

def test_it_says_who_it_is_and_sends_no_cookies(server, tmp_path):
    server.headers.clear()
    download(iter(rows_of([server.url("cookie", number) for number in range(20)])), tmp_path, contact="a@b.id",
             limits=Limits(**FAST), progress=False, network=PublicNetwork(resolve, Near()))
    assert len(server.headers) == 20
    for headers in server.headers:
        assert headers["user-agent"].startswith("clip-indonesian/") and headers["user-agent"].endswith("; a@b.id)")
        assert headers["host"] == f"cookie.test:{server.port}" and "cookie" not in headers


@pytest.mark.parametrize("url", [
    "http://127.0.0.1/a.jpg", "http://127.1/a.jpg", "http://2130706433/a.jpg", "http://0x7f.0.0.1/a.jpg", "http://[::1]/",
    "http://[::ffff:127.0.0.1]/", "http://0.0.0.0/", "http://localhost/", "http://intranet.test/", "http://six.test/",
    "http://169.254.169.254/latest/meta-data", "https://10.0.0.1/a.jpg", "http://user:word@192.168.0.1/",
])
def test_no_connection_is_made_to_addresses_that_are_not_public(url, tmp_path):
    near = Near()
    report = fetch([url], tmp_path, near)
    assert report.dropped == {"no public address": 1} and near.wanted == []


@pytest.mark.parametrize("kind", ["loopback", "private", "metadata", "file", "badhop"])
def test_redirects_are_checked_too(server, kind, tmp_path):
    near = Near()
    report = fetch([server.url(kind, 40)], tmp_path, near)
    assert report.dropped == {KINDS[kind][1]: 1} and near.wanted == [PUBLIC]


def test_the_address_that_is_checked_is_the_one_that_is_connected_to():
    """DNS rebinding: the name's answer changes from one look-up to the next."""
    answers = iter([["10.0.0.1", PUBLIC], ["127.0.0.1"], [PUBLIC]])

    class Noted(httpcore2.AsyncNetworkBackend):
        async def connect_tcp(self, host, *args):
            return host

    async def connect(network):
        return await network.connect_tcp("rebind.test", 80)

    network = PublicNetwork(lambda host, port: next(answers), Noted())
    assert anyio.run(connect, network) == PUBLIC  # its one public address, not the other
    with pytest.raises(NotPublic, match="rebind.test is 127.0.0.1"):
        anyio.run(connect, network)
    assert anyio.run(connect, network) == PUBLIC and next(answers, None) is None  # one look-up a connection


def test_the_next_address_is_tried_where_one_does_not_answer():
    class Deaf(httpcore2.AsyncNetworkBackend):
        async def connect_tcp(self, host, *args):
            if host != "9.9.9.9":
                raise httpcore2.ConnectError(f"{host} refused")
            return host

    network = PublicNetwork(lambda host, port: ["8.8.8.8", "8.8.4.4", "9.9.9.9"], Deaf())
    assert anyio.run(network.connect_tcp, "many.test", 80) == "9.9.9.9"
    network = PublicNetwork(lambda host, port: ["8.8.8.8", "8.8.4.4"], Deaf())
    with pytest.raises(httpcore2.ConnectError, match="8.8.4.4"):
        anyio.run(network.connect_tcp, "many.test", 80)


def test_certificates_are_verified_against_the_name_of_the_url(tmp_path):
    with PictureServer() as server:
        urls = [server.url("ok", number, host=host, tls=True) for number, host in enumerate(("picture", "other"))]
        assert fetch(urls, tmp_path / "a", tls=client_tls()).kept == 1
        lines = manifest(tmp_path / "a")
        assert lines[0]["status"] == "kept" and lines[1]["error"].startswith("certificate: Hostname mismatch")
        assert fetch(urls, tmp_path / "b").dropped == {"certificate (may pass)": 2}
    assert [headers["host"].split(":")[0] for headers in server.headers] == ["picture.test"]


def networks(*texts: str) -> st.SearchStrategy:
    return st.one_of([st.ip_addresses(network=text) for text in texts])


# IANA's registries of special addresses, as of 2025
NOT_PUBLIC = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/29",
    "192.0.0.8/32", "192.0.0.170/31", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
    "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "255.255.255.255/32",
    "::/128", "::1/128", "100::/64", "2001::/32", "2001:2::/48", "2001:10::/28", "2001:db8::/32", "3fff::/20",
    "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8", "::7f00:0/104", "64:ff9b:1::/48",
)


@given(networks(*NOT_PUBLIC))
def test_special_addresses_are_not_public(address):
    assert not is_public(address)


@given(networks("8.0.0.0/8", "93.184.0.0/16", "142.250.0.0/15", "2606:4700::/32", "2a00:1450::/32", "2404:6800::/32"))
def test_addresses_of_hosts_are_public(address):
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_an_ipv6_address_is_as_public_as_the_ipv4_address_in_it(address):
    number = int(address)
    mapped, translated = IPv6Address(0xFFFF << 32 | number), IPv6Address((0x64FF9B << 96) | number)
    tunnelled = IPv6Address(0x2002 << 112 | number << 80 | 1)
    assert is_public(mapped) == is_public(translated) == is_public(tunnelled) == is_public(address)


@given(st.ip_addresses())
def test_what_python_knows_to_be_special_is_never_public(address):
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    special = address.is_private or address.is_loopback or address.is_link_local or address.is_multicast
    if (special or address.is_reserved or address.is_unspecified) and not inner and address not in NAT64:
        assert not is_public(address)


NAT64 = ipaddress.ip_network("64:ff9b::/96")


@given(st.one_of(st.text(), st.text().map("http://".__add__), st.none(), st.integers()))
def test_any_text_is_a_url_of_http_or_refused(text):
    try:
        url = parse_url(text)
    except Refused as error:
        assert error.args[0] in ("no URL", "neither http nor https")
    else:
        assert url.scheme in ("http", "https") and url.host


# Turns and limits

def test_a_host_is_asked_by_few_at_once_and_at_intervals():
    limits = Limits(per_host=2, interval=0.03, connections=3)
    at_once, most, starts, full = Counter(), Counter(), {"a": [], "b": []}, None

    async def visit(hosts: Hosts, name: str) -> None:
        async with hosts.turn(name) as host:
            starts[name].append(host.free_at)
            at_once[name] += 1
            most[name], most["all"] = max(most[name], at_once[name]), max(most["all"], at_once.total())
            if at_once.total() == limits.connections:
                full.set()
            await full.wait()  # however slow the machine is
            await anyio.sleep(0.05)
            at_once[name] -= 1

    async def run() -> None:
        nonlocal full
        hosts, full = Hosts(limits), anyio.Event()
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for number in range(12):
                    group.start_soon(visit, hosts, "ab"[number % 2])

    anyio.run(run)
    assert most.pop("all") == 3 and max(most.values()) == 2
    for times in starts.values():  # from when on the host is free again; a clock read here would be late now and then
        assert all(later - earlier > 0.999 * limits.interval for earlier, later in zip(times, times[1:], strict=False))


def test_retry_after_keeps_everyone_away_from_the_host(server, tmp_path):
    server.when.pop("busy.test", None)
    assert fetch([server.url("busy", 50 + number) for number in range(4)], tmp_path, per_host=1).kept == 4
    first, *others = server.when["busy.test"]
    assert len(others) == 7 and all(later - first >= 0.99 for later in others)


def test_a_host_that_asks_for_too_much_patience_is_left_for_another_run(server, tmp_path):
    server.when.pop("later.test", None)
    report = fetch([server.url("later", number) for number in range(60, 70)], tmp_path, per_host=1)
    assert report.dropped == {"answer 503 (may pass)": 1, "host asks to wait (may pass)": 9}
    assert len(server.when["later.test"]) == 1


def test_a_host_that_takes_no_connection_is_not_asked_for_ever(tmp_path):
    looked = []

    def nowhere(host, port):
        looked.append(host)
        return resolve(host, port)

    # More tries than connections that are made to it: with fewer, a row may use up its own before the others begin
    limits = Limits(**{**FAST, "backoff": 0.0, "per_host": 1, "tries": MOST_SILENCES + 1})
    report = download(iter(rows_of([f"http://nowhere.test/{number}" for number in range(30)])), tmp_path,
                      limits=limits, progress=False, network=PublicNetwork(nowhere, Near()))
    assert report.dropped == {"host is silent (may pass)": 30} and len(looked) == MOST_SILENCES


@pytest.mark.parametrize("header, seconds", [
    ("17", 17.0), (" 0 ", 0.0), ("", None), ("soon", None), ("-3", None), ("1.5", None),
    (formatdate(0, usegmt=True), 0.0), ("Mon, 99 Foo 2020 00:00:00 GMT", None),
])
def test_retry_after_is_read(header, seconds):
    assert retry_after(header) == seconds


def test_retry_after_can_be_a_date():
    assert 3000 < retry_after(formatdate(time.time() + 3600, usegmt=True)) <= 3600


@pytest.mark.parametrize("kind, limit", [("drip", "seconds"), ("mute", "silence")])
def test_an_answer_that_does_not_end_or_does_not_come_is_too_late(server, kind, limit, tmp_path):
    assert fetch([server.url(kind, 80)], tmp_path, **{limit: 1.0}).dropped == {"too late (may pass)": 1}
    assert manifest(tmp_path)[0]["tries"] == 2


# What is kept

def jpeg_of(image: Image.Image, kind: str = "PNG", most: int = 10**6, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    made, width, height = to_jpeg(file.getvalue(), most)
    opened = Image.open(io.BytesIO(made))
    assert opened.format == "JPEG" and opened.mode == "RGB" and opened.size == (width, height)
    return opened


@pytest.mark.parametrize("size, kept", [((511, 700), (511, 700)), ((512, 512), (512, 512)), ((1024, 768), (683, 512)),
                                        ((600, 900), (512, 768)), ((3, 900), (3, 900))])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_short_side_is_brought_to_512_and_never_enlarged(size, kept, kind):
    assert jpeg_of(Image.new("RGB", size), kind).size == kept


def test_pictures_are_kept_upright_on_white_and_without_what_the_camera_wrote():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Artist] = 6, "Seseorang"
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))  # the left half, which is above once it stands upright
    made = jpeg_of(image, "JPEG", exif=exif, comment=b"rahasia", quality=95)
    assert made.size == (20, 40) and made.getpixel((10, 5))[2] > 200 and made.getpixel((10, 35))[0] > 200
    assert not made.getexif() and "comment" not in made.info
    clear = jpeg_of(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    assert min(clear.getpixel((4, 4))) > 250


def test_of_an_animation_the_first_frame_is_kept():
    made = to_jpeg(picture(0, kind="GIF", frames=3), 10**6)[0]
    with Image.open(io.BytesIO(made)) as image, Image.open(io.BytesIO(picture(0, kind="GIF"))) as first:
        assert image.getpixel((48, 40)) != (0, 0, 0)
        assert max(abs(a - b) for a, b in zip(image.getpixel((48, 40)), first.convert("RGB").getpixel((48, 40)),
                                              strict=True)) < 30


@pytest.mark.parametrize("file, reason", [
    (bomb(1001, 1000), "too many pixels"), (bomb(100_000, 100_000), "too many pixels"),
    (picture(0, kind="PNG")[:-1000], "broken picture"), (picture(0)[:1200], "broken picture"),
    (picture_server.SVG, "SVG"), (b"\xef\xbb\xbf <svg/>", "SVG"), (picture_server.HTML, "HTML"),
    (b"GIF89a", "no picture"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
    (b"\x00" * 50, "no picture"),
])
def test_what_is_no_picture_is_refused_with_the_reason(file, reason):
    with pytest.raises(Refused) as error:
        to_jpeg(file, 10**6)
    assert error.value.args[0] == reason


@given(st.binary(max_size=200), st.integers(0, 3))
def test_any_bytes_are_a_picture_or_refused(noise, kind):
    file = picture(0, kind=["JPEG", "PNG", "GIF", "WEBP"][kind])
    for broken in (noise, file[: len(noise) * 8] + noise + file[len(noise) * 9 :]):
        try:
            assert to_jpeg(broken, 10**6)[0].startswith(b"\xff\xd8")
        except Refused as error:
            assert error.args[0] in ("broken picture", "no picture", "SVG", "HTML", "too many pixels")


# The manifest

LINES = [{"row": row, "url": f"http://a.test/{row}", "captions": ["anak \ud83d" if row == 3 else "ä"], "status": status}
         for row, status in enumerate(["kept", "failed", "refused", "kept", "kept"])]


@given(st.integers(0, 500))
def test_a_manifest_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "manifest.jsonl"
    with Manifest(path) as manifest:
        for line in LINES:
            manifest.add(line)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    left = whole[:cut].count(b"\n")
    with Manifest(path) as manifest:
        assert list(manifest.lines()) == [line for line in LINES[:left] if line["status"] != "failed"]
        for line in LINES[left:]:
            assert not manifest.has(line)
            manifest.add(line)
        assert [line["row"] for line in manifest.lines()] == [n for n in range(5) if n != 1 or left < 2]


def test_what_is_wrong_with_a_manifest_or_with_rows_is_named(server, tmp_path):
    fetch([server.url("ok", 70)], tmp_path)
    with pytest.raises(ValueError, match=r"manifest.jsonl: row 0 has another url"):
        fetch([server.url("ok", 71)], tmp_path)
    twice = rows_of([server.url("ok", 72)] * 2)
    with pytest.raises(ValueError, match="row 1 comes twice"):
        download([{**row, "row": 1} for row in twice], tmp_path, limits=Limits(**FAST), progress=False,
                 network=PublicNetwork(resolve, Near()))
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"{oops\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"manifest.jsonl:1: no JSON"):
        fetch([server.url("ok", 70)], tmp_path)


def test_two_downloads_do_not_write_to_one_folder(server, tmp_path):
    def rows():
        with pytest.raises(RuntimeError, match="another download writes here"):
            fetch([server.url("ok", 73)], tmp_path)
        yield from rows_of([server.url("ok", 74)])

    assert download(rows(), tmp_path, limits=Limits(**FAST), progress=False,
                    network=PublicNetwork(resolve, Near())).kept == 1


def test_rows_without_a_caption_are_left_out_of_the_records(server, tmp_path):
    rows = rows_of([server.url("ok", 75), server.url("ok", 76)])
    rows[0]["captions"] = ["", " "]
    report = download(rows, tmp_path, limits=Limits(**FAST), progress=False, network=PublicNetwork(resolve, Near()))
    assert report.kept == 1 and report.dropped == {"no caption": 1}
    assert read_captions(tmp_path / "captions.jsonl")["captions"] == [["gambar 1"]]


def test_urls_are_read_from_json_lines_and_bad_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"url": "http://a.test/1", "captions": ["a"]}\n{"url": "b", "captions": ["b"], "row": 7}\n')
    assert [(row["row"], row["url"]) for row in read_urls(path)] == [(0, "http://a.test/1"), (7, "b")]
    good = '{"url": "http://a.test/1", "captions": ["a"]}\n'
    path.write_text(f"\ufeff{good}\n{good}", encoding="utf-8")
    assert [row["row"] for row in read_urls(path)] == [0, 2]
    # What would show only after the last download, as a caption of single letters or an error without a line
    wrong = ('"captions": "a cat"', '"captions": null', '"captions": [3]', '"captions": [], "row": null',
             '"captions": [], "row": -1', '"captions": [], "source": 3', '"captions": ["\xff"]')
    for bad in ("{", '["a"]', '{"captions": ["a"]}', *(f'{{"url": "http://a.test/2", {text}}}' for text in wrong)):
        path.write_bytes((good + bad).encode("latin1"))
        with pytest.raises(ValueError, match=r"rows.jsonl:2: no row"):
            list(read_urls(path))


def test_half_a_character_in_a_caption_does_not_end_a_run(server, tmp_path):
    rows = rows_of([server.url("ok", 77)])
    rows[0]["captions"] = ["anak \ud83d", "\ud83d"]
    download(rows, tmp_path, limits=Limits(**FAST), progress=False, network=PublicNetwork(resolve, Near()))
    assert read_captions(tmp_path / "captions.jsonl")["captions"] == [["anak "]]


def test_the_manifest_is_on_the_disk_before_it_takes_the_place_of_the_last(tmp_path, monkeypatch):
    with Manifest(tmp_path / "manifest.jsonl") as manifest:
        manifest.add(LINES[0])
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(module.os, "fsync", lambda *args: done.append("fsync") or fsync(*args))
    monkeypatch.setattr(module.os, "replace", lambda *args: done.append("replace") or replace(*args))
    with Manifest(tmp_path / "manifest.jsonl"):
        assert done == ["fsync", "replace"]


def test_the_command_downloads_a_list_and_says_what_became_of_it(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"url": "http://localhost/1.jpg", "captions": ["a"]}\n{"url": "ftp://b/", "captions": ["b"]}\n')
    monkeypatch.setattr(sys, "argv", ["clipid_utils", "download", str(rows), str(tmp_path / "out"), "--per-host", "1"])
    main()
    assert capsys.readouterr().out.startswith("2 read, 0 kept, 2 dropped\n       1 no public address\n")
    assert {line["status"] for line in manifest(tmp_path / "out").values()} == {"refused"}


@pytest.mark.parametrize("text, message", [(None, "rows.jsonl"), ("{", "rows.jsonl:1: no row")])
def test_what_is_wrong_with_the_list_is_one_line(text, message, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    if text is not None:
        rows.write_text(text)
    monkeypatch.setattr(sys, "argv", ["clipid_utils", "download", str(rows), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=message):
        main()
