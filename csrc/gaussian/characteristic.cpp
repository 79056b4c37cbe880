#include "common.h"

namespace fastjem {
// float32 or float64 throughout, all contiguous.
struct Characteristic {
  Dtype dtype;
  const void* theta;    // [views, rows, slices]
  const void* weights;  // [2, frequencies, views, slices], in backward
  int64_t views, rows, slices, frequencies;
  void* out;  // [2, frequencies, views, slices]; in backward [views, rows, slices]
};
}  // namespace fastjem

#define FASTJEM_KERNEL "gaussian/characteristic.h"
#include "each_isa.h"

namespace fastjem {

template <class F>
static void for_units(const Characteristic& p, int threads, F&& f) {
  constexpr int64_t lanes = 16;
  const int64_t units = p.views * ((p.slices + lanes - 1) / lanes);
  parallel_for(units, 1 + 16384 / (p.rows * lanes * p.frequencies), threads, f);
}

static void characteristic(int dtype, uintptr_t theta, int64_t views, int64_t rows, int64_t slices, int64_t frequencies,
                           uintptr_t out, int threads) {
  const Characteristic problem{
      static_cast<Dtype>(dtype), at<const void>(theta), nullptr, views, rows, slices, frequencies, at<void>(out)};
  for_units(problem, threads, [&](int64_t begin, int64_t end) { FASTJEM_BEST(characteristic(problem, begin, end)); });
}

static void characteristic_backward(int dtype, uintptr_t theta, uintptr_t weights, int64_t views, int64_t rows,
                                    int64_t slices, int64_t frequencies, uintptr_t out, int threads) {
  const Characteristic problem{static_cast<Dtype>(dtype),
                               at<const void>(theta),
                               at<const void>(weights),
                               views,
                               rows,
                               slices,
                               frequencies,
                               at<void>(out)};
  for_units(problem, threads,
            [&](int64_t begin, int64_t end) { FASTJEM_BEST(characteristic_backward(problem, begin, end)); });
}

void bind_characteristic(pybind11::module_& m) {
  m.def("characteristic", &characteristic, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("characteristic_backward", &characteristic_backward, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
