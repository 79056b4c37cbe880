// Rows [begin, end) of a tile that holds all similarities of a loss: their range, their exponentials and sums, and,
// once all sums are known, the gradient's weights. Each exponential is computed once.

// Also the logit with the partner, in double: a small loss is what it and the log-sum-exp leave of each other.
template <class T>
static void one_tile_range_of(const OneTile& t, const OneTileSums& sums, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* s = static_cast<T*>(t.values) + i * t.n;
    const int64_t partner = t.partner_of(i);
    s[i] = s[partner];  // where a row meets itself, if it does, nothing is seen
    T least = std::numeric_limits<T>::infinity();
    T largest = -least;
#pragma omp simd reduction(min : least) reduction(max : largest)
    for (int64_t j = 0; j < t.n; ++j) {
      least = s[j] < least ? s[j] : least;
      largest = s[j] > largest ? s[j] : largest;
    }
    sums.least[i] = least;
    sums.largest[i] = largest;

    const T* x = static_cast<const T*>(t.rows) + i * t.width;
    const T* y = static_cast<const T*>(t.columns) + partner * t.width;
    double dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < t.width; ++d) dot += static_cast<double>(x[d]) * static_cast<double>(y[d]);
    sums.positives[i] = dot * t.factor;
  }
}

template <class T>
static void one_tile_exponentials_of(const OneTile& t, const OneTileSums& sums, int64_t begin, int64_t end,
                                     int64_t part) {
  const T factor = static_cast<T>(t.factor);
  const T shift = static_cast<T>(t.shift);
  double* column_total = sums.column_parts ? sums.column_parts + part * t.n : nullptr;
  std::vector<T> column_sums(column_total ? t.n : 0, T(0));
  T* column_sum = column_sums.data();
  for (int64_t i = begin; i < end; ++i) {
    T* s = static_cast<T*>(t.values) + i * t.n;
    const T unseen = std::numeric_limits<T>::infinity() * (factor < 0 ? 1 : -1);
    s[t.partner_of(i)] = unseen;
    s[i] = unseen;
    double sum = 0;
    for (int64_t block = 0; block < t.n; block += terms_per_block) {
      const int64_t stop = std::min(block + terms_per_block, t.n);
      T partial = 0;
      if (column_total) {
#pragma omp simd reduction(+ : partial)
        for (int64_t j = block; j < stop; ++j) {
          const T e = exponential(s[j] * factor - shift);
          s[j] = e;
          partial += e;
          column_sum[j] += e;
        }
      } else {
#pragma omp simd reduction(+ : partial)
        for (int64_t j = block; j < stop; ++j) {
          const T e = exponential(s[j] * factor - shift);
          s[j] = e;
          partial += e;
        }
      }
      sum += partial;
    }
    sums.row_sums[i] = sum;
    if (column_total && ends_block_of_rows(i, begin, end)) add_block(column_sum, t.n, column_total);
  }
}

// exp(logit - lse of the row) + exp(logit - lse of the column), and 2 less for the partner.
template <class T>
static void one_tile_weights_of(const OneTile& t, const OneTileSums& sums, int64_t begin, int64_t end) {
  std::vector<T> inverses(t.n);
  T* column = inverses.data();
  for (int64_t j = 0; j < t.n; ++j) column[j] = static_cast<T>(1 / sums.column_sums[j]);
  for (int64_t i = begin; i < end; ++i) {
    T* s = static_cast<T*>(t.values) + i * t.n;
    const T row = static_cast<T>(1 / sums.row_sums[i]);
#pragma omp simd
    for (int64_t j = 0; j < t.n; ++j) s[j] *= row + column[j];
    const int64_t partner = t.partner_of(i);
    const double logit = sums.positives[i] - t.shift;
    const double weight =
        std::expm1(logit - std::log(sums.row_sums[i])) + std::expm1(logit - std::log(sums.column_sums[partner]));
    s[partner] = static_cast<T>(t.decoupled ? -2 : weight);
  }
}

static void one_tile_range(const OneTile& t, const OneTileSums& sums, int64_t begin, int64_t end) {
  with_wide_dtype(t.dtype,
                  [&](auto* x) { one_tile_range_of<std::remove_pointer_t<decltype(x)>>(t, sums, begin, end); });
}
static void one_tile_exponentials(const OneTile& t, const OneTileSums& sums, int64_t begin, int64_t end, int64_t part) {
  with_wide_dtype(t.dtype, [&](auto* x) {
    one_tile_exponentials_of<std::remove_pointer_t<decltype(x)>>(t, sums, begin, end, part);
  });
}
static void one_tile_weights(const OneTile& t, const OneTileSums& sums, int64_t begin, int64_t end) {
  with_wide_dtype(t.dtype,
                  [&](auto* x) { one_tile_weights_of<std::remove_pointer_t<decltype(x)>>(t, sums, begin, end); });
}
