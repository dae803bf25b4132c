"""vLLM's CPU build, in a virtual environment and a process of its own (`make bench-vllm`): its torch is not ours.

This file is both sides: VllmCpu starts itself as a script of that environment and asks it for one load after another.
"""

from __future__ import annotations

import asyncio
import ctypes.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"


def bf16_checkpoint(gguf: Path) -> Path:
    """The same weights as a bfloat16 Hugging Face checkpoint, which vLLM reads; made once, under build/bench/."""
    target = PYTHON.parents[2] / "build" / "bench" / "smollm2-bf16"
    if not (target / "config.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        dense = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=dense
        )
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
        model.save_pretrained(target)
    return target


class VllmCpu:
    """A vLLM engine as its server runs it (AsyncLLM), at its best setting here: tcmalloc and libiomp loaded first.

    Its processes are stopped between loads: idle, they poll each other, and would take the cores from whose turn it is.

    Args:
        checkpoint: Hugging Face directory.
        num_threads: OpenMP threads of the engine.
    """

    def __init__(self, checkpoint: Path, *, num_threads: int) -> None:
        begin_s = time.perf_counter()
        libraries = [ctypes.util.find_library("tcmalloc_minimal"), str(PYTHON.parents[1] / "lib" / "libiomp5.so")]
        self.preloaded = [library for library in libraries if library]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | {
            "LD_PRELOAD": ":".join(self.preloaded),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: 90,000 tokens of SmolLM2-135M
            "VLLM_CACHE_ROOT": str(checkpoint.parent / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            [PYTHON, __file__, checkpoint], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=open(checkpoint.parent / "vllm.log", "w"), process_group=0,
        )  # fmt: skip
        self._reply()
        self.start_s = time.perf_counter() - begin_s
        self._signal(signal.SIGSTOP)

    def load(self, asks: Sequence[tuple[float, int, int]]) -> list[list[float]]:
        """[sent_s, first_token_s, end_s, num_output_tokens] of requests of random tokens (bench.traffic.Ask)."""
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(asks) + "\n")
        self.process.stdin.flush()
        times = self._reply()
        self._signal(signal.SIGSTOP)
        return times

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def _reply(self) -> list:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with code {self.process.wait()}: its log is build/bench/vllm.log")
        return json.loads(line)


async def _serve(checkpoint: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            checkpoint, dtype="bfloat16", max_model_len=2048, max_num_seqs=256, enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )  # fmt: skip
    )
    vocab_size = engine.model_config.get_vocab_size()

    async def request(name: str, prompt: list[int], arrival_s: float, output_tokens: int, begin_s: float) -> list[float]:
        params = SamplingParams(
            max_tokens=output_tokens, min_tokens=output_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        await asyncio.sleep(begin_s + arrival_s - time.perf_counter())
        sent_s, first_s, num_tokens = time.perf_counter(), None, 0
        async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
            num_tokens = len(output.outputs[0].token_ids)
            if first_s is None and num_tokens:
                first_s = time.perf_counter()
        return [sent_s - begin_s, first_s - begin_s, time.perf_counter() - begin_s, num_tokens]

    def reply(value: list) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    reply([])  # ready
    for turn, line in enumerate(sys.stdin):
        asks = json.loads(line)
        prompts = [random.choices(range(vocab_size), k=prompt_tokens) for _, prompt_tokens, _ in asks]
        begin_s = time.perf_counter()
        reply(
            await asyncio.gather(*(
                request(f"{turn}-{i}", prompt, arrival_s, output_tokens, begin_s)
                for i, (prompt, (arrival_s, _, output_tokens)) in enumerate(zip(prompts, asks, strict=True))
            ))
        )  # fmt: skip
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
