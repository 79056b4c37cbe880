// The cross-entropy of a student's views with the targets of a teacher's, image by image: each of the teacher's rows
// becomes its softmax once, for all rows of the student that it is paired with, and each of these is read once from
// memory.

#include "prototypes/biased_softmax.h"
#include "prototypes/paired_targets.h"

template <class W>
struct BlockSums {
  W exponentials, y, y_v;
};

// e = exp(v), v = x * scale - shift; returns the sums of e, y and y v.
template <class S, class W>
FASTJEM_NOINLINE static BlockSums<W> student_block(const S* x, Scale<W> scale, W shift, const W* y, int64_t n, W* e) {
  W sum = 0;
  W y_sum = 0;
  W y_v_sum = 0;
#pragma omp simd reduction(+ : sum, y_sum, y_v_sum)
  for (int64_t j = 0; j < n; ++j) {
    const W v = scale(widen(x[j])) - shift;
    const W exp_v = exponential(v);
    e[j] = exp_v;
    sum += exp_v;
    y_sum += y[j];
    y_v_sum += y[j] * v;
  }
  return {sum, y_sum, y_v_sum};
}

// The sum of y v where 0 times -infinity is 0: a prototype that is ruled out on both sides.
template <class S, class W>
FASTJEM_NOINLINE static W sum_without_ruled_out(const S* x, Scale<W> scale, W shift, const W* y, int64_t n) {
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += y[j] == 0 ? W(0) : y[j] * (scale(widen(x[j])) - shift);
  return sum;
}

// One thread's images, with the memory that it needs for one of them. S and T are the elements of student and teacher.
template <class S, class T>
class ImageCrossEntropy {
  using W = wide<S>;
  static constexpr bool in_place = std::is_same<S, W>::value;  // exp waits in the gradient, or in a row of its own

  const PrototypeCrossEntropy& p;
  const int64_t k, students, teachers;
  const Scale<W> teacher_scale, student_scale;
  BiasedSoftmax<W> softmax;
  std::vector<double> y_sum, y_v_sum;  // [blocks]
  std::vector<W> q;                    // [T, K], the teacher's probabilities
  PairedTargets<W> targets;
  std::vector<W> scratch;
  std::vector<W> block_logits, block_usage;  // [K], sums over rows_per_block images; empty without statistics

 public:
  explicit ImageCrossEntropy(const PrototypeCrossEntropy& p)
      : p(p),
        k(p.width),
        students(p.student.size()),
        teachers(p.teacher.size()),
        teacher_scale(p.teacher_scale),
        student_scale(p.student_scale),
        softmax(k),
        y_sum(softmax.sum.size()),
        y_v_sum(y_sum.size()),
        q(teachers * k),
        targets(p.pairs, teachers, k),
        scratch(k),
        block_logits(p.statistics ? k : 0, W(0)),
        block_usage(block_logits) {}

  // `logits` and `usage` [K]: the sums over rows of the teacher's logits and probabilities, added to; with statistics.
  void images(int64_t begin, int64_t end, double* logits, double* usage) {
    for (int64_t i = begin; i < end; ++i) {
      double entropy = 0;
      for (int64_t t = 0; t < teachers; ++t) {
        teacher_view(i, t, entropy);
        targets.add(q.data() + t * k, t);
      }
      p.entropies[i] = entropy;
      if (p.statistics && ends_block_of_rows(i, begin, end)) {
        add_block(block_logits.data(), k, logits);
        add_block(block_usage.data(), k, usage);
      }

      const double weight = p.weights ? p.weights[i] : 1.0;
      double loss = 0;
      for (int64_t s = 0; s < students; ++s) {
        const Target<W> target = targets.of(s, q.data(), k);
        S* gradient = p.gradients[s] ? static_cast<S*>(p.gradients[s]) + i * k : nullptr;
        if (target.count > 0) {
          student_view(i, s, target, weight, gradient, loss);
        } else if (gradient) {
          std::memset(static_cast<void*>(gradient), 0, k * sizeof(S));
        }
      }
      p.losses[i] = loss * weight;
    }
  }

