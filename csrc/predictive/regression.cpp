#include "tensors.h"

namespace fastjem {

struct Regression {
  Dtype dtype;
  const void *prediction, *target;  // [N, D], rows prediction_stride and target_stride elements apart
  int64_t prediction_stride, target_stride, width;
  double beta, eps;
  bool normalize;
  void* gradient;         // [N, D], or null; with `rows`, zeros, of which only those rows are written
  double* losses;         // [N]
  const int64_t* rows;    // [N], which rows of prediction, target and gradient; or null: the first N
  const double* weights;  // [N], of the rows in the sum of losses; or null
  double scale = 1;       // of the gradient
};

}  // namespace fastjem

#define FASTJEM_KERNEL "predictive/regression.h"
#include "each_isa.h"

namespace fastjem {

// Returns the sum of the elements' losses, each row's times its weight.
static double regression_rows(int dtype, uintptr_t prediction, int64_t prediction_stride, uintptr_t target,
                              int64_t target_stride, int64_t rows, int64_t width, double beta, bool normalize,
                              double eps, uintptr_t gradient, uintptr_t indices, int64_t indexed, uintptr_t weights,
                              double scale, int threads) {
  const int64_t* index = at<const int64_t>(indices);
  for (int64_t i = 0; index && i < rows; ++i) {
    if (index[i] < 0 || index[i] >= indexed) {
      throw std::invalid_argument("regression_rows: rows must be in [0, " + std::to_string(indexed) + "), got " +
                                  std::to_string(index[i]) + " at " + std::to_string(i));
    }
  }
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
                           index,
                           at<const double>(weights),
                           scale};
  parallel_for(rows, 1 + 32768 / width, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(regression_rows(problem, begin, end)); });
  double total = 0;
  for (const double loss : losses) total += loss;
  return total;
}

static double regression(int dtype, uintptr_t prediction, int64_t prediction_stride, uintptr_t target,
                         int64_t target_stride, int64_t rows, int64_t width, double beta, bool normalize, double eps,
                         uintptr_t gradient, double scale, int threads) {
  return regression_rows(dtype, prediction, prediction_stride, target, target_stride, rows, width, beta, normalize, eps,
                         gradient, 0, 0, 0, scale, threads);
}

// The same of plain tensors [..., D]; None where they aren't, or don't fit one another.
static pybind11::object regression_of_plain(pybind11::handle prediction, pybind11::handle target,
                                            pybind11::handle gradient, double beta, bool normalize, double eps,
                                            double scale, int threads) {
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
                       address(out), scale, threads);
  }
  return pybind11::float_(total);
}

void bind_regression(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> release;
  m.def("regression", &regression, release);
  m.def("regression_of_plain", &regression_of_plain);
  m.def("regression_rows", &regression_rows, release);
}

}  // namespace fastjem
