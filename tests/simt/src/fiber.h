// A fiber: a stack and a saved stack pointer. Switching costs a few nanoseconds.
#pragma once

#include <cstddef>

namespace simt {

class Fiber {
 public:
  // AddressSanitizer's frames are several times larger.
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kStackBytes = 512 * 1024;
#else
  static constexpr size_t kStackBytes = 128 * 1024;
#endif

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(void (*entry)());  // the next resume() calls entry, which must end in finish()
  void resume();                // host -> fiber; returns at its next suspend() or finish()
  void suspend();               // fiber -> host
  [[noreturn]] void finish();   // fiber -> host, for good
  bool holds(const void* p) const { return p >= stack_ && p < static_cast<const char*>(stack_) + kStackBytes; }

 private:
  void* stack_;
  void* sp_ = nullptr;       // of the fiber while it is suspended
  void* host_sp_ = nullptr;  // of the host while the fiber runs
  void* fake_stack_ = nullptr;  // AddressSanitizer's, while suspended
  void* host_fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;

  static void entered();
  void (*entry_)() = nullptr;
};

}  // namespace simt
