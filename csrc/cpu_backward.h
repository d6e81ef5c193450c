// The CPU backward, included by cpu_kernels.h in its namespace. Numbers are multiplied as in the forward: in X, to which x and
// dy are converted once and the gradients of h are rounded, and summed in R. Every step is split over threads by its outputs
// and sums in a fixed order, so results are the same on any number of threads.

// An array of X itself, or a copy of an array of T.
template <class T, class X> class Operands {
 public:
  Operands(const void* source, int64_t rows, int64_t columns, int64_t row_stride, ParallelFor parallel_for) {
    const T* from = static_cast<const T*>(source);
    if constexpr (std::is_same<T, X>::value) {
      data = from, stride = row_stride;
    } else {
      copy.reset(new X[rows * columns]);
      parallel(parallel_for, rows, columns, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          for (int64_t c = 0; c < columns; ++c) copy[t * columns + c] = to_real(from[t * row_stride + c]);
      });
      data = copy.get(), stride = columns;
    }
  }
  const X* operator[](int64_t row) const { return data + row * stride; }

 private:
  std::unique_ptr<X[]> copy;
  const X* data;
  int64_t stride;
};

// panel[k][c] = row_at(k)[c] for `width` columns, or pairs of two rows; zeros up to a whole vector, and a whole tile.
template <class X, class RowAt> void lay_out(int64_t depth, const RowAt& row_at, int64_t width, typename Packed<X>::R* panel) {
  using R = typename Packed<X>::R;
  const int64_t stride = panel_vectors<X>(width) * kLanes<R>;
  for (int64_t k = 0; k < packed_depth<X>(depth) * Packed<X>::numbers; k += Packed<X>::numbers, panel += stride) {
    if constexpr (Packed<X>::numbers == 1) {
      const auto* row = row_at(k);
      for (int64_t c = 0; c < width; ++c) panel[c] = to_real(row[c]);
    } else {
      const bool first = k < depth, second = k + 1 < depth;
      const X *low = row_at(first ? k : 0), *high = row_at(second ? k + 1 : 0);
      const uint32_t low_bits = first ? 0xffff : 0, high_bits = second ? 0xffff : 0;
      for (int64_t c = 0; c < width; ++c) panel[c] = bit_cast<R>((low[c].bits & low_bits) | (high[c].bits & high_bits) << 16);
    }
    std::fill(panel + width, panel + stride, R(0));
  }
}

