"""What a step takes by each way of communicating, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilestream.distributed.overlap_costs import OverlapCosts
from tilestream.distributed.overlap_simulator import Split, rule_cut, split_step_s, splits, whole_step_s
from tilestream.distributed.weave import COMMUNICATION_BLOCKS, middle_of


@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds of a step that is one prompt of num_tokens.

    Args:
        whole_s: by transport: "nccl" and "multimem", each followed by add and norm, "fused", and "none": no communication.
        split: the fastest cut and numbers of blocks. rule: the cut that the engine makes where nothing is measured, and the
            number of blocks that our kernel has.
    """

    num_tokens: int
    whole_s: dict[str, float]
    split: Split
    rule: Split


def compare(costs: OverlapCosts, num_tokens: int) -> Comparison:
    """Simulate them all."""
    cut, blocks = rule_cut(costs, num_tokens), (COMMUNICATION_BLOCKS, COMMUNICATION_BLOCKS)
    rule = Split(cut, *blocks, split_step_s(costs, num_tokens, cut, blocks))
    whole_s = {transport: whole_step_s(costs, num_tokens, transport) for transport in ("nccl", "multimem", "fused", "none")}
    return Comparison(num_tokens, whole_s, min(splits(costs, num_tokens), key=lambda split: split.step_s), rule)


_HEADER = (
    "tokens  NCCL + norm  multimem + norm    fused  our split  best split  no communication  over NCCL  over fused  "
    "  first half  blocks"
)
_NOTES = """times: ms. our split: by the rule of waves, with our kernel's blocks; then of the best split: times as fast as NCCL + norm and
as fused, tokens of its first half and how many more than the middle, blocks of communication beside attention/MLP"""


def table(steps: Sequence[Comparison]) -> str:
    """One line per step size."""
    lines = [_HEADER]
    for step in steps:
        whole_ms = {transport: seconds * 1e3 for transport, seconds in step.whole_s.items()}
        best, best_ms = step.split, step.split.step_s * 1e3
        lines.append(
            f"{step.num_tokens:6}  {whole_ms['nccl']:11.1f}  {whole_ms['multimem']:15.1f}  {whole_ms['fused']:7.1f}  "
            f"{step.rule.step_s * 1e3:9.1f}  {best_ms:10.1f}  {whole_ms['none']:16.1f}  {whole_ms['nccl'] / best_ms:9.2f}  "
            f"{whole_ms['fused'] / best_ms:10.2f}  {best.first:6} {best.first - middle_of(step.num_tokens):+5}  "
            f"{best.attention_blocks:3}/{best.mlp_blocks}"
        )
    return "\n".join([*lines, _NOTES])
