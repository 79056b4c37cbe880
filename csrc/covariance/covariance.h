// Columns [begin, end) of a matrix, or rows of it: what Barlow Twins and VICReg do besides matrix products.

#include "covariance/column_sums.h"

// A block of columns is copied into dense memory first: in rows that lie a power of two apart, they would share a few
// lines of the cache.
template <class T>
static void standardise_of(const Standardise& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t step = columns_at_a_time(p.rows);
  std::vector<W> scratch(p.rows * step);
  W* block = scratch.data();
  for (int64_t column = begin; column < end; column += step) {
    const int64_t width = std::min(step, end - column);
    const T* x = static_cast<const T*>(p.x) + column;
    W* out = static_cast<W*>(p.out) + column;

    // The mean is summed in double and kept in two parts: it may be far larger than what is left of a column without
    // it.
    double mean[max_columns] = {};
    column_sums<double>(p.rows, width, mean, [&](int64_t i, int64_t j) {
      const W element = widen(x[i * p.stride + j]);
      block[i * step + j] = element;
      return static_cast<double>(element);
    });
    W high[max_columns];
    W low[max_columns];
    for (int64_t j = 0; j < width; ++j) {
      mean[j] /= p.rows;
      high[j] = static_cast<W>(mean[j]);
      low[j] = static_cast<W>(mean[j] - high[j]);
    }
    double squares[max_columns] = {};
    column_sums<W>(p.rows, width, squares, [&](int64_t i, int64_t j) {
      const W centred = (block[i * step + j] - high[j]) - low[j];
      block[i * step + j] = centred;
      return centred * centred;
    });
    W factor[max_columns];
    for (int64_t j = 0; j < width; ++j) {
      p.std[column + j] = std::sqrt(squares[j] / p.divisor + p.eps);
      factor[j] = static_cast<W>(p.divide ? 1 / p.std[column + j] : 1.0);
    }
    for (int64_t i = 0; i < p.rows; ++i) {
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) out[i * p.width + j] = block[i * step + j] * factor[j];
    }
    if (p.other) {
      const W* other = static_cast<const W*>(p.other) + column;
      double dots[max_columns] = {};
      column_sums<W>(p.rows, width, dots,
                     [&](int64_t i, int64_t j) { return block[i * step + j] * factor[j] * other[i * p.width + j]; });
      for (int64_t j = 0; j < width; ++j) p.dots[column + j] = dots[j];
    }
  }
}

static void standardise_columns(const Standardise& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* element) { standardise_of<std::remove_pointer_t<decltype(element)>>(p, begin, end); });
}

// g = product * factor + other * weights, then back through the standardisation: (g - own mean(g own)) / std * scale.
// The columns of product and other are centred, so g has no mean to take off.
template <class T>
static void through_standardise_of(const ThroughStandardise& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t step = columns_at_a_time(p.rows);
  for (int64_t column = begin; column < end; column += step) {
    const int64_t width = std::min(step, end - column);
    const W* product = static_cast<const W*>(p.product) + column;
    const W* own = static_cast<const W*>(p.own) + column;
    const W* other = static_cast<const W*>(p.other) + column;
    T* out = static_cast<T*>(p.out) + column;
    double dots[max_columns] = {};
    if (p.dots) {
      std::copy(p.dots + column, p.dots + column + width, dots);
    } else {
      column_sums<W>(p.rows, width, dots,
                     [&](int64_t i, int64_t j) { return product[i * p.width + j] * own[i * p.width + j]; });
    }
    W of_product[max_columns];
    W of_other[max_columns];
    W of_own[max_columns];
    for (int64_t j = 0; j < width; ++j) {
      const double weight = p.weights[column + j];
      const double inverse = p.scale / p.std[column + j];
      of_product[j] = static_cast<W>(p.factor * inverse);
      of_other[j] = static_cast<W>(weight * inverse);
      of_own[j] = static_cast<W>((p.factor * dots[j] / p.rows + weight * p.diagonal[column + j]) * inverse);
    }
    for (int64_t i = 0; i < p.rows; ++i) {
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        const int64_t k = i * p.width + j;
        narrow(product[k] * of_product[j] + other[k] * of_other[j] - own[k] * of_own[j], out[k]);
      }
    }
  }
}

static void through_standardise_columns(const ThroughStandardise& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype,
             [&](auto* element) { through_standardise_of<std::remove_pointer_t<decltype(element)>>(p, begin, end); });
}

// Rows: the squared distances, and the gradients centred * weights + product * factor + invariance * (x - y) of view 0,
// and with - invariance of view 1.
template <class T>
static void vicreg_rows_of(const VicregRows& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t d = p.width;
  std::vector<W> weights_of[2];  // in W
  for (int side = 0; side < 2; ++side) {
    if (p.out[side]) weights_of[side].assign(p.weights[side], p.weights[side] + d);
  }
  const W factor = static_cast<W>(p.factor);
  const W invariance = static_cast<W>(p.invariance);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.x) + i * p.x_stride;
    const T* y = static_cast<const T*>(p.y) + i * p.y_stride;
    double total = 0;
    for (int64_t block = 0; block < d; block += terms_per_block) {
      const int64_t stop = std::min(block + terms_per_block, d);
      W sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = block; j < stop; ++j) {
        const W difference = widen(x[j]) - widen(y[j]);
        sum += difference * difference;
      }
      total += sum;
      for (int side = 0; side < 2; ++side) {
        if (!p.out[side]) continue;
        const W sign = side ? -invariance : invariance;
        const W* weights = weights_of[side].data();
        const W* centred = static_cast<const W*>(p.centred[side]) + i * d;
        const W* product = static_cast<const W*>(p.product[side]) + i * d;
        T* out = static_cast<T*>(p.out[side]) + i * d;
#pragma omp simd
        for (int64_t j = block; j < stop; ++j) {
          narrow(centred[j] * weights[j] + product[j] * factor + sign * (widen(x[j]) - widen(y[j])), out[j]);
        }
      }
    }
    p.distances[i] = total;
  }
}

static void vicreg_rows(const VicregRows& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* element) { vicreg_rows_of<std::remove_pointer_t<decltype(element)>>(p, begin, end); });
}

template <class W>
static double dot_of(const W* x, const W* y, int64_t begin, int64_t end) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = begin; j < end; ++j) total += static_cast<double>(x[j]) * static_cast<double>(y[j]);
  return total;
}

static void dot_range(const Dot& p, int64_t begin, int64_t end, double* total) {
  *total = p.dtype == Dtype::float64
               ? dot_of(static_cast<const double*>(p.x), static_cast<const double*>(p.y), begin, end)
               : dot_of(static_cast<const float*>(p.x), static_cast<const float*>(p.y), begin, end);
}

template <class W>
static void correlation_of(const Correlation& p, int64_t begin, int64_t end, double* columns) {
  for (int64_t i = begin; i < end; ++i) {
    const W* x = static_cast<const W*>(p.cross) + i * p.width;
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < p.width; ++j) {
      const double square = static_cast<double>(x[j]) * static_cast<double>(x[j]);
      columns[j] += square;
      total += square;
    }
    p.row_squares[i] = total;
  }
}

static void correlation_rows(const Correlation& p, int64_t begin, int64_t end, int64_t part) {
  double* columns = p.column_squares + part * p.width;
  with_wide_dtype(p.dtype, [&](auto* element) {
    correlation_of<std::remove_pointer_t<decltype(element)>>(p, begin, end, columns);
  });
}
