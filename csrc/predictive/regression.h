// Rows [begin, end): the target's mean and variance in one read, then loss and gradient in a second one, from cache.

template <class T>
static void regression_rows_of(const Regression& r, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t d = r.width;
  const W beta = static_cast<W>(r.beta), inverse = static_cast<W>(r.beta > 0 ? 1 / r.beta : 0);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(r.prediction) + i * r.prediction_stride;
    const T* y = static_cast<const T*>(r.target) + i * r.target_stride;
    T* out = r.gradient ? static_cast<T*>(r.gradient) + i * d : nullptr;
    W mean = 0, rest = 0, factor = 1;
    if (r.normalize) {
      double total = 0, squares = 0;
      for (int64_t block = 0; block < d; block += 1024) {
        const int64_t stop = std::min(block + 1024, d);
        double sum = 0;  // a large mean has no digits to lose
#pragma omp simd reduction(+ : sum)
        for (int64_t j = block; j < stop; ++j) sum += static_cast<double>(widen(y[j]));
        total += sum;
      }
      mean = static_cast<W>(total / d);
      rest = static_cast<W>(total / d - mean);
      for (int64_t block = 0; block < d; block += 1024) {
        const int64_t stop = std::min(block + 1024, d);
        W sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = block; j < stop; ++j) {
          const W centred = (widen(y[j]) - mean) - rest;
          sum += centred * centred;
        }
        squares += sum;
      }
      factor = static_cast<W>(1 / std::sqrt(squares / d + r.eps));
    }
    double loss = 0;
    for (int64_t block = 0; block < d; block += 1024) {
      const int64_t stop = std::min(block + 1024, d);
      W sum = 0;
      if (r.beta == 0) {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = block; j < stop; ++j) {
          const W error = widen(x[j]) - ((widen(y[j]) - mean) - rest) * factor;
          sum += error * error;
        }
        if (out) {
#pragma omp simd
          for (int64_t j = block; j < stop; ++j) {
            narrow(2 * (widen(x[j]) - ((widen(y[j]) - mean) - rest) * factor), out[j]);
          }
        }
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = block; j < stop; ++j) {
          const W error = widen(x[j]) - ((widen(y[j]) - mean) - rest) * factor;
          const W size = std::abs(error);
          const W square = W(0.5) * error * error * inverse, linear = size - W(0.5) * beta;
          sum += size < beta ? square : linear;
        }
        if (out) {
#pragma omp simd
          for (int64_t j = block; j < stop; ++j) {
            const W error = widen(x[j]) - ((widen(y[j]) - mean) - rest) * factor;
            const W linear = error * inverse, sign = error < 0 ? W(-1) : W(1);
            narrow(std::abs(error) >= beta ? sign : linear, out[j]);  // NaN stays
          }
        }
      }
      loss += sum;
    }
    r.losses[i] = loss;
  }
}

static void regression_rows(const Regression& r, int64_t begin, int64_t end) {
  with_dtype(r.dtype,
             [&](auto* element) { regression_rows_of<std::remove_pointer_t<decltype(element)>>(r, begin, end); });
}
