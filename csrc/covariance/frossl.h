// Columns [begin, end) of FroSSL: each view's at unit length, and the gradients through that.

#include "covariance/column_sums.h"
#include "covariance/unit_rows.h"

template <class T>
static void frossl_columns_of(const Frossl& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t d = p.width;
  const int64_t step = columns_at_a_time(p.rows);
  for (size_t v = 0; v < p.views.size(); ++v) {
    for (int64_t column = begin; column < end; column += step) {
      const int64_t width = std::min(step, end - column);
      const T* x = static_cast<const T*>(p.views[v]) + column;
      W* out = static_cast<W*>(p.columns) + v * p.rows * d + column;
      double squares[max_columns] = {};
      column_sums<double>(p.rows, width, squares, [&](int64_t i, int64_t j) {
        const double element = static_cast<double>(widen(x[i * d + j]));
        return element * element;
      });
      W inverse[max_columns];
      for (int64_t j = 0; j < width; ++j) {
        const double length = std::sqrt(squares[j]);
        const double divisor = length < unit_eps ? unit_eps : length;
        p.divisors[v * d + column + j] = divisor;
        inverse[j] = static_cast<W>(1 / divisor);
      }
      for (int64_t i = 0; i < p.rows; ++i) {
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) out[i * d + j] = widen(x[i * d + j]) * inverse[j];
      }
    }
  }
}

static void frossl_columns(const Frossl& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) { frossl_columns_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}

// total += sum_j x_j^2
template <class W>
static void add_squares(const W* x, int64_t n, double* total) {
  *total += dot_of_rows(x, x, n);
}

template <class T>
static void frossl_rows_of(const Frossl& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t d = p.width;
  const int64_t count = static_cast<int64_t>(p.views.size());
  const int64_t step = columns_at_a_time(p.rows);
  const W share = static_cast<W>(1.0 / count);
  std::vector<W> scratch(p.rows * step);
  W* mean = scratch.data();  // [rows, step], over views
  for (int64_t column = begin; column < end; column += step) {
    const int64_t width = std::min(step, end - column);
    for (int64_t i = 0; i < p.rows; ++i) {
      W* sum = mean + i * step;
      std::fill(sum, sum + width, W(0));
      for (int64_t v = 0; v < count; ++v) {
        const W* x = static_cast<const W*>(p.columns) + (v * p.rows + i) * d + column;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) sum[j] += x[j];
      }
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) sum[j] *= share;
    }
    double apart[max_columns] = {};
    const W of_centred = static_cast<W>(p.of_centred);
    for (int64_t v = 0; v < count; ++v) {
      const W* x = static_cast<const W*>(p.columns) + v * p.rows * d + column;
      column_sums<W>(p.rows, width, apart, [&](int64_t i, int64_t j) {
        const W centred = x[i * d + j] - mean[i * step + j];
        return centred * centred;
      });
      T* out = static_cast<T*>(p.gradients[v]);
      if (!out) continue;
      const W* product = static_cast<const W*>(p.product) + v * p.rows * d + column;
      const W of_product = static_cast<W>(p.of_product[v]);
      const auto gradient = [&](int64_t i, int64_t j) {  // for the columns at unit length
        return (x[i * d + j] - mean[i * step + j]) * of_centred + product[i * d + j] * of_product;
      };
      double dots[max_columns] = {};
      // In double: the gradient along the columns is most of it, and what is left of it counts.
      column_sums<double>(p.rows, width, dots, [&](int64_t i, int64_t j) {
        return static_cast<double>(gradient(i, j)) * static_cast<double>(x[i * d + j]);
      });
      W radial[max_columns];
      W inverse[max_columns];
      for (int64_t j = 0; j < width; ++j) {
        const double divisor = p.divisors[v * d + column + j];
        radial[j] = static_cast<W>(has_length(divisor) ? dots[j] : 0.0);
        inverse[j] = static_cast<W>(1 / divisor);
      }
      for (int64_t i = 0; i < p.rows; ++i) {
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) {
          narrow((gradient(i, j) - x[i * d + j] * radial[j]) * inverse[j], out[i * d + column + j]);
        }
      }
    }
    std::copy(apart, apart + width, p.apart + column);
  }
}

static void frossl_rows(const Frossl& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) { frossl_rows_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
