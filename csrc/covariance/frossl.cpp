#include "covariance/columns.h"
#include "tensors.h"

namespace fastjem {

// Wide matrices (float, double for float64) are [views, rows, width] and contiguous.
struct Frossl {
  Dtype dtype;
  std::vector<const void*> views;  // [rows, width] each, dense
  int64_t rows, width;
  void* columns;                   // wide: the views' columns at unit length
  double* divisors;                // [views, width]: what they were divided by
  const void* product;             // wide: the smaller Gram matrix times the columns
  std::vector<double> of_product;  // [views]: the product's factor in the gradient
  double of_centred;               // that of the columns less their mean over views
  std::vector<void*> gradients;    // as the views, or null
  double* apart;                   // [width]: squared distances of the views from their mean
};

}  // namespace fastjem

#define FASTJEM_KERNEL "covariance/frossl.h"
#include "each_isa.h"

namespace fastjem {

namespace py = pybind11;

static bool read(const py::list& views, Frossl& p) {
  Given given;
  for (const py::handle x : views) {
    const Plain view = given(x, 2);
    if (!given.good) return false;
    if (p.views.empty()) {
      p.dtype = static_cast<Dtype>(view.dtype);
      p.rows = view.shape[0];
      p.width = view.shape[1];
    }
    if (view.shape[0] != p.rows || view.shape[1] != p.width) return false;
    p.views.push_back(view.data);
  }
  return true;
}

// Fills `columns` and `divisors` for plain views of one shape and dtype; false for others.
static bool frossl_columns(const py::list& views, uintptr_t columns, uintptr_t divisors, int threads) {
  Frossl p{};
  if (!read(views, p)) return false;
  p.columns = at<void>(columns);
  p.divisors = at<double>(divisors);
  const py::gil_scoped_release release;
  for_columns(p.rows, p.width, threads,
              [&](int64_t begin, int64_t end) { FASTJEM_BEST(frossl_columns(p, begin, end)); });
  return true;
}

template <class W>
static void squares_and_trace(const W* gram, int64_t side, double& squares, double& trace) {
  for (int64_t i = 0; i < side; ++i) {
    FASTJEM_BEST(add_squares(gram + i * side, side, &squares));
    trace += gram[i * (side + 1)];
  }
}

// The loss, for views that `frossl_columns` has taken. gram: [views, side, side] wide. Gradients come in the shape and
// dtype of the views, or as 0.
static double frossl(const py::list& views, uintptr_t columns, uintptr_t divisors, uintptr_t gram, int64_t side,
                     uintptr_t product, double invariance, double scale, const std::vector<uintptr_t>& gradients,
                     int threads) {
  Frossl p{};
  if (!read(views, p)) throw std::invalid_argument("frossl: views must be plain");
  const int64_t count = static_cast<int64_t>(p.views.size());
  p.columns = at<void>(columns);
  p.divisors = at<double>(divisors);
  p.product = at<const void>(product);
  const py::gil_scoped_release release;
  double loss = 0;
  for (int64_t v = 0; v < count; ++v) {
    double squares = 0;
    double trace = 0;
    if (p.dtype == Dtype::float64) {
      squares_and_trace(at<const double>(gram) + v * side * side, side, squares, trace);
    } else {
      squares_and_trace(at<const float>(gram) + v * side * side, side, squares, trace);
    }
    // The trace is the width (columns have length 1) but for columns of zeros: a constant, as far as gradients go.
    loss += std::log(squares) - 2 * std::log(trace);
    p.of_product.push_back(4 / squares * scale);
    p.gradients.push_back(at<void>(gradients[v]));
  }
  p.of_centred = 2.0 * count / p.rows * invariance * scale;
  std::vector<double> apart(p.width);
  p.apart = apart.data();
  for_columns(p.rows, p.width, threads, [&](int64_t begin, int64_t end) { FASTJEM_BEST(frossl_rows(p, begin, end)); });
  double total = 0;
  for (const double distance : apart) total += distance;
  return loss + invariance * count * total / p.rows;
}

void bind_frossl(py::module_& m) {
  m.def("frossl_columns", &frossl_columns);
  m.def("frossl", &frossl);
}

}  // namespace fastjem
