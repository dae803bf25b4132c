"""The kernels as torch ops. Each file here is one op: its contract, its checks, one call.

The functions allocate their outputs; `torch.ops.tilestream.*` write into given ones and are what model code on a
hot path calls.
"""

from tilestream import _native  # noqa: F401  (registers torch.ops.tilestream)
from tilestream.ops import _fakes  # noqa: F401
from tilestream.ops.activation import (
    gelu_tanh_and_mul,
    gelu_tanh_and_mul_quant,
    silu_and_mul,
    silu_and_mul_quant,
)
from tilestream.ops.allreduce import allreduce_rmsnorm, rank_table
from tilestream.ops.append_kv import KeyRounding, append_kv, gather_kv
from tilestream.ops.attention import attention, merge_states
from tilestream.ops.kv_cache import KvCache
from tilestream.ops.linear import PackedFormat, PackedWeight, embedding, interleave_gate_up, linear, pack_gguf, pack_weight
from tilestream.ops.linear_choice import LinearKernel
from tilestream.ops.norm import fused_add_rms_norm, fused_add_rms_norm_quant, rms_norm, rms_norm_quant
from tilestream.ops.plan import AttentionPlan, AttentionPlanner
from tilestream.ops.quantise import QuantisedRows, hadamard, quantise
from tilestream.ops.sample import Penalties, SampleOutput, sample
from tilestream.ops.shard_draw import ShardRows, shard_draw, shard_histogram, shard_masses

__all__ = [
    "AttentionPlan",
    "AttentionPlanner",
    "KeyRounding",
    "KvCache",
    "LinearKernel",
    "PackedFormat",
    "PackedWeight",
    "Penalties",
    "QuantisedRows",
    "SampleOutput",
    "ShardRows",
    "allreduce_rmsnorm",
    "append_kv",
    "attention",
    "embedding",
    "fused_add_rms_norm",
    "fused_add_rms_norm_quant",
    "gather_kv",
    "gelu_tanh_and_mul",
    "gelu_tanh_and_mul_quant",
    "hadamard",
    "interleave_gate_up",
    "linear",
    "merge_states",
    "pack_gguf",
    "pack_weight",
    "quantise",
    "rank_table",
    "rms_norm",
    "rms_norm_quant",
    "sample",
    "shard_draw",
    "shard_histogram",
    "shard_masses",
    "silu_and_mul",
    "silu_and_mul_quant",
]
