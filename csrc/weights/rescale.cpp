#include "common.h"

#define FASTJEM_KERNEL "weights/rescale.h"
#include "each_isa.h"

namespace fastjem {

static void rescale(int dtype, uintptr_t x, int64_t size, double factor, int threads) {
  parallel_for(size, 65536, threads, [&](int64_t begin, int64_t end) {
    FASTJEM_BEST(rescale_range(static_cast<Dtype>(dtype), at<void>(x), begin, end, factor));
  });
}

void bind_rescale(pybind11::module_& m) {
  m.def("rescale", &rescale, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
