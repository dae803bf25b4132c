"""Calibration of the unified maximum: how large the largest logit of a row gets, layer by layer, on a text.

A decode that knows about where that lies need not look for it (FlashDecoding++, 2311.01282, section 3;
`unified_max` of ops.attention). Run once per model; `LLM(softmax_ranges=...)` reads the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tilestream.engine.batch import StepInputs
from tilestream.ops import AttentionPlanner, KvCache, gather_kv
from tilestream.placement import CPU
from tilestream.reference.attention import visible

if TYPE_CHECKING:
    from tilestream.layers.attention import Attention
    from tilestream.llm import LLM
    from tilestream.models.llama import LlamaModel

# How far below and above the unified maximum a row's largest logit may lie (natural log; csrc/cuda/attention_rows.cuh).
_FLOAT16_ROOM = 8 * math.log(2), 15 * math.log(2)
_BFLOAT16_ROOM = 64 * math.log(2), 64 * math.log(2)
_PAGE_SIZE = 16


def write_softmax_ranges(llm: LLM, text: str, path: str | os.PathLike, *, window_tokens: int = 512) -> None:
    """Measure a model on a text, and write what `LLM(softmax_ranges=path)` reads.

    Args:
        llm: an idle model.
        text: of the kind that will be served; cut into windows of `window_tokens`, the rest left out.
        path: the JSON file: {"model": name, "softmax_ranges": [[low, high] of each layer]}.
        window_tokens: more than 64, the context over which maxima are taken.
    Raises:
        ValueError: the text is shorter than a window, or the window too short.
    """
    if window_tokens <= 64:
        raise ValueError(f"window_tokens is {window_tokens}; allowed: more than 64, which no recorded program runs")
    tokens = llm.tokenizer.encode(text)
    windows = [tokens[i : i + window_tokens] for i in range(0, len(tokens) - window_tokens + 1, window_tokens)]
    if not windows:
        raise ValueError(f"the text has {len(tokens)} tokens; a window needs {window_tokens}")
    ranges = softmax_ranges(llm.engine.runner.model, windows)
    with open(path, "w") as file:
        json.dump({"model": llm.name, "softmax_ranges": ranges}, file, indent=1)


def use_softmax_ranges(model: LlamaModel, path: str | os.PathLike, *, kv_dtype: str) -> None:
    """Give each layer the unified maximum that its range in the file allows; a layer of too wide a range gets none, and so
    does one whose keys are stored less an offset.

    Args:
        model: not yet run.
        path: a file of write_softmax_ranges.
        kv_dtype: of the KV cache. Weights are float16 where the cache is, and else have bfloat16's range.
    Raises:
        ValueError: the file is of a model with another number of layers.
    """
    with open(path) as file:
        ranges = json.load(file)["softmax_ranges"]
    if len(ranges) != len(model.layers):
        raise ValueError(f"{os.fspath(path)} has softmax ranges of {len(ranges)} layers; the model has {len(model.layers)}")
    below, above = _FLOAT16_ROOM if kv_dtype == "float16" else _BFLOAT16_ROOM
    for layer, (low, high) in zip(model.layers, ranges, strict=True):
        # What room is left lies on both sides of the range, in proportion.
        centre = low + (high - low) * below / (below + above)
        shifted = kv_dtype == "int4" and layer.attention.key_rounding is not None  # by what the text's keys had
        layer.attention.unified_max = centre if high - low <= below + above and not shifted else None


@torch.inference_mode()
def softmax_ranges(model: LlamaModel, windows: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """The least and the greatest of all rows' largest logits (natural log, after sm_scale and soft cap), by layer.

    Args:
        model: on the CPU, with float32 activations; not running.
        windows: token ids of independent contexts of one length.
    Raises:
        ValueError: the model is not on the CPU.
    """
    if model.placement != CPU:
        raise ValueError(f"the model is on {model.placement.device} in {model.placement.dtype}; ranges are measured on the CPU")
    m = model.config
    num_tokens = len(windows[0])
    num_pages = -(-num_tokens // _PAGE_SIZE)
    caches = [KvCache.allocate(num_pages, m.num_kv_heads, _PAGE_SIZE, m.head_dim, kv_dtype="float32") for _ in model.layers]
    lengths = torch.tensor([0, num_tokens], dtype=torch.int32)
    plans = {
        w: AttentionPlanner(m.num_qo_heads, m.num_kv_heads, m.head_dim, page_size=_PAGE_SIZE, window_left=w).plan(
            lengths, lengths[1:]
        )
        for w in set(m.window_left)
    }
    slots = torch.arange(num_tokens, dtype=torch.int32)
    observers = [_Observer(layer.attention, cache, slots) for layer, cache in zip(model.layers, caches, strict=True)]
    try:
        for window in windows:
            model.forward(
                StepInputs(
                    token_ids=torch.tensor(window), positions=slots, slot_mapping=slots,
                    block_table=torch.arange(num_pages, dtype=torch.int32)[None], plans=plans,
                    logits_rows=slots[-1:].long(), max_position=num_tokens - 1,
                ),
                caches,
            )
    finally:
        for observer in observers:
            observer.leave()
    return [(observer.low, observer.high) for observer in observers]


class _Observer:
    """Stands before a layer's attention op and looks at the queries and the keys that it gets."""

    def __init__(self, attention: Attention, cache: KvCache, slots: torch.Tensor) -> None:
        self.attention, self.cache, self.slots = attention, cache, slots
        self.low, self.high = math.inf, -math.inf
        self.attend, attention._attend = attention._attend, self

    def leave(self) -> None:
        self.attention._attend = self.attend

    def __call__(self, q: torch.Tensor, *args, **kwargs) -> None:
        a, (num_tokens, num_qo_heads, _) = self.attention, q.shape
        k = gather_kv(self.cache, self.slots)[0].repeat_interleave(num_qo_heads // self.cache.k_cache.size(1), dim=1)
        logits = torch.einsum("ihd,jhd->hij", q, k) * a.sm_scale
        if a.logits_soft_cap:
            logits = a.logits_soft_cap * torch.tanh(logits / a.logits_soft_cap)
        seen = visible(num_tokens, num_tokens, causal=True, window_left=a.window_left)
        most = logits.masked_fill(~seen, -math.inf).amax(2)
        self.low, self.high = min(self.low, float(most.min())), max(self.high, float(most.max()))
        self.attend(q, *args, **kwargs)
