// The softmax of rows: its sums over them, and the gradient through it of what has one slope for each prototype: p_j
// (slope_j - sum_k p_k slope_k).

#include "prototypes/biased_softmax.h"

// sums_j += the softmax of rows [begin, end).
template <class T>
static void softmax_sums_of(const SoftmaxSlope& p, int64_t begin, int64_t end, double* sums) {
  using W = wide<T>;
  const int64_t k = p.width;
  BiasedSoftmax<W> softmax(k);
  std::vector<W> e(k);
  std::vector<W> block(k);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.scores) + i * p.row_stride;
    softmax.no_softmax(softmax.row(x, Scale<W>(p.scale), Bias<W>{}, k, e.data()));
    for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
      const int64_t last = std::min(first + softmax_block, k);
      const W factor = softmax.factor[b];
#pragma omp simd
      for (int64_t j = first; j < last; ++j) block[j] += e[j] * factor;
    }
    if (ends_block_of_rows(i, begin, end)) add_block(block.data(), k, sums);
  }
}

static void softmax_sums(const SoftmaxSlope& p, int64_t begin, int64_t end, double* sums) {
  with_dtype(p.dtype, [&](auto* x) { softmax_sums_of<std::remove_pointer_t<decltype(x)>>(p, begin, end, sums); });
}

template <class T>
static void softmax_slope_of(const SoftmaxSlope& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t k = p.width;
  const W* slope = static_cast<const W*>(p.slope);
  BiasedSoftmax<W> softmax(k);
  std::vector<W> e(k);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.scores) + i * p.row_stride;
    softmax.no_softmax(softmax.row(x, Scale<W>(p.scale), Bias<W>{}, k, e.data()));
    double dot = 0;
    for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
      const int64_t last = std::min(first + softmax_block, k);
      W partial = 0;
#pragma omp simd reduction(+ : partial)
      for (int64_t j = first; j < last; ++j) partial += e[j] * slope[j];
      dot += static_cast<double>(partial) * softmax.factor[b];
    }
    const W mean = static_cast<W>(dot);
    T* gradient = static_cast<T*>(p.gradient) + i * k;
    for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
      const int64_t last = std::min(first + softmax_block, k);
      const W factor = static_cast<W>(softmax.factor[b] * p.factor);
#pragma omp simd
      for (int64_t j = first; j < last; ++j) narrow(e[j] * factor * (slope[j] - mean), gradient[j]);
    }
  }
}

static void softmax_slope(const SoftmaxSlope& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) { softmax_slope_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
