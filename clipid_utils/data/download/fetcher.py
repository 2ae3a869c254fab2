"""One picture from its URL: asked for politely, within limits, and brought to a JPEG of training size."""

import importlib.util
import io
import random
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import responses
from ssl import SSLCertVerificationError, SSLContext

import anyio
import httpcore2
import httpx2
from PIL import Image, UnidentifiedImageError

from clipid_utils.data.download.addresses import NotPublic, PublicNetwork
from clipid_utils.files import to_rgb, usable_threads

SHORT_SIDE = 512  # pixels; what is larger is reduced to it, as the ancestor did
QUALITY = 90
MOST_REDIRECTS = 5
MOST_SILENCES = 10  # connections in a row that a host did not take: its other rows are left for another run
PASSING = {408, 425, 429, *range(500, 600)}  # answers that another try can change
# No SVG, which is drawn elsewhere, and nothing that starts other programs (EPS) or is hardly met
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")


class Refused(Exception):
    """What no other try would change; the arguments are a reason from a short list, and the details."""


class Passing(Exception):
    """What may pass: the arguments are as Refused's. `again`: whether to try again in this run."""

    def __init__(self, reason: str, details: str, again: bool = True):
        super().__init__(reason, details)
        self.again = again


@dataclass(frozen=True)
class Limits:
    """What a run may take from hosts, time and memory; seconds, bytes and pixels."""

    connections: int = 32  # at once; as many answers are in memory at most
    per_host: int = 4  # connections
    interval: float = 0.1  # between two requests to a host, at least
    tries: int = 3
    backoff: float = 1.0  # before the second try; doubled for each further one, with jitter
    patience: float = 120.0  # the longest Retry-After that is waited for; else the row is left for another run
    seconds: float = 60.0  # for a request with its answer
    silence: float = 10.0  # for a connection, and between two parts of an answer
    most_bytes: int = 20_000_000
    most_pixels: int = 50_000_000


@dataclass
class _Host:
    lanes: anyio.Semaphore
    free_at: float = 0.0  # when the next request may start
    silences: int = 0
    users: int = 0


class Hosts:
    """Whose turn it is: at most `per_host` requests to a host at once, `interval` apart, `connections` in all."""

    def __init__(self, limits: Limits):
        self.limits, self.hosts, self.slots = limits, {}, anyio.Semaphore(limits.connections)

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[_Host]:
        """Waits for a turn at a host and yields it; raises Passing for one that asks for too much patience."""
        host = self._host(name)
        host.users += 1
        try:
            async with host.lanes:
                await self._wait(host, name)
                try:
                    yield host
                finally:
                    self.slots.release()
        finally:
            host.users -= 1

    async def _wait(self, host: _Host, name: str) -> None:
        while True:
            if host.silences >= MOST_SILENCES:
                raise Passing("host is silent", f"{name} took none of {MOST_SILENCES} connections", again=False)
            wait = host.free_at - time.monotonic()
            if wait > self.limits.patience:
                raise Passing("host asks to wait", f"{name} for {wait:.0f} s", again=False)
            if wait > 0:  # without a slot, which other hosts can use meanwhile
                await anyio.sleep(wait)
                continue
            await self.slots.acquire()
            if host.free_at <= time.monotonic():
                host.free_at = time.monotonic() + self.limits.interval
                return
            self.slots.release()

    def _host(self, name: str) -> _Host:
        if name not in self.hosts:
            if len(self.hosts) > 10_000:  # those of no more use are forgotten, lest millions of rows fill the memory
                now = time.monotonic()
                self.hosts = {key: host for key, host in self.hosts.items()
                              if host.users or host.free_at > now or host.silences >= MOST_SILENCES}
            self.hosts[name] = _Host(anyio.Semaphore(self.limits.per_host))
        return self.hosts[name]


