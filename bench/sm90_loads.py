"""A Hopper SM by arithmetic: the cycles that the attention kernel's tiles and launches keep its parts busy. All estimates.

A *load* is what a launch asks of one SM: cycles of each resource. Loads add: a mixed batch is its chunk's and its decodes'.

    wgmma    each product: max(operations / rate, bytes that it reads from shared memory / 128)
    ex2      weights / 16, without those that polynomials on the FMA units give
    issue    warp instructions / 4: 4.5 a score (scale-FMA, max, ex2, sum, half a pack), 7 more for a polynomial; a multiply a
             tile for each element of the output; what unpacks K and V
    smem     bytes / 128: read by wgmma (Q or K and V as a, the other as b), written by TMA, read and written to be unpacked
    L2       bytes of K and V / 24, of every job: jobs with other rows read the same tiles again
    unpack   instructions of the warps that unpack, two for the wide lane and four for the narrow one, one a cycle each: at best
    HBM      bytes of K, V, q and out, once each, over an SM's share of the bandwidth

    limit    = the largest of these: everything overlaps
    executed = e + EXPOSED (wgmma + ex2 + issue - e), e the largest of the three
    expected = max(executed, limit) + fixed costs

EXPOSED is the part of softmax and products that a good kernel does not overlap: one number gives the full-attention rates of
FlashAttention-3 at head_dim 64, 128 and 256, and in fp8 at 64 and 128, within 6 % (tests/benches/test_sm90_model.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from tilestream._native import _C


class Tile(NamedTuple):
    warpgroups: int  # wide consumers, of 64 rows each
    keys: int


# The kernel's own table: (head_dim_qk, head_dim_vo) -> tile of the wide lane.
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
TILES = {dims: Tile(t.wide_groups, t.tile_keys) for dims in DIMS for t in [_C.attention_tile("bfloat16", *dims)]}
NARROW_KEYS, NARROW_ROWS = 64, (8, 16)  # of the narrow lane, which head_dim 256 goes without
MAX_NARROW_DIM = 192
POLYNOMIAL_SHARE = {64: 0.25}  # of a head_dim's exponentials

# A Hopper SM, per cycle.
FLOP, WIDTH = {"bf16": 4096, "fp8": 8192}, {"bf16": 2, "fp8": 1}  # WIDTH: bytes of an operand's element
SMEM_BYTES, L2_BYTES, EX2, ISSUE, UNPACK_WARPS, NARROW_WARPS, LANES = 128, 24, 16, 4, 2, 4, 32
NUM_SMS, CLOCK_HZ = 132, 1.75e9
HBM_BYTES_PER_S = {"H200": 4.3e12, "H100": 3.0e12}

SCORE_INSTRUCTIONS, POLYNOMIAL_INSTRUCTIONS = 4.5, 7
# Per value. Integers: prmt, fma, half a pack; fp8: half a conversion, one to float, half a pack; 0.2 to load and store.
UNPACK_INSTRUCTIONS = {"bfloat16": 0.0, "fp8": 2.2, "int8": 2.7, "int4": 2.9}
TRANSPOSE_INSTRUCTIONS = 0.4  # per value of V, whose e4m3 wgmma takes with the keys running fastest
ROW_BYTES = {"bfloat16": lambda d: 2 * d, "fp8": lambda d: d, "int8": lambda d: d + 4, "int4": lambda d: d // 2 + 4}
EXECUTION, EXPOSED = ("wgmma", "ex2", "issue"), 0.55
# A launch inside a graph; the header, a job and its page ids, one after the other; the first piece's latency; the last rows'
# way out; and to merge: partial rows out, a counter, partial rows in.
FIXED_S = 1e-6 * sum((1.3, 0.8, 1.0, 0.5, 1.2))

Cycles = dict[str, float]


class Heads(NamedTuple):
    num_qo: int
    num_kv: int
    dim_qk: int
    dim_vo: int

    @property
    def group(self) -> int:
        return self.num_qo // self.num_kv

    def __str__(self) -> str:
        dims = f"{self.dim_qk}" if self.dim_qk == self.dim_vo else f"{self.dim_qk}/{self.dim_vo}"
        return f"{self.num_qo}/{self.num_kv} heads of {dims}"


def wide_tile(tile: Tile, dim_qk: int, dim_vo: int, product: str = "bf16", polynomial_share: float = 0.0) -> Cycles:
    """Cycles of an SM for one KV tile against the rows of all wide warpgroups. product: "bf16" or "fp8"."""
    groups, keys = tile
    width, scores = WIDTH[product], 64 * groups * keys
    smem_qk, smem_pv = width * dim_qk * (64 + keys), width * dim_vo * keys
    stored = width * keys * (dim_qk + dim_vo)
    polynomials = scores * polynomial_share
    moved = keys * dim_vo if product == "fp8" else 0  # values of V that are transposed: read and written once more
    unpack = moved * TRANSPOSE_INSTRUCTIONS / LANES
    instructions = scores * SCORE_INSTRUCTIONS + polynomials * POLYNOMIAL_INSTRUCTIONS + 64 * groups * dim_vo
    return {
        "wgmma": groups * (_wgmma(64, keys, dim_qk, smem_qk, product) + _wgmma(64, dim_vo, keys, smem_pv, product)),
        "ex2": (scores - polynomials) / EX2,
        "issue": (instructions / LANES + unpack) / ISSUE,
        "smem": (groups * (smem_qk + smem_pv) + stored + 2 * moved) / SMEM_BYTES,
        "L2": stored / L2_BYTES,
        "unpack": unpack / UNPACK_WARPS,
    }


def our_wide_tile(heads: Heads, product: str = "bf16") -> Cycles:
    share = POLYNOMIAL_SHARE.get(heads.dim_qk, 0.0) if product == "bf16" else 0.0
    return wide_tile(TILES[heads.dim_qk, heads.dim_vo], heads.dim_qk, heads.dim_vo, product, share)


def narrow_tile(dim: int, kv_dtype: str, rows: int) -> Cycles:
    """Cycles for one KV tile against at most 16 rows: S^T = K Q^T and O^T = V^T P^T, with K and V as the operand a: from shared
    memory, or, of a cache that is unpacked, from the registers of the four warps that unpack it."""
    columns = next(n for n in NARROW_ROWS if n >= rows)
    keys, values = NARROW_KEYS, 2 * NARROW_KEYS * dim
    stored, scores = 2 * keys * ROW_BYTES[kv_dtype](dim), keys * columns
    smem_qk, smem_pv = 2 * dim * columns, 2 * keys * columns * math.ceil(dim / 64)
    if kv_dtype == "bfloat16":
        smem_qk, smem_pv = smem_qk + 2 * dim * keys, smem_pv + 2 * keys * dim
    unpack = values * UNPACK_INSTRUCTIONS[kv_dtype] / LANES
    unpacked = 0 if kv_dtype == "bfloat16" else stored  # bytes read to unpack
    instructions = scores * SCORE_INSTRUCTIONS + columns * dim
    return {
        "wgmma": _wgmma(keys, columns, dim, smem_qk, "bf16") + _wgmma(dim, columns, keys, smem_pv, "bf16"),
        "ex2": scores / EX2,
        "issue": (instructions / LANES + unpack) / ISSUE,
        "smem": (smem_qk + smem_pv + stored + unpacked) / SMEM_BYTES,
        "L2": stored / L2_BYTES,
        "unpack": unpack / NARROW_WARPS,
    }


def _wgmma(m: int, n: int, k: int, smem_bytes: int, product: str) -> float:
    return max(2 * m * n * k / FLOP[product], smem_bytes / SMEM_BYTES)


@dataclass(frozen=True)
class Load:
    """What a launch has to do: an SM's cycles of each resource but HBM, useful operations, bytes of HBM."""

    cycles: Cycles
    flop: float
    hbm_bytes: float

    def __add__(self, other: Load) -> Load:
        cycles = {name: own + other.cycles[name] for name, own in self.cycles.items()}
        return Load(cycles, self.flop + other.flop, self.hbm_bytes + other.hbm_bytes)

    def all_cycles(self, gpu: str) -> Cycles:
        return self.cycles | {"HBM": self.hbm_bytes / HBM_BYTES_PER_S[gpu] * CLOCK_HZ}

    def binds(self, gpu: str) -> str:
        cycles = self.all_cycles(gpu)
        return max(cycles, key=cycles.__getitem__)

    def limit_s(self, gpu: str) -> float:
        return max(self.all_cycles(gpu).values()) / CLOCK_HZ

    def expected_s(self, gpu: str) -> float:
        return max(executed(self.cycles) / CLOCK_HZ, self.limit_s(gpu)) + FIXED_S

    def may_expose(self, gpu: str, seconds: float) -> float:
        """The EXPOSED with which it would take so many seconds; -inf where a single resource takes longer."""
        if self.limit_s(gpu) + FIXED_S > seconds:
            return -math.inf
        parts = [self.cycles[name] for name in EXECUTION]
        return ((seconds - FIXED_S) * CLOCK_HZ - max(parts)) / (sum(parts) - max(parts))


