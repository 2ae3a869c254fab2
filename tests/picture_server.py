"""A web server on this machine whose pictures fail in every way that pictures on the web do, and the way to it.

`KINDS` names the ways; `http://<anything>.test:<port>/<kind>/<number>` is answered in that way, the same each time but
for the counts of `asked`; https has a port of its own, and on a third nobody listens. Names under .test lead to PUBLIC,
a public address, which `Near` connects to this machine instead: the rule about addresses is the real one. Run as a
script, it downloads `rows` as a user's process would.
"""

import asyncio
import functools
import gzip
import io
import json
import signal
import socket
import ssl
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpcore2
import numpy as np
from PIL import ExifTags, Image

PUBLIC = "93.184.215.14"
# Made for these tests, and trusted nowhere else
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgWBJeYZLxz6Y65Npx
tMGTtYOYq6eGlQptSD8PqwqHBH+hRANCAASmG0eS7XBvmiNU38AD+tq7AZaM4Lq/
RkqXiaIF58WEBRf0LUP5psdQNeMoWqQ0N8IjCiyRD4u0k0ffK7+GBvRe
-----END PRIVATE KEY-----
"""
# For picture.test, self-signed, from 2020 to 2120
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBeTCCASCgAwIBAgIBATAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxwaWN0dXJl
LnRlc3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBcxFTATBgNV
BAMMDHBpY3R1cmUudGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKYbR5Lt
cG+aI1TfwAP62rsBlozgur9GSpeJogXnxYQFF/QtQ/mmx1A14yhapDQ3wiMKLJEP
i7STR98rv4YG9F6jWzBZMBcGA1UdEQQQMA6CDHBpY3R1cmUudGVzdDAPBgNVHRMB
Af8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4EFgQU+kV/dOhVwr02Xen9
j4uKlHtod98wCgYIKoZIzj0EAwIDRwAwRAIgBHXSudtU68uZ/qQqtjBXLdgF18vc
wh7n4APR3DYaEgwCIAEBfSvffarduKReZKu5tqmoEGNTiy0p8PRsBJFb9upp
-----END CERTIFICATE-----
"""
# For expired.test, signed by the first, of 2020
EXPIRED = """\
-----BEGIN CERTIFICATE-----
MIIBeTCCAR6gAwIBAgIBAjAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxwaWN0dXJl
LnRlc3QwHhcNMjAwMTAxMDAwMDAwWhcNMjEwMTAxMDAwMDAwWjAXMRUwEwYDVQQD
DAxleHBpcmVkLnRlc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASmG0eS7XBv
miNU38AD+tq7AZaM4Lq/RkqXiaIF58WEBRf0LUP5psdQNeMoWqQ0N8IjCiyRD4u0
k0ffK7+GBvReo1swWTAXBgNVHREEEDAOggxleHBpcmVkLnRlc3QwHwYDVR0jBBgw
FoAU+kV/dOhVwr02Xen9j4uKlHtod98wHQYDVR0OBBYEFPpFf3ToVcK9Nl3p/Y+L
ipR7aHffMAoGCCqGSM49BAMCA0kAMEYCIQC4DO7xghGOC4x/TdYHBoh5Oj5Wn587
7WUZJjr++AKrQgIhAOq7xh5w/jVHtXtd5oCFazQVVtZAh9ZFxC7OUM8sQgEv
-----END CERTIFICATE-----
"""


def resolve(host: str, port: int) -> list[str]:
    """The addresses of the names that the tests use; no other name is looked up."""
    known = {"intranet.test": "192.168.1.1", "six.test": "::1", "localhost": "127.0.0.1"}
    if host == "nowhere.test":
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    if host in known or host.endswith(".test"):
        return [known.get(host, PUBLIC)]
    return [found[4][0] for found in socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)]


class Near(httpcore2.AsyncNetworkBackend):
    """Takes connections to PUBLIC to this machine, and notes where connections were wanted."""

    def __init__(self):
        self.inner, self.wanted = httpcore2.AnyIOBackend(), []

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.wanted.append(host)
        assert host == PUBLIC, f"a connection to {host}"
        return await self.inner.connect_tcp("127.0.0.1", port, timeout, local_address, socket_options)


