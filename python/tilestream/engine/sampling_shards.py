"""Draws where ranks have the logits of different tokens. What of a row crosses depends on its request:

    candidates   greedy and small top_k: the largest logit of a row is among the ranks' largest ones, the k largest among their
                 k largest each, and tilestream.ops.sample draws from those what it would have drawn from the row
    masses       temperature, top_p, min_p: sums of probability masses. For top_p four rounds find the threshold, 8 bits of it a
                 round; then each rank's kept mass says in whose part the draw falls, and that rank draws
                 (csrc/include/tilestream/shard_draw.h)
    whole rows   everything else: rank 0 gets the logits, and samples

Masses are fixed point, so sums of parts are exact: on a CPU all three give the token of one rank, bit for bit. What every rank
does follows from the plan alone: nothing waits for what a GPU has computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from tilestream.engine.batch import SamplingInputs
from tilestream.engine.request import Request
from tilestream.engine.step_plan import StepPlan
from tilestream.ops import ShardRows, sample, shard_draw, shard_histogram, shard_masses
from tilestream.ops.shard_draw import HISTOGRAM_BINS, HISTOGRAM_ROUNDS
from tilestream.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tilestream.distributed.communicator import Communicator

MOST_CANDIDATES = 256  # of a rank and row; beyond it, rows are gathered whole
SCORED_ROWS = 32  # prompt tokens whose logits are held at a time: 4 to 20 MB
_BLOCK = 32  # logits that are looked at by their largest first
_ID_BITS = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """Tokens of a step whose followers in the prompt are scored together.

    Args:
        request: whose.
        start: position of the first token.
        first_row, num_rows: where they are in the step.
    """

    request: Request
    start: int
    first_row: int
    num_rows: int


def scored_chunks(plan: StepPlan) -> Iterator[ScoredChunk]:
    """For the requests of a step that want logprobs of their prompt."""
    first_row = 0
    for item in plan.scheduled:
        if item.request.lacks_prompt_logprobs:
            end = min(item.start + item.num_new_tokens, item.request.num_prompt_tokens - 1)
            for start in range(item.start, end, SCORED_ROWS):
                row = first_row + start - item.start
                yield ScoredChunk(item.request, start, row, min(SCORED_ROWS, end - start))
        first_row += item.num_new_tokens


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """What every rank does for the draws of a step, as plain data.

    Args:
        few: rows, among those that are sampled, whose largest logits are enough for a draw.
        num_candidates: how many of them each rank gives.
        parted: rows that the ranks draw from where their logits are; those with top_p first.
        num_top_p: how many these are.
        whole: the other rows that are sampled: rank 0 gets all of their logits.
        scored: (first row, number of rows) of the step's tokens that rank 0 then scores, in turn.
    """

    few: tuple[int, ...]
    num_candidates: int
    parted: tuple[int, ...]
    num_top_p: int
    whole: tuple[int, ...]
    scored: tuple[tuple[int, int], ...]

    @property
    def num_rows(self) -> int:
        """That are sampled."""
        return len(self.few) + len(self.parted) + len(self.whole)


def draw_plan(plan: StepPlan) -> DrawPlan:
    """The draws of a step."""
    few, with_top_p, others, whole, num_candidates = [], [], [], [], 0
    for row, request in enumerate(item.request for item in plan.scheduled if item.samples):
        params = request.params
        if request.edits_logits or params.has_penalties or params.logprobs is not None:
            whole.append(row)
        elif num := _num_candidates(params):
            few.append(row)
            num_candidates = max(num_candidates, num)
        elif params.top_k > 0:
            whole.append(row)
        else:
            (with_top_p if params.top_p < 1.0 else others).append(row)
    return DrawPlan(
        few=tuple(few),
        num_candidates=num_candidates,
        parted=(*with_top_p, *others),
        num_top_p=len(with_top_p),
        whole=tuple(whole),
        scored=tuple((chunk.first_row, chunk.num_rows) for chunk in scored_chunks(plan)),
    )


def _num_candidates(params: SamplingParams) -> int:
    """How many of a row's largest logits a draw can depend on; 0: more than it pays to collect."""
    if params.temperature == 0.0:
        return 1
    return params.top_k if params.top_k <= MOST_CANDIDATES else 0


