// Rows [begin, end): the target's mean and variance first, then loss and gradient, from the cache.

// What a row's targets are taken as: (y - mean) * factor, or as they are.
template <class W>
struct Normalization {
  W mean = 0;
  W mean_low = 0;  // what the mean has lost by being rounded: it may be far larger than the differences from it
  W factor = 1;    // 1 / standard deviation

  FASTJEM_INLINE W operator()(W y) const { return ((y - mean) - mean_low) * factor; }
};

template <class T>
static Normalization<wide<T>> normalization_of(const T* y, int64_t d, double eps) {
  using W = wide<T>;
  double total = 0;
  for (int64_t block = 0; block < d; block += terms_per_block) {
    const int64_t stop = std::min(block + terms_per_block, d);
    double sum = 0;  // not W: a large mean has no digits to lose
#pragma omp simd reduction(+ : sum)
    for (int64_t j = block; j < stop; ++j) sum += static_cast<double>(widen(y[j]));
    total += sum;
  }
  const W mean = static_cast<W>(total / d);
  const W mean_low = static_cast<W>(total / d - mean);
  double squares = 0;
  for (int64_t block = 0; block < d; block += terms_per_block) {
    const int64_t stop = std::min(block + terms_per_block, d);
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = block; j < stop; ++j) {
      const W centred = (widen(y[j]) - mean) - mean_low;
      sum += centred * centred;
    }
    squares += sum;
  }
  return {mean, mean_low, static_cast<W>(1 / std::sqrt(squares / d + eps))};
}

// Squared errors where beta is 0, else smooth L1: error^2 / (2 beta) below beta, |error| - beta / 2 above.
template <class T>
static void regression_rows_of(const Regression& r, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t d = r.width;
  const W beta = static_cast<W>(r.beta);
  const W inverse = static_cast<W>(r.beta > 0 ? 1 / r.beta : 0);
  for (int64_t i = begin; i < end; ++i) {
    const double row_weight = r.weights ? r.weights[i] : 1;
    r.losses[i] = 0;
    if (row_weight == 0) continue;  // a row that only fills up: it may be any, and stand there twice
    const W weight = static_cast<W>(row_weight);
    const int64_t row = r.rows ? r.rows[i] : i;
    const T* x = static_cast<const T*>(r.prediction) + row * r.prediction_stride;
    const T* y = static_cast<const T*>(r.target) + row * r.target_stride;
    T* out = r.gradient ? static_cast<T*>(r.gradient) + row * d : nullptr;
    const Normalization<W> normalized = r.normalize ? normalization_of(y, d, r.eps) : Normalization<W>{};
    double loss = 0;
    for (int64_t block = 0; block < d; block += terms_per_block) {
      const int64_t stop = std::min(block + terms_per_block, d);
      W sum = 0;
      if (r.beta == 0) {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = block; j < stop; ++j) {
          const W error = widen(x[j]) - normalized(widen(y[j]));
          sum += error * error;
        }
        if (out) {
#pragma omp simd
          for (int64_t j = block; j < stop; ++j) narrow(weight * (2 * (widen(x[j]) - normalized(widen(y[j])))), out[j]);
        }
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = block; j < stop; ++j) {
          const W error = widen(x[j]) - normalized(widen(y[j]));
          const W size = std::abs(error);
          const W square = W(0.5) * error * error * inverse;
          const W linear = size - W(0.5) * beta;
          sum += size < beta ? square : linear;
        }
        if (out) {
#pragma omp simd
          for (int64_t j = block; j < stop; ++j) {
            const W error = widen(x[j]) - normalized(widen(y[j]));
            const W slope = error * inverse;
            const W sign = error < 0 ? W(-1) : W(1);
            narrow(weight * (std::abs(error) >= beta ? sign : slope), out[j]);  // NaN stays
          }
        }
      }
      loss += sum;
    }
    r.losses[i] = row_weight * loss;
  }
}

static void regression_rows(const Regression& r, int64_t begin, int64_t end) {
  with_dtype(r.dtype,
             [&](auto* element) { regression_rows_of<std::remove_pointer_t<decltype(element)>>(r, begin, end); });
}
