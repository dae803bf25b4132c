"""Token content -> KV pages, for prefixes that were computed before.

Pages form a tree: a node is one full page of tokens after its parent's. Nodes are found by the hash of
(parent, tokens), so a lookup is one hash per page, chained from the root; dict equality then compares the
tokens themselves, and the parent was compared the same way one page earlier. So two prefixes are equal
here only if they are equal token by token: a hash collision costs time and never hands over a wrong page,
and how often a page is shared says nothing about what is in it.

Each salt has a tree of its own: its root is the child of the one root by (root, salt). So pages are shared
within a salt only, and how fast a prompt is answered tells nobody what was asked under another salt.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilestream.engine.page_pool import PagePool


class CacheNode:
    """One page's worth of content in its context, or the root of a salt. `page` is None for a root, and once
    that page was evicted; the node stays while somebody still builds on it (`num_holders`: child nodes, and
    requests whose chain ends here)."""

    __slots__ = ("parent", "key", "node_id", "page", "generation", "num_holders")

    def __init__(self, parent: CacheNode | None, key: tuple[int, tuple[int, ...] | str], node_id: int) -> None:
        self.parent = parent
        self.key = key
        self.node_id = node_id  # never reused, so (node_id, tokens) names one content of one salt for ever
        self.page: int | None = None
        self.generation = 0
        self.num_holders = 0


class PrefixCache:
    """Finds, shares and registers full pages by content. Only whole pages are ever shared.

    Args:
        pool: whose pages; the cache hears of evictions through pool.on_evict.
        page_size: tokens per page.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._nodes: dict[tuple[int, tuple[int, ...] | str], CacheNode] = {}
        self._node_of_page: dict[int, CacheNode] = {}
        self._root = CacheNode(None, (-1, ()), 0)
        self._root.num_holders = 1  # never pruned
        self._next_node_id = 1
        pool.on_evict = self._on_evict

    @property
    def num_cached_pages(self) -> int:
        return len(self._node_of_page)

    def match(self, token_ids: Sequence[int], salt: str = "") -> list[CacheNode]:
        """The longest chain of cached pages of a salt that token_ids starts with; changes nothing.

        At least the last token is left out: its logits are wanted, so it has to be computed.
        """
        nodes: list[CacheNode] = []
        parent = self._nodes.get((self._root.node_id, salt))
        if parent is None:
            return nodes
        for begin in range(0, len(token_ids) - self._page_size, self._page_size):
            node = self._nodes.get((parent.node_id, tuple(token_ids[begin : begin + self._page_size])))
            if node is None or node.page is None:
                break
            nodes.append(node)
            parent = node
        return nodes

    def num_unowned(self, nodes: Sequence[CacheNode]) -> int:
        """How many free pages of the pool acquire(nodes) would use up."""
        return sum(self._pool.ref_count(node.page) == 0 for node in nodes)

    def acquire(
        self, nodes: Sequence[CacheNode], salt: str = "", priority: int = 0
    ) -> tuple[list[int], CacheNode]:
        """Own the pages of a chain that match() found.

        Args:
            nodes: the chain; empty: a new one begins.
            salt: as given to match().
            priority: of the request that uses them.
        Returns:
            The pages, and the chain's end, which is held until drop().
        """
        pages = []
        for node in nodes:
            self._pool.share(node.page, node.generation, priority)
            pages.append(node.page)
        end = nodes[-1] if nodes else self._child(self._root, salt)
        end.num_holders += 1
        return pages, end

    def insert(self, end: CacheNode, token_ids: Sequence[int], page: int, priority: int = 0) -> CacheNode:
        """Make one more full and computed page of a chain findable.

        If the same content is cached already, in another page, that one stays and `page` stays private.

        Args:
            end: the chain's held end, as acquire() or insert() returned it; no longer held afterwards.
            token_ids: the page's tokens, exactly page_size of them.
            page: owned by the caller.
            priority: of the request that computed it.
        Returns:
            The chain's new end, held.
        """
        if len(token_ids) != self._page_size:
            raise ValueError(f"only full pages of {self._page_size} tokens can be cached, got {len(token_ids)} tokens")
        node = self._child(end, tuple(token_ids))
        if node.page is None:
            node.page = page
            node.generation = self._pool.keep(page, priority)
            self._node_of_page[page] = node
        else:
            self._pool.favour(node.page, priority)
        node.num_holders += 1
        self.drop(end)
        return node

    def drop(self, end: CacheNode) -> None:
        """No longer hold a chain's end. Its pages are released separately, and stay cached."""
        end.num_holders -= 1
        self._prune(end)

    def forget(self, pages: Sequence[int]) -> None:
        """Never share these pages again, nor any computed from them (their content is suspect). Owners keep
        them."""
        for page in pages:
            node = self._node_of_page.get(page)
            if node is not None:
                # Equal tokens get a new node, so what hangs below this one is never found again.
                del self._nodes[node.key]
                self._on_evict(page)
                self._pool.discard(page)

    def forget_all(self) -> None:
        """Share none of the pages again that are cached now."""
        self.forget(list(self._node_of_page))

    def _child(self, parent: CacheNode, content: tuple[int, ...] | str) -> CacheNode:
        key = (parent.node_id, content)
        node = self._nodes.get(key)
        if node is None:
            node = CacheNode(parent, key, self._next_node_id)
            self._next_node_id += 1
            self._nodes[key] = node
            parent.num_holders += 1
        return node

    def _on_evict(self, page: int) -> None:
        node = self._node_of_page.pop(page)
        node.page = None
        self._prune(node)

    def _prune(self, node: CacheNode) -> None:
        while node.page is None and node.num_holders == 0:
            if self._nodes.get(node.key) is node:  # not so after forget()
                del self._nodes[node.key]
            node = node.parent
            node.num_holders -= 1
