"""The first requests of a shared prefix go ahead of the rest, so that the rest finds it in the provider's cache.

Stands between the planned order, in which neighbours share the most, and the provider, which keeps a prefix only after
a request with it was answered: of requests sent together none would hit. DeepSeek keeps a common prefix once a second
request has shown it to be common, so that there two go ahead, one after the other.

No threads, no clocks: `offer` and `finish` return the requests that may leave now.
"""

import hashlib
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from moebeam.model_runner.prefix_tree import common_prefix_length
from moebeam.schemas.records import Request

_MAX_WARM_PREFIXES = 65_536


class WarmPrefixes:
    """Prefixes that the provider has seen, the most recently used ones; all shards and threads share them."""

    def __init__(self, most: int = _MAX_WARM_PREFIXES) -> None:
        self._most = most
        self._digests: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._digests

    def add(self, digest: bytes) -> None:
        """Remember a prefix, and forget the least recently used one."""
        with self._lock:
            self._digests[digest] = None
            self._digests.move_to_end(digest)
            if len(self._digests) > self._most:
                self._digests.popitem(last=False)


@dataclass(slots=True)
class _Node:
    """A shared prefix that is not warm yet."""

    digest: bytes
    num_done: int = 0
    num_in_flight: int = 0
    waiting: deque[Request] = field(default_factory=deque[Request])


@dataclass(slots=True)
class _Last:
    """The request offered last, and the prefix that it shared with the one before it."""

    request: Request
    node: _Node | None


class PrefixGate:
    """Decides when each request may leave. Requests are offered in planned order, token order within a tenant."""

    def __init__(self, *, num_leaders: int, min_prefix_tokens: int, warm: WarmPrefixes) -> None:
        self._num_leaders = num_leaders
        self._min_prefix_tokens = min_prefix_tokens
        self._warm = warm
        self._last: _Last | None = None
        self._nodes: dict[bytes, _Node] = {}
        # The prefixes that a request in flight will have shown; a leader shows its own and those found behind it.
        self._shown_by: dict[str, list[_Node]] = {}
        self.num_held = 0

    def offer(self, request: Request) -> list[Request]:
        """Take the next request; returns those that may leave now, which need not include it."""
        last, node = self._last, None
        if self._num_leaders and last is not None and _cache_of(last.request) == _cache_of(request):
            num_shared = common_prefix_length(last.request.prompt_token_ids, request.prompt_token_ids)
            if num_shared >= self._min_prefix_tokens:
                node = self._find_node(request, num_shared, last)
        self._last = _Last(request, node)
        self._shown_by[request.request_id] = []
        if node is None:
            return [request]
        node.waiting.append(request)
        self.num_held += 1
        return self._release(node)

    def finish(self, request_id: str) -> list[Request]:
        """A request is done, answered or not; returns those that may leave because of it."""
        leaving: list[Request] = []
        for node in self._shown_by.pop(request_id, ()):
            node.num_in_flight -= 1
            node.num_done += 1
            leaving += self._release(node)
        return leaving

    def _find_node(self, request: Request, num_shared: int, last: _Last) -> _Node | None:
        """The prefix that a request shares with the one before it; None where the provider has it already."""
        token_ids = request.prompt_token_ids[:num_shared]
        digest = hashlib.sha256(_cache_of(request).encode() + b"\0" + token_ids.tobytes()).digest()
        if digest in self._warm:
            self._warm.add(digest)
            return None
        node = self._nodes.get(digest)
        if node is None:
            # The request before this one is the first that shows the prefix; it may be waiting, in flight or done.
            node = self._nodes[digest] = _Node(digest)
            shown = self._shown_by.get(last.request.request_id)
            if shown is None:
                node.num_done = 1
            else:
                node.num_in_flight = 1
                shown.append(node)
        return node

    def _release(self, node: _Node) -> list[Request]:
        leaving: list[Request] = []
        while node.waiting and (node.num_done >= self._num_leaders or node.num_in_flight == 0):
            request = node.waiting.popleft()
            self.num_held -= 1
            leaving.append(request)
            if node.num_done < self._num_leaders:
                node.num_in_flight += 1
                self._shown_by[request.request_id].append(node)
        if node.num_done >= self._num_leaders:
            self._warm.add(node.digest)
            self._nodes.pop(node.digest, None)
        return leaving


def _cache_of(request: Request) -> str:
    """Whose cache a request can hit: another model's is another tenant's."""
    model = request.options.model
    return request.tenant if model is None else f"{request.tenant}\0{model}"
