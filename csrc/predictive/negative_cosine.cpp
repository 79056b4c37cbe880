#include "tensors.h"

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

// The same of plain tensors; None where they aren't, or don't fit one another.
static pybind11::object negative_cosine_of_plain(pybind11::handle p, pybind11::handle z, pybind11::handle p_gradient,
                                                 pybind11::handle z_gradient, double eps, double scale, int threads) {
  Given given;
  const Plain a = given(p, 2);
  const Plain b = given(z, 2);
  const void* a_out = given.gradient_of(a, p_gradient);
  const void* b_out = given.gradient_of(b, z_gradient);
  if (!given.good || !b.has_shape_of(a)) return pybind11::none();
  const int64_t d = a.shape[1];
  double total;
  {
    const pybind11::gil_scoped_release release;
    total = negative_cosine(a.dtype, address(a.data), d, address(b.data), d, a.shape[0], d, eps, address(a_out),
                            address(b_out), scale, threads);
  }
  return pybind11::float_(total);
}

void bind_negative_cosine(pybind11::module_& m) {
  m.def("negative_cosine", &negative_cosine, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("negative_cosine_of_plain", &negative_cosine_of_plain);
}

}  // namespace fastjem
