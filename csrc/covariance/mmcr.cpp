#include "tensors.h"

namespace fastjem {

constexpr int64_t most_rows = 16;  // of an image: 2 views

struct Mmcr {
  Dtype dtype;            // not float64
  const void* halves[2];  // [images, views, width] each, dense: online and momentum
  int64_t images, views, width;
  double* means;              // [images, width]: over all views
  float* polar;               // [images, 2 views, 2 views]: (Z Z^T)^-1/2 of an image's rows Z
  double* norms;              // [images]: the sum of the singular values of Z
  const double* of_means;     // [images, width]: the gradient for the means
  double of_images, of_mean;  // factors in the gradient
  void* gradients[2];         // as the halves, or null
};

}  // namespace fastjem

#define FASTJEM_KERNEL "covariance/mmcr.h"
#include "each_isa.h"

namespace fastjem {

namespace py = pybind11;

static bool read(py::handle online, py::handle momentum, Mmcr& p) {
  Given given;
  const Plain first = given(online, 3);
  const Plain second = given(momentum, 3);
  if (!given.good || !second.has_shape_of(first)) return false;
  p.dtype = static_cast<Dtype>(first.dtype);
  p.halves[0] = first.data;
  p.halves[1] = second.data;
  p.images = first.shape[0];
  p.views = first.shape[1];
  p.width = first.shape[2];
  return p.dtype != Dtype::float64 && p.views * 2 <= most_rows && p.views * 2 <= p.width;
}

// Fills `means` and `polar`, and returns the sum of the images' nuclear norms, for plain views of one shape and dtype;
// None for others, for float64, for many views or more of them than columns, and for what isn't finite.
static py::object mmcr_images(py::handle online, py::handle momentum, uintptr_t means, uintptr_t polar, int threads) {
  Mmcr p{};
  if (!read(online, momentum, p)) return py::none();
  p.means = at<double>(means);
  p.polar = at<float>(polar);
  std::vector<double> norms(p.images);
  p.norms = norms.data();
  {
    const py::gil_scoped_release release;
    parallel_for(p.images, 1 + 16384 / (p.width * p.views), threads,
                 [&](int64_t begin, int64_t end) { FASTJEM_BEST(mmcr_images(p, begin, end)); });
  }
  double total = 0;
  for (const double norm : norms) total += norm;
  if (!std::isfinite(total)) return py::none();
  return py::float_(total);
}

// The gradients, in the shape and dtype of the halves, or 0.
static void mmcr_gradients(py::handle online, py::handle momentum, uintptr_t polar, uintptr_t of_means,
                           double of_images, double of_mean, uintptr_t online_gradient, uintptr_t momentum_gradient,
                           int threads) {
  Mmcr p{};
  if (!read(online, momentum, p)) throw std::invalid_argument("mmcr: views must be plain");
  p.polar = at<float>(polar);
  p.of_means = at<const double>(of_means);
  p.of_images = of_images;
  p.of_mean = of_mean;
  p.gradients[0] = at<void>(online_gradient);
  p.gradients[1] = at<void>(momentum_gradient);
  const py::gil_scoped_release release;
  parallel_for(p.images, 1 + 16384 / (p.width * p.views), threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(mmcr_gradients(p, begin, end)); });
}

void bind_mmcr(py::module_& m) {
  m.def("mmcr_images", &mmcr_images);
  m.def("mmcr_gradients", &mmcr_gradients);
}

}  // namespace fastjem
