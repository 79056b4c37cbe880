#include "common.h"
#include "huge_pages.h"

namespace fastjem {

static Isa best() {
#if defined(__x86_64__) && defined(__GNUC__)
  const bool wide_vectors = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide_vectors) return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

static Isa chosen = best();

Isa isa() { return chosen; }

static void use_isa(int wanted) {
  if (wanted < 0 || wanted > static_cast<int>(best())) {
    throw std::invalid_argument("use_isa: this processor has instruction sets 0 to " +
                                std::to_string(static_cast<int>(best())) + ", got " + std::to_string(wanted));
  }
  chosen = static_cast<Isa>(wanted);
}

#define OPERATOR(name) void bind_##name(pybind11::module_&);
#include "operators.h"
#undef OPERATOR

}  // namespace fastjem

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of fastjem. Addresses are trusted: call them through the launchers in fastjem.kernels.";
  m.def(
      "isa", [] { return static_cast<int>(fastjem::isa()); },
      "The instruction set in use: 0 baseline, 1 AVX2, 2 AVX-512.");
  m.def("use_isa", &fastjem::use_isa, "Use a lesser instruction set: for tests.");
  m.def(
      "prefer_huge_pages",
      [](uintptr_t address, int64_t bytes) { fastjem::prefer_huge_pages(fastjem::at<void>(address), bytes); },
      "For memory that is about to be written for the first time.");
#define OPERATOR(name) fastjem::bind_##name(m);
#include "operators.h"
#undef OPERATOR
}
