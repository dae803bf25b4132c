"""The decoder of every family here: pre-norm attention and gated MLP on a residual stream.

    residual += x;  x = attention(norm(residual));  residual += x;  x = mlp(norm(residual));  ...

Families differ in data, not in code: biases, per-head norms, post norms, windows, RoPE and scales come from the
configuration and from which weights a checkpoint has.

Ranks of a tensor-parallel group have parts of it (tilestream.distributed.shard): attention, MLP and embedding then leave
parts of a sum in x, which the next norm adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tilestream.distributed.shard import Shard
from tilestream.layers.attention import Attention
from tilestream.layers.embedding import Embedding
from tilestream.layers.linear import Linear
from tilestream.layers.mlp import GatedMlp
from tilestream.layers.norm import RmsNorm
from tilestream.layers.program import LayerPrograms
from tilestream.layers.rope import RopeConfig, RopeTable
from tilestream.layers.scratch import Scratch, ScratchPool
from tilestream.models.config import ModelConfig
from tilestream.models.weights import WeightLoader
from tilestream.ops.kv_cache import KvCache
from tilestream.ops.quantise import QuantisedRows
from tilestream.placement import Placement

if TYPE_CHECKING:
    from tilestream.distributed.communicator import Communicator
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

    def __call__(self, buf: Scratch, step: StepInputs, cache: KvCache) -> None:
        x, residual = buf.x, buf.residual
        normed = self.attn_norm.add(x, residual, _rows_for(self.attention.qkv, buf))
        self.attention(normed, buf, step, cache)
        if self.post_attn_norm is not None:
            self.post_attn_norm(x)
        normed = self.mlp_norm.add(x, residual, _rows_for(self.mlp.gate_up, buf))
        self.mlp(normed, buf)
        if self.post_mlp_norm is not None:
            self.post_mlp_norm(x)


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
        self._scratch = ScratchPool(config, placement, communicator)
        self._programs = LayerPrograms(placement.device)
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
        self.embedding(step.token_ids, buf.x)
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
    def logits_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits of tokens of the last step, if that one had logits_rows. They overwrite those given before.

        Args:
            rows: [num_rows], int64.
        """
        logits, buf = self._head_rows(rows.size(0)), self._ran
        if self.communicator is not None:  # the final norm is done
            self._to_logits(_rows_of(_rows_for(self.lm_head, buf) or buf.x, rows), logits)
            return self._finish(logits)
        x, residual = self._last[:, : rows.size(0)]
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
        but our own ops stands here. What ranks have of the final norm's rows they need together, so all rows get it."""
        x, residual, all_rows = buf.x, buf.residual, step.logits_rows is None
        if self.communicator is not None and self.config.post_norms:  # norms that add get a whole x there
            self.communicator.allreduce_rmsnorm(x, None, None, eps=self.norm.eps)
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            layer(buf, step, cache)
        if self.communicator is not None:
            normed = self.norm.add(x, residual, _rows_for(self.lm_head, buf))
            if all_rows:
                self._to_logits(normed, logits)
        elif all_rows:
            self._project(x, residual, logits)

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


def build_model(config: ModelConfig, weights: WeightLoader, communicator: Communicator | None = None) -> LlamaModel:
    """Assemble a model, or a rank's part of it, from a checkpoint's weights.

    Args:
        config: the whole model's shape.
        weights: reads and packs tensors; names are GGUF's.
        communicator: of the ranks; None: there is one.
    Raises:
        ModelLoadError: a tensor is missing, surplus, or of another shape than `config` implies; or it cannot be cut for so
            many ranks.
    """
    rank, world_size = (0, 1) if communicator is None else (communicator.rank, communicator.world_size)
    block = weights.block([f"blk.{i}.ffn_down" for i in range(config.num_layers)]) if world_size > 1 else 1
    shard = Shard.of(config, rank, world_size, block=block)
    hidden, eps = config.hidden_size, config.rms_eps
    ropes = {rope: RopeTable(rope, weights.placement.device) for rope in map(config.layer_rope, range(config.num_layers))}
    tokens = shard.vocabulary
    table = weights.linear("token_embd", config.vocab_size, hidden, rows=tokens)
    layers = [_build_layer(config, weights, i, ropes, shard, communicator) for i in range(config.num_layers)]
    norm = RmsNorm(weights.vector("output_norm.weight", hidden), eps, None if config.post_norms else communicator)
    lm_head = table if config.tied_embeddings else weights.linear("output", config.vocab_size, hidden, rows=tokens)
    weights.check_all_used()
    embedding = Embedding(table.weight, config.embedding_scale, tokens if world_size > 1 else None)
    return LlamaModel(
        shard.local_config(config), embedding, layers, norm, lm_head, list(ropes.values()), weights.placement, shard, communicator
    )


def _build_layer(
    config: ModelConfig,
    weights: WeightLoader,
    layer_idx: int,
    ropes: dict[RopeConfig, RopeTable],
    shard: Shard,
    communicator: Communicator | None,
) -> DecoderLayer:
    hidden, inner, prefix = config.hidden_size, config.intermediate_size, f"blk.{layer_idx}."
    q_rows, kv_rows = shard.q_rows(config), shard.kv_rows(config)
    # The norm that follows attention and MLP directly adds what ranks have of their results.
    branch_end, branch_begin = (communicator, None) if config.post_norms else (None, communicator)

    def norm(name: str, size: int, communicator: Communicator | None = None) -> RmsNorm:
        return RmsNorm(weights.vector(f"{prefix}{name}.weight", size), config.rms_eps, communicator)

    attention = Attention(
        weights.stacked(
            [prefix + "attn_q", prefix + "attn_k", prefix + "attn_v"],
            [config.qo_size, config.kv_size, config.kv_size],
            hidden,
            rows=[q_rows, kv_rows, kv_rows],
        ),
        weights.linear(prefix + "attn_output", hidden, config.qo_size, columns=q_rows),
        q_norm=norm("attn_q_norm", config.head_dim) if config.qk_norm else None,
        k_norm=norm("attn_k_norm", config.head_dim) if config.qk_norm else None,
        rope=ropes[config.layer_rope(layer_idx)],
        window_left=config.window_left[layer_idx],
        sm_scale=config.sm_scale,
        logits_soft_cap=config.logits_soft_cap,
    )
    mlp = GatedMlp(
        weights.stacked([prefix + "ffn_gate", prefix + "ffn_up"], [inner, inner], hidden, rows=[shard.columns] * 2),
        weights.linear(prefix + "ffn_down", hidden, inner, columns=shard.columns),
        config.activation,
    )
    return DecoderLayer(
        attention,
        mlp,
        attn_norm=norm("attn_norm", hidden, branch_begin),
        mlp_norm=norm("ffn_norm", hidden, branch_begin),
        post_attn_norm=norm("post_attention_norm", hidden, branch_end) if config.post_norms else None,
        post_mlp_norm=norm("post_ffw_norm", hidden, branch_end) if config.post_norms else None,
    )
