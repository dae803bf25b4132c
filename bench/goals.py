"""What the attention kernel for Hopper is to reach: shown beside what it does (cuda/) and what it may (sm90_model.py).

Ratios are over the best peer in the same run, shares of the bandwidth measured in it.
"""

PREFILL_TFLOPS = 660  # bfloat16, causal, head_dim 128, from 4096 tokens on
FP8_PREFILL_RATIO = 1.10
DECODE_SHARE, DECODE_SHARE_8BIT = 0.93, 0.88  # large batches
DECODE_BATCH_1_US = 5.0  # up to 4096 tokens
SKEWED_DECODE_RATIO = 1.4
MIXED_OVER_LARGER_PART, MIXED_RATIO = 1.10, 1.35  # the ratio over the best serial pair, a geometric mean
CASCADE_RATIO = 3.0  # over the same batch without sharing


def prefill_ratio(head_dim: int, length: int) -> float:
    """Of bfloat16 causal prefill."""
    if length <= 1024:
        return 1.15
    return 1.20 if head_dim == 64 else 1.10
