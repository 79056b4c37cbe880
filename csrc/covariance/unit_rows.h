// Rows of unit length. Included by kernel headers inside their namespaces.

static constexpr double unit_eps = 1e-12;  // kernels/arithmetic.py: UNIT_EPS

// <x, y> of rows of d elements.
template <class X, class Y>
static inline double dot_of_rows(const X* x, const Y* y, int64_t d) {
  double total = 0;
  for (int64_t block = 0; block < d; block += terms_per_block) {
    const int64_t stop = std::min(block + terms_per_block, d);
    wide<X> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = block; j < stop; ++j) sum += widen(x[j]) * widen(y[j]);
    total += sum;
  }
  return total;
}

// What a row is divided by: its length, but not less than eps. NaN stays.
template <class T>
static inline double divisor_of_row(const T* x, int64_t d) {
  const double length = std::sqrt(dot_of_rows(x, x, d));
  return length < unit_eps ? unit_eps : length;
}

template <class T>
static inline void unit_row(const T* x, double divisor, int64_t d, wide<T>* out) {
  const wide<T> inverse = static_cast<wide<T>>(1 / divisor);
#pragma omp simd
  for (int64_t j = 0; j < d; ++j) out[j] = widen(x[j]) * inverse;
}

// Whether a gradient must lose what it has along its row: not where eps was the divisor.
static inline bool has_length(double divisor) { return !(divisor <= unit_eps); }
