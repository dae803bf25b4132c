// y = x . W^T + bias on packed weights, with a residual or a gate.
//
// Rows are cut into tiles of at most kTileRows, tiles into blocks whose activations stay in L2, and the
// (block, panel) pairs are dealt to the workers in contiguous shares, panels innermost: at small M every
// worker streams its own part of the weights once, at large M it takes rows of its own and uses a panel for a block.
// Every (row, column) is computed by the same operations in the same order whatever M, tile and worker.
#include <algorithm>

#include "cpu/activate.h"
#include "cpu/common/thread_pool.h"
#include "cpu/dequantise_panel.h"
#include "cpu/dispatch.h"
#include "cpu/linear_tile.h"
#include "cpu/quantise_row.h"
#include "tilestream/linear.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;      // activations of a block: a quarter of Zen 4's L2
constexpr int64_t kOwnCopyElements = 16 << 10;  // up to here every worker prepares all activations itself
// From so many rows a worker, each takes blocks of its own rows: what the ops before and after do with the same rows then
// stays in its caches. (Below, the weights are what costs, and each worker reads its own part of them.)
constexpr int64_t kRowsForOwnBlock = 32;
constexpr int64_t kDequantisedTiles = 32;       // of a block that shares dequantised weights: their sums lie on the stack
constexpr int64_t kNsPerWorker = 4000;          // a launch costs 1 to 2 us

struct Tiling {
  int64_t m, num_tiles, num_blocks, num_panels;
  int64_t first_tile(int64_t block) const { return num_tiles * block / num_blocks; }
  int64_t first_row(int64_t tile) const { return m * tile / num_tiles; }  // tiles differ by at most one row
};

// The activations in the form that the tile kernels read.
struct PreparedRows {
  const uint8_t* x;
  int64_t row_bytes;
  const float* scale = nullptr;  // int8 only
  const int32_t* sum = nullptr;
};

template <PackedFormat F>
constexpr int64_t row_bytes(int64_t k) {
  return F == PackedFormat::kFloat32 ? 4 * k : F == PackedFormat::kBFloat16 ? 2 * round_up(k, 2) : k;
}

// What the kernel can read where it lies.
template <PackedFormat F>
bool is_prepared(const LinearParams& p) {
  return (p.x == nullptr && p.x_q.k4 == 0) || (F == PackedFormat::kFloat32 && p.dtype == DType::kFloat32) ||
         (F == PackedFormat::kBFloat16 && p.dtype == DType::kBFloat16 && p.k % 2 == 0);
}

PreparedRows prepared_rows(const QuantisedRows& rows, int64_t k) {
  return {reinterpret_cast<const uint8_t*>(rows.q), k, rows.scale, rows.sum};
}

// INT4 elements as INT8: there is no faster arithmetic for them here.
void widen_row(const int8_t* nibbles, int64_t k4, int64_t k, int8_t* out) {
  // Eight nibbles, each in a byte, with their signs.
  const auto store_eight = [](int8_t* to, uint64_t bytes) {
    const uint64_t low = bytes & 0x0f0f0f0f0f0f0f0f, wide = low | (low & 0x0808080808080808) * 0x1e;
    std::memcpy(to, &wide, 8);
  };
  for (int64_t i = 0; i < k4; i += kGroupK, nibbles += kGroupK / 2) {
    for (int j = 0; j < kGroupK / 2; j += 8) {
      uint64_t bytes;
      std::memcpy(&bytes, nibbles + j, 8);
      store_eight(out + i + j, bytes);
      store_eight(out + i + kGroupK / 2 + j, bytes >> 4);
    }
  }
  std::memcpy(out + k4, nibbles, size_t(k - k4));
}

// m rows in one piece of memory: scales, sums, then the integers, each at a multiple of 64 bytes.
QuantisedRows rows_in(uint8_t* memory, int64_t m, int64_t k) {
  uint8_t* sums = memory + round_up(4 * m * ceil_div(k, kScaleK), 64);
  uint8_t* q = sums + round_up(4 * m * (k / kGroupK), 64);
  return {reinterpret_cast<int8_t*>(q), reinterpret_cast<float*>(memory), reinterpret_cast<int32_t*>(sums), 0};
}

template <PackedFormat F>
int64_t prepared_bytes(int64_t m, int64_t k) {
  const int64_t rows = round_up(m * row_bytes<F>(k), 64);
  if (!is_quantised(F)) return rows;
  return rows + round_up(4 * m * ceil_div(k, kScaleK), 64) + round_up(4 * m * (k / kGroupK), 64);
}

