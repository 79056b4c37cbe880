// One Sinkhorn iteration over rows [begin, end), and the codes. One read of the scores each.

#include "biased_softmax.h"

template <class W>
static Bias<W> bias_of(const Sinkhorn& p) {
  return {static_cast<const W*>(p.bias), static_cast<const W*>(p.bias_low)};
}

template <bool offsets, class T, class W>
static FASTJEM_INLINE W column_value(const T* x, Scale<W> scale, Bias<W> bias, W offset, int64_t j) {
  if constexpr (!offsets) return widen(x[j]);
  if constexpr (std::is_same<W, double>::value) return biased_logit<Biased::one_part>(x, scale, bias, j) - offset;
  return biased_logit<Biased::two_parts>(x, scale, bias, j) - offset;
}

// maximum + log(sum) = logsumexp_i of each column j, of x_ij * scale or, with offsets, of x_ij * scale + bias_j - offset_i. Running
// maxima, raised once per 16 rows; without offsets they are of x itself, so that what is subtracted is exact.
template <bool offsets, class T>
static void column_logsumexp_of(const Sinkhorn& p, int64_t begin, int64_t end, double* out_maximum, double* sum) {
  using W = wide<T>;
  constexpr int64_t rows = 16, width = 4096;  // a block of them fits in the L2 cache
  const Scale<W> scale(p.scale);
  const W lowest = -std::numeric_limits<W>::infinity(), per_unit = offsets ? W(1) : scale.high;
  std::vector<W> maximum(p.width, lowest), shift(width), partial(width);
  for (int64_t first = begin; first < end; first += rows) {
    const int64_t last = std::min(first + rows, end);
    for (int64_t left = 0; left < p.width; left += width) {
      const int64_t n = std::min(width, p.width - left);
      W *const m = maximum.data() + left, *const to = shift.data(), *const b_sum = partial.data();
      double* const total = sum + left;
      Bias<W> bias = bias_of<W>(p);
      if (bias.high) bias.high += left;
      if (bias.low) bias.low += left;
      std::copy(m, m + n, to);
      for (int64_t i = first; i < last; ++i) {
        const T* x = static_cast<const T*>(p.scores) + i * p.row_stride + left;
        const W offset = offsets ? static_cast<W>(p.offsets[i]) : W(0);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const W v = column_value<offsets>(x, scale, bias, offset, j);
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
      for (int64_t i = first; i < last; ++i) {
        const T* x = static_cast<const T*>(p.scores) + i * p.row_stride + left;
        const W offset = offsets ? static_cast<W>(p.offsets[i]) : W(0);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) b_sum[j] += exponential((column_value<offsets>(x, scale, bias, offset, j) - to[j]) * per_unit);
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
    p.row_logsumexp[i] = softmax.row(x, Scale<W>(p.scale), bias_of<W>(p), k, e.data());
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
    softmax.row(x, Scale<W>(p.scale), bias_of<W>(p), k, e.data());
    for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
      const int64_t last = std::min(first + softmax_block, k);
      const W factor = softmax.factor[b];
#pragma omp simd
      for (int64_t j = first; j < last; ++j) narrow(e[j] * factor, out[j]);
    }
  }
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
  with_dtype(p.dtype, [&](auto* x) {
    column_sums_of_softmax_of<std::remove_pointer_t<decltype(x)>>(p, begin, end, sum);
  });
}

static void codes(const Sinkhorn& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) {
    with_dtype(p.code_dtype, [&](auto* code) {
      codes_of<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(code)>>(p, begin, end);
    });
  });
}
