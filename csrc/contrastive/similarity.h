// Tiles of similarities: what happens between two matrix products. A tile is the product of some rows with some
// candidates; here it becomes exponentials and their sums, or the weights of a gradient, in place.

template <class F>
static inline void with_compute_dtype(Dtype dtype, F&& f) {
  if (dtype == Dtype::float64) return f(static_cast<double*>(nullptr));
  f(static_cast<float*>(nullptr));
}

// Calls f(j) for each column of the tile that row i must not see: the other views of its image.
template <class F>
static inline void each_excluded(const SimilarityTile& t, int64_t i, F&& f) {
  if (t.columns_period == 0) return;
  const int64_t image = (t.row_start + i) % t.rows_period + t.offset;
  if (image < 0 || image >= t.columns_period) return;
  const int64_t before = t.column_start - image;  // the first column >= column_start that shows the image
  int64_t c = image + (before > 0 ? (before + t.columns_period - 1) / t.columns_period * t.columns_period : 0);
  for (; c < t.column_start + t.columns; c += t.columns_period) f(c - t.column_start);
}

static constexpr int64_t block_of_columns = 1024;  // float sums of so many, then double
static constexpr int64_t block_of_rows = 32;       // the same: what is below a float sum's last digit would be lost

// A state is (maximum, sum). Running, the maximum is of similarities (of their negatives, if the factor is negative),
// and the log-sum-exp seen so far is maximum * |factor| + log(sum): near similarities subtract exactly, where logits of
// several hundred have lost the digits that count. With a shift, all maxima are that shift, and it is shift + log(sum).
template <class T>
static void similarity_sums_of(const SimilarityTile& t, const SimilaritySums& p, int64_t begin, int64_t end,
                               int64_t part) {
  const T factor = static_cast<T>(t.factor), shift = static_cast<T>(t.shift);
  const T sign = t.factor < 0 ? -1 : 1, size = std::abs(factor);
  const double exact_size = std::abs(t.factor);
  const T lowest = -std::numeric_limits<T>::infinity();
  double* column_total = p.column_parts ? p.column_parts + part * t.columns : nullptr;
  std::vector<T> column_sums(column_total ? t.columns : 0, T(0));
  T* column_sum = column_total ? column_sums.data() : nullptr;
  const auto end_of_block = [&](int64_t i) {
    if ((i - begin) % block_of_rows != block_of_rows - 1 && i + 1 != end) return;
#pragma omp simd
    for (int64_t j = 0; j < t.columns; ++j) {
      column_total[j] += column_sum[j];
      column_sum[j] = 0;
    }
  };
  T* column_max = p.column_max_parts ? static_cast<T*>(p.column_max_parts) + part * t.columns : nullptr;
  if (column_max) std::fill(column_max, column_max + t.columns, lowest);

  for (int64_t i = begin; i < end; ++i) {
    T* s = static_cast<T*>(t.values) + i * t.stride;
    each_excluded(t, i, [&](int64_t j) { s[j] = factor < 0 ? -lowest : lowest; });
    T pivot = 0;
    if (t.running) {
      T maximum = lowest;
#pragma omp simd reduction(max : maximum)
      for (int64_t j = 0; j < t.columns; ++j) {
        const T x = s[j] * sign;
        maximum = x > maximum ? x : maximum;
      }
      if (column_max) {
#pragma omp simd
        for (int64_t j = 0; j < t.columns; ++j) {
          const T x = s[j] * sign;
          column_max[j] = x > column_max[j] ? x : column_max[j];
        }
      }
      const double before = p.row_max[i];
      const double now = std::max(before, static_cast<double>(maximum));
      const double rescale = before == now ? 1 : std::exp((before - now) * exact_size);  // of -inf: 0
      p.row_max[i] = now;
      p.row_sum[i] *= rescale;
      if (p.rescale) p.rescale[i] = rescale;
      pivot = now == -std::numeric_limits<double>::infinity() ? T(0) : static_cast<T>(now);
    }
    double sum = 0;
    for (int64_t block = 0; block < t.columns; block += block_of_columns) {
      const int64_t stop = std::min(block + block_of_columns, t.columns);
      T partial = 0;
      if (t.running && p.keep) {
#pragma omp simd reduction(+ : partial)
        for (int64_t j = block; j < stop; ++j) {
          const T e = exponential((s[j] * sign - pivot) * size);
          s[j] = e;
          partial += e;
        }
      } else if (t.running) {
#pragma omp simd reduction(+ : partial)
        for (int64_t j = block; j < stop; ++j) partial += exponential((s[j] * sign - pivot) * size);
      } else if (column_sum) {
#pragma omp simd reduction(+ : partial)
        for (int64_t j = block; j < stop; ++j) {
          const T e = exponential(s[j] * factor - shift);
          column_sum[j] += e;
          partial += e;
        }
      } else if (p.keep) {
#pragma omp simd reduction(+ : partial)
        for (int64_t j = block; j < stop; ++j) {
          const T e = exponential(s[j] * factor - shift);
          s[j] = e;
          partial += e;
        }
      } else {
#pragma omp simd reduction(+ : partial)
        for (int64_t j = block; j < stop; ++j) partial += exponential(s[j] * factor - shift);
      }
      sum += partial;
    }
    p.row_sum[i] += sum;
    if (column_sum && !column_max) end_of_block(i);
  }
  if (!column_max) return;
  for (int64_t i = begin; i < end; ++i) {  // the columns' own maxima are known now
    const T* s = static_cast<const T*>(t.values) + i * t.stride;
#pragma omp simd
    for (int64_t j = 0; j < t.columns; ++j) {
      const T pivot = column_max[j] == lowest ? T(0) : column_max[j];
      column_sum[j] += exponential((s[j] * sign - pivot) * size);
    }
    end_of_block(i);
  }
}

