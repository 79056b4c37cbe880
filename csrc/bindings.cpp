#include "common.h"

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

void bind_augment(pybind11::module_&);
void bind_characteristic(pybind11::module_&);
void bind_covariance(pybind11::module_&);
void bind_crop_resize(pybind11::module_&);
void bind_cross_entropy(pybind11::module_&);
void bind_ema_update(pybind11::module_&);
void bind_negative_cosine(pybind11::module_&);
void bind_regression(pybind11::module_&);
void bind_rescale(pybind11::module_&);
void bind_similarity(pybind11::module_&);
void bind_prototype_cross_entropy(pybind11::module_&);
void bind_prototype_head(pybind11::module_&);
void bind_sinkhorn(pybind11::module_&);
void bind_softmax_slope(pybind11::module_&);

}  // namespace fastjem

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of fastjem. Addresses come unchecked: call them through fastjem.kernels.cpu.";
  m.def("isa", [] { return static_cast<int>(fastjem::isa()); }, "The instruction set in use: 0 baseline, 1 AVX2, 2 AVX-512.");
  m.def("use_isa", &fastjem::use_isa, "Use a lesser instruction set: for tests.");
  fastjem::bind_augment(m);
  fastjem::bind_characteristic(m);
  fastjem::bind_covariance(m);
  fastjem::bind_crop_resize(m);
  fastjem::bind_cross_entropy(m);
  fastjem::bind_ema_update(m);
  fastjem::bind_negative_cosine(m);
  fastjem::bind_regression(m);
  fastjem::bind_rescale(m);
  fastjem::bind_similarity(m);
  fastjem::bind_prototype_cross_entropy(m);
  fastjem::bind_prototype_head(m);
  fastjem::bind_sinkhorn(m);
  fastjem::bind_softmax_slope(m);
}
