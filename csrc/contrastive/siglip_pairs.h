// The sigmoid loss of pairs with targets between 0 and 1: (1 - t) softplus(x) + t softplus(-x), x a logit. With
// e = exp(-|x|) both are log1p(e), and |x| more for the one whose argument is positive. Values become the row's weight
// times the derivative by the logit; pairs that don't count have neither loss nor derivative.
template <class T>
static void siglip_pairs_of(const SiglipPairs& p, int64_t begin, int64_t end) {
  const T factor = static_cast<T>(p.factor);
  const T bias = static_cast<T>(p.bias);
  const T positive = static_cast<T>(p.positive);
  const T negative = static_cast<T>(p.negative);
  T target[terms_per_block];
  unsigned char counts[terms_per_block];
  for (int64_t i = begin; i < end; ++i) {
    T* row = static_cast<T*>(p.values) + i * p.stride;
    const T weight = p.weights ? static_cast<T>(p.weights[i]) : T(1);
    double loss = 0;
    double slope = 0;
    double dot = 0;
    for (int64_t first = 0; first < p.columns; first += terms_per_block) {
      const int64_t n = std::min(terms_per_block, p.columns - first);
      T* s = row + first;
      if (p.positives) {
        const unsigned char* mask = p.positives + i * p.mask_stride + first;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) target[j] = mask[j] ? positive : negative;
      } else {
        const int64_t partner = p.partner + i - first;
        if (p.row_ids) {
          const int64_t id = p.row_ids[i];
          const int64_t* ids = p.column_ids + first;
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) target[j] = ids[j] == id ? positive : negative;
        } else {
          std::fill(target, target + n, negative);
        }
        if (partner >= 0 && partner < n) target[partner] = positive;
      }
      if (p.exclude) {
        const unsigned char* mask = p.exclude + i * p.mask_stride + first;
        for (int64_t j = 0; j < n; ++j) counts[j] = !mask[j];
      } else {
        std::fill(counts, counts + n, static_cast<unsigned char>(1));
      }
      T block_loss = 0;
      T block_slope = 0;
      T block_dot = 0;
#pragma omp simd reduction(+ : block_loss, block_slope, block_dot)
      for (int64_t j = 0; j < n; ++j) {
        const T similarity = s[j];
        const T x = similarity * factor + bias;
        const T e = exponential(x < 0 ? x : -x);
        const T wrong = x > 0 ? 1 - target[j] : target[j];  // how much of the pair the logit's sign is wrong for
        const T size = x > 0 ? x : -x;
        const T up = (x > 0 ? T(1) : e) / (1 + e);
        const T down = (x > 0 ? e : T(1)) / (1 + e);
        const T pair = log1p_of_unit(e) + (wrong != 0 ? wrong * size : T(0));
        const T derivative = (1 - target[j]) * up - target[j] * down;
        const T g = counts[j] ? derivative * weight : T(0);
        block_loss += counts[j] ? pair : T(0);
        block_slope += g;
        block_dot += counts[j] ? g * similarity : T(0);
        s[j] = g;
      }
      loss += block_loss;
      slope += block_slope;
      dot += block_dot;
    }
    p.losses[i] += loss;
    p.sums[i] += slope;
    p.dots[i] += dot;
  }
}

static void siglip_pairs_rows(const SiglipPairs& p, int64_t begin, int64_t end) {
  with_wide_dtype(p.dtype, [&](auto* x) { siglip_pairs_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
