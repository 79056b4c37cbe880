#include "common.h"

namespace fastjem {

constexpr int64_t slices_per_unit = 16;  // a unit of work: so many slices of one view

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

// Calls f(begin, end) for parts of the units of work.
template <class F>
static void for_units(const Characteristic& p, int threads, F&& f) {
  const int64_t units = p.views * ((p.slices + slices_per_unit - 1) / slices_per_unit);
  parallel_for(units, 1 + 16384 / (p.rows * slices_per_unit * p.frequencies), threads, f);
}

static Characteristic problem(int dtype, uintptr_t theta, uintptr_t weights, int64_t views, int64_t rows,
                              int64_t slices, int64_t frequencies, uintptr_t out) {
  return {static_cast<Dtype>(dtype),
          at<const void>(theta),
          at<const void>(weights),
          views,
          rows,
          slices,
          frequencies,
          at<void>(out)};
}

static void characteristic(int dtype, uintptr_t theta, int64_t views, int64_t rows, int64_t slices, int64_t frequencies,
                           uintptr_t out, int threads) {
  const Characteristic p = problem(dtype, theta, 0, views, rows, slices, frequencies, out);
  for_units(p, threads, [&](int64_t begin, int64_t end) { FASTJEM_BEST(characteristic(p, begin, end)); });
}

static void characteristic_backward(int dtype, uintptr_t theta, uintptr_t weights, int64_t views, int64_t rows,
                                    int64_t slices, int64_t frequencies, uintptr_t out, int threads) {
  const Characteristic p = problem(dtype, theta, weights, views, rows, slices, frequencies, out);
  for_units(p, threads, [&](int64_t begin, int64_t end) { FASTJEM_BEST(characteristic_backward(p, begin, end)); });
}

void bind_characteristic(pybind11::module_& m) {
  m.def("characteristic", &characteristic, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("characteristic_backward", &characteristic_backward, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