// The three products that make up the gradients, over entries grouped by expert.
template <class T> class GroupedProducts {
 public:
  using R = typename RealOf<T>::type;
  using X = typename MultiplyAs<T>::type;
  static constexpr int64_t kWidth = kPanelWidth<X>;

  GroupedProducts(const Sizes& n, const int32_t* ids, ParallelFor parallel_for)
      : n(n), m(n.num_experts_per_tok), parallel_for(parallel_for), first(n.num_experts + 1), entries(n.tokens * m) {
    sort_by_expert([&](int64_t e) { return ids[e]; }, n.tokens, m, n.num_experts, first, entries);
  }

  // out[e] [rank] = the product of x_t with `rank` rows of expert i's factor, or with its columns where `by_columns`.
  void project(const Operands<T, X>& x, int64_t depth, const T* factor, int64_t expert_stride, bool by_columns, int64_t rank,
               R* out) const {
    const int64_t panels = (rank + kWidth - 1) / kWidth;
    parallel(parallel_for, n.num_experts * panels, n.tokens * m * kWidth * depth / n.num_experts, [&](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) {
        const int64_t i = item / panels, c0 = item % panels * kWidth, width = std::min(kWidth, rank - c0);
        const Entry* list = entries.data() + first[i];
        const int64_t count = first[i + 1] - first[i];
        if (count == 0) continue;
        const T* own = factor + i * expert_stride;
        const auto lay = [&](int64_t d, int64_t length, R* panel) {
          if (by_columns) return lay_out<X>(length, [&](int64_t k) { return own + (d + k) * rank + c0; }, width, panel);
          const T* row[kWidth];
          for (int64_t c = 0; c < width; ++c) row[c] = own + (c0 + c) * depth + d;
          pack<X>(row, width, length, panel);
        };
        product_by_panels<X>(depth, width, count, lay, [&](int64_t e, int64_t d) { return x[list[e].token] + d; },
                             [&](int64_t e) { return out + list[e].place * rank + c0; });
      }
    });
  }

  // out[t] [columns] = (its old value, where `adds`) + the sum over its entries of coefficients[e] [rank] times the factor.
  void expand(const X* coefficients, int64_t rank, const T* factor, int64_t expert_stride, int64_t columns, T* out, bool adds) const {
    const int64_t blocks = (columns + kWidth - 1) / kWidth;
    parallel(parallel_for, blocks, kWidth * n.tokens * m * rank, [&](int64_t from, int64_t to) {
      const Buffer<R> panel(packed_depth<X>(std::min(rank, kPanelDepth)) * kWidth), sums(n.tokens * kWidth);
      for (int64_t block = from; block < to; ++block) {
        const int64_t c0 = block * kWidth, width = std::min(kWidth, columns - c0);
        if (!adds) std::fill_n(sums.get(), n.tokens * kWidth, R(0));
        for (int64_t t = 0; adds && t < n.tokens; ++t) {
          const T* old = out + t * columns + c0;
          for (int64_t at = 0; at < kWidth; at += kLine<T>) __builtin_prefetch(old + kWidth + at, 1);
          convert(old, width, sums.get() + t * kWidth);
        }
        for (int64_t i = 0; i < n.num_experts; ++i)
          for (int64_t k = 0; k < rank && first[i] < first[i + 1]; k += kPanelDepth) {
            const Entry* list = entries.data() + first[i];
            const int64_t length = std::min(kPanelDepth, rank - k);
            const T* own = factor + i * expert_stride + k * columns + c0;
            lay_out<X>(length, [&](int64_t row) { return own + row * columns; }, width, panel.get());
            panel_product<X>(first[i + 1] - first[i], [&](int64_t e) { return coefficients + list[e].place * rank + k; }, panel.get(),
                             width, length, [&](int64_t e) { return sums.get() + list[e].token * kWidth; }, true);
          }
        for (int64_t t = 0; t < n.tokens; ++t) convert(sums.get() + t * kWidth, width, out + t * columns + c0);
      }
    });
  }

  // A factor's gradient: out_i[k][c] = sum over expert i's entries of coefficients[e][k] x_t[c], zero for rows past `rank`;
  // or its transpose.
  void accumulate(const X* coefficients, int64_t rank, const Operands<T, X>& x, int64_t columns, T* out, int64_t expert_stride,
                  int64_t out_rows, bool transposed) const {
    const int64_t blocks = (columns + kWidth - 1) / kWidth;
    // Those of an expert by k, each with its entries in a row.
    const std::unique_ptr<X[]> turned(new X[entries.size() * rank]);
    parallel(parallel_for, n.num_experts, n.tokens * m * rank / n.num_experts, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        X* own = turned.get() + first[i] * rank;
        for (int64_t place = first[i], count = first[i + 1] - first[i]; place < first[i + 1]; ++place, ++own)
          for (int64_t k = 0; k < rank; ++k) own[k * count] = coefficients[entries[place].place * rank + k];
      }
    });
    parallel(parallel_for, n.num_experts * blocks, kWidth * n.tokens * m * rank / n.num_experts, [&](int64_t from, int64_t to) {
      const Buffer<R> square(kWidth * kWidth), sums(rank * kWidth);
      for (int64_t item = from; item < to; ++item) {
        const int64_t i = item / blocks, c0 = item % blocks * kWidth, width = std::min(kWidth, columns - c0);
        const int64_t count = first[i + 1] - first[i];
        if (count == 0) std::fill_n(sums.get(), rank * kWidth, R(0));
        const auto lay = [&](int64_t e0, int64_t length, R* panel) {
          const Entry* list = entries.data() + first[i] + e0;
          lay_out<X>(length, [&](int64_t e) { return x[list[e].token] + c0; }, width, panel);
        };
        const X* rows = turned.get() + first[i] * rank;
        product_by_panels<X>(count, width, rank, lay, [&](int64_t k, int64_t e0) { return rows + k * count + e0; },
                             [&](int64_t k) { return sums.get() + k * kWidth; });
        T* own = out + i * expert_stride;
        if (transposed) {
          write_transposed(sums.get(), rank, width, own + c0 * rank, square.get());
        } else {
          for (int64_t k = 0; k < rank; ++k) convert(sums.get() + k * kWidth, width, own + k * columns + c0);
          for (int64_t k = rank; k < out_rows; ++k) std::fill_n(own + k * columns + c0, width, T{});
        }
      }
    });
  }

  const Sizes& n;
  const int64_t m;
  const ParallelFor parallel_for;
  std::vector<int64_t> first;      // expert i's entries are entries[first[i] : first[i + 1]], in order
  std::vector<Entry> entries;

 private:
  // out[c][k] = sums[k][c]
  static void write_transposed(const R* sums, int64_t rank, int64_t width, T* out, R* square) {
    for (int64_t k0 = 0; k0 < rank; k0 += kWidth) {
      const int64_t rows = std::min(kWidth, rank - k0);
      const R* row[kWidth];
      for (int64_t k = 0; k < rows; ++k) row[k] = sums + (k0 + k) * kWidth;
      pack<R>(row, rows, kWidth, square);
      const int64_t stride = panel_vectors<R>(rows) * kLanes<R>;
      for (int64_t c = 0; c < width; ++c) convert(square + c * stride, rows, out + c * rank + k0);
    }
  }
};

