// SMs of the current GPU that another stream's kernels have while this thread launches: kernels whose blocks stay and walk their
// share leave them out. A block that found no SM would begin its share, as long as the others', only when those kernels end.
#pragma once

namespace tilestream {

inline thread_local int taken_sms = 0;

}  // namespace tilestream
