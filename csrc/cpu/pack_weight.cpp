// Packing of weights into panels of 32 columns, from GGUF blocks or from separated codes.
//
// Panels are dealt to the workers; a panel is written group by group (32 k x 32 columns), so that the reads
// walk 32 rows in step and the writes are sequential. Columns past n get scale 0 and value 0.
#include <algorithm>
#include <cmath>

#include "cpu/common/thread_pool.h"
#include "cpu/elements.h"
#include "cpu/gguf_blocks.h"
#include "tilestream/linear.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

// Writes the 32 k of column `column`.
template <PackedFormat F>
void write_codes(const uint8_t* q, int column, uint8_t* codes) {
  using Layout = GroupLayout<F>;
  uint8_t* out = codes + column / 16 * Layout::kHalfBytes + column % 16 * 4;
  for (int v = 0; v < kGroupK / 8; ++v) {
    uint32_t low, high;  // k 4v .. 4v + 3 and 16 + 4v .. 16 + 4v + 3
    std::memcpy(&low, q + 4 * v, 4);
    std::memcpy(&high, q + 16 + 4 * v, 4);
    if constexpr (Layout::kFourBit) {
      const uint32_t word = low | high << 4;
      std::memcpy(out + 64 * v, &word, 4);
    } else {
      std::memcpy(out + 64 * v, &low, 4);
      std::memcpy(out + 64 * (v + 4), &high, 4);
    }
  }
}

template <PackedFormat F>
void write_scales(const float* scale, const float* zero, uint8_t* at) {
  auto* const scales = reinterpret_cast<uint16_t*>(at);
  for (int h = 0; h < kPanelColumns; h += 16) {
    store_f16(scales + h, load(scale + h));
    if constexpr (GroupLayout<F>::kHasZero) store_f16(scales + kPanelColumns + h, load(zero + h));
  }
}

// Q6_K's two scales become one for 8-bit codes around 128: a quarter of the larger, so that its 16 weights
// stay exact but for the scale's rounding to float16, and the others err by at most half a step. The step
// grows only where a code would not fit (scales of opposite sign, or a float16 that was rounded down).
void join_scales(GroupCodes& c) {
  constexpr float kLowest = -128.5f, kHighest = 127.5f;  // what rounds to -128..127
  constexpr uint16_t kLargestF16 = 0x7bff;
  F32x16 values[2];
  for (int h = 0; h < 2; ++h) values[h] = fma(load_u8(c.q + 16 * h), set1(c.scale[h]), set1(c.zero[h]));
  const float most = reduce_max(max(values[0], values[1]));
  const float least = -reduce_max(max(sub(zero(), values[0]), sub(zero(), values[1])));
  const float larger = std::fabs(c.scale[0]) >= std::fabs(c.scale[1]) ? c.scale[0] : c.scale[1];
  uint16_t bits = float_to_f16(larger * 0.25f);
  float scale = f16_to_float(bits);
  const auto fits = [&] {
    const float top = scale > 0 ? most : least, bottom = scale > 0 ? least : most;
    return (most == 0 && least == 0) || (scale != 0 && top / scale < kHighest && bottom / scale > kLowest);
  };
  while (!fits() && (bits & 0x7fff) < kLargestF16) scale = f16_to_float(++bits);
  const F32x16 inverse = set1(scale != 0 ? 1.0f / scale : 0.0f);
  for (int h = 0; h < 2; ++h) {
    const F32x16 code = min(max(mul(values[h], inverse), set1(-128.0f)), set1(127.0f));
    store_s8(reinterpret_cast<int8_t*>(c.q) + 16 * h, to_int(code));
  }
  for (int i = 0; i < kGroupK; ++i) c.q[i] ^= 0x80;  // int8 + 128
  c.set_all(scale, -128.0f * scale);
}