template <class E>
void row_to_bf16(const typename E::Storage* x, int64_t k, uint16_t* out) {
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) store_bf16x32(out + i, cvt_bf16x32(E::load(x + i), E::load(x + i + 16)));
  if (i < k) {
    alignas(64) uint16_t last[32];
    const int64_t rest = k - i;
    store_bf16x32(
        last, cvt_bf16x32(load_part<E>(x + i, rest), load_part<E>(x + i + 16, rest > 16 ? rest - 16 : 0)));
    std::memcpy(out + i, last, size_t(round_up(rest, 2)) * 2);
  }
}

template <class E>
void row_to_float(const typename E::Storage* x, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += 16) store_part<Float32>(out + i, load_part<E>(x + i, k - i), k - i);
}

// Rows [begin, end) of x into `memory`, which has room for all m.
template <PackedFormat F>
void prepare(const LinearParams& p, int64_t begin, int64_t end, uint8_t* memory) {
  if (p.x == nullptr) {
    for (int64_t row = begin; row < end; ++row) {
      const QuantisedRows from = row_of(p.x_q, row, p.k), to = row_of(rows_in(memory, p.m, p.k), row, p.k);
      widen_row(from.q, from.k4, p.k, to.q);
      std::memcpy(to.scale, from.scale, 4 * size_t(ceil_div(p.k, kScaleK)));
      std::memcpy(to.sum, from.sum, 4 * size_t(p.k / kGroupK));
    }
    return;
  }
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t row = begin; row < end; ++row) {
      const auto* x = static_cast<const typename E::Storage*>(p.x) + row * p.x_row_stride;
      uint8_t* to = memory + row * row_bytes<F>(p.k);
      if constexpr (F == PackedFormat::kFloat32) {
        row_to_float<E>(x, p.k, reinterpret_cast<float*>(to));
      } else if constexpr (F == PackedFormat::kBFloat16) {
        row_to_bf16<E>(x, p.k, reinterpret_cast<uint16_t*>(to));
      } else {
        quantise_row([&](int64_t i) { return E::load(x + i); }, p.k, row_of(rows_in(memory, p.m, p.k), row, p.k));
      }
    }
  });
}

template <PackedFormat F>
PreparedRows prepared_in(uint8_t* memory, const LinearParams& p) {
  if constexpr (is_quantised(F)) return prepared_rows(rows_in(memory, p.m, p.k), p.k);
  return {memory, row_bytes<F>(p.k)};
}

// `num` bias values from `column` on.
F32x16 bias_of(const LinearParams& p, int64_t column, int64_t num) {
  return p.bias != nullptr ? load_first(static_cast<const float*>(p.bias) + column, int(num)) : zero();
}

// What write_tile() does, for y's elements.
template <class E>
void write_sums(const LinearParams& p, const float* tile, int64_t first_row, int64_t rows, int64_t column) {
  using T = typename E::Storage;
  T* y = static_cast<T*>(p.y) + first_row * p.y_row_stride + column;
  const T* residual = static_cast<const T*>(p.residual);
  if (residual != nullptr) residual += first_row * p.residual_row_stride + column;
  const int64_t columns = std::min<int64_t>(kPanelColumns, p.n - column);
  for (int64_t c = 0; c < columns; c += 16) {
    const int64_t num = std::min<int64_t>(16, columns - c);
    const F32x16 bias = bias_of(p, column + c, num);
    for (int64_t r = 0; r < rows; ++r) {
      F32x16 sum = add(load(tile + r * kPanelColumns + c), bias);
      if (residual != nullptr) sum = add(sum, load_part<E>(residual + r * p.residual_row_stride + c, num));
      store_part<E>(y + r * p.y_row_stride + c, sum, num);
    }
  }
}

template <class E, Activation A>
void write_gated(const LinearParams& p, const float* tile, int64_t first_row, int64_t rows, int64_t column) {
  auto* y = static_cast<typename E::Storage*>(p.y) + first_row * p.y_row_stride + column / 2;
  const int64_t columns = std::min<int64_t>(kPanelColumns, p.n - column);
  const F32x16 low_bias = bias_of(p, column, std::min<int64_t>(16, columns));
  const F32x16 high_bias = columns > 16 ? bias_of(p, column + 16, columns - 16) : zero();
  for (int64_t r = 0; r < rows; ++r, tile += kPanelColumns, y += p.y_row_stride) {
    const F32x16 low = add(load(tile), low_bias), high = add(load(tile + 16), high_bias);
    store_part<E>(y, mul(activate<A>(evens(low, high)), odds(low, high)), columns / 2);
  }
}

