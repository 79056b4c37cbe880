#include "tensors.h"

namespace fastjem {

struct CrossEntropy {
  Dtype dtype;
  const void* logits;  // [N, K], rows row_stride elements apart
  int64_t row_stride, classes;
  const int64_t* labels;  // [N]
  int64_t ignore_index;
  void* gradient;  // [N, K], or null
  double* losses;  // [N]
  double scale;    // of the gradient
};

}  // namespace fastjem

#define FASTJEM_KERNEL "supervised/cross_entropy.h"
#include "each_isa.h"

namespace fastjem {

// Returns the sum of the losses, and how many rows count. The gradient is that of the sum or, if `mean`, of their mean.
static std::pair<double, int64_t> cross_entropy(int dtype, uintptr_t logits, int64_t rows, int64_t classes,
                                                int64_t row_stride, uintptr_t labels, int64_t ignore_index,
                                                uintptr_t gradient, bool mean, int threads) {
  std::vector<double> losses(rows);
  CrossEntropy problem{
      static_cast<Dtype>(dtype), at<const void>(logits), row_stride, classes, at<const int64_t>(labels), ignore_index,
      at<void>(gradient),        losses.data(),          1};
  int64_t counted = 0;
  int64_t bad = -1;
  for (int64_t i = 0; i < rows && bad < 0; ++i) {
    const int64_t label = problem.labels[i];
    counted += label != ignore_index;
    if (label != ignore_index && (label < 0 || label >= classes)) bad = i;
  }
  if (bad >= 0) {
    throw std::invalid_argument("cross_entropy: labels must be in [0, " + std::to_string(classes) +
                                ") or ignore_index, got " + std::to_string(problem.labels[bad]) + " at row " +
                                std::to_string(bad));
  }
  if (mean && counted) problem.scale = 1.0 / counted;
  parallel_for(rows, 1 + 16384 / classes, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(cross_entropy_rows(problem, begin, end)); });
  double total = 0;
  for (const double loss : losses) total += loss;
  return {total, counted};
}

// The same of a plain tensor; None where it isn't one, or labels and gradient don't fit it.
static pybind11::object cross_entropy_of_plain(pybind11::handle logits, pybind11::handle labels,
                                               pybind11::handle gradient, int64_t ignore_index, bool mean,
                                               int threads) {
  Given given;
  const Plain x = given(logits, 2);
  const int64_t* classes = given.good ? given.labels(labels, x.shape[0]) : nullptr;
  const void* out = given.gradient_of(x, gradient);
  if (!given.good) return pybind11::none();
  std::pair<double, int64_t> found;
  {
    const pybind11::gil_scoped_release release;
    found = cross_entropy(x.dtype, address(x.data), x.shape[0], x.shape[1], x.shape[1], address(classes), ignore_index,
                          address(out), mean, threads);
  }
  return pybind11::cast(found);
}

void bind_cross_entropy(pybind11::module_& m) {
  m.def("cross_entropy", &cross_entropy, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("cross_entropy_of_plain", &cross_entropy_of_plain);
}

}  // namespace fastjem
