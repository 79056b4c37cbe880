#include "tensors.h"

namespace fastjem {

struct Tico {
  Dtype dtype;
  const void *x, *y;  // [rows, width] each, dense
  int64_t rows, width;
  void* unit;           // [rows, width] wide: the rows of x at unit length
  const void* product;  // [rows, width] wide: unit @ C
  double rho, scale;    // of the gradients, which are those of the loss times rows
  void* gradients[2];   // [rows, width] each, or null
  double* terms;        // [rows]: what each adds to the loss, times rows
};

}  // namespace fastjem

#define FASTJEM_KERNEL "covariance/tico.h"
#include "each_isa.h"

namespace fastjem {

namespace py = pybind11;

static bool read(py::handle x, py::handle y, Tico& p) {
  Given given;
  const Plain first = given(x, 2);
  const Plain second = given(y, 2);
  if (!given.good || !second.has_shape_of(first)) return false;
  p.dtype = static_cast<Dtype>(first.dtype);
  p.x = first.data;
  p.y = second.data;
  p.rows = first.shape[0];
  p.width = first.shape[1];
  return true;
}

// Fills `unit` for plain views of one shape and dtype; false for others.
static bool tico_units(py::handle x, py::handle y, uintptr_t unit, int threads) {
  Tico p{};
  if (!read(x, y, p)) return false;
  p.unit = at<void>(unit);
  const py::gil_scoped_release release;
  parallel_for(p.rows, 1 + 32768 / p.width, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(tico_units(p, begin, end)); });
  return true;
}

// The loss, for views that `tico_units` has taken. Gradients come in the shape and dtype of the views, or as 0.
static double tico(py::handle x, py::handle y, uintptr_t unit, uintptr_t product, double rho, double scale,
                   uintptr_t x_gradient, uintptr_t y_gradient, int threads) {
  Tico p{};
  if (!read(x, y, p)) throw std::invalid_argument("tico: views must be plain");
  p.unit = at<void>(unit);
  p.product = at<const void>(product);
  p.rho = rho;
  p.scale = scale;
  p.gradients[0] = at<void>(x_gradient);
  p.gradients[1] = at<void>(y_gradient);
  const py::gil_scoped_release release;
  std::vector<double> terms(p.rows);
  p.terms = terms.data();
  parallel_for(p.rows, 1 + 16384 / p.width, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(tico_rows(p, begin, end)); });
  double total = 0;
  for (const double term : terms) total += term;
  return 1 + total / p.rows;
}

void bind_tico(py::module_& m) {
  m.def("tico_units", &tico_units);
  m.def("tico", &tico);
}

}  // namespace fastjem
