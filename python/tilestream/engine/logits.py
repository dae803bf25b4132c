"""What happens to rows of logits around the draw: bans, biases and grammars before it, log-probabilities after."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch

from tilestream.engine.request import Request

logger = logging.getLogger("tilestream.engine")

EditedRow = tuple[int, Request]  # a row of logits, and whose it is


def edit_logits(logits: torch.Tensor, edited: Sequence[EditedRow]) -> None:
    """Apply min_tokens, logit_bias and the constraint of these rows' requests, in place; other rows are not touched.

    Args:
        logits: [num_rows, vocab_size], float32.
    """
    for row, request in edited:
        params, values = request.params, logits[row]
        if request.num_draws < params.min_tokens:
            values.index_fill_(0, _on(logits, request.end_token_ids), -torch.inf)
        if params.logit_bias:
            token_ids, biases = zip(*params.logit_bias, strict=True)
            values.index_add_(0, _on(logits, token_ids), _on(logits, biases, torch.float32))
        if request.matcher is not None:
            allowed = torch.zeros(-(-logits.size(1) // 32) * 4, dtype=torch.uint8)  # a bit per token
            try:
                request.matcher.fill_allowed(allowed.data_ptr(), allowed.numel())
            except Exception:  # with nothing allowed this request ends, and not the step
                logger.exception("the constraint of request %s failed", request.request_id)
            allowed = allowed.to(logits.device, non_blocking=True).int()
            values.add_(_addends(logits.device).index_select(0, allowed).view(-1)[: logits.size(1)])


@functools.cache
def _addends(device: torch.device) -> torch.Tensor:
    """[256, 8], float32: what the bits of each byte, lowest first, add to logits: 0 where set, -inf where not. A look-up
    and an addition take half as long as a masked_fill_."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return torch.where(bits > 0, 0.0, -torch.inf).to(device)


def _on(logits: torch.Tensor, values: Sequence, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row's token and of the most likely ones, as ops.sample gives them.

    Args:
        logits: [num_rows, vocab_size], float32.   tokens: [num_rows], int64.   num_top: how many of the most likely.
    Returns:
        logprobs: [num_rows]; top_ids, top_logprobs: [num_rows, num_top], most likely first.
    """
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(num_top)
    return logprobs.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1), top.indices, top.values
