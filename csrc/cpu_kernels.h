// The CPU kernels, written once with the compiler's vector types. cpu.cpp includes this file once for each instruction
// set, so there is no include guard. It sets SMILE_NAMESPACE; SMILE_VECTOR_BYTES, the size of a vector; SMILE_VECTORS,
// how many registers hold one; SMILE_BFLOAT16_DOT, whether there is an instruction for bfloat16 dot products;
// SMILE_BFLOAT16_TILES, whether AMX multiplies tiles of them.
//
// A chunk of tokens goes through: float copy of x (where needed) -> products with the router's rows -> top-m -> entries sorted
// by expert -> the other rows of the selected experts -> expand into y. Products with W, unless PyTorch's are faster, are
// computed with the router's for one or two panels of tokens, and for more of them in expand, block by block.
// Every step is split over threads by its outputs, so no two threads write the same number and the result does not depend
// on the number of threads.

namespace smile {
namespace SMILE_NAMESPACE {

#include "cpu_products.h"

// ---- the layer ----

// |q|, also where the squares overflow or vanish.
template <class R> R norm(const R* q, int64_t count) {
  Vector<R> squares = {};
  int64_t at = 0;
  for (; at + kLanes<R> <= count; at += kLanes<R>) squares += load(q + at) * load(q + at);
  if (at < count) {
    const Vector<R> last = load_first<R>(q + at, int(count - at));
    squares += last * last;
  }
  const auto four = fold<R>(squares);  // or two
  R sum = 0, largest = 0;
  for (size_t i = 0; i < 16 / sizeof(R); ++i) sum += four[i];
  if (sum != sum || (sum > std::numeric_limits<R>::min() / std::numeric_limits<R>::epsilon() && sum < std::numeric_limits<R>::max()))
    return std::sqrt(sum);
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(q[i]));
  if (largest == 0 || largest > std::numeric_limits<R>::max()) return largest;
  sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += (q[i] / largest) * (q[i] / largest);
  return largest * std::sqrt(sum);
}

// A token and one of its experts: their place among all, and the token.
struct Entry { int32_t place, token; };

// entries[first[i] : first[i + 1]] become those of the places e where expert_at(e) is i, in order; -1 means no expert.
template <class ExpertAt>
void sort_by_expert(const ExpertAt& expert_at, int64_t tokens, int64_t per_token, int64_t num_experts,
                    std::vector<int64_t>& first, std::vector<Entry>& entries) {
  const int64_t count = tokens * per_token;
  std::fill(first.begin(), first.end(), 0);
  for (int64_t e = 0; e < count; ++e)
    if (expert_at(e) >= 0) ++first[expert_at(e) + 1];
  for (int64_t i = 0; i < num_experts; ++i) first[i + 1] += first[i];
  for (int64_t e = 0; e < count; ++e)
    if (expert_at(e) >= 0) entries[first[expert_at(e)]++] = {int32_t(e), int32_t(e / per_token)};
  for (int64_t i = num_experts; i > 0; --i) first[i] = first[i - 1];
  first[0] = 0;
}

// Products of tokens with rows: out[e] = rows x_e, for some entries e and the tiles begin to end of the rows.
template <class T, class R> struct Product {
  Rows<T> rows;
  int64_t begin, end;
  const Entry* entries;
  int64_t count;
  R* out;         // that of place e at out + e * out_stride
  int64_t out_stride;
  int64_t ahead;  // the distance of the numbers to prefetch, where rows are not packed
};

// Entries that a packed product takes at once: their x stay in the second-level cache.
constexpr int64_t kEntriesAtOnce = 32 * kTokens;

// The number of tokens up to which these kernels compute the base product too. A few are bound by reading W, as at::linear is
// after its overhead; up to one or two panels of them, packing x is faster than packing W; and 16-bit numbers that the processor
// does not multiply are converted here with vectors. More are multiplied here where that was measured to be faster: by processors
// with bfloat16 instructions, with tiles where x has few columns, and, float32, by AMD's. Measured: bench/NOTES.md.
template <class T> int64_t most_tokens_of_base(int64_t in_features) {
  using X = typename MultiplyAs<T>::type;
  constexpr int64_t any = std::numeric_limits<int64_t>::max();
  if (SMILE_VECTOR_BYTES == 16) return 8;
  if (kTiles<X>) return in_features <= kDepth ? any : kMostPacked<X>;
  if (!std::is_same<T, X>::value || std::is_same<T, bfloat16>::value) return any;
#if SMILE_VECTOR_BYTES == 64
  if (std::is_same<T, float>::value && __builtin_cpu_is("amd")) return any;
#endif
  return kMostPacked<X>;
}

// Blocks of outputs that tiles multiply with the same x, and how many x: both stay in the second-level cache.
constexpr int64_t kBlocksOfGroup = 4, kTokensOfGroup = 256;

// "Expert" v of a layer is number v % N of part v / N.
template <class T> class Chunk {
  using R = typename RealOf<T>::type;
  using X = typename MultiplyAs<T>::type;
  static constexpr bool kInPlace = std::is_same<T, R>::value;  // y holds sums, others are rounded once
  static constexpr int64_t kMostTokens = kTiles<X> ? 2048 : 1024;  // of a chunk

 public:
  Chunk(const Forward& p, ParallelFor parallel_for, int64_t threads)
      : p(p), n(p.n), parallel_for(parallel_for), threads(threads), num_parts(p.parts.count), experts(num_parts * n.num_experts),
        slots(num_parts * n.num_experts_per_tok) {
    copies_x = !std::is_same<T, X>::value || p.x_stride[1] != 1;
    // By the tokens of the whole call, so that the same router's rows and x have the same scores in every chunk and operator.
    const bool packs_x = is_worth_packing<X>(n.tokens);
    packs_rows = n.tokens >= kPackFrom * kTokens;
    packs_weight = p.weight && n.tokens > kMostPacked<X>;
    packs_x_for_base = p.weight && packs_x && !packs_weight;
    packs_x_for_router = p.router && packs_x && n.tokens <= kMostPacked<X>;
    find_ranks();
    if (p.y) cut_outputs();
    const int64_t per_token = (copies_x ? n.in_features : 0) + q_columns() + (p.weight && !packs_weight ? n.out_features : 0) +
                              (p.y ? slots * n.rank_of_expert : 0);
    const int64_t least = p.weight ? kPanelWidth<X> : kTokens, most = (kMostTokens << 10) / std::max<int64_t>(1, per_token);
    tokens_at_once = std::min({n.tokens, kMostTokens, std::max(least, most / least * least)});
    const int64_t entries_at_once = tokens_at_once * slots;
    if (copies_x) x_copy.reset(new X[tokens_at_once * n.in_features]);
    if (p.router) q = Buffer<R>(tokens_at_once * q_columns());
    if (p.weight && !packs_weight && !kInPlace) base.reset(new R[tokens_at_once * n.out_features]);
    if (p.y) h.reset(new R[entries_at_once * n.rank_of_expert]);
    if (p.y) z.reset(new X[entries_at_once * n.rank_of_expert]);
    x.resize(tokens_at_once);
    every_token.resize(tokens_at_once);
    for (int64_t t = 0; t < tokens_at_once; ++t) every_token[t] = {int32_t(t), int32_t(t)};
    entries.resize(entries_at_once);
    first.resize(experts + 1);
  }

  void run() {
    for (begin = 0; begin < n.tokens; begin += tokens_at_once) {
      tokens = std::min(tokens_at_once, n.tokens - begin);
      if (!p.energies) weights = static_cast<R*>(p.weights) + begin * slots, ids = p.ids + begin * slots;
      read_x();
      if (packs_x_for_base || packs_x_for_router) multiply_packed_x();
      if (p.weight && !packs_x_for_base && !packs_weight) add_base_product();
      if (p.router && !packs_x_for_router) packs_rows ? run_packed_router_product() : add_router_products();
      run_products();
      if (p.router) choose_experts();
      if (!p.y) continue;
      sort_by_expert([&](int64_t e) { return expert_of(e); }, tokens, slots, experts, first, entries);
      add_shrink_products();
      run_products();
      scale();
      expand();
    }
  }

 private:
  struct Block { int64_t part, o, width; };  // `width` outputs from o on, of one part

  // A part with rank 0 has no experts. Products with singular values of 0 are skipped, unless h is requested.
  void find_ranks() {
    rank.resize(experts);
    first_q.resize(num_parts);
    for (int64_t part = 0; part < num_parts; ++part) {
      const int64_t most = p.parts.ranks ? p.parts.ranks[part] : p.y ? n.rank_of_expert : 1;
      first_q[part] = int64_t(routed.size());
      for (int64_t v = part * n.num_experts; v < (part + 1) * n.num_experts; ++v) {
        rank[v] = most;
        if (p.router && most > 0) routed.push_back(v);
        if (p.y && !p.h)
          while (rank[v] > 0 && static_cast<const R*>(p.s)[v * n.rank_of_expert + rank[v] - 1] == 0) --rank[v];
      }
    }
  }

  // Blocks of outputs; each belongs to one part.
  void cut_outputs() {
    int64_t o = 0;
    for (int64_t part = 0; part < num_parts; ++part) {
      const int64_t end = p.parts.features ? o + p.parts.features[part] : n.out_features;
      for (; o < end; o += blocks.back().width) blocks.push_back({part, o, std::min(kPanelWidth<X>, end - o)});
    }
  }

  bool has_experts(int64_t part) const { return !p.parts.ranks || p.parts.ranks[part] > 0; }
  int64_t q_columns() const { return int64_t(routed.size()) * n.rank_of_router; }
  int64_t expert_of(int64_t e) const {
    const int64_t part = num_parts == 1 ? 0 : e / n.num_experts_per_tok % num_parts;
    return ids[e] < 0 || !has_experts(part) ? -1 : part * n.num_experts + ids[e];
  }
  // Rows of h that the router's products already contain.
  int64_t known_rows(int64_t v) const { return p.router && p.tied_router ? std::min(n.rank_of_router, rank[v]) : 0; }

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

  // Whether to pack the rows that as many entries are multiplied with. Sixteen fill a tile.
  bool packs_rows_for(int64_t count) const { return packs_rows && count >= (kTiles<X> ? 16 : 4 * kTokens); }

  // Splits rows x entries into products that fit in the caches and suffice for the threads.
  void add_products(const T* rows, int64_t row_count, const Entry* list, int64_t count, R* out, int64_t out_stride,
                    int64_t ahead = kAhead<T>) {
    const bool packed = packs_rows_for(count);
    const int64_t rows_at_once = packed ? kPanelWidth<X> : row_count, entries_at_once = packed ? kEntriesAtOnce : 8 * kTokens;
    for (int64_t e = 0; e < count; e += entries_at_once)
      for (int64_t j = 0; j < row_count; j += rows_at_once) {
        const Rows<T> some{rows + j * n.in_features, n.in_features, std::min(rows_at_once, row_count - j)};
        const int64_t tiles = packed ? some.apart : 4;
        for (int64_t k = 0; k < some.apart; k += tiles)
          products.push_back({some, k, std::min(k + tiles, some.apart), list + e, std::min(entries_at_once, count - e),
                              out + j, out_stride, ahead});
      }
  }

  void run_products() {
    int64_t work = 0;
    for (const auto& product : products) work += (product.end - product.begin) * kRows * product.count;
    if (work == 0) return;
    parallel(parallel_for, products.size(), work * n.in_features / products.size(), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const auto& product = products[i];
        const auto x_at = [&](int64_t e) { return x[product.entries[e].token]; };
        const auto out_at = [&](int64_t e) { return product.out + product.entries[e].place * product.out_stride; };
        if (packs_rows_for(product.count)) {
          const auto row_at = [&](int64_t c) { return product.rows.first + c * n.in_features; };
          packed_product(product.rows.count, row_at, product.count, x_at, out_at);
          continue;
        }
        const X* xs[8 * kTokens];
        R* outs[8 * kTokens];
        for (int64_t e = 0; e < product.count; ++e) xs[e] = x_at(e), outs[e] = out_at(e);
        dots(xs, outs, product.count, product.rows, product.begin, product.end, n.in_features, product.ahead, false);
      }
    });
    products.clear();
  }

  // Where x W^T is summed: in y, or in `base`.
  R* base_sums() const { return kInPlace ? static_cast<R*>(p.y) + begin * p.y_stride : base.get(); }
  int64_t base_stride() const { return kInPlace ? p.y_stride : n.out_features; }

  void add_base_product() {
    add_products(static_cast<const T*>(p.weight), n.out_features, every_token.data(), tokens, base_sums(), base_stride());
  }

  void add_router_products() {
    for (size_t i = 0; i < routed.size(); ++i)
      add_products(static_cast<const T*>(p.router) + routed[i] * p.router_expert_stride, n.rank_of_router, every_token.data(),
                   tokens, &q[i * n.rank_of_router], q_columns(), n.rank_of_router > kRows ? kAhead<T> : p.router_expert_stride);
  }

  // Row j of all experts' router rows, one after the other.
  const T* router_row(int64_t j) const {
    const int64_t g = n.rank_of_router;
    return static_cast<const T*>(p.router) + routed[j / g] * p.router_expert_stride + j % g * n.in_features;
  }

  // x W^T, q = x R^T, or both, by panels of x.
  void multiply_packed_x() {
    const int64_t panels = (tokens + kPanelWidth<X> - 1) / kPanelWidth<X>, pieces = (n.in_features + kPanelDepth - 1) / kPanelDepth;
    const Buffer<R> x_panels(panels * panel_size());
    parallel(parallel_for, panels * pieces, kPanelWidth<X> * kPanelDepth, [&](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) {
        const int64_t t0 = item / pieces * kPanelWidth<X>, d = item % pieces * kPanelDepth, width = width_from(t0);
        const X* row[kPanelWidth<X>];
        for (int64_t t = 0; t < width; ++t) row[t] = x[t0 + t] + d;
        R* panel = x_panels.get() + item / pieces * panel_size();
        pack_x<X>(row, width, std::min(kPanelDepth, n.in_features - d), column_of_panel(panel, width, d));
      }
    });
    const auto weight_row = [&](int64_t j) { return static_cast<const T*>(p.weight) + j * n.in_features; };
    const auto rows_of_router = [&](int64_t j) { return router_row(j); };
    const auto blocks_of = [](int64_t rows) { return (rows + kRowsAtOnce - 1) / kRowsAtOnce; };
    const int64_t of_weight = packs_x_for_base ? blocks_of(n.out_features) : 0, of_router = packs_x_for_router ? blocks_of(q_columns()) : 0;
    parallel(parallel_for, of_weight + of_router, kRowsAtOnce * tokens * n.in_features, [&](int64_t from, int64_t to) {
      const RowScratch scratch;
      for (int64_t block = from; block < to; ++block)
        if (block < of_weight)
          multiply_rows(x_panels.get(), block, n.out_features, weight_row, base_sums(), base_stride(), scratch);
        else
          multiply_rows(x_panels.get(), block - of_weight, q_columns(), rows_of_router, q.get(), q_columns(), scratch);
    });
  }

  int64_t panel_size() const { return packed_depth<X>(n.in_features) * kPanelWidth<X>; }
  int64_t width_from(int64_t t0) const { return std::min(kPanelWidth<X>, tokens - t0); }
  template <class At> At* column_of_panel(At* panel, int64_t width, int64_t d) const {
    return panel + d / (elements_of<X>(width) * Packed<X>::numbers) * panel_vectors<X>(width) * kLanes<R>;
  }

  // Sums of a block of rows and a panel of x, and rows of 16-bit numbers as real numbers.
  static constexpr bool kConvertsRows = !std::is_same<T, X>::value;
  struct RowScratch {
    Buffer<R> sums{kRowsAtOnce * kPanelWidth<X>}, later{kRowsAtOnce * kPanelWidth<X>}, turned{kRowsAtOnce * kPanelWidth<X>};
    Buffer<R> reals{kConvertsRows ? kRowsAtOnce * kPanelDepth : 0};
  };

  // out[t][j] = the product of x[t] with row j, for the rows of a block.
  template <class RowAt>
  void multiply_rows(const R* x_panels, int64_t block, int64_t row_count, const RowAt& row_at, R* out, int64_t out_stride,
                     const RowScratch& scratch) {
    const int64_t j0 = block * kRowsAtOnce, rows = std::min(kRowsAtOnce, row_count - j0);
    const auto row = [&](int64_t c) { return row_at(std::min(j0 + c, row_count - 1)); };
    for (int64_t t0 = 0; t0 < tokens; t0 += kPanelWidth<X>) {
      const int64_t width = width_from(t0), stride = panel_vectors<X>(width) * kLanes<R>;
      const R* panel = x_panels + t0 / kPanelWidth<X> * panel_size();
      R* sums = scratch.sums.get();
      // Sums over more columns are added to one another, not continued: their rounding errors are smaller.
      for (int64_t d = 0; d < n.in_features; d += kDepth) {
        const int64_t depth = std::min(kDepth, n.in_features - d);
        R* part = d == 0 ? sums : scratch.later.get();
        multiply_piece(rows, [&](int64_t c) { return row(c) + d; }, column_of_panel(panel, width, d), width, depth, part,
                       scratch.reals.get());
        for (int64_t i = 0; i < rows * stride && d > 0; ++i) sums[i] += part[i];
      }
      const R* sums_of_row[kRowsAtOnce];
      for (int64_t c = 0; c < rows; ++c) sums_of_row[c] = sums + c * stride;
      R* turned = scratch.turned.get();
      const int64_t elements = elements_of<X>(width), apart = panel_vectors<R>(rows) * kLanes<R>;
      pack<R>(sums_of_row, rows, width * elements, turned);
      for (int64_t t = 0; t < width; ++t, turned += elements * apart) {
        for (int64_t c = 0; c < rows && elements == 2; ++c) turned[c] += turned[apart + c];
        std::copy_n(turned, rows, out + (t0 + t) * out_stride + j0);
      }
    }
  }

  // sums = `depth` columns of a block of rows times a panel; rows of 16-bit numbers are converted in `reals`.
  template <class RowAt>
  void multiply_piece(int64_t rows, const RowAt& row, const R* panel, int64_t width, int64_t depth, R* sums, R* reals) {
    if constexpr (!kConvertsRows) {
      row_product<X>(rows, row, panel, width, depth, sums, false);
    } else {
      for (int64_t d = 0; d < depth; d += kPanelDepth) {
        const int64_t count = std::min(kPanelDepth, depth - d);
        for (int64_t c = 0; c < rows; ++c) convert(row(c) + d, count, reals + c * kPanelDepth);
        row_product<X>(rows, [&](int64_t c) { return reals + std::min(c, rows - 1) * kPanelDepth; },
                       column_of_panel(panel, width, d), width, count, sums, d > 0);
      }
    }
  }

  // Tokens that a panel is multiplied with: as many as leave all threads enough to do, since a panel is packed once for them.
  int64_t tokens_of_piece(int64_t panels) const {
    const int64_t pieces = std::max<int64_t>(1, 2 * threads / std::max<int64_t>(1, panels));
    return std::min(tokens, std::max(kEntriesAtOnce, (tokens + pieces - 1) / pieces));
  }

  // q = x R^T by panels of rows, which may belong to several experts.
  void run_packed_router_product() {
    constexpr int64_t kWidth = kPanelWidth<X>;
    const int64_t rows = q_columns(), panels = (rows + kWidth - 1) / kWidth;
    const int64_t most = std::min(tokens_of_piece(panels), kTiles<X> ? 2 * kTokensOfGroup : tokens), pieces = (tokens + most - 1) / most;
    parallel(parallel_for, panels * pieces, kWidth * most * n.in_features, [&](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) {
        const int64_t j0 = item % panels * kWidth, t0 = item / panels * most;
        const auto row_at = [&](int64_t c) { return router_row(std::min(j0 + c, rows - 1)); };
        packed_product(std::min(kWidth, rows - j0), row_at, std::min(most, tokens - t0), [&](int64_t t) { return x[t0 + t]; },
                       [&](int64_t t) { return &q[(t0 + t) * rows + j0]; });
      }
    });
  }

  // out[e] = the product of x[e] with `width` rows, at most those of a panel. row_at is called for rows after them too.
  template <class RowAt, class XAt, class OutAt>
  void packed_product(int64_t width, const RowAt& row_at, int64_t count, const XAt& x_at, const OutAt& out_at) {
    const auto lay = [&](int64_t d, int64_t length, R* panel) {
      const T* row[kPanelWidth<X>];
      for (int64_t c = 0; c < width; ++c) row[c] = row_at(c) + d;
      pack<X>(row, width, length, panel, kNear<T>);
    };
    // The columns from d on, to be packed next, or past them the first ones of the rows of the next panel.
    const auto prefetch = [&](int64_t d, int64_t from, int64_t to) {
      const bool is_past = d >= n.in_features;
      const int64_t next = is_past ? width : 0, begin = is_past ? 0 : d, end = std::min(begin + kPanelDepth, n.in_features);
      for (int64_t c = from * width / count; c < to * width / count; ++c)
        for (int64_t k = begin; k < end; k += kLine<T>) __builtin_prefetch(row_at(next + c) + k, 0, kSecondLevel);
    };
    product_by_panels<X>(n.in_features, width, count, lay, [&](int64_t e, int64_t d) { return x_at(e) + d; }, out_at, prefetch);
  }

  void add_shrink_products() {
    for (int64_t v = 0; v < experts; ++v)
      add_products(static_cast<const T*>(p.vh) + (v * n.vh_rows + known_rows(v)) * n.in_features, rank[v] - known_rows(v),
                   entries.data() + first[v], first[v + 1] - first[v], &h[known_rows(v)], n.rank_of_expert);
  }

  void choose_experts() {
    const int64_t m = n.num_experts_per_tok;
    parallel(parallel_for, tokens, 4 * q_columns() + experts * m, [&](int64_t from, int64_t to) {
      std::vector<R> scores(n.num_experts);
      for (int64_t row = from * num_parts; row < to * num_parts; ++row) {
        const int64_t part = row % num_parts;
        if (!has_experts(part)) {
          std::fill_n(weights + row * m, m, R(0));
          std::fill_n(ids + row * m, m, -1);
          continue;
        }
        const R* own = &q[row / num_parts * q_columns() + first_q[part] * n.rank_of_router];
        for (int64_t i = 0; i < n.num_experts; ++i) scores[i] = norm(own + i * n.rank_of_router, n.rank_of_router);
        if (p.energies) {
          R* energies = static_cast<R*>(p.energies) + (begin * num_parts + row) * n.num_experts;
          for (int64_t i = 0; i < n.num_experts; ++i) energies[i] = scores[i] * scores[i];
          continue;
        }
        choose(scores.data(), n.num_experts, m, weights + row * m, ids + row * m);
      }
    });
  }

  // z = w s h, in the order of the experts; the rows that the router has computed are also rows of h.
  void scale() {
    const int64_t r = n.rank_of_expert;
    parallel(parallel_for, first[experts], 2 * r, [&](int64_t from, int64_t to) {
      for (int64_t j = from; j < to; ++j) {
        const int64_t e = entries[j].place, v = expert_of(e);
        if (rank[v] == 0) continue;
        R* he = &h[e * r];
        if (const int64_t known = known_rows(v)) {
          const int64_t at = first_q[v / n.num_experts] + ids[e];
          std::copy_n(&q[e / slots * q_columns() + at * n.rank_of_router], known, he);
        }
        if (p.h) std::copy_n(he, rank[v], static_cast<R*>(p.h) + (begin * slots + e) * r);
        const R* s = static_cast<const R*>(p.s) + v * r;
        for (int64_t k = 0; k < rank[v]; ++k) z[j * r + k] = from_real<X>(he[k] * (weights[e] * s[k]));
      }
    });
  }

  // Every block of outputs begins with x W^T and accumulates all experts: in y where y holds sums of R, else in `buffer`, to
  // be rounded once.
  void expand() {
    if constexpr (kTiles<X>)
      if (packs_weight) return expand_groups();
    constexpr int64_t kWidth = kPanelWidth<X>;
    const int64_t r = n.rank_of_expert, count = int64_t(blocks.size());
    const int64_t most = tokens_of_piece(count), pieces = (tokens + most - 1) / most;
    parallel(parallel_for, count * pieces, kWidth * most * n.num_experts_per_tok * r, [&](int64_t from, int64_t to) {
      const Buffer<R> buffer(most * kWidth), u_panel(packed_depth<X>(std::min(r, kPanelDepth)) * kWidth);
      for (int64_t item = from; item < to; ++item) {
        const auto [part, o, width] = blocks[item % count];
        if (!p.weight && !has_experts(part)) continue;
        const int64_t t0 = item / count * most, t1 = std::min(tokens, t0 + most);
        T* y = static_cast<T*>(p.y) + begin * p.y_stride + o;
        const bool in_y = kInPlace && width == panel_vectors<X>(width) * kLanes<R>;
        const Strided<R> sums = in_y ? Strided<R>{reinterpret_cast<R*>(y + t0 * p.y_stride), p.y_stride} : Strided<R>{buffer.get(), kWidth};
        if (packs_weight) {
          const T* rows = static_cast<const T*>(p.weight) + o * n.in_features;
          packed_product(width, [&](int64_t c) { return rows + c * n.in_features; }, t1 - t0, [&](int64_t t) { return x[t0 + t]; },
                         [&](int64_t t) { return sums(t); });
        } else if (!in_y) {
          for (int64_t t = t0; t < t1; ++t) begin_sums(t, o, width, y + t * p.y_stride, sums(t - t0));
        }
        finish_block(blocks[item % count], t0, t1, sums, u_panel.get(), 0);
      }
    });
  }

  // Tiles multiply so fast that reading x from beyond the second-level cache limits them: a few tokens are multiplied with
  // a group of blocks while they are in it, 256 columns at a time.
  void expand_groups() {
    constexpr int64_t kWidth = kPanelWidth<X>;
    const int64_t r = n.rank_of_expert, count = int64_t(blocks.size());
    const int64_t group = std::clamp<int64_t>(count / (2 * threads), 1, kBlocksOfGroup), groups = (count + group - 1) / group;
    const int64_t most = tokens_of_piece(groups), pieces = (tokens + most - 1) / most;
    const int64_t u_size = packed_depth<X>(r) * kWidth, x_distance = copies_x ? n.in_features : p.x_stride[0];
    parallel(parallel_for, groups * pieces, group * kWidth * most * n.in_features, [&](int64_t from, int64_t to) {
      const TilesInUse<X> in_use;
      const Buffer<R> sums(group * kTokensOfGroup * kWidth), panels(group * panel_size()), u_panels(group * n.num_experts * u_size);
      for (int64_t item = from; item < to; ++item) {
        const int64_t b0 = item % groups * group, b1 = std::min(count, b0 + group);
        const auto panel_of = [&](int64_t b, int64_t d) {
          return column_of_panel(panels.get() + (b - b0) * panel_size(), blocks[b].width, d);
        };
        const auto u_of = [&](int64_t b) { return u_panels.get() + (b - b0) * n.num_experts * u_size; };
        for (int64_t b = b0; b < b1; ++b) {
          const auto [part, o, width] = blocks[b];
          pack_rows(static_cast<const T*>(p.weight) + o * n.in_features, n.in_features, width, n.in_features, panel_of(b, 0));
          for (int64_t i = next_expert(part, -1); i < n.num_experts; i = next_expert(part, i))
            pack_rows(static_cast<const T*>(p.u) + i * p.u_stride + o * r, r, width, rank[part * n.num_experts + i], u_of(b) + i * u_size);
        }
        const int64_t end = std::min(tokens, item / groups * most + most);
        for (int64_t t0 = item / groups * most; t0 < end; t0 += kTokensOfGroup) {
          const int64_t t1 = std::min(end, t0 + kTokensOfGroup);
          const auto sums_of = [&](int64_t b) { return Strided<R>{&sums[(b - b0) * kTokensOfGroup * kWidth], kWidth}; };
          for (int64_t d = 0; d < n.in_features; d += kPanelDepth)
            for (int64_t b = b0; b < b1; ++b)
              panel_product<X>(t1 - t0, Strided<const X>{x[t0] + d, x_distance}, panel_of(b, d), blocks[b].width,
                               std::min(kPanelDepth, n.in_features - d), sums_of(b), d > 0);
          for (int64_t b = b0; b < b1; ++b) finish_block(blocks[b], t0, t1, sums_of(b), u_of(b), u_size);
        }
      }
    });
  }

  // Panels of `depth` columns of `width` rows, one row every `stride`.
  void pack_rows(const T* rows, int64_t stride, int64_t width, int64_t depth, R* panels, int64_t ahead = kNear<T>) {
    for (int64_t d = 0; d < depth; d += kPanelDepth) {
      const T* row[kPanelWidth<X>];
      for (int64_t c = 0; c < width; ++c) row[c] = rows + c * stride + d;
      pack<X>(row, width, std::min(kPanelDepth, depth - d), column_of_panel(panels, width, d), ahead);
    }
  }

  // y = sums + experts + b, for a block of outputs and the tokens t0 to t1. Each expert's u is packed, every u_size numbers, or
  // u_size is 0 and there is room for one.
  void finish_block(const Block& block, int64_t t0, int64_t t1, Strided<R> sums, R* u_panels, int64_t u_size) {
    const auto [part, o, width] = block;
    for (int64_t i = next_expert(part, -1), next; i < n.num_experts; i = next) {
      next = next_expert(part, i);
      // Prefetched: the rows of the next expert, after the last one those of the first for the next block.
      const int64_t ahead = next < n.num_experts ? (next - i) * p.u_stride
                                                 : (next_expert(part, -1) - i) * p.u_stride + width * n.rank_of_expert;
      expand_expert(part * n.num_experts + i, i, o, width, t0, t1, sums, u_panels + i * u_size, u_size > 0, ahead);
    }
    T* y = static_cast<T*>(p.y) + (begin + t0) * p.y_stride + o;
    const bool in_y = reinterpret_cast<R*>(y) == sums.data;
    R bias[kPanelWidth<X>];
    if (p.bias) convert(static_cast<const T*>(p.bias) + o, width, bias);
    for (int64_t t = t0; t < t1 && (p.bias || !in_y); ++t) {
      R* row = sums(t - t0);
      for (int64_t at = 0; at < width && !in_y; at += kLine<T>) __builtin_prefetch(y + (t - t0 + 8) * p.y_stride + at, 1);
      for (int64_t c = 0; c < width && p.bias; ++c) row[c] += bias[c];
      if (!in_y) convert(row, width, y + (t - t0) * p.y_stride);
    }
  }

  // The first expert after number i of a part that has entries; N if there is none.
  int64_t next_expert(int64_t part, int64_t i) const {
    const int64_t* of_part = first.data() + part * n.num_experts;
    for (++i; i < n.num_experts && of_part[i] == of_part[i + 1];) ++i;
    return i;
  }

  // sums = x W^T for `width` outputs from o on, with b if y holds it.
  void begin_sums(int64_t t, int64_t o, int64_t width, const T* y, R* sums) {
    if (base) {
      std::copy_n(&base[t * n.out_features + o], width, sums);
      return;
    }
    for (int64_t at = 0; at < kPanelWidth<X>; at += 64 / sizeof(T)) __builtin_prefetch(y + width + at, 1);
    convert(y, width, sums);
  }

  // Adds expert v, number i of its part, to the sums of its tokens among t0 to t1.
  void expand_expert(int64_t v, int64_t i, int64_t o, int64_t width, int64_t t0, int64_t t1, Strided<R> sums, R* u_panel,
                     bool is_packed, int64_t ahead) {
    const int64_t r = n.rank_of_expert;
    const auto end_of = [&](int64_t t) {
      return std::lower_bound(entries.data() + first[v], entries.data() + first[v + 1], t, [](Entry e, int64_t t) { return e.token < t; });
    };
    const Entry* list = end_of(t0);
    const int64_t count = end_of(t1) - list;
    if (count == 0) return;
    const auto z_at = [&](int64_t e) { return &z[(list - entries.data() + e) * r]; };
    const auto sums_at = [&](int64_t e) { return sums(list[e].token - t0); };
    const T* u = static_cast<const T*>(p.u) + i * p.u_stride + o * r;
    if (p.expert_bias) {
      const T* bias = static_cast<const T*>(p.expert_bias) + i * p.expert_bias_stride + o;
      for (int64_t e = 0; e < count; ++e)
        for (int64_t c = 0; c < width; ++c) sums_at(e)[c] += weights[list[e].place] * to_real(bias[c]);
    }
    if (is_packed || count >= kPackFrom || rank[v] <= Operand<X>::lanes) {
      for (int64_t k = 0; k < rank[v]; k += kPanelDepth) {
        const int64_t depth = std::min(kPanelDepth, rank[v] - k);
        R* panel = is_packed ? column_of_panel(u_panel, width, k) : u_panel;
        if (!is_packed) pack_rows(u + k, r, width, depth, panel, ahead);
        panel_product<X>(count, [&](int64_t e) { return z_at(e) + k; }, panel, width, depth, sums_at, true);
      }
      return;
    }
    const X* zs[kPackFrom];
    R* outs[kPackFrom];
    for (int64_t e = 0; e < count; ++e) zs[e] = z_at(e), outs[e] = sums_at(e);
    const Rows<T> rows{u, r, width};
    dots(zs, outs, count, rows, 0, rows.apart, rank[v], width * r, true);
  }

  const Forward& p;
  const Sizes& n;
  const ParallelFor parallel_for;
  const int64_t threads, num_parts, experts, slots;  // the last are P, P N, P m
  bool copies_x;                            // x is not plain rows of R
  bool packs_rows, packs_weight, packs_x_for_base, packs_x_for_router;
  std::vector<int64_t> rank, routed, first_q;  // of each expert; experts with scores; a part's first among them
  std::vector<Block> blocks;
  int64_t tokens_at_once;
  int64_t begin, tokens;   // this chunk
  R* weights = nullptr;
  int32_t* ids = nullptr;
  std::unique_ptr<X[]> x_copy, z;      // [tokens, D], w s h of the sorted entries [tokens * slots, r]
  std::unique_ptr<R[]> base, h;        // [tokens, O] unless in place, [tokens * slots, r]
  Buffer<R> q;                         // [tokens, routed, g]
  std::vector<const X*> x;
  std::vector<Entry> every_token, entries;
  std::vector<int64_t> first;
  std::vector<Product<T, R>> products;
};

#include "cpu_backward.h"

inline int64_t most_tokens(DType dtype, int64_t in_features) {
  int64_t most = 0;
  with_type(dtype, [&](auto type) { most = most_tokens_of_base<decltype(type)>(in_features); });
  return most;
}

inline void forward(DType dtype, const Forward& p, ParallelFor parallel_for, int64_t threads) {
  if (p.n.tokens > 0) with_type(dtype, [&](auto type) { Chunk<decltype(type)>(p, parallel_for, threads).run(); });
}

}  // namespace SMILE_NAMESPACE
}  // namespace smile

#undef SMILE_SHUFFLE
#undef SMILE_INLINE
#undef SMILE_NAMESPACE
#undef SMILE_VECTOR_BYTES
#undef SMILE_VECTORS
#undef SMILE_BFLOAT16_DOT
#undef SMILE_BFLOAT16_TILES
