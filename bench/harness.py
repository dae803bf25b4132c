"""What all benches share: ours and the peers interleaved in one run, and one table format."""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import tilestream
from bench import roofs
from bench.roofs import Machine, Work
from tilestream._native import _C

HEADER = ("op", "case", "ours", "p20-p80", "rate", "limit, share of it", "peer", "peer time", "x peer")

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
class Row:
    """One case of ours, against its limit and its peers; times in seconds."""

    op: str
    case: str
    ours: str
    spread: str = ""
    rate: str = ""
    limit: str = ""
    seconds: float | None = None
    limit_seconds: float | None = None
    limit_kind: str = ""  # roofs.Limit.kind
    work: Work | None = None
    peers: dict[str, tuple[str, float]] = field(default_factory=dict)  # what it took, and over ours


@dataclass
class Report:
    """Rows of one bench file: a table for people, JSON for pictures."""

    title: str
    machine: Machine
    rows: list[Row] = field(default_factory=list)

    def add(
        self, op: str, case: str, times: dict[str, list[float]], *, work: Work | None = None, rate: str = "", limit: str = ""
    ) -> dict[str, float]:
        """One case. `times` is interleave()'s result; its first entry is ours.

        work: gives the rate and, measured now, the limit; else `rate` and `limit` are shown as they are.
        Returns: peer name -> its median time over ours.
        """
        ours, *peers = times
        spread = statistics.quantiles(times[ours], n=5, method="inclusive") if len(times[ours]) > 1 else times[ours] * 4
        median = statistics.median(times[ours])
        row = Row(op, case, seconds_text(median), f"{seconds_text(spread[0])} - {seconds_text(spread[-1])}", rate, limit, median)
        if work is not None:
            time.sleep(_SETTLE_S)
            found = work.limit(self.machine)
            row.work, row.limit_seconds, row.limit_kind = work, found.seconds, found.kind
            row.rate = work.rate_text(median, found.kind)
            row.limit = f"{work.rate_text(found.seconds, found.kind)} {found.kind}, {found.seconds / median:.0%}"
        ratios = {name: statistics.median(times[name]) / median for name in peers}
        row.peers = {name: (seconds_text(statistics.median(times[name])), ratios[name]) for name in peers}
        self.rows.append(row)
        return ratios

    def add_text(self, op: str, case: str, ours: str, *, limit: str = "") -> None:
        """A case of something that is not a time and that no peer has."""
        self.rows.append(Row(op, case, ours, limit=limit))

    def add_values(self, op: str, case: str, ours: str, peer_name: str, peer: str, ratio: float) -> None:
        """A case of something that is not a time; ratio: ours over the peer's."""
        self.rows.append(Row(op, case, ours, peers={peer_name: (peer, ratio)}))

    def text(self) -> str:
        lines = [
            f"## {self.title}",
            "",
            self.machine.description,
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + "---|" * len(HEADER),
        ]
        for row in self.rows:
            start = [row.op, row.case, row.ours, row.spread, row.rate, row.limit]
            digits = ".3g" if row.seconds else ".4f"
            peers = [[name, value, format(ratio, digits)] for name, (value, ratio) in row.peers.items()]
            lines += ["| " + " | ".join(start + peer) + " |" for peer in peers or [["", "", ""]]]
        return "\n".join(lines) + "\n"

    def json(self) -> str:
        time.sleep(_SETTLE_S)
        measured = self.machine.roofs() if any(row.work for row in self.rows) else {}
        rows = [asdict(row) for row in self.rows]
        content = {"title": self.title, "machine": self.machine.description, "roofs": measured, "rows": rows}
        return json.dumps(content, indent=1) + "\n"


    def write(self, name: str) -> None:
        """Keep it under bench/results/<device>/."""
        directory = results_directory(self.machine)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.md").write_text(self.text())
        (directory / f"{name}.json").write_text(self.json())


def results_directory(machine: Machine) -> Path:
    """Where a machine's results are kept."""
    return Path(__file__).parent / "results" / machine.name


def this_cpu() -> Machine:
    """The CPU that this runs on."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in fields.items()}
        model = f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"
    name = f"cpu-{_C.simd_level()}-{_C.num_threads()}t"
    description = f"{model}, {_C.num_threads()} threads, SIMD {_C.simd_level()}, {versions()}"
    return Machine(name, description, roofs.MEMORY, tuple(roofs.ARITHMETIC_BITS), roofs.memory_rate, roofs.arithmetic_rate)


def versions() -> str:
    """Of what was measured, and how."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"torch {torch.__version__}, tilestream {tilestream.__version__} at {commit or 'no commit'}; "
        "medians, ours and the peer in turn in one process"
    )