def executed(cycles: Cycles) -> float:
    """Cycles that products and softmax take together."""
    parts = [cycles[name] for name in EXECUTION]
    return max(parts) + EXPOSED * (sum(parts) - max(parts))


def prefill(batch_size: int, q_len: int, kv_len: int, heads: Heads, product: str = "bf16") -> Load:
    """Causal chunks of q_len tokens, the last of kv_len. A unit's rows are those of as many tokens as fill the warpgroups."""
    groups, keys = TILES[heads.dim_qk, heads.dim_vo]
    tokens = 64 * groups // heads.group
    ends = [kv_len - q_len + min(begin + tokens, q_len) for begin in range(0, q_len, tokens)]
    visible = q_len * (kv_len - q_len) + q_len**2 / 2
    stored = batch_size * kv_len * heads.num_kv * (heads.dim_qk + heads.dim_vo) * WIDTH[product]
    rows = batch_size * q_len * heads.num_qo * (heads.dim_qk + heads.dim_vo) * 2
    flop = 2 * batch_size * heads.num_qo * visible * (heads.dim_qk + heads.dim_vo)
    num_tiles = batch_size * heads.num_kv * sum(math.ceil(end / keys) for end in ends)
    return _dealt(our_wide_tile(heads, product), num_tiles, flop, stored + rows)


