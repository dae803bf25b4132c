"""What the kernels of one rank's layer take, for the simulator of token splitting: from profiled times, or by formula.

    GEMM        waves of tiles: ceil(tiles / SMs) * (2 * rows * columns * k FLOP / an SM's rate + tile_s)
    attention   4 * heads * head_dim * (query, key) pairs FLOP, in equal parts on all SMs that it is planned for
    others      bytes / memory_bytes_per_s: RoPE and appending to the cache, the gate's activation
    AllReduce   by table, from the number of tokens and of blocks
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tilestream.distributed.weave import Gemm, Tiling, layer_gemms

_FOLDER = Path(__file__).parent
BUILT_IN = {"h100x8-llama3-70b": _FOLDER / "overlap_h100x8_llama3_70b.json"}

Points = tuple[tuple[int, float], ...]  # (tokens, seconds), by tokens


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel as the SMs see it: so many blocks, one to an SM at a time, of so many seconds each."""

    num_blocks: int
    block_s: float


@dataclass(frozen=True, slots=True)
class OverlapCosts:
    """A rank's share of a model on a GPU, and how fast its kernels are.

    Args:
        source: in words, what was measured where, and what is estimated.
        num_sms, num_layers: of the GPU, and of the model.
        hidden_size, qo_size, kv_size, intermediate_size: of one rank.
        gemm_flops_per_s, attention_flops_per_s, memory_bytes_per_s: of all SMs.
        tile_s: fill and drain of a GEMM's tile.
        tiles: (rows, columns, share of gemm_flops_per_s that is reached) to choose from.
        launch_s: from one kernel's end to the next one's begin. step_s: what a step takes beside its layers.
        nccl, multimem, norm: seconds by tokens: AllReduce by NCCL, by multimem alone, add and norm of all tokens on every rank.
        fused: allreduce_rmsnorm: number of its blocks -> seconds by tokens.
        profiled: kernel ("qkv", "append", "attention", "o", "gate_up", "act", "down") -> seconds by tokens on all SMs, of a step
            that is one prompt; it stands for the formula.
        measured_step: whole steps of one prompt that somebody measured, to compare with: "multimem", "none", "split" -> seconds.
    """

    source: str
    num_sms: int
    num_layers: int
    hidden_size: int
    qo_size: int
    kv_size: int
    intermediate_size: int
    gemm_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes_per_s: float
    tile_s: float
    launch_s: float
    step_s: float
    tiles: tuple[tuple[int, int, float], ...]
    nccl: Points
    multimem: Points
    norm: Points
    fused: Mapping[int, Points]
    profiled: Mapping[str, Points] = field(default_factory=dict)
    measured_step: Mapping[str, Points] = field(default_factory=dict)

    @staticmethod
    def load(name: str) -> OverlapCosts:
        """From a file, or one of BUILT_IN. Tables there are {"tokens": microseconds}, of whole steps milliseconds.

        Raises:
            ValueError: no such file, or it is no such table.
        """
        path = BUILT_IN.get(name, Path(name))
        if not path.is_file():
            raise ValueError(f"costs are {name!r}; they must be a file, or one of {', '.join(BUILT_IN)}")
        try:
            values = json.loads(path.read_text())
            for key in ("nccl", "multimem", "norm"):
                values[key] = _points(values.pop(key + "_us"))
            values["fused"] = {int(blocks): _points(us) for blocks, us in values.pop("fused_us").items()}
            values["profiled"] = {kernel: _points(us) for kernel, us in values.pop("profiled_us", {}).items()}
            steps_ms = values.pop("measured_step_ms", {})
            values["measured_step"] = {kind: _points(ms, unit_s=1e-3) for kind, ms in steps_ms.items()}
            values["tiles"] = tuple(map(tuple, values["tiles"]))
            return OverlapCosts(**values)
        except (KeyError, TypeError, ValueError) as error:
            form = BUILT_IN["h100x8-llama3-70b"].name
            raise ValueError(f"{path} is no file of costs as {form} is: {type(error).__name__}: {error}") from error

    def gemm(self, name: str, num_tokens: int) -> Work:
        """By the tile that is fastest on all SMs, as a library chooses it."""
        gemm = dict(zip(("qkv", "o", "gate_up", "down"), self.gemms(), strict=True))[name]
        return min((self._tiled(name, gemm, num_tokens, tile) for tile in self.tiles), key=self._alone_s)

    def attention(self, start: int, num_tokens: int, num_sms: int) -> Work:
        """Of one prompt's tokens [start, start + num_tokens), planned for num_sms."""
        if "attention" in self.profiled:  # of a chunk: what the whole takes beyond its beginning
            before_s = self._profiled("attention", start) if start else 0.0
            total_s = (self._profiled("attention", start + num_tokens) - before_s) * self.num_sms
        else:
            pairs = num_tokens * start + num_tokens * (num_tokens + 1) // 2
            total_s = 4 * self.qo_size * pairs / self.attention_flops_per_s * self.num_sms
        return Work(num_sms, total_s / num_sms)

    def elementwise(self, name: str, num_tokens: int, num_sms: int) -> Work:
        """"append" or "act": bound by memory, however many SMs."""
        widths = {"append": 2 * (self.qo_size + 2 * self.kv_size), "act": 3 * self.intermediate_size}
        by_bytes = 2 * num_tokens * widths[name] / self.memory_bytes_per_s
        return Work(num_sms, self._profiled(name, num_tokens) if name in self.profiled else by_bytes)

    def allreduce_norm_s(self, num_tokens: int, num_blocks: int) -> float:
        return _interpolated(self.fused[num_blocks], num_tokens)

    def unfused_s(self, transport: str, num_tokens: int) -> tuple[float, float]:
        """AllReduce by "nccl", "multimem" or "none", and add and norm."""
        points = {"nccl": self.nccl, "multimem": self.multimem, "none": ((1, 0.0),)}[transport]
        return _interpolated(points, num_tokens), _interpolated(self.norm, num_tokens)

    def gemms(self) -> tuple[Gemm, ...]:
        return layer_gemms(self.hidden_size, self.qo_size, self.kv_size, self.intermediate_size)

    def _tiled(self, name: str, gemm: Gemm, num_tokens: int, tile: tuple[int, int, float]) -> Work:
        rows, columns, share = tile
        num_tiles = Tiling(self.num_sms, rows, columns).num_tiles(num_tokens, gemm)
        if name in self.profiled:
            return Work(num_tiles, self._profiled(name, num_tokens) / -(-num_tiles // self.num_sms))
        flops_per_s = share * self.gemm_flops_per_s / self.num_sms
        return Work(num_tiles, 2 * rows * columns * gemm.k / flops_per_s + self.tile_s)

    def _alone_s(self, work: Work) -> float:
        return -(-work.num_blocks // self.num_sms) * work.block_s

    def _profiled(self, kernel: str, num_tokens: int) -> float:
        return _interpolated(self.profiled[kernel], num_tokens)


def _points(table: Mapping[str, float], unit_s: float = 1e-6) -> Points:
    points = tuple(sorted((int(tokens), value * unit_s) for tokens, value in table.items()))
    if not points:
        raise ValueError("an empty table")
    return points


def _interpolated(points: Points, num_tokens: int) -> float:
    """Linear between the points; below the first its value, above the last in proportion to the tokens."""
    index = bisect_left(points, (num_tokens, 0.0))
    if index == len(points):
        return points[-1][1] * num_tokens / points[-1][0]
    if index == 0:
        return points[0][1]
    (low, low_s), (high, high_s) = points[index - 1], points[index]
    return low_s + (high_s - low_s) * (num_tokens - low) / (high - low)
