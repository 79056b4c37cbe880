#include "common.h"

namespace fastjem {

struct Regression {
  Dtype dtype;
  const void *prediction, *target;  // [N, D], rows prediction_stride and target_stride elements apart
  int64_t prediction_stride, target_stride, width;
  double beta, eps;
  bool normalize;
  void* gradient;  // [N, D], or null
  double* losses;  // [N]
  double scale;    // of the gradient
};

}  // namespace fastjem

#define FASTJEM_KERNEL "predictive/regression.h"
#include "each_isa.h"

namespace fastjem {

// Returns the sum of the elements' losses.
static double regression(int dtype, uintptr_t prediction, int64_t prediction_stride, uintptr_t target,
                         int64_t target_stride, int64_t rows, int64_t width, double beta, bool normalize, double eps,
                         uintptr_t gradient, double scale, int threads) {
  std::vector<double> losses(rows);
  const Regression problem{static_cast<Dtype>(dtype),
                           at<const void>(prediction),
                           at<const void>(target),
                           prediction_stride,
                           target_stride,
                           width,
                           beta,
                           eps,
                           normalize,
                           at<void>(gradient),
                           losses.data(),
                           scale};
  parallel_for(rows, 1 + 32768 / width, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(regression_rows(problem, begin, end)); });
  double total = 0;
  for (const double loss : losses) total += loss;
  return total;
}

void bind_regression(pybind11::module_& m) {
  m.def("regression", &regression, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
