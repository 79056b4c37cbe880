#include "tensors.h"

namespace fastjem {

static constexpr double unit_eps = 1e-12;  // kernels/arithmetic.py: UNIT_EPS

struct SmallViews {
  Dtype dtype;
  std::vector<const void*> views;  // [images, width] each, dense
  std::vector<void*> gradients;    // the same, or null
  int64_t images, width;
  const int64_t* labels;  // [images]: positives are the rows of one class; null: the views of one image
  double temperature;
  bool normalize, decoupled, one_anchor;  // one anchor: the first view's rows alone
};

struct SmallInfoNce {
  Dtype dtype;
  const void *query, *positive, *negatives;                       // [n, width] twice, [k, width]
  void *query_gradient, *positive_gradient, *negatives_gradient;  // the same, or null
  int64_t n, k, width, offset;
  double temperature;
};

struct SmallPairs {
  Dtype dtype;
  const void *x, *y;              // [n, width]
  void *x_gradient, *y_gradient;  // the same, or null
  int64_t n, width;
  double scale, bias;
};

struct SmallPairsFound {
  double loss, of_scale, of_bias;
};

}  // namespace fastjem

#define FASTJEM_KERNEL "contrastive/small.h"
#include "each_isa.h"

namespace fastjem {

namespace py = pybind11;

// Each of these returns None where a tensor isn't plain and dense, or shapes and dtypes aren't alike: the operators
// then say what is wrong, or compute it. Few numbers: no GIL is released and no thread started.

// Two views [N, D], or one tensor of them [V, N, D] and None. `labels` [N] int64 or None.
static py::object views(py::handle z0, py::handle z1, py::handle g0, py::handle g1, py::handle labels,
                        double temperature, bool normalize, bool decoupled, bool one_anchor) {
  Given given;
  SmallViews p{};
  if (z1.is_none()) {
    const Plain z = given(z0, 3);
    char* gradient = static_cast<char*>(given.gradient_of(z, g0));
    if (!given.good) return py::none();
    p.dtype = static_cast<Dtype>(z.dtype);
    p.images = z.shape[1];
    p.width = z.shape[2];
    const int64_t bytes = p.images * p.width * z.itemsize;
    for (int64_t v = 0; v < z.shape[0]; ++v) {
      p.views.push_back(z.data + v * bytes);
      p.gradients.push_back(gradient ? gradient + v * bytes : nullptr);
    }
  } else {
    const Plain first = given(z0, 2);
    const Plain second = given(z1, 2);
    if (!given.good || !second.has_shape_of(first)) return py::none();
    p.gradients = {given.gradient_of(first, g0), given.gradient_of(second, g1)};
    if (!given.good) return py::none();
    p.dtype = static_cast<Dtype>(first.dtype);
    p.images = first.shape[0];
    p.width = first.shape[1];
    p.views = {first.data, second.data};
  }
  if (!labels.is_none()) p.labels = given.labels(labels, p.images);
  if (!given.good) return py::none();
  p.temperature = temperature;
  p.normalize = normalize;
  p.decoupled = decoupled;
  p.one_anchor = one_anchor;
  double loss;
  FASTJEM_BEST(small_views(p, loss));
  return py::float_(loss);
}

static py::object info_nce(py::handle query, py::handle positive, py::handle negatives, py::handle query_gradient,
                           py::handle positive_gradient, py::handle negatives_gradient, int64_t offset,
                           double temperature) {
  Given given;
  const Plain q = given(query, 2);
  const Plain p = given(positive, 2);
  const Plain bank = given(negatives, 2);
  if (!given.good || !p.has_shape_of(q) || bank.shape[1] != q.shape[1]) return py::none();
  SmallInfoNce problem{static_cast<Dtype>(q.dtype),
                       q.data,
                       p.data,
                       bank.data,
                       given.gradient_of(q, query_gradient),
                       given.gradient_of(p, positive_gradient),
                       given.gradient_of(bank, negatives_gradient),
                       q.shape[0],
                       bank.shape[0],
                       q.shape[1],
                       offset,
                       temperature};
  if (!given.good) return py::none();
  double loss;
  FASTJEM_BEST(small_info_nce(problem, loss));
  return py::float_(loss);
}

// CLIP's or SigLIP's loss, and the gradients for the scale and the bias.
static py::object pairs(py::handle x, py::handle y, py::handle x_gradient, py::handle y_gradient, double scale,
                        double bias, bool sigmoid) {
  Given given;
  const Plain a = given(x, 2);
  const Plain b = given(y, 2);
  if (!given.good || !b.has_shape_of(a)) return py::none();
  const SmallPairs problem{static_cast<Dtype>(a.dtype),
                           a.data,
                           b.data,
                           given.gradient_of(a, x_gradient),
                           given.gradient_of(b, y_gradient),
                           a.shape[0],
                           a.shape[1],
                           scale,
                           bias};
  if (!given.good) return py::none();
  SmallPairsFound found{};
  if (sigmoid) {
    FASTJEM_BEST(small_siglip(problem, found));
  } else {
    FASTJEM_BEST(small_clip(problem, found));
  }
  return py::make_tuple(found.loss, found.of_scale, found.of_bias);
}

void bind_small(py::module_& m) {
  m.def("small_views", &views);
  m.def("small_info_nce", &info_nce);
  m.def("small_pairs", &pairs);
}

}  // namespace fastjem
