// The Hopper attention kernel's tiles: one table, read by the kernel, by its launcher and, through the bindings, by the planner
// of a step. Plain C++.
#pragma once

#include <cstdint>

namespace tilestream {

// How a tile reaches the tensor cores. kDirect: a 16-bit cache, as it is. kConverted: 8 and 4 bits, made 16 on the way.
// kFloat8: products of e4m3.
enum class TileKind : int32_t { kDirect, kConverted, kFloat8 };

struct AttentionTile {
  TileKind kind;
  int32_t dim_qk, dim_vo;  // most, of q and K, and of V and out
  // The wide lane: groups x 64 rows by tile_keys keys, and how many tiles of K and of V are in shared memory at once.
  int32_t wide_groups, tile_keys, stages;
  // The narrow lane: jobs of up to narrow_rows rows by 64 keys; 0: the tile has none, as registers or shared memory do not do.
  int32_t narrow_rows;
  // Registers of a thread of the loading, wide and narrow warpgroups, by setmaxnreg.
  int32_t load_registers, wide_registers, narrow_registers;

  constexpr int32_t wide_rows() const { return 64 * wide_groups; }
  constexpr int32_t num_groups() const { return 1 + wide_groups + (narrow_rows > 0); }
  // What a block has to give away: its 64k registers in units of 8 a thread, as a launch shares them out.
  constexpr int32_t registers() const { return 65536 / (128 * num_groups()) / 8 * 8 * num_groups(); }
};

// What limits each row. A head dim of 64: L2, which gives an SM about 24 bytes a cycle, where 128 rows would take 32: so 192
// rows. 96 and 128: registers (scores, weights and out of 64 rows: 64 + 32 + 64). 192 and more: out's registers leave room for 64
// keys. 256: q, K and V fill shared memory, and the wide lane takes decodes too. Converted: 128 rows of 64 keys, what is left of
// the registers goes to those that convert; L2 gives half the bytes. Products of e4m3 have no narrow lane: decodes over an fp8
// cache want a 16-bit q, and are converted.
constexpr AttentionTile kAttentionTiles[] = {
    {TileKind::kDirect, 64, 64, 3, 64, 4, 16, 40, 120, 80},
    {TileKind::kDirect, 96, 96, 2, 128, 2, 16, 40, 200, 72},
    {TileKind::kDirect, 128, 128, 2, 128, 2, 16, 40, 200, 72},
    {TileKind::kDirect, 192, 128, 2, 64, 2, 16, 40, 200, 72},
    {TileKind::kDirect, 192, 192, 2, 64, 2, 16, 40, 192, 88},
    {TileKind::kDirect, 256, 256, 2, 64, 2, 0, 40, 232, 0},
    {TileKind::kConverted, 64, 64, 2, 64, 4, 16, 80, 168, 88},
    {TileKind::kConverted, 128, 128, 2, 64, 2, 16, 80, 168, 88},
    {TileKind::kConverted, 256, 256, 2, 64, 2, 0, 56, 224, 0},
    {TileKind::kFloat8, 64, 64, 3, 64, 4, 0, 56, 152, 0},
    {TileKind::kFloat8, 128, 128, 2, 128, 2, 0, 72, 216, 0},
    {TileKind::kFloat8, 256, 256, 2, 64, 2, 0, 72, 216, 0},
};
constexpr int kNumAttentionTiles = sizeof(kAttentionTiles) / sizeof(kAttentionTiles[0]);

constexpr bool fits_registers(const AttentionTile& tile) {
  const int32_t at_launch = tile.registers() / tile.num_groups();
  return tile.load_registers + tile.wide_groups * tile.wide_registers + tile.narrow_registers <= tile.registers() &&
         tile.load_registers < at_launch && tile.wide_registers > at_launch && tile.narrow_registers < at_launch;
}
constexpr bool all_fit_registers() {
  for (const AttentionTile& tile : kAttentionTiles) {
    if (!fits_registers(tile)) return false;
  }
  return true;
}
static_assert(all_fit_registers(), "setmaxnreg would wait for ever, or be told to take by giving");

// The first row of the table that has room for these head dims; null: none.
constexpr const AttentionTile* attention_tile(TileKind kind, int dim_qk, int dim_vo) {
  for (const AttentionTile& tile : kAttentionTiles) {
    if (tile.kind == kind && dim_qk <= tile.dim_qk && dim_vo <= tile.dim_vo) return &tile;
  }
  return nullptr;
}

}  // namespace tilestream