// Groups of one panel. decode(column, i, GroupCodes&) gives 32 k from 32 i of real columns, whose scales are those of their
// whole group; the rest are zero.
template <PackedFormat F, class Decode>
void pack_codes(uint8_t* panel, int64_t num_columns, int64_t k, Decode&& decode) {
  using Layout = GroupLayout<F>;
  uint8_t* out = panel;
  for (int64_t g = 0; g < ceil_div(k, group_k(F)); ++g) {
    float scale[kPanelColumns] = {}, zero[kPanelColumns] = {};
    GroupCodes codes = {};
    for (int part = 0; part < Layout::parts(k, g); ++part, out += Layout::kCodeBytes) {
      for (int column = 0; column < kPanelColumns; ++column) {
        if (column < num_columns) {
          decode(column, g * Layout::kParts + part, codes);
          scale[column] = codes.scale[0];
          zero[column] = codes.zero[0];
        } else {
          std::memset(codes.q, 0, sizeof(codes.q));
        }
        write_codes<F>(codes.q, column, out);
      }
    }
    write_scales<F>(scale, zero, out);
    out += Layout::kBytes - Layout::kScaleAt;
  }
}

// Float panels, or 32 rows of a row-major weight. read(column, k_begin, num, float* values) gives `num` (at most 32) values of a
// real column.
template <class Read>
void pack_floats(PackedFormat format, uint8_t* panel, int64_t num_columns, int64_t k, Read&& read) {
  for (int64_t begin = 0; begin < k; begin += kGroupK) {
    const int64_t num = std::min<int64_t>(kGroupK, k - begin);
    float values[kPanelColumns][kGroupK] = {};
    for (int64_t column = 0; column < num_columns; ++column) read(column, begin, num, values[column]);
    if (is_row_major(format)) {
      uint16_t* out = reinterpret_cast<uint16_t*>(panel) + begin;
      for (int64_t column = 0; column < num_columns; ++column) {
        for (int64_t i = 0; i < num; ++i) {
          const float v = values[column][i];
          out[column * k + i] = format == PackedFormat::kRowsFloat16 ? float_to_f16(v) : float_to_bf16(v);
        }
      }
    } else if (format == PackedFormat::kFloat32) {
      float* out = reinterpret_cast<float*>(panel) + begin * kPanelColumns;
      for (int64_t i = 0; i < num; ++i) {
        for (int c = 0; c < kPanelColumns; ++c) out[i * kPanelColumns + c] = values[c][i];
      }
    } else {
      uint16_t* out = reinterpret_cast<uint16_t*>(panel) + begin * kPanelColumns;
      for (int64_t i = 0; i < round_up(num, 2); ++i) {
        for (int c = 0; c < kPanelColumns; ++c) {
          out[(i / 2 * kPanelColumns + c) * 2 + i % 2] = float_to_bf16(values[c][i]);
        }
      }
    }
  }
}

// f(panel index, first column, number of real columns) for every panel, on the team.
template <class Fn>
void for_each_panel(int64_t n, Fn&& f) {
  auto body = [&](int worker, int num_workers) {
    const Share share = share_of(ceil_div(n, kPanelColumns), worker, num_workers);
    for (int64_t panel = share.begin; panel < share.end; ++panel) {
      const int64_t first = panel * kPanelColumns;
      f(panel, first, std::min<int64_t>(kPanelColumns, n - first));
    }
  };
  parallel(int(std::min<int64_t>(ceil_div(n, kPanelColumns), 256)), body);
}

template <class Block>
void pack_blocks(const PackGgufParams& p) {
  const int64_t stride = panel_bytes(p.format, p.k);
  uint8_t* packed = static_cast<uint8_t*>(p.packed) + p.panel_begin * stride;
  for_each_panel(p.n, [&](int64_t panel, int64_t first, int64_t num_columns) {
    const uint8_t* rows = p.rows + first * p.row_bytes;
    uint8_t* out = packed + panel * stride;
    const auto decode = [&](int64_t column, int64_t group, GroupCodes& c) {
      const int64_t g = p.skip / kGroupK + group;
      Block::decode(rows + column * p.row_bytes + g / Block::kGroups * Block::kBytes, g % Block::kGroups, c);
    };
    const auto decode_joined = [&](int64_t column, int64_t g, GroupCodes& c) {
      decode(column, g, c);
      if constexpr (Block::kScalesPerGroup == 2) join_scales(c);
    };
    const auto read = [&](int64_t column, int64_t begin, int64_t num, float* values) {
      GroupCodes c;
      decode(column, begin / kGroupK, c);
      for (int64_t i = 0; i < num; ++i) values[i] = float(c.q[i]) * c.scale[i / 16] + c.zero[i / 16];
    };
    switch (p.format) {
      case PackedFormat::kU4G32S: return pack_codes<PackedFormat::kU4G32S>(out, num_columns, p.k, decode);
      case PackedFormat::kU4G32: return pack_codes<PackedFormat::kU4G32>(out, num_columns, p.k, decode);
      case PackedFormat::kU8G32S:
        return pack_codes<PackedFormat::kU8G32S>(out, num_columns, p.k, decode_joined);
      case PackedFormat::kU8G32: return pack_codes<PackedFormat::kU8G32>(out, num_columns, p.k, decode);
      default: return pack_floats(p.format, out, num_columns, p.k, read);
    }
  });
}

