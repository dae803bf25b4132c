"""The engine's limits, fixed at start."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tilestream.engine.policies import POLICIES

PAGE_SIZES_TOKENS = (16, 32, 64)  # what the kernels are built for


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine.

    Args:
        kv_cache_tokens: tokens the whole KV cache holds; rounded down to whole pages.
        max_model_len: most tokens of one request, prompt and output together.
        page_size: tokens per KV page: 16, 32 or 64.
        max_num_seqs: most requests that run at a time.
        token_budget: most tokens of one step, decodes and prefill chunks together. It bounds the time of
            a step, and so the time between two tokens of a running request.
        tbt_ms: target for the time between two tokens: a step gets as much prefill as keeps it within that, by a cost model
            that is measured at start-up, and at least one tile; None: token_budget alone says how much.
        policy: who is admitted first: "fcfs", "priority" or "lpm" (longest prefix match).
        max_queued_requests: most requests that may wait; more are refused.
        max_queued_tokens: most prompt tokens that may wait; None: any number. A prompt is always taken when none waits.
        enable_prefix_caching: reuse the KV pages of equal prompt prefixes.
        batch_invariant: a request's result must not depend on what else is in the batch, bit for bit.
        seed: seeds the draw of seeds for requests that bring none; None: from the operating system.
    Raises:
        ValueError: which limit, what it was, what is allowed.
    """

    kv_cache_tokens: int
    max_model_len: int
    page_size: int = 32
    max_num_seqs: int = 256
    token_budget: int = 512
    tbt_ms: float | None = None
    policy: str = "fcfs"
    max_queued_requests: int = 1024
    max_queued_tokens: int | None = None
    enable_prefix_caching: bool = True
    batch_invariant: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES_TOKENS:
            raise ValueError(f"page_size must be one of {PAGE_SIZES_TOKENS}, got {self.page_size}")
        if self.kv_cache_tokens < self.page_size:
            raise ValueError(
                f"kv_cache_tokens must be at least one page ({self.page_size}), got {self.kv_cache_tokens}"
            )
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len must be at least 2 (prompt and output), got {self.max_model_len}")
        for name in ("max_num_seqs", "token_budget", "max_queued_requests", "max_queued_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.tbt_ms is not None and not 0 < self.tbt_ms < math.inf:
            raise ValueError(f"tbt_ms must be a number above 0, or None, got {self.tbt_ms}")
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")

    @property
    def num_pages(self) -> int:
        return self.kv_cache_tokens // self.page_size

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit the whole pages of the cache."""
        return self.num_pages * self.page_size

    @property
    def max_request_tokens(self) -> int:
        """Of the longest request that fits."""
        return min(self.max_model_len, self.capacity_tokens)

    @property
    def max_running_requests(self) -> int:
        """Every running request must get its token each step, so no more run than the budget has tokens."""
        return min(self.max_num_seqs, self.token_budget)