template <class T> void apply_backward(const Backward& p, ParallelFor parallel_for) {
  using R = typename RealOf<T>::type;
  using X = typename MultiplyAs<T>::type;
  const Sizes& n = p.n;
  const int64_t m = n.num_experts_per_tok, r = n.rank_of_expert, o = n.out_features, d = n.in_features, count = n.tokens * m;
  const R* s = reinterpret_cast<const R*>(p.s);
  const R* weights = reinterpret_cast<const R*>(p.weights);
  const R* h = reinterpret_cast<const R*>(p.h);
  const GroupedProducts<T> products(n, p.ids, parallel_for);
  const Operands<T, X> dy(p.dy, n.tokens, o, o, parallel_for);
  const std::unique_ptr<R[]> a(new R[count * r]);
  const std::unique_ptr<X[]> dh(new X[count * r]), z(new X[count * r]);

  // With a_e = u_i^T dy_t, w (s * a) is the gradient of h; z = w (s * h) is the factor of dy in du.
  if (p.dx || p.dvh || p.ds || p.dweights)
    products.project(dy, o, static_cast<const T*>(p.u), o * r, true, r, a.get());
  else
    std::fill_n(a.get(), count * r, R(0));
  parallel(parallel_for, count, 4 * r + o, [&](int64_t from, int64_t to) {
    for (int64_t e = from; e < to; ++e) {
      const int32_t i = p.ids[e];
      double dweight = 0;
      if (i >= 0) {  // otherwise there is no expert
        const R w = weights[e];
        for (int64_t k = e * r, j = i * r; k < (e + 1) * r; ++k, ++j) {
          dh[k] = from_real<X>(w * s[j] * a[k]);
          z[k] = from_real<X>(w * s[j] * h[k]);
        }
        for (int64_t k = e * r, j = i * r; k < (e + 1) * r && p.dweights; ++k, ++j) dweight += double(a[k]) * s[j] * h[k];
        if (p.dweights && p.expert_bias) {
          const X* row = dy[e / m];
          R of_bias, *out = &of_bias;
          dots(&row, &out, 1, Rows<T>{static_cast<const T*>(p.expert_bias) + i * o, o, 1}, 0, 1, o, 0, false);
          dweight += of_bias;
        }
      }
      if (p.dweights) reinterpret_cast<R*>(p.dweights)[e] = R(dweight);
    }
  });
  if (p.dx) products.expand(dh.get(), r, static_cast<const T*>(p.vh), n.vh_rows * d, d, static_cast<T*>(p.dx), true);
  if (p.dvh) {
    const Operands<T, X> x(p.x, n.tokens, d, p.x_stride, parallel_for);
    products.accumulate(dh.get(), r, x, d, static_cast<T*>(p.dvh), n.vh_rows * d, n.vh_rows, false);
  }
  if (p.du) products.accumulate(z.get(), r, dy, o, static_cast<T*>(p.du), o * r, r, true);
  parallel(parallel_for, n.num_experts, count * (r + o) / n.num_experts, [&](int64_t from, int64_t to) {
    std::vector<double> sums(std::max(r, o));  // one chain over all tokens
    for (int64_t i = from; i < to; ++i) {
      if (p.ds) {
        std::fill_n(sums.begin(), r, 0.0);
        for (int64_t place = products.first[i]; place < products.first[i + 1]; ++place) {
          const int64_t e = products.entries[place].place;
          for (int64_t k = 0; k < r; ++k) sums[k] += double(weights[e] * a[e * r + k]) * h[e * r + k];
        }
        std::copy_n(sums.begin(), r, reinterpret_cast<R*>(p.ds) + i * r);
      }
      if (!p.dexpert_bias) continue;
      std::fill_n(sums.begin(), o, 0.0);
      for (int64_t place = products.first[i]; place < products.first[i + 1]; ++place) {
        const auto [e, t] = products.entries[place];
        const X* row = dy[t];
        for (int64_t c = 0; c < o; ++c) sums[c] += double(weights[e]) * to_real(row[c]);
      }
      for (int64_t c = 0; c < o; ++c) static_cast<T*>(p.dexpert_bias)[i * o + c] = from_real<T>(R(sums[c]));
    }
  });
}

