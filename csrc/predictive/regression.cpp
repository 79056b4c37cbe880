#include "tensors.h"

namespace fastjem {

struct Regression {
  Dtype dtype;
  const void *prediction, *target;  // [N, D], rows prediction_stride and target_stride elements apart
  int64_t prediction_stride, target_stride, width;
  double beta, eps;
  bool normalize;
  void* gradient;  // [N, D], or null
  double* losses;  // [N]
};

}  // namespace fastjem

#define FASTJEM_KERNEL "predictive/regression.h"
#include "each_isa.h"

namespace fastjem {

// Returns the sum of the elements' losses.
static double regression(int dtype, uintptr_t prediction, int64_t prediction_stride, uintptr_t target,
                         int64_t target_stride, int64_t rows, int64_t width, double beta, bool normalize, double eps,
                         uintptr_t gradient, int threads) {
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
                           losses.data()};
  parallel_for(rows, 1 + 32768 / width, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(regression_rows(problem, begin, end)); });
  double total = 0;
  for (const double loss : losses) total += loss;
  return total;
}

// The same of plain tensors [..., D]; None where they aren't, or don't fit one another.
static pybind11::object regression_of_plain(pybind11::handle prediction, pybind11::handle target,
                                            pybind11::handle gradient, double beta, bool normalize, double eps,
                                            int threads) {
  Given given;
  const Plain x = given(prediction, 0);
  const Plain y = given(target, 0);
  const void* out = given.gradient_of(x, gradient);
  if (!given.good || !y.has_shape_of(x)) return pybind11::none();
  const int64_t d = x.shape[x.dims - 1];
  double total;
  {
    const pybind11::gil_scoped_release release;
    total = regression(x.dtype, address(x.data), d, address(y.data), d, x.elements / d, d, beta, normalize, eps,
                       address(out), threads);
  }
  return pybind11::float_(total);
}

void bind_regression(pybind11::module_& m) {
  m.def("regression", &regression, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("regression_of_plain", &regression_of_plain);
}

}  // namespace fastjem