// s becomes its weights; returns the sum of weight * s.
template <class T, class Weight>
static FASTJEM_INLINE T weigh(T* s, int64_t n, Weight weight) {
  T dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < n; ++j) {
    const T g = weight(s[j], j);
    dot += g * s[j];
    s[j] = g;
  }
  return dot;
}

// exp(x - lse_row) + exp(x - lse_column), or one of them: what softmax gives, along rows and along columns.
template <class T>
static void similarity_weights_of(const SimilarityTile& t, const SimilarityWeights& p, int64_t begin, int64_t end) {
  const T factor = static_cast<T>(t.factor), shift = static_cast<T>(t.shift);
  const T* column = static_cast<const T*>(p.column);
  const T* column_rest = static_cast<const T*>(p.column_rest);
  for (int64_t i = begin; i < end; ++i) {
    T* s = static_cast<T*>(t.values) + i * t.stride;
    const T lowest = std::numeric_limits<T>::lowest();  // exp is 0, and finite: so is exp times this
    each_excluded(t, i, [&](int64_t j) { s[j] = factor < 0 ? -lowest : lowest; });
    const T row = static_cast<const T*>(p.row)[i];
    const T row_rest = t.running ? static_cast<const T*>(p.row_rest)[i] : T(1);
    // Running: row and column are log-sum-exps / factor, the rest is what rounding to T took from exp(-lse). Else they
    // are exp(shift - log-sum-exp).
    const auto along_row = [=](T x, int64_t) { return exponential((x - row) * factor) * row_rest; };
    const auto along_both = [=](T x, int64_t j) {
      return exponential((x - row) * factor) * row_rest + exponential((x - column[j]) * factor) * column_rest[j];
    };
    const auto shifted_row = [=](T x, int64_t) { return exponential(x * factor - shift) * row; };
    const auto shifted_both = [=](T x, int64_t j) { return exponential(x * factor - shift) * (row + column[j]); };
    const T dot = t.running ? (column ? weigh(s, t.columns, along_both) : weigh(s, t.columns, along_row))
                            : (column ? weigh(s, t.columns, shifted_both) : weigh(s, t.columns, shifted_row));
    if (p.dots) p.dots[i] += dot;
  }
}

// The sigmoid loss of a tile: values become d loss / d logit.
template <class T>
static void similarity_sigmoid_of(const SimilarityTile& t, const SimilaritySigmoid& p, int64_t begin, int64_t end) {
  const T factor = static_cast<T>(t.factor), bias = static_cast<T>(p.bias);
  for (int64_t i = begin; i < end; ++i) {
    T* s = static_cast<T*>(t.values) + i * t.stride;
    const int64_t own = t.row_start + i + t.offset - t.column_start;
    const bool paired = own >= 0 && own < t.columns;
    const T own_value = paired ? s[own] : T(0);
    double loss = 0, sum = 0, dot = 0;
    for (int64_t block = 0; block < t.columns; block += block_of_columns) {
      const int64_t stop = std::min(block + block_of_columns, t.columns);
      T log_sum = 0, block_sum = 0, block_dot = 0;
#pragma omp simd reduction(+ : log_sum, block_sum, block_dot)
      for (int64_t j = block; j < stop; ++j) {  // softplus(x) = max(x, 0) + log1p(exp(-|x|)), and its derivative
        const T x = s[j] * factor + bias;
        const T e = exponential(x < 0 ? x : -x);
        log_sum += (x > 0 ? x : T(0)) + log1p_of_unit(e);
        const T g = (x > 0 ? T(1) : e) / (1 + e);
        block_sum += g;
        block_dot += g * s[j];
        s[j] = g;
      }
      sum += block_sum;
      dot += block_dot;
      loss += log_sum;
    }
    if (paired) {  // softplus(-x) = softplus(x) - x
      const T x = own_value * factor + bias, e = exponential(x < 0 ? x : -x);
      const T negative = (x > 0 ? x : T(0)) + log1p_of_unit(e), positive = (x > 0 ? T(0) : -x) + log1p_of_unit(e);
      const T g = -(x > 0 ? e : T(1)) / (1 + e);
      loss += positive - static_cast<double>(negative);
      sum += g - s[own];
      dot += (g - s[own]) * own_value;
      s[own] = g;
    }
    p.losses[i] += loss;
    p.sums[i] += sum;
    p.dots[i] += dot;
  }
}

