// Pillow's `image.crop(window).resize(size, filter)` of 8-bit RGB, bit for bit, from an array and into one. Pillow's
// own (src/libImaging/Resample.c) takes four bytes a pixel, copies the window, and multiplies one level at a time.
#include "common.h"

namespace fastjem {

static constexpr int weight_bits = 22;  // behind the point: Pillow's PRECISION_BITS
static constexpr int32_t half_weight = 1 << (weight_bits - 1);

// One axis: output j is the sum over t < taps of weights[j, t] * window[first[j] + t]. From used[j] on weights are 0,
// and there may be no window.
struct WindowAxis {
  int64_t length, size, taps;  // of the window, of the output, of an output at most
  const int32_t* first;        // [size]
  const int32_t* used;         // [size]
  const int32_t* weights;      // [size, taps]
};

struct Window {
  const uint8_t* pixels;  // the window's first
  int64_t stride;         // bytes from a row to the next
  WindowAxis across, down;
  bool down_first;
  uint8_t* between;  // what the first pass makes: [length down, size across, 3], or [size down, length across, 3]
  int32_t* wide;     // a row [length across + taps, 3] and one more
  int32_t* sums;     // a row [size across, 3] and one more
  uint8_t* out;      // [size down, size across, 3]
};

}  // namespace fastjem

#define FASTJEM_KERNEL "augment/resize_window.h"
#include "each_isa.h"

namespace fastjem {

#include "augment/filters.h"

// Memory that a thread uses again for each window: fresh memory costs as much as the arithmetic.
struct AxisMemory {
  std::vector<int32_t> first, used, weights;
  std::vector<double> raw;
};

static WindowAxis axis_of(AxisMemory& memory, int64_t length, int64_t size, bool bicubic) {
  const double scale = static_cast<double>(length) / size;
  const double stretch = scale < 1.0 ? 1.0 : scale;  // of the filter: where the window shrinks, it averages
  const double support = (bicubic ? 2.0 : 1.0) * stretch;
  const double narrow = 1.0 / stretch;
  memory.first.resize(size);
  memory.used.resize(size);
  int64_t taps = 0;
  for (int64_t j = 0; j < size; ++j) {
    const double centre = (j + 0.5) * scale;
    const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(centre - support + 0.5));
    const int64_t end = std::min<int64_t>(length, static_cast<int64_t>(centre + support + 0.5));
    memory.first[j] = static_cast<int32_t>(first);
    memory.used[j] = static_cast<int32_t>(end - first);
    taps = std::max(taps, end - first);
  }
  memory.weights.assign(size * taps, 0);
  memory.raw.resize(taps);
  for (int64_t j = 0; j < size; ++j) {
    const double centre = (j + 0.5) * scale;
    double sum = 0;
    for (int64_t t = 0; t < memory.used[j]; ++t) {
      const double x = std::fabs((t + memory.first[j] - centre + 0.5) * narrow);
      memory.raw[t] = bicubic ? cubic(x) : triangle(x);
      sum += memory.raw[t];
    }
    for (int64_t t = 0; t < memory.used[j]; ++t) {
      const double weight = (sum != 0.0 ? memory.raw[t] / sum : memory.raw[t]) * (1 << weight_bits);
      memory.weights[taps * j + t] = static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
  }
  return {length, size, taps, memory.first.data(), memory.used.data(), memory.weights.data()};
}

// The window [height, width] at (top, left), which lies in an image [rows, columns, 3], becomes out [down, across, 3].
static void window(uintptr_t image, int64_t columns, int64_t top, int64_t left, int64_t height, int64_t width,
                   int64_t down, int64_t across, bool bicubic, bool down_first, uintptr_t out) {
  static thread_local AxisMemory for_across, for_down;
  static thread_local std::vector<uint8_t> between;
  static thread_local std::vector<int32_t> wide, sums;
  const WindowAxis axis = axis_of(for_across, width, across, bicubic);
  between.resize(3 * (down_first ? down * width : height * across));
  wide.resize(3 * (width + axis.taps) + 1);
  sums.resize(3 * across + 1);
  const Window problem{at<const uint8_t>(image) + 3 * (top * columns + left),
                       3 * columns,
                       axis,
                       axis_of(for_down, height, down, bicubic),
                       down_first,
                       between.data(),
                       wide.data(),
                       sums.data(),
                       at<uint8_t>(out)};
  FASTJEM_BEST(resize_window(problem));
}

void bind_resize_window(pybind11::module_& m) {
  m.def("resize_window", &window, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
