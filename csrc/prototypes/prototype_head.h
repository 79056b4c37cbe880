// A tile of logits [rows, n], of n of all prototypes, between two matrix products: first its part of the rows'
// logsumexps, then, when these are known, the loss and the gradient, which takes the place of the logits.

#include "prototypes/biased_softmax.h"
#include "prototypes/paired_targets.h"

template <class W>
static void update_logsumexp_of(const LogSumExpTile& p, int64_t begin, int64_t end) {
  BiasedSoftmax<W> softmax(p.width);
  std::vector<W> e(p.width);
  for (int64_t i = begin; i < end; ++i) {
    const W* logits = static_cast<const W*>(p.logits) + i * p.width;
    const Bias<W> bias{static_cast<const W*>(p.bias)};
    const double here = softmax.row(logits, Scale<W>(p.scale), bias, p.width, e.data());
    const double before = p.logsumexp[i];
    const double maximum = before > here ? before : here;
    p.logsumexp[i] = before == here ? here + std::log(2.0) : maximum + std::log1p(std::exp(-std::abs(before - here)));
  }
}

// A logsumexp to be subtracted: rounded to float alone, a teacher's of 15 would change the sum of its probabilities,
// and with it the loss, by 5e-7 of itself. An infinite one has no softmax: NaN.
template <class W>
struct Shift : TwoParts<W> {
  explicit Shift(double logsumexp)
      : TwoParts<W>(std::isinf(logsumexp) ? std::numeric_limits<double>::quiet_NaN() : logsumexp) {}
  FASTJEM_INLINE W operator()(W logit) const { return logit - this->high - this->low; }
};

// The n logits of a teacher's row become probabilities, rounded as in the logsumexp: any other rounding would be in the
// last digit of each of them.
template <class W>
static FASTJEM_INLINE void probabilities(W* q, Scale<W> scale, const W* bias, Shift<W> shift, int64_t n) {
  if (bias) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      q[j] = exponential(shift(biased_logit<Biased::one_part>(q, scale, Bias<W>{bias}, j)));
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) q[j] = exponential(shift(scale(q[j])));
  }
}

// The n logits of a student's row become (softmax * count - target's sum) * weight; `loss` is added to.
template <class W>
static FASTJEM_INLINE void student_gradient(W* x, Scale<W> scale, Shift<W> shift, Target<W> target, double weight,
                                            int64_t n, double& loss) {
  const W* y = target.sum;
  const W softmax_weight = static_cast<W>(target.count * weight);
  const W target_weight = static_cast<W>(weight);
  for (int64_t first = 0; first < n; first += softmax_block) {
    const int64_t last = std::min(first + softmax_block, n);
    W block_loss = 0;
#pragma omp simd reduction(+ : block_loss)
    for (int64_t j = first; j < last; ++j) {
      const W log_p = shift(scale(x[j]));
      block_loss += y[j] == 0 ? W(0) : y[j] * log_p;  // 0 times -infinity is 0: ruled out on both sides
      x[j] = exponential(log_p) * softmax_weight - y[j] * target_weight;
    }
    loss -= block_loss;
  }
}

template <class W>
static void head_gradient_rows_of(const HeadGradient& p, int64_t begin, int64_t end) {
  const int64_t n = p.width;
  const int64_t images = p.images;
  const Scale<W> scale(p.student_scale);
  const Scale<W> teacher_scale(p.teacher_scale);
  PairedTargets<W> targets(p.pairs, p.teachers, n);
  for (int64_t i = begin; i < end; ++i) {
    W* of_teacher = static_cast<W*>(p.teacher) + i * n;
    W* of_student = static_cast<W*>(p.student) + i * n;
    for (int64_t t = 0; t < p.teachers; ++t) {
      W* q = of_teacher + t * images * n;
      const W* bias = p.bias ? static_cast<const W*>(p.bias) + t * p.bias_stride : nullptr;
      probabilities(q, teacher_scale, bias, Shift<W>(p.teacher_logsumexp[t * images + i]), n);
      targets.add(q, t);
    }
    const double weight = p.weights ? p.weights[i] : 1.0;
    double loss = 0;
    for (int64_t s = 0; s < p.students; ++s) {
      W* x = of_student + s * images * n;
      const Target<W> target = targets.of(s, of_teacher, images * n);
      if (target.count > 0) {
        student_gradient(x, scale, Shift<W>(p.student_logsumexp[s * images + i]), target, weight, n, loss);
      } else {
        std::fill(x, x + n, W(0));
      }
    }
    p.losses[i] += loss * weight;
  }
}

static void update_logsumexp(const LogSumExpTile& p, int64_t begin, int64_t end) {
  with_wide_dtype(p.dtype, [&](auto* x) { update_logsumexp_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}

static void head_gradient_rows(const HeadGradient& p, int64_t begin, int64_t end) {
  with_wide_dtype(p.dtype, [&](auto* x) { head_gradient_rows_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
