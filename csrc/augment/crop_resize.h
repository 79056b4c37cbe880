// Views [begin, end): the window is resized across first and then down; of uint8 both give whole levels, as torch's do,
// of floats neither does. An axis' weights are computed once for each view, in double.

#include "augment/filters.h"

// Four channels of a pixel in one vector, which of three has a place too many: a loop over three channels inside one
// over taps stays scalar.
#if defined(__GNUC__)
typedef float Pixel __attribute__((vector_size(16)));
#else
struct Pixel {
  float v[4];
  float operator[](int i) const { return v[i]; }
  Pixel& operator+=(const Pixel& o) {
    for (int i = 0; i < 4; ++i) v[i] += o.v[i];
    return *this;
  }
};
static inline Pixel operator*(float w, const Pixel& p) { return {{w * p.v[0], w * p.v[1], w * p.v[2], w * p.v[3]}}; }
#endif
static FASTJEM_INLINE Pixel load_pixel(const float* from) {
  Pixel p;
  std::memcpy(&p, from, sizeof(p));
  return p;
}

// One axis. The window is [start, start + length) of the source; output j is the sum over t < taps of
// weights[j, t] * window[first[j] + t].
struct Axis {
  int64_t start, length, taps;
  std::vector<int64_t> first;  // [size]
  std::vector<float> weights;  // [size, taps]
};

static inline void set_axis(Axis& axis, float start, float length, int64_t source, int64_t size, bool bicubic) {
  const float from = start > 0.0f ? start : 0.0f;  // NaN becomes 0
  const float last = static_cast<float>(source - 1);
  axis.start = static_cast<int64_t>(from < last ? from : last);
  const float wanted = length > 1.0f ? length : 1.0f;
  const float room = static_cast<float>(source - axis.start);
  axis.length = static_cast<int64_t>(wanted < room ? wanted : room);
  const double scale = static_cast<double>(axis.length) / size;
  const double stretch = std::max(scale, 1.0);  // of the filter: where the window shrinks, it averages
  const double support = (bicubic ? 2 : 1) * stretch;
  axis.taps = std::min<int64_t>(static_cast<int64_t>(std::ceil(2 * support)), axis.length);
  axis.first.resize(size);
  axis.weights.assign(size * axis.taps, 0.0f);
  std::vector<double> raw(axis.taps);
  for (int64_t j = 0; j < size; ++j) {
    const double centre = scale * (j + 0.5);
    const int64_t lowest = static_cast<int64_t>(std::floor(centre - support + 0.5));
    const int64_t first = std::max<int64_t>(0, std::min(lowest, axis.length - axis.taps));
    double sum = 0;
    for (int64_t t = 0; t < axis.taps; ++t) {
      const double x = std::fabs(first + t + 0.5 - centre) / stretch;
      raw[t] = bicubic ? cubic(x) : triangle(x);
      sum += raw[t];
    }
    axis.first[j] = first;
    for (int64_t t = 0; t < axis.taps; ++t) axis.weights[axis.taps * j + t] = static_cast<float>(raw[t] / sum);
  }
}

// What a sum begins with and how it is stored: that of whole levels is half a level too high, so that cutting it off
// rounds it.
template <class T>
struct Stored {
  static constexpr float begin = 0.5f;
};
template <>
struct Stored<float> {
  static constexpr float begin = 0.0f;
};
static FASTJEM_INLINE void store_level(float x, uint8_t& out) {
  x = x > 0.0f ? x : 0.0f;
  out = static_cast<uint8_t>(static_cast<int32_t>(x < 255.0f ? x : 255.0f));
}
static FASTJEM_INLINE void store_level(float x, float& out) { out = x; }

// CHANNELS: how many there are; 0: as many as `c` says.
template <class T, int64_t CHANNELS>
static void crop_resize_views_of(const CropResize& c, int64_t begin, int64_t end) {
  constexpr float begins = Stored<T>::begin;
  const int64_t channels = CHANNELS ? CHANNELS : c.channels;
  const int64_t fours = (channels + 3) / 4;
  const int64_t values = channels * c.out_width;  // of a row of a view
  Axis across, down;
  std::vector<float> pixels;  // [length across, fours, 4], a row of the window
  std::vector<T> narrowed;    // [length down, out_width, channels], resized across
  std::vector<float> sums(values);
  for (int64_t view = begin; view < end; ++view) {
    const float* p = c.parameters + COLUMNS * view;
    set_axis(across, p[LEFT], p[WIDTH], c.width, c.out_width, c.bicubic);
    set_axis(down, p[TOP], p[HEIGHT], c.height, c.out_height, c.bicubic);
    const T* window = static_cast<const T*>(c.images) +
                      channels * ((c.indices[view] * c.height + down.start) * c.width + across.start);
    pixels.resize(4 * fours * across.length);
    narrowed.resize(values * down.length);
    for (int64_t y = 0; y < down.length; ++y) {
      const T* in = window + channels * c.width * y;
      for (int64_t x = 0; x < across.length; ++x) {
        for (int64_t i = 0; i < channels; ++i) pixels[4 * fours * x + i] = in[channels * x + i];
      }
      T* out = narrowed.data() + values * y;
      for (int64_t j = 0; j < c.out_width; ++j) {
        const float* weight = across.weights.data() + across.taps * j;
        for (int64_t first = 0; first < channels; first += 4) {
          const float* from = pixels.data() + 4 * fours * across.first[j] + first;
          Pixel sum = {begins, begins, begins, begins};
          for (int64_t t = 0; t < across.taps; ++t) sum += weight[t] * load_pixel(from + 4 * fours * t);
          const int64_t there = std::min<int64_t>(channels - first, 4);
          for (int64_t i = 0; i < there; ++i) store_level(sum[i], out[channels * j + first + i]);
        }
      }
    }
    for (int64_t j = 0; j < c.out_height; ++j) {
      const T* from = narrowed.data() + values * down.first[j];
      std::fill(sums.begin(), sums.end(), begins);
      for (int64_t t = 0; t < down.taps; ++t, from += values) {
        const float weight = down.weights[down.taps * j + t];
        if (weight == 0.0f) continue;
#pragma omp simd
        for (int64_t x = 0; x < values; ++x) sums[x] += weight * from[x];
      }
      T* out = static_cast<T*>(c.out) + values * (c.out_height * view + j);
#pragma omp simd
      for (int64_t x = 0; x < values; ++x) store_level(sums[x], out[x]);
    }
  }
}

static void crop_resize_views(const CropResize& c, int64_t begin, int64_t end) {
  if (c.of_floats) {
    c.channels == 3 ? crop_resize_views_of<float, 3>(c, begin, end) : crop_resize_views_of<float, 0>(c, begin, end);
  } else {
    c.channels == 3 ? crop_resize_views_of<uint8_t, 3>(c, begin, end) : crop_resize_views_of<uint8_t, 0>(c, begin, end);
  }
}