class VocabularyShards:
    """A rank's part of the draws.

    Args:
        communicator: of the ranks; all of them make the same calls.
        vocabularies: tokens of each rank, in order.
    """

    def __init__(self, communicator: Communicator, vocabularies: Sequence[range]) -> None:
        self._communicator, self._vocabularies = communicator, vocabularies
        self._first_id = vocabularies[communicator.rank].start
        self._most_ids = max(map(len, vocabularies))

    def candidates(self, logits: torch.Tensor, num: int) -> torch.Tensor | None:
        """On rank 0 the `num` largest logits of each row and rank: [num_rows, world_size * num] keys, in the order of their
        ids. None on others.

        Args:
            logits: [num_rows, this rank's tokens], float32.
        """
        if num == 1:
            values, ids = logits.max(1, keepdim=True)  # the first of equal ones
            keys = _keys(values, ids + self._first_id)
        else:
            # The k largest are in the k blocks with the largest ones.
            blocks = _wide(logits, -(-logits.size(1) // _BLOCK) * _BLOCK, -torch.inf).unflatten(1, (-1, _BLOCK))
            within, numbers = (torch.arange(n, device=logits.device) for n in (_BLOCK, blocks.size(1)))
            chosen = _ids(_keys(blocks.amax(2), numbers).topk(min(num, blocks.size(1))).values).unsqueeze(2)
            values = blocks.gather(1, chosen.expand(-1, -1, _BLOCK))
            keys = _keys(values, chosen * _BLOCK + within + self._first_id).flatten(1)
            keys = _wide(keys.topk(min(num, keys.size(1))).values, num, _NOTHING)
        gathered = self._communicator.all_gather(keys)
        if self._communicator.rank > 0:
            return None
        gathered = gathered.transpose(0, 1).flatten(1)
        return gathered.gather(1, _ids(gathered).argsort(1))

    def drawn(self, logits: torch.Tensor, s: SamplingInputs | None, num_top_p: int) -> torch.Tensor:
        """Draws from all ranks' logits as tilestream.ops.sample does: [num_rows], the tokens of the rows whose draw falls into
        this rank's part, -1 in others.

        Args:
            logits: [num_rows, this rank's tokens], float32.
            s: rank 0's parameters of the rows, of which top_k and penalties are off; None on other ranks.
            num_top_p: rows, the first ones, that have a top_p.
        """
        communicator = self._communicator
        rows = self._shared(logits.amax(1), s)  # NaN where a logit is
        histograms = torch.empty(HISTOGRAM_ROUNDS, num_top_p, HISTOGRAM_BINS, dtype=torch.int64, device=logits.device)
        for i in range(HISTOGRAM_ROUNDS if num_top_p else 0):
            histogram = shard_histogram(logits, rows, histograms[:i])
            torch.sum(communicator.all_gather(histogram), 0, out=histograms[i])
        chunk_masses = shard_masses(logits, rows, histograms)
        masses = communicator.all_gather(chunk_masses.sum(1))
        return shard_draw(
            logits, rows, histograms, chunk_masses, masses, rank=communicator.rank, first_id=self._first_id
        )

    def _shared(self, maxima: torch.Tensor, s: SamplingInputs | None) -> ShardRows:
        """Rank 0's parameters, and the largest of all ranks' maxima, on every rank."""
        message = torch.zeros(8, maxima.size(0), dtype=torch.int32, device=maxima.device)
        floats, integers = message[:4].view(torch.float32), message[4:].view(-1).view(torch.int64).view(2, -1)
        floats[0] = maxima
        if s is not None:
            torch.stack([s.temperature, s.top_p, s.min_p], out=floats[1:])
            torch.stack([s.seeds, s.positions], out=integers)
        gathered = self._communicator.all_gather(message)
        floats, integers = gathered[0, 1:4].view(torch.float32), gathered[0, 4:].view(-1).view(torch.int64).view(2, -1)
        return ShardRows(gathered[:, 0].view(torch.float32).amax(0), *floats, *integers)

    def whole(self, logits: torch.Tensor) -> torch.Tensor | None:
        """On rank 0 the rows of all tokens, [num_rows, vocab_size]. None on others.

        Args:
            logits: as above.
        """
        gathered = self._communicator.all_gather(_wide(logits, self._most_ids, 0.0))
        if self._communicator.rank > 0:
            return None
        parts = [part[:, : len(ids)] for part, ids in zip(gathered, self._vocabularies, strict=True)]
        return torch.cat(parts, 1)

    def agreed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens of all ranks' rows, on every rank.

        Args:
            tokens: [num_rows], int64; -1 in rows that are another rank's to draw, or that nobody can draw.
        """
        return self._communicator.all_gather(tokens).amax(0)


def sample_candidates(keys: torch.Tensor, s: SamplingInputs) -> torch.Tensor:
    """Tokens drawn from the candidates of each row, [num_rows]; -1 as in tilestream.ops.sample."""
    places = sample(
        _values(keys), s.temperature, s.top_k, s.top_p, s.min_p, s.seeds, s.positions, num_top_logprobs=None
    ).tokens
    ids = _ids(keys).gather(1, places.clamp(min=0).unsqueeze(1)).squeeze(1)
    return ids.where(places >= 0, -1)


def _wide(x: torch.Tensor, num_columns: int, value: float) -> torch.Tensor:
    return pad(x, (0, num_columns - x.size(1)), value=value) if x.size(1) < num_columns else x


# A key is a logit and its token's id in an int64, in the order of draws: larger logits first, of equal ones lower ids.


def _keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """-0 is as 0. NaN is as infinity: a row that has either draws nothing."""
    bits = (values + 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).view(torch.int32)
    return (bits ^ (bits >> 31 & _ID_BITS)).long() << 32 | (_ID_BITS - ids)


def _ids(keys: torch.Tensor) -> torch.Tensor:
    return _ID_BITS - (keys & _ID_BITS)


def _values(keys: torch.Tensor) -> torch.Tensor:
    bits = (keys >> 32).int()
    return (bits ^ (bits >> 31 & _ID_BITS)).view(torch.float32)


_NOTHING = int(_keys(torch.tensor(-torch.inf), torch.tensor(_ID_BITS)))
