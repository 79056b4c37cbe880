#include "common.h"

namespace fastjem {

struct NegativeCosine {
  Dtype dtype;
  const void *p, *z;  // [N, D], rows p_stride and z_stride elements apart
  int64_t p_stride, z_stride, width;
  double eps;
  void *p_gradient, *z_gradient;  // [N, D] each, or null
  double* losses;                 // [N]
  double scale;                   // of the gradients
};

}  // namespace fastjem

#define FASTJEM_KERNEL "predictive/negative_cosine.h"
#include "each_isa.h"

namespace fastjem {

// Returns the sum of the rows' losses.
static double negative_cosine(int dtype, uintptr_t p, int64_t p_stride, uintptr_t z, int64_t z_stride, int64_t rows,
                              int64_t width, double eps, uintptr_t p_gradient, uintptr_t z_gradient, double scale,
                              int threads) {
  std::vector<double> losses(rows);
  const NegativeCosine problem{
      static_cast<Dtype>(dtype), at<const void>(p),    at<const void>(z), p_stride, z_stride, width, eps,
      at<void>(p_gradient),      at<void>(z_gradient), losses.data(),     scale};
  parallel_for(rows, 1 + 65536 / width, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(negative_cosine_rows(problem, begin, end)); });
  double total = 0;
  for (const double loss : losses) total += loss;
  return total;
}

void bind_negative_cosine(pybind11::module_& m) {
  m.def("negative_cosine", &negative_cosine, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
