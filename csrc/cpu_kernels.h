// The CPU forward, written once with the compiler's vector types. cpu.cpp includes this file once for each instruction
// set, so there is no include guard. It sets SMILE_NAMESPACE; SMILE_VECTOR_BYTES, the size of a vector; SMILE_VECTORS,
// how many registers hold one; SMILE_BFLOAT16_DOT, whether there is an instruction for bfloat16 dot products.
//
// A chunk of tokens goes through: float copy of x (where needed) -> products with the router's rows, and with W where
// the tokens are few -> top-m -> entries sorted by expert -> the other rows of the selected experts -> expand into y.
// Every step is split over threads by what it writes, so no two threads write the same number and the result does not
// depend on how many there are.

namespace smile {
namespace SMILE_NAMESPACE {

#define SMILE_INLINE inline __attribute__((always_inline))

// ---- numbers and vectors ----

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class T> struct RealOf { using type = float; };
template <> struct RealOf<double> { using type = double; };

template <class R, int Bytes> struct VectorOf { typedef R type __attribute__((vector_size(Bytes))); };
template <class R> using Vector = typename VectorOf<R, SMILE_VECTOR_BYTES>::type;
template <class R> using BitsOf = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
template <class R> constexpr int kLanes = SMILE_VECTOR_BYTES / sizeof(R);

typedef uint16_t Bits16 __attribute__((vector_size(SMILE_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(SMILE_VECTOR_BYTES)));

template <class To, class From> SMILE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V, class T> SMILE_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

SMILE_INLINE Vector<float> load(const float* p) { return load_as<Vector<float>>(p); }
SMILE_INLINE Vector<double> load(const double* p) { return load_as<Vector<double>>(p); }
SMILE_INLINE Vector<float> load(const bfloat16* p) {
  return bit_cast<Vector<float>>(__builtin_convertvector(load_as<Bits16>(p), Bits32) << 16);
}
SMILE_INLINE Vector<float> load(const float16* p) {
#if SMILE_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_cvtph_ps((__m256i)load_as<Bits16>(p));
#elif SMILE_VECTOR_BYTES == 32
  return (Vector<float>)_mm256_cvtph_ps((__m128i)load_as<Bits16>(p));
#else
  Bits32 bits = __builtin_convertvector(load_as<Bits16>(p), Bits32);
  Bits32 magnitude = bits & 0x7fff;
  Bits32 normal = (magnitude << 13) + (112u << 23);                                        // rebias the exponent
  Bits32 special = normal + (112u << 23);                                                  // inf and nan: all ones
  Bits32 denormal = bit_cast<Bits32>(bit_cast<Vector<float>>(magnitude + (126u << 23)) - 0.5f);  // 0.5 + m 2^-24 - 0.5
  Bits32 value = magnitude >= 0x7c00 ? special : (magnitude < 0x400 ? denormal : normal);
  return bit_cast<Vector<float>>(value | ((bits & 0x8000) << 16));
#endif
}

SMILE_INLINE float to_real(float v) { return v; }
SMILE_INLINE double to_real(double v) { return v; }
SMILE_INLINE float to_real(bfloat16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
SMILE_INLINE float to_real(float16 v) {
  uint32_t magnitude = v.bits & 0x7fff, value = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00) value += 112u << 23;
  if (magnitude < 0x400) value = bit_cast<uint32_t>(bit_cast<float>(magnitude + (126u << 23)) - 0.5f);
  return bit_cast<float>(value | (uint32_t(v.bits & 0x8000) << 16));
}

template <class T> SMILE_INLINE T from_real(typename RealOf<T>::type v);
template <> SMILE_INLINE float from_real<float>(float v) { return v; }
template <> SMILE_INLINE double from_real<double>(double v) { return v; }
template <> SMILE_INLINE bfloat16 from_real<bfloat16>(float v) {
  uint32_t bits = bit_cast<uint32_t>(v);
  if (v != v) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}
template <> SMILE_INLINE float16 from_real<float16>(float v) {
  uint32_t bits = bit_cast<uint32_t>(v), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x47800000) return {uint16_t(sign | 0x7c00)};  // 65536 and more
  uint32_t half;
  if (magnitude < 0x38800000)                                     // below 2^-14: round in the float adder, at 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
  else
    half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  return {uint16_t(sign | half)};
}

// How numbers x of type X are multiplied with rows of type T: `lanes` of them at once, summed in R.
template <class X> struct Operand {
  using R = typename RealOf<X>::type;
  using type = Vector<R>;
  static constexpr int lanes = kLanes<R>;
  template <class T> static SMILE_INLINE type load(const T* p) { return SMILE_NAMESPACE::load(p); }
  static SMILE_INLINE Vector<R> multiply_add(type a, type b, Vector<R> sum) { return sum + a * b; }
};

// The type that x is multiplied in: its own where there is an instruction for it, else float or double.
template <class T> struct MultiplyAs { using type = typename RealOf<T>::type; };

#if SMILE_BFLOAT16_DOT
template <> struct MultiplyAs<bfloat16> { using type = bfloat16; };
template <> struct Operand<bfloat16> {
  using type = __m512i;
  static constexpr int lanes = 32;
  static SMILE_INLINE type load(const bfloat16* p) { return load_as<type>(p); }
  static SMILE_INLINE Vector<float> multiply_add(type a, type b, Vector<float> sum) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// The first `count` numbers at p, then zeros, as one operand.
template <class X, class T> SMILE_INLINE typename Operand<X>::type load_first(const T* p, int count) {
  T lanes[Operand<X>::lanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return Operand<X>::load(lanes);
}

#if defined(__clang__)
#define SMILE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SMILE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename VectorOf<BitsOf<R>, SMILE_VECTOR_BYTES>::type{__VA_ARGS__})
#endif

// From a and b the sums of neighbours at distance kPer16 / 2, a's and b's in turn, within each 16 bytes: a transposition
// and an addition in one. `Size` 1 takes single numbers in turn, 2 pairs of them.
template <int Size, class R, int... I>
SMILE_INLINE Vector<R> merge(Vector<R> a, Vector<R> b, std::integer_sequence<int, I...>) {
  constexpr int per16 = 16 / sizeof(R), lanes = kLanes<R>;
  constexpr auto from = [](int i, int upper) {  // lane i of the result: which lane of a (or, past `lanes`, of b)
    const int base = i / per16 * per16, at = i % per16;
    return base + upper * per16 / 2 + at / (2 * Size) * Size + at % Size + (at / Size % 2) * lanes;
  };
  return SMILE_SHUFFLE(a, b, from(I, 0)...) + SMILE_SHUFFLE(a, b, from(I, 1)...);
}

// Transposes blocks of Size x Size within squares of 2 Size x 2 Size, then smaller ones: from kLanes / 2, all of `rows`.
template <int Size, class R, int... I>
SMILE_INLINE void transpose(Vector<R>* rows, std::integer_sequence<int, I...> lanes) {
  constexpr int count = kLanes<R>;
  const auto exchange = [](Vector<R>& a, Vector<R>& b) __attribute__((always_inline)) {
    const Vector<R> above = a;
    a = SMILE_SHUFFLE(above, b, (I & Size ? count + I - Size : I)...);
    b = SMILE_SHUFFLE(above, b, (I & Size ? count + I : I + Size)...);
  };
  ((I & Size ? void() : exchange(rows[I], rows[(I + Size) % count])), ...);
  if constexpr (Size > 1) transpose<Size / 2, R>(rows, lanes);
}

// Adds the upper half of v to its lower half until 16 bytes are left.
template <class R, int Bytes = SMILE_VECTOR_BYTES>
SMILE_INLINE typename VectorOf<R, 16>::type fold(typename VectorOf<R, Bytes>::type v) {
  if constexpr (Bytes == 16) {
    return v;
  } else {
    typename VectorOf<R, Bytes / 2>::type low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<char*>(&v) + sizeof(low), sizeof(high));
    return fold<R, Bytes / 2>(low + high);
  }
}

// The sums over the lanes of four vectors.
template <class R> SMILE_INLINE void sum_lanes(const Vector<R>* v, R* sums) {
  const std::make_integer_sequence<int, kLanes<R>> lanes;
  const Vector<R> v01 = merge<1, R>(v[0], v[1], lanes), v23 = merge<1, R>(v[2], v[3], lanes);
  if constexpr (sizeof(R) == 4) {
    const auto all = fold<R>(merge<2, R>(v01, v23, lanes));
    std::memcpy(sums, &all, sizeof(all));
  } else {
    const auto low = fold<R>(v01), high = fold<R>(v23);
    std::memcpy(sums, &low, sizeof(low));
    std::memcpy(sums + 2, &high, sizeof(high));
  }
}

// ---- threads ----

// Fewer multiply-adds than this cost less than waking a second thread (about 2 us).
constexpr int64_t kWorkPerThread = 1 << 16;

template <class Body> void parallel(ParallelFor parallel_for, int64_t count, int64_t work_per_item, const Body& body) {
  int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work_per_item));
  if (count <= grain) return body(int64_t(0), count);
  parallel_for(count, grain, [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  }, const_cast<void*>(static_cast<const void*>(&body)));
}

// ---- products ----

constexpr int kRows = 4;                                  // rows of a factor in registers
constexpr int kTokens = SMILE_VECTORS == 16 ? 3 : 6;      // tokens in registers
constexpr int64_t kDepth = 1024;                          // columns in one pass: kTokens rows of them stay in the L1 cache

// out[t][j] (+)= sum_d x[t][d] rows[j][d] for M tokens and `rows_left` (at most kRows) rows.
template <int M, class X, class T, class R>
SMILE_INLINE void dot_tile(const X* const* x, R* const* out, const T* rows, int64_t row_stride, int rows_left,
                           int64_t depth, bool accumulate) {
  using Operand = Operand<X>;
  const T* row[kRows];
  for (int j = 0; j < kRows; ++j) row[j] = rows + (j < rows_left ? j : 0) * row_stride;
  Vector<R> sum[M][kRows] = {};
  int64_t d = 0;
  for (; d + Operand::lanes <= depth; d += Operand::lanes) {
    typename Operand::type b[kRows];
    for (int j = 0; j < kRows; ++j) b[j] = Operand::load(row[j] + d);
    for (int t = 0; t < M; ++t) {
      const auto a = Operand::load(x[t] + d);
      for (int j = 0; j < kRows; ++j) sum[t][j] = Operand::multiply_add(a, b[j], sum[t][j]);
    }
  }
  if (const int left = int(depth - d)) {
    typename Operand::type b[kRows];
    for (int j = 0; j < kRows; ++j) b[j] = load_first<X>(row[j] + d, left);
    for (int t = 0; t < M; ++t) {
      const auto a = load_first<X>(x[t] + d, left);
      for (int j = 0; j < kRows; ++j) sum[t][j] = Operand::multiply_add(a, b[j], sum[t][j]);
    }
  }
  for (int t = 0; t < M; ++t) {
    R total[kRows];
    sum_lanes<R>(sum[t], total);
    if (accumulate)
      for (int j = 0; j < rows_left; ++j) out[t][j] += total[j];
    else
      for (int j = 0; j < rows_left; ++j) out[t][j] = total[j];
  }
}

template <int M, class X, class T, class R>
void dot_tiles(int m, const X* const* x, R* const* out, const T* rows, int64_t row_stride, int64_t row_count,
               int64_t depth, bool accumulate) {
  if constexpr (M > 1)
    if (m < M) return dot_tiles<M - 1>(m, x, out, rows, row_stride, row_count, depth, accumulate);
  R* outs[M];
  for (int64_t j = 0; j < row_count; j += kRows) {
    for (int t = 0; t < M; ++t) outs[t] = out[t] + j;
    dot_tile<M>(x, outs, rows + j * row_stride, row_stride, int(std::min<int64_t>(kRows, row_count - j)), depth, accumulate);
  }
}

// out[t][j] (+)= sum_d x[t][d] rows[j][d] for `count` pointers x and out.
template <class X, class T, class R>
void dots(const X* const* x, R* const* out, int64_t count, const T* rows, int64_t row_stride, int64_t row_count,
          int64_t depth, bool accumulate) {
  for (int64_t d = 0; d < depth; d += kDepth)
    for (int64_t t = 0; t < count; t += kTokens) {
      const int m = int(std::min<int64_t>(kTokens, count - t));
      const X* xs[kTokens];
      for (int i = 0; i < m; ++i) xs[i] = x[t + i] + d;
      dot_tiles<kTokens>(m, xs, out + t, rows + d, row_stride, row_count, std::min(kDepth, depth - d), accumulate || d > 0);
    }
}

constexpr int kPanel = 4;  // vectors of outputs in one packed panel of u

// panel[k][c] = u[c][k] for `width` rows of u, at most those of a panel; what is past `width` is of no use.
template <class T, class R> void pack(const T* u, int64_t width, int64_t depth, R* panel) {
  constexpr int lanes = kLanes<R>;
  for (int64_t c = 0; c < width; c += lanes)
    for (int64_t k = 0; k < depth; k += lanes) {
      const int left = int(std::min<int64_t>(lanes, depth - k));
      Vector<R> square[lanes];
      for (int i = 0; i < lanes; ++i) {
        const T* row = u + std::min(c + i, width - 1) * depth + k;
        __builtin_prefetch(row + kPanel * lanes * depth);  // where the next panel will read
        square[i] = left == lanes ? load(row) : load_first<R>(row, left);
      }
      transpose<lanes / 2, R>(square, std::make_integer_sequence<int, lanes>());
      for (int i = 0; i < left; ++i) std::memcpy(panel + (k + i) * kPanel * lanes + c, &square[i], sizeof(square[i]));
    }
}

// out_t[0:panel] += sum_k z_t[k] panel[k] for M tokens.
template <int M, class R> SMILE_INLINE void panel_tile(const R* const* z, const R* panel, int64_t depth, R* const* out) {
  Vector<R> sum[M][kPanel] = {};
  for (int64_t k = 0; k < depth; ++k, panel += kPanel * kLanes<R>)
    for (int t = 0; t < M; ++t)
      for (int v = 0; v < kPanel; ++v) sum[t][v] += z[t][k] * load(panel + v * kLanes<R>);
  for (int t = 0; t < M; ++t)
    for (int v = 0; v < kPanel; ++v) {
      const Vector<R> total = load(out[t] + v * kLanes<R>) + sum[t][v];
      std::memcpy(out[t] + v * kLanes<R>, &total, sizeof(total));
    }
}

template <int M, class... Args> SMILE_INLINE void panel_tile_of(int m, Args... args) {
  if constexpr (M > 1)
    if (m < M) return panel_tile_of<M - 1>(m, args...);
  panel_tile<M>(args...);
}

// ---- the layer ----

// |q|, also where the squares overflow or vanish.
template <class R> R norm(const R* q, int64_t count) {
  R sum = 0, largest = 0;
  for (int64_t i = 0; i < count; ++i) sum += q[i] * q[i];
  if (sum != sum || (sum > std::numeric_limits<R>::min() / std::numeric_limits<R>::epsilon() && sum < std::numeric_limits<R>::max()))
    return std::sqrt(sum);
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(q[i]));
  if (largest == 0 || largest > std::numeric_limits<R>::max()) return largest;
  sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += (q[i] / largest) * (q[i] / largest);
  return largest * std::sqrt(sum);
}

