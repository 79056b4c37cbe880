#include "common.h"

namespace fastjem {

struct KeyedUniform {
  const int64_t* samples;  // [images]
  int64_t images, view, first, count;
  uint32_t epoch;
  uint64_t seed;
  double* out;  // [views * images, count]
};

}  // namespace fastjem

#define FASTJEM_KERNEL "masks/keyed_uniform.h"
#include "each_isa.h"

namespace fastjem {

static void keyed_uniform(uintptr_t samples, int64_t images, int64_t epoch, int64_t view, int64_t views, int64_t first,
                          int64_t count, int64_t seed, uintptr_t out, int threads) {
  const KeyedUniform problem{
      at<const int64_t>(samples),  images,         view, first, count, static_cast<uint32_t>(epoch),
      static_cast<uint64_t>(seed), at<double>(out)};
  parallel_for(views * images, 1 + 16384 / count, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(keyed_uniform_rows(problem, begin, end)); });
}

void bind_keyed_uniform(pybind11::module_& m) {
  m.def("keyed_uniform", &keyed_uniform, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
