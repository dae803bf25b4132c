"""A checkpoint's weights -> the parts of a LlamaModel, all of them or a rank's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilestream.distributed.shard import Shard
from tilestream.layers.attention import Attention
from tilestream.layers.embedding import Embedding
from tilestream.layers.mlp import GatedMlp
from tilestream.layers.norm import RmsNorm
from tilestream.layers.rope import RopeConfig, RopeTable
from tilestream.models.config import ModelConfig
from tilestream.models.errors import ModelLoadError
from tilestream.models.fmpq_checkpoint import HADAMARD_K
from tilestream.models.llama import DecoderLayer, LlamaModel
from tilestream.models.weights import WeightLoader

if TYPE_CHECKING:
    from tilestream.distributed.communicator import Communicator


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
    try:
        shard = Shard.of(config, rank, world_size, block=HADAMARD_K if weights.down_hadamard else 1)
    except ValueError as error:
        raise ModelLoadError(f"{weights.checkpoint.path}: {error}") from error
    hidden, eps = config.hidden_size, config.rms_eps
    ropes = {rope: RopeTable(rope, weights.placement.device) for rope in map(config.layer_rope, range(config.num_layers))}
    tokens = shard.vocabulary
    table = weights.linear("token_embd", config.vocab_size, hidden, rows=tokens)
    layers = [_build_layer(config, weights, i, ropes, shard, communicator) for i in range(config.num_layers)]
    adding = None if config.post_norms else communicator
    norm = RmsNorm(weights.vector("output_norm.weight", hidden), eps, adding, has_sum=_branches_add(config, communicator))
    lm_head = table if config.tied_embeddings else weights.linear("output", config.vocab_size, hidden, rows=tokens)
    weights.check_all_used()
    embedding = Embedding(table.weight, config.embedding_scale, tokens if world_size > 1 else None)
    return LlamaModel(
        shard.local_config(config), embedding, layers, norm, lm_head, list(ropes.values()), weights.placement, shard, communicator
    )


def _branches_add(config: ModelConfig, communicator: Communicator | None) -> bool:
    """Attention and MLP add their results to the residual stream: where nothing happens to these in between."""
    return communicator is None and not config.post_norms


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
    has_sum = _branches_add(config, communicator)

    def norm(name: str, size: int, communicator: Communicator | None = None, *, has_sum: bool = False) -> RmsNorm:
        return RmsNorm(weights.vector(f"{prefix}{name}.weight", size), config.rms_eps, communicator, has_sum=has_sum)

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
        key_rounding=weights.key_rounding(prefix + "attn_k", config.num_kv_heads, config.head_dim, heads=shard.kv_heads),
    )
    mlp = GatedMlp(
        weights.gated([prefix + "ffn_gate", prefix + "ffn_up"], inner, hidden, config.activation, rows=shard.columns),
        weights.linear(prefix + "ffn_down", hidden, inner, columns=shard.columns),
        config.activation,
        hadamard=weights.down_hadamard,
    )
    return DecoderLayer(
        attention,
        mlp,
        attn_norm=norm("attn_norm", hidden, branch_begin, has_sum=has_sum),
        mlp_norm=norm("ffn_norm", hidden, branch_begin, has_sum=has_sum),
        post_attn_norm=norm("post_attention_norm", hidden, branch_end) if config.post_norms else None,
        post_mlp_norm=norm("post_ffw_norm", hidden, branch_end) if config.post_norms else None,
    )
