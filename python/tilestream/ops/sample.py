"""From logits to tokens in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties and the token history they look at.

    Args:
        repetition: [batch_size], float32, 1 is off: divides positive and multiplies negative logits of any seen token.
        presence, frequency: [batch_size], float32, 0 is off: subtracted once, and once per occurrence, for output tokens.
        history: int32, prompt then output ids of all rows, one row after another.
        history_indptr: [batch_size + 1], int32, where each row's history begins.
        history_prompt_len: [batch_size], int32: how many of a row's history are prompt.
    """

    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    history: torch.Tensor
    history_indptr: torch.Tensor
    history_prompt_len: torch.Tensor


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """tokens: [batch_size]; logprobs: [batch_size], or None when not wanted; top_ids, top_logprobs: [batch_size,
    num_top_logprobs]."""

    tokens: torch.Tensor
    logprobs: torch.Tensor | None
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    penalties: Penalties | None = None,
    num_top_logprobs: int | None = 0,
) -> SampleOutput:
    """Draw one token per row: penalties, temperature, top-k, top-p, min-p, in this order, without a sort.

    Args:
        logits: [batch_size, vocab_size], float32, last dim contiguous; not changed.
        temperature: [batch_size], float32; 0 takes the largest logit, the lowest id on ties.
        top_k: [batch_size], int32; 0 is off.
        top_p: [batch_size], float32, in (0, 1]; of what top-k left.
        min_p: [batch_size], float32, in [0, 1]; against the largest probability.
        seeds: [batch_size], int64; positions: [batch_size], int64. The draw depends on (seed, position) and the
            row's logits alone, never on the batch.
        penalties: None is off.
        num_top_logprobs: 0 to 64 most likely tokens to report; None: no logprobs at all, which saves a pass of exps.
    Returns:
        Tokens (int64; -1 where the row holds NaN or nothing to draw), their logprobs and the top ones (of the raw
        logits, natural log).
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed; values are checked on the CPU only.
    """
    batch_size = logits.size(0)
    device = logits.device
    tokens = torch.empty(batch_size, dtype=torch.int64, device=device)
    logprobs = None if num_top_logprobs is None else torch.empty(batch_size, device=device)
    top_ids = torch.empty(batch_size, num_top_logprobs or 0, dtype=torch.int64, device=device)
    top_logprobs = torch.empty(batch_size, num_top_logprobs or 0, device=device)
    p = penalties
    history = (
        (None,) * 6
        if p is None
        else (p.repetition, p.presence, p.frequency, p.history, p.history_indptr, p.history_prompt_len)
    )
    torch.ops.tilestream.sample(
        logits, temperature, top_k, top_p, min_p, seeds, positions, *history, tokens, logprobs, top_ids, top_logprobs
    )
    return SampleOutput(tokens, logprobs, top_ids, top_logprobs)