// Top-m of the scores, ties to the lower index, and the softmax over them. NaN ranks last, and an infinite score counts
// as the largest finite one, so that it cannot spoil the weights of the others.
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

// One product of a block of tokens with a block of rows: out[e] = rows x_e, for some entries e.
template <class T, class R> struct Product {
  const T* rows;              // [row_count, D]
  int64_t row_count;
  const int32_t* entries;
  int64_t count;
  int64_t entries_per_token;  // entry e multiplies token e / entries_per_token
  R* out;                     // entry e at out + e * out_stride
  int64_t out_stride;
};

template <class T> class Chunk {
  using R = typename RealOf<T>::type;
  using X = typename MultiplyAs<T>::type;

 public:
  Chunk(const Forward& p, ParallelFor parallel_for) : p(p), n(p.n), parallel_for(parallel_for) {
    copies_x = !std::is_same<T, X>::value || p.x_stride[1] != 1;
    known_rows = p.router && p.tied_router ? std::min(n.rank_of_router, n.rank_of_expert) : 0;
    const int64_t per_token = (copies_x ? n.in_features : 0) + (p.router ? n.num_experts * n.rank_of_router : 0) +
                              (p.y ? n.num_experts_per_tok * n.rank_of_expert : 0);
    tokens_at_once = std::min(n.tokens, std::max<int64_t>(kTokens, std::min<int64_t>(1024, (1 << 20) / per_token)));
    const int64_t entries_at_once = tokens_at_once * n.num_experts_per_tok;
    if (copies_x) x_copy.reset(new X[tokens_at_once * n.in_features]);
    if (p.router) q.reset(new R[tokens_at_once * n.num_experts * n.rank_of_router]);
    if (p.weight) base.reset(new R[tokens_at_once * n.out_features]);
    if (p.y) z.reset(new R[entries_at_once * n.rank_of_expert]);
    x.resize(tokens_at_once);
    every_token.resize(tokens_at_once);
    for (int64_t t = 0; t < tokens_at_once; ++t) every_token[t] = int32_t(t);
    entries.resize(entries_at_once);
    first.resize(n.num_experts + 1);
  }

  void run() {
    for (begin = 0; begin < n.tokens; begin += tokens_at_once) {
      tokens = std::min(tokens_at_once, n.tokens - begin);
      weights = static_cast<R*>(p.weights) + begin * n.num_experts_per_tok;
      ids = p.ids + begin * n.num_experts_per_tok;
      read_x();
      if (p.weight) add_base_product();
      if (p.router) add_router_products();
      run_products();
      if (p.router) choose_experts();
      if (!p.y) continue;
      sort_entries();
      add_shrink_products();
      run_products();
      scale();
      expand();
    }
  }

 private:
  void read_x() {
    const T* source = static_cast<const T*>(p.x) + begin * p.x_stride[0];
    for (int64_t t = 0; t < tokens; ++t)
      x[t] = copies_x ? &x_copy[t * n.in_features] : reinterpret_cast<const X*>(source) + t * p.x_stride[0];
    if (!copies_x) return;
    parallel(parallel_for, tokens, n.in_features, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        const T* row = source + t * p.x_stride[0];
        for (int64_t d = 0; d < n.in_features; ++d) {
          if constexpr (std::is_same<T, X>::value)
            x_copy[t * n.in_features + d] = row[d * p.x_stride[1]];
          else
            x_copy[t * n.in_features + d] = to_real(row[d * p.x_stride[1]]);
        }
      }
    });
  }

  // Splits rows x entries into products small enough for the caches, and many enough for the threads.
  void add_products(const T* rows, int64_t row_count, const int32_t* list, int64_t count, int64_t entries_per_token,
                    R* out, int64_t out_stride) {
    const int64_t rows_at_once = count <= kTokens ? kRows : 4 * kRows, entries_at_once = 8 * kTokens;
    for (int64_t e = 0; e < count; e += entries_at_once)
      for (int64_t j = 0; j < row_count; j += rows_at_once)
        products.push_back({rows + j * n.in_features, std::min(rows_at_once, row_count - j), list + e,
                            std::min(entries_at_once, count - e), entries_per_token, out + j, out_stride});
  }

  void run_products() {
    int64_t work = 0;
    for (const auto& product : products) work += product.row_count * product.count;
    if (work == 0) return;
    parallel(parallel_for, products.size(), work * n.in_features / products.size(), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const auto& product = products[i];
        const X* xs[8 * kTokens];
        R* outs[8 * kTokens];
        for (int64_t e = 0; e < product.count; ++e) {
          xs[e] = x[product.entries[e] / product.entries_per_token];
          outs[e] = product.out + product.entries[e] * product.out_stride;
        }
        dots(xs, outs, product.count, product.rows, n.in_features, product.row_count, n.in_features, false);
      }
    });
    products.clear();
  }

  void add_base_product() {
    add_products(static_cast<const T*>(p.weight), n.out_features, every_token.data(), tokens, 1, base.get(),
                 n.out_features);
  }

  void add_router_products() {
    for (int64_t i = 0; i < n.num_experts; ++i)
      add_products(static_cast<const T*>(p.router) + i * p.router_expert_stride, n.rank_of_router, every_token.data(),
                   tokens, 1, &q[i * n.rank_of_router], n.num_experts * n.rank_of_router);
  }

  void add_shrink_products() {
    for (int64_t i = 0; i < n.num_experts; ++i)
      add_products(static_cast<const T*>(p.vh) + (i * n.vh_rows + known_rows) * n.in_features,
                   n.rank_of_expert - known_rows, &entries[first[i]], first[i + 1] - first[i], n.num_experts_per_tok,
                   &z[known_rows], n.rank_of_expert);
  }

  void choose_experts() {
    const int64_t q_stride = n.num_experts * n.rank_of_router, m = n.num_experts_per_tok;
    parallel(parallel_for, tokens, 4 * q_stride + n.num_experts * m, [&](int64_t from, int64_t to) {
      std::vector<R> scores(n.num_experts);
      for (int64_t t = from; t < to; ++t) {
        for (int64_t i = 0; i < n.num_experts; ++i)
          scores[i] = norm(&q[t * q_stride + i * n.rank_of_router], n.rank_of_router);
        choose(scores.data(), n.num_experts, m, weights + t * m, ids + t * m);
      }
    });
  }

  // entries[first[i] : first[i + 1]] are the places (t * m + j) where ids is i, in order; -1 stands for no expert.
  void sort_entries() {
    std::fill(first.begin(), first.end(), 0);
    const int64_t count = tokens * n.num_experts_per_tok;
    for (int64_t e = 0; e < count; ++e)
      if (ids[e] >= 0) ++first[ids[e] + 1];
    for (int64_t i = 0; i < n.num_experts; ++i) first[i + 1] += first[i];
    for (int64_t e = 0; e < count; ++e)
      if (ids[e] >= 0) entries[first[ids[e]]++] = int32_t(e);
    for (int64_t i = n.num_experts; i > 0; --i) first[i] = first[i - 1];
    first[0] = 0;
  }

  // z = w s h; the rows that the router has computed are h as well.
  void scale() {
    const int64_t r = n.rank_of_expert, m = n.num_experts_per_tok;
    parallel(parallel_for, tokens * m, 2 * r, [&](int64_t from, int64_t to) {
      for (int64_t e = from; e < to; ++e) {
        R* ze = &z[e * r];
        if (ids[e] < 0) continue;  // no expert
        if (known_rows) std::copy_n(&q[((e / m) * n.num_experts + ids[e]) * n.rank_of_router], known_rows, ze);
        if (p.h) std::copy_n(ze, r, static_cast<R*>(p.h) + (begin * m + e) * r);
        const R* s = static_cast<const R*>(p.s) + ids[e] * r;
        for (int64_t k = 0; k < r; ++k) ze[k] *= weights[e] * s[k];
      }
    });
  }

  // Every block of outputs is read once, collects all experts in `sums`, and is rounded once.
  void expand() {
    constexpr int64_t kWidth = kPanel * kLanes<R>;
    const int64_t r = n.rank_of_expert, m = n.num_experts_per_tok, blocks = (n.out_features + kWidth - 1) / kWidth;
    parallel(parallel_for, blocks, kWidth * tokens * m * r, [&](int64_t from, int64_t to) {
      std::unique_ptr<R[]> sums(new R[tokens * kWidth]), panel(new R[r * kWidth]);
      for (int64_t block = from; block < to; ++block) {
        const int64_t o = block * kWidth, width = std::min(kWidth, n.out_features - o);
        T* y = static_cast<T*>(p.y) + begin * n.out_features + o;
        for (int64_t t = 0; t < tokens; ++t) begin_sums(t, o, width, y + t * n.out_features, &sums[t * kWidth]);
        for (int64_t i = 0; i < n.num_experts; ++i) expand_expert(i, o, width, sums.get(), panel.get());
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t c = 0; c < width; ++c) y[t * n.out_features + c] = from_real<T>(sums[t * kWidth + c]);
      }
    });
  }

  // sums = x W^T + b for `width` outputs from o on.
  void begin_sums(int64_t t, int64_t o, int64_t width, const T* y, R* sums) {
    if (!p.weight) {
      for (int64_t at = 0; at < kPanel * kLanes<R>; at += 64 / sizeof(T)) __builtin_prefetch(y + width + at, 1);
      for (int64_t c = 0; c < width; ++c) sums[c] = to_real(y[c]);
      return;
    }
    std::copy_n(&base[t * n.out_features + o], width, sums);
    if (p.bias)
      for (int64_t c = 0; c < width; ++c) sums[c] += to_real(static_cast<const T*>(p.bias)[o + c]);
  }

  void expand_expert(int64_t i, int64_t o, int64_t width, R* sums, R* panel) {
    constexpr int64_t kWidth = kPanel * kLanes<R>;
    const int64_t r = n.rank_of_expert, m = n.num_experts_per_tok, count = first[i + 1] - first[i];
    const int32_t* list = &entries[first[i]];
    if (count == 0) return;
    const T* u = static_cast<const T*>(p.u) + (i * n.out_features + o) * r;
    if (p.expert_bias) {
      const T* bias = static_cast<const T*>(p.expert_bias) + i * n.out_features + o;
      for (int64_t e = 0; e < count; ++e)
        for (int64_t c = 0; c < width; ++c) sums[list[e] / m * kWidth + c] += weights[list[e]] * to_real(bias[c]);
    }
    const bool packs = count >= kPackFrom;
    if (packs) pack(u, width, r, panel);
    for (int64_t e = 0; e < count; e += kTokens) {
      const int group = int(std::min<int64_t>(kTokens, count - e));
      const R* zs[kTokens];
      R* outs[kTokens];
      for (int t = 0; t < group; ++t) zs[t] = &z[list[e + t] * r], outs[t] = &sums[list[e + t] / m * kWidth];
      if (packs)
        panel_tile_of<kTokens>(group, zs, panel, r, outs);
      else
        dots(zs, outs, group, u, r, width, r, true);
    }
  }

  static constexpr int64_t kPackFrom = kTokens;  // entries of one expert from which packing u pays

  const Forward& p;
  const Sizes& n;
  const ParallelFor parallel_for;
  bool copies_x;           // x is not plain rows of R
  int64_t known_rows;      // rows of h that the router's products already hold
  int64_t tokens_at_once;
  int64_t begin, tokens;   // this chunk
  R* weights;
  int32_t* ids;
  std::unique_ptr<X[]> x_copy;         // [tokens, D]
  std::unique_ptr<R[]> base, q, z;     // [tokens, O], [tokens, N, g], [tokens * m, r]
  std::vector<const X*> x;
  std::vector<int32_t> every_token, entries;
  std::vector<int64_t> first;
  std::vector<Product<T, R>> products;
};

inline void forward(DType dtype, const Forward& p, ParallelFor parallel_for) {
  if (p.n.tokens == 0) return;
  switch (dtype) {
    case DType::float32: return Chunk<float>(p, parallel_for).run();
    case DType::bfloat16: return Chunk<bfloat16>(p, parallel_for).run();
    case DType::float16: return Chunk<float16>(p, parallel_for).run();
    case DType::float64: return Chunk<double>(p, parallel_for).run();
  }
}

}  // namespace SMILE_NAMESPACE
}  // namespace smile

#undef SMILE_SHUFFLE
#undef SMILE_INLINE
#undef SMILE_NAMESPACE
#undef SMILE_VECTOR_BYTES
#undef SMILE_VECTORS
#undef SMILE_BFLOAT16_DOT
