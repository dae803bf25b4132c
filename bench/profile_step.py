"""Where a step's time goes, by op: `python -m bench.profile_step` prints a Markdown table (needs Linux `perf`).

Samples both threads while the engine reads prompts or decodes, and sorts the samples by the op that the symbol belongs
to. "waiting" is a worker that spins for its next launch: the price of what runs on one thread only.
"""

from __future__ import annotations

import collections
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.bench_model import Ours, q4_0_file

SECONDS = 6.0
# The first pattern that a symbol or its library matches names the op.
OPS = {
    "linear": r"run_linear|quantised_vectors|float_vectors|write_tile|prepare<",
    "norm + quantise": r"norm_rows|quantise_scaled_row|rms_norm|sum_squares",
    "gated activation + quantise": r"act_rows|act_and_mul",
    "quantise, a pass of its own": r"quantise_row",
    "attention": r"scores_|values_|softmax|attention|run_launch|merge|AttentionParams",
    "append_kv": r"append|write_row|BlockOrder|rotate",
    "sample": r"sample|Sample|mass",
    "embedding": r"embedding",
    "waiting": r"Team::|_State_impl.*Team|run_parallel|sched_yield|__schedule",
    "Python and torch": r"libpython|libtorch|libc10|_bindings|python3|libc\.so|libm\.so|ld-linux|\[vdso\]",
}
CASES = {"prompt of 512": 0, "decode, batch 1": 1, "decode, batch 8": 8, "decode, batch 32": 32}


def op_of(symbol: str, library: str) -> str:
    text = f"{library} {symbol}"
    return next((op for op, pattern in OPS.items() if re.search(pattern, text)), "other")


def shares(run) -> tuple[dict[str, float], int]:
    """Share of the samples per op while `run` is called for SECONDS, and how often it was."""
    with tempfile.TemporaryDirectory() as directory:
        data = str(Path(directory) / "perf.data")
        perf = subprocess.Popen(["perf", "record", "-q", "-F", "997", "-p", str(os.getpid()), "-o", data])
        time.sleep(0.5)
        num, until = 0, time.perf_counter() + SECONDS
        while time.perf_counter() < until:
            run()
            num += 1
        perf.send_signal(signal.SIGINT)
        perf.wait()
        report = ["perf", "report", "-i", data, "--stdio", "--no-children", "-t", "\t", "-F", "overhead,dso,symbol"]
        lines = subprocess.run(report, capture_output=True, text=True, check=True).stdout.splitlines()
    total: dict[str, float] = collections.Counter()
    for line in lines:
        if line and not line.startswith("#"):
            overhead, library, symbol = line.split("\t", 2)
            total[op_of(symbol, library)] += float(overhead.strip().rstrip("%"))
    return total, num


def main() -> None:
    engine = Ours(q4_0_file())
    columns = {}
    for case, batch_size in CASES.items():
        if batch_size == 0:
            engine.prompt()
            run = engine.prompt
        else:

            def run(batch_size: int = batch_size) -> None:
                engine.fill(batch_size)
                engine.decode()

            run()
        columns[case], _ = shares(run)
    print("| op | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for op in [*OPS, "other"]:
        print(f"| {op} | " + " | ".join(f"{column.get(op, 0.0):.1f} %" for column in columns.values()) + " |")


if __name__ == "__main__":
    sys.exit(main())