template <class T> void route_backward(const RouteBackward& p, ParallelFor parallel_for) {
  using R = typename RealOf<T>::type;
  using X = typename MultiplyAs<T>::type;
  const Sizes& n = p.n;
  const int64_t m = n.num_experts_per_tok, g = n.rank_of_router, d = n.in_features, count = n.tokens * m;
  const R* weights = reinterpret_cast<const R*>(p.weights);
  const R* dweights = reinterpret_cast<const R*>(p.dweights);
  const GroupedProducts<T> products(n, p.ids, parallel_for);
  const Operands<T, X> x(p.x, n.tokens, d, p.x_stride, parallel_for);
  const T* router = static_cast<const T*>(p.router);
  const std::unique_ptr<R[]> q(new R[count * g]);
  const std::unique_ptr<X[]> dq(new X[count * g]);
  products.project(x, d, router, g * d, false, g, q.get());
  // dq_e = w_e (dw_e - sum_j w_j dw_j) q_e / |q_e|, zero where |q_e| is zero.
  parallel(parallel_for, n.tokens, 4 * m * g, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      R mean = 0;
      for (int64_t e = t * m; e < (t + 1) * m; ++e)
        if (p.ids[e] >= 0) mean += weights[e] * dweights[e];
      for (int64_t e = t * m; e < (t + 1) * m; ++e) {
        if (p.ids[e] < 0) continue;
        const R size = norm(&q[e * g], g), dscore = weights[e] * (dweights[e] - mean);
        for (int64_t k = e * g; k < (e + 1) * g; ++k) dq[k] = from_real<X>(size > 0 ? dscore * (q[k] / size) : R(0));
      }
    }
  });
  if (p.dx) products.expand(dq.get(), g, router, g * d, d, static_cast<T*>(p.dx), false);
  if (p.drouter) products.accumulate(dq.get(), g, x, d, static_cast<T*>(p.drouter), g * d, g, false);
}

// Calls f with a value of the type that dtype names.
template <class F> void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::bfloat16: return f(bfloat16{});
    case DType::float16: return f(float16{});
    case DType::float64: return f(double{});
  }
}

inline void backward_of_apply(DType dtype, const Backward& p, ParallelFor parallel_for) {
  with_type(dtype, [&](auto type) { apply_backward<decltype(type)>(p, parallel_for); });
}

inline void backward_of_route(DType dtype, const RouteBackward& p, ParallelFor parallel_for) {
  with_type(dtype, [&](auto type) { route_backward<decltype(type)>(p, parallel_for); });
}
