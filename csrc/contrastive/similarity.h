// What happens to a tile of similarities between two matrix products: in its place come exponentials, or the weights of
// a gradient. Unit rows before the first product, and the gradient through them after the last.

#include "contrastive/own_columns.h"

// Running: raises the row's maximum to the tile's, and rescales the sum of before. Returns the maximum as a pivot.
template <class T>
static FASTJEM_INLINE T raise_row_max(const SimilarityTile& t, const SimilaritySums& p, const T* s, T sign, int64_t i) {
  T maximum = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < t.columns; ++j) {
    const T x = s[j] * sign;
    maximum = x > maximum ? x : maximum;
  }
  const double before = p.row_max[i];
  const double now = std::max(before, static_cast<double>(maximum));
  const double rescale = before == now ? 1 : std::exp((before - now) * std::abs(t.factor));  // of -infinity: 0
  p.row_max[i] = now;
  p.row_sum[i] *= rescale;
  if (p.rescale) p.rescale[i] = rescale;
  return to_finite(static_cast<T>(now));
}

// The sum of exp(exponent(s)) over a row. Each may stay in the place of its s (`keep`), or be added to `column_sum`.
template <class T, class Exponent>
static FASTJEM_INLINE double sum_exponentials(T* s, int64_t n, bool keep, T* column_sum, Exponent exponent) {
  double sum = 0;
  for (int64_t block = 0; block < n; block += terms_per_block) {
    const int64_t stop = std::min(block + terms_per_block, n);
    T partial = 0;
    if (column_sum) {
#pragma omp simd reduction(+ : partial)
      for (int64_t j = block; j < stop; ++j) {
        const T e = exponential(exponent(s[j]));
        column_sum[j] += e;
        partial += e;
      }
    } else if (keep) {
#pragma omp simd reduction(+ : partial)
      for (int64_t j = block; j < stop; ++j) {
        const T e = exponential(exponent(s[j]));
        s[j] = e;
        partial += e;
      }
    } else {
#pragma omp simd reduction(+ : partial)
      for (int64_t j = block; j < stop; ++j) partial += exponential(exponent(s[j]));
    }
    sum += partial;
  }
  return sum;
}

// Rows [begin, end), and their share of the columns' sums, which is part number `part`. Running, the columns' sums need
// the columns' maxima, so they take a second pass. `lowest` is -infinity here, whose exponential is 0; in the weights
// below it is the lowest finite number.
template <class T>
static void similarity_sums_of(const SimilarityTile& t, const SimilaritySums& p, int64_t begin, int64_t end,
                               int64_t part) {
  const T factor = static_cast<T>(t.factor);
  const T shift = static_cast<T>(t.shift);
  const T sign = t.factor < 0 ? -1 : 1;
  const T scale = std::abs(factor);
  const T lowest = -std::numeric_limits<T>::infinity();
  double* column_total = p.column_parts ? p.column_parts + part * t.columns : nullptr;
  std::vector<T> column_sums(column_total ? t.columns : 0, T(0));
  T* column_sum = column_total ? column_sums.data() : nullptr;
  T* column_max = p.column_max_parts ? static_cast<T*>(p.column_max_parts) + part * t.columns : nullptr;
  if (column_max) std::fill(column_max, column_max + t.columns, lowest);

  for (int64_t i = begin; i < end; ++i) {
    T* s = static_cast<T*>(t.values) + i * t.stride;
    for_each_own_column(t, i, [&](int64_t j) { s[j] = factor < 0 ? -lowest : lowest; });
    if (t.running) {
      const T pivot = raise_row_max(t, p, s, sign, i);
      if (column_max) {
#pragma omp simd
        for (int64_t j = 0; j < t.columns; ++j) {
          const T x = s[j] * sign;
          column_max[j] = x > column_max[j] ? x : column_max[j];
        }
      }
      const auto exponent = [=](T x) { return (x * sign - pivot) * scale; };
      p.row_sum[i] += sum_exponentials(s, t.columns, p.keep, static_cast<T*>(nullptr), exponent);
    } else {
      p.row_sum[i] += sum_exponentials(s, t.columns, p.keep, column_sum, [=](T x) { return x * factor - shift; });
      if (column_sum && ends_block_of_rows(i, begin, end)) add_block(column_sum, t.columns, column_total);
    }
  }
  if (!column_max) return;
  std::vector<T> pivots(column_max, column_max + t.columns);
  for (T& pivot : pivots) pivot = to_finite(pivot);
  const T* pivot = pivots.data();
  for (int64_t i = begin; i < end; ++i) {
    const T* s = static_cast<const T*>(t.values) + i * t.stride;
#pragma omp simd
    for (int64_t j = 0; j < t.columns; ++j) {
      column_sum[j] += exponential((s[j] * sign - pivot[j]) * scale);
    }
    if (ends_block_of_rows(i, begin, end)) add_block(column_sum, t.columns, column_total);
  }
}

