// Views [begin, end): the window is resized across first, into whole levels, and then down, as torch does on uint8. An
// axis' weights are computed once for each view, in double.

static inline double triangle(double x) { return x < 1 ? 1 - x : 0; }
static inline double cubic(double x) {
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

// Red, green, blue and nothing in one vector: a loop over three channels inside one over taps stays scalar.
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

static FASTJEM_INLINE uint8_t level(float x) {  // x is half a level too high, so that cutting it off rounds
  x = x > 0.0f ? x : 0.0f;
  return static_cast<uint8_t>(static_cast<int32_t>(x < 255.0f ? x : 255.0f));
}

static void crop_resize_views(const CropResize& c, int64_t begin, int64_t end) {
  Axis across, down;
  std::vector<float> pixels;      // [length across, 4], a row of the window: three channels and nothing
  std::vector<uint8_t> narrowed;  // [length down, out_width, 3], resized across
  std::vector<float> sums(3 * c.out_width);
  for (int64_t view = begin; view < end; ++view) {
    const float* p = c.parameters + COLUMNS * view;
    set_axis(across, p[LEFT], p[WIDTH], c.width, c.out_width, c.bicubic);
    set_axis(down, p[TOP], p[HEIGHT], c.height, c.out_height, c.bicubic);
    const uint8_t* window = c.images + 3 * ((c.indices[view] * c.height + down.start) * c.width + across.start);
    pixels.resize(4 * across.length);
    narrowed.resize(3 * c.out_width * down.length);
    for (int64_t y = 0; y < down.length; ++y) {
      const uint8_t* in = window + 3 * c.width * y;
      for (int64_t x = 0; x < across.length; ++x) {
        for (int i = 0; i < 3; ++i) pixels[4 * x + i] = in[3 * x + i];
      }
      uint8_t* out = narrowed.data() + 3 * c.out_width * y;
      for (int64_t j = 0; j < c.out_width; ++j) {
        const float* from = pixels.data() + 4 * across.first[j];
        const float* weight = across.weights.data() + across.taps * j;
        Pixel sum = {0.5f, 0.5f, 0.5f, 0.5f};
        for (int64_t t = 0; t < across.taps; ++t) sum += weight[t] * load_pixel(from + 4 * t);
        for (int i = 0; i < 3; ++i) out[3 * j + i] = level(sum[i]);
      }
    }
    for (int64_t j = 0; j < c.out_height; ++j) {
      const uint8_t* from = narrowed.data() + 3 * c.out_width * down.first[j];
      std::fill(sums.begin(), sums.end(), 0.5f);
      for (int64_t t = 0; t < down.taps; ++t, from += 3 * c.out_width) {
        const float weight = down.weights[down.taps * j + t];
        if (weight == 0.0f) continue;
#pragma omp simd
        for (int64_t x = 0; x < 3 * c.out_width; ++x) sums[x] += weight * from[x];
      }
      uint8_t* out = c.out + 3 * c.out_width * (c.out_height * view + j);
#pragma omp simd
      for (int64_t x = 0; x < 3 * c.out_width; ++x) out[x] = level(sums[x]);
    }
  }
}
