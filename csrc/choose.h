// The choice of experts by score, used by a layer's own router and by routing policies.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace smile {

// Top-m of the scores, ties to the lower index, and the softmax over them. NaN ranks last, and an infinite score counts
// as the largest finite one, so that the weights of the others stay finite.
template <class R> void choose(const R* scores, int64_t count, int64_t m, R* weights, int32_t* ids) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    using limits = std::numeric_limits<R>;
    const R score = scores[i] != scores[i] ? limits::lowest() : std::min(scores[i], limits::max());
    if (kept == m && !(score > weights[m - 1])) continue;
    int64_t at = kept < m ? kept++ : m - 1;
    for (; at > 0 && score > weights[at - 1]; --at) weights[at] = weights[at - 1], ids[at] = ids[at - 1];
    weights[at] = score, ids[at] = int32_t(i);
  }
  const R best = weights[0];
  R sum = 0;
  for (int64_t j = 0; j < m; ++j) sum += weights[j] = std::exp(weights[j] - best);
  for (int64_t j = 0; j < m; ++j) weights[j] /= sum;
}

}  // namespace smile
