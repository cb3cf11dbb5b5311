#include "merge_statistics.h"

namespace fastgan::cpu {

template <typename A>
int64_t merge_statistics(int64_t count_of_parts, int64_t channels, const A* parts, A* mean, A* var) {
  const int64_t row = 2 * channels + 1;
  double total = 0.0;
  for (int64_t part = 0; part < count_of_parts; ++part) total += static_cast<double>(parts[part * row + 2 * channels]);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0, m2 = 0.0;
    for (int64_t part = 0; part < count_of_parts; ++part)
      sum += static_cast<double>(parts[part * row + 2 * channels]) * static_cast<double>(parts[part * row + c]);
    const double whole = total > 0.0 ? sum / total : 0.0;
    for (int64_t part = 0; part < count_of_parts; ++part) {
      const double deviation = static_cast<double>(parts[part * row + c]) - whole;
      m2 += static_cast<double>(parts[part * row + 2 * channels]) *
            (static_cast<double>(parts[part * row + channels + c]) + deviation * deviation);
    }
    mean[c] = static_cast<A>(whole);
    var[c] = static_cast<A>(total > 0.0 ? m2 / total : 0.0);
  }
  return static_cast<int64_t>(total + 0.5);
}

template int64_t merge_statistics<float>(int64_t, int64_t, const float*, float*, float*);
template int64_t merge_statistics<double>(int64_t, int64_t, const double*, double*, double*);

}  // namespace fastgan::cpu
