// Softmax of a row in one read: exp is taken against the maximum of each block of 1024, which is still in the L1 cache,
// and what makes it the softmax is one factor a block. Included by kernel headers inside their namespaces.

constexpr int64_t softmax_block = 1024;
constexpr int64_t sum_block =
    256;  // float sums of so many, then double: alike numbers round alike, 4e-7 of their sum by now

// 1 / temperature in two parts: rounded to float alone, it would shift a logit of 10 by as much as its last digit.
template <class W>
struct Scale {
  W high, low;
  explicit Scale(double scale) : high(static_cast<W>(scale)), low(static_cast<W>(scale - static_cast<double>(high))) {}
  FASTJEM_INLINE W operator()(W x) const { return x * high + x * low; }
};

// What is added to each prototype's logits: one number, or (two_parts) high + low. A potential of Sinkhorn may be
// thousands, and what it nearly cancels with is known to the last digit.
template <class W>
struct Bias {
  const W* high = nullptr;  // [K], or null for none
  const W* low = nullptr;   // [K], or null for none
};

enum class Biased { no, one_part, two_parts };

template <Biased biased, class T, class W>
static FASTJEM_INLINE W biased_logit(const T* x, Scale<W> scale, Bias<W> bias, int64_t j) {
  const W v = widen(x[j]);
  if (biased == Biased::no) return scale(v);
  const W large = v * scale.high + bias.high[j];  // first, as these cancel
  return biased == Biased::one_part ? large + v * scale.low : large + (v * scale.low + bias.low[j]);
}

// The largest logit of x[begin, end); -inf of none. The unbiased one is scalar where GCC 12 inlines it.
template <Biased biased, class T, class W>
FASTJEM_NOINLINE static W largest_logit(const T* x, Scale<W> scale, Bias<W> bias, int64_t begin, int64_t end) {
  W maximum = -std::numeric_limits<W>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t j = begin; j < end; ++j) {
    const W v = biased_logit<biased>(x, scale, bias, j);
    maximum = v > maximum ? v : maximum;
  }
  return maximum;
}

// What a - b has lost, if it came out as `difference`.
template <class W>
static FASTJEM_INLINE W lost(W a, W b, W difference) {
  const W minus_b = difference - a;
  return (a - (difference - minus_b)) - (b + minus_b);
}

// biased_logit - shift - shift_low. Bias and shift may be thousands and nearly cancel: what their difference loses is
// added again.
template <class T, class W>
static FASTJEM_INLINE W logit_above(const T* x, Scale<W> scale, Bias<W> bias, W shift, W shift_low, int64_t j) {
  const W v = widen(x[j]), difference = bias.high[j] - shift;
  const W low = bias.low[j] - shift_low + lost(bias.high[j], shift, difference);
  return (v * scale.high + difference) + (v * scale.low + low);
}

template <class W>
struct BiasedSoftmax {
  std::vector<W> shift;     // [blocks], the maximum of each block; 0 where all is -inf
  std::vector<double> sum;  // [blocks]
  std::vector<W> factor;    // [blocks], exp(shift - logsumexp)

  explicit BiasedSoftmax(int64_t k)
      : shift((k + softmax_block - 1) / softmax_block), sum(shift.size()), factor(shift.size()) {}

  // From shift and sum: the factors. Returns the logsumexp of the row.
  double finish() {
    double maximum = -std::numeric_limits<double>::infinity(), total = 0;
    for (size_t b = 0; b < shift.size(); ++b) {
      maximum = sum[b] > 0 && shift[b] > maximum ? static_cast<double>(shift[b]) : maximum;
    }
    for (size_t b = 0; b < shift.size(); ++b) total += sum[b] == 0 ? 0 : sum[b] * std::exp(shift[b] - maximum);
    const double lse = maximum + std::log(total);
    for (size_t b = 0; b < shift.size(); ++b) factor[b] = static_cast<W>(std::exp(shift[b] - lse));
    return lse;
  }

  // e[j] * factor[j / 1024] = softmax(x * scale + bias); returns the logsumexp.
  template <class T>
  double row(const T* x, Scale<W> scale, Bias<W> bias, int64_t k, W* e) {
    if (bias.low) return row_of<Biased::two_parts>(x, scale, bias, k, e);
    return bias.high ? row_of<Biased::one_part>(x, scale, bias, k, e) : row_of<Biased::no>(x, scale, bias, k, e);
  }

  // e = exp(logit - shift) and its sum.
  template <Biased biased, class T>
  static W exponentials(const T* x, Scale<W> scale, Bias<W> bias, W shifted, int64_t begin, int64_t end, W* e) {
    W partial = 0;
#pragma omp simd reduction(+ : partial)
    for (int64_t j = begin; j < end; ++j) {
      const W v = biased == Biased::two_parts ? logit_above(x, scale, bias, shifted, W(0), j)
                                              : biased_logit<biased>(x, scale, bias, j) - shifted;
      e[j] = exponential(v);
      partial += e[j];
    }
    return partial;
  }

  template <Biased biased, class T>
  double row_of(const T* x, Scale<W> scale, Bias<W> bias, int64_t k, W* e) {
    for (int64_t begin = 0, b = 0; begin < k; begin += softmax_block, ++b) {
      const int64_t end = std::min(begin + softmax_block, k);
      const W maximum = largest_logit<biased>(x, scale, bias, begin, end);
      const W shifted = maximum == -std::numeric_limits<W>::infinity() ? W(0) : maximum;
      shift[b] = shifted;
      sum[b] = 0;
      for (int64_t first = begin; first < end; first += sum_block) {
        sum[b] += exponentials<biased>(x, scale, bias, shifted, first, std::min(first + sum_block, end), e);
      }
    }
    return finish();
  }
};