@functools.cache
def _file(size: tuple[int, int], kind: str, frames: int, seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    image, file = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), io.BytesIO()
    image.save(file, kind, save_all=frames > 1, append_images=[Image.new("RGB", size, "black")] * (frames - 1))
    return file.getvalue()


def picture(
    number: int, size: tuple[int, int] = (96, 64), kind: str = "JPEG", frames: int = 1, seed: int = 0
) -> bytes:
    """The file of a picture; its number follows behind its end, where no decoder looks, so that no two are the same.

    What is seen on it is the same but for another `seed`.
    """
    return _file(size, kind, frames, seed) + number.to_bytes(4)


@functools.cache
def turned() -> bytes:
    """The file of a picture of 64 x 96, blue above and red below, as a camera writes it that was held on its side."""
    exif, image, file = Image.Exif(), Image.new("RGB", (96, 64), "red"), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    image.paste("blue", (0, 0, 48, 64))
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is that large, and begins to be so."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000)))


@functools.cache
def gzip_bomb() -> bytes:
    return gzip.compress(bytes(100_000_000), 1)


def reply(body: bytes = b"", status: str = "200 OK", **headers) -> bytes:
    """An answer with its headers: content_type="…" is Content-Type."""
    headers = {"Content-Type": "image/jpeg", "Content-Length": len(body),
               **{name.replace("_", "-").title(): value for name, value in headers.items()}}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode() + body


def moved(to: str) -> bytes:
    return reply(status="302 Found", location=to)


async def drip(number: int) -> AsyncIterator[bytes]:
    yield reply(content_length=100_000)
    while True:
        await asyncio.sleep(0.2)
        yield b"x"


async def mute(number: int) -> AsyncIterator[bytes]:
    await asyncio.sleep(3600)
    yield b""


async def endless(number: int) -> AsyncIterator[bytes]:
    yield reply(content_length=None)
    while True:
        yield bytes(2**16)


def hops(number: int, most: int) -> bytes:
    """As many redirects, each to the number that is 10,000 higher, before the picture."""
    done = number // 10_000
    return moved(f"/hops{most}/{number + 10_000}" if done + 1 < most else f"/ok/{number % 10_000}")


SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
# Each kind: what becomes of it, the reason in the manifest (one of several), and its answer by number and how often it
# was asked before
KINDS = {
    "ok": ("kept", None, lambda n, asked: reply(picture(n))),
    "large": ("kept", None, lambda n, asked: reply(picture(n, (700, 600)))),
    "png": ("kept", None, lambda n, asked: reply(picture(n, kind="PNG"))),
    "webp": ("kept", None, lambda n, asked: reply(picture(n, kind="WEBP"), content_type="text/plain")),
    "gif": ("kept", None, lambda n, asked: reply(picture(n, kind="GIF", frames=2))),
    "same": ("kept", None, lambda n, asked: reply(picture(0))),
    "own": ("kept", None, lambda n, asked: reply(picture(n, seed=n))),
    "turned": ("kept", None, lambda n, asked: reply(turned() + n.to_bytes(4))),
    "secure": ("kept", None, lambda n, asked: reply(picture(n))),
    "gzipped": ("kept", None, lambda n, asked: reply(gzip.compress(picture(n)), content_encoding="gzip")),
    "unsized": ("kept", None, lambda n, asked: reply(picture(n), content_length=None)),
    "hops5": ("kept", None, lambda n, asked: hops(n, 5)),
    "busy": ("kept", None, lambda n, asked: reply(picture(n)) if asked else reply(status="429 Slow", retry_after=1)),
    "flaky": ("kept", None, lambda n, asked: reply(picture(n)) if asked else reply(status="500 Oops")),
    "dropped": ("kept", None, lambda n, asked: reply(picture(n)) if asked else b""),
    "cookie": ("kept", None, lambda n, asked: reply(picture(n), set_cookie=f"id={n}")),
    "gone": ("refused", "answer 404", lambda n, asked: reply(b"no", "404 Not Found")),
    "gone410": ("refused", "answer 410", lambda n, asked: reply(b"no", "410 Gone")),
    "forbidden": ("refused", "answer 403", lambda n, asked: reply(b"no", "403 Forbidden")),
    "svg": ("refused", "SVG", lambda n, asked: reply(SVG, content_type="image/svg+xml")),
    "html": ("refused", "HTML", lambda n, asked: reply(HTML)),
    "text": ("refused", "no picture", lambda n, asked: reply(b"no such picture")),
    "empty": ("refused", "empty", lambda n, asked: reply()),
    "cut": ("refused", "broken picture", lambda n, asked: reply(picture(n)[:1200])),
    "undersized": ("refused", "broken picture", lambda n, asked: reply(picture(n), content_length=1200)),
    "bomb": ("refused", "too many pixels", lambda n, asked: reply(bomb(8_000, 7_000))),
    "bigbomb": ("refused", "too many pixels", lambda n, asked: reply(bomb(200_000, 200_000))),
    "gzipbomb": ("refused", "too many bytes", lambda n, asked: reply(gzip_bomb(), content_encoding="gzip")),
    "brotli": ("refused", "unknown packing", lambda n, asked: reply(picture(n), content_encoding="br")),
    "badgzip": ("refused", "broken packing", lambda n, asked: reply(picture(n), content_encoding="gzip")),
    "huge": ("refused", "too many bytes", lambda n, asked: reply(content_length=10**10)),
    "endless": ("refused", "too many bytes", lambda n, asked: endless(n)),
    "loop": ("refused", "too many redirects", lambda n, asked: moved(f"/loop/{n}")),
    "hops6": ("refused", "too many redirects", lambda n, asked: hops(n, 6)),
    "loopback": ("refused", "no public address", lambda n, asked: moved(f"http://127.0.0.1/ok/{n}")),
    "private": ("refused", "no public address", lambda n, asked: moved(f"http://intranet.test/ok/{n}")),
    "metadata": ("refused", "no public address", lambda n, asked: moved("http://169.254.169.254/latest")),
    "file": ("refused", "neither http nor https", lambda n, asked: moved("file:///etc/passwd")),
    "badhop": ("refused", "no URL", lambda n, asked: moved("http://[::1")),
    "down": ("failed", "answer 500", lambda n, asked: reply(status="500 Oops")),
    "later": ("failed", None, lambda n, asked: reply(status="503 Later", retry_after=3600)),
    "reset": ("failed", "connection", lambda n, asked: b""),
    "oversized": ("failed", "connection", lambda n, asked: reply(picture(n), content_length=90_000)),
    "garbage": ("failed", "connection", lambda n, asked: b"SSH-2.0-OpenSSH_9.2p1\r\n"),
    "drip": ("failed", "too late", lambda n, asked: drip(n)),
    "mute": ("failed", "too late", lambda n, asked: mute(n)),
    # These are never asked: there is no such name, nobody listens, or the certificate is not good
    "nowhere": ("failed", ("connection: no address of nowhere.test", "host is silent"), None),
    "deaf": ("failed", ("connection", "host is silent"), None),
    "expired": ("failed", "certificate: certificate has expired", None),
    "wrongname": ("failed", "certificate: Hostname mismatch", None),
}
# Their connections end there
CLOSING = {"unsized", "dropped", "reset", "oversized", "undersized", "garbage", "huge", "drip"}


