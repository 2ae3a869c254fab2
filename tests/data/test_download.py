"""Downloading pictures: from a server on this machine that fails in every way, killed, interrupted and resumed."""

import asyncio
import gzip
import hashlib
import io
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from email.utils import formatdate
from ipaddress import IPv6Address
from pathlib import Path

import anyio
import httpcore2
import picture_server
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_server import KINDS, PUBLIC, Near, PictureServer, bomb, client_tls, picture, resolve, rows_of
from PIL import ExifTags, Image

from clipid_utils.__main__ import main
from clipid_utils.data.captions import read_captions
from clipid_utils.data.download import download as module
from clipid_utils.data.download.addresses import NotPublic, PublicNetwork, is_public
from clipid_utils.data.download.download import count_urls, download, read_urls
from clipid_utils.data.download.fetcher import (
    MAX_SILENCES,
    Fetcher,
    Limits,
    PermanentFailure,
    parse_url,
    retry_after,
    to_jpeg,
)
from clipid_utils.data.download.manifest import Manifest

# Long limits, so that only what a test is about is too late on a busy machine
FAST = dict(interval=0.0, per_host=8, tries=2, backoff=0.1, seconds=30.0, silence=30.0, patience=5.0,
            most_bytes=1_000_000)


@pytest.fixture(scope="module")
def server():
    with PictureServer() as server:
        yield server


def get(rows, folder: Path, near=None, tls=None, resolve=resolve, contact: str = "", **limits):
    return download(iter(rows), folder, limits=Limits(**{**FAST, **limits}), progress=False, tls=tls, contact=contact,
                    network=PublicNetwork(resolve, near or Near()))


def fetch(urls: list, folder: Path, **options):
    return get(rows_of(urls), folder, **options)


def manifest(folder: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({line["row"] for line in lines}) == len(lines)
    return {line["row"]: line for line in lines}


def asked(url: str) -> str:
    """The key under which the server counts a URL."""
    host, _, path = url.partition("://")[2].partition("/")
    return f"{host.split(':')[0]}/{path}"


# Whole runs

def test_every_fault_has_its_status_and_reason(server, tmp_path):
    kinds = [kind for kind in KINDS for _ in range(2)]
    urls = [server.url(kind, number) for number, kind in enumerate(kinds)]
    never_asked = {"ftp://a.test/1.jpg": "not http or https", "": "not http or https", "http://": "not http or https",
                   "http://10.0.0.1/1.jpg": "not a public address: 10.0.0.1", "http://\0/": "not a URL",
                   server.url("ok", 999, host="nowhere"): "connection: no address of nowhere.test",
                   server.url("ok", 999, host="deaf", port=2): "connection"}
    rows = rows_of([*urls, *never_asked])
    report = get(rows, tmp_path, silence=1.0, seconds=1.5)
    lines = manifest(tmp_path)
    assert sorted(lines) == list(range(len(rows)))
    for row, kind in enumerate(kinds):
        line, (status, reason, _) = lines[row], KINDS[kind]
        assert {key: line[key] for key in rows[row]} == rows[row]
        assert (line["status"], (line["error"] or "")[: len(reason or "")]) == (status, reason or ""), line
        twice = status == "failed" and kind != "later" or kind in ("busy", "full", "late", "early", "flaky", "dropped")
        assert line["tries"] == 1 + twice, line
    for row, reason in enumerate(never_asked.values(), len(kinds)):
        assert lines[row]["error"].startswith(reason) and not lines[row]["path"], lines[row]
    ok, turned = lines[kinds.index("ok")], lines[kinds.index("turned")]
    assert ok["sha256"] == hashlib.sha256(picture(0)).hexdigest() and ok["bytes"] == len(picture(0))
    assert (ok["width"], ok["height"]) == (96, 64) and (turned["width"], turned["height"]) == (64, 96)
    with Image.open(tmp_path / turned["path"]) as image:  # upright: blue is above, red below
        assert image.size == (64, 96) and not image.getexif()
        assert image.getpixel((32, 20))[2] > 200 and image.getpixel((32, 76))[0] > 200
    kept = [row for row in lines if lines[row]["status"] == "kept"]
    assert (report.kept, report.read) == (len(kept), len(rows))
    records = read_captions(tmp_path / "captions.jsonl")
    assert records["captions"] == [rows[row]["captions"] for row in sorted(kept)]
    assert records["image_path"] == [str(tmp_path / lines[row]["path"]) for row in sorted(kept)]


@pytest.mark.parametrize("kind", ["gzipbomb", "gzipmore", "gzipnothing", "endless"])
def test_an_answer_without_end_takes_no_more_memory_than_its_limit(server, tmp_path, kind):
    picture_server.gzip_bomb()  # made and remembered by the server, which is in this process
    tracemalloc.start()
    try:
        assert fetch([server.url(kind, 95)], tmp_path).kept == 0
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def start(urls: list, folder: Path, **limits) -> subprocess.Popen:
    command = [sys.executable, picture_server.__file__, json.dumps(urls), str(folder), json.dumps({**FAST, **limits})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop_at(process: subprocess.Popen, count: int, folder: Path, how: signal.Signals) -> list[dict]:
    """Sends a signal once the manifest has `count` lines; returns its whole lines when the process has ended."""
    path = folder / "manifest.jsonl"
    process.stdout.readline()
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(how)
    process.wait()
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.mark.slow
def test_a_run_that_is_killed_loses_and_repeats_nothing(server, tmp_path):
    urls = [server.url("down" if number % 20 == 3 else "ok", number, host=f"h{number % 8}") for number in range(300)]
    urls[200:220] = urls[:20]
    before = server.asked.copy()
    done = stop_at(start(urls, tmp_path, interval=0.02, tries=1), 100, tmp_path, signal.SIGKILL)
    for path in (tmp_path / "pictures").rglob("*.jpg"):
        with Image.open(path) as image:
            image.load()  # not a half-written picture
    assert 100 <= len(done) < 300 and all((tmp_path / line["path"]).exists() for line in done if line["path"])
    for name in ("000000299.jpg.partial", "manifest.jsonl.1.partial"):
        (tmp_path / name).write_bytes(b"half")  # a kill in the middle of a write
    final = {line["url"]: server.asked[asked(line["url"])] for line in done if line["status"] != "failed"}
    report = fetch(urls, tmp_path, tries=1)
    assert sorted(manifest(tmp_path)) == list(range(300))  # manifest() sees to it that none is doubled
    assert report.kept == sum("/ok/" in url for url in urls) and report.read == 300
    assert all(server.asked[asked(url)] == count for url, count in final.items())
    counts = {key: count for key, count in (server.asked - before).items() if "/ok/" in key}
    assert sum(counts.values()) - len(counts) <= Limits().connections  # the rows in work at the kill
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "captions.jsonl", "manifest.jsonl", "pictures"]


def test_ctrl_c_ends_cleanly_and_the_next_run_resumes(server, tmp_path):
    urls = [server.url("ok", number) for number in range(3000, 3030)]
    process = start([*urls, server.url("mute", 3030)], tmp_path)  # "mute" answers long after the signal
    seen = stop_at(process, 20, tmp_path, signal.SIGINT)
    assert process.returncode == 1 and process.stderr.read().strip().splitlines()[-1] == "interrupted"
    assert (tmp_path / "manifest.jsonl").read_bytes().endswith(b"\n") and not list(tmp_path.glob("*.partial"))
    before = server.asked.copy()
    assert fetch(urls, tmp_path).kept == 30
    assert all(server.asked[asked(line["url"])] == before[asked(line["url"])] for line in seen)


def test_only_what_failed_is_tried_again(server, tmp_path):
    kinds = ["ok", "gone", "html", "down", "loopback"]
    urls = [server.url(kind, 20) for kind in kinds]
    first = fetch(urls, tmp_path)
    assert first.kept == 1 and first.dropped == {"HTTP 404": 1, "HTML": 1, "not a public address": 1,
                                                 "HTTP 500 (may succeed later)": 1}
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
    assert server.asked[asked(url)] == 8
    waits = [wait for wait in waits if wait > 0]  # the others are no waits, but turns of the loop
    assert len(waits) == 7  # none after the last try
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
    monkeypatch.setattr(module, "ROWS_AHEAD", 1)
    url = server.url("ok", 35)
    assert fetch([url] * 4, tmp_path).kept == 4 and server.asked[asked(url)] == 1


def test_rows_are_read_only_as_they_are_needed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AHEAD", 20)
    started, most = sum(server.asked.values()), 0

    def rows():
        nonlocal most
        for row in rows_of([server.url("ok", 100 + number) for number in range(100)]):
            yield row
            most = max(most, row["row"] - (sum(server.asked.values()) - started))

    get(rows(), tmp_path)
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
    fetch([server.url("cookie", number) for number in range(20)], tmp_path, contact="a@b.id")
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
    report = fetch([url], tmp_path, near=near)
    assert report.dropped == {"not a public address": 1} and near.wanted == []


@pytest.mark.parametrize("kind", ["loopback", "private", "metadata", "file", "badhop"])
def test_redirects_are_checked_too(server, kind, tmp_path):
    near = Near()
    report = fetch([server.url(kind, 40)], tmp_path, near=near)
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
        urls = [server.url("ok", number, host, port=1) for number, host in enumerate(("picture", "other", "expired"))]
        assert fetch(urls, tmp_path / "a", tls=client_tls()).kept == 1
        assert [line["error"] and line["error"][:32] for line in map(manifest(tmp_path / "a").get, range(3))] == [
            None, "certificate: Hostname mismatch, ", "certificate: certificate has exp"]
        assert fetch(urls, tmp_path / "b").dropped == {"certificate (may succeed later)": 3}
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
@settings(max_examples=30)
def test_any_text_is_a_url_of_http_or_refused(text):
    try:
        url = parse_url(text)
    except PermanentFailure as error:
        assert error.reason in ("not a URL", "not http or https")
    else:
        assert url.scheme in ("http", "https") and url.host


# Turns and limits

def test_a_host_is_asked_by_few_at_once_and_at_intervals():
    limits = Limits(per_host=2, interval=0.03, connections=3)
    at_once, most, starts, full = Counter(), Counter(), {"a": [], "b": []}, None

    async def visit(fetcher: Fetcher, name: str) -> None:
        async with fetcher.turn(name) as host:
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
        fetcher, full = Fetcher(limits, "test", PublicNetwork()), anyio.Event()
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for number in range(12):
                    group.start_soon(visit, fetcher, "ab"[number % 2])

    anyio.run(run)
    assert most.pop("all") == 3 and max(most.values()) == 2
    for times in starts.values():  # from when on the host is free again; a clock read here would be late now and then
        assert all(later - earlier > 0.999 * limits.interval for earlier, later in zip(times, times[1:], strict=False))


@pytest.mark.parametrize("kind, seconds", [("busy", 1.0), ("full", 0.5)])  # by its Retry-After; by `backoff`
def test_an_overloaded_host_is_left_alone(server, tmp_path, kind, seconds):
    server.when.pop(f"{kind}.test", None)
    urls = [server.url(kind, 50 + number) for number in range(2)]
    assert fetch(urls, tmp_path, per_host=1, backoff=0.5).kept == 2
    first, *others = server.when[f"{kind}.test"]
    assert len(others) == 3 and all(later - first >= 0.99 * seconds for later in others)


def test_only_failed_connections_in_a_row_make_a_host_silent(server, tmp_path):
    class Moody(Near):
        async def connect_tcp(self, *arguments, **named):
            if len(self.wanted) % MAX_SILENCES != MAX_SILENCES - 1:
                self.wanted.append(PUBLIC)
                raise httpcore2.ConnectError("not now")
            return await super().connect_tcp(*arguments, **named)

    urls = [server.url("unsized", number) for number in range(90, 93)]  # after it the connection is closed
    assert fetch(urls, tmp_path, near=Moody(), tries=2 * MAX_SILENCES, per_host=1, backoff=0.0).kept == 3


def test_a_host_that_asks_for_too_much_patience_is_left_for_another_run(server, tmp_path):
    server.when.pop("later.test", None)
    report = fetch([server.url("later", number) for number in range(60, 70)], tmp_path, per_host=1)
    assert report.dropped == {"HTTP 503 (may succeed later)": 1, "host asks to wait (may succeed later)": 9}
    assert len(server.when["later.test"]) == 1


def test_a_host_that_takes_no_connection_is_not_asked_for_ever(tmp_path):
    looked = []

    def nowhere(host, port):
        looked.append(host)
        return resolve(host, port)

    # More tries than connections that are made to it: with fewer, a row may use up its own before the others begin
    report = fetch([f"http://nowhere.test/{number}" for number in range(30)], tmp_path, backoff=0.0, per_host=1,
                   tries=MAX_SILENCES + 1, resolve=nowhere)
    assert report.dropped == {"host is silent (may succeed later)": 30} and len(looked) == MAX_SILENCES


@pytest.mark.parametrize("header, seconds", [
    ("17", 17.0), (" 0 ", 0.0), ("", None), ("soon", None), ("-3", None), ("1.5", None),
    (formatdate(0, usegmt=True), 0.0), ("Mon, 99 Foo 2020 00:00:00 GMT", None),
])
def test_retry_after_is_read(header, seconds):
    assert retry_after(header) == seconds


def test_retry_after_can_be_a_date():
    assert 3000 < retry_after(formatdate(time.time() + 3600, usegmt=True)) <= 3600


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


def scans(count: int) -> bytes:
    """A progressive JPEG with many scans; each would be decoded over the whole picture."""
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "JPEG", progressive=True)
    start, end = file.getvalue()[:-2], file.getvalue()[-2:]
    return start + b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00" * (count - start.count(b"\xff\xda")) + end