// Adds the bias, then the residual, or joins gate and up, and writes what `rows` rows of one panel's columns become in y's
// dtype; columns past n are not touched.
void write_tile(const LinearParams& p, const float* tile, int64_t first_row, int64_t rows, int64_t column) {
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    switch (p.gate) {
      case Activation::kNone: return write_sums<E>(p, tile, first_row, rows, column);
      case Activation::kSilu: return write_gated<E, Activation::kSilu>(p, tile, first_row, rows, column);
      case Activation::kGeluTanh: return write_gated<E, Activation::kGeluTanh>(p, tile, first_row, rows, column);
    }
  });
}

// Lines that write_tile() will write come while the tile is computed: rows of a wide output lie far apart.
// Inlined, or GCC drops a call that does nothing but fetch.
[[gnu::always_inline]] inline void fetch_output(const LinearParams& p, int64_t first_row, int64_t rows, int64_t column) {
  const int64_t columns = std::min<int64_t>(kPanelColumns, p.n - column), shares = p.gate == Activation::kNone ? 1 : 2;
  const int64_t bytes = dtype_bytes(p.dtype, columns / shares);
  for (int64_t r = first_row; r < first_row + rows; ++r) {
    const auto* y = static_cast<const uint8_t*>(p.y) + dtype_bytes(p.dtype, r * p.y_row_stride + column / shares);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(y + i, 1, 3);
  }
}

// Tile t of num_tiles fetches its part of the next panel, spread over its steps.
template <PackedFormat F>
void set_fetch(TileArgs& args, const uint8_t* next, int64_t t, int64_t num_tiles) {
  const int64_t steps = ceil_div(args.k, kFetchStepK<F>);
  const int64_t lines = ceil_div(ceil_div(panel_bytes(F, args.k), 64 * steps), num_tiles);
  const int64_t offset = t * lines * steps * 64;
  const bool inside = next != nullptr && offset < panel_bytes(F, args.k);
  args.next = inside ? next + offset : nullptr;
  args.next_lines = inside ? int(lines) : 0;
}

template <PackedFormat F>
void run_share(const LinearParams& p, const Tiling& tiling, const PreparedRows& x, Share units) {
  const int64_t stride = panel_bytes(F, p.k);
  alignas(64) float out[kTileRows<F> * kPanelColumns];
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t block = unit / tiling.num_panels, panel = unit % tiling.num_panels;
    const int64_t begin = tiling.first_tile(block), end = tiling.first_tile(block + 1);
    const auto* weight = static_cast<const uint8_t*>(p.weight);
    // A lone tile that reads forwards leaves fetching to the hardware: 35 against 25 GB/s.
    const bool fetches = end - begin > 1 || (is_quantised(F) && tiling.m > kStreamedRows);
    const uint8_t* next =
        fetches && unit + 1 < units.end ? weight + (unit + 1) % tiling.num_panels * stride : nullptr;
    TileArgs args{};
    args.panel = weight + panel * stride;
    args.x_row_bytes = x.row_bytes;
    args.k = p.k;
    args.out = out;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = tiling.first_row(t), rows = tiling.first_row(t + 1) - first;
      args.x = x.x + first * x.row_bytes;
      if (is_quantised(F)) {
        args.scale = x.scale + first * ceil_div(p.k, kScaleK);
        args.sum = x.sum + first * (p.k / kGroupK);
      }
      set_fetch<F>(args, next, t - begin, end - begin);
      fetch_output(p, first, rows, panel * kPanelColumns);
      TileTable<F>::kRun[rows - 1](args);
      write_tile(p, out, first, rows, panel * kPanelColumns);
    }
  }
}