def decode(kv_lens: list[int], heads: Heads, kv_dtype: str = "bfloat16", prefix: int = 0) -> Load:
    """One token of each request. prefix: of tokens whose pages all requests share, and which L2 holds."""
    if heads.dim_qk > MAX_NARROW_DIM or heads.group > NARROW_ROWS[-1]:
        raise ValueError(f"the narrow lane takes head_dim up to {MAX_NARROW_DIM} and {NARROW_ROWS[-1]} rows, not {heads}")
    num_tiles = heads.num_kv * sum(math.ceil(kv_len / NARROW_KEYS) for kv_len in kv_lens)
    from_hbm = sum(kv_lens) - prefix * (len(kv_lens) - 1)
    row_bytes = 2 * heads.num_kv * ROW_BYTES[kv_dtype](heads.dim_qk)
    flop = 4 * heads.num_qo * sum(kv_lens) * heads.dim_qk
    return _dealt(narrow_tile(heads.dim_qk, kv_dtype, heads.group), num_tiles, flop, from_hbm * row_bytes)


def shared_prefix(batch_size: int, prefix: int, heads: Heads) -> Load:
    """The tokens of all requests as the rows of one job over the keys that they share."""
    groups, keys = TILES[heads.dim_qk, heads.dim_vo]
    num_tiles = heads.num_kv * math.ceil(batch_size * heads.group / (64 * groups)) * math.ceil(prefix / keys)
    width = heads.dim_qk + heads.dim_vo
    flop = 2 * batch_size * heads.num_qo * prefix * width
    return _dealt(our_wide_tile(heads), num_tiles, flop, 2 * prefix * heads.num_kv * width)


def _dealt(tile: Cycles, num_tiles: int, flop: float, hbm_bytes: float) -> Load:
    """As the planner deals them: evenly, in whole tiles."""
    tiles_each = math.ceil(num_tiles / NUM_SMS)
    return Load({name: cycles * tiles_each for name, cycles in tile.items()}, flop, hbm_bytes)
