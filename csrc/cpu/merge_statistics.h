// Batch statistics of several parts of a batch, merged.
#pragma once

#include <cstdint>

namespace fastgan::cpu {

// parts: [count_of_parts, 2 * channels + 1], in each row the means, the biased variances and the number of values a
// channel, which may be 0. mean, var: [channels]. Returns the number of values of all. A is float or double; the sums are
// double, and deviations are taken from the common mean (E[x^2] - E[x]^2 loses all digits where |mean| >> std).
template <typename A>
int64_t merge_statistics(int64_t count_of_parts, int64_t channels, const A* parts, A* mean, A* var);

}  // namespace fastgan::cpu
