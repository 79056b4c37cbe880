// While an object of this lives, its thread computes with 0 for numbers below 1e-38 (probabilities that don't matter):
// arithmetic on subnormals takes a hundred cycles.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <xmmintrin.h>
#endif

namespace fastjem {

#if defined(__x86_64__) && defined(__GNUC__)
class FlushSubnormals {
  static constexpr unsigned flush_results = 0x8000;
  static constexpr unsigned flush_operands = 0x0040;
  const unsigned before = _mm_getcsr();

 public:
  FlushSubnormals() { _mm_setcsr(before | flush_results | flush_operands); }
  ~FlushSubnormals() { _mm_setcsr(before); }
};
#else
class FlushSubnormals {
 public:
  FlushSubnormals() {}
  ~FlushSubnormals() {}
};
#endif

}  // namespace fastjem
