"""Drives a model's forward pass directly, for tests that want every logit."""

from __future__ import annotations

import torch

from tilestream import LLM
from tilestream.engine.batch import StepInputs
from tilestream.ops import AttentionPlanner, KvCache


@torch.inference_mode()
def all_logits(llm: LLM, tokens: list[int], *, chunk: int = 96, kv_dtype: str = "float32", page_size: int = 16) -> torch.Tensor:
    """Logits of every position of one sequence, computed in chunks over a paged cache of its own: [len(tokens), vocab]."""
    model, m = llm.engine.runner.model, llm.config
    num_pages = -(-len(tokens) // page_size)
    caches = [
        KvCache.allocate(num_pages, m.num_kv_heads, page_size, m.head_dim, kv_dtype=kv_dtype) for _ in range(m.num_layers)
    ]
    table = torch.randperm(num_pages, dtype=torch.int32)
    planners = {
        w: AttentionPlanner(m.num_qo_heads, m.num_kv_heads, m.head_dim, page_size=page_size, window_left=w)
        for w in set(m.window_left)
    }
    logits = []
    for start in range(0, len(tokens), chunk):
        end = min(start + chunk, len(tokens))
        positions = torch.arange(start, end, dtype=torch.int32)
        cu, kv = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        step = StepInputs(
            token_ids=torch.tensor(tokens[start:end]),
            positions=positions,
            slot_mapping=table[positions // page_size] * page_size + positions % page_size,
            block_table=table[None],
            plans={w: planner.plan(cu, kv) for w, planner in planners.items()},
            logits_rows=torch.arange(end - start),
            max_position=end - 1,
        )
        logits.append(model.forward(step, caches).clone())
    return torch.cat(logits)
