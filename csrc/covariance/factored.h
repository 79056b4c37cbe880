// What losses do beside a Cholesky factorisation: a covariance before it, whitened rows behind it.

#include "covariance/column_sums.h"
#include "covariance/unit_rows.h"

// Rows [begin, end) of square matrices one below the other: x * scale + diagonal * I. `nothing` is 0 where all elements
// of a row are finite, else NaN.
template <class W>
static void shifted_rows(W* x, int64_t side, double scale, double diagonal, int64_t begin, int64_t end,
                         double* nothing) {
  const W factor = static_cast<W>(scale);
  for (int64_t i = begin; i < end; ++i) {
    W* row = x + i * side;
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < side; ++j) {
      row[j] *= factor;
      sum += row[j] - row[j];
    }
    row[i % side] += static_cast<W>(diagonal);
    nothing[i] = sum;
  }
}

template <class W>
static void mirror(W* x, int64_t side, W factor) {
  for (int64_t i = 0; i < side; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      x[i * side + j] *= factor;
      x[j * side + i] = x[i * side + j];
    }
  }
}

template <class W>
static void w_mse_rows_of(const Whitened& p, int64_t begin, int64_t end) {
  const int64_t d = p.width;
  for (int64_t i = begin; i < end; ++i) {
    const W* rows[2];
    double divisors[2];
    for (int side = 0; side < 2; ++side) {
      rows[side] = static_cast<const W*>(p.rows) + (side * p.count + i) * d;
      divisors[side] = divisor_of_row(rows[side], d);
    }
    const double cosine = dot_of_rows(rows[0], rows[1], d) / divisors[0] / divisors[1];
    p.cosines[i] = cosine;
    if (!p.gradient) continue;
    for (int side = 0; side < 2; ++side) {
      W* out = static_cast<W*>(p.gradient) + (side * p.count + i) * d;
      const W* own = rows[side];
      const W* other = rows[1 - side];
      const double radial = has_length(divisors[side]) ? cosine : 0.0;
      const W of_own = static_cast<W>(-radial / (divisors[side] * divisors[side]) * p.scale);
      const W of_other = static_cast<W>(1 / (divisors[0] * divisors[1]) * p.scale);
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) out[j] = other[j] * of_other + own[j] * of_own;
    }
  }
}

static void w_mse_rows(const Whitened& p, int64_t begin, int64_t end) {
  with_wide_dtype(p.dtype, [&](auto* x) { w_mse_rows_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}

template <class W>
static void w_mse_columns_of(const Whitened& p, int64_t begin, int64_t end) {
  const int64_t d = p.width;
  const int64_t step = columns_at_a_time(p.count);
  for (int side = 0; side < 2; ++side) {
    for (int64_t column = begin; column < end; column += step) {
      const int64_t width = std::min(step, end - column);
      W* gradient = static_cast<W*>(p.gradient) + side * p.count * d + column;
      double sums[max_columns] = {};
      column_sums<W>(p.count, width, sums, [&](int64_t i, int64_t j) { return gradient[i * d + j]; });
      W mean[max_columns];
      for (int64_t j = 0; j < width; ++j) mean[j] = static_cast<W>(sums[j] / p.count);
      for (int64_t i = 0; i < p.count; ++i) {
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) gradient[i * d + j] -= mean[j];
      }
    }
  }
}

static void w_mse_columns(const Whitened& p, int64_t begin, int64_t end) {
  with_wide_dtype(p.dtype, [&](auto* x) { w_mse_columns_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
