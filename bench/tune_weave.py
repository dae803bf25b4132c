"""Measures from how many tokens on, and where, steps of a tensor-parallel model are best cut in two:

    torchrun --nproc-per-node 8 -m bench.tune_weave MODEL --write

Needs as many GPUs as ranks. A step is one prompt; whole and cut at each offset from its middle it takes turns, and medians of the
slowest rank count. --write puts the best offsets into weave_splits.json under the device's name and the model's shape, where the
runner looks them up (tilestream.distributed.weave), and leaves others alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.distributed as dist

from tilestream.distributed import connect
from tilestream.distributed.weave import TABLE, SplitRule, shape_key, split_rule
from tilestream.engine.config import EngineConfig
from tilestream.engine.runner import ModelRunner, most_step_tokens
from tilestream.engine.sampling_shards import draw_plan
from tilestream.engine.step_plan import ScheduledRequest, StepPlan
from tilestream.layers.scratch import scratch_bytes
from tilestream.models import load_model
from tilestream.placement import Placement

SIZES = (512, 768, 1024, 1536, 2048, 4096, 8192)
OFFSETS = (-256, -128, 0, 128, 256)
WHOLE = None
ROUNDS = 9
PAGE_SIZE = 32
NEVER = 1 << 30  # tokens

Times = dict[int, dict[int | None, float]]  # seconds, by tokens of the step and offset of the cut, or WHOLE


def measure(runner: ModelRunner, rule: SplitRule, sizes: tuple[int, ...], rounds: int = ROUNDS) -> Times:
    """On all ranks together.

    Args:
        rule: whose cuts are moved.
    """
    times: Times = {}
    for num_tokens in sizes:
        pages = list(range(-(-num_tokens // PAGE_SIZE)))
        prompt = SimpleNamespace(token_ids=[1] * num_tokens, pages=pages, lacks_prompt_logprobs=False)
        plan = StepPlan([ScheduledRequest(prompt, 0, num_tokens, samples=False)])
        rules = {offset: replace(rule, min_tokens=2, offsets={num_tokens: offset}) for offset in OFFSETS}
        seconds: dict[int | None, list[float]] = {choice: [] for choice in (WHOLE, *OFFSETS)}
        for _ in range(rounds + 1):
            for choice, taken in seconds.items():
                runner.split_rule = rules.get(choice)
                taken.append(_seconds(runner, plan))
        times[num_tokens] = {choice: statistics.median(taken[1:]) for choice, taken in seconds.items()}
    return times


def _seconds(runner: ModelRunner, plan: StepPlan) -> float:
    """From when all ranks are there to when the last of them has done the step."""
    device = runner.model.placement.device
    _slowest(runner, 0.0)
    begin_s = time.perf_counter()
    runner.follow(plan, draw_plan(plan))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _slowest(runner, time.perf_counter() - begin_s)


def _slowest(runner: ModelRunner, seconds: float) -> float:
    here = torch.tensor([seconds], dtype=torch.float64, device=runner.model.placement.device)
    return float(runner.communicator.all_gather(here).max())


def best(times: Times) -> dict:
    """A row of the table: cuts from the size on from which they always won."""
    offsets = {num_tokens: min(OFFSETS, key=row.__getitem__) for num_tokens, row in times.items()}
    lost = [num_tokens for num_tokens, row in times.items() if row[WHOLE] <= row[offsets[num_tokens]]]
    won = {num_tokens: offset for num_tokens, offset in offsets.items() if num_tokens > max(lost, default=0)}
    return {"min_tokens": min(won, default=NEVER), "offsets": {str(num_tokens): offset for num_tokens, offset in won.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--write", action="store_true", help=f"keep the best cuts in {TABLE.name}")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_weave measures GPUs, and torch sees none")
    placement = Placement.of(f"cuda:{os.environ['LOCAL_RANK']}")
    torch.cuda.set_device(placement.device)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    most = max(SIZES)
    config = EngineConfig(kv_cache_tokens=most, max_model_len=most, page_size=PAGE_SIZE, token_budget=most, max_num_seqs=1)
    whole = []  # the model's shape

    def connect_all(shape):
        whole.append(shape)
        return connect(None, placement, num_bytes=scratch_bytes(shape, placement, most_step_tokens(config))[0])

    model = load_model(arguments.model, placement=placement, connect=connect_all).model
    runner = ModelRunner(model, config)
    rule = split_rule(model.config, model.communicator, placement.device)
    times = measure(runner, rule, SIZES)
    if dist.get_rank() == 0:
        device = torch.cuda.get_device_name(placement.device)
        shape = shape_key(whole[0].hidden_size, whole[0].qo_size, whole[0].intermediate_size, dist.get_world_size())
        print(f"{device}, {shape}, {model.communicator.transport}")
        for num_tokens, row in times.items():
            whole_s = row[WHOLE]
            cuts = ", ".join(f"{offset:+} {row[offset] * 1e3:.2f} ms ({whole_s / row[offset]:.2f} x)" for offset in OFFSETS)
            print(f"  {num_tokens} tokens: whole {whole_s * 1e3:.2f} ms; cut at {cuts}")
        if arguments.write:
            table = json.loads(TABLE.read_text())
            table.setdefault(device, {})[shape] = best(times)
            TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    model.communicator.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
