// What every operator's binding needs: dtype codes, threads, the choice of instruction set. No torch header: tensors
// come as addresses, which nothing here checks. Shapes, dtypes, devices and that there is memory at all are checked by
// kernels/guard.py, layouts are seen to by the launchers in kernels/FAMILY/cpu.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// A loop around a call is not vectorised, unless the call is inlined; and some loops GCC 12 vectorises only in a
// function of their own.
#if defined(__GNUC__)
#define FASTJEM_INLINE inline __attribute__((always_inline))
#define FASTJEM_NOINLINE __attribute__((noinline))
#else
#define FASTJEM_INLINE inline
#define FASTJEM_NOINLINE
#endif

namespace fastjem {

enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };  // kernels/native.py: CODES

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

Isa isa();  // the best that the processor has, or what a test chose

// Python hands over a tensor as its address; 0 is a tensor that isn't there, a null pointer.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Calls f(begin, end) over [0, n) in at most `threads` contiguous parts. Each part has at least `grain` elements, so
// that it is worth a thread; if n itself is smaller, there is one part. Parts never share an output, and what is summed
// over parts is added afterwards in order: the bits don't depend on which thread was first.
template <class F>
void parallel_for(int64_t n, int64_t grain, int threads, F&& f) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(1, grain)));
  if (parts == 1) return f(int64_t{0}, n);
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) f(n * part / parts, n * (part + 1) / parts);
}

}  // namespace fastjem
