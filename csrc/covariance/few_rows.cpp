#include "tensors.h"

namespace fastjem {

struct FewRows {
  Dtype dtype;
  const void* views[2];  // [rows, width] each, dense
  void* gradients[2];    // the same, or null
  int64_t rows, width;
  double scale;  // of the gradients, which are those of the loss times rows (VICReg) or rows / 2 (Barlow Twins)
};

struct FewVicreg {
  double lambda, mu, nu, eps;
};

}  // namespace fastjem

#define FASTJEM_KERNEL "covariance/few_rows.h"
#include "each_isa.h"

namespace fastjem {

namespace py = pybind11;

// Whether both views are plain and dense, of one shape and dtype, and of rows enough to have a variance.
static bool read(py::handle x, py::handle y, py::handle x_gradient, py::handle y_gradient, double scale, FewRows& p) {
  Given given;
  const Plain first = given(x, 2);
  const Plain second = given(y, 2);
  if (!given.good || !second.has_shape_of(first) || first.shape[0] < 2) return false;
  p.dtype = static_cast<Dtype>(first.dtype);
  p.views[0] = first.data;
  p.views[1] = second.data;
  p.gradients[0] = given.gradient_of(first, x_gradient);
  p.gradients[1] = given.gradient_of(second, y_gradient);
  p.rows = first.shape[0];
  p.width = first.shape[1];
  p.scale = scale;
  return given.good;
}

// The losses; None where `read` refuses. Few numbers: no GIL is released and no thread started.

static py::object vicreg(py::handle x, py::handle y, py::handle x_gradient, py::handle y_gradient, double lambda,
                         double mu, double nu, double eps, double scale) {
  FewRows p{};
  if (!read(x, y, x_gradient, y_gradient, scale, p)) return py::none();
  const FewVicreg weights{lambda, mu, nu, eps};
  double loss;
  FASTJEM_BEST(few_vicreg(p, weights, loss));
  return py::float_(loss);
}

static py::object barlow_twins(py::handle x, py::handle y, py::handle x_gradient, py::handle y_gradient, double lambda,
                               double scale) {
  FewRows p{};
  if (!read(x, y, x_gradient, y_gradient, scale, p)) return py::none();
  double loss;
  FASTJEM_BEST(few_barlow_twins(p, lambda, loss));
  return py::float_(loss);
}

void bind_few_rows(py::module_& m) {
  m.def("few_vicreg", &vicreg);
  m.def("few_barlow_twins", &barlow_twins);
}

}  // namespace fastjem
