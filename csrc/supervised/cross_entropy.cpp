#include "tensors.h"

namespace fastjem {

struct CrossEntropy {
  Dtype dtype;
  const void* logits;  // [N, K], rows row_stride elements apart
  int64_t row_stride, classes;
  const int64_t* labels;  // [N]
  int64_t ignore_index;
  void* gradient;         // [N, K], or null
  double* losses;         // [N]
  double scale;           // of the gradient
  const double* weights;  // [N], instead of the scale, or null; rows of weight 0 aren't looked at
  double smoothing;       // what is uniform of the target

  bool counts(int64_t row) const { return labels[row] != ignore_index && (!weights || weights[row] != 0); }
};

}  // namespace fastjem

#define FASTJEM_KERNEL "supervised/cross_entropy.h"
#include "each_isa.h"

namespace fastjem {

// How many rows count, whose labels are classes.
static int64_t count_of(const CrossEntropy& problem, int64_t rows) {
  int64_t counted = 0;
  int64_t bad = -1;
  for (int64_t i = 0; i < rows && bad < 0; ++i) {
    if (!problem.counts(i)) continue;
    ++counted;
    if (problem.labels[i] < 0 || problem.labels[i] >= problem.classes) bad = i;
  }
  if (bad >= 0) {
    const std::string op = problem.weights ? "cross_entropy_rows" : "cross_entropy";
    throw std::invalid_argument(op + ": labels must be in [0, " + std::to_string(problem.classes) +
                                ") or ignore_index, got " + std::to_string(problem.labels[bad]) + " at row " +
                                std::to_string(bad));
  }
  return counted;
}

static void run(const CrossEntropy& problem, int64_t rows, int threads) {
  parallel_for(rows, 1 + 16384 / problem.classes, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(cross_entropy_rows(problem, begin, end)); });
}

// Returns the sum of the losses, and how many rows count. The gradient is that of the sum or, if `mean`, of their mean.
static std::pair<double, int64_t> cross_entropy(int dtype, uintptr_t logits, int64_t rows, int64_t classes,
                                                int64_t row_stride, uintptr_t labels, int64_t ignore_index,
                                                uintptr_t gradient, bool mean, int threads) {
  std::vector<double> losses(rows);
  CrossEntropy problem{static_cast<Dtype>(dtype),
                       at<const void>(logits),
                       row_stride,
                       classes,
                       at<const int64_t>(labels),
                       ignore_index,
                       at<void>(gradient),
                       losses.data(),
                       1,
                       nullptr,
                       0};
  const int64_t counted = count_of(problem, rows);
  if (mean && counted) problem.scale = 1.0 / counted;
  run(problem, rows, threads);
  double total = 0;
  for (const double loss : losses) total += loss;
  return {total, counted};
}

// The loss of each row, and the gradient of their sum, weighted where there are weights.
static void cross_entropy_of_rows(int dtype, uintptr_t logits, int64_t rows, int64_t classes, int64_t row_stride,
                                  uintptr_t labels, uintptr_t weights, double smoothing, int64_t ignore_index,
                                  uintptr_t gradient, uintptr_t losses, int threads) {
  const CrossEntropy problem{static_cast<Dtype>(dtype),
                             at<const void>(logits),
                             row_stride,
                             classes,
                             at<const int64_t>(labels),
                             ignore_index,
                             at<void>(gradient),
                             at<double>(losses),
                             1,
                             at<const double>(weights),
                             smoothing};
  count_of(problem, rows);
  run(problem, rows, threads);
}

// `cross_entropy` of a plain tensor; None where it isn't one, or labels and gradient don't fit it.
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
  m.def("cross_entropy_rows", &cross_entropy_of_rows, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("cross_entropy_of_plain", &cross_entropy_of_plain);
}

}  // namespace fastjem
