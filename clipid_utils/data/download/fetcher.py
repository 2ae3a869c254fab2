"""One picture from its URL: requested politely, within limits, and made a JPEG of training size."""

import functools
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
from clipid_utils.files import usable_threads
from clipid_utils.pictures import open_picture

SHORT_SIDE = 512  # pixels; larger pictures are reduced to it, as the ancestor did
QUALITY = 90
MAX_REDIRECTS = 5
MAX_SILENCES = 10  # failed connections in a row, after which a host's other rows are left for a later run
MAX_HOSTS = 20_000  # hosts whose state is remembered: several times the rows that are in progress at once
MAX_SCANS = 100  # of a progressive JPEG; each decodes the whole picture again
TRANSIENT = {408, 425, 429, *range(500, 600)}  # answers that may be different at a later try
# Without SVG, which needs a renderer, and without formats that start other programs (EPS) or are rare
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")


class Failure(Exception):
    """A picture was not fetched, for a reason from a short list, with details."""

    def __init__(self, reason: str, details: object, again: bool = False):
        super().__init__(f"{reason}: {details}"[:300])
        self.reason, self.again = reason, again


class PermanentFailure(Failure):
    """No later try would change it."""

    status = "refused"


class TransientFailure(Failure):
    """A later try may succeed; with `again`, a later try in this run."""

    status = "failed"


@dataclass(frozen=True)
class Limits:
    """The limits of a run: requests to hosts, time and memory, in seconds, bytes and pixels."""

    connections: int = 32  # at once; at most as many answers are in memory
    per_host: int = 4  # connections at once
    interval: float = 0.1  # between two requests to a host, at least
    tries: int = 3
    backoff: float = 1.0  # before the second try; doubles for each further try, with jitter
    patience: float = 120.0  # the longest Retry-After to wait for; the row of a longer one is left for a later run
    seconds: float = 60.0  # for a request with its answer
    silence: float = 10.0  # for a connection, and between two parts of an answer
    most_bytes: int = 20_000_000
    most_pixels: int = 50_000_000


@dataclass
class Host:
    """The state of a host: its free connections, the time of its next request, its failed connections in a row."""

    lanes: anyio.Semaphore
    free_at: float = 0.0
    silences: int = 0


def parse_url(text: object, base: httpx2.URL | None = None) -> httpx2.URL:
    """A URL, which may be relative to `base`. Raises PermanentFailure unless it is an http or https URL."""
    try:
        url = base.join(text) if base else httpx2.URL(text.strip())
    except (AttributeError, TypeError, ValueError, httpx2.InvalidURL) as error:
        raise PermanentFailure("not a URL", f"{str(text)[:200]!r} ({error})") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise PermanentFailure("not http or https", f"{str(text)[:200]!r}")
    return url


