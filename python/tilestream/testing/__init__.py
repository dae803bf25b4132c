"""What tests and benches share: error bounds, poisoned memory, paged caches, the list of backends, rank processes."""

from tilestream.testing.backends import Backend, backends, simd_levels
from tilestream.testing.errors import (
    assert_as_good_as_plain,
    assert_same_special,
    assert_within,
    max_error,
    plain_bound,
    unit_roundoff,
    worst_of,
)
from tilestream.testing.guarded import Guarded, assert_margins, guarded_contiguous
from tilestream.testing.paged import PagedKv, paged_kv
from tilestream.testing.ranks import Ranks

__all__ = [
    "Backend",
    "Guarded",
    "PagedKv",
    "Ranks",
    "assert_as_good_as_plain",
    "assert_margins",
    "assert_same_special",
    "assert_within",
    "backends",
    "guarded_contiguous",
    "max_error",
    "paged_kv",
    "plain_bound",
    "simd_levels",
    "unit_roundoff",
    "worst_of",
]
