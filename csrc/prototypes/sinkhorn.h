// One Sinkhorn iteration over rows [begin, end), and the codes. Each reads the scores once.

#include "prototypes/biased_softmax.h"

static constexpr double log2_e = 1.4426950408889634;

template <class W>
static Bias<W> bias_of(const Sinkhorn& p) {
  return {static_cast<const W*>(p.bias), static_cast<const W*>(p.bias_low)};
}

// What is subtracted from rows; infinite: some of it is.
enum class Offsets { none, finite, infinite };

// What column j's logsumexp is taken of: the logit with its bias less the row's offset, or without offsets the score
// itself.
template <Offsets offsets, class T, class W>
static FASTJEM_INLINE W column_value(const T* x, Scale<W> scale, Bias<W> bias, TwoParts<W> offset, int64_t j) {
  constexpr Infinite infinite = offsets == Offsets::infinite ? Infinite::anything : Infinite::minus;
  if constexpr (offsets == Offsets::none) return widen(x[j]);
  if constexpr (std::is_same<W, double>::value) {
    return biased_logit<Biased::one_part, infinite>(x, scale, bias, j) - offset.high;
  }
  return logit_above<infinite>(x, scale, bias, offset.high, offset.low, j);
}

// Logits of cosines lie near each other: one shift for all samples, found from the first of them, then does instead of
// maxima. The bias comes in as a factor, exp(bias - largest bias), so that every exponential that matters is a normal
// number. Whoever sums them checks by the sum that this was so, and otherwise computes with maxima.
struct Near {
  const Scale<float> scale;
  // About the scale, and not it: a product that is needed twice would be rounded once, instead of fused with each sum.
  const float rate;
  const float shift;
  // Variables, as GCC 12 makes 8 instructions of comparing with two constants.
  const float highest, lowest, minus_one;

  explicit Near(const Sinkhorn& p)
      : scale(p.scale * log2_e),
        rate(scale.high * 0.9999998f),
        shift(static_cast<float>(p.near_shift)),
        highest(p.near_range),
        lowest(-p.near_range),
        minus_one(lowest / 126) {}

  // 2^(x_j * scale - shift) = 2^n 2^r, |r| <= 1/2, with a minimax polynomial of 2^r (error below 2e-8). As the shift is
  // a whole number, r is exact to its own last digit, not to the logit's. Where the result should be above 2^126, it is
  // 2^126 or more; where below 2^-126, less than 2^-125, as r is -1 there.
  template <class T>
  FASTJEM_INLINE float power(const T* x, int64_t j) const {
    const float v = widen(x[j]);
    float rough = v * rate - shift;
    rough = rough < lowest ? lowest : rough;
    rough = rough > highest ? highest : rough;
    const float shifted = rough + integer_shift;
    float r = (v * scale.high - (shifted - integer_shift + shift)) + not_minus_infinity(v) * scale.low;
    r = r < minus_one ? minus_one : r;
    float p = 1.5345811e-4f;
    p = p * r + 1.3399931e-3f;
    p = p * r + 9.6184891e-3f;
    p = p * r + 5.5503286e-2f;
    p = p * r + 2.4022646e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    return p * power_of_2(shifted);
  }
};

template <class T>
static float near_block(const Near near, const T* x, const float* bias_factor, int64_t begin, int64_t end, float* e) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = begin; j < end; ++j) {
    e[j] = near.power(x, j) * bias_factor[j];
    sum += e[j];
  }
  return sum;
}

