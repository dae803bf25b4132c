"""The decoder of every family here: pre-norm attention and gated MLP on a residual stream.

    residual += x;  x = attention(norm(residual));  residual += x;  x = mlp(norm(residual));  ...

Families differ in data, not in code: biases, per-head norms, post norms, windows, RoPE and scales come from the
configuration and from which weights a checkpoint has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

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


class LlamaModel:
    """A decoder-only language model over a paged KV cache.

    Args:
        config: shapes and switches.
        embedding, layers, norm, lm_head: the parts, in the order a token meets them.
        ropes: the RoPE tables that the layers share.
        placement: where the parts are.
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
    ) -> None:
        self.config, self.placement = config, placement
        self._ropes, self._rope_rows = list(ropes), 0
        self.embedding, self.layers, self.norm, self.lm_head = embedding, list(layers), norm, lm_head
        self._scratch = ScratchPool(config, placement)
        self._programs = LayerPrograms(placement.device)
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
            [num_rows, vocab_size] float32, overwritten by the next call.
        """
        self._reach(step.max_position)
        num_tokens, rows = step.token_ids.size(0), step.logits_rows
        buf, logits = self._scratch.get(num_tokens), self._head_rows(num_tokens if rows is None else rows.size(0))
        self.embedding(step.token_ids, buf.x)
        buf.residual.zero_()
        # On a GPU decode steps, which are padded to few sizes.
        if rows is None if self.placement.asynchronous else num_tokens <= _MAX_PROGRAM_TOKENS:
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
        logits = self._head_rows(rows.size(0))
        x, residual = self._last[:, : rows.size(0)]
        torch.index_select(self._ran.x, 0, rows, out=x)
        torch.index_select(self._ran.residual, 0, rows, out=residual)
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
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            layer(buf, step, cache)
        if step.logits_rows is None:
            self._project(buf.x, buf.residual, logits)

    def _project(self, x: torch.Tensor, residual: torch.Tensor, logits: torch.Tensor) -> None:
        """Final norm and output projection: only of rows that are wanted, for the vocabulary is the widest matrix."""
        num_rows = x.size(0)
        normed = self.norm.add(x, residual, None if self._last_int8 is None else self._last_int8[:num_rows])
        self.lm_head(normed, logits if self._narrow_logits is None else self._narrow_logits[:num_rows])

    def _head_rows(self, num_rows: int) -> torch.Tensor:
        """Float32 logits of num_rows, and room for all that comes between the layers and them."""
        if self._logits is None or self._logits.size(0) < num_rows:
            config, device, dtype = self.config, self.placement.device, self.placement.dtype
            self._logits = torch.empty(num_rows, config.vocab_size, device=device)
            self._last = torch.empty(2, num_rows, config.hidden_size, dtype=dtype, device=device)
            self._last_int8 = self._narrow_logits = None
            if self.lm_head.takes_int8:
                self._last_int8 = QuantisedRows.empty(num_rows, config.hidden_size, device=device)
            elif dtype != torch.float32:  # a linear of floats gives what it takes
                self._narrow_logits = torch.empty(num_rows, config.vocab_size, dtype=dtype, device=device)
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


def build_model(config: ModelConfig, weights: WeightLoader) -> LlamaModel:
    """Assemble a model from a checkpoint's weights.

    Args:
        config: the model's shape.
        weights: reads and packs tensors; names are GGUF's.
    Raises:
        ModelLoadError: a tensor is missing, surplus, or of another shape than `config` implies.
    """
    hidden, eps = config.hidden_size, config.rms_eps
    ropes = {rope: RopeTable(rope, weights.placement.device) for rope in map(config.layer_rope, range(config.num_layers))}
    table = weights.linear("token_embd", config.vocab_size, hidden)
    layers = [_build_layer(config, weights, i, ropes) for i in range(config.num_layers)]
    norm = RmsNorm(weights.vector("output_norm.weight", hidden), eps)
    lm_head = table if config.tied_embeddings else weights.linear("output", config.vocab_size, hidden)
    weights.check_all_used()
    embedding = Embedding(table.weight, config.embedding_scale)
    return LlamaModel(config, embedding, layers, norm, lm_head, list(ropes.values()), weights.placement)


def _build_layer(
    config: ModelConfig, weights: WeightLoader, layer_idx: int, ropes: dict[RopeConfig, RopeTable]
) -> DecoderLayer:
    hidden, inner, eps, prefix = config.hidden_size, config.intermediate_size, config.rms_eps, f"blk.{layer_idx}."

    def norm(name: str, size: int) -> RmsNorm:
        return RmsNorm(weights.vector(f"{prefix}{name}.weight", size), eps)

    attention = Attention(
        weights.stacked(
            [prefix + "attn_q", prefix + "attn_k", prefix + "attn_v"],
            [config.qo_size, config.kv_size, config.kv_size],
            hidden,
        ),
        weights.linear(prefix + "attn_output", hidden, config.qo_size),
        q_norm=norm("attn_q_norm", config.head_dim) if config.qk_norm else None,
        k_norm=norm("attn_k_norm", config.head_dim) if config.qk_norm else None,
        rope=ropes[config.layer_rope(layer_idx)],
        window_left=config.window_left[layer_idx],
        sm_scale=config.sm_scale,
        logits_soft_cap=config.logits_soft_cap,
    )
    mlp = GatedMlp(
        weights.stacked([prefix + "ffn_gate", prefix + "ffn_up"], [inner, inner], hidden),
        weights.linear(prefix + "ffn_down", hidden, inner),
        config.activation,
    )
    return DecoderLayer(
        attention,
        mlp,
        attn_norm=norm("attn_norm", hidden),
        mlp_norm=norm("ffn_norm", hidden),
        post_attn_norm=norm("post_attention_norm", hidden) if config.post_norms else None,
        post_mlp_norm=norm("post_ffw_norm", hidden) if config.post_norms else None,
    )