class Fetcher:
    """Fetches URLs through one pool of connections, within `async with fetcher.pool`.

    It uses httpcore, which sends httpx's requests and accepts a network of our own. httpx's client would add cookies,
    proxies from the environment (which resolve names themselves) and unpacking without limits, all unwanted here.
    """

    def __init__(self, limits: Limits, agent: str, network: PublicNetwork, tls: SSLContext | None = None):
        self.limits, self.slots = limits, anyio.Semaphore(limits.connections)
        self.host = functools.lru_cache(MAX_HOSTS)(lambda name: Host(anyio.Semaphore(limits.per_host)))
        self.threads = anyio.CapacityLimiter(usable_threads())
        headers = {"User-Agent": agent, "Accept": "image/*", "Accept-Encoding": "identity"}
        timeout = {"connect": limits.silence, "read": limits.silence, "write": limits.silence, "pool": None}
        self.options = {"headers": headers, "extensions": {"timeout": timeout}}
        self.pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls or httpcore2.default_ssl_context(), network_backend=network, keepalive_expiry=10.0,
            max_connections=limits.connections)

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[Host]:
        """Waits for a turn: at most `per_host` requests to a host at once, `interval` apart, and `connections` in all.

        Raises TransientFailure if the host is silent or asks to wait too long.
        """
        host = self.host(name)
        async with host.lanes:
            while True:
                if host.silences >= MAX_SILENCES:
                    raise TransientFailure("host is silent", f"{name} took none of {MAX_SILENCES} connections")
                wait = host.free_at - time.monotonic()
                if wait > self.limits.patience:
                    raise TransientFailure("host asks to wait", f"{name} for {wait:.0f} s")
                await anyio.sleep(max(0.0, wait))  # without a slot, which other hosts can use meanwhile
                async with self.slots:
                    if host.free_at <= time.monotonic():
                        host.free_at = time.monotonic() + self.limits.interval
                        yield host
                        return

    async def fetch(self, text: object, finish: Callable[[bytes], dict]) -> dict:
        """The outcome of a URL: `status`, `error`, `tries`, and the result of `finish(file)`, which a thread calls.

        The status is kept, refused (permanent) or failed (transient, and the tries of this run are used up).
        """
        tries = 0
        try:
            url = parse_url(text)
            while True:
                tries += 1
                try:
                    return {"status": "kept", "error": None, **await self._follow(url, finish), "tries": tries}
                except TransientFailure as error:
                    if not error.again or tries == self.limits.tries:
                        raise
                await anyio.sleep(self.limits.backoff * 2 ** (tries - 1) * random.uniform(0.5, 1.5))
        except Failure as error:
            return {"status": error.status, "error": str(error), "tries": tries}

    async def _follow(self, url: httpx2.URL, finish: Callable[[bytes], dict]) -> dict:
        for _ in range(MAX_REDIRECTS + 1):
            async with self.turn(url.host) as host:
                found = await self._ask(url, host)
                if isinstance(found, bytes):
                    return await anyio.to_thread.run_sync(finish, found, limiter=self.threads)
            url = found
        raise PermanentFailure("too many redirects", f"more than {MAX_REDIRECTS}, the last to {url}")

    async def _ask(self, url: httpx2.URL, host: Host) -> bytes | httpx2.URL:
        """One request: the body of its answer, or the URL that it redirects to."""
        target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        try:
            with anyio.fail_after(self.limits.seconds):
                async with self.pool.stream("GET", target, **self.options) as response:
                    host.silences = 0
                    headers = httpx2.Headers(response.headers)
                    if response.status in (301, 302, 303, 307, 308) and "location" in headers:
                        return parse_url(headers["location"], url)
                    self._check(response.status, headers, host)
                    return await self._body(response, headers)
        except Failure:
            raise
        except NotPublic as error:
            raise PermanentFailure("not a public address", error) from error
        except (httpcore2.LocalProtocolError, httpcore2.UnsupportedProtocol) as error:
            raise PermanentFailure("not a URL", error) from error
        except Exception as error:  # a connection can raise anything, and must not end a run of millions
            if isinstance(error.__context__, SSLCertVerificationError):  # the pool removes __cause__
                raise TransientFailure("certificate", error.__context__.verify_message) from error
            host.silences += isinstance(error, httpcore2.ConnectTimeout | httpcore2.ConnectError)
            late = isinstance(error, TimeoutError | httpcore2.TimeoutException)
            reason, details = "timeout" if late else "connection", str(error) or type(error).__name__
            raise TransientFailure(reason, details, again=True) from error

    def _check(self, status: int, headers: httpx2.Headers, host: Host) -> None:
        """Raises the failure that an answer's status means, and notes how long to leave the host alone."""
        details = responses.get(status, "unknown")
        if status not in TRANSIENT and not 200 <= status < 300:
            raise PermanentFailure(f"HTTP {status}", details)
        if status in TRANSIENT:
            wait = retry_after(headers.get("retry-after", ""))
            if wait is not None or status in (429, 503):
                pause = self.limits.backoff if wait is None else wait
                host.free_at = max(host.free_at, time.monotonic() + pause)
                details += f", asks to wait {pause:.0f} s"
            raise TransientFailure(f"HTTP {status}", details, again=(wait or 0) <= self.limits.patience)

    async def _body(self, response: httpcore2.Response, headers: httpx2.Headers) -> bytes:
        """The body of an answer, unpacked. Its bytes are limited before and after they are unpacked."""
        most, raw, body = self.limits.most_bytes, 0, bytearray()
        packing, length = headers.get("content-encoding", "").lower(), headers.get("content-length", "")
        if packing not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise PermanentFailure("unknown encoding", packing)
        if length.isdecimal() and int(length) > most:
            raise PermanentFailure("too many bytes", length)
        unpacker = zlib.decompressobj(47) if packing not in ("", "identity") else None  # 47: gzip and zlib
        async for part in response.aiter_stream():
            raw += len(part)
            try:
                body += unpacker.decompress(part, most - len(body) + 1) if unpacker else part
            except zlib.error as error:
                raise PermanentFailure("broken encoding", error) from None
            if max(raw, len(body)) > most:
                raise PermanentFailure("too many bytes", f"more than {most}")
            if unpacker and unpacker.unused_data:  # zlib would keep all that follows in memory
                raise PermanentFailure("broken encoding", f"bytes after the end of the {packing} stream")
        if unpacker and not unpacker.eof:
            raise PermanentFailure("broken encoding", f"the {packing} stream is cut off")
        if not body:
            raise PermanentFailure("empty answer", "no body")
        return bytes(body)


def retry_after(header: str) -> float | None:
    """The seconds of a Retry-After header, which has a number or a date; None for anything else."""
    if header.strip().isdecimal():
        return float(header)
    try:
        when = parsedate_to_datetime(header).replace(tzinfo=UTC)  # HTTP writes all dates in GMT
    except ValueError:
        return None
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def to_jpeg(file: bytes, most_pixels: int) -> tuple[bytes, int, int]:
    """A picture's file as a JPEG (upright, RGB, short side at most 512, without metadata), its width and its height.

    An animation gives its first frame. Raises PermanentFailure for a file that is broken, cut off, too large or in none
    of FORMATS.
    """
    Image.init()
    try:
        with Image.open(io.BytesIO(file), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > most_pixels:
                raise PermanentFailure("too many pixels", f"{image.width} x {image.height}")
            if file.startswith(b"\xff\xd8") and file.count(b"\xff\xda") > MAX_SCANS:
                raise PermanentFailure("broken picture", f"a JPEG of more than {MAX_SCANS} scans")
        image = open_picture(file, short_side=SHORT_SIDE)
        image.info.clear()  # comments, which may be anything
        image.save(jpeg := io.BytesIO(), "JPEG", quality=QUALITY)
    except Failure:
        raise
    except Image.DecompressionBombError as error:
        raise PermanentFailure("too many pixels", error) from None
    except UnidentifiedImageError:
        start = file[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        kinds = {"SVG": b"<svg" in start, "HTML": start.startswith(b"<!doctype html") or b"<html" in start}
        kind = next((kind for kind, found in kinds.items() if found), "not a picture")
        raise PermanentFailure(kind, f"starts with {file[:16]!r}") from None
    except Exception as error:  # a broken file can raise anything
        raise PermanentFailure("broken picture", error) from None
    return jpeg.getvalue(), image.width, image.height
