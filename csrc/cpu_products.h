// Numbers, vectors and products of the CPU kernels, included by cpu_kernels.h in its namespace: x is multiplied with rows
// as they are stored, or with rows packed into panels.

#define SMILE_INLINE inline __attribute__((always_inline))
// Before a loop over an array of sums, which otherwise GCC keeps in memory instead of registers.
#if defined(__clang__)
#define SMILE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SMILE_UNROLL _Pragma("GCC unroll 32")
#endif

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

SMILE_INLINE void store(float* p, Vector<float> v) { std::memcpy(p, &v, sizeof(v)); }
SMILE_INLINE void store(double* p, Vector<double> v) { std::memcpy(p, &v, sizeof(v)); }
SMILE_INLINE void store(bfloat16* p, Vector<float> v) {
  const Bits32 bits = bit_cast<Bits32>(v), rounded = bits + 0x7fff + ((bits >> 16) & 1), is_nan = bit_cast<Bits32>(v != v);
  const Bits16 upper = __builtin_convertvector(((is_nan & (bits | 0x400000)) | (~is_nan & rounded)) >> 16, Bits16);
  std::memcpy(p, &upper, sizeof(upper));
}
SMILE_INLINE void store(float16* p, Vector<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_real<float16>(v[i]);
}

// to[i] = from[i], rounded to To.
template <class From, class To> SMILE_INLINE void convert(const From* from, int64_t count, To* to) {
  constexpr int lanes = kLanes<typename RealOf<From>::type>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from_real<To>(to_real(from[i]));
}

// How numbers x of type X are multiplied with rows of type T: `lanes` at a time, summed in R.
template <class X> struct Operand {
  using R = typename RealOf<X>::type;
  using type = Vector<R>;
  static constexpr int lanes = kLanes<R>;
  template <class T> static SMILE_INLINE type load(const T* p) { return SMILE_NAMESPACE::load(p); }
  static SMILE_INLINE Vector<R> multiply_add(type a, type b, Vector<R> sum) { return sum + a * b; }
};

// The type in which x is multiplied: its own if there is an instruction for it, else float or double.
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

// The first `count` numbers at p, then zeros: at most `Count`. A loop or memcpy would take longer than the products.
template <int Count, class T> struct First {
  T numbers[Count];
  SMILE_INLINE First(const T* p, int count) {
    constexpr int size = Count * sizeof(T);
    const int bytes = count * int(sizeof(T));
#if SMILE_VECTOR_BYTES == 64
    const __mmask64 mask = bytes == 64 ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1;
    if constexpr (size == 64) {
      const __m512i v = _mm512_maskz_loadu_epi8(mask, p);
      std::memcpy(numbers, &v, size);
    } else {
      const __m256i v = _mm256_maskz_loadu_epi8(__mmask32(mask), p);
      std::memcpy(numbers, &v, size);
    }
#else
    std::memset(numbers, 0, size);
    copy_twice<size>(reinterpret_cast<const char*>(p), bytes);
#endif
  }

#if SMILE_VECTOR_BYTES != 64
 private:
  // Copies `bytes` in one piece of Most bytes, or two of a half or a quarter of it and so on, which overlap.
  template <int Most> SMILE_INLINE void copy_twice(const char* p, int bytes) {
    if (bytes == 0) return;
    if (bytes < Most) {
      if constexpr (Most > int(sizeof(T))) copy_twice<Most / 2>(p, bytes);
      return;
    }
    char last[Most];
    std::memcpy(last, p + bytes - Most, Most);
    std::memcpy(numbers, p, Most);
    std::memcpy(reinterpret_cast<char*>(numbers) + bytes - Most, last, Most);
  }
#endif
};

