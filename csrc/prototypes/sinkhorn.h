// One Sinkhorn iteration over rows [begin, end), and the codes. One read of the scores each.

#include "prototypes/biased_softmax.h"

static constexpr double log2_e = 1.4426950408889634;

template <class W>
static Bias<W> bias_of(const Sinkhorn& p) {
  return {static_cast<const W*>(p.bias), static_cast<const W*>(p.bias_low)};
}

// Of the row's offset in two parts, or without offsets the score itself.
template <bool offsets, class T, class W>
static FASTJEM_INLINE W column_value(const T* x, Scale<W> scale, Bias<W> bias, W offset, W offset_low, int64_t j) {
  if constexpr (!offsets) return widen(x[j]);
  if constexpr (std::is_same<W, double>::value) return biased_logit<Biased::one_part>(x, scale, bias, j) - offset;
  return logit_above(x, scale, bias, offset, offset_low, j);
}

// Samples whose logits are near the first one's, as those of cosines, need no maxima: with one shift for all and
// u = exp(bias - largest bias) every exponential that matters is a normal number.
struct Near {
  const Scale<float> scale;
  const float
      rate;  // about the scale, and not it: a product used twice would be rounded, where it should be fused with a sum
  const float shift, most, least,
      minus_one;  // limits: as constants GCC 12 makes 8 instructions of comparing with two of them

  explicit Near(const Sinkhorn& p)
      : scale(p.scale * log2_e),
        rate(scale.high * 0.9999998f),
        shift(static_cast<float>(p.near_shift)),
        most(p.near_range),
        least(-p.near_range),
        minus_one(least / 126) {}

  // 2^(x_j * scale - shift) = 2^n 2^r, |r| <= 1/2, with a minimax polynomial of 2^r (error below 2e-8). As the shift is
  // a whole number, r has its own last digit, not that of the logit. Above 2^126: that or more; below 2^-126: less than
  // 2^-125.
  template <class T>
  FASTJEM_INLINE float exp(const T* x, int64_t j) const {
    const float v = widen(x[j]);
    float rough = v * rate - shift;
    rough = rough < least ? least : rough;
    rough = rough > most ? most : rough;
    const float shifted = rough + 12582912.0f;  // 1.5 * 2^23: the integer part is now in the low bits
    float r = (v * scale.high - (shifted - 12582912.0f + shift)) + v * scale.low;
    r = r < minus_one ? minus_one : r;
    float p = 1.5345811e-4f;
    p = p * r + 1.3399931e-3f;
    p = p * r + 9.6184891e-3f;
    p = p * r + 5.5503286e-2f;
    p = p * r + 2.4022646e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    return p * bit_cast<float>((bit_cast<uint32_t>(shifted) - 0x4b400000u + 127u) << 23);
  }
};

template <class T>
static float near_block(const Near near, const T* x, const float* u, int64_t begin, int64_t end, float* e) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = begin; j < end; ++j) {
    e[j] = near.exp(x, j) * u[j];
    sum += e[j];
  }
  return sum;
}

// e[j] * softmax.factor[j / 1024] = the softmax of a sample's logits with their bias. Returns their logsumexp.
template <class T>
static double sample_softmax(const Sinkhorn& p, const T* x, BiasedSoftmax<wide<T>>& softmax, wide<T>* e) {
  using W = wide<T>;
  if constexpr (std::is_same<W, float>::value) {
    if (p.u) {
      const Near near(p);
      double total = 0;
      for (int64_t first = 0; first < p.width; first += sum_block) {
        total += near_block(near, x, p.u, first, std::min(first + sum_block, p.width), e);
      }
      if (total > 1e-2 &&
          total < 1e6) {  // nothing large was cut off, as u > 4e-18; what is small is 1e-36 of the total
        std::fill(softmax.factor.begin(), softmax.factor.end(), static_cast<float>(1 / total));
        return p.near_shift / log2_e + std::log(total) + p.largest_bias;
      }
    }
  }
  return softmax.row(x, Scale<W>(p.scale), bias_of<W>(p), p.width, e);
}

template <class T>
static void first_logsumexp_of(const Sinkhorn& p, double* out) {
  BiasedSoftmax<wide<T>> softmax(p.width);
  std::vector<wide<T>> e(p.width);
  *out = softmax.row(static_cast<const T*>(p.scores), Scale<wide<T>>(p.scale), bias_of<wide<T>>(p), p.width, e.data());
}

static constexpr int64_t block_rows = 16, block_width = 4096;  // fit in the L2 cache

// sum_j += 2^(x_ij * scale / log(2) - near_shift) over the rows.
template <class T>
static void near_column_sums_of(const Sinkhorn& p, int64_t begin, int64_t end, double* sum) {
  if constexpr (std::is_same<wide<T>, float>::value) {
    const Near near(p);
    std::vector<float> partial(block_width);
    for (int64_t first = begin; first < end; first += block_rows) {
      for (int64_t left = 0; left < p.width; left += block_width) {
        const int64_t n = std::min(block_width, p.width - left);
        float* const b_sum = partial.data();
        std::fill(b_sum, b_sum + n, 0.0f);
        for (int64_t i = first; i < std::min(first + block_rows, end); ++i) {
          const T* x = static_cast<const T*>(p.scores) + i * p.row_stride + left;
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) b_sum[j] += near.exp(x, j);
        }
        double* const total = sum + left;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) total[j] += b_sum[j];
      }
    }
  }
}

