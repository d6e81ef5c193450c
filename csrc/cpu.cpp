// The CPU operator: chooses, once, the widest vectors that this processor has. The algorithm is in cpu_kernels.h.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "smile.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SMILE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SMILE_TARGET(isa) SMILE_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SMILE_END_TARGET SMILE_PRAGMA(clang attribute pop)
#else
#define SMILE_TARGET(isa) SMILE_PRAGMA(GCC push_options) SMILE_PRAGMA(GCC target(isa))
#define SMILE_END_TARGET SMILE_PRAGMA(GCC pop_options)
#endif

#define SMILE_NAMESPACE avx512_bfloat16
#define SMILE_VECTOR_BYTES 64
#define SMILE_VECTORS 32
#define SMILE_BFLOAT16_DOT 1
SMILE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#include "cpu_kernels.h"
SMILE_END_TARGET

#define SMILE_NAMESPACE avx512
#define SMILE_VECTOR_BYTES 64
#define SMILE_VECTORS 32
#define SMILE_BFLOAT16_DOT 0
SMILE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu_kernels.h"
SMILE_END_TARGET

#define SMILE_NAMESPACE avx2
#define SMILE_VECTOR_BYTES 32
#define SMILE_VECTORS 16
#define SMILE_BFLOAT16_DOT 0
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
#include "cpu_kernels.h"

namespace smile {

using ForwardFunction = void (*)(DType, const Forward&, ParallelFor);

// ATEN_CPU_CAPABILITY=avx2 or default asks for narrower vectors than the processor has, as it does for PyTorch's kernels.
static ForwardFunction widest() {
#if defined(__x86_64__)
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool avx2_only = limit && !std::strcmp(limit, "avx2"), neither = limit && !std::strcmp(limit, "default");
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq");
  if (has_avx512 && !avx2_only && !neither)
    return __builtin_cpu_supports("avx512bf16") ? avx512_bfloat16::forward : avx512::forward;
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_avx2 && !neither) return avx2::forward;
#endif
  return baseline::forward;
}

void cpu_forward(DType dtype, const Forward& p, ParallelFor parallel_for) {
  static const ForwardFunction forward = widest();
  forward(dtype, p, parallel_for);
}

}  // namespace smile
