// Rows [begin, end): the target's mean and variance first, then loss and gradient, from the cache.

// What a row's targets are taken as: (y - mean) * factor, or as they are.
template <class W>
struct Normalization {
  W mean = 0;
  W mean_low = 0;  // what the mean has lost by being rounded: it may be far larger than the differences from it
  W factor = 1;    // 1 / standard deviation

  FASTJEM_INLINE W operator()(W y) const { return ((y - mean) - mean_low) * factor; }
};

// What a block of targets is summed in: a large mean has no digits to lose. A block of half-precision numbers near each
// other, of 11 bits at most, has an exact sum in float; double would take twice as long.
template <class T>
using TargetSum = std::conditional_t<sizeof(T) == 2, float, double>;

template <class T>
static Normalization<wide<T>> normalization_of(const T* y, int64_t d, double eps) {
  using W = wide<T>;
  double total = 0;
  for (int64_t block = 0; block < d; block += terms_per_block) {
    const int64_t stop = std::min(block + terms_per_block, d);
    TargetSum<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = block; j < stop; ++j) sum += static_cast<TargetSum<T>>(widen(y[j]));
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

// The sum of the squared errors of n elements, and their slopes times `scale`, unless `out` is null.
template <class T, class W>
FASTJEM_NOINLINE static W squared_errors(const T* x, const T* y, Normalization<W> normalized, int64_t n, W scale,
                                         T* out) {
  const W twice = 2 * scale;
  W sum = 0;
  if (out) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      const W error = widen(x[j]) - normalized(widen(y[j]));
      sum += error * error;
      narrow(error * twice, out[j]);
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      const W error = widen(x[j]) - normalized(widen(y[j]));
      sum += error * error;
    }
  }
  return sum;
}

// The same of smooth L1. With c the error cut off at -beta and beta, c / beta is the slope, and c (error - c / 2) /
// beta the loss: it needs no branch. NaN stays.
template <class T, class W>
FASTJEM_NOINLINE static W smooth_errors(const T* x, const T* y, Normalization<W> normalized, W beta, int64_t n, W scale,
                                        T* out) {
  const W inverse = 1 / beta;
  W sum = 0;
  if (out) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      const W error = widen(x[j]) - normalized(widen(y[j]));
      const W above = error < -beta ? -beta : error;
      const W slope = (above > beta ? beta : above) * inverse;
      sum += slope * (error - W(0.5) * beta * slope);
      narrow(slope * scale, out[j]);
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      const W error = widen(x[j]) - normalized(widen(y[j]));
      const W above = error < -beta ? -beta : error;
      const W slope = (above > beta ? beta : above) * inverse;
      sum += slope * (error - W(0.5) * beta * slope);
    }
  }
  return sum;
}

// Squared errors where beta is 0, else smooth L1: error^2 / (2 beta) below beta, |error| - beta / 2 above.
template <class T>
static void regression_rows_of(const Regression& r, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t d = r.width;
  const W beta = static_cast<W>(r.beta);
  for (int64_t i = begin; i < end; ++i) {
    const double row_weight = r.weights ? r.weights[i] : 1;
    r.losses[i] = 0;
    if (row_weight == 0) continue;  // a row that only fills up: it may be any, and stand there twice
    const W scale = static_cast<W>(row_weight * r.scale);
    const int64_t row = r.rows ? r.rows[i] : i;
    const T* x = static_cast<const T*>(r.prediction) + row * r.prediction_stride;
    const T* y = static_cast<const T*>(r.target) + row * r.target_stride;
    T* out = r.gradient ? static_cast<T*>(r.gradient) + row * d : nullptr;
    const Normalization<W> normalized = r.normalize ? normalization_of(y, d, r.eps) : Normalization<W>{};
    double loss = 0;
    for (int64_t block = 0; block < d; block += terms_per_block) {
      const int64_t n = std::min(terms_per_block, d - block);
      T* slopes = out ? out + block : nullptr;
      loss += r.beta == 0 ? squared_errors(x + block, y + block, normalized, n, scale, slopes)
                          : smooth_errors(x + block, y + block, normalized, beta, n, scale, slopes);
    }
    r.losses[i] = row_weight * loss;
  }
}

static void regression_rows(const Regression& r, int64_t begin, int64_t end) {
  with_dtype(r.dtype,
             [&](auto* element) { regression_rows_of<std::remove_pointer_t<decltype(element)>>(r, begin, end); });
}
