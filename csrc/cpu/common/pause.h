// What a thread does between two looks at a word that another writes.
#pragma once

namespace tilestream::cpu {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace tilestream::cpu
