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

// sums [K] += the softmax of the rows.
static void softmax_sums(int dtype, uintptr_t scores, int64_t rows, int64_t width, int64_t row_stride, double scale,
                         uintptr_t sums, int threads) {
  const SoftmaxSlope p{
      static_cast<Dtype>(dtype), at<const void>(scores), row_stride, width, scale, nullptr, 0, nullptr};
  const int64_t grain = 1 + 16384 / width;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows / grain));
  std::vector<double> of_parts(parts * width);
  parallel_for(parts, 1, threads, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t part = begin; part < end; ++part) {
      FASTJEM_BEST(softmax_sums(p, rows * part / parts, rows * (part + 1) / parts, of_parts.data() + part * width));
    }
  });
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t j = 0; j < width; ++j) at<double>(sums)[j] += of_parts[part * width + j];
  }
}

// The sum of p log p of p = sums / n, and `slope` [K] wide: log p less that sum. (A constant changes nothing in the
// gradient, and this one leaves small numbers.)
static double entropy_slope(int dtype, uintptr_t sums, int64_t width, double n, uintptr_t slope) {
  std::vector<double> logs(width);
  double negative_entropy = 0;
  for (int64_t j = 0; j < width; ++j) {
    const double p = at<const double>(sums)[j] / n;
    logs[j] = std::log(p);
    logs[j] = logs[j] < -1e4 ? -1e4 : logs[j];  // 0 log 0 is 0
    negative_entropy += p * logs[j];
  }
  for (int64_t j = 0; j < width; ++j) {
    if (static_cast<Dtype>(dtype) == Dtype::float64) {
      at<double>(slope)[j] = logs[j] - negative_entropy;
    } else {
      at<float>(slope)[j] = static_cast<float>(logs[j] - negative_entropy);
    }
  }
  return negative_entropy;
}

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
  const auto nogil = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("softmax_sums", &softmax_sums, nogil);
  m.def("entropy_slope", &entropy_slope, nogil);
  m.def("softmax_slope", &softmax_slope, nogil);
}

}  // namespace fastjem