// The best column so far of each row, the lowest index among equals; NaN counts as the best, as in torch.argmax.
template <class T>
static void similarity_best_of(const SimilarityTile& t, const SimilarityBest& p, int64_t begin, int64_t end) {
  T* values = static_cast<T*>(p.values);
  for (int64_t i = begin; i < end; ++i) {
    const T* s = static_cast<const T*>(t.values) + i * t.stride;
    T best = -std::numeric_limits<T>::infinity();
    T nan = 0;
#pragma omp simd reduction(max : best) reduction(+ : nan)
    for (int64_t j = 0; j < t.columns; ++j) {
      best = s[j] > best ? s[j] : best;
      nan += s[j] - s[j];  // 0, or NaN for NaN and infinity
    }
    if (nan != nan) {
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

// Rows divided by max(norm, eps), in the compute dtype; without `divisors` only widened.
template <class T>
static void unit_rows_of(const UnitRows& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.rows) + i * p.row_stride;
    W* out = static_cast<W*>(p.out) + i * p.width;
    W scale = 1;
    if (p.divisors) {
      double squares = 0;
      for (int64_t block = 0; block < p.width; block += block_of_columns) {
        const int64_t stop = std::min(block + block_of_columns, p.width);
        W partial = 0;
#pragma omp simd reduction(+ : partial)
        for (int64_t j = block; j < stop; ++j) partial += widen(x[j]) * widen(x[j]);
        squares += partial;
      }
      if (!(squares < 1e37 && squares > 1e-30)) {  // float squares may have left their range
        squares = 0;
        for (int64_t j = 0; j < p.width; ++j) squares += static_cast<double>(widen(x[j])) * widen(x[j]);
      }
      const double norm = std::sqrt(squares), divisor = norm < p.eps ? p.eps : norm;
      static_cast<double*>(p.divisors)[i] = divisor;
      scale = static_cast<W>(1 / divisor);
    }
#pragma omp simd
    for (int64_t j = 0; j < p.width; ++j) out[j] = widen(x[j]) * scale;
  }
}

// The gradient through x / max(||x||, eps): without its radial part, except where eps is the divisor, over the divisor.
template <class T>
static void through_unit_rows_of(const ThroughUnitRows& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  for (int64_t i = begin; i < end; ++i) {
    const W* g = static_cast<const W*>(p.gradient) + i * p.width;
    T* out = static_cast<T*>(p.out) + i * p.width;
    W scale = 1, radial = 0;
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
  with_compute_dtype(t.dtype,
                     [&](auto* x) { similarity_sums_of<std::remove_pointer_t<decltype(x)>>(t, p, begin, end, part); });
}
static void similarity_weights(const SimilarityTile& t, const SimilarityWeights& p, int64_t begin, int64_t end) {
  with_compute_dtype(t.dtype,
                     [&](auto* x) { similarity_weights_of<std::remove_pointer_t<decltype(x)>>(t, p, begin, end); });
}
static void similarity_sigmoid(const SimilarityTile& t, const SimilaritySigmoid& p, int64_t begin, int64_t end) {
  with_compute_dtype(t.dtype,
                     [&](auto* x) { similarity_sigmoid_of<std::remove_pointer_t<decltype(x)>>(t, p, begin, end); });
}
static void similarity_best(const SimilarityTile& t, const SimilarityBest& p, int64_t begin, int64_t end) {
  with_compute_dtype(t.dtype,
                     [&](auto* x) { similarity_best_of<std::remove_pointer_t<decltype(x)>>(t, p, begin, end); });
}
static void unit_rows(const UnitRows& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) { unit_rows_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
static void through_unit_rows(const ThroughUnitRows& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) { through_unit_rows_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