// s becomes its weights; returns the sum of weight * s.
template <class T, class Weight>
static FASTJEM_INLINE T weigh(T* s, int64_t n, Weight weight) {
  T dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < n; ++j) {
    const T w = weight(s[j], j);
    dot += w * s[j];
    s[j] = w;
  }
  return dot;
}

// exp(logit - lse_row) + exp(logit - lse_column), or the first alone: what softmax gives along rows and along columns.
template <class T>
static void similarity_weights_of(const SimilarityTile& t, const SimilarityWeights& p, int64_t begin, int64_t end) {
  const T factor = static_cast<T>(t.factor);
  const T shift = static_cast<T>(t.shift);
  const T* column = static_cast<const T*>(p.column);
  const T* column_rest = static_cast<const T*>(p.column_rest);
  const T lowest = std::numeric_limits<T>::lowest();  // not -infinity: its weight, 0, times it must be 0 in the dot
  for (int64_t i = begin; i < end; ++i) {
    T* s = static_cast<T*>(t.values) + i * t.stride;
    for_each_own_column(t, i, [&](int64_t j) { s[j] = factor < 0 ? -lowest : lowest; });
    const T row = static_cast<const T*>(p.row)[i];
    const T row_rest = t.running ? static_cast<const T*>(p.row_rest)[i] : T(1);
    const auto running_row = [=](T x, int64_t) { return exponential((x - row) * factor) * row_rest; };
    const auto running_both = [=](T x, int64_t j) {
      return exponential((x - row) * factor) * row_rest + exponential((x - column[j]) * factor) * column_rest[j];
    };
    const auto shifted_row = [=](T x, int64_t) { return exponential(x * factor - shift) * row; };
    const auto shifted_both = [=](T x, int64_t j) { return exponential(x * factor - shift) * (row + column[j]); };
    const T dot = t.running ? (column ? weigh(s, t.columns, running_both) : weigh(s, t.columns, running_row))
                            : (column ? weigh(s, t.columns, shifted_both) : weigh(s, t.columns, shifted_row));
    // Not by their value, which NaN in the row's or the column's log-sum-exp takes with it.
    for_each_own_column(t, i, [&](int64_t j) { s[j] = 0; });
    if (p.dots) p.dots[i] += dot;
  }
}

struct SigmoidSums {
  double loss = 0;
  double slope = 0;  // the loss's derivatives
  double dot = 0;    // derivative * value
};

// Columns [begin, end) of a row, none of them its partner. Values become derivatives.
template <class T>
static FASTJEM_INLINE void sigmoid_of_others(T* s, int64_t begin, int64_t end, T factor, T bias, SigmoidSums& sums) {
  for (int64_t block = begin; block < end; block += terms_per_block) {
    const int64_t stop = std::min(block + terms_per_block, end);
    T block_loss = 0;
    T block_slope = 0;
    T block_dot = 0;
#pragma omp simd reduction(+ : block_loss, block_slope, block_dot)
    for (int64_t j = block; j < stop; ++j) {  // softplus(x) = max(x, 0) + log1p(exp(-|x|)), and its derivative
      const T x = s[j] * factor + bias;
      const T e = exponential(x < 0 ? x : -x);
      block_loss += (x > 0 ? x : T(0)) + log1p_of_unit(e);
      const T g = (x > 0 ? T(1) : e) / (1 + e);
      block_slope += g;
      block_dot += g * s[j];
      s[j] = g;
    }
    sums.loss += block_loss;
    sums.slope += block_slope;
    sums.dot += block_dot;
  }
}

// The sigmoid loss of a tile, softplus(-logit) for a row's own partner and softplus(logit) for all others. Values
// become the loss's derivatives by the logits.
template <class T>
static void similarity_sigmoid_of(const SimilarityTile& t, const SimilaritySigmoid& p, int64_t begin, int64_t end) {
  const T factor = static_cast<T>(t.factor);
  const T bias = static_cast<T>(p.bias);
  for (int64_t i = begin; i < end; ++i) {
    T* s = static_cast<T*>(t.values) + i * t.stride;
    const int64_t partner = t.row_start + i + t.offset - t.column_start;
    SigmoidSums sums;
    if (partner >= 0 && partner < t.columns) {
      sigmoid_of_others(s, int64_t{0}, partner, factor, bias, sums);
      sigmoid_of_others(s, partner + 1, t.columns, factor, bias, sums);
      const T x = s[partner] * factor + bias;
      const T e = exponential(x < 0 ? x : -x);
      const T g = -(x > 0 ? e : T(1)) / (1 + e);
      sums.loss += (x > 0 ? T(0) : -x) + log1p_of_unit(e);
      sums.slope += g;
      sums.dot += g * s[partner];
      s[partner] = g;
    } else {
      sigmoid_of_others(s, int64_t{0}, t.columns, factor, bias, sums);
    }
    p.losses[i] += sums.loss;
    p.sums[i] += sums.slope;
    p.dots[i] += sums.dot;
  }
}

