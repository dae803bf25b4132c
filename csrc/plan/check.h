// Checks of what a caller hands to the planner. Each throws std::invalid_argument with a readable sentence.
#pragma once

#include <sstream>
#include <stdexcept>
#include <vector>

#include "tilestream/plan.h"

namespace tilestream::plan {

template <class... Parts>
[[noreturn]] void reject(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::invalid_argument(sentence.str());
}

void check_config(const PlanConfig& config);

// Also fills group_of_request ([batch_size], -1: in no group), since that is how a request in two groups shows.
void check_input(const PlanConfig& config, const PlanInput& input, std::vector<int32_t>& group_of_request);

}  // namespace tilestream::plan
