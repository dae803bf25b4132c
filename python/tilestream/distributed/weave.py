"""Whether a step of a tensor-parallel model is cut in two, and where (TokenWeave, 2505.11329, section 3).

Half the tokens' GEMMs take half the time only if no wave of tiles is lost: SMs work on their tiles in waves, and the last wave
takes as long as a full one. So the cut is where the waves of both halves are as many as those of the whole step, or nearly.
`weave_splits.json` holds what was measured to be best, by the device's name: `python -m bench.tune_weave --write`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tilestream.models.config import ModelConfig

TABLE = Path(__file__).parent / "weave_splits.json"

# Below, halves fill the SMs too badly, and a step runs whole. The paper's, for 70B on 8 H100, where the simulator
# (overlap_simulator.py) sees no loss from 640 tokens on. For other models it is an assumption until they are measured.
MIN_TOKENS = 1024
COMMUNICATION_BLOCKS = 16  # of allreduce_rmsnorm: kMaxRankBlocks of csrc/cuda/allreduce_barrier.cuh


@dataclass(frozen=True, slots=True)
class Gemm:
    """A linear of one rank: [num_tokens, k] times [n, k]."""

    n: int
    k: int


@dataclass(frozen=True, slots=True)
class Tiling:
    """How GEMMs are cut, and who works on the tiles.

    Args:
        rows, columns: of a tile. 128 x 256 are those of the large GEMMs on Hopper, ours and cuBLAS's.
        num_sms: at work on average. Communication takes its blocks' SMs for a part of the time only: see beside().
    """

    num_sms: int
    rows: int = 128
    columns: int = 256

    @staticmethod
    def beside(num_blocks: int, num_sms: int) -> Tiling:
        """Beside communication in num_blocks blocks, on a GPU of num_sms. It runs for less than half of a layer's time where a
        split pays, so half of its SMs are counted: by the simulator, with 8 blocks, the cuts are then 1.7% slower than the best
        ones, as a mean over 1,024 to 8,192 tokens; with all of its SMs counted 3.9%, and in the middle 3.6%."""
        return Tiling(num_sms - num_blocks // 2)

    def num_tiles(self, num_tokens: int, gemm: Gemm) -> int:
        return -(-num_tokens // self.rows) * -(-gemm.n // self.columns)

    def num_waves(self, num_tokens: int, gemm: Gemm) -> int:
        return -(-self.num_tiles(num_tokens, gemm) // self.num_sms)


def middle_of(num_tokens: int, rows: int = 128) -> int:
    """Half of the tokens, rounded up to whole tiles: what measured offsets count from."""
    return -(-num_tokens // (2 * rows)) * rows


@functools.lru_cache(maxsize=1024)
def split_point(num_tokens: int, gemms: tuple[Gemm, ...], tiling: Tiling) -> int:
    """Tokens of the first half: of the cuts at whole tiles within an eighth of the middle, the one with the fewest waves over those
    of the whole step, a wave counted by its length; of equals the one nearest to the middle, and of two such the larger.

    Args:
        num_tokens: of the step, at least 2.
        gemms: of one layer.
        tiling: see Tiling.
    """

    def lost(first: int) -> int:
        halves = (first, num_tokens - first)
        return sum(g.k * (sum(tiling.num_waves(m, g) for m in halves) - tiling.num_waves(num_tokens, g)) for g in gemms)

    rows = tiling.rows
    cuts = range(-(-3 * num_tokens // (8 * rows)) * rows, 5 * num_tokens // 8 + 1, rows)
    return min(cuts, key=lambda first: (lost(first), abs(2 * first - num_tokens), -first), default=-(-num_tokens // 2))


def linears(config: ModelConfig) -> tuple[Gemm, ...]:
    """The GEMMs of one layer, q, k and v as one, gate and up as one. `config`: of one rank (shard.py)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return (
        Gemm(config.qo_size + 2 * config.kv_size, hidden), Gemm(hidden, config.qo_size), Gemm(2 * inner, hidden),
        Gemm(hidden, inner),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Which steps are cut, and where.

    Args:
        tiling, gemms: see split_point.
        min_tokens: steps of fewer tokens run whole.
        offsets: measured: tokens of a step -> what the first half has more than the middle, which is rounded up to whole tiles.
            A step goes by the nearest number there; none: by split_point.
    """

    tiling: Tiling
    gemms: tuple[Gemm, ...]
    min_tokens: int = MIN_TOKENS
    offsets: dict[int, int] = field(default_factory=dict)

    def first_tokens(self, num_tokens: int) -> int:
        """Tokens of the first half; 0: the step runs whole."""
        if num_tokens < max(self.min_tokens, 2):
            return 0
        if not self.offsets:
            return split_point(num_tokens, self.gemms, self.tiling)
        nearest = min(self.offsets, key=lambda measured: abs(measured - num_tokens))
        return min(max(middle_of(num_tokens, self.tiling.rows) + self.offsets[nearest], 1), num_tokens - 1)


def shape_key(config: ModelConfig, world_size: int) -> str:
    """What the table calls a model on so many ranks, whose shape as a whole is `config`'s."""
    heads = f"{config.num_qo_heads}/{config.num_kv_heads}x{config.head_dim}"
    return f"{config.hidden_size}x{config.intermediate_size} heads {heads} tp{world_size}"


def measured_rules(table: Path = TABLE) -> dict[str, dict[str, dict]]:
    """The table: device name -> shape_key -> min_tokens and offsets, as SplitRule takes them."""
    devices = json.loads(table.read_text())
    return {
        device: {
            shape: row | {"offsets": {int(tokens): offset for tokens, offset in row["offsets"].items()}}
            for shape, row in shapes.items()
        }
        for device, shapes in devices.items()
    }


def rule_for(device_name: str, shape: str, gemms: Sequence[Gemm], tiling: Tiling, table: Path = TABLE) -> SplitRule:
    """The rule for a model's shape on a device: as measured, else by waves."""
    return SplitRule(tiling, tuple(gemms), **measured_rules(table).get(device_name, {}).get(shape, {}))
