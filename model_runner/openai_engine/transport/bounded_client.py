"""The HTTP client below the official one: no response larger than its bounds, no redirect away, no cookies.

Responses are decompressed here, where every byte is counted before and after, and not by the client above, which would
read what comes to its end. The time that a call may take is kept by `exchange`, which ends it from outside.
"""

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import aiohttp
import httpx2
import openai

from moebeam.model_runner.openai_engine.transport.bounds import ResponseBounds, bounded, current_bounds
from moebeam.schemas.errors import EngineTimeout, MalformedResponse, RedirectRefused, ResponseTooLarge, abbreviate

ACCEPTED = {"Accept-Encoding": "gzip, deflate"}
"""The header that asks for what is decompressed here."""
MAX_HOPS = 2
"""Redirects that one call follows, within the address that was asked."""
_MAX_ERROR_BYTES = 1 << 16
_ERROR_S = 5.0
"""An error's status says the most: what its body has to say must come within these."""
_PIECE_BYTES = 1 << 18
_FOLLOWED_WITH_BODY = (307, 308)
_FOLLOWED_AS_GET = (301, 302, 303, 307, 308)
Found = TypeVar("Found")


class BoundedClient(openai.DefaultAioHttpClient):
    """The client's own transport, through proxies of the environment too, held to the bounds of each call."""

    def _init_transport(self, *args: Any, **kwargs: Any) -> httpx2.AsyncBaseTransport:
        return BoundedTransport(super()._init_transport(*args, **kwargs))

    def _init_proxy_transport(self, *args: Any, **kwargs: Any) -> httpx2.AsyncBaseTransport:
        return BoundedTransport(super()._init_proxy_transport(*args, **kwargs))


async def bound_call(call: Awaitable[Found], bounds: ResponseBounds, option: str) -> Found:
    """Await a call for as long as its bounds allow, which its responses are held to as well.

    Args:
        option: that sets the time, for the message.
    Raises:
        EngineTimeout: it took longer.
    """
    ending = asyncio.timeout(bounds.max_s)
    try:
        async with ending:
            with bounded(bounds):
                return await call
    except TimeoutError:
        if not ending.expired():
            raise
        raise EngineTimeout(f"expected a whole response within {bounds.max_s:g} s ({option}), found none") from None