@pytest.mark.parametrize("file, reason", [
    (bomb(1001, 1000), "too many pixels"), (bomb(100_000, 100_000), "too many pixels"),
    (picture(0, kind="PNG")[:-1000], "broken picture"), (picture(0)[:1200], "broken picture"),
    (picture_server.SVG, "SVG"), (b"\xef\xbb\xbf <svg/>", "SVG"), (picture_server.HTML, "HTML"),
    (b"GIF89a", "not a picture"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    (b"\x00" * 50, "not a picture"),
])
def test_what_is_no_picture_is_refused_with_the_reason(file, reason):
    with pytest.raises(PermanentFailure) as error:
        to_jpeg(file, 10**6)
    assert error.value.reason == reason


@pytest.mark.parametrize("count, refused", [(100, False), (101, True)])
def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(count, refused):
    try:
        to_jpeg(scans(count), 10**6)
        details = ""
    except PermanentFailure as error:  # the scans of the smaller one are broken too
        details = str(error)
    assert (details == "broken picture: a JPEG of more than 100 scans") is refused


@given(st.binary(max_size=200), st.integers(0, 3))
def test_any_bytes_are_a_picture_or_refused(noise, kind):
    file = picture(0, kind=["JPEG", "PNG", "GIF", "WEBP"][kind])
    for broken in (noise, file[: len(noise) * 8] + noise + file[len(noise) * 9 :]):
        try:
            assert to_jpeg(broken, 10**6)[0].startswith(b"\xff\xd8")
        except PermanentFailure as error:
            assert error.reason in ("broken picture", "not a picture", "SVG", "HTML", "too many pixels")


# The manifest

LINES = [{"row": row, "url": f"http://a.test/{row}", "captions": ["anak \ud83d" if row == 3 else "ä"], "status": status}
         for row, status in enumerate(["kept", "failed", "refused", "kept", "kept"])]


@given(st.integers(0, 500))
def test_a_manifest_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "manifest.jsonl"
    with Manifest(path) as manifest:
        for line in LINES:
            manifest.add(line, line)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    left = whole[:cut].count(b"\n")
    with Manifest(path) as manifest:
        found = [{key: line[key] for key in LINES[0]} for line in manifest.lines()]
        assert found == [line for line in LINES[:left] if line["status"] != "failed"]
        for line in LINES[left:]:
            assert not manifest.has(line)
            manifest.add(line, line)
        assert [line["row"] for line in manifest.lines()] == [n for n in range(5) if n != 1 or left < 2]


def test_what_is_wrong_with_a_manifest_or_with_rows_is_named(server, tmp_path):
    fetch([server.url("ok", 70)], tmp_path)
    with pytest.raises(ValueError, match=r"manifest.jsonl: row 1 had a different URL"):
        fetch([server.url("ok", 71)], tmp_path)
    twice = rows_of([server.url("ok", 72)] * 2)
    with pytest.raises(ValueError, match="row 2 comes twice"):
        get([{**row, "row": 1} for row in twice], tmp_path)
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"{oops\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"manifest.jsonl:1: not valid JSON.*delete the line"):
        fetch([server.url("ok", 70)], tmp_path)


def test_two_downloads_do_not_write_to_one_folder(server, tmp_path):
    def rows():
        with pytest.raises(OSError, match="another process is writing to"):
            fetch([server.url("ok", 73)], tmp_path)
        yield from rows_of([server.url("ok", 74)])

    assert get(rows(), tmp_path).kept == 1


def test_rows_without_a_caption_are_left_out_of_the_records(server, tmp_path):
    rows = rows_of([server.url("ok", 75), server.url("ok", 76)])
    rows[0]["captions"] = ["", " "]
    report = get(rows, tmp_path)
    assert report.kept == 1 and report.examples == {"empty captions": [f"row 1: {rows[0]['url']}: empty captions"]}
    assert read_captions(tmp_path / "captions.jsonl")["captions"] == [["gambar 1"]]


GOOD = '{"url": "http://a.test/1", "captions": ["a"]}\n'


@pytest.mark.parametrize("text, rows", [
    (GOOD + '{"url": "b", "captions": ["b"], "row": 7}\n', [(0, "http://a.test/1", ["a"]), (7, "b", ["b"])]),
    (f"\ufeff{GOOD}\r\n{GOOD}", [(0, "http://a.test/1", ["a"]), (2, "http://a.test/1", ["a"])]),
    (f"\ufeffhttp://a.test/2\r\n\n {GOOD} HTTPS://a.test/a?b={{}} \r\n",
     [(0, "http://a.test/2", []), (2, "http://a.test/1", ["a"]), (3, "HTTPS://a.test/a?b={}", [])]),
])
def test_urls_are_read_from_json_lines_and_plain_lines(tmp_path, text, rows):
    path = tmp_path / ("urls" if "HTTPS" in text else "rows.jsonl")
    path.write_text(text, encoding="utf-8", newline="")
    assert [(row["row"], row["url"], row["captions"]) for row in read_urls(path)] == rows
    assert count_urls(path) == len(rows)


def test_urls_are_read_from_a_folder_of_lists_of_each_kind(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("http://a.test/1\nwww.a.test/a picture.jpg\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 3))
    rows = [{"url": "http://a.test/3", "captions": ["c"]}] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "notes.md").write_text("no list")
    monkeypatch.setenv("HOME", str(tmp_path))
    for lists in (tmp_path, "~", f"{tmp_path}/*.[!m]*"):
        found = list(read_urls(lists))
        assert [row["row"] for row in found] == list(range(7)) and count_urls(lists) == 7
        assert [row["url"] for row in found[:2]] == ["http://a.test/1", "www.a.test/a picture.jpg"]
        assert found[5] == {"source": None, "split": None, "row": 5, **rows[0]}
    with pytest.raises(ValueError, match="no such file or folder"):
        next(read_urls(tmp_path / "d.txt"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(GOOD.encode())[:-4])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz:2: not gzip, or cut off"):
        count_urls(tmp_path / "b.jsonl.gz")


# These would otherwise show only after the last download, as a caption of single letters or an error without a line
@pytest.mark.parametrize("bad", ["{", '["a"]', "oops", '{"captions": ["a"]}', '{"url": "http://a.test/2"}', *(
    f'{{"url": "http://a.test/2", {text}}}' for text in (
        '"captions": "a cat"', '"captions": null', '"captions": [3]', '"captions": [], "row": null',
        '"captions": [], "row": -1', '"captions": [], "source": 3', '"captions": [], "split": 3',
        '"captions": ["\xff"]'))])
def test_a_bad_line_of_a_list_is_named(tmp_path, bad):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((GOOD + bad).encode("latin1"))
    with pytest.raises(ValueError, match=r"rows.jsonl:2: .*: write"):
        list(read_urls(path))


def test_pictures_of_a_plain_list_are_kept_without_records(server, tmp_path):
    (tmp_path / "urls.txt").write_text(f"{server.url('ok', 78)}\n{server.url('gone', 78)}\n")
    report = get(read_urls(tmp_path / "urls.txt"), tmp_path / "out")
    assert report.kept == 1 and report.examples["HTTP 404"][0].startswith("row 2: ")
    assert (tmp_path / "out" / manifest(tmp_path / "out")[0]["path"]).exists()
    assert not (tmp_path / "out/captions.jsonl").exists()


def test_half_a_character_in_a_caption_does_not_end_a_run(server, tmp_path):
    rows = rows_of([server.url("ok", 77)])
    rows[0]["captions"] = ["anak \ud83d", "\ud83d"]
    get(rows, tmp_path)
    assert read_captions(tmp_path / "captions.jsonl")["captions"] == [["anak "]]


def test_the_manifest_is_on_the_disk_before_it_takes_the_place_of_the_last(tmp_path, monkeypatch):
    with Manifest(tmp_path / "manifest.jsonl") as manifest:
        manifest.add(LINES[0], LINES[0])
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(module.os, "fsync", lambda *args: done.append("fsync") or fsync(*args))
    monkeypatch.setattr(module.os, "replace", lambda *args: done.append("replace") or replace(*args))
    with Manifest(tmp_path / "manifest.jsonl"):
        assert done == ["fsync", "replace"]


def test_the_command_that_fetches_nothing_says_why_and_exits_with_1(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"url": "http://localhost/1.jpg", "captions": ["a"]}\n{"url": "ftp://b/", "captions": ["b"]}\n')
    monkeypatch.setattr(sys, "argv", ["clipid_utils", "download", str(rows), str(tmp_path / "out"), "--per-host", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code not in (None, 0)
    assert capsys.readouterr().out.startswith("2 read, 0 kept, 2 dropped\n       1 not a public address\n")
    assert {line["status"] for line in manifest(tmp_path / "out").values()} == {"refused"}


@pytest.mark.parametrize("text, message", [(None, "rows.jsonl"), ("{", "rows.jsonl:1: not valid JSON")])
def test_what_is_wrong_with_the_list_is_one_line(text, message, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    if text is not None:
        rows.write_text(text)
    monkeypatch.setattr(sys, "argv", ["clipid_utils", "download", str(rows), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=message):
        main()
