"""A batch job in a process of its own, slow enough to be killed: `python -m tests.batch.killed_job IN
OUT`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .conftest import make_engine, run_job

if __name__ == "__main__":
    engine = make_engine(kv_cache_tokens=16 * 40)
    engine.runner.on_run = lambda plan: time.sleep(0.01)
    run_job(Path(sys.argv[1]), Path(sys.argv[2]), engine)