template <class X, class T> SMILE_INLINE typename Operand<X>::type load_first(const T* p, int count) {
  return Operand<X>::load(First<Operand<X>::lanes, T>(p, count).numbers);
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

// Scratch space aligned to vectors, so that no vector of it crosses a cache line.
template <class R> struct Buffer {
  std::unique_ptr<Vector<R>[]> memory;
  explicit Buffer(int64_t count = 0) : memory(new Vector<R>[(count + kLanes<R> - 1) / kLanes<R>]) {}
  R* get() const { return reinterpret_cast<R*>(memory.get()); }
  R& operator[](int64_t i) const { return get()[i]; }
};

// ---- threads ----

// Fewer multiply-adds than this take less time than waking a second thread (about 2 us).
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

template <class T> constexpr int64_t kLine = 64 / sizeof(T);     // numbers in a cache line
template <class T> constexpr int64_t kAhead = 4096 / sizeof(T);  // from a number that is multiplied to one prefetched
template <class T> constexpr int64_t kNear = 2 * kLine<T>;       // the same, where the second-level cache has the number
// Where to: more lines can be on their way to the second-level cache, and they take longer to arrive than to be multiplied.
constexpr int kSecondLevel = 2;

// The rows of a factor, read in kRows streams that are `apart` rows from each other: memory serves several places at once
// faster than one. Tile k is row k of each stream; the last stream may be shorter.
template <class T> struct Rows {
  const T* first;
  int64_t stride, count;
  int64_t apart = (count + kRows - 1) / kRows;
  int in_tile(int64_t k) const { return int((count - k + apart - 1) / apart); }
};

// out[t][i * apart] (+)= sum_d x[t][d] row[i][d] for M tokens and the `in_tile` rows of a tile.
template <int M, class X, class T, class R>
SMILE_INLINE void dot_tile(const X* const* x, R* const* out, int64_t apart, const T* const* row, int in_tile,
                           int64_t depth, int64_t ahead, bool accumulate) {
  using Operand = Operand<X>;
  Vector<R> sum[M][kRows] = {};
  int64_t d = 0;
  for (; d + Operand::lanes <= depth; d += Operand::lanes) {
    typename Operand::type b[kRows];
    for (int i = 0; i < kRows; ++i) b[i] = Operand::load(row[i] + d);
    if (d % kLine<T> == 0)
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(row[i] + d + ahead, 0, kSecondLevel);
    for (int t = 0; t < M; ++t) {
      const auto a = Operand::load(x[t] + d);
      for (int i = 0; i < kRows; ++i) sum[t][i] = Operand::multiply_add(a, b[i], sum[t][i]);
    }
  }
  if (const int left = int(depth - d)) {
    typename Operand::type b[kRows];
    for (int i = 0; i < kRows; ++i) b[i] = load_first<X>(row[i] + d, left);
    for (int t = 0; t < M; ++t) {
      const auto a = load_first<X>(x[t] + d, left);
      for (int i = 0; i < kRows; ++i) sum[t][i] = Operand::multiply_add(a, b[i], sum[t][i]);
    }
  }
  for (int t = 0; t < M; ++t) {
    R total[kRows];
    sum_lanes<R>(sum[t], total);
    for (int i = 0; i < in_tile; ++i) out[t][i * apart] = accumulate ? out[t][i * apart] + total[i] : total[i];
  }
}

template <int M, class X, class T, class R>
void dot_tiles(int m, const X* const* x, R* const* out, const Rows<T>& rows, int64_t begin, int64_t end, int64_t d,
               int64_t depth, int64_t ahead, bool accumulate) {
  if constexpr (M > 1)
    if (m < M) return dot_tiles<M - 1>(m, x, out, rows, begin, end, d, depth, ahead, accumulate);
  R* outs[M];
  for (int64_t k = begin; k < end; ++k) {
    const int in_tile = rows.in_tile(k);
    const T* row[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = rows.first + (k + (i < in_tile ? i : 0) * rows.apart) * rows.stride + d;
    for (int t = 0; t < M; ++t) outs[t] = out[t] + k;
    dot_tile<M>(x, outs, rows.apart, row, in_tile, depth, ahead, accumulate);
  }
}

// out[t][j] (+)= sum_d x[t][d] rows[j][d] for `count` pointers x and out, and the rows j of the tiles begin to end.
// Numbers at the distance `ahead` from those multiplied are prefetched.
template <class X, class T, class R>
void dots(const X* const* x, R* const* out, int64_t count, const Rows<T>& rows, int64_t begin, int64_t end,
          int64_t length, int64_t ahead, bool accumulate) {
  const int64_t passes = (count + kTokens - 1) / kTokens, most = (count + passes - 1) / passes;  // all of them alike
  const int64_t at_once = count > kTokens || length <= kDepth ? end - begin : 1;  // rows that are read once are read to their ends
  for (int64_t k = begin; k < end; k += at_once)
    for (int64_t d = 0; d < length; d += kDepth)
      for (int64_t t = 0; t < count; t += most) {
        const int m = int(std::min(most, count - t));
        const X* xs[kTokens];
        for (int i = 0; i < m; ++i) xs[i] = x[t + i] + d;
        dot_tiles<kTokens>(m, xs, out + t, rows, k, k + at_once, d, std::min(kDepth, length - d), ahead, accumulate || d > 0);
      }
}

// ---- products with packed rows ----
//
// A panel holds rows of a factor interleaved, so that a number of x, or a pair of them, is multiplied with a vector of rows
// and no sum over lanes is needed. Packing is faster from a few x on.

constexpr int kPanel = 4;                // vectors of rows in one panel, at most
constexpr int64_t kPanelDepth = 256;     // columns in one panel: it stays in the caches for many x
// Numbers summed in a row. Sums of few at a time have smaller rounding errors, as PyTorch's have with narrower vectors.
template <class X> constexpr int64_t kChain = std::is_same<X, bfloat16>::value ? kPanelDepth : SMILE_VECTOR_BYTES == 64 ? 128 : 32;
constexpr int64_t kPackFrom = 3;         // number of x from which packing a row is faster

// The elements of a panel: numbers of R, or pairs of bfloat16 if there is an instruction for their dot products.
template <class X> struct Packed {
  using R = X;
  static constexpr int numbers = 1;
  template <class T> static SMILE_INLINE Vector<R> load(const T* row) { return SMILE_NAMESPACE::load(row); }
  static SMILE_INLINE Vector<R> multiply_add(const X* x, Vector<R> panel, Vector<R> sum) { return sum + *x * panel; }
  static SMILE_INLINE Vector<R> multiply_add(Vector<R> x, Vector<R> panel, Vector<R> sum) { return sum + x * panel; }
};

#if SMILE_BFLOAT16_DOT
template <> struct Packed<bfloat16> {
  using R = float;
  static constexpr int numbers = 2;
  static SMILE_INLINE Vector<R> load(const bfloat16* row) { return load_as<Vector<R>>(row); }
  static SMILE_INLINE Vector<R> multiply_add(const bfloat16* x, Vector<R> panel, Vector<R> sum) {
    return multiply_add((Vector<R>)_mm512_set1_epi32(load_as<int32_t>(x)), panel, sum);
  }
  static SMILE_INLINE Vector<R> multiply_add(Vector<R> x, Vector<R> panel, Vector<R> sum) {
    return (Vector<R>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)panel);
  }
};
#endif

template <class X> constexpr int64_t kPanelWidth = kPanel * kLanes<typename Packed<X>::R>;

// bfloat16 is multiplied 16 x 16 x 32 numbers at once; a panel of it has whole tiles, the last one padded with zeros.
template <class X> constexpr bool kTiles = SMILE_BFLOAT16_TILES && std::is_same<X, bfloat16>::value;

template <class X> constexpr int64_t packed_depth(int64_t depth) {
  constexpr int64_t numbers = Packed<X>::numbers, each = kTiles<X> ? 16 : 1;
  return (depth + numbers * each - 1) / (numbers * each) * each;
}

// Vectors of a panel with `width` rows, 1 to kPanel.
template <class X> constexpr int panel_vectors(int64_t width) {
  constexpr int64_t lanes = kLanes<typename Packed<X>::R>;
  return int((width + lanes - 1) / lanes);
}

// panel[k][c] = rows[c][k] for `width` rows, at most kPanelWidth; the last vector repeats the last of them.
// The rows at the distance `ahead`, to be packed next, are prefetched.
template <class X, class T> void pack(const T* const* rows, int64_t width, int64_t depth, typename Packed<X>::R* panel, int64_t ahead = 0) {
  using R = typename Packed<X>::R;
  constexpr int lanes = kLanes<R>, numbers = Packed<X>::numbers;
  const int64_t stride = panel_vectors<X>(width) * lanes;
  for (int64_t c = 0; c < width; c += lanes)
    for (int64_t k = 0; k < depth; k += lanes * numbers) {
      const int left = int(std::min<int64_t>(lanes * numbers, depth - k));
      Vector<R> square[lanes];
      for (int i = 0; i < lanes; ++i) {
        const T* row = rows[std::min(c + i, width - 1)] + k;
        if (ahead) __builtin_prefetch(row + ahead);
        if (left == lanes * numbers) {
          square[i] = Packed<X>::load(row);
        } else {
          square[i] = Packed<X>::load(First<lanes * numbers, T>(row, left).numbers);
        }
      }
      transpose<lanes / 2, R>(square, std::make_integer_sequence<int, lanes>());
      for (int i = 0; i < packed_depth<X>(left); ++i)
        std::memcpy(panel + (k / numbers + i) * stride + c, &square[i], sizeof(square[i]));
    }
}

// The x of a tile, and those of the next one, which are prefetched meanwhile: an x that is read only once would be waited
// for otherwise.
template <class X> struct Tile {
  const X *x[2 * kTokens], *next[2 * kTokens];
};

// out_t[0 : V vectors] (+)= sum_k x_t[k] panel[k] for M x.
template <int M, int V, class X, class R>
SMILE_INLINE void panel_tile(const Tile<X>& tile, int64_t from, const R* panel, int64_t depth, R* const* out, bool accumulate) {
  const X* x[M];
  SMILE_UNROLL for (int t = 0; t < M; ++t) x[t] = tile.x[t] + from;
  constexpr int numbers = Packed<X>::numbers, lanes = kLanes<R>;
  if (accumulate)
    for (int t = 0; t < M; ++t)
      for (int v = 0; v < V; ++v) __builtin_prefetch(out[t] + v * lanes, 1);
  Vector<R> sum[M][V] = {};
  int64_t k = 0;
  while (k + numbers <= depth) {
    SMILE_UNROLL for (int t = 0; t < M; ++t) __builtin_prefetch(tile.next[t] + from + k);
    for (const int64_t end = std::min(depth, k + kLine<X>); k + numbers <= end; k += numbers, panel += V * lanes)
      SMILE_UNROLL for (int t = 0; t < M; ++t)
        SMILE_UNROLL for (int v = 0; v < V; ++v)
          sum[t][v] = Packed<X>::multiply_add(x[t] + k, load(panel + v * lanes), sum[t][v]);
  }
  if (k < depth)
    SMILE_UNROLL for (int t = 0; t < M; ++t) {
      const X last[numbers] = {x[t][k]};
      SMILE_UNROLL for (int v = 0; v < V; ++v) sum[t][v] = Packed<X>::multiply_add(last, load(panel + v * lanes), sum[t][v]);
    }
  SMILE_UNROLL for (int t = 0; t < M; ++t)
    SMILE_UNROLL for (int v = 0; v < V; ++v) {
      if (accumulate) sum[t][v] += load(out[t] + v * lanes);
      std::memcpy(out[t] + v * lanes, &sum[t][v], sizeof(sum[t][v]));
    }
}

template <int M, int V, class X, class R>
void panel_tiles(int m, const Tile<X>& x, int64_t from, const R* panel, int64_t depth, R* const* out, bool accumulate) {
  if constexpr (M > 1)
    if (m < M) return panel_tiles<(M > kTokens ? kTokens : M - 1), V>(m, x, from, panel, depth, out, accumulate);
  panel_tile<M, V>(x, from, panel, depth, out, accumulate);
}

// Rows at equal distances.
template <class E> struct Strided {
  E* data;
  int64_t stride;
  E* operator()(int64_t t) const { return data + t * stride; }
};

// The tile registers of this thread, while there is one of these; products with tiles make one if there is none.
template <class X> struct TilesInUse {};

#if SMILE_BFLOAT16_TILES
constexpr int kTile = 16, kTileDepth = 32;  // a tile of x is kTile x kTileDepth, a tile of sums kTile x kTile

template <> struct TilesInUse<bfloat16> {
  static inline thread_local int count = 0;
  TilesInUse() {
    if (count++ > 0) return;
    alignas(64) unsigned char config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = kTile;
    _tile_loadconfig(config);
  }
  ~TilesInUse() {
    if (--count == 0) _tile_release();
  }
};

// sums [kTile][V vectors] (+)= x panel; a row of x every x_stride numbers, of sums every `stride`. The depth is padded to whole
// tiles.
template <int V>
void multiply_tiles(const bfloat16* x, int64_t x_stride, const float* panel, int64_t depth, float* sums, int64_t stride, bool accumulate) {
  constexpr int64_t kRow = V * kTile * sizeof(float);
  asm volatile("" ::: "memory");  // the tile instructions do not declare the memory that they read and write
  stride *= sizeof(float);
  if (accumulate) {
    _tile_loadd(0, sums, stride);
    if constexpr (V > 1) _tile_loadd(1, sums + kTile, stride);
    if constexpr (V > 2) _tile_loadd(2, sums + 2 * kTile, stride);
    if constexpr (V > 3) _tile_loadd(3, sums + 3 * kTile, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileDepth, x += kTileDepth, panel += kTile * V * kTile) {
    _tile_loadd(4, x, x_stride * sizeof(bfloat16));
    _tile_loadd(5, panel, kRow);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (V > 1) _tile_loadd(6, panel + kTile, kRow);
    if constexpr (V > 1) _tile_dpbf16ps(1, 4, 6);
    if constexpr (V > 2) _tile_loadd(5, panel + 2 * kTile, kRow);
    if constexpr (V > 2) _tile_dpbf16ps(2, 4, 5);
    if constexpr (V > 3) _tile_loadd(6, panel + 3 * kTile, kRow);
    if constexpr (V > 3) _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, sums, stride);
  if constexpr (V > 1) _tile_stored(1, sums + kTile, stride);
  if constexpr (V > 2) _tile_stored(2, sums + 2 * kTile, stride);
  if constexpr (V > 3) _tile_stored(3, sums + 3 * kTile, stride);
  asm volatile("" ::: "memory");
}

// The distance of the kTile rows from number e on, from one to the next; 0 if it differs.
template <class At> int64_t distance_of_tile(const At& at, int64_t e) {
  const auto first = at(e);
  const int64_t apart = at(e + 1) - first;
  for (int64_t t = 2; t < kTile; ++t)
    if (at(e + t) != first + t * apart) return 0;
  return apart;
}
template <class E> int64_t distance_of_tile(const Strided<E>& rows, int64_t) { return rows.stride; }

// out[e][V vectors] (+)= x[e] panel for `count` x. Rows at equal distances are multiplied, and added to, where they are.
template <int V, class At, class Out>
void tile_product(int64_t count, const At& x_at, const float* panel, int64_t depth, const Out& out_at, bool accumulate) {
  constexpr int64_t kWidth = V * kTile;
  alignas(64) bfloat16 block[kTile * kPanelDepth];
  alignas(64) float sums[kTile * kWidth];
  const int64_t depth_of_block = (depth + kTileDepth - 1) / kTileDepth * kTileDepth;
  const TilesInUse<bfloat16> in_use;
  for (int64_t e = 0; e < count; e += kTile) {
    const int64_t m = std::min<int64_t>(kTile, count - e);
    const bfloat16* x = block;
    int64_t x_stride = m == kTile && depth == depth_of_block ? distance_of_tile(x_at, e) : 0;
    if (x_stride != 0) {
      x = x_at(e);
    } else {
      x_stride = depth_of_block;
      if (m < kTile || depth != depth_of_block) std::fill_n(block, kTile * depth_of_block, bfloat16{0});
      for (int64_t t = 0; t < m; ++t) std::copy_n(x_at(e + t), depth, block + t * depth_of_block);
    }
    if (const int64_t stride = m == kTile ? distance_of_tile(out_at, e) : 0) {
      multiply_tiles<V>(x, x_stride, panel, depth, out_at(e), stride, accumulate);
      continue;
    }
    float* out[kTile];
    for (int64_t t = 0; t < m; ++t) out[t] = out_at(e + t);
    for (int64_t t = 0; t < m && accumulate; ++t)
      for (int64_t c = 0; c < kWidth; c += kLanes<float>) __builtin_prefetch(out[t] + c, 1);
    multiply_tiles<V>(x, x_stride, panel, depth, sums, kWidth, false);
    for (int64_t t = 0; t < m; ++t) {
      float* const to = out[t];
      SMILE_UNROLL for (int64_t c = 0; c < kWidth; c += kLanes<float>) {
        Vector<float> total = load(sums + t * kWidth + c);
        if (accumulate) total += load(to + c);
        std::memcpy(to + c, &total, sizeof(total));
      }
    }
  }
}

// The same for a panel of `width` rows.
template <class At, class Out>
void tile_product(int64_t count, const At& x_at, const float* panel, int64_t width, int64_t depth, const Out& out_at, bool accumulate) {
  switch (panel_vectors<bfloat16>(width)) {
    case 1: return tile_product<1>(count, x_at, panel, depth, out_at, accumulate);
    case 2: return tile_product<2>(count, x_at, panel, depth, out_at, accumulate);
    case 3: return tile_product<3>(count, x_at, panel, depth, out_at, accumulate);
    default: return tile_product<kPanel>(count, x_at, panel, depth, out_at, accumulate);
  }
}
#endif

struct NoPrefetch {
  template <class... At> void operator()(At...) const {}
};

// out_e[0 : V vectors] (+)= x_e panel for `count` x, one or more: a few at once, more for a narrow panel. Meanwhile prefetch(from, to) is
// called, for the x from `from` to `to`.
template <int V, class X, class R, class At, class Out, class Prefetch>
void few_products(int64_t count, const At& x_at, const R* panel, int64_t depth, const Out& out_at, bool accumulate,
                  const Prefetch& prefetch) {
  constexpr int most = V <= kPanel / 2 ? 2 * kTokens : kTokens;
  Tile<X> tile;
  for (int t = 0; t < most; ++t) tile.next[t] = x_at(std::min<int64_t>(t, count - 1));
  for (int64_t e = 0, m; e < count; e += m) {
    m = count - e >= most ? most : std::min<int64_t>(kTokens, count - e);
    R* outs[most];
    for (int t = 0; t < m; ++t) tile.x[t] = tile.next[t], outs[t] = out_at(e + t);
    for (int t = 0; t < most; ++t) tile.next[t] = x_at(std::min(e + m + t, count - 1));
    prefetch(e, e + m);
    for (int64_t k = 0; k < depth; k += kChain<X>) {
      const R* part = panel + k / Packed<X>::numbers * V * kLanes<R>;
      panel_tiles<most, V>(int(m), tile, k, part, std::min(kChain<X>, depth - k), outs, accumulate || k > 0);
    }
  }
}

// out_e[0 : width] (+)= x_e panel for `count` x; also the numbers up to the last vector of the panel are written.
template <class X, class R, class At, class Out, class Prefetch = NoPrefetch>
void panel_product(int64_t count, const At& x_at, const R* panel, int64_t width, int64_t depth, const Out& out_at, bool accumulate,
                   const Prefetch& prefetch = {}) {
#if SMILE_BFLOAT16_TILES
  if constexpr (kTiles<X>) return tile_product(count, x_at, panel, width, depth, out_at, accumulate);
#endif
  switch (panel_vectors<X>(width)) {
    case 1: return few_products<1, X>(count, x_at, panel, depth, out_at, accumulate, prefetch);
    case 2: return few_products<2, X>(count, x_at, panel, depth, out_at, accumulate, prefetch);
    case 3: return few_products<3, X>(count, x_at, panel, depth, out_at, accumulate, prefetch);
    default: return few_products<kPanel, X>(count, x_at, panel, depth, out_at, accumulate, prefetch);
  }
}

// out_at(e)[0 : width] = the product of x_e with a factor of `depth` columns and `width` rows, at most those of a panel, for `count`
// x. lay(d, length, panel) makes a panel of the columns from d on, and x_at(e, d) is x_e from d on.
// Sums over more than kDepth columns are added to one another, not continued: their rounding errors are smaller.
template <class X, class Lay, class XAt, class OutAt, class Prefetch = NoPrefetch>
void product_by_panels(int64_t depth, int64_t width, int64_t count, const Lay& lay, const XAt& x_at, const OutAt& out_at,
                       const Prefetch& prefetch = {}) {
  using R = typename Packed<X>::R;
  constexpr int64_t kWidth = kPanelWidth<X>;
  const bool has_room = width == panel_vectors<X>(width) * kLanes<R>;  // for the last vector of sums, which is written whole
  const Buffer<R> panel(packed_depth<X>(std::min(depth, kPanelDepth)) * kWidth);
  const Buffer<R> sums(has_room && depth <= kDepth ? 0 : count * kWidth);
  for (int64_t d = 0; d < depth; d += kPanelDepth) {
    const int64_t length = std::min(kPanelDepth, depth - d), end = d + length;
    const bool in_place = has_room && d < kDepth;
    lay(d, length, panel.get());
    panel_product<X>(count, [&](int64_t e) { return x_at(e, d); }, panel.get(), width, length,
                     [&](int64_t e) { return in_place ? out_at(e) : sums.get() + e * kWidth; }, d % kDepth > 0,
                     [&](int64_t from, int64_t to) { prefetch(end, from, to); });
    if (in_place || (end % kDepth > 0 && end < depth)) continue;
    for (int64_t e = 0; e < count; ++e) {
      R *out = out_at(e), *part = sums.get() + e * kWidth;
      for (int64_t c = 0; c < width; ++c) out[c] = d < kDepth ? part[c] : out[c] + part[c];
    }
  }
}

// ---- products of packed x with rows as they are stored ----
//
// x are packed into panels of vectors over x, and each number of a row is multiplied with them. Rows that are more than
// the x are read once and not copied, whereas packing them takes as long as multiplying them with many x.
// x that fill half a vector at most have two successive elements each in one, and two of a row are repeated over a vector.

constexpr int64_t kRowsAtOnce = 48;   // a multiple of the rows of every tile
// Numbers summed in a row: sums of few have smaller rounding errors.
template <class X> constexpr int64_t kChainOfRows = std::is_same<X, bfloat16>::value ? kPanelDepth : 64;
// Whether so many x are multiplied faster by panels than by `dots`: those that fill most of a vector, half of one of pairs, or
// a third of a tile.
template <class X> constexpr bool is_worth_packing(int64_t count) {
  if (kTiles<X>) return count > 4;
  return count > (SMILE_VECTORS == 16 ? 9 : 12) || (std::is_same<X, bfloat16>::value && (count == 7 || count == 8));
}
// The number of x beyond which packing rows is faster.
template <class X> constexpr int64_t kMostPacked = SMILE_VECTORS == 16 || kTiles<X> ? 64 : 128;

// Rows in registers, where a panel has V vectors.
constexpr int rows_of_tile(int V) { return SMILE_VECTORS == 16 ? 12 / V : V < 3 ? 12 : 24 / V; }

// The elements of each of `width` x in one vector: E, 1 or 2.
template <class X> constexpr int elements_of(int64_t width) {
  using R = typename Packed<X>::R;
  return sizeof(R) == 4 && !kTiles<X> && width <= kLanes<R> / 2 ? 2 : 1;
}

// The panel of `width` x with `depth` columns; with two elements of each, panel[k][2 t + j] = element 2 k + j of x_t.
template <class X, class R> void pack_x(const X* const* x, int64_t width, int64_t depth, R* panel) {
  if (elements_of<X>(width) == 1) return pack<X>(x, width, depth, panel);
  constexpr int64_t numbers = 2 * Packed<X>::numbers;
  for (int64_t k = 0; k < depth; k += numbers, panel += kLanes<R>) {
    std::fill_n(panel, kLanes<R>, R(0));
    for (int64_t t = 0; t < width; ++t) std::memcpy(panel + 2 * t, x[t] + k, std::min(numbers, depth - k) * sizeof(X));
  }
}

// sum[i][V vectors] += row[i][k] x[k], where x[k] are the vectors of a panel.
template <int M, int V, int E, class X, class R>
SMILE_INLINE void row_step(const X* const* row, int64_t k, const R* panel, Vector<R> (&sum)[M][V]) {
  if constexpr (E == 2) {
    using Twos = typename VectorOf<int64_t, SMILE_VECTOR_BYTES>::type;
    SMILE_UNROLL for (int i = 0; i < M; ++i)
      sum[i][0] = Packed<X>::multiply_add(bit_cast<Vector<R>>(Twos{} + load_as<int64_t>(row[i] + k)), load(panel), sum[i][0]);
    return;
  }
  Vector<R> x[V];
  SMILE_UNROLL for (int v = 0; v < V; ++v) x[v] = load(panel + v * kLanes<R>);
  SMILE_UNROLL for (int i = 0; i < M; ++i)
    SMILE_UNROLL for (int v = 0; v < V; ++v) sum[i][v] = Packed<X>::multiply_add(row[i] + k, x[v], sum[i][v]);
}

// out[i][V vectors] (+)= sum_k row[i][k] panel[k] for M rows. The `next` ones are prefetched.
template <int M, int V, int E, class X, class R>
SMILE_INLINE void row_tile(const X* const* row, const X* const* next, const R* panel, int64_t depth, R* out, bool accumulate) {
  constexpr int64_t lanes = kLanes<R>, numbers = E * Packed<X>::numbers;
  for (int64_t from = 0; from < depth; from += kChainOfRows<X>) {
    const int64_t to = std::min(depth, from + kChainOfRows<X>);
    Vector<R> sum[M][V] = {};
    for (int64_t k = from; k < to;) {
      const int64_t end = std::min(k + kLine<X>, to);
      SMILE_UNROLL for (int i = 0; i < M; ++i) __builtin_prefetch(next[i] + k, 0, kSecondLevel);
      for (; k + numbers <= end; k += numbers, panel += V * lanes) row_step<M, V, E>(row, k, panel, sum);
      if (k < end) {  // the last, fewer than `numbers`
        X last[M][numbers] = {};
        const X* lasts[M];
        for (int i = 0; i < M; ++i) std::copy_n(row[i] + k, end - k, last[i]), lasts[i] = last[i];
        row_step<M, V, E>(lasts, 0, panel, sum);
        k = end;
      }
    }
    SMILE_UNROLL for (int i = 0; i < M; ++i)
      SMILE_UNROLL for (int v = 0; v < V; ++v) {
        R* at = out + (i * V + v) * lanes;
        if (accumulate || from > 0) sum[i][v] += load(at);
        std::memcpy(at, &sum[i][v], sizeof(sum[i][v]));
      }
  }
}

template <class X, int V, int E, class R, class At>
void row_tiles(int64_t count, const At& row_at, const R* panel, int64_t depth, R* out, bool accumulate) {
  constexpr int M = rows_of_tile(V);
  for (int64_t c = 0; c < count; c += M) {
    const X *row[M], *next[M];
    for (int i = 0; i < M; ++i) row[i] = row_at(c + i), next[i] = row_at(c + M + i);
    row_tile<M, V, E>(row, next, panel, depth, out + c * V * kLanes<R>, accumulate);
  }
}

#if SMILE_BFLOAT16_TILES
// The same with tiles. The rows of the next block are prefetched.
template <class At>
void rows_by_tiles(int64_t count, const At& row_at, const float* panel, int64_t width, int64_t depth, float* out, bool accumulate) {
  const int64_t stride = panel_vectors<bfloat16>(width) * kLanes<float>;
  for (int64_t d = 0; d < depth; d += kPanelDepth)
    for (int64_t c = 0; c < count; c += kTile) {
      const int64_t length = std::min(kPanelDepth, depth - d);
      for (int64_t i = 0; i < kTile; ++i)
        for (int64_t k = d; k < d + length; k += kLine<bfloat16>) __builtin_prefetch(row_at(c + kRowsAtOnce + i) + k, 0, kSecondLevel);
      tile_product(std::min<int64_t>(kTile, count - c), [&](int64_t i) { return row_at(c + i) + d; }, panel + d / 2 * stride, width, length,
                   Strided<float>{out + c * stride, stride}, accumulate || d > 0);
    }
}
#endif

// out[c] (+)= row_at(c) panel for `count` rows, at most kRowsAtOnce, and a panel of `width` x. row_at is called for later
// rows too, and out has room for kRowsAtOnce rows of the panel's vectors.
template <class X, class R, class At>
void row_product(int64_t count, const At& row_at, const R* panel, int64_t width, int64_t depth, R* out, bool accumulate) {
#if SMILE_BFLOAT16_TILES
  if constexpr (kTiles<X>) return rows_by_tiles(count, row_at, panel, width, depth, out, accumulate);
#endif
  if constexpr (sizeof(R) == 4)
    if (elements_of<X>(width) == 2) return row_tiles<X, 1, 2>(count, row_at, panel, depth, out, accumulate);
  switch (panel_vectors<X>(width)) {
    case 1: return row_tiles<X, 1, 1>(count, row_at, panel, depth, out, accumulate);
    case 2: return row_tiles<X, 2, 1>(count, row_at, panel, depth, out, accumulate);
    case 3: return row_tiles<X, 3, 1>(count, row_at, panel, depth, out, accumulate);
    default: return row_tiles<X, kPanel, 1>(count, row_at, panel, depth, out, accumulate);
  }
}
