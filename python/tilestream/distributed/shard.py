"""Which part of a model each rank of a tensor-parallel group has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilestream.models.config import ModelConfig

MOST_RANKS = 8  # kMaxRanks of csrc/include/tilestream/allreduce.h
_PANEL_COLUMNS = 32  # kPanelColumns of linear.h
# Columns that a quantised weight keeps together, where all ranks get some; else the smallest group that there is.
_GROUP, _SMALL_GROUP = 128, 32


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part. Parts are ranges, in order of rank.

    Attributes:
        rank, world_size: whose, and among how many.
        q_heads, kv_heads: of attention; each KV head with all its query heads, or, where ranks outnumber KV heads, one KV
            head that a few ranks hold and whose query heads they share.
        columns: of the MLP's inner size.
        vocabularies: tokens of each rank.
    """

    rank: int
    world_size: int
    q_heads: range
    kv_heads: range
    columns: range
    vocabularies: tuple[range, ...]

    @property
    def vocabulary(self) -> range:
        return self.vocabularies[self.rank]

    @staticmethod
    def of(config: ModelConfig, rank: int, world_size: int, *, block: int = 1) -> Shard:
        """The part of `rank`.

        Args:
            config: of the whole model.
            rank: from 0.
            world_size: number of ranks; any that leaves each a query head, at most MOST_RANKS.
            block: columns that cannot be taken apart in the checkpoint's MLP (Hadamard matrices: 128).
        Raises:
            ValueError: this model cannot be cut for so many ranks; says what is too small.
        """
        most = min(MOST_RANKS, config.num_qo_heads)
        if not 0 <= rank < world_size <= most:
            raise ValueError(
                f"rank {rank} of {world_size}: this model, of {config.num_qo_heads} query heads, runs on 1 to {most} ranks"
            )
        unit = _GROUP if -(-config.intermediate_size // _GROUP) >= world_size else _SMALL_GROUP
        q_heads, kv_heads = _heads(config, rank, world_size)
        return Shard(
            rank=rank,
            world_size=world_size,
            q_heads=q_heads,
            kv_heads=kv_heads,
            columns=_cut("intermediate_size", config.intermediate_size, max(unit, block), world_size)[rank],
            vocabularies=_cut("vocab_size", config.vocab_size, _PANEL_COLUMNS, world_size),
        )

    def q_rows(self, config: ModelConfig) -> range:
        """Of the query projection; the output projection's columns."""
        return range(self.q_heads.start * config.head_dim, self.q_heads.stop * config.head_dim)

    def kv_rows(self, config: ModelConfig) -> range:
        """Of the key projection, and of the value projection."""
        return range(self.kv_heads.start * config.head_dim, self.kv_heads.stop * config.head_dim)

    def local_config(self, config: ModelConfig) -> ModelConfig:
        """The shape of this rank's layers; hidden and vocabulary sizes stay the whole model's."""
        if self.world_size == 1:
            return config
        return replace(
            config,
            num_qo_heads=len(self.q_heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.columns),
        )


def _heads(config: ModelConfig, rank: int, world_size: int) -> tuple[range, range]:
    """Query and KV heads of a rank."""
    num_kv_heads, group_size = config.num_kv_heads, config.num_qo_heads // config.num_kv_heads
    if num_kv_heads >= world_size:
        kv_heads = _even(num_kv_heads, world_size)[rank]
        return range(kv_heads.start * group_size, kv_heads.stop * group_size), kv_heads
    holders = _even(world_size, num_kv_heads)  # ranks of each KV head
    head = next(i for i, ranks in enumerate(holders) if rank in ranks)
    queries = _even(group_size, len(holders[head]))[rank - holders[head].start]
    first = head * group_size
    return range(first + queries.start, first + queries.stop), range(head, head + 1)


def _even(num: int, parts: int) -> list[range]:
    """0 to num in so many parts, whose sizes differ by one at most."""
    bounds = [i * num // parts for i in range(parts + 1)]
    return [range(*bounds[i : i + 2]) for i in range(parts)]


def _cut(name: str, size: int, unit: int, world_size: int) -> tuple[range, ...]:
    """0 to size for each rank, in whole units but for the last one."""
    num_units = -(-size // unit)
    if num_units < world_size:
        raise ValueError(
            f"{name} is {size}, which is {num_units} times {unit} that stay together; at most {num_units} ranks get a part "
            f"of it, and there are {world_size}"
        )
    return tuple(range(part.start * unit, min(part.stop * unit, size)) for part in _even(num_units, world_size))
