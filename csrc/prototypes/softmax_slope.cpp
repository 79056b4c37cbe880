#include "common.h"
#include "flush_subnormals.h"

namespace fastjem {
struct SoftmaxSlope {
  Dtype dtype;
  const void* scores;  // [B, K], rows row_stride elements apart
  int64_t row_stride, width;
  double scale;       // 1 / temperature
  const void* slope;  // [K] float (double for float64 scores)
  double factor;      // of the gradient
  void* gradient;     // [B, K]
};
}  // namespace fastjem

#define FASTJEM_KERNEL "prototypes/softmax_slope.h"
#include "each_isa.h"

namespace fastjem {

static void softmax_slope(int dtype, uintptr_t scores, int64_t rows, int64_t width, int64_t row_stride, double scale,
                          uintptr_t slope, double factor, uintptr_t gradient, int threads) {
  const SoftmaxSlope p{
      static_cast<Dtype>(dtype), at<const void>(scores), row_stride, width, scale, at<const void>(slope), factor,
      at<void>(gradient)};
  parallel_for(rows, 1 + 16384 / width, threads, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    FASTJEM_BEST(softmax_slope(p, begin, end));
  });
}

void bind_softmax_slope(pybind11::module_& m) {
  m.def("softmax_slope", &softmax_slope, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
