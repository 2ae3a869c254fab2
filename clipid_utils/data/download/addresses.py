"""The guard of downloads: connections go to addresses of the public internet only, checked at each connection."""

import ipaddress
import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

import anyio
import httpcore2

# Newer Pythons know that these are not global; the first releases of 3.11 do not
SPECIAL = [ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")]
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is allocated so far
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # has an IPv4 address in its last 32 bits
MAX_ADDRESSES = 3  # of a name with several, tried one after the other


class NotPublic(Exception):
    """A host's name without a public address."""


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address belongs to the public internet.

    Private, shared, loopback, link-local, multicast, documentation and reserved addresses do not (IANA's registries of
    special addresses). An IPv6 address that contains an IPv4 address (mapped, 6to4, NAT64) is as public as that.
    """
    if isinstance(address, IPv6Address):
        inner = IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return is_public(inner)
        if address not in GLOBAL_UNICAST:
            return False
    special = any(address in network for network in SPECIAL)
    return address.is_global and not (address.is_multicast or address.is_reserved or special)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host's name, in the system's order. Blocks."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(entry[4][0] for entry in found))


class PublicNetwork(httpcore2.AsyncNetworkBackend):
    """Connects httpcore to public addresses only.

    A connection resolves its name once and goes to an address of that answer, so a name that leads elsewhere a moment
    later (DNS rebinding) has no effect. The Host header and the name that TLS verifies stay those of the URL. Raises
    NotPublic for a name without a public address. Tests pass their own `resolve` and `inner` network.
    """

    def __init__(
        self, resolve: Callable[[str, int], list[str]] = resolve, inner: httpcore2.AsyncNetworkBackend | None = None
    ):
        self.resolve, self.inner = resolve, inner or httpcore2.AnyIOBackend()
        # Names of dead hosts take seconds each; decoding must not wait for their threads
        self.lookups = anyio.CapacityLimiter(64)

    async def connect_tcp(self, host: str, port: int, timeout: float | None = None, *options, **named):
        """Connects to the first public address of `host` that answers."""
        try:
            with anyio.fail_after(timeout):
                found = await anyio.to_thread.run_sync(
                    self.resolve, host, port, abandon_on_cancel=True, limiter=self.lookups)
        except TimeoutError:
            raise httpcore2.ConnectTimeout(f"no address of {host} in time") from None
        except OSError as error:
            raise httpcore2.ConnectError(f"no address of {host}: {error.strerror or error}") from error
        except ValueError as error:  # a label that is too long, a null byte
            raise NotPublic(f"{host} is not the name of a host") from error
        public = [address for address in found if is_public(ipaddress.ip_address(address))]
        if not public:
            raise NotPublic(host if found == [host] else f"{host} is {', '.join(found) or 'nowhere'}")
        for address in public[:MAX_ADDRESSES]:
            try:
                return await self.inner.connect_tcp(address, port, timeout, *options, **named)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure
