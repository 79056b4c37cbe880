// Probabilities below 1e-38 as 0 while an object of this lives, in its thread: arithmetic on subnormals takes a hundred
// cycles.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <xmmintrin.h>
#endif

namespace fastjem {

#if defined(__x86_64__) && defined(__GNUC__)
class FlushSubnormals {
  const unsigned before = _mm_getcsr();

 public:
  FlushSubnormals() { _mm_setcsr(before | 0x8040); }  // results and operands
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
