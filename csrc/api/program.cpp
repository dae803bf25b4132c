#include "api/program.h"

#include <stdexcept>

namespace tilestream {

thread_local Program* Program::recording_ = nullptr;

void Program::begin() {
  if (recording_ != nullptr) throw std::logic_error("a program is already being recorded on this thread; end it first");
  launches_.clear();
  recording_ = this;
}

void Program::end() {
  if (recording_ == this) recording_ = nullptr;
}

void Program::run() const {
  for (const auto& launch : launches_) launch();
}

}  // namespace tilestream
