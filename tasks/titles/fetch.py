"""Fetches one page of the web: bounded in size and time, and never from an address of this machine or network.

An address comes from a user, and where it leads to from strangers: a page that redirects to a router, a name that
resolves to 127.0.0.1, an endless answer. Each name is resolved once, all its addresses are looked at, and the
connection goes to one of these very addresses, so that a second answer of the name server changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from dataclasses import dataclass

import httpx

from tasks.titles.errors import ConfigError, DataError, ServiceRejected, ServiceUnavailable

LARGEST_PAGE = 4_000_000
"""Bytes; a story of this length would fill any model's context many times."""
PATIENCE_S = 20.0
"""From the first request to the last byte, redirects included."""
MOST_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Page:
    """What an address gave."""

    url: str
    """Where the redirects ended."""
    text: str
    html: bool


async def fetch_page(url: str, *, allow_private: bool = False) -> Page:
    """Return the page at `url`.

    `allow_private` allows addresses that are not reachable from the whole internet, such as 127.0.0.1. Proxies of the
    environment are not used: through one, nobody here would see which address is asked.

    Raises `ConfigError` for an address that may not be asked, `DataError` for something that is no text or too large,
    `ServiceRejected` for a status other than 200, `ServiceUnavailable` where nothing answers in time.
    """
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await _follow(url, allow_private)
    except TimeoutError as error:
        raise ServiceUnavailable(
            f"{url} was not there within {PATIENCE_S:g} s. Try again, or save the page."
        ) from error
    except httpx.TransportError as error:
        raise ServiceUnavailable(f"{url} could not be fetched: {type(error).__name__}: {error}") from error


async def _follow(url: str, allow_private: bool) -> Page:
    asked = url
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S, follow_redirects=False) as client:
        for _ in range(MOST_REDIRECTS + 1):
            target = _parsed(asked)
            address = await _address(target, allow_private)
            request = client.build_request(
                "GET",
                target.copy_with(host=address),
                headers={
                    "Host": target.netloc.decode("ascii"),
                    "User-Agent": "hn-titles",
                    "Accept": "text/html, text/*;q=0.8",
                },
                # The certificate is checked against the name, though the connection goes to the number.
                extensions={"sni_hostname": target.raw_host.decode("ascii")},
            )
            response = await client.send(request, stream=True)
            try:
                if response.status_code not in _REDIRECTS:
                    return await _read(response, asked)
                asked = str(target.join(response.headers.get("location", "")))
            finally:
                await response.aclose()
    raise ServiceRejected(f"{url} redirects more than {MOST_REDIRECTS} times, last to {asked}.")


def _parsed(url: str) -> httpx.URL:
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ConfigError(f"'{url}' is no address of a page: {error}") from error
    if target.scheme not in ("http", "https") or not target.host or target.userinfo:
        raise ConfigError(
            f"'{url}' is no address of a page; expected http://host/… or https://host/… without a password."
        )
    return target


async def _address(target: httpx.URL, allow_private: bool) -> str:
    """Return an address that the host's name stands for; raise `ConfigError` where one of them is not public."""
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(target.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServiceUnavailable(f"The name '{target.host}' has no address: {error}") from error
    addresses = [str(entry[4][0]) for entry in found]
    hidden = [address for address in addresses if not _is_public(address)]
    if hidden and not allow_private:
        resolved = "" if target.host == hidden[0] else f" ({hidden[0]})"
        raise ConfigError(
            f"{target.host}{resolved} is no public address: a page must not lead into this machine or its network. "
            "If it is meant, allow it with --allow-private."
        )
    return addresses[0]


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        # Addresses of the old protocol in the new one's clothes: mapped, 6to4, and translated (RFC 6052).
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if parsed in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return parsed.is_global and not parsed.is_multicast


async def _read(response: httpx.Response, url: str) -> Page:
    if response.status_code != 200:
        rejected = ServiceRejected(
            f"{url} answered with status {response.status_code}. Save the page and give its file."
        )
        rejected.status = response.status_code
        raise rejected
    kind = response.headers.get("content-type", "text/html").partition(";")[0].strip().lower()
    html = kind in ("text/html", "application/xhtml+xml")
    if not html and not kind.startswith("text/"):
        raise DataError(f"{url} is {kind or 'of no kind'}, expected a page or plain text. Give its text as a file.")
    content = bytearray()
    try:
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > LARGEST_PAGE:
                raise DataError(f"{url} holds more than {LARGEST_PAGE:,} bytes. Give the part that matters as a file.")
    except httpx.DecodingError as error:
        raise DataError(f"{url} cannot be unpacked: {error}") from error
    return Page(url, decoded(bytes(content), response.charset_encoding), html)


def decoded(content: bytes, charset: str | None = None) -> str:
    """Return a page as text: in the named character set, else the one that the page names, else UTF-8."""
    named = _CHARSET.search(content[:4096])
    name = charset or (named.group(1).decode("ascii") if named else "utf-8")
    try:
        return content.decode(name, "replace")
    except (LookupError, UnicodeError):
        return content.decode("utf-8", "replace")
