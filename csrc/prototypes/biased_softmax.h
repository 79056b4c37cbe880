// The softmax of a row of logits x * scale + bias in one read of it. Included by kernel headers inside their
// namespaces.
//
// A row is cut into blocks of 1024. A block's exponentials are taken against the block's own maximum, while it is still
// in the L1 cache, so nothing waits for the maximum of the whole row: what makes them the softmax is a factor for each
// block, known at the end.
//
// Two parts: some numbers are needed to more digits than float has (a potential of Sinkhorn's may be thousands, and
// nearly cancels with another; a scale rounded to float shifts a logit of 10 by its last digit). They come as
// high + low, of which `high` is the number rounded, and `low` what that has lost.
//
// Infinities: what is made of `low` is NaN where x * high is infinite. Scores of -infinity are common (masked classes)
// and cost one instruction an element. A row with any other infinity comes out as NaN, and is then computed again.

constexpr int64_t softmax_block = 1024;
constexpr int64_t sum_block = 256;  // of float sums: equal numbers all round the same way, by 4e-7 of their sum by now

template <class W>
struct TwoParts {
  W high, low;  // of doubles, low is 0
  explicit TwoParts(double x)
      : high(static_cast<W>(x)), low(std::isinf(high) ? W(0) : static_cast<W>(x - static_cast<double>(high))) {}
};

// 1 / temperature.
template <class W>
struct Scale : TwoParts<W> {
  using TwoParts<W>::TwoParts;
  FASTJEM_INLINE W operator()(W x) const {
    const W product = x * this->high;  // first, as GCC fuses the sum with the first product: this one's digits count
    const W low = not_minus_infinity(x) * this->low;
    return product + low;
  }
};

// What is added to each prototype's logits, in one part or in two.
template <class W>
struct Bias {
  const W* high = nullptr;  // [K], or null for none
  const W* low = nullptr;   // [K], or null for none
};

enum class Biased { no, one_part, two_parts };

// What the low parts are made of may be infinite: nothing (an infinity then gives NaN), scores of -infinity, anything.
enum class Infinite { nothing, minus, anything };

template <Infinite infinite, class W>
static FASTJEM_INLINE W without_infinities(W x) {
  if (infinite == Infinite::nothing) return x;
  return infinite == Infinite::minus ? not_minus_infinity(x) : to_finite(x);
}

// Logit j. Scale and bias nearly cancel where they are large, so their high parts are added first.
template <Biased biased, Infinite infinite = Infinite::minus, class T, class W>
static FASTJEM_INLINE W biased_logit(const T* x, Scale<W> scale, Bias<W> bias, int64_t j) {
  const W v = widen(x[j]);
  const W product = v * scale.high;  // first, as in `Scale`
  const W low = without_infinities<infinite>(v) * scale.low;
  if (biased == Biased::no) return product + low;
  const W high = product + bias.high[j];
  return biased == Biased::one_part ? high + low : high + (low + bias.low[j]);
}

// The largest logit of x[begin, end) that isn't NaN; -infinity of none. A function of its own, as GCC 12 leaves the
// loop without a bias scalar where it is inlined.
template <Biased biased, class T, class W>
FASTJEM_NOINLINE static W largest_logit(const T* x, Scale<W> scale, Bias<W> bias, int64_t begin, int64_t end) {
  W maximum = -std::numeric_limits<W>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t j = begin; j < end; ++j) {
    const W v = biased_logit<biased, Infinite::nothing>(x, scale, bias, j);
    maximum = v > maximum ? v : maximum;
  }
  return maximum;
}

// What rounding took from a - b where it came out as `difference` (Knuth's two-sum).
template <class W>
static FASTJEM_INLINE W rounding_error(W a, W b, W difference) {
  const W minus_b = difference - a;
  return (a - (difference - minus_b)) - (b + minus_b);
}

// The logit less shift + shift_low, for a bias in two parts. Bias and shift may be thousands and nearly cancel.
template <Infinite infinite = Infinite::minus, class T, class W>
static FASTJEM_INLINE W logit_above(const T* x, Scale<W> scale, Bias<W> bias, W shift, W shift_low, int64_t j) {
  const W v = widen(x[j]);
  const W difference = bias.high[j] - shift;
  const W high = v * scale.high + difference;
  const W low = bias.low[j] - shift_low + rounding_error(bias.high[j], shift, difference);
  const W both_low = without_infinities<infinite>(v) * scale.low + low;
  if (infinite != Infinite::anything) return high + both_low;
  return high + (std::abs(high) <= std::numeric_limits<W>::max() ? both_low : W(0));
}

