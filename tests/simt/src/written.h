// Which bytes of global memory a launch has written.
#pragma once

#include <bitset>
#include <cstdint>
#include <unordered_map>

namespace simt {

class Written {
 public:
  void add(const void* address, size_t bytes) {
    for_each(address, bytes, [&](uintptr_t page, size_t offset) {
      if (page != last_page_ || last_ == nullptr) last_page_ = page, last_ = &pages_[page];
      last_->set(offset);
      return true;
    });
  }
  bool overlaps(const void* address, size_t bytes) const {
    return !for_each(address, bytes, [&](uintptr_t page, size_t offset) {
      const auto found = pages_.find(page);
      return found == pages_.end() || !found->second.test(offset);
    });
  }
  void add(const Written& other) {
    for (const auto& [page, bytes] : other.pages_) pages_[page] |= bytes;
  }
  void clear() { pages_.clear(), last_ = nullptr; }

 private:
  static constexpr size_t kPage = 4096;
  template <class F>
  static bool for_each(const void* address, size_t bytes, F f) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    for (uintptr_t at = begin; at < begin + bytes; ++at) {
      if (!f(at / kPage, at % kPage)) return false;
    }
    return true;
  }
  std::unordered_map<uintptr_t, std::bitset<kPage>> pages_;
  uintptr_t last_page_ = 0;
  std::bitset<kPage>* last_ = nullptr;
};

}  // namespace simt