// The same for weights that meet floats: a part of a panel becomes one of X, which all tiles of the block then multiply.
template <PackedFormat F, PackedFormat X>
void run_dequantised_share(const LinearParams& p, const Tiling& tiling, const PreparedRows& x, Share units) {
  constexpr int64_t kPartK = kBlockSteps * 8 / row_bytes<X>(2);  // one block of a tile's sums
  alignas(64) uint8_t part[panel_bytes(X, kPartK)];
  alignas(64) float out[kDequantisedTiles][kTileRows<X> * kPanelColumns];
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t block = unit / tiling.num_panels, panel = unit % tiling.num_panels;
    const int64_t begin = tiling.first_tile(block), end = tiling.first_tile(block + 1);
    const auto* weight = static_cast<const uint8_t*>(p.weight) + panel * panel_bytes(F, p.k);
    for (int64_t k = 0; k < p.k; k += kPartK) {
      TileArgs args{};
      args.k = std::min(kPartK, p.k - k);
      dequantise_panel<F, X>(weight, p.k, k, k + args.k, part);
      args.panel = part;
      args.x_row_bytes = x.row_bytes;
      args.adds = k > 0;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = tiling.first_row(t);
        args.x = x.x + first * x.row_bytes + row_bytes<X>(k);
        args.out = out[t - begin];
        TileTable<X>::kRun[tiling.first_row(t + 1) - first - 1](args);
      }
    }
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = tiling.first_row(t);
      write_tile(p, out[t - begin], first, tiling.first_row(t + 1) - first, panel * kPanelColumns);
    }
  }
}

// Workers worth waking: weight bytes at 20 per ns, products at 200 per ns (about one Zen 4 core).
int useful_workers(const LinearParams& p) {
  const int64_t ns = packed_bytes(p.format, p.n, p.k) / 20 + p.m * p.n * p.k / 200;
  return int(std::clamp<int64_t>(ns / kNsPerWorker + 1, 1, 256));
}

// X: the format whose tile kernels multiply: F, or for floats that meet group-quantised weights the one these become.
template <PackedFormat F, PackedFormat X = F>
void run_linear(const LinearParams& p) {
  const int max_workers = std::min(useful_workers(p), num_threads());
  Tiling tiling{p.m, ceil_div(p.m, kTileRows<X>), 1, ceil_div(p.n, kPanelColumns)};
  const int64_t enough_units = ceil_div(4 * max_workers, tiling.num_panels);  // for even shares
  int64_t num_blocks = std::max(ceil_div(p.m * row_bytes<X>(p.k), kBlockBytes), max_workers > 1 ? enough_units : 1);
  if (X != F) num_blocks = std::max(num_blocks, ceil_div(tiling.num_tiles, kDequantisedTiles));
  const bool by_rows = p.m >= kRowsForOwnBlock * max_workers;
  tiling.num_blocks = std::clamp<int64_t>(by_rows ? round_up(num_blocks, max_workers) : num_blocks, 1, tiling.num_tiles);
  const bool ready = is_prepared<X>(p), own_copy = p.m * p.k <= kOwnCopyElements;
  const int64_t bytes = ready ? 0 : prepared_bytes<X>(p.m, p.k), own_bytes = own_copy ? bytes : 0;
  uint8_t* shared = static_cast<uint8_t*>(scratch(Scratch::kLaunch, size_t(bytes - own_bytes)));
  if (bytes > own_bytes) {
    auto prepare_share = [&](int worker, int num_workers) {
      const Share rows = share_of(p.m, worker, num_workers);
      prepare<X>(p, rows.begin, rows.end, shared);
    };
    parallel(max_workers, prepare_share);
  }
  auto multiply = [&](int worker, int num_workers) {
    uint8_t* memory = shared;
    if (own_bytes > 0) {
      memory = static_cast<uint8_t*>(scratch(Scratch::kWorker, size_t(own_bytes)));
      prepare<X>(p, 0, p.m, memory);
    }
    const PreparedRows x = !ready            ? prepared_in<X>(memory, p)
                           : is_quantised(X) ? prepared_rows(p.x_q, p.k)
                                             : PreparedRows{static_cast<const uint8_t*>(p.x),
                                                            dtype_bytes(p.dtype, p.x_row_stride)};
    const Share units = share_of(tiling.num_blocks * tiling.num_panels, worker, num_workers);
    if constexpr (X == F) {
      run_share<F>(p, tiling, x, units);
    } else {
      run_dequantised_share<F, X>(p, tiling, x, units);
    }
  };
  parallel(max_workers, multiply);
}

}  // namespace

void linear(const LinearParams& p) {
  if (p.m == 0 || p.n == 0) return;
  with_format(p.format, [&](auto format) {
    constexpr PackedFormat F = format;
    if constexpr (is_row_major(F)) {
      refuse_row_major();
    } else if constexpr (is_quantised(F)) {
      if (!p.weight_only) return run_linear<F>(p);
      p.dtype == DType::kBFloat16 ? run_linear<F, PackedFormat::kBFloat16>(p) : run_linear<F, PackedFormat::kFloat32>(p);
    } else {
      run_linear<F>(p);
    }
  });
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
