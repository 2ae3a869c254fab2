"""A web server on this machine whose pictures fail in each way in which pictures on the web do, and the way to it.

`KINDS` names the ways; `http://<anything>.test:<port>/<kind>/<number>` is answered in that way. https has its own port,
and nothing listens on a third. Names under .test lead to PUBLIC, a public address, which `Near` connects to this
machine instead: the guard of addresses is the real one. Run as a script, it downloads URLs as a user's process does.
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
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import httpcore2
import numpy as np
from PIL import ExifTags, Image

PUBLIC = "93.184.215.14"
CERTIFICATES = Path(__file__).parent / "certificates"  # made for these tests, and trusted nowhere else


def resolve(host: str, port: int) -> list[str]:
    """The addresses of the names that the tests use; no other name is looked up."""
    known = {"intranet.test": "192.168.1.1", "six.test": "::1", "localhost": "127.0.0.1"}
    if host == "nowhere.test":
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    if host in known or host.endswith(".test"):
        return [known.get(host, PUBLIC)]
    return [found[4][0] for found in socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)]


class Near(httpcore2.AsyncNetworkBackend):
    """Takes connections to PUBLIC to this machine, and notes which addresses were wanted."""

    def __init__(self):
        self.inner, self.wanted = httpcore2.AnyIOBackend(), []

    async def connect_tcp(self, host, port, *options, **named):
        self.wanted.append(host)
        assert host == PUBLIC, f"a connection to {host}"
        return await self.inner.connect_tcp("127.0.0.1", port, *options, **named)


@functools.cache
def _file(size: tuple[int, int], kind: str, frames: int, seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    image, file = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), io.BytesIO()
    image.save(file, kind, save_all=frames > 1, append_images=[Image.new("RGB", size, "black")] * (frames - 1))
    return file.getvalue()


def picture(
    number: int, size: tuple[int, int] = (96, 64), kind: str = "JPEG", frames: int = 1, seed: int = 0
) -> bytes:
    """The file of a picture, which `seed` decides. `number` follows its end, so that no two files are the same."""
    return _file(size, kind, frames, seed) + number.to_bytes(4)


@functools.cache
def turned() -> bytes:
    """The file of a picture of 64 x 96, blue above and red below, from a camera that was held on its side."""
    exif, image, file = Image.Exif(), Image.new("RGB", (96, 64), "red"), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    image.paste("blue", (0, 0, 48, 64))
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header claims this size."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000)))


def reply(body: bytes = b"", status: str = "200 OK", **headers) -> bytes:
    """An answer with its headers: content_type="…" is Content-Type."""
    headers = {"Content-Type": "image/jpeg", "Content-Length": len(body),
               **{name.replace("_", "-").title(): value for name, value in headers.items()}}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode() + body


def moved(to: str) -> bytes:
    return reply(status="302 Found", location=to)


def zipped(body: bytes, packing: str = "gzip", **headers) -> bytes:
    return reply(body, content_encoding=packing, **headers)


async def endless(start: bytes, part: bytes, seconds: float = 0.0, **headers) -> AsyncIterator[bytes]:
    """An answer that never ends: `start`, and `part` again and again."""
    yield reply(start, content_length=None, **headers)
    while True:
        await asyncio.sleep(seconds)
        yield part


async def mute() -> AsyncIterator[bytes]:
    await asyncio.sleep(3600)
    yield b""


def hops(number: int, most: int) -> bytes:
    """As many redirects, each to the number that is 10,000 higher, before the picture."""
    done = number // 10_000
    return moved(f"/hops{most}/{number + 10_000}" if done + 1 < most else f"/ok/{number % 10_000}")


@functools.cache
def gzip_bomb() -> bytes:
    return gzip.compress(bytes(100_000_000), 1)


SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
EMPTY_BLOCKS = b"\0\0\0\xff\xff" * 10_000  # of deflate; they unpack to no bytes
# Each kind: its status and reason in the manifest, and its answer by number and how often it was asked before
KINDS = {
    "ok": ("kept", None, lambda n, asked: reply(picture(n))),
    "large": ("kept", None, lambda n, asked: reply(picture(n, (700, 600)))),
    "png": ("kept", None, lambda n, asked: reply(picture(n, kind="PNG"))),
    "webp": ("kept", None, lambda n, asked: reply(picture(n, kind="WEBP"), content_type="text/plain")),
    "gif": ("kept", None, lambda n, asked: reply(picture(n, kind="GIF", frames=2))),
    "same": ("kept", None, lambda n, asked: reply(picture(0))),
    "own": ("kept", None, lambda n, asked: reply(picture(n, seed=n))),
    "turned": ("kept", None, lambda n, asked: reply(turned() + n.to_bytes(4))),
    "gzipped": ("kept", None, lambda n, asked: zipped(gzip.compress(picture(n)))),
    "deflated": ("kept", None, lambda n, asked: zipped(zlib.compress(picture(n)), "deflate")),
    "unsized": ("kept", None, lambda n, asked: reply(picture(n), content_length=None)),
    "hops5": ("kept", None, lambda n, asked: hops(n, 5)),
    "busy": ("kept", None, lambda n, asked: reply(picture(n)) if asked else reply(status="429 Slow", retry_after=1)),
    "full": ("kept", None, lambda n, asked: reply(picture(n)) if asked else reply(status="503 Full")),
    "late": ("kept", None, lambda n, asked: reply(picture(n)) if asked else reply(status="408 Request Timeout")),
    "early": ("kept", None, lambda n, asked: reply(picture(n)) if asked else reply(status="425 Too Early")),
    "flaky": ("kept", None, lambda n, asked: reply(picture(n)) if asked else reply(status="500 Oops")),
    "dropped": ("kept", None, lambda n, asked: reply(picture(n)) if asked else b""),
    "cookie": ("kept", None, lambda n, asked: reply(picture(n), set_cookie=f"id={n}")),
    "gone": ("refused", "HTTP 404: Not Found", lambda n, asked: reply(b"no", "404 Not Found")),
    "forbidden": ("refused", "HTTP 403: Forbidden", lambda n, asked: reply(b"no", "403 Forbidden")),
    "svg": ("refused", "SVG", lambda n, asked: reply(SVG, content_type="image/svg+xml")),
    "html": ("refused", "HTML", lambda n, asked: reply(HTML)),
    "text": ("refused", "not a picture", lambda n, asked: reply(b"no such picture")),
    "empty": ("refused", "empty answer", lambda n, asked: reply()),
    "cut": ("refused", "broken picture", lambda n, asked: reply(picture(n)[:1200])),
    "undersized": ("refused", "broken picture", lambda n, asked: reply(picture(n), content_length=1200)),
    "bomb": ("refused", "too many pixels", lambda n, asked: reply(bomb(8_000, 7_000))),
    "bigbomb": ("refused", "too many pixels", lambda n, asked: reply(bomb(200_000, 200_000))),
    "gzipbomb": ("refused", "too many bytes: more than", lambda n, asked: zipped(gzip_bomb())),
    "gzipmore": ("refused", "broken encoding: bytes after",
                 lambda n, asked: endless(gzip.compress(picture(n)), bytes(2**16), content_encoding="gzip")),
    "gzipnothing": ("refused", "too many bytes: more than",
                    lambda n, asked: endless(gzip.compress(b"")[:10], EMPTY_BLOCKS, content_encoding="gzip")),
    "gzipcut": ("refused", "broken encoding: the gzip stream is cut",
                lambda n, asked: zipped(gzip.compress(picture(n))[:-12])),
    "brotli": ("refused", "unknown encoding: br", lambda n, asked: zipped(picture(n), "br")),
    "badgzip": ("refused", "broken encoding", lambda n, asked: zipped(picture(n))),
    "huge": ("refused", f"too many bytes: {10**10}", lambda n, asked: reply(content_length=10**10)),
    "endless": ("refused", "too many bytes: more than", lambda n, asked: endless(b"", bytes(2**16))),
    "loop": ("refused", "too many redirects", lambda n, asked: moved(f"/loop/{n}")),
    "hops6": ("refused", "too many redirects", lambda n, asked: hops(n, 6)),
    "loopback": ("refused", "not a public address", lambda n, asked: moved(f"http://127.0.0.1/ok/{n}")),
    "private": ("refused", "not a public address", lambda n, asked: moved(f"http://intranet.test/ok/{n}")),
    "metadata": ("refused", "not a public address", lambda n, asked: moved("http://169.254.169.254/latest")),
    "file": ("refused", "not http or https", lambda n, asked: moved("file:///etc/passwd")),
    "badhop": ("refused", "not a URL", lambda n, asked: moved("http://[::1")),
    "down": ("failed", "HTTP 500", lambda n, asked: reply(status="500 Oops")),
    "later": ("failed", "HTTP 503: Service Unavailable, asks to wait 3600 s",
              lambda n, asked: reply(status="503 Later", retry_after=3600)),
    "reset": ("failed", "connection", lambda n, asked: b""),
    "oversized": ("failed", "connection", lambda n, asked: reply(picture(n), content_length=90_000)),
    "garbage": ("failed", "connection", lambda n, asked: b"SSH-2.0-OpenSSH_9.2p1\r\n"),
    "drip": ("failed", "timeout", lambda n, asked: endless(b"", b"x", 0.2)),
    "mute": ("failed", "timeout", lambda n, asked: mute()),
}
# The server closes the connection after these answers
CLOSING = {"unsized", "dropped", "reset", "oversized", "undersized", "garbage", "huge", "drip"}


class PictureServer:
    """Serves on a free port of this machine, from a thread, within `with`."""

    def __init__(self):
        self.port, self.ports, self.asked, self.headers = 0, (), Counter(), []  # ports: http, https, nothing listens
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

    def url(self, kind: str, number: int = 0, host: str | None = None, port: int = 0) -> str:
        return f"http{'s' * (port == 1)}://{host or kind}.test:{self.ports[port]}/{kind}/{number}"

    async def _serve(self, ready: threading.Event) -> None:
        self.loop, self.stopped = asyncio.get_running_loop(), asyncio.Event()
        servers = [await asyncio.start_server(self._connection, "127.0.0.1", 0, ssl=tls, backlog=200)
                   for tls in (None, server_tls())]
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))  # no other process gets the port, and nothing listens on it
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
            pass  # the client hung up, or the server ends
        finally:
            writer.close()


def server_tls() -> ssl.SSLContext:
    """Shows expired.test its own certificate, and every other name picture.test's."""
    contexts = {}
    for name in ("picture", "expired"):
        contexts[name] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        contexts[name].load_cert_chain(CERTIFICATES / f"{name}.pem")

    def choose(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = contexts["expired" if name == "expired.test" else "picture"]

    contexts["picture"].sni_callback = choose
    return contexts["picture"]


def client_tls() -> ssl.SSLContext:
    """Trusts the certificate of picture.test, and no other."""
    return ssl.create_default_context(cafile=CERTIFICATES / "picture.pem")


def rows_of(urls: Iterable[str]) -> list[dict]:
    return [{"url": url, "captions": [f"gambar {row}"], "source": "uji", "split": "train", "row": row}
            for row, url in enumerate(urls)]


def main(urls: str, folder: str, limits: str) -> None:
    """Downloads the URLs of a JSON list."""
    from clipid_utils.data.download.addresses import PublicNetwork
    from clipid_utils.data.download.download import download
    from clipid_utils.data.download.fetcher import Limits

    print("begun", flush=True)
    try:
        download(rows_of(json.loads(urls)), folder, limits=Limits(**json.loads(limits)), progress=False,
                 network=PublicNetwork(resolve, Near()))
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background jobs
    main(*sys.argv[1:])