 private:
  // Sets the probabilities of view t, and adds their entropy if statistics are wanted.
  void teacher_view(int64_t i, int64_t t, double& entropy) {
    const T* x = static_cast<const T*>(p.teacher[t].address) + i * p.teacher[t].row_stride;
    const W* bias = p.bias ? static_cast<const W*>(p.bias) + t * p.bias_stride : nullptr;
    W* target = q.data() + t * k;
    const double logsumexp = softmax.no_softmax(softmax.row(x, teacher_scale, Bias<W>{bias}, k, target));
    for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
      const int64_t last = std::min(first + softmax_block, k);
      const W factor = softmax.factor[b];
#pragma omp simd
      for (int64_t j = first; j < last; ++j) target[j] *= factor;
      if (p.statistics) entropy += add_statistics(x, bias, target, static_cast<W>(logsumexp), first, last);
    }
  }

  // Of prototypes [first, last); returns their part of the entropy.
  W add_statistics(const T* x, const W* bias, const W* target, W logsumexp, int64_t first, int64_t last) {
    const Scale<W> scale = teacher_scale;
    W* logits = block_logits.data();
    W* usage = block_usage.data();
    W entropy = 0;
#pragma omp simd reduction(+ : entropy)
    for (int64_t j = first; j < last; ++j) {
      const W raw = widen(x[j]);
      const W logit = scale(raw) + (bias ? bias[j] : W(0));
      entropy += target[j] == 0 ? W(0) : target[j] * (logsumexp - logit);  // NaN stays
      logits[j] += raw;
      usage[j] += target[j];
    }
    return entropy;
  }

  // Adds the loss of view s, not weighted. The gradient, if wanted, is (softmax * count - target's sum) * weight *
  // factor.
  void student_view(int64_t i, int64_t s, Target<W> target, double weight, S* gradient, double& loss) {
    const S* x = static_cast<const S*>(p.student[s].address) + i * p.student[s].row_stride;
    const W* y = target.sum;
    W* e = in_place && gradient ? reinterpret_cast<W*>(gradient) : scratch.data();
    for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
      const int64_t last = std::min(first + softmax_block, k);
      const W maximum = largest_logit<Biased::no>(x, student_scale, Bias<W>{}, first, last);
      const W shift = to_finite(maximum);
      const BlockSums<W> sums = student_block(x + first, student_scale, shift, y + first, last - first, e + first);
      softmax.shift[b] = shift;
      softmax.sum[b] = sums.exponentials;
      y_sum[b] = sums.y;
      y_v_sum[b] = std::isnan(sums.y_v)
                       ? sum_without_ruled_out(x + first, student_scale, shift, y + first, last - first)
                       : sums.y_v;
    }
    const double logsumexp = softmax.no_softmax(softmax.finish());
    for (size_t b = 0; b < y_sum.size(); ++b) loss += (logsumexp - softmax.shift[b]) * y_sum[b] - y_v_sum[b];

    if (gradient) {
      const W target_factor = static_cast<W>(weight * p.factor);
      for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
        const int64_t last = std::min(first + softmax_block, k);
        const W softmax_factor = static_cast<W>(softmax.factor[b] * weight * p.factor * target.count);
#pragma omp simd
        for (int64_t j = first; j < last; ++j) narrow(e[j] * softmax_factor - y[j] * target_factor, gradient[j]);
      }
    }
  }
};

static void prototype_cross_entropy_rows(const PrototypeCrossEntropy& p, int64_t begin, int64_t end, double* logits,
                                         double* usage) {
  with_dtype(p.student_dtype, [&](auto* student) {
    with_dtype(p.teacher_dtype, [&](auto* teacher) {
      using S = std::remove_pointer_t<decltype(student)>;
      using T = std::remove_pointer_t<decltype(teacher)>;
      if constexpr (std::is_same<wide<S>, wide<T>>::value) {  // the launcher has checked that it is
        ImageCrossEntropy<S, T>(p).images(begin, end, logits, usage);
      }
    });
  });
}