template <class E>
void pack_elements(const PackGgufParams& p) {
  const int64_t stride = panel_bytes(p.format, p.k);
  uint8_t* packed = static_cast<uint8_t*>(p.packed) + p.panel_begin * stride;
  for_each_panel(p.n, [&](int64_t panel, int64_t first, int64_t num_columns) {
    const uint8_t* rows = p.rows + first * p.row_bytes;
    pack_floats(p.format, packed + panel * stride, num_columns, p.k,
                [&](int64_t column, int64_t begin, int64_t num, float* values) {
                  typename E::Storage raw[kGroupK] = {};
                  std::memcpy(raw, rows + column * p.row_bytes + begin * sizeof(raw[0]),
                              size_t(num) * sizeof(raw[0]));
                  store(values, E::load(raw));
                  store(values + 16, E::load(raw + 16));
                });
  });
}

template <PackedFormat F>
void pack_separated(const PackParams& p) {
  const int64_t stride = panel_bytes(F, p.k), num_scales = ceil_div(p.k, p.group);
  for_each_panel(p.n, [&](int64_t panel, int64_t first, int64_t num_columns) {
    pack_codes<F>(static_cast<uint8_t*>(p.packed) + panel * stride, num_columns, p.k,
                  [&](int64_t column, int64_t g, GroupCodes& c) {
                    const int64_t row = first + column, at = row * num_scales + g * kGroupK / p.group;
                    std::memcpy(c.q, p.q + row * p.k + g * kGroupK, kGroupK);
                    c.set_all(p.scale[at], GroupLayout<F>::kHasZero ? p.zero[at] : 0.0f);
                  });
  });
}

void pack_values(const PackParams& p) {
  const int64_t stride = panel_bytes(p.format, p.k);
  for_each_panel(p.n, [&](int64_t panel, int64_t first, int64_t num_columns) {
    pack_floats(p.format, static_cast<uint8_t*>(p.packed) + panel * stride, num_columns, p.k,
                [&](int64_t column, int64_t begin, int64_t num, float* values) {
                  std::memcpy(values, p.values + (first + column) * p.k + begin, size_t(num) * 4);
                });
  });
}

}  // namespace

void pack_gguf(const PackGgufParams& p) {
  switch (p.type) {
    case GgufType::kF32: return pack_elements<Float32>(p);
    case GgufType::kF16: return pack_elements<Float16>(p);
    case GgufType::kBF16: return pack_elements<BFloat16>(p);
    case GgufType::kQ4_0: return pack_blocks<BlockQ4_0>(p);
    case GgufType::kQ4_1: return pack_blocks<BlockQ4_1>(p);
    case GgufType::kQ8_0: return pack_blocks<BlockQ8_0>(p);
    case GgufType::kQ4_K: return pack_blocks<BlockQ4_K>(p);
    case GgufType::kQ5_K: return pack_blocks<BlockQ5_K>(p);
    case GgufType::kQ6_K: return pack_blocks<BlockQ6_K>(p);
  }
}

void pack_weight(const PackParams& p) {
  with_format(p.format, [&](auto format) {
    if constexpr (is_quantised(format)) {
      pack_separated<format>(p);
    } else {
      pack_values(p);
    }
  });
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