// Afterwards e[j] * softmax.factor[j / softmax_block] is the softmax of a sample's logits with their bias. Returns
// their logsumexp.
template <class T>
static double sample_softmax(const Sinkhorn& p, const T* x, BiasedSoftmax<wide<T>>& softmax, wide<T>* e) {
  using W = wide<T>;
  if constexpr (std::is_same<W, float>::value) {
    if (p.bias_factor) {
      const Near near(p);
      double total = 0;
      for (int64_t first = 0; first < p.width; first += sum_block) {
        total += near_block(near, x, p.bias_factor, first, std::min(first + sum_block, p.width), e);
      }
      // Then no power was cut off at 2^126, as each bias factor is at least 4e-18; those below 2^-126 don't matter.
      if (total > 1e-2 && total < 1e6) {
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

// Sums over samples go through the scores in blocks that fit in the L2 cache.
static constexpr int64_t block_rows = 16;
static constexpr int64_t block_width = 4096;

// sum_j += 2^(x_ij * scale / log(2) - near_shift) over the rows.
template <class T>
static void near_column_sums_of(const Sinkhorn& p, int64_t begin, int64_t end, double* sum) {
  if constexpr (std::is_same<wide<T>, float>::value) {
    const Near near(p);
    std::vector<float> partial(block_width);
    for (int64_t first = begin; first < end; first += block_rows) {
      for (int64_t column = 0; column < p.width; column += block_width) {
        const int64_t n = std::min(block_width, p.width - column);
        float* const block_sum = partial.data();
        std::fill(block_sum, block_sum + n, 0.0f);
        for (int64_t i = first; i < std::min(first + block_rows, end); ++i) {
          const T* x = static_cast<const T*>(p.scores) + i * p.row_stride + column;
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) block_sum[j] += near.power(x, j);
        }
        double* const total = sum + column;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) total[j] += block_sum[j];
      }
    }
  }
}

// maximum + log(sum) = logsumexp_i of each column j, of x_ij * scale or, with offsets, of x_ij * scale + bias_j -
// offset_i. The maxima so far rise once for each block of rows. Without offsets they are of x itself, not of its
// logits, so that subtracting them is exact.
template <Offsets offsets, class T>
static void column_logsumexp_of(const Sinkhorn& p, int64_t begin, int64_t end, double* out_maximum, double* sum) {
  using W = wide<T>;
  const Scale<W> scale(p.scale);
  const W lowest = -std::numeric_limits<W>::infinity();
  constexpr bool raw = offsets == Offsets::none;
  const W per_unit = raw ? scale.high : W(1);  // logits for each unit of what the maxima are of
  std::vector<W> maxima(p.width, lowest);
  std::vector<W> shifts(block_width), partial(block_width), above(block_width), above_low(block_width);
  for (int64_t first = begin; first < end; first += block_rows) {
    const int64_t last = std::min(first + block_rows, end);
    for (int64_t column = 0; column < p.width; column += block_width) {
      const int64_t n = std::min(block_width, p.width - column);
      W* const maximum = maxima.data() + column;
      W* const shift = shifts.data();
      W* const block_sum = partial.data();
      double* const total = sum + column;
      Bias<W> bias = bias_of<W>(p);
      if (bias.high) bias.high += column;
      if (bias.low) bias.low += column;

      std::copy(maximum, maximum + n, shift);
      for (int64_t i = first; i < last; ++i) {
        const T* x = static_cast<const T*>(p.scores) + i * p.row_stride + column;
        const TwoParts<W> offset(raw ? 0.0 : p.offsets[i]);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const W v = column_value<offsets>(x, scale, bias, offset, j);
          shift[j] = v > shift[j] ? v : shift[j];
        }
      }
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const W risen = shift[j];
        shift[j] = to_finite(risen);
        total[j] *= exponential((to_finite(maximum[j]) - shift[j]) * per_unit);
        maximum[j] = risen;
        block_sum[j] = 0;
      }
      if constexpr (!raw) {  // bias - shift, in two parts: a maximum may be thousands, and what is near it counts
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          above[j] = bias.high[j] - shift[j];
          above_low[j] = rounding_error(bias.high[j], shift[j], above[j]) + (bias.low ? bias.low[j] : W(0));
        }
        bias = {above.data(), above_low.data()};
      }
      for (int64_t i = first; i < last; ++i) {
        const T* x = static_cast<const T*>(p.scores) + i * p.row_stride + column;
        const TwoParts<W> offset(raw ? 0.0 : p.offsets[i]);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const W v = column_value<offsets>(x, scale, bias, offset, j);
          block_sum[j] += exponential(raw ? (v - shift[j]) * per_unit : v);
        }
      }
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) total[j] += block_sum[j];
    }
  }
  for (int64_t j = 0; j < p.width; ++j) out_maximum[j] = raw ? maxima[j] * p.scale : maxima[j];
}

// sum_j += softmax(x_i * scale + bias)_j over the rows, and each row's logsumexp.
template <class T>
static void column_sums_of_softmax_of(const Sinkhorn& p, int64_t begin, int64_t end, double* sum) {
  using W = wide<T>;
  const int64_t k = p.width;
  BiasedSoftmax<W> softmax(k);
  std::vector<W> e(k);
  std::vector<W> partial(k, W(0));
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.scores) + i * p.row_stride;
    const double logsumexp = sample_softmax(p, x, softmax, e.data());
    constexpr double infinity = std::numeric_limits<double>::infinity();
    if (p.log_floors && logsumexp == -infinity && p.log_floors[i] > -infinity) {
      p.row_logsumexp[i] = p.log_floors[i];  // exponentials of nothing but -infinity, which the floor alone divides
    } else {
      // log(exp(logsumexp) + floor) - logsumexp, without an exponential above 1
      const double above = p.log_floors ? p.log_floors[i] - logsumexp : 0.0;
      const double beyond = p.log_floors ? std::max(above, 0.0) + std::log1p(std::exp(-std::abs(above))) : 0.0;
      p.row_logsumexp[i] = logsumexp + beyond;
      const W kept = static_cast<W>(std::exp(-beyond));
      for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
        const int64_t last = std::min(first + softmax_block, k);
        const W factor = softmax.factor[b] * kept;
#pragma omp simd
        for (int64_t j = first; j < last; ++j) partial[j] += e[j] * factor;
      }
    }
    if (ends_block_of_rows(i, begin, end)) add_block(partial.data(), k, sum);
  }
}

template <class T>
static void row_logsumexps_of(const Sinkhorn& p, int64_t begin, int64_t end) {
  BiasedSoftmax<wide<T>> softmax(p.width);
  std::vector<wide<T>> e(p.width);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.scores) + i * p.row_stride;
    p.row_logsumexp[i] = sample_softmax(p, x, softmax, e.data());
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
    softmax.no_softmax(sample_softmax(p, x, softmax, e.data()));
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
    if (!p.offsets) {
      column_logsumexp_of<Offsets::none, T>(p, begin, end, maximum, sum);
    } else if (std::all_of(p.offsets + begin, p.offsets + end, [](double x) { return std::isfinite(x); })) {
      column_logsumexp_of<Offsets::finite, T>(p, begin, end, maximum, sum);
    } else {
      column_logsumexp_of<Offsets::infinite, T>(p, begin, end, maximum, sum);
    }
  });
}

static void column_sums_of_softmax(const Sinkhorn& p, int64_t begin, int64_t end, double* sum) {
  with_dtype(p.dtype,
             [&](auto* x) { column_sums_of_softmax_of<std::remove_pointer_t<decltype(x)>>(p, begin, end, sum); });
}

static void row_logsumexps(const Sinkhorn& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) { row_logsumexps_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}

static void codes(const Sinkhorn& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) {
    with_dtype(p.code_dtype, [&](auto* code) {
      codes_of<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(code)>>(p, begin, end);
    });
  });
}
