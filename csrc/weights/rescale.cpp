#include "tensors.h"

#define FASTJEM_KERNEL "weights/rescale.h"
#include "each_isa.h"

namespace fastjem {

static void rescale(int dtype, uintptr_t x, int64_t size, double factor, int threads) {
  parallel_for(size, 65536, threads, [&](int64_t begin, int64_t end) {
    FASTJEM_BEST(rescale_range(static_cast<Dtype>(dtype), at<void>(x), begin, end, factor));
  });
}

// Every gradient (None: none) times upstream * factor; `factors` is a 0-dim tensor for all, or a number for each.
// False, and nothing is written, where one of the tensors isn't plain, or a gradient not contiguous.
static bool rescale_plain(pybind11::sequence gradients, pybind11::handle upstream, pybind11::handle factors,
                          int threads) {
  const auto number = [](const Plain& x) {
    return x.dtype == 0 ? *reinterpret_cast<const float*>(x.data) : *reinterpret_cast<const double*>(x.data);
  };
  Plain seen;
  if (!look_at(upstream, seen) || seen.elements != 1 || seen.dtype < 0 || seen.dtype > 1) return false;
  const bool is_float = seen.dtype == 0;
  const double from_above = number(seen);
  const bool one_for_all = look_at(factors, seen);
  if (one_for_all && (seen.elements != 1 || seen.dtype < 0 || seen.dtype > 1)) return false;
  const double common = one_for_all ? number(seen) : 0;
  std::vector<Plain> targets;
  std::vector<double> by;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const pybind11::object gradient = gradients[i];
    if (gradient.is_none()) continue;
    if (!look_at(gradient, seen) || !seen.is_floating() || !seen.is_contiguous()) return false;
    const double factor = one_for_all ? common : pybind11::cast<double>(factors[pybind11::int_(i)]);
    // the product that torch makes of two 0-dim tensors
    by.push_back(is_float ? static_cast<float>(from_above) * static_cast<float>(factor) : from_above * factor);
    targets.push_back(seen);
  }
  const pybind11::gil_scoped_release release;
  for (size_t i = 0; i < targets.size(); ++i) {
    if (by[i] == 1) continue;
    rescale(targets[i].dtype, reinterpret_cast<uintptr_t>(targets[i].data), targets[i].elements, by[i], threads);
  }
  return true;
}

void bind_rescale(pybind11::module_& m) {
  m.def("rescale", &rescale, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("rescale_plain", &rescale_plain);
}

}  // namespace fastjem
