"""ModelConfig from GGUF metadata."""

from __future__ import annotations

from tilestream.layers.rope import RopeConfig
from tilestream.models.config import ModelConfig
from tilestream.models.errors import ModelLoadError
from tilestream.models.gguf_reader import GgufFile

# general.architecture values. Mistral files carry "llama". The converters store llama's q and k rows
# permuted for GPT-J style rotation, the others' as they are.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
_SCALINGS = {"none": "default", "linear": "linear", "yarn": "yarn"}
_GEMMA3_WINDOW_PERIOD = 6  # five local layers, then a global one (Gemma 3 report, 2503.19786, section 2)
_GEMMA3_27B_LAYERS = 62  # the one size whose query_pre_attn_scalar is not head_dim (same report, table 1)


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Read a model's shape from GGUF metadata.

    Raises:
        ModelLoadError: unknown architecture, or a key that is missing, of a wrong type or out of range.
    """
    architecture = file.string("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path}: general.architecture is {architecture!r}; supported: {', '.join(ARCHITECTURES)}"
        )
    prefix = architecture + "."
    if file.integer(prefix + "expert_count", 0):
        raise ModelLoadError(f"{file.path}: mixture-of-experts models are not supported ({prefix}expert_count is set)")
    num_layers = file.integer(prefix + "block_count")
    if not 0 < num_layers < 2**16:
        raise ModelLoadError(f"{file.path}: {prefix}block_count is {num_layers}; it must be between 1 and 65535")
    hidden = file.integer(prefix + "embedding_length")
    num_qo_heads = _same_for_all_layers(file, prefix + "attention.head_count")
    num_kv_heads = _same_for_all_layers(file, prefix + "attention.head_count_kv", num_qo_heads)
    if num_qo_heads <= 0 or num_kv_heads <= 0:
        raise ModelLoadError(
            f"{file.path}: attention.head_count is {num_qo_heads} and attention.head_count_kv is {num_kv_heads}; "
            "both must be positive"
        )
    head_dim = file.integer(prefix + "attention.key_length", hidden // num_qo_heads)
    value_dim = file.integer(prefix + "attention.value_length", head_dim)
    if value_dim != head_dim or head_dim <= 0:
        raise ModelLoadError(
            f"{file.path}: attention.key_length is {head_dim} and value_length is {value_dim}; "
            "they must be equal and positive"
        )
    gemma = architecture == "gemma3"
    rope, rope_local = _ropes(file, prefix, architecture, head_dim)
    embedding = file.tensor("token_embd.weight")
    return ModelConfig(
        family=architecture,
        num_layers=num_layers,
        hidden_size=hidden,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_same_for_all_layers(file, prefix + "feed_forward_length"),
        vocab_size=embedding.num_rows,
        max_position=file.integer(prefix + "context_length"),
        rms_eps=file.number(prefix + "attention.layer_norm_rms_epsilon"),
        rope=rope,
        rope_local=rope_local,
        window_left=_windows(file, prefix, gemma, num_layers),
        sm_scale=_sm_scale(file, prefix, gemma, num_layers, hidden / num_qo_heads, head_dim),
        logits_soft_cap=file.number(prefix + "attn_logit_softcapping", 0.0),
        final_soft_cap=file.number(prefix + "final_logit_softcapping", 0.0),
        embedding_scale=hidden**0.5 if gemma else 1.0,
        activation="gelu_tanh" if gemma else "silu",
        qk_norm=architecture in ("qwen3", "gemma3"),
        post_norms=gemma,
        tied_embeddings=not file.has_tensor("output.weight"),
    ).validate(str(file.path))


def _same_for_all_layers(file: GgufFile, key: str, default: int | None = None) -> int:
    """An integer that some models store once per layer; layers that differ are not supported."""
    value = file.value(key)
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        value = value[0]
    if isinstance(value, list):
        raise ModelLoadError(f"{file.path}: {key} differs between layers ({value[:8]}...); one value is supported")
    return file.integer(key, default) if value is None else int(value)


def _sm_scale(file: GgufFile, prefix: str, gemma: bool, num_layers: int, heads_share: float, head_dim: int) -> float:
    stored = file.number(prefix + "attention.scale", 0.0)
    if stored:
        return stored
    return (heads_share if gemma and num_layers == _GEMMA3_27B_LAYERS else head_dim) ** -0.5


def _windows(file: GgufFile, prefix: str, gemma: bool, num_layers: int) -> tuple[int, ...]:
    """Per layer: window - 1 (a window of W tokens reaches W - 1 back), or -1."""
    window = file.integer(prefix + "attention.sliding_window", 0)
    if window <= 0:
        return (-1,) * num_layers
    pattern = file.value(prefix + "attention.sliding_window_pattern")
    if isinstance(pattern, list):
        sliding = [bool(entry) for entry in pattern]
    else:
        period = int(pattern) if pattern else _GEMMA3_WINDOW_PERIOD
        sliding = [not gemma or (i + 1) % period != 0 for i in range(num_layers)]
    return tuple(window - 1 if slides else -1 for slides in sliding)


def _ropes(file: GgufFile, prefix: str, architecture: str, head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """RoPE of full-attention and of sliding layers."""
    scaling = file.value(prefix + "rope.scaling.type", "none")
    if scaling not in _SCALINGS:
        raise ModelLoadError(
            f"{file.path}: {prefix}rope.scaling.type is {scaling!r}; supported: {', '.join(_SCALINGS)}"
        )
    theta = file.number(prefix + "rope.freq_base", 10000.0)
    factor = file.number(prefix + "rope.scaling.factor", 1.0)
    attention_factor = file.number(prefix + "rope.scaling.attn_factor", 0.0)
    rope = RopeConfig(
        theta=theta,
        rotary_dim=file.integer(prefix + "rope.dimension_count", head_dim),
        interleaved=architecture == "llama",
        rope_type=_SCALINGS[scaling],
        factor=factor or 1.0,
        original_max_position=file.integer(prefix + "rope.scaling.original_context_length",
                                           file.integer(prefix + "context_length")),
        attention_factor=attention_factor or None,
        freq_factors=_freq_factors(file),
    )
    if architecture != "gemma3":
        return rope, rope
    local_theta = file.number(prefix + "rope.freq_base_swa", 10000.0)
    return rope, RopeConfig(theta=local_theta, rotary_dim=rope.rotary_dim)


def _freq_factors(file: GgufFile) -> tuple[float, ...]:
    """Llama 3's frequency-dependent scaling, which converters bake into a tensor."""
    if not file.has_tensor("rope_freqs.weight"):
        return ()
    return tuple(file.vector("rope_freqs.weight").tolist())