def parse_url(text) -> httpx2.URL:
    """A URL in its normal form; raises Refused where it is none of http or https."""
    try:
        url = httpx2.URL(text.strip())
    except (AttributeError, TypeError, ValueError, httpx2.InvalidURL) as error:
        raise Refused("no URL", str(error)) from None
    if url.scheme not in ("http", "https") or not url.host:
        raise Refused("neither http nor https", f"{url.scheme or 'no scheme'}")
    return url


class Fetcher:
    """Fetches URLs through one pool of connections; to be entered with `async with`.

    httpcore is what httpx sends its requests with, and takes a network of one's own. httpx's client would add cookies,
    proxies from the environment, which resolve names themselves, and unpacking without limits: here unwanted.
    """

    def __init__(self, limits: Limits, agent: str, network: PublicNetwork, tls: SSLContext | None = None):
        self.limits, self.hosts, self.threads = limits, Hosts(limits), anyio.CapacityLimiter(usable_threads())
        self.headers = {"User-Agent": agent, "Accept": "image/*", "Accept-Encoding": "identity"}
        silence = limits.silence
        self.timeout = {"connect": silence, "read": silence, "write": silence, "pool": None}
        self.pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls or httpcore2.default_ssl_context(), network_backend=network, keepalive_expiry=10.0,
            max_connections=limits.connections, http2=importlib.util.find_spec("h2") is not None,
        )

    async def __aenter__(self) -> "Fetcher":
        await self.pool.__aenter__()
        return self

    async def __aexit__(self, *error) -> None:
        await self.pool.__aexit__(*error)

    async def fetch(self, url: httpx2.URL, finish: Callable[[bytes], dict]) -> dict:
        """What became of a URL: `status`, `tries`, `error`, and what `finish` makes of the picture's file in a thread.

        The status is kept, refused (for good) or failed (may pass; all tries of this run are used up).
        """
        for attempt in range(1, self.limits.tries + 1):
            try:
                return {"status": "kept", "tries": attempt, "error": None, **await self._follow(url, finish)}
            except Refused as error:
                return {"status": "refused", "tries": attempt, "error": ": ".join(error.args)}
            except Passing as error:
                failure = {"status": "failed", "tries": attempt, "error": ": ".join(error.args)}
                if not error.again:
                    break
            if attempt < self.limits.tries:
                await anyio.sleep(self.limits.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        return failure

    async def _follow(self, url: httpx2.URL, finish: Callable[[bytes], dict]) -> dict:
        for _ in range(MOST_REDIRECTS + 1):
            async with self.hosts.turn(url.host) as host:
                found = await self._ask(url, host)
                if isinstance(found, bytes):
                    return await anyio.to_thread.run_sync(finish, found, limiter=self.threads)
            url = found
        raise Refused("too many redirects", f"more than {MOST_REDIRECTS}, the last to {url}")

    async def _ask(self, url: httpx2.URL, host: _Host) -> bytes | httpx2.URL:
        """One request: the body of its answer, or where it is redirected to."""
        target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        try:
            with anyio.fail_after(self.limits.seconds):
                async with self.pool.stream(
                    "GET", target, headers=self.headers, extensions={"timeout": self.timeout}
                ) as response:
                    host.silences = 0
                    headers = httpx2.Headers(response.headers)
                    if response.status in (301, 302, 303, 307, 308) and "location" in headers:
                        return _joined(url, headers["location"])
                    self._check(response.status, headers, host)
                    return await self._body(response, headers)
        except (Refused, Passing):
            raise
        except NotPublic as error:
            raise Refused("no public address", str(error)) from error
        except (httpcore2.LocalProtocolError, httpcore2.UnsupportedProtocol) as error:
            raise Refused("no URL", str(error)) from error
        except Exception as error:  # whatever a connection can raise: one odd host should not end a run of millions
            if isinstance(error.__context__, SSLCertVerificationError):  # no __cause__: the pool takes it away
                raise Passing("certificate", error.__context__.verify_message, again=False) from error
            if isinstance(error, httpcore2.ConnectTimeout | httpcore2.ConnectError):
                host.silences += 1
            late = isinstance(error, TimeoutError | httpcore2.TimeoutException)
            raise Passing("too late" if late else "connection", str(error) or type(error).__name__) from error

    def _check(self, status: int, headers: httpx2.Headers, host: _Host) -> None:
        if 200 <= status < 300:
            return
        if status not in PASSING:
            raise Refused(f"answer {status}", responses.get(status, "unknown"))
        wait = retry_after(headers.get("retry-after", ""))
        if wait is not None or status in (429, 503):  # the whole host is to be left alone
            host.free_at = max(host.free_at, time.monotonic() + (self.limits.backoff if wait is None else wait))
        details = responses.get(status, "unknown") + ("" if wait is None else f", to be asked again in {wait:.0f} s")
        raise Passing(f"answer {status}", details, again=wait is None or wait <= self.limits.patience)

    async def _body(self, response: httpcore2.Response, headers: httpx2.Headers) -> bytes:
        """The bytes of an answer, unpacked no further than `most_bytes`."""
        most, body, packed = self.limits.most_bytes, bytearray(), headers.get("content-encoding", "identity").lower()
        if packed not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise Refused("unknown packing", packed)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise Refused("too many bytes", length)
        unpacker = zlib.decompressobj(47) if packed not in ("identity", "") else None  # 47: gzip and zlib
        async for part in response.aiter_stream():
            try:
                body += unpacker.decompress(part, most - len(body) + 1) if unpacker else part
            except zlib.error as error:
                raise Refused("broken packing", str(error)) from None
            if len(body) > most:
                raise Refused("too many bytes", f"more than {most}")
        if not body:
            raise Refused("empty", "an answer without a body")
        return bytes(body)


def _joined(url: httpx2.URL, location: str) -> httpx2.URL:
    try:
        return parse_url(str(url.join(location)))
    except (ValueError, httpx2.InvalidURL) as error:
        raise Refused("no URL", f"redirected to {location[:200]!r}: {error}") from None
    except Refused as error:
        raise Refused(error.args[0], f"redirected to {location[:200]!r}") from None


def retry_after(header: str) -> float | None:
    """The seconds that a Retry-After asks for, given in seconds or as a date; None where it asks nothing."""
    if header.strip().isdecimal():
        return float(header)
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def to_jpeg(file: bytes, most_pixels: int) -> tuple[bytes, int, int]:
    """A picture's file as a JPEG without metadata, upright, RGB, its short side at most 512; width and height of it.

    Of an animation the first frame. Raises Refused for what is no picture of FORMATS, broken, cut off or too large.
    """
    Image.init()
    try:
        with Image.open(io.BytesIO(file), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > most_pixels:
                raise Refused("too many pixels", f"{image.width} x {image.height}")
            image.draft(None, (SHORT_SIDE, SHORT_SIDE))
            image = to_rgb(image)
        scale = SHORT_SIDE / min(image.size)
        if scale < 1:
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        image.info.clear()  # comments, which may hold anything
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=QUALITY)
    except Image.DecompressionBombError as error:
        raise Refused("too many pixels", str(error)) from None
    except UnidentifiedImageError:
        raise Refused(*_looks_like(file)) from None
    except Refused:
        raise
    except Exception as error:  # a broken file can raise anything
        raise Refused("broken picture", f"{type(error).__name__}: {error}"[:200]) from None
    return jpeg.getvalue(), image.width, image.height


def _looks_like(file: bytes) -> tuple[str, str]:
    start = file[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start:
        return "SVG", "drawn by code, not by pixels"
    if start.startswith(b"<!doctype html") or b"<html" in start or b"<head" in start:
        return "HTML", "a page in place of a picture"
    return "no picture", f"starts with {file[:16]!r}"
