// A recorded sequence of kernel launches, replayed without torch: what a CUDA graph is to a GPU.
//
// A decode step makes the same few hundred launches on the same buffers every time; only what the buffers hold differs.
// Recording runs the ops as usual, checks included, and keeps each kernel with its parameter struct.
#pragma once

#include <functional>
#include <vector>

namespace tilestream {

class Program {
 public:
  // Ops called by this thread between begin() and end() are kept, in order. One program records at a time per thread.
  void begin();
  void end();
  // The recorded launches again. The buffers they point into must still exist: the caller keeps them.
  void run() const;
  size_t num_launches() const { return launches_.size(); }

  // Runs kernel(params), and keeps it if this thread records.
  template <class Params>
  static void launch(void (*kernel)(const Params&), const Params& params) {
    if (recording_ != nullptr) recording_->launches_.push_back([kernel, params] { kernel(params); });
    kernel(params);
  }

 private:
  static thread_local Program* recording_;
  std::vector<std::function<void()>> launches_;
};

}  // namespace tilestream