template <class W>
struct BiasedSoftmax {
  std::vector<W> shift;     // [blocks], the maximum of each block; finite
  std::vector<double> sum;  // [blocks], of exp(logit - shift)
  std::vector<W> factor;    // [blocks], exp(shift - logsumexp)

  explicit BiasedSoftmax(int64_t k)
      : shift((k + softmax_block - 1) / softmax_block), sum(shift.size()), factor(shift.size()) {}

  // Sets the factors from shift and sum; returns the row's logsumexp. The softmax of a row that is -infinity
  // throughout, or that has +infinity somewhere, is NaN: see `no_softmax`.
  double finish() {
    double maximum = -std::numeric_limits<double>::infinity();
    for (size_t b = 0; b < shift.size(); ++b) {
      maximum = sum[b] > 0 && shift[b] > maximum ? static_cast<double>(shift[b]) : maximum;
    }
    double total = 0;
    for (size_t b = 0; b < shift.size(); ++b) total += sum[b] == 0 ? 0 : sum[b] * std::exp(shift[b] - maximum);
    const double logsumexp = maximum + std::log(total);
    for (size_t b = 0; b < shift.size(); ++b) factor[b] = static_cast<W>(std::exp(shift[b] - logsumexp));
    return logsumexp;
  }

  // A logsumexp as a softmax subtracts it: NaN where it is infinite, and all of the row's softmax with it.
  double no_softmax(double logsumexp) {
    if (!std::isinf(logsumexp)) return logsumexp;
    std::fill(factor.begin(), factor.end(), std::numeric_limits<W>::quiet_NaN());
    return std::numeric_limits<double>::quiet_NaN();
  }

  // Afterwards e[j] * factor[j / softmax_block] is the softmax; returns the logsumexp.
  template <class T>
  double row(const T* x, Scale<W> scale, Bias<W> bias, int64_t k, W* e) {
    const double logsumexp = row_if<Infinite::minus>(x, scale, bias, k, e);
    return std::isnan(logsumexp) ? row_if<Infinite::anything>(x, scale, bias, k, e) : logsumexp;
  }

  template <Infinite infinite, class T>
  double row_if(const T* x, Scale<W> scale, Bias<W> bias, int64_t k, W* e) {
    if (bias.low) return row_of<Biased::two_parts, infinite>(x, scale, bias, k, e);
    if (bias.high) return row_of<Biased::one_part, infinite>(x, scale, bias, k, e);
    return row_of<Biased::no, infinite>(x, scale, bias, k, e);
  }

  // e = exp(logit - shift); returns their sum.
  template <Biased biased, Infinite infinite, class T>
  static W exponentials(const T* x, Scale<W> scale, Bias<W> bias, W shift, int64_t begin, int64_t end, W* e) {
    W partial = 0;
#pragma omp simd reduction(+ : partial)
    for (int64_t j = begin; j < end; ++j) {
      const W v = biased == Biased::two_parts ? logit_above<infinite>(x, scale, bias, shift, W(0), j)
                                              : biased_logit<biased, infinite>(x, scale, bias, j) - shift;
      e[j] = exponential(v);
      partial += e[j];
    }
    return partial;
  }

  template <Biased biased, Infinite infinite, class T>
  double row_of(const T* x, Scale<W> scale, Bias<W> bias, int64_t k, W* e) {
    for (int64_t begin = 0, b = 0; begin < k; begin += softmax_block, ++b) {
      const int64_t end = std::min(begin + softmax_block, k);
      const W maximum = largest_logit<biased>(x, scale, bias, begin, end);
      const W block_shift = to_finite(maximum);
      shift[b] = block_shift;
      sum[b] = 0;
      for (int64_t first = begin; first < end; first += sum_block) {
        sum[b] +=
            exponentials<biased, infinite>(x, scale, bias, block_shift, first, std::min(first + sum_block, end), e);
      }
    }
    return finish();
  }
};
