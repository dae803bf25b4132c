"""Whether a step of a tensor-parallel model is cut in two, and where (TokenWeave, 2505.11329, section 3).

Half the tokens' GEMMs take half the time only if no wave of tiles is lost: SMs work on their tiles in waves, and the last wave
takes as long as a full one. So the cut is where the waves of both halves are as many as those of the whole step, or nearly.
`weave_splits.json` holds what was measured to be best, by the device's name: `python -m bench.tune_weave --write`.
"""

from __future__ import annotations

import functools
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tilestream.distributed.communicator import Communicator
    from tilestream.models.config import ModelConfig

TABLE = Path(__file__).parent / "weave_splits.json"

# Below, halves fill the SMs too badly, and a step runs whole. The paper's, for 70B on 8 H100, where the simulator
# (overlap_simulator.py) sees a gain beyond 512 tokens. For other models it is an assumption until they are measured.
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
        split pays, so half of its SMs are counted: by the simulator, with 8 blocks, the cuts are then 1.5% slower than the best
        ones, as a mean over every 64th size from 1,024 to 8,192 tokens; with all of its SMs counted 3.3%, and in the middle
        3.8%."""
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
    """Tokens of the first half: of the cuts at whole tiles within an eighth of the middle, the one with the fewest waves over
    those of the whole step, a wave counted by its length; of equals the one nearest to the middle, and of two such the larger.

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


def layer_gemms(hidden: int, qo: int, kv: int, inner: int) -> tuple[Gemm, ...]:
    """The linears of a layer with outputs of these sizes: q, k and v as one, o, gate and up as one, down."""
    return Gemm(qo + 2 * kv, hidden), Gemm(hidden, qo), Gemm(2 * inner, hidden), Gemm(hidden, inner)


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


def split_rule(config: ModelConfig, communicator: Communicator, device: torch.device, table: Path = TABLE) -> SplitRule:
    """The one rule of all ranks, who call this together: by the largest of their shards and the fewest SMs; as measured where all
    of them have the same measurement, else by waves.

    Args:
        config: of this rank's layers.
        device: of the model, a GPU.
    """
    properties = torch.cuda.get_device_properties(device)
    return agreed_rule(config, communicator, device, properties.name, properties.multi_processor_count, table)


def agreed_rule(
    config: ModelConfig, communicator: Communicator, device: torch.device, device_name: str, num_sms: int, table: Path = TABLE
) -> SplitRule:
    """split_rule() on a device of this name and so many SMs."""

    def gather(*numbers: int) -> list[list[int]]:
        return communicator.all_gather(torch.tensor(numbers, device=device)).tolist()

    sizes = gather(config.qo_size, config.kv_size, config.intermediate_size, num_sms)
    qo, kv, inner, _ = (max(column) for column in zip(*sizes, strict=True))
    fewest_sms = min(row[3] for row in sizes)
    shape = shape_key(config.hidden_size, sum(row[0] for row in sizes), sum(row[2] for row in sizes), communicator.world_size)
    measured = measured_rules(table).get(device_name, {}).get(shape, {})
    if len(set(map(tuple, gather(zlib.crc32(repr(measured).encode()))))) > 1:
        measured = {}
    tiling = Tiling.beside(COMMUNICATION_BLOCKS, fewest_sms)
    return SplitRule(tiling, layer_gemms(config.hidden_size, qo, kv, inner), **measured)


def shape_key(hidden: int, qo: int, inner: int, world_size: int) -> str:
    """What the table calls a model of these sizes, as a whole, on so many ranks."""
    return f"hidden {hidden}, heads {qo}, inner {inner}, tp {world_size}"