class BoundedTransport(httpx2.AsyncBaseTransport):
    """Passes requests on, follows redirects at most within their origin, and bounds what comes back."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises:
        RedirectRefused: the endpoint sends the call elsewhere.
        MalformedResponse: the response is compressed in a way that was not asked for.
        """
        response = await self._send(request)
        for num_hops in range(MAX_HOPS + 1):
            if not 300 <= response.status_code < 400:
                break
            await response.aclose()
            request = _follow(request, response, num_hops)
            response = await self._send(request)
        if response.status_code >= 400:
            return await _read_error(response)
        try:
            response.stream = _BoundedStream(response, current_bounds().max_bytes)
        except MalformedResponse:
            await response.aclose()
            raise
        response.headers.pop("content-encoding", None)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _send(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        if "set-cookie" in response.headers:
            # Nothing that one call left behind goes out with another, and no jar grows.
            del response.headers["set-cookie"]
            session = getattr(self._inner, "client", None)
            if isinstance(session, aiohttp.ClientSession):
                session.cookie_jar.clear()
        return response


def _follow(request: httpx2.Request, response: httpx2.Response, num_hops: int) -> httpx2.Request:
    """The same request at the address that a redirect names.

    Raises:
        RedirectRefused: it is another origin, or the request would not arrive as it is.
    """
    status, location = response.status_code, response.headers.get("location")
    if location is None:
        raise RedirectRefused(f"HTTP {status}: expected an answer, found a redirect without an address")
    try:
        target = request.url.join(location).copy_with(userinfo=b"")
        found = f"HTTP {status} redirects to {abbreviate(str(target.copy_with(query=None, fragment=None)), 100)}"
    except (httpx2.InvalidURL, ValueError):
        raise RedirectRefused(f"HTTP {status} redirects to what is no address: {abbreviate(location)}") from None
    if _origin(target) != _origin(request.url):
        raise RedirectRefused(f"{found}, which base_url does not name: nothing is sent there")
    if status not in (_FOLLOWED_AS_GET if request.method == "GET" else _FOLLOWED_WITH_BODY):
        raise RedirectRefused(f"{found} without what the {request.method} says: name that address in base_url")
    if num_hops == MAX_HOPS:
        raise RedirectRefused(f"{found} after {MAX_HOPS} other redirects")
    try:
        content = request.content
    except httpx2.RequestNotRead:
        raise RedirectRefused(f"{found} an upload: name that address in base_url") from None
    return httpx2.Request(
        request.method, target, headers=request.headers, content=content, extensions=request.extensions
    )


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


async def _read_error(response: httpx2.Response) -> httpx2.Response:
    """An error response with the beginning of its body, as far as it comes soon: its status decides in any case."""
    content = bytearray()
    # Of a body that is too long, broken or slow, what came is kept.
    with suppress(ResponseTooLarge, MalformedResponse, httpx2.TransportError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(_ERROR_S):
            async for piece in _BoundedStream(response, _MAX_ERROR_BYTES):
                content += piece
    await response.aclose()
    kept = [(name, value) for name, value in response.headers.items() if not name.startswith(("content-", "transfer-"))]
    return httpx2.Response(response.status_code, headers=kept, content=bytes(content), request=response.request)


class _BoundedStream(httpx2.AsyncByteStream):
    """A response's bytes, decompressed, up to a number of them."""

    def __init__(self, response: httpx2.Response, max_bytes: int) -> None:
        self._inner = response.stream
        self._max_bytes = max_bytes
        self._decoder = _find_decoder(response.headers.get("content-encoding"))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._inner, httpx2.AsyncByteStream)
        max_bytes, decoder, num_bytes = self._max_bytes, self._decoder, 0
        pieces = aiter(self._inner)
        try:
            async for piece in pieces:
                num_bytes += len(piece)
                if num_bytes > max_bytes:
                    raise _too_large(max_bytes)
                if decoder is None:
                    yield piece
                    continue
                for decoded in decoder.decode(piece):
                    if decoder.num_bytes > max_bytes:
                        raise _too_large(max_bytes)
                    yield decoded
        finally:
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()
        if decoder is not None and num_bytes:
            decoder.finish()

    async def aclose(self) -> None:
        assert isinstance(self._inner, httpx2.AsyncByteStream)
        await self._inner.aclose()


class _Decoder:
    """Decompresses gzip and deflate in pieces of a bounded size."""

    def __init__(self) -> None:
        self.num_bytes = 0
        # Detects whether a gzip or a zlib header is there.
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
        self._is_bare = False

    def decode(self, piece: bytes) -> Iterator[bytes]:
        """Raises MalformedResponse for what is not compressed as was said."""
        while decoded := self._inflate_some(piece):
            self.num_bytes += len(decoded)
            yield decoded
            piece = self._inflate.unconsumed_tail
        if self._inflate.unused_data.strip(b"\0"):
            raise MalformedResponse("content-encoding: expected the end of the compressed data, found more")

    def _inflate_some(self, piece: bytes) -> bytes:
        try:
            return self._inflate.decompress(piece, _PIECE_BYTES)
        except zlib.error as error:
            if self.num_bytes or self._is_bare:
                raise MalformedResponse(f"content-encoding: expected compressed data, found other ({error})") from None
            # Some servers send deflate without zlib's header.
            self._is_bare, self._inflate = True, zlib.decompressobj(-zlib.MAX_WBITS)
            return self._inflate_some(piece)

    def finish(self) -> None:
        """Raises MalformedResponse where the data breaks off."""
        if not self._inflate.eof:
            raise MalformedResponse("content-encoding: expected the end of the compressed data, found it broken off")


def _find_decoder(encoding: str | None) -> _Decoder | None:
    """What undoes a response's one encoding.

    Raises:
        MalformedResponse: there are several, or it is another than was asked for.
    """
    match (encoding or "identity").strip().lower():
        case "identity" | "":
            return None
        case "gzip" | "x-gzip" | "deflate":
            return _Decoder()
        case other:
            raise MalformedResponse(f"content-encoding: expected gzip or deflate, found {abbreviate(other)}")


def _too_large(max_bytes: int) -> ResponseTooLarge:
    return ResponseTooLarge(
        f"expected a response of at most {max_bytes:,} bytes, found more; raise max_response_bytes if it may be larger"
    )
