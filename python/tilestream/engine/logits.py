"""What happens to rows of logits around the draw: bans, biases and grammars before it, log-probabilities after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tilestream.engine.request import Request

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
            values.masked_fill_(_forbidden(request, logits.size(1)).to(logits.device, non_blocking=True), -torch.inf)


def _forbidden(request: Request, vocab_size: int) -> torch.Tensor:
    """[vocab_size], bool: tokens that the request's constraint does not allow next."""
    bits = np.zeros(-(-vocab_size // 32) * 4, dtype=np.uint8)
    request.matcher.fill_allowed(bits.ctypes.data, bits.nbytes)
    return torch.from_numpy(np.unpackbits(~bits, bitorder="little", count=vocab_size).view(np.bool_))


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
