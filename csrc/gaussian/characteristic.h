// Sums over rows of cos(k theta) and sin(k theta), k = 1 .. K, and the gradient of a weighted sum of them: one sine and
// cosine an element, and a rotation by theta for each further k, all in registers. A unit of work is LANES slices of
// one view.

constexpr int64_t LANES = 16;
constexpr int64_t PARTIAL = 256;  // so many rows are summed in W, then in double

static FASTJEM_INLINE void sine_cosine(double x, double& sine, double& cosine) {
  sine = std::sin(x);
  cosine = std::cos(x);
}
// Reduced by multiples of pi / 2 in double: right to float's last digits for |x| < 1e9, where neighbours are 64 apart.
static FASTJEM_INLINE void sine_cosine(float x, float& sine, float& cosine) {
  const double shifted = x * 0.63661977236758134 + 6755399441055744.0;  // 1.5 * 2^52: the integer is in the low bits
  const double n = shifted - 6755399441055744.0;
  const float r = static_cast<float>(x - n * 1.5707963267948966);
  const uint32_t quadrant = static_cast<uint32_t>(bit_cast<uint64_t>(shifted));
  const float z = r * r;
  float s = 1.0f / 362880, c = -1.0f / 3628800;  // Taylor to r^9 and r^10: errors below 2e-9 for |r| <= pi / 4
  s = s * z - 1.0f / 5040;
  s = s * z + 1.0f / 120;
  s = s * z - 1.0f / 6;
  s = s * z * r + r;
  c = c * z + 1.0f / 40320;
  c = c * z - 1.0f / 720;
  c = c * z + 1.0f / 24;
  c = c * z - 0.5f;
  c = c * z + 1.0f;
  const float a = quadrant & 1 ? c : s, b = quadrant & 1 ? s : c;
  sine = bit_cast<float>(bit_cast<uint32_t>(a) ^ ((quadrant & 2) << 30));
  cosine = bit_cast<float>(bit_cast<uint32_t>(b) ^ (((quadrant + 1) & 2) << 30));
}

template <class W>
static FASTJEM_INLINE void first_rotation(const W* theta, int64_t width, W* sine, W* cosine) {
  W angle[LANES] = {};
  for (int64_t j = 0; j < width; ++j) angle[j] = theta[j];
#pragma omp simd
  for (int64_t j = 0; j < LANES; ++j) sine_cosine(angle[j], sine[j], cosine[j]);
}

template <class W>
static FASTJEM_INLINE void rotate(const W* one_sine, const W* one_cosine, W* sine, W* cosine) {
#pragma omp simd
  for (int64_t j = 0; j < LANES; ++j) {
    const W rotated = cosine[j] * one_cosine[j] - sine[j] * one_sine[j];
    sine[j] = sine[j] * one_cosine[j] + cosine[j] * one_sine[j];
    cosine[j] = rotated;
  }
}

template <class W>
static void characteristic_of(const Characteristic& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.slices + LANES - 1) / LANES, sums = 2 * p.frequencies * LANES;
  std::vector<W> partial(sums);
  std::vector<double> total(sums);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t view = unit / blocks, column = unit % blocks * LANES, width = std::min(LANES, p.slices - column);
    const W* theta = static_cast<const W*>(p.theta) + view * p.rows * p.slices + column;
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t start = 0; start < p.rows; start += PARTIAL) {
      std::fill(partial.begin(), partial.end(), W(0));
      const int64_t stop = std::min(start + PARTIAL, p.rows);
      for (int64_t i = start; i < stop; ++i) {
        W one_sine[LANES], one_cosine[LANES], sine[LANES], cosine[LANES];
        first_rotation(theta + i * p.slices, width, one_sine, one_cosine);
        for (int64_t j = 0; j < LANES; ++j) sine[j] = one_sine[j], cosine[j] = one_cosine[j];
        for (int64_t k = 0; k < p.frequencies; ++k) {
          W* sum = partial.data() + 2 * k * LANES;
#pragma omp simd
          for (int64_t j = 0; j < LANES; ++j) {
            sum[j] += cosine[j];
            sum[LANES + j] += sine[j];
          }
          rotate(one_sine, one_cosine, sine, cosine);
        }
      }
      for (int64_t j = 0; j < sums; ++j) total[j] += partial[j];
    }
    for (int64_t k = 0; k < p.frequencies; ++k) {
      for (int64_t part = 0; part < 2; ++part) {  // cosines, then sines
        const double* from = total.data() + (2 * k + part) * LANES;
        W* to = static_cast<W*>(p.out) + ((part * p.frequencies + k) * p.views + view) * p.slices + column;
        for (int64_t j = 0; j < width; ++j) to[j] = static_cast<W>(from[j]);
      }
    }
  }
}

static void characteristic(const Characteristic& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float64 ? characteristic_of<double>(p, begin, end) : characteristic_of<float>(p, begin, end);
}

// out = sum_k weights[1, k] cos(k theta) - weights[0, k] sin(k theta)
template <class W>
static void characteristic_backward_of(const Characteristic& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.slices + LANES - 1) / LANES;
  std::vector<W> weights(2 * p.frequencies * LANES);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t view = unit / blocks, column = unit % blocks * LANES, width = std::min(LANES, p.slices - column);
    for (int64_t k = 0; k < p.frequencies; ++k) {
      for (int64_t part = 0; part < 2; ++part) {
        const W* from =
            static_cast<const W*>(p.weights) + ((part * p.frequencies + k) * p.views + view) * p.slices + column;
        for (int64_t j = 0; j < width; ++j) weights[(2 * k + part) * LANES + j] = from[j];
      }
    }
    const W* theta = static_cast<const W*>(p.theta) + view * p.rows * p.slices + column;
    W* out = static_cast<W*>(p.out) + view * p.rows * p.slices + column;
    for (int64_t i = 0; i < p.rows; ++i) {
      W one_sine[LANES], one_cosine[LANES], sine[LANES], cosine[LANES], sum[LANES] = {};
      first_rotation(theta + i * p.slices, width, one_sine, one_cosine);
      for (int64_t j = 0; j < LANES; ++j) sine[j] = one_sine[j], cosine[j] = one_cosine[j];
      for (int64_t k = 0; k < p.frequencies; ++k) {
        const W* weight = weights.data() + 2 * k * LANES;
#pragma omp simd
        for (int64_t j = 0; j < LANES; ++j) sum[j] += weight[LANES + j] * cosine[j] - weight[j] * sine[j];
        rotate(one_sine, one_cosine, sine, cosine);
      }
      for (int64_t j = 0; j < width; ++j) out[i * p.slices + j] = sum[j];
    }
  }
}

static void characteristic_backward(const Characteristic& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float64 ? characteristic_backward_of<double>(p, begin, end)
                            : characteristic_backward_of<float>(p, begin, end);
}
