// The table of attention kernels: its rows stand in attention_{sm90,16bit,fp8,int,float}.cu.
#pragma once

#include <span>

#include "tilestream/attention.h"

namespace tilestream::cuda {

struct AttentionRow {
  DType kv_dtype, q_dtype;
  int max_dim_qk, max_dim_vo;  // of q and K, of V
  void (*launch)(const AttentionParams&, Stream);
  bool (*fits)(const AttentionParams&) = nullptr;  // what else the kernel asks for; null: nothing
  bool merges = false;                             // itself, where the plan lets it
};

// For Hopper alone; none in a build without sm_90a.
std::span<const AttentionRow> attention_rows_of_sm90_bfloat16();
std::span<const AttentionRow> attention_rows_of_sm90_float16();
std::span<const AttentionRow> attention_rows_of_sm90_fp8();
std::span<const AttentionRow> attention_rows_of_sm90_int();
// For all.
std::span<const AttentionRow> attention_rows_of_16bit();
std::span<const AttentionRow> attention_rows_of_fp8();
std::span<const AttentionRow> attention_rows_of_int();
std::span<const AttentionRow> attention_rows_of_float();

}  // namespace tilestream::cuda
