"""What a step costs, as a formula: prefill chunks are cut by it, and the simulator's clock runs on it.

    step_s = fixed_s + token_s * T + dense_token_s * max(0, T - knee_tokens)
           + sample_s * S + kv_token_s * K + pair_s * P

T: tokens of the step. S: tokens that it draws. K: keys that its decodes read, each its whole context. P: (query, key) pairs
of its prefill chunks; a chunk of n tokens behind `start` others has n * start + n * (n + 1) / 2.
Up to the knee the weights' bytes bind, beyond it their arithmetic. No coefficient is negative, so each added token costs.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Protocol


class StepCounts(Protocol):
    """What the formula asks of a step; StepPlan has it."""

    num_tokens: int
    num_samples: int
    num_prefill_tokens: int
    num_decode_keys: int
    num_prefill_pairs: int


def prefill_pairs(start: int, num_tokens: int) -> int:
    """(query, key) pairs of a causal chunk behind `start` tokens."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """The formula's coefficients, in seconds (knee_tokens: in tokens).

    Args:
        source: where they come from, in words: measured on what, or estimated how.
    Raises:
        ValueError: which coefficient is negative or no finite number.
    """

    fixed_s: float
    token_s: float
    sample_s: float
    kv_token_s: float
    pair_s: float
    dense_token_s: float = 0.0
    knee_tokens: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "source" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{field.name} of a cost model must be a number >= 0, got {value!r}")

    def seconds(self, num_tokens: int, num_samples: int, num_decode_keys: int, num_prefill_pairs: int) -> float:
        """A step's time by its counts: T, S, K and P above."""
        dense_tokens = num_tokens - self.knee_tokens
        return (
            self.fixed_s
            + self.token_s * num_tokens
            + (self.dense_token_s * dense_tokens if dense_tokens > 0 else 0.0)
            + self.sample_s * num_samples
            + self.kv_token_s * num_decode_keys
            + self.pair_s * num_prefill_pairs
        )

    def step_s(self, step: StepCounts) -> float:
        """A step's time."""
        return self.seconds(step.num_tokens, step.num_samples, step.num_decode_keys, step.num_prefill_pairs)

    def affordable_tokens(self, step: StepCounts, start: int, most: int, target_s: float) -> int:
        """The most tokens of one more chunk, behind `start` others, with which the step takes no longer than target_s.

        The chunk is taken to end its prompt, and so to draw a token.
        """
        low, high = 0, most + 1  # the time rises with the tokens: `low` fits or is 0, `high` does not or is too many
        while high - low > 1:
            middle = (low + high) // 2
            pairs = step.num_prefill_pairs + prefill_pairs(start, middle)
            if self.seconds(step.num_tokens + middle, step.num_samples + 1, step.num_decode_keys, pairs) <= target_s:
                low = middle
            else:
                high = middle
        return low

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: str | PathLike[str]) -> CostModel:
        """Read what save() has written.

        Raises:
            ValueError: the file, and what is wrong in it.
        """
        try:
            return CostModel(**json.loads(Path(path).read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no cost model: {error}") from None


def estimate(
    *, weight_bytes: float, linear_flops_per_token: float, kv_bytes_per_token: float, attention_flops_per_pair: float,
    sample_bytes: float, memory_bytes_s: float, flops_s: float, fixed_s: float, source: str,
) -> CostModel:  # fmt: skip
    """A cost model by formula, for a device that is not at hand: the roofs of its memory and arithmetic.

    A step reads all weights (weight_bytes / memory_bytes_s), which hides the arithmetic of the first
    knee = weight_bytes / memory_bytes_s / (linear_flops_per_token / flops_s) tokens; each one more costs its arithmetic.

    Args:
        memory_bytes_s, flops_s: what kernels reach, not what the data sheet says.
        sample_bytes: read and written per drawn token (its logits).
        fixed_s: launches and the host, per step.
    """
    token_s = linear_flops_per_token / flops_s
    weights_s = weight_bytes / memory_bytes_s
    return CostModel(
        fixed_s=fixed_s + weights_s,
        token_s=0.0,
        dense_token_s=token_s,
        knee_tokens=round(weights_s / token_s),
        sample_s=sample_bytes / memory_bytes_s,
        kv_token_s=kv_bytes_per_token / memory_bytes_s,
        pair_s=attention_flops_per_pair / flops_s,
        source=source,
    )


# Llama 3 8B, bfloat16: 8.03e9 parameters, of which 0.525e9 are the embedding, of which a token reads one row; 32 layers, 8 KV
# heads of 128, 32 query heads; 128,256 logits in float32, written and read. An H200: 4.8 TB/s and 989 TFLOP/s (dense
# bfloat16), of which 80% and 55% are taken as reached.
H200_LLAMA3_8B = estimate(
    weight_bytes=2 * 7.5e9,
    linear_flops_per_token=2 * 7.5e9,
    kv_bytes_per_token=2 * 32 * 8 * 128 * 2,
    attention_flops_per_pair=4 * 32 * 32 * 128,
    sample_bytes=2 * 4 * 128_256,
    memory_bytes_s=0.8 * 4.8e12,
    flops_s=0.55 * 989e12,
    fixed_s=0.3e-3,
    source="estimate by formula, nothing measured: Llama 3 8B in bfloat16 on one H200",
)
BUILT_IN = {"estimate-h200-llama3-8b": H200_LLAMA3_8B}
