"""A tiny serving loop around a loaded model."""

from __future__ import annotations

import torch
from tilestream.engine.batch import StepInputs
from tilestream.models.llama import LlamaModel
from tilestream.ops import AttentionPlanner, KvCache

PAGE_SIZE = 16


class PagedRunner:
    """Runs token chunks of several sequences through a model, on shuffled pages."""

    def __init__(self, model: LlamaModel, *, num_sequences: int = 1, max_tokens: int = 160) -> None:
        config = model.config
        self.model = model
        pages_per_sequence = -(-max_tokens // PAGE_SIZE)
        shuffled = torch.randperm(num_sequences * pages_per_sequence, generator=torch.Generator().manual_seed(0))
        self.block_table = shuffled.view(num_sequences, pages_per_sequence).to(torch.int32)
        self.lengths = [0] * num_sequences
        self.caches = [
            KvCache.allocate(
                self.block_table.numel(), config.num_kv_heads, PAGE_SIZE, config.head_dim, kv_dtype="float32"
            )
            for _ in range(config.num_layers)
        ]
        self.planners = {
            window: AttentionPlanner(
                config.num_qo_heads, config.num_kv_heads, config.head_dim, page_size=PAGE_SIZE, window_left=window
            )
            for window in set(config.window_left)
        }

    def step(self, chunks: dict[int, list[int]]) -> torch.Tensor:
        """Append `chunks` {sequence: token ids} in one step; logits of all their tokens, [num_tokens, vocab]."""
        token_ids, positions, slots, kv_lens, cu_seqlens_q = [], [], [], [], [0]
        for sequence, chunk in chunks.items():
            for position in range(self.lengths[sequence], self.lengths[sequence] + len(chunk)):
                page = int(self.block_table[sequence, position // PAGE_SIZE])
                positions.append(position)
                slots.append(page * PAGE_SIZE + position % PAGE_SIZE)
            token_ids += chunk
            self.lengths[sequence] += len(chunk)
            kv_lens.append(self.lengths[sequence])
            cu_seqlens_q.append(len(token_ids))
        cu, lens = torch.tensor(cu_seqlens_q, dtype=torch.int32), torch.tensor(kv_lens, dtype=torch.int32)
        step = StepInputs(
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int32),
            slot_mapping=torch.tensor(slots, dtype=torch.int32),
            block_table=self.block_table[list(chunks)],
            plans={window: planner.plan(cu, lens) for window, planner in self.planners.items()},
            logits_rows=torch.arange(len(token_ids)),
            max_position=max(positions),
        )
        return self.model.forward(step, self.caches).clone()
