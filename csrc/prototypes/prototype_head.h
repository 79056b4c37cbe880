// A tile of logits [rows, n], n of all prototypes, between two matrix products: its part of the rows' logsumexp, or the
// loss and the gradient where it stands.

#include "prototypes/biased_softmax.h"

template <class W>
static void update_logsumexp_of(const LogSumExpTile& p, int64_t begin, int64_t end) {
  BiasedSoftmax<W> softmax(p.width);
  std::vector<W> e(p.width);
  for (int64_t i = begin; i < end; ++i) {
    const double here = softmax.row(static_cast<const W*>(p.logits) + i * p.width, Scale<W>(p.scale),
                                    Bias<W>{static_cast<const W*>(p.bias)}, p.width, e.data());
    const double before = p.logsumexp[i], maximum = before > here ? before : here;
    p.logsumexp[i] = before == here ? here + std::log(2.0) : maximum + std::log1p(std::exp(-std::abs(before - here)));
  }
}

// A logsumexp in two parts: rounded to float alone, a teacher's of 15 would change the sum of its probabilities, and
// with it the loss, by 5e-7 of itself.
template <class W>
struct Shift {
  W high, low;
  explicit Shift(double lse) : high(static_cast<W>(lse)), low(static_cast<W>(lse - static_cast<double>(high))) {}
  FASTJEM_INLINE W operator()(W logit) const { return logit - high - low; }
};

template <class W>
static void head_gradient_rows_of(const HeadGradient& p, int64_t begin, int64_t end) {
  const int64_t n = p.width, images = p.images;
  const Scale<W> scale(p.student_scale), teacher_scale(p.teacher_scale);
  std::vector<W> total(n), others(n);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t t = 0; t < p.teachers; ++t) {
      W* q = static_cast<W*>(p.teacher) + (t * images + i) * n;
      const W* bias = p.bias ? static_cast<const W*>(p.bias) + t * p.bias_stride : nullptr;
      const Shift<W> shift(p.teacher_logsumexp[t * images + i]);
      if (bias) {  // rounded as in the logsumexp, or its last digit would be in every probability
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          q[j] = exponential(shift(biased_logit<Biased::one_part>(q, teacher_scale, Bias<W>{bias}, j)));
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) q[j] = exponential(shift(teacher_scale(q[j])));
      }
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) total[j] = t ? total[j] + q[j] : q[j];
    }
    const double weight = p.weights ? p.weights[i] : 1.0;
    double loss = 0;
    for (int64_t s = 0; s < p.students; ++s) {
      const bool has_own = s < p.teachers;
      W* x = static_cast<W*>(p.student) + (s * images + i) * n;
      const W* y = total.data();
      double mass = static_cast<double>(p.teachers);
      if (p.pairs == Pairs::same) {
        y = static_cast<W*>(p.teacher) + (s * images + i) * n;
        mass = has_own ? 1 : 0;
      } else if (p.pairs == Pairs::different && has_own) {
        mass -= 1;
        std::fill(others.begin(), others.end(), W(0));
        for (int64_t t = 0; t < p.teachers; ++t) {
          if (t == s) continue;
          const W* q = static_cast<W*>(p.teacher) + (t * images + i) * n;
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) others[j] += q[j];
        }
        y = others.data();
      }
      if (mass == 0) {
        std::fill(x, x + n, W(0));
        continue;
      }
      const Shift<W> shift(p.student_logsumexp[s * images + i]);
      const W own = static_cast<W>(mass * weight), target = static_cast<W>(weight);
      for (int64_t first = 0; first < n; first += softmax_block) {
        const int64_t last = std::min(first + softmax_block, n);
        W b_loss = 0;
#pragma omp simd reduction(+ : b_loss)
        for (int64_t j = first; j < last; ++j) {
          const W log_p = shift(scale(x[j]));
          b_loss += y[j] * log_p;
          x[j] = exponential(log_p) * own - y[j] * target;
        }
        loss -= b_loss;
      }
    }
    p.losses[i] += loss * weight;
  }
}

static void update_logsumexp(const LogSumExpTile& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float64) {
    update_logsumexp_of<double>(p, begin, end);
  } else {
    update_logsumexp_of<float>(p, begin, end);
  }
}

static void head_gradient_rows(const HeadGradient& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float64) {
    head_gradient_rows_of<double>(p, begin, end);
  } else {
    head_gradient_rows_of<float>(p, begin, end);
  }
}
