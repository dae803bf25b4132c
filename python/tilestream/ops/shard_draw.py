"""Draws where each rank has the logits of some of the tokens: what a rank says of its part, and the token at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HISTOGRAM_ROUNDS, HISTOGRAM_BINS = 4, 256
_CHUNK = 1024  # tokens to a sum of masses


@dataclass(frozen=True, slots=True)
class ShardRows:
    """What all ranks know of the rows.

    Args:
        maxima: [batch_size], float32: the largest logit of all ranks; NaN or infinite: the row draws nothing.
        temperature, top_p, min_p: [batch_size], float32; seeds, positions: [batch_size], int64; as for sample().
    """

    maxima: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor


def shard_histogram(logits: torch.Tensor, rows: ShardRows, histograms: torch.Tensor) -> torch.Tensor:
    """One round of the search for the top-p threshold: masses of this rank's logits by the next 8 of their bits.

    Masses are exp((logit - maximum) / temperature) in 44-bit fixed point, and sums of them uint64, which an int64 tensor holds
    bit for bit: adding those of all ranks with torch is exact.

    Args:
        logits: [batch_size, this rank's tokens], float32, last dim contiguous.
        rows: of all rows.
        histograms: [rounds done, num_top_p, 256], int64: sums over the ranks of what the rounds before returned. The first
            num_top_p rows are searched.
    Returns:
        [num_top_p, 256], int64.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed; values are checked on the CPU only.
    """
    histogram = torch.zeros(histograms.size(1), HISTOGRAM_BINS, dtype=torch.int64, device=logits.device)
    torch.ops.tilestream.shard_histogram(logits, rows.maxima, rows.temperature, rows.top_p, histograms, histogram)
    return histogram


def shard_masses(logits: torch.Tensor, rows: ShardRows, histograms: torch.Tensor) -> torch.Tensor:
    """The masses of this rank's logits that top-p and min-p keep, by 1,024 tokens.

    Args:
        logits, rows: as above.
        histograms: [4, num_top_p, 256], int64: of all rounds. Rows from num_top_p on have no top-p.
    Returns:
        [batch_size, ceil(this rank's tokens / 1024)], int64. Their sum over a row is what shard_draw() wants of each rank.
    Raises:
        ValueError, TypeError: as above.
    """
    num_chunks = -(-logits.size(1) // _CHUNK)
    masses = torch.empty(logits.size(0), num_chunks, dtype=torch.int64, device=logits.device)
    torch.ops.tilestream.shard_masses(
        logits, rows.maxima, rows.temperature, rows.top_p, rows.min_p, histograms, masses
    )
    return masses


def shard_draw(
    logits: torch.Tensor,
    rows: ShardRows,
    histograms: torch.Tensor,
    chunk_masses: torch.Tensor,
    masses: torch.Tensor,
    *,
    rank: int,
    first_id: int,
) -> torch.Tensor:
    """The tokens of the rows whose draw falls into this rank's part: on a CPU those of sample() on the whole rows.

    Args:
        logits, rows, histograms: as for shard_masses().
        chunk_masses: what it returned.
        masses: [world_size, batch_size], int64: every rank's sum of these, in the order of their tokens.
        rank: this one, a row of masses.
        first_id: of this rank's tokens.
    Returns:
        [batch_size], int64; -1 where another rank has the token, or nobody: NaN or nothing finite in the row.
    Raises:
        ValueError, TypeError: as above.
    """
    tokens = torch.empty(logits.size(0), dtype=torch.int64, device=logits.device)
    torch.ops.tilestream.shard_draw(
        logits, rows.maxima, rows.temperature, rows.top_p, rows.min_p, rows.seeds, rows.positions,
        histograms, chunk_masses, masses, rank, first_id, tokens,
    )  # fmt: skip
    return tokens
