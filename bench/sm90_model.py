"""What the Hopper attention kernel should take, beside what it is to reach: `python -m bench.sm90_model`. All estimates.

Which resource binds a case, what a change of the tiles would cost or buy, and which goals the arithmetic does not allow. The
formulas, and the kernel's tiles: sm90_loads.py. Nothing in it was timed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

from bench import goals
from bench.sm90_loads import (
    CLOCK_HZ, FLOP, HBM_BYTES_PER_S, NARROW_ROWS, ROW_BYTES, TILES, Heads, Load, decode, narrow_tile, our_wide_tile, prefill,
    shared_prefix,
)  # fmt: skip

# Causal TFLOP/s of the best of FlashAttention-3 and cuDNN on an H100 (FlashAttention-3's figures; fp8: cuDNN's).
PEER_TFLOPS = {
    (64, 512): 225, (64, 1024): 288, (64, 4096): 420, (64, 16384): 473,
    (128, 512): 315, (128, 1024): 423, (128, 4096): 579, (128, 16384): 616,
    (256, 512): 308, (256, 1024): 427, (256, 4096): 612, (256, 16384): 642,
}  # fmt: skip
PEER_FP8_TFLOPS = {(128, 16384): 922, (256, 16384): 1099}


@dataclass(frozen=True)
class Case:
    """A launch and what is asked of it. goal: the seconds it may take on a GPU; None: nothing is asked."""

    kind: str
    what: str
    load: Load
    goal: Callable[[str], float] | None = None
    goal_text: str = ""
    replaces: tuple[Load, ...] = ()  # launches, one after the other, that it is to beat

    def rate_text(self, seconds: float) -> str:
        if self.kind.endswith("prefill"):
            return f"{self.load.flop / seconds / 1e12:.0f} TFLOP/s"
        return f"{self.load.hbm_bytes / seconds / 1e12:.2f} TB/s"

    def ratio(self, gpu: str) -> float:
        """Over the launches that it replaces."""
        return sum(load.expected_s(gpu) for load in self.replaces) / self.load.expected_s(gpu)


def prefill_heads(head_dim: int) -> Heads:
    """As many as make one width, whatever the head_dim, so that rates compare."""
    return Heads(4096 // head_dim, 1024 // head_dim, head_dim, head_dim)


def prefill_case(heads: Heads, length: int, product: str = "bf16") -> Case:
    """16k tokens, in requests of one length."""
    load = prefill(16384 // length, length, length, heads, product)
    head_dim, kind, what = heads.dim_qk, f"{product} causal prefill", f"{length}, {heads}"
    peers = PEER_TFLOPS if product == "bf16" else PEER_FP8_TFLOPS
    if (head_dim, length) not in peers:
        return Case(kind, what, load)
    tflops = peers[head_dim, length] * (goals.prefill_ratio(head_dim, length) if product == "bf16" else goals.FP8_PREFILL_RATIO)
    if product == "bf16" and head_dim == 128 and length >= 4096:
        tflops = max(tflops, goals.PREFILL_TFLOPS)
    return Case(kind, what, load, lambda gpu: load.flop / tflops / 1e12, f"{tflops:.0f} TFLOP/s")


def decode_case(batch_size: int, kv_len: int, heads: Heads, kv_dtype: str = "bfloat16") -> Case:
    load, what = decode([kv_len] * batch_size, heads, kv_dtype), f"{batch_size} x {kv_len}, {heads}"
    kind, limit_us = f"decode, {kv_dtype} KV", goals.DECODE_BATCH_1_US
    if batch_size == 1:
        return Case(kind, what, load, lambda gpu: limit_us * 1e-6, f"{limit_us:g} us")
    if kv_dtype == "int4":
        return Case(kind, what, load)
    share = goals.DECODE_SHARE if kv_dtype == "bfloat16" else goals.DECODE_SHARE_8BIT
    return Case(kind, what, load, lambda gpu: load.hbm_bytes / HBM_BYTES_PER_S[gpu] / share, f"{share:.2f} of HBM")


def mixed_case(chunk: int, num_decodes: int, kv_len: int, heads: Heads) -> Case:
    """The chunk is the last of as many tokens as the decodes have, or a whole prompt."""
    parts = prefill(1, chunk, max(kv_len, chunk), heads), decode([kv_len] * num_decodes, heads)
    over, what = goals.MIXED_OVER_LARGER_PART, f"{chunk} + {num_decodes} over {kv_len}, {heads}"
    goal = lambda gpu: over * max(part.expected_s(gpu) for part in parts)  # noqa: E731
    return Case("mixed", what, parts[0] + parts[1], goal, f"{over:.2f} x the larger part", parts)


def cascade_case(num_requests: int, prefix: int, suffix: int, heads: Heads) -> Case:
    load = shared_prefix(num_requests, prefix, heads) + decode([suffix] * num_requests, heads)
    apart = decode([prefix + suffix] * num_requests, heads, prefix=prefix)
    goal, what = lambda gpu: apart.expected_s(gpu) / goals.CASCADE_RATIO, f"{num_requests} x ({prefix} + {suffix}), {heads}"
    return Case("cascade", what, load, goal, f"1/{goals.CASCADE_RATIO:g} of unshared", (apart,))


LENGTHS = (512, 1024, 4096, 16384)
LLAMA, QWEN = Heads(32, 8, 128, 128), Heads(32, 4, 128, 128)
MIXES = [
    (512, 8, 32768), (512, 64, 1024), (512, 64, 8192), (512, 256, 1024),
    (2048, 8, 32768), (2048, 64, 1024), (2048, 64, 8192), (2048, 256, 8192),
]  # fmt: skip


def cases() -> list[Case]:
    return [
        *(prefill_case(prefill_heads(dim), length) for dim in (64, 128, 256) for length in LENGTHS),
        *(prefill_case(heads, 16384) for heads in (Heads(40, 10, 96, 96), Heads(32, 32, 192, 128), Heads(20, 5, 192, 192))),
        *(prefill_case(prefill_heads(dim), 16384, "fp8") for dim in (64, 128, 256)),
        *(decode_case(*shape, LLAMA) for shape in ((8, 8192), (32, 8192), (128, 8192))),
        *(decode_case(1, kv_len, QWEN) for kv_len in (1024, 2048, 4096)),
        *(decode_case(32, 8192, LLAMA, kv_dtype) for kv_dtype in ("fp8", "int8", "int4")),
        *(mixed_case(*mix, LLAMA) for mix in MIXES),
        cascade_case(64, 4096, 256, LLAMA),
    ]


def _table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tile_table() -> str:
    """Cycles of an SM for one KV tile, by resource."""
    tiles = [
        (f"{product} wide, head_dim {qk}" + (f"/{vo}" if vo != qk else ""), our_wide_tile(Heads(1, 1, qk, vo), product))
        for product in FLOP for qk, vo in TILES if product == "bf16" or qk == vo
    ]  # fmt: skip
    tiles += [
        (f"{kv_dtype} narrow, head_dim 128, {rows} rows", narrow_tile(128, kv_dtype, rows))
        for kv_dtype in ROW_BYTES for rows in NARROW_ROWS if kv_dtype == "bfloat16" or rows == 8
    ]  # fmt: skip
    header = ("tile", *tiles[0][1])
    return _table(header, [[name, *(f"{cycles[resource]:.0f}" for resource in header[1:])] for name, cycles in tiles])


def case_table(gpu: str) -> str:
    """Resources: how much of the expected time each is busy."""
    rows = cases()
    columns = ("binds", "limit", "expected", "rate", "goal", "expected / goal", "may expose")
    return _table(("case", *rows[0].load.all_cycles(gpu), *columns), [_row(case, gpu) for case in rows])


def _row(case: Case, gpu: str) -> list[str]:
    load, seconds = case.load, case.load.expected_s(gpu)
    rate = case.rate_text(seconds) + (f", {case.ratio(gpu):.2f} x" if case.replaces else "")
    over = exposed = ""
    if case.goal:
        over = f"{seconds / case.goal(gpu):.2f}"
        exposed = f"{load.may_expose(gpu, case.goal(gpu)):.2f}" if case.kind.endswith("prefill") else ""
    busy = [f"{cycles / CLOCK_HZ / seconds:.0%}" for cycles in load.all_cycles(gpu).values()]
    micros = [f"{s * 1e6:.1f} us" for s in (load.limit_s(gpu), seconds)]
    return [f"{case.kind}: {case.what}", *busy, load.binds(gpu), *micros, rate, case.goal_text, over, exposed]


def mean_mixed_ratio(gpu: str) -> float:
    ratios = [case.ratio(gpu) for case in cases() if case.kind == "mixed"]
    return math.prod(ratios) ** (1 / len(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=HBM_BYTES_PER_S, default="H200")
    gpu = parser.parse_args().gpu
    print(f"Estimates. Cycles of an SM for one KV tile:\n\n{tile_table()}\n")
    print(
        f"Launches on an {gpu}: how busy each resource is, what binds, the time if all overlapped, the time to expect. x: over "
        f"the launches that it replaces. May expose: the EXPOSED at which the goal is reached.\n\n{case_table(gpu)}\n"
    )
    print(f"Mixed, geometric mean: {mean_mixed_ratio(gpu):.2f} x the serial pair; the goal is {goals.MIXED_RATIO:g}")


if __name__ == "__main__":
    main()
