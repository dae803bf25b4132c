// The text of a report: threads, and addresses of code as lines of the kernel.
#include <dlfcn.h>
#include <execinfo.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <mutex>

#include "machine.h"

namespace simt {
namespace {

// addr2line prints a function and a file:line per inlined call, innermost first; the first outside the emulator is the kernel.
std::string look_up(const void* pc) {
  Dl_info info;
  if (pc == nullptr || dladdr(pc, &info) == 0 || info.dli_fname == nullptr) return format("%p", pc);
  const size_t offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase);
  const std::string bare = format("%s+0x%zx", info.dli_fname, offset);
  FILE* pipe = popen(format("addr2line -C -f -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset - 1).c_str(), "r");
  if (pipe == nullptr) return bare;
  char function[4096], line[4096];
  std::string found;
  while (found.empty() && std::fgets(function, sizeof function, pipe) && std::fgets(line, sizeof line, pipe)) {
    std::string at = line, name = function;
    at = at.substr(0, at.find_first_of(" \n"));
    name = name.substr(0, name.find('\n'));
    if (at.find("??") != std::string::npos || at.find("/tests/simt/include/") != std::string::npos ||
        at.find("/tests/simt/src/") != std::string::npos)
      continue;
    const std::string anonymous = "(anonymous namespace)::";
    for (size_t i; (i = name.find(anonymous)) != std::string::npos;) name.erase(i, anonymous.size());
    const std::string file = at.substr(at.rfind('/') + 1);
    found = file + " in " + name.substr(0, name.find('('));
  }
  pclose(pipe);
  return found.empty() ? bare : found;
}

// The innermost frame that is the kernel's own.
const void* kernel_pc() {
  void* frames[32];
  const int num = backtrace(frames, 32);
  for (int i = 1; i < num; ++i) {
    if (where(frames[i]).find(" in ") != std::string::npos) return frames[i];
  }
  return frames[1];
}

}  // namespace

std::string where(const void* pc) {
  static std::mutex mutex;
  static std::map<const void*, std::string> known;
  const std::lock_guard lock(mutex);
  std::string& text = known[pc];
  if (text.empty()) text = look_up(pc);
  return text;
}

std::string describe(const Thread& t) {
  const uint3 b = t.Position::block;
  const int rank = Machine::of_this_thread().rank;
  const std::string of_rank = rank < 0 ? "" : format(" of rank %d", rank);
  return format("thread (%u,%u,%u) of block (%u,%u,%u)", t.thread.x, t.thread.y, t.thread.z, b.x, b.y, b.z) + of_rank;
}

std::string format(const char* format, ...) {
  va_list arguments, again;
  va_start(arguments, format);
  va_copy(again, arguments);
  std::string text(std::vsnprintf(nullptr, 0, format, arguments), '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  va_end(arguments);
  return text;
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Machine::of_this_thread().fail_current(text, kernel_pc());
}

}  // namespace simt
