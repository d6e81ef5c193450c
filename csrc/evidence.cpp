// One step of a routing policy on the CPU: from the energies of a layer's router to its choice of experts.
// The equations are in smile_kernels/routing/policy.py, the pointers are documented in smile.h.
#include <vector>

#include "choose.h"
#include "smile.h"

namespace smile {
namespace {

// p_i = E_i / sum_j E_j in place; all 0 if all energies are 0, and on padding. NaN counts as 0.
template <class R> void to_shares(R* energies, int64_t count, bool is_real) {
  R sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    R& energy = energies[i];
    energy = is_real && energy == energy ? std::min(energy, R(kMostEnergy)) : R(0);
    sum += energy;
  }
  sum = std::max(sum, std::numeric_limits<R>::min());
  for (int64_t i = 0; i < count; ++i)
    if (energies[i] > 0) energies[i] = std::max(energies[i] / sum, R(kLeastShare));
}

// L of one token or sequence: log S - log Pbar + L of the previous layers.
template <class R> void add_up(const Evidence& p, const R* sums, const R* below, R* logs) {
  R total = 0, largest = std::numeric_limits<R>::lowest();
  int64_t present = 0;
  for (int64_t i = 0; i < p.num_experts; ++i) {
    logs[i] = std::log(std::max(sums[i], R(kLeastShare))) - (p.prior ? static_cast<const R*>(p.prior)[i] : R(0));
    if (sums[i] > 0) total += logs[i], ++present;
  }
  if (!p.accumulates) return;
  for (int64_t i = 0; i < p.num_experts; ++i) {
    if (!(sums[i] > 0)) logs[i] = present ? total / R(present) : R(0);
    if (below) logs[i] += below[i];
    largest = std::max(largest, logs[i]);
  }
  // Does not change the softmax; keeps sums over many layers exact.
  for (int64_t i = 0; below && i < p.num_experts; ++i) logs[i] -= largest;
}

// The sums of sequence b in scope window, from its energies.
template <class R> void sum_windows(const Evidence& p, int64_t b, R* shares, R* sums) {
  const int64_t n = p.num_experts;
  for (int64_t t = 0; t < p.tokens; ++t) to_shares(shares + t * n, n, !p.real || p.real[b * p.tokens + t]);
  std::vector<double> sum(n);
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t first = std::max<int64_t>(0, t - p.window), end = std::min(p.tokens, t + p.window + 1);
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t other = first; other < end; ++other)
      for (int64_t i = 0; i < n; ++i) sum[i] += shares[other * n + i];
    std::copy_n(sum.begin(), n, sums + t * n);
  }
}

template <class R> void step(const Evidence& p, ParallelFor parallel_for) {
  const int64_t n = p.num_experts, rows = p.scope == Scope::sequence ? 1 : p.tokens;
  const auto each = [&](int64_t b) {
    R* shares = static_cast<R*>(p.energies) + b * p.tokens * n;
    R* sums = static_cast<R*>(p.sums) + b * p.sums_stride;
    std::vector<double> sum(n, 0.0);
    if (p.before) std::copy_n(static_cast<const R*>(p.before) + b * p.before_stride, n, sum.begin());
    if (p.scope == Scope::window) sum_windows(p, b, shares, sums);
    for (int64_t t = 0; p.scope != Scope::window && t < p.tokens; ++t, shares += n) {
      to_shares(shares, n, !p.real || p.real[b * p.tokens + t]);
      const double factor = p.factors ? p.factors[b * p.factor_strides[0] + t * p.factor_strides[1]] : 1.0;
      for (int64_t i = 0; i < n; ++i) {
        const double share = shares[i];
        sum[i] = p.scope == Scope::token ? share : p.scope == Scope::causal ? factor * sum[i] + share : sum[i] + factor * share;
      }
      if (rows > 1 || t + 1 == p.tokens) std::copy_n(sum.begin(), n, sums + (rows > 1 ? t : 0) * n);
    }
    if (p.tokens == 0 && rows > 0) std::copy_n(sum.begin(), n, sums);
    for (int64_t row = b * rows; row < (b + 1) * rows; ++row, sums += n) {
      R* logs = static_cast<R*>(p.evidence) + row * n;
      add_up(p, sums, p.below ? static_cast<const R*>(p.below) + row * n : nullptr, logs);
      choose(logs, n, p.num_experts_per_tok, static_cast<R*>(p.weights) + row * p.num_experts_per_tok,
             p.ids + row * p.num_experts_per_tok);
    }
  };
  const int64_t grain = std::max<int64_t>(1, (1 << 13) / std::max<int64_t>(1, p.tokens * n));
  if (p.sequences <= grain) {
    for (int64_t b = 0; b < p.sequences; ++b) each(b);
    return;
  }
  parallel_for(p.sequences, grain, [](int64_t begin, int64_t end, void* context) {
    for (int64_t b = begin; b < end; ++b) (*static_cast<decltype(each)*>(context))(b);
  }, const_cast<void*>(static_cast<const void*>(&each)));
}

}  // namespace

void cpu_evidence(bool is_double, const Evidence& p, ParallelFor parallel_for) {
  is_double ? step<double>(p, parallel_for) : step<float>(p, parallel_for);
}

}  // namespace smile