// maximum + log(sum) = logsumexp_i of each column j, of x_ij * scale or, with offsets, of x_ij * scale + bias_j -
// offset_i. Running maxima, raised once per 16 rows; without offsets they are of x itself, so that what is subtracted
// is exact.
template <bool offsets, class T>
static void column_logsumexp_of(const Sinkhorn& p, int64_t begin, int64_t end, double* out_maximum, double* sum) {
  using W = wide<T>;
  const Scale<W> scale(p.scale);
  const W lowest = -std::numeric_limits<W>::infinity(), per_unit = offsets ? W(1) : scale.high;
  std::vector<W> maximum(p.width, lowest), shift(block_width), partial(block_width), above(block_width),
      above_low(block_width);
  for (int64_t first = begin; first < end; first += block_rows) {
    const int64_t last = std::min(first + block_rows, end);
    for (int64_t left = 0; left < p.width; left += block_width) {
      const int64_t n = std::min(block_width, p.width - left);
      W *const m = maximum.data() + left, *const to = shift.data(), *const b_sum = partial.data();
      double* const total = sum + left;
      Bias<W> bias = bias_of<W>(p);
      if (bias.high) bias.high += left;
      if (bias.low) bias.low += left;
      std::copy(m, m + n, to);
      for (int64_t i = first; i < last; ++i) {
        const T* x = static_cast<const T*>(p.scores) + i * p.row_stride + left;
        const W offset = offsets ? static_cast<W>(p.offsets[i]) : W(0);
        const W low = offsets ? static_cast<W>(p.offsets[i] - static_cast<double>(offset)) : W(0);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const W v = column_value<offsets>(x, scale, bias, offset, low, j);
          to[j] = v > to[j] ? v : to[j];
        }
      }
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const W next = to[j];
        to[j] = next == lowest ? W(0) : next;
        total[j] *= m[j] == lowest ? W(0) : exponential((m[j] - to[j]) * per_unit);
        m[j] = next;
        b_sum[j] = 0;
      }
      if constexpr (offsets) {  // bias - to, in two parts: a maximum may be thousands, and the others near it count
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          above[j] = bias.high[j] - to[j];
          above_low[j] = lost(bias.high[j], to[j], above[j]) + (bias.low ? bias.low[j] : W(0));
        }
        bias = {above.data(), above_low.data()};
      }
      for (int64_t i = first; i < last; ++i) {
        const T* x = static_cast<const T*>(p.scores) + i * p.row_stride + left;
        const W offset = offsets ? static_cast<W>(p.offsets[i]) : W(0);
        const W low = offsets ? static_cast<W>(p.offsets[i] - static_cast<double>(offset)) : W(0);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const W v = column_value<offsets>(x, scale, bias, offset, low, j);
          b_sum[j] += exponential(offsets ? v : (v - to[j]) * per_unit);
        }
      }
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) total[j] += b_sum[j];
    }
  }
  for (int64_t j = 0; j < p.width; ++j) out_maximum[j] = offsets ? maximum[j] : maximum[j] * p.scale;
}

// sum_j += softmax(x_i * scale + bias)_j over the rows, and each row's logsumexp.
template <class T>
static void column_sums_of_softmax_of(const Sinkhorn& p, int64_t begin, int64_t end, double* sum) {
  using W = wide<T>;
  const int64_t k = p.width;
  BiasedSoftmax<W> softmax(k);
  std::vector<W> e(k), partial(k, W(0));
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.scores) + i * p.row_stride;
    p.row_logsumexp[i] = sample_softmax(p, x, softmax, e.data());
    for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
      const int64_t last = std::min(first + softmax_block, k);
      const W factor = softmax.factor[b];
#pragma omp simd
      for (int64_t j = first; j < last; ++j) partial[j] += e[j] * factor;
    }
    if ((i - begin) % 32 == 31 || i + 1 == end) {  // float sums of 32, then double
#pragma omp simd
      for (int64_t j = 0; j < k; ++j) {
        sum[j] += partial[j];
        partial[j] = 0;
      }
    }
  }
}

template <class T, class Code>
static void codes_of(const Sinkhorn& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t k = p.width;
  BiasedSoftmax<W> softmax(k);
  std::vector<W> e(k);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.scores) + i * p.row_stride;
    Code* out = static_cast<Code*>(p.codes) + i * k;
    sample_softmax(p, x, softmax, e.data());
    for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
      const int64_t last = std::min(first + softmax_block, k);
      const W factor = softmax.factor[b];
#pragma omp simd
      for (int64_t j = first; j < last; ++j) narrow(e[j] * factor, out[j]);
    }
  }
}

static void first_logsumexp(const Sinkhorn& p, double* out) {
  with_dtype(p.dtype, [&](auto* x) { first_logsumexp_of<std::remove_pointer_t<decltype(x)>>(p, out); });
}

static void near_column_sums(const Sinkhorn& p, int64_t begin, int64_t end, double* sum) {
  with_dtype(p.dtype, [&](auto* x) { near_column_sums_of<std::remove_pointer_t<decltype(x)>>(p, begin, end, sum); });
}

static void column_logsumexp(const Sinkhorn& p, int64_t begin, int64_t end, double* maximum, double* sum) {
  with_dtype(p.dtype, [&](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    if (p.offsets) {
      column_logsumexp_of<true, T>(p, begin, end, maximum, sum);
    } else {
      column_logsumexp_of<false, T>(p, begin, end, maximum, sum);
    }
  });
}

static void column_sums_of_softmax(const Sinkhorn& p, int64_t begin, int64_t end, double* sum) {
  with_dtype(p.dtype,
             [&](auto* x) { column_sums_of_softmax_of<std::remove_pointer_t<decltype(x)>>(p, begin, end, sum); });
}

static void codes(const Sinkhorn& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) {
    with_dtype(p.code_dtype, [&](auto* code) {
      codes_of<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(code)>>(p, begin, end);
    });
  });
}
