// Compiles FASTJEM_KERNEL, a header of plain loops that the compiler vectorises, once for each instruction set, in a
// namespace of its own: fastjem::baseline, fastjem::avx2, fastjem::avx512. FASTJEM_BEST(call) runs the best one.
//
// Standard headers have to be included before this: their inline functions must not be compiled for one instruction
// set and then linked into another's code. So kernel headers include nothing but other kernel headers.

namespace fastjem::baseline {
#include "elements.h"
#include FASTJEM_KERNEL
}  // namespace fastjem::baseline

#if defined(__x86_64__) && defined(__GNUC__)

#if defined(__clang__)
#define FASTJEM_PUSH_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define FASTJEM_PUSH_AVX512 \
  _Pragma(                  \
      "clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma\"))), apply_to = function)")
#define FASTJEM_POP _Pragma("clang attribute pop")
#else
#define FASTJEM_PUSH_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define FASTJEM_PUSH_AVX512   \
  _Pragma("GCC push_options") \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512\")")
#define FASTJEM_POP _Pragma("GCC pop_options")
#endif

FASTJEM_PUSH_AVX2
namespace fastjem::avx2 {
#include "elements.h"
#include FASTJEM_KERNEL
}  // namespace fastjem::avx2
FASTJEM_POP

FASTJEM_PUSH_AVX512
namespace fastjem::avx512 {
#include "elements.h"
#include FASTJEM_KERNEL
}  // namespace fastjem::avx512
FASTJEM_POP

#define FASTJEM_BEST(call)                                 \
  do {                                                     \
    if (::fastjem::isa() == ::fastjem::Isa::avx512) {      \
      ::fastjem::avx512::call;                             \
    } else if (::fastjem::isa() == ::fastjem::Isa::avx2) { \
      ::fastjem::avx2::call;                               \
    } else {                                               \
      ::fastjem::baseline::call;                           \
    }                                                      \
  } while (0)

#else
#define FASTJEM_BEST(call) ::fastjem::baseline::call
#endif
