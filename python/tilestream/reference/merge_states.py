"""Merge of partial attention results in float64."""

import math

import torch


def merge_states(v: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine partial outputs by their log-sum-exp.

    Args:
        v: [num_tokens, num_states, num_heads, head_dim]; a state with lse = -inf may hold anything.
        lse: [num_tokens, num_states, num_heads], natural log.
    Returns:
        out: [num_tokens, num_heads, head_dim], float64; 0 where every state is empty.
        out_lse: [num_tokens, num_heads], float64; -inf there.
    """
    lse = lse.double()
    empty = lse == -math.inf
    out_lse = torch.logsumexp(lse, 1)
    weight = torch.exp(lse - torch.where(out_lse == -math.inf, 0.0, out_lse).unsqueeze(1))
    values = torch.where(empty.unsqueeze(-1), 0.0, v.double())
    return (weight.unsqueeze(-1) * values).sum(1), out_lse
