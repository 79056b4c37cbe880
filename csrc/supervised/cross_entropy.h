// Rows [begin, end) of the cross-entropy. A row's logits are read from memory once, and then from the cache.

// How far the logits are below the maximum, in the mean over the smoothed target; `below`: the label's is.
template <class T, class W>
static double smoothed(const T* x, int64_t k, W maximum, double below, double smoothing) {
  double sum = 0;
  for (int64_t block = 0; block < k; block += terms_per_block) {
    const int64_t stop = std::min(block + terms_per_block, k);
    W partial = 0;
#pragma omp simd reduction(+ : partial)
    for (int64_t j = block; j < stop; ++j) partial += maximum - widen(x[j]);
    sum += partial;
  }
  return (1 - smoothing) * below + smoothing * sum / k;
}

template <class T>
static void cross_entropy_rows_of(const CrossEntropy& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t k = p.classes;
  constexpr bool in_place = std::is_same<T, W>::value;  // exp(x - max) waits in the gradient, or in a row of its own
  std::vector<W> scratch(in_place && p.gradient ? 0 : k);

  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.logits) + i * p.row_stride;
    T* gradient = p.gradient ? static_cast<T*>(p.gradient) + i * k : nullptr;
    const int64_t label = p.labels[i];
    if (!p.counts(i)) {
      p.losses[i] = 0;
      if (gradient) std::memset(static_cast<void*>(gradient), 0, k * sizeof(T));
      continue;
    }
    W* e = in_place && gradient ? reinterpret_cast<W*>(gradient) : scratch.data();

    W maximum = -std::numeric_limits<W>::infinity();
#pragma omp simd reduction(max : maximum)
    for (int64_t j = 0; j < k; ++j) {
      const W v = widen(x[j]);
      maximum = v > maximum ? v : maximum;
    }
    double sum = 0;
    for (int64_t block = 0; block < k; block += terms_per_block) {
      const int64_t stop = std::min(block + terms_per_block, k);
      W partial = 0;
#pragma omp simd reduction(+ : partial)
      for (int64_t j = block; j < stop; ++j) {
        const W v = exponential(widen(x[j]) - maximum);
        e[j] = v;
        partial += v;
      }
      sum += partial;
    }
    const double below = static_cast<double>(maximum) - widen(x[label]);
    p.losses[i] = std::log(sum) + (p.smoothing ? smoothed(x, k, maximum, below, p.smoothing) : below);

    if (gradient) {
      if (p.weights) {
        const W weight = static_cast<W>(p.weights[i]);
        const W of_all = static_cast<W>(p.smoothing / k);  // the target's share of every class
        const W inverse = static_cast<W>(1 / sum);
        const W at_label = e[label] * inverse - of_all - static_cast<W>(1 - p.smoothing);
#pragma omp simd
        for (int64_t j = 0; j < k; ++j) narrow((e[j] * inverse - of_all) * weight, gradient[j]);
        narrow(at_label * weight, gradient[label]);
        continue;
      }
      const W inverse = static_cast<W>(p.scale / sum);
      const W at_label = e[label] * inverse - static_cast<W>(p.scale);
#pragma omp simd
      for (int64_t j = 0; j < k; ++j) narrow(e[j] * inverse, gradient[j]);
      narrow(at_label, gradient[label]);
    }
  }
}

static void cross_entropy_rows(const CrossEntropy& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype,
             [&](auto* element) { cross_entropy_rows_of<std::remove_pointer_t<decltype(element)>>(p, begin, end); });
}
