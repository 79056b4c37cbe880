// Sums over rows of cos(k theta) and sin(k theta), k = 1 .. K, and the gradient of a weighted sum of them. The sine and
// cosine of theta are computed once; each further k is a rotation by theta, in registers. A unit of work is `lanes`
// slices of one view.

constexpr int64_t lanes = slices_per_unit;
constexpr int64_t rows_per_sum = 256;  // in W, before sums in double

static FASTJEM_INLINE void sine_cosine(double x, double& sine, double& cosine) {
  sine = std::sin(x);
  cosine = std::cos(x);
}
// Reduced by multiples of pi / 2 in double: right to float's last digits for |x| < 1e9, where neighbours are 64 apart.
static FASTJEM_INLINE void sine_cosine(float x, float& sine, float& cosine) {
  const double shift = 6755399441055744.0;  // 1.5 * 2^52: a whole number plus this stands in the low bits
  const double shifted = x * 0.63661977236758134 + shift;
  const double n = shifted - shift;
  const float r = static_cast<float>(x - n * 1.5707963267948966);
  const uint32_t quadrant = static_cast<uint32_t>(bit_cast<uint64_t>(shifted));
  const float z = r * r;
  // Taylor's series to r^9 and r^10: errors below 2e-9 for |r| <= pi / 4.
  float s = 1.0f / 362880;
  s = s * z - 1.0f / 5040;
  s = s * z + 1.0f / 120;
  s = s * z - 1.0f / 6;
  s = s * z * r + r;
  float c = -1.0f / 3628800;
  c = c * z + 1.0f / 40320;
  c = c * z - 1.0f / 720;
  c = c * z + 1.0f / 24;
  c = c * z - 0.5f;
  c = c * z + 1.0f;
  const float a = quadrant & 1 ? c : s;
  const float b = quadrant & 1 ? s : c;
  sine = bit_cast<float>(bit_cast<uint32_t>(a) ^ ((quadrant & 2) << 30));
  cosine = bit_cast<float>(bit_cast<uint32_t>(b) ^ (((quadrant + 1) & 2) << 30));
}

// Of theta itself; lanes beyond `width` are angles of 0.
template <class W>
static FASTJEM_INLINE void first_rotation(const W* theta, int64_t width, W* sine, W* cosine) {
  W angle[lanes] = {};
  for (int64_t j = 0; j < width; ++j) angle[j] = theta[j];
#pragma omp simd
  for (int64_t j = 0; j < lanes; ++j) sine_cosine(angle[j], sine[j], cosine[j]);
}

// sine and cosine of an angle become those of the angle plus theta.
template <class W>
static FASTJEM_INLINE void rotate(const W* one_sine, const W* one_cosine, W* sine, W* cosine) {
#pragma omp simd
  for (int64_t j = 0; j < lanes; ++j) {
    const W rotated = cosine[j] * one_cosine[j] - sine[j] * one_sine[j];
    sine[j] = sine[j] * one_cosine[j] + cosine[j] * one_sine[j];
    cosine[j] = rotated;
  }
}

template <class W>
static void characteristic_of(const Characteristic& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.slices + lanes - 1) / lanes;
  const int64_t sums = 2 * p.frequencies * lanes;
  std::vector<W> partial(sums);
  std::vector<double> total(sums);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t view = unit / blocks;
    const int64_t column = unit % blocks * lanes;
    const int64_t width = std::min(lanes, p.slices - column);
    const W* theta = static_cast<const W*>(p.theta) + view * p.rows * p.slices + column;
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t start = 0; start < p.rows; start += rows_per_sum) {
      std::fill(partial.begin(), partial.end(), W(0));
      const int64_t stop = std::min(start + rows_per_sum, p.rows);
      for (int64_t i = start; i < stop; ++i) {
        W one_sine[lanes], one_cosine[lanes], sine[lanes], cosine[lanes];
        first_rotation(theta + i * p.slices, width, one_sine, one_cosine);
        std::copy(one_sine, one_sine + lanes, sine);
        std::copy(one_cosine, one_cosine + lanes, cosine);
        for (int64_t k = 0; k < p.frequencies; ++k) {
          W* sum = partial.data() + 2 * k * lanes;
#pragma omp simd
          for (int64_t j = 0; j < lanes; ++j) {
            sum[j] += cosine[j];
            sum[lanes + j] += sine[j];
          }
          rotate(one_sine, one_cosine, sine, cosine);
        }
      }
      for (int64_t j = 0; j < sums; ++j) total[j] += partial[j];
    }
    for (int64_t k = 0; k < p.frequencies; ++k) {
      for (int64_t part = 0; part < 2; ++part) {  // cosines, then sines
        const double* from = total.data() + (2 * k + part) * lanes;
        W* to = static_cast<W*>(p.out) + ((part * p.frequencies + k) * p.views + view) * p.slices + column;
        for (int64_t j = 0; j < width; ++j) to[j] = static_cast<W>(from[j]);
      }
    }
  }
}

static void characteristic(const Characteristic& p, int64_t begin, int64_t end) {
  with_wide_dtype(p.dtype, [&](auto* x) { characteristic_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}

// out = sum_k weights[1, k] cos(k theta) - weights[0, k] sin(k theta)
template <class W>
static void characteristic_backward_of(const Characteristic& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.slices + lanes - 1) / lanes;
  std::vector<W> weights(2 * p.frequencies * lanes);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t view = unit / blocks;
    const int64_t column = unit % blocks * lanes;
    const int64_t width = std::min(lanes, p.slices - column);
    for (int64_t k = 0; k < p.frequencies; ++k) {
      for (int64_t part = 0; part < 2; ++part) {
        const W* from =
            static_cast<const W*>(p.weights) + ((part * p.frequencies + k) * p.views + view) * p.slices + column;
        for (int64_t j = 0; j < width; ++j) weights[(2 * k + part) * lanes + j] = from[j];
      }
    }
    const W* theta = static_cast<const W*>(p.theta) + view * p.rows * p.slices + column;
    W* out = static_cast<W*>(p.out) + view * p.rows * p.slices + column;
    for (int64_t i = 0; i < p.rows; ++i) {
      W one_sine[lanes], one_cosine[lanes], sine[lanes], cosine[lanes], sum[lanes] = {};
      first_rotation(theta + i * p.slices, width, one_sine, one_cosine);
      std::copy(one_sine, one_sine + lanes, sine);
      std::copy(one_cosine, one_cosine + lanes, cosine);
      for (int64_t k = 0; k < p.frequencies; ++k) {
        const W* weight = weights.data() + 2 * k * lanes;
#pragma omp simd
        for (int64_t j = 0; j < lanes; ++j) sum[j] += weight[lanes + j] * cosine[j] - weight[j] * sine[j];
        rotate(one_sine, one_cosine, sine, cosine);
      }
      for (int64_t j = 0; j < width; ++j) out[i * p.slices + j] = sum[j];
    }
  }
}

static void characteristic_backward(const Characteristic& p, int64_t begin, int64_t end) {
  with_wide_dtype(p.dtype,
                  [&](auto* x) { characteristic_backward_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