// The best column so far of each row, the lowest index among equals; NaN counts as the best, as in torch.argmax.
template <class T>
static void similarity_best_of(const SimilarityTile& t, const SimilarityBest& p, int64_t begin, int64_t end) {
  T* values = static_cast<T*>(p.values);
  for (int64_t i = begin; i < end; ++i) {
    const T* s = static_cast<const T*>(t.values) + i * t.stride;
    T best = -std::numeric_limits<T>::infinity();
    T zero = 0;
#pragma omp simd reduction(max : best) reduction(+ : zero)
    for (int64_t j = 0; j < t.columns; ++j) {
      best = s[j] > best ? s[j] : best;
      zero += s[j] - s[j];  // becomes NaN by a NaN or an infinity
    }
    if (zero != zero) {
      int64_t j = 0;
      while (j < t.columns && s[j] == s[j]) ++j;
      if (j < t.columns && values[i] == values[i]) {
        values[i] = s[j];
        p.columns[i] = t.column_start + j;
      }
      if (j < t.columns) continue;
    }
    if (best > values[i] || p.columns[i] < 0) {
      int64_t j = 0;
      while (s[j] != best) ++j;
      values[i] = best;
      p.columns[i] = t.column_start + j;
    }
  }
}

// Rows divided by max(norm, eps), wide; without `divisors` only widened.
template <class T>
static void unit_rows_of(const UnitRows& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.rows) + i * p.row_stride;
    W* out = static_cast<W*>(p.out) + i * p.width;
    W scale = 1;
    if (p.divisors) {
      double squares = 0;
      for (int64_t block = 0; block < p.width; block += terms_per_block) {
        const int64_t stop = std::min(block + terms_per_block, p.width);
        W partial = 0;
#pragma omp simd reduction(+ : partial)
        for (int64_t j = block; j < stop; ++j) partial += widen(x[j]) * widen(x[j]);
        squares += partial;
      }
      if (!(squares < 1e37 && squares > 1e-30)) {  // float squares may have left their range: again in double
        squares = 0;
        for (int64_t j = 0; j < p.width; ++j) squares += static_cast<double>(widen(x[j])) * widen(x[j]);
      }
      const double norm = std::sqrt(squares);
      const double divisor = norm < p.eps ? p.eps : norm;
      static_cast<double*>(p.divisors)[i] = divisor;
      scale = static_cast<W>(1 / divisor);
    }
#pragma omp simd
    for (int64_t j = 0; j < p.width; ++j) out[j] = widen(x[j]) * scale;
  }
}

// The gradient through x / max(||x||, eps): divided by the divisor, and without the part along x where that isn't eps.
// Without divisors it is only narrowed.
template <class T>
static void through_unit_rows_of(const ThroughUnitRows& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  for (int64_t i = begin; i < end; ++i) {
    const W* g = static_cast<const W*>(p.gradient) + i * p.width;
    T* out = static_cast<T*>(p.out) + i * p.width;
    W scale = 1;
    W radial = 0;
    const W* u = g;
    if (p.divisors) {
      u = static_cast<const W*>(p.unit) + i * p.width;
      if (p.divisors[i] > p.eps) {
        W dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < p.width; ++j) dot += g[j] * u[j];
        radial = dot;
      }
      scale = static_cast<W>(1 / p.divisors[i]);
    }
    scale *= static_cast<W>(p.factor);
#pragma omp simd
    for (int64_t j = 0; j < p.width; ++j) narrow((g[j] - radial * u[j]) * scale, out[j]);
  }
}

static void similarity_sums(const SimilarityTile& t, const SimilaritySums& p, int64_t begin, int64_t end,
                            int64_t part) {
  with_wide_dtype(t.dtype,
                  [&](auto* x) { similarity_sums_of<std::remove_pointer_t<decltype(x)>>(t, p, begin, end, part); });
}
static void similarity_weights(const SimilarityTile& t, const SimilarityWeights& p, int64_t begin, int64_t end) {
  with_wide_dtype(t.dtype,
                  [&](auto* x) { similarity_weights_of<std::remove_pointer_t<decltype(x)>>(t, p, begin, end); });
}
static void similarity_sigmoid(const SimilarityTile& t, const SimilaritySigmoid& p, int64_t begin, int64_t end) {
  with_wide_dtype(t.dtype,
                  [&](auto* x) { similarity_sigmoid_of<std::remove_pointer_t<decltype(x)>>(t, p, begin, end); });
}
static void similarity_best(const SimilarityTile& t, const SimilarityBest& p, int64_t begin, int64_t end) {
  with_wide_dtype(t.dtype, [&](auto* x) { similarity_best_of<std::remove_pointer_t<decltype(x)>>(t, p, begin, end); });
}
static void unit_rows(const UnitRows& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) { unit_rows_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
static void through_unit_rows(const ThroughUnitRows& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) { through_unit_rows_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
