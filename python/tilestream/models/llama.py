"""The decoder of every family here: pre-norm attention and gated MLP on a residual stream.

    residual += x;  x = attention(norm(residual));  residual += x;  x = mlp(norm(residual));  ...

The additions are in the norms; or, on one rank and without post norms, in attention's and the MLP's last linear.

Families differ in data, not in code: biases, per-head norms, post norms, windows, RoPE and scales come from the
configuration and from which weights a checkpoint has.

Ranks of a tensor-parallel group have parts of it (tilestream.distributed.shard): attention, MLP and embedding then leave
parts of a sum in x, which the next norm adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from tilestream.distributed.two_streams import TwoStreams
from tilestream.layers.attention import Attention
from tilestream.layers.embedding import Embedding
from tilestream.layers.linear import Linear, StackedLinear
from tilestream.layers.mlp import GatedMlp
from tilestream.layers.norm import RmsNorm
from tilestream.layers.program import LayerPrograms
from tilestream.layers.rope import RopeTable
from tilestream.layers.scratch import Scratch, ScratchPool
from tilestream.models.config import ModelConfig
from tilestream.ops.kv_cache import KvCache
from tilestream.ops.quantise import QuantisedRows
from tilestream.placement import Placement

if TYPE_CHECKING:
    from tilestream.distributed.communicator import Communicator
    from tilestream.distributed.shard import Shard
    from tilestream.engine.batch import StepInputs

# On a CPU steps of up to this many tokens are replayed from a program: in larger ones the kernels take so long that the
# Python between them does not show.
_MAX_PROGRAM_TOKENS = 64
_FIRST_ROPE_ROWS = 1024  # tokens; doubled whenever a longer sequence comes


class DecoderLayer:
    """One layer. With post norms (Gemma) each branch is normalised again before it joins the residual stream."""

    def __init__(
        self,
        attention: Attention,
        mlp: GatedMlp,
        *,
        attn_norm: RmsNorm,
        mlp_norm: RmsNorm,
        post_attn_norm: RmsNorm | None,
        post_mlp_norm: RmsNorm | None,
    ) -> None:
        self.attention, self.mlp = attention, mlp
        self.attn_norm, self.mlp_norm = attn_norm, mlp_norm
        self.post_attn_norm, self.post_mlp_norm = post_attn_norm, post_mlp_norm

    def stages(self, buf: Scratch, step: StepInputs, cache: KvCache) -> Iterator[None]:
        """The layer, which yields where norms, in which ranks communicate, and computation take turns."""
        x, residual, channel = buf.x, buf.residual, buf.channel
        normed = self.attn_norm.add(x, residual, _rows_for(self.attention.qkv, buf), channel=channel)
        yield
        self.attention(normed, buf, step, cache)
        yield
        if self.post_attn_norm is not None:
            self.post_attn_norm(x, channel=channel)
        normed = self.mlp_norm.add(x, residual, _rows_for(self.mlp.gate_up, buf), channel=channel)
        yield
        self.mlp(normed, buf)
        yield
        if self.post_mlp_norm is not None:
            self.post_mlp_norm(x, channel=channel)


def _rows_for(reader: Linear | StackedLinear, buf: Scratch) -> QuantisedRows | None:
    """Where a norm writes the integers that `reader` takes; None if it takes floats."""
    return buf.x_int8.with_k4(reader.k4) if reader.takes_int8 and buf.x_int8 is not None else None


def _rows_of(x: torch.Tensor | QuantisedRows, rows: torch.Tensor) -> torch.Tensor | QuantisedRows:
    if isinstance(x, QuantisedRows):
        return QuantisedRows(*(tensor.index_select(0, rows) for tensor in (x.q, x.scale, x.sum)))
    return x.index_select(0, rows)


class LlamaModel:
    """A decoder-only language model over a paged KV cache.

    Args:
        config: shapes and switches; of this rank's layers, where there are several.
        embedding, layers, norm, lm_head: the parts, in the order a token meets them.
        ropes: the RoPE tables that the layers share.
        placement: where the parts are.
        shard: which part of the whole model this is.
        communicator: of its ranks; None: there is one.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        layers: Sequence[DecoderLayer],
        norm: RmsNorm,
        lm_head: Linear,
        ropes: Sequence[RopeTable],
        placement: Placement,
        shard: Shard,
        communicator: Communicator | None = None,
    ) -> None:
        self.config, self.placement, self.shard, self.communicator = config, placement, shard, communicator
        self._ropes, self._rope_rows = list(ropes), 0
        self.embedding, self.layers, self.norm, self.lm_head = embedding, list(layers), norm, lm_head
        self._branches_add = norm.has_sum
        has_gate_up = any(layer.mlp.gate_up.gate is None for layer in layers)
        self._scratch = ScratchPool(config, placement, communicator, branches_add=norm.has_sum, has_gate_up=has_gate_up)
        self._programs = LayerPrograms(placement.device)
        self._streams = TwoStreams(placement.device)
        self._replays = communicator is None or communicator.replays
        self._logits: torch.Tensor | None = None
        self._ran: Scratch | None = None  # what the last step left behind

    def reserve(self, num_tokens: int, *, num_rows: int, num_positions: int) -> None:
        """Make room at once for the largest step to come: buffers do not move then.

        Args:
            num_tokens: of a step.   num_rows: of logits.   num_positions: of a request.
        """
        self._scratch.get(num_tokens)
        self._head_rows(num_rows)
        self._reach(num_positions - 1)

    @torch.inference_mode()
    def forward(self, step: StepInputs, kv_caches: Sequence[KvCache]) -> torch.Tensor:
        """Run one step: append its keys and values, return the logits of the rows asked for.

        Args:
            step: see StepInputs.
            kv_caches: one per layer.
        Returns:
            [num_rows, vocab_size] float32, overwritten by the next call; of this rank's tokens alone, where there are several.
        """
        self._reach(step.max_position)
        num_tokens, rows = step.token_ids.size(0), step.logits_rows
        buf, logits = self._scratch.get(num_tokens), self._head_rows(num_tokens if rows is None else rows.size(0))
        self.embedding(step.token_ids, buf.branch[0])
        if not self._branches_add:
            buf.residual.zero_()
        # On a GPU decode steps, which are padded to few sizes.
        is_small = rows is None if self.placement.asynchronous else num_tokens <= _MAX_PROGRAM_TOKENS
        if is_small and self._replays:
            self._programs.run(self._run_layers, buf, step, kv_caches, logits)
        else:
            self._run_layers(buf, step, kv_caches, logits)
        self._ran = buf
        return self._finish(logits) if rows is None else self.logits_of(rows)

    @torch.inference_mode()
    def forward_halves(self, halves: Sequence[StepInputs], kv_caches: Sequence[KvCache]) -> torch.Tensor:
        """Run one step in two halves, of which one communicates while the other computes: forward() of both together.

        Args:
            halves: the step's tokens in their order (tilestream.engine.step_split). Only ranks have such steps.
            kv_caches: one per layer.
        """
        self._reach(max(half.max_position for half in halves))
        num_first, num_tokens = halves[0].token_ids.size(0), sum(half.token_ids.size(0) for half in halves)
        buf = self._scratch.get(num_tokens)
        parts = buf.part(0, num_first, channel=0), buf.part(num_first, num_tokens, channel=1)
        for part, half in zip(parts, halves, strict=True):
            self.embedding(half.token_ids, part.x)
        buf.residual.zero_()
        self._streams.run([self._stages(part, half, kv_caches) for part, half in zip(parts, halves, strict=True)])
        self._ran = buf
        first, second = (
            torch.arange(half.token_ids.size(0), device=self.placement.device) if half.logits_rows is None else half.logits_rows
            for half in halves
        )
        return self.logits_of(torch.cat([first, second + num_first]))

    @torch.inference_mode()
    def logits_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits of tokens of the last step, if that one had logits_rows. They overwrite those given before.

        Args:
            rows: [num_rows], int64.
        """
        logits, buf = self._head_rows(rows.size(0)), self._ran
        if self.communicator is not None:  # the final norm is done
            self._to_logits(_rows_of(self._normed(buf), rows), logits)
            return self._finish(logits)
        x, residual = self._last[:, : rows.size(0)]
        if not self._branches_add:
            torch.index_select(buf.x, 0, rows, out=x)
        torch.index_select(buf.residual, 0, rows, out=residual)
        self._project(x, residual, logits)
        return self._finish(logits)

    def _finish(self, logits: torch.Tensor) -> torch.Tensor:
        if self._narrow_logits is not None:
            logits.copy_(self._narrow_logits[: logits.size(0)])
        if cap := self.config.final_soft_cap:
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    def _run_layers(
        self, buf: Scratch, step: StepInputs, kv_caches: Sequence[KvCache], logits: torch.Tensor
    ) -> None:
        """The layers and, where every token's logits are wanted, the projection to them: what a program records, so nothing
        but our own ops stands here."""
        for _ in self._stages(buf, step, kv_caches):
            pass
        if step.logits_rows is None:
            if self.communicator is not None:
                self._to_logits(self._normed(buf), logits)
            else:
                self._project(buf.x, buf.residual, logits)

    def _stages(self, buf: Scratch, step: StepInputs, kv_caches: Sequence[KvCache]) -> Iterator[None]:
        """The layers, which yield where communication and computation take turns; communication is first and last. Several
        ranks do the final norm here, too, of all rows, for they do it together."""
        if self.communicator is not None and self.config.post_norms:  # norms that add get a whole x there
            self.communicator.allreduce_rmsnorm(buf.x, None, None, eps=self.norm.eps, channel=buf.channel)
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            yield from layer.stages(buf, step, cache)
        if self.communicator is not None:
            self.norm.add(buf.x, buf.residual, _rows_for(self.lm_head, buf), channel=buf.channel)

    def _normed(self, buf: Scratch) -> torch.Tensor | QuantisedRows:
        """Where ranks' final norm has left its rows."""
        return _rows_for(self.lm_head, buf) or buf.x

    def _project(self, x: torch.Tensor, residual: torch.Tensor, logits: torch.Tensor) -> None:
        """Final norm and output projection: only of rows that are wanted, for the vocabulary is the widest matrix."""
        int8 = None if self._last_int8 is None else self._last_int8[: x.size(0)]
        self._to_logits(self.norm.add(x, residual, int8), logits)

    def _to_logits(self, normed: torch.Tensor | QuantisedRows, logits: torch.Tensor) -> None:
        self.lm_head(normed, logits if self._narrow_logits is None else self._narrow_logits[: logits.size(0)])

    def _head_rows(self, num_rows: int) -> torch.Tensor:
        """Float32 logits of num_rows, and room for all that comes between the layers and them."""
        if self._logits is None or self._logits.size(0) < num_rows:
            config, device, dtype = self.config, self.placement.device, self.placement.dtype
            self._logits = torch.empty(num_rows, self.lm_head.n, device=device)
            self._last = torch.empty(2, num_rows, config.hidden_size, dtype=dtype, device=device)
            self._last_int8 = self._narrow_logits = None
            if self.lm_head.takes_int8:
                self._last_int8 = QuantisedRows.empty(num_rows, config.hidden_size, device=device)
            elif dtype != torch.float32:  # a linear of floats gives what it takes
                self._narrow_logits = torch.empty(num_rows, self.lm_head.n, dtype=dtype, device=device)
        return self._logits[:num_rows]

    def _reach(self, position: int) -> None:
        """Make the RoPE tables cover `position`, as far as the model's context goes; append_kv rejects the rest."""
        if position < self._rope_rows or self._rope_rows == self.config.max_position:
            return
        wanted = max(position + 1, 2 * self._rope_rows, _FIRST_ROPE_ROWS)
        self._rope_rows = min(wanted, self.config.max_position)
        for rope in self._ropes:
            rope.grow(self._rope_rows)
        self._programs.clear()
