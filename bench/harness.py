"""What all benches share: ours and the peers interleaved in one run, and one table format."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import tilestream
from tilestream._native import _C

HEADER = ("op", "case", "ours", "p20-p80", "rate", "limit", "peer", "peer time", "x peer")


_SETTLE_S = 0.05  # libgomp's workers spin 300,000 times before they sleep: about 30 ms at 100 ns a pause

_WARM_S = 0.01


def interleave(
    candidates: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 1, settle: bool = True
) -> dict[str, list[float]]:
    """Seconds of each candidate, one call of each per round in turn, so that drift of the machine hits all alike.

    settle: before each timed call, wait until the others' idle threads have gone to sleep, then call untimed for some
    milliseconds, so that the candidate's own threads are awake and each on a core of its own, as in a running engine.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_idx in range(warmup + rounds):
        for name, run in candidates.items():
            if settle:
                time.sleep(_SETTLE_S)
                warm_until = time.perf_counter() + _WARM_S
                run()
                while time.perf_counter() < warm_until:
                    run()
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if round_idx >= warmup:
                times[name].append(elapsed)
    return times


def seconds_text(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


@dataclass
class Report:
    """Rows of one bench file's table."""

    title: str
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, op: str, case: str, times: dict[str, list[float]], *, rate: str = "", limit: str = "") -> dict[str, float]:
        """One line per peer. `times` is interleave()'s result; its first entry is ours.

        Returns: peer name -> its median time over ours.
        """
        ours, *peers = times
        spread = statistics.quantiles(times[ours], n=5) if len(times[ours]) > 1 else times[ours] * 4
        median = statistics.median(times[ours])
        mine = (op, case, seconds_text(median), f"{seconds_text(spread[0])} - {seconds_text(spread[-1])}", rate, limit)
        ratios = {name: statistics.median(times[name]) / median for name in peers}
        for name in peers:
            self.rows.append((*mine, name, seconds_text(statistics.median(times[name])), f"{ratios[name]:.2f}"))
        if not peers:
            self.rows.append((*mine, "", "", ""))
        return ratios

    def add_values(self, op: str, case: str, ours: str, peer_name: str, peer: str, ratio: float) -> None:
        """A line of something that is not a time; the last column is then ours over the peer's."""
        self.rows.append((op, case, ours, "", "", "", peer_name, peer, f"{ratio:.4f}"))

    def text(self) -> str:
        lines = [f"## {self.title}", "", describe_machine(), "", "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in self.rows]) + "\n"


def describe_machine() -> str:
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in fields.items()}
        model = f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"{model}, {_C.num_threads()} threads, SIMD {_C.simd_level()}, torch {torch.__version__}, "
        f"tilestream {tilestream.__version__} at {commit or 'no commit'}; medians, ours and the peer in turn in one process"
    )