class PictureServer:
    """Serves on a free port of this machine from a thread while it is entered."""

    def __init__(self):
        self.port, self.ports, self.asked, self.headers = 0, (), Counter(), []  # ports: http's, https's, nobody's
        self.when = {}  # by host: the times of its requests

    def __enter__(self) -> "PictureServer":
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self.thread.start()
        assert ready.wait(30)
        return self

    def __exit__(self, *error) -> None:
        self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join()

    def url(self, kind: str, number: int = 0, host: str | None = None, tls: bool = False) -> str:
        return f"{'https' if tls else 'http'}://{host or kind}.test:{self.ports[tls]}/{kind}/{number}"

    async def _serve(self, ready: threading.Event) -> None:
        self.loop, self.stopped = asyncio.get_running_loop(), asyncio.Event()
        servers = [await asyncio.start_server(self._connection, "127.0.0.1", 0, ssl=tls, backlog=200)
                   for tls in (None, server_tls())]
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))  # nobody else gets the port, and nobody listens on it
            self.ports = tuple(one.getsockname()[1] for one in (*(server.sockets[0] for server in servers), deaf))
            self.port = self.ports[0]
            ready.set()
            await self.stopped.wait()
        for server in servers:
            server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                path, headers = line.split()[1], dict(field.lower().split(": ", 1) for field in fields if field)
                kind, number = path.strip("/").split("/")
                key = f"{headers['host'].split(':')[0]}{path}"
                answer = KINDS[kind][2](int(number), self.asked[key])
                self.asked[key] += 1
                self.headers.append(headers)
                self.when.setdefault(headers["host"].split(":")[0], []).append(time.monotonic())
                if isinstance(answer, bytes):
                    writer.write(answer)
                else:
                    async for part in answer:
                        writer.write(part)
                        await writer.drain()
                await writer.drain()
                if kind in CLOSING:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the other side has had enough, or the server ends
        finally:
            writer.close()


def server_tls() -> ssl.SSLContext:
    """Shows expired.test its own certificate, and every other name picture.test's."""
    import tempfile

    contexts = []
    for certificate in (CERTIFICATE, EXPIRED):
        contexts.append(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
            file.write(KEY + certificate)
            file.flush()
            contexts[-1].load_cert_chain(file.name)

    def choose(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = contexts[name == "expired.test"]

    contexts[0].sni_callback = choose
    return contexts[0]


def client_tls() -> ssl.SSLContext:
    """Trusts the certificate of picture.test, and no other."""
    return ssl.create_default_context(cadata=CERTIFICATE)


def rows(ports: Sequence[int], count: int) -> list[dict]:
    """A list in which each kind of fault, and hosts and addresses that are none, come between good pictures."""
    port, https, nobodys = ports
    bad = ["ftp://a.test/1.jpg", "file:///etc/passwd", "", "a.jpg", "http://", "http://localhost/1.jpg",
           "http://10.0.0.1/1.jpg", "http://[::1]/1.jpg", "http://six.test/1.jpg", "http://2130706433/1.jpg"]
    kinds, urls = [kind for kind in KINDS if kind not in ("ok", "drip", "mute")], []
    sites = {"secure": f"https://picture.test:{https}", "expired": f"https://expired.test:{https}",
             "wrongname": f"https://wrongname.test:{https}", "deaf": f"http://deaf.test:{nobodys}"}
    for number in range(count):
        if number % 10 == 3:
            kind = kinds[number // 10 % len(kinds)]
            urls.append(f"{sites.get(kind, f'http://{kind}.test:{port}')}/{kind}/{number}")
        elif number % 10 == 4 and number > 400:
            urls.append(urls[number - 400])  # the same again
        elif number % 500 == 5:
            urls.append(bad[number // 500 % len(bad)])
        elif number % 250 == 6 and number < 1000:  # early, so that they are waited for while the others are in work
            kind = "drip" if number % 500 > 250 else "mute"
            urls.append(f"http://{kind}.test:{port}/{kind}/{number}")
        else:
            urls.append(f"http://h{number % 8}.test:{port}/{'large' if number % 50 == 0 else 'ok'}/{number}")
    return [{"url": url, "captions": [f"gambar {number}"], "source": "uji", "split": "train", "row": number}
            for number, url in enumerate(urls)]


def expected(url: str) -> tuple[str, str | tuple | None]:
    """The status of a URL of `rows`, and its reason where the kind has one, or the few that it has."""
    if ".test:" in url:
        return KINDS[url.split("/")[3]][:2]
    return "refused", None


def main(ports: str, count: str, folder: str, limits: str) -> None:
    """Downloads `rows`."""
    from clipid_utils.data.download.addresses import PublicNetwork
    from clipid_utils.data.download.download import download
    from clipid_utils.data.download.fetcher import Limits

    given = rows(json.loads(ports), int(count))
    print("begun", flush=True)
    try:
        report = download(iter(given), Path(folder), limits=Limits(**json.loads(limits)), progress=False,
                          network=PublicNetwork(resolve, Near()), tls=client_tls())
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    print(report)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of a shell's background job it would be ignored
    main(*sys.argv[1:])
