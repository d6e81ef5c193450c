// The CPU operators: chooses, once, the widest vectors that this processor has. The algorithms are in cpu_kernels.h,
// cpu_backward.h and cpu_products.h.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "choose.h"
#include "smile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 11)
#define SMILE_HAS_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define SMILE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SMILE_TARGET(isa) SMILE_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SMILE_END_TARGET SMILE_PRAGMA(clang attribute pop)
#else
#define SMILE_TARGET(isa) SMILE_PRAGMA(GCC push_options) SMILE_PRAGMA(GCC target(isa))
#define SMILE_END_TARGET SMILE_PRAGMA(GCC pop_options)
#endif

#if defined(SMILE_HAS_AMX)
#define SMILE_NAMESPACE amx_bfloat16
#define SMILE_VECTOR_BYTES 64
#define SMILE_VECTORS 32
#define SMILE_BFLOAT16_DOT 1
#define SMILE_BFLOAT16_TILES 1
SMILE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#include "cpu_kernels.h"
SMILE_END_TARGET
#endif

#define SMILE_NAMESPACE avx512_bfloat16
#define SMILE_VECTOR_BYTES 64
#define SMILE_VECTORS 32
#define SMILE_BFLOAT16_DOT 1
#define SMILE_BFLOAT16_TILES 0
SMILE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#include "cpu_kernels.h"
SMILE_END_TARGET

#define SMILE_NAMESPACE avx512
#define SMILE_VECTOR_BYTES 64
#define SMILE_VECTORS 32
#define SMILE_BFLOAT16_DOT 0
#define SMILE_BFLOAT16_TILES 0
SMILE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu_kernels.h"
SMILE_END_TARGET

#define SMILE_NAMESPACE avx2
#define SMILE_VECTOR_BYTES 32
#define SMILE_VECTORS 16
#define SMILE_BFLOAT16_DOT 0
#define SMILE_BFLOAT16_TILES 0
SMILE_TARGET("avx2,fma,f16c")
#include "cpu_kernels.h"
SMILE_END_TARGET
#endif

#define SMILE_NAMESPACE baseline
#define SMILE_VECTOR_BYTES 16
#if defined(__x86_64__)
#define SMILE_VECTORS 16
#else
#define SMILE_VECTORS 32
#endif
#define SMILE_BFLOAT16_DOT 0
#define SMILE_BFLOAT16_TILES 0
#include "cpu_kernels.h"

namespace smile {

// The kernels of one instruction set.
struct Kernels {
  int64_t (*most_tokens)(DType, int64_t);
  void (*forward)(DType, const Forward&, ParallelFor, int64_t);
  void (*backward_of_apply)(DType, const Backward&, ParallelFor);
  void (*backward_of_route)(DType, const RouteBackward&, ParallelFor);
};
#define SMILE_KERNELS(isa) Kernels{isa::most_tokens, isa::forward, isa::backward_of_apply, isa::backward_of_route}

#if defined(SMILE_HAS_AMX)
// The processor has bfloat16 tiles, and the kernel lets this process use them.
static bool has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// ATEN_CPU_CAPABILITY=avx2 or default selects narrower vectors than the processor has, as for PyTorch's kernels; avx512
// selects the kernels without tiles.
static Kernels widest() {
#if defined(__x86_64__)
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool avx2_only = limit && !std::strcmp(limit, "avx2"), neither = limit && !std::strcmp(limit, "default");
  const bool avx512_only = limit && !std::strcmp(limit, "avx512");
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq");
#if defined(SMILE_HAS_AMX)
  if (has_avx512 && !avx2_only && !neither && !avx512_only && __builtin_cpu_supports("avx512bf16") && has_tiles())
    return SMILE_KERNELS(amx_bfloat16);
#endif
  if (has_avx512 && !avx2_only && !neither)
    return __builtin_cpu_supports("avx512bf16") ? SMILE_KERNELS(avx512_bfloat16) : SMILE_KERNELS(avx512);
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_avx2 && !neither) return SMILE_KERNELS(avx2);
#endif
  return SMILE_KERNELS(baseline);
}

static const Kernels& kernels() {
  static const Kernels chosen = widest();
  return chosen;
}

bool cpu_computes_base(DType dtype, const Sizes& n) { return n.tokens <= kernels().most_tokens(dtype, n.in_features); }

void cpu_forward(DType dtype, const Forward& p, ParallelFor parallel_for, int64_t threads) {
  kernels().forward(dtype, p, parallel_for, threads);
}

void cpu_apply_backward(DType dtype, const Backward& p, ParallelFor parallel_for) {
  kernels().backward_of_apply(dtype, p, parallel_for);
}

void cpu_route_backward(DType dtype, const RouteBackward& p, ParallelFor parallel_for) {
  kernels().backward_of_route(dtype, p, parallel_for);
}

}  // namespace smile
