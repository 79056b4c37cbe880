// Images [begin, end): each teacher row's softmax once, for all the student's rows of that image, which are read once
// from memory.

#include "prototypes/biased_softmax.h"

template <class W>
struct BlockSums {
  W exp, y, dot;
};

// e = exp(v), v = x * scale - shift; the sums of e, y and y v.
template <class S, class W>
FASTJEM_NOINLINE static BlockSums<W> student_block(const S* x, Scale<W> scale, W shift, const W* y, int64_t n, W* e) {
  W sum = 0, y_sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, y_sum, dot)
  for (int64_t j = 0; j < n; ++j) {
    const W v = scale(widen(x[j])) - shift;
    const W exp_v = exponential(v);
    e[j] = exp_v;
    sum += exp_v;
    y_sum += y[j];
    dot += y[j] * v;
  }
  return {sum, y_sum, dot};
}

template <class S, class T>
static void prototype_cross_entropy_rows_of(const PrototypeCrossEntropy& p, int64_t begin, int64_t end, double* logits,
                                            double* usage) {
  using W = wide<S>;
  const int64_t k = p.width, students = p.student.size(), teachers = p.teacher.size();
  const Scale<W> teacher_scale(p.teacher_scale), scale(p.student_scale);
  constexpr bool in_place = std::is_same<S, W>::value;  // exp waits in the gradient, or in a row of its own
  BiasedSoftmax<W> softmax(k);
  std::vector<double> y_sum(softmax.sum.size()), y_dot(y_sum.size());
  std::vector<W> q(teachers * k), total(p.pairs == Pairs::same ? 0 : k), others(teachers > 2 ? k : 0), scratch(k);
  std::vector<W> b_logits(p.statistics ? k : 0, W(0)), b_usage(b_logits);

  for (int64_t i = begin; i < end; ++i) {
    double entropy = 0;
    for (int64_t t = 0; t < teachers; ++t) {
      const T* x = static_cast<const T*>(p.teacher[t].address) + i * p.teacher[t].row_stride;
      const W* bias = p.bias ? static_cast<const W*>(p.bias) + t * p.bias_stride : nullptr;
      W* target = q.data() + t * k;
      const double lse = softmax.row(x, teacher_scale, Bias<W>{bias}, k, target);
      for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
        const int64_t last = std::min(first + softmax_block, k);
        const W factor = softmax.factor[b];
#pragma omp simd
        for (int64_t j = first; j < last; ++j) target[j] *= factor;
        if (p.statistics) {
          const W shift = static_cast<W>(lse);
          W b_entropy = 0;
#pragma omp simd reduction(+ : b_entropy)
          for (int64_t j = first; j < last; ++j) {
            const W raw = widen(x[j]), logit = teacher_scale(raw) + (bias ? bias[j] : W(0));
            b_entropy += target[j] > 0 ? target[j] * (shift - logit) : W(0);
            b_logits[j] += raw;
            b_usage[j] += target[j];
          }
          entropy += b_entropy;
        }
      }
      if (p.pairs != Pairs::same) {
#pragma omp simd
        for (int64_t j = 0; j < k; ++j) total[j] = t ? total[j] + target[j] : target[j];
      }
    }
    p.entropies[i] = entropy;
    if (p.statistics && ((i - begin) % 32 == 31 || i + 1 == end)) {  // float sums of 32 rows a view, then double
#pragma omp simd
      for (int64_t j = 0; j < k; ++j) {
        logits[j] += b_logits[j];
        usage[j] += b_usage[j];
        b_logits[j] = b_usage[j] = 0;
      }
    }

    const double weight = p.weights ? p.weights[i] : 1.0;
    double loss = 0;
    for (int64_t s = 0; s < students; ++s) {
      const bool has_own = s < teachers;
      const W* y = total.data();  // the sum of the targets that this view is paired with, and how many they are
      double mass = static_cast<double>(teachers);
      if (p.pairs == Pairs::same) {
        y = q.data() + s * k;
        mass = has_own ? 1 : 0;
      } else if (p.pairs == Pairs::different && has_own) {
        mass -= 1;
        y = q.data() + (1 - s) * k;  // of two
        if (teachers > 2) {          // a sum of the others: subtracting the own one from the total would cancel
          std::fill(others.begin(), others.end(), W(0));
          for (int64_t t = 0; t < teachers; ++t) {
            if (t == s) continue;
#pragma omp simd
            for (int64_t j = 0; j < k; ++j) others[j] += q[t * k + j];
          }
          y = others.data();
        }
      }
      S* gradient = p.gradients[s] ? static_cast<S*>(p.gradients[s]) + i * k : nullptr;
      if (mass == 0) {
        if (gradient) std::memset(static_cast<void*>(gradient), 0, k * sizeof(S));
        continue;
      }

      const S* x = static_cast<const S*>(p.student[s].address) + i * p.student[s].row_stride;
      W* e = in_place && gradient ? reinterpret_cast<W*>(gradient) : scratch.data();
      for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
        const int64_t last = std::min(first + softmax_block, k);
        const W maximum = largest_logit<Biased::no>(x, scale, Bias<W>{}, first, last);
        const W shift = maximum == -std::numeric_limits<W>::infinity() ? W(0) : maximum;
        const BlockSums<W> sums = student_block(x + first, scale, shift, y + first, last - first, e + first);
        softmax.shift[b] = shift;
        softmax.sum[b] = sums.exp;
        y_sum[b] = sums.y;
        y_dot[b] = sums.dot;
      }
      const double lse = softmax.finish();
      for (size_t b = 0; b < y_sum.size(); ++b) loss += (lse - softmax.shift[b]) * y_sum[b] - y_dot[b];

      if (gradient) {
        const W target_factor = static_cast<W>(weight * p.factor);
        for (int64_t first = 0, b = 0; first < k; first += softmax_block, ++b) {
          const int64_t last = std::min(first + softmax_block, k);
          const W factor = static_cast<W>(softmax.factor[b] * weight * p.factor * mass);
#pragma omp simd
          for (int64_t j = first; j < last; ++j) narrow(e[j] * factor - y[j] * target_factor, gradient[j]);
        }
      }
    }
    p.losses[i] = loss * weight;
  }
}

static void prototype_cross_entropy_rows(const PrototypeCrossEntropy& p, int64_t begin, int64_t end, double* logits,
                                         double* usage) {
  with_dtype(p.student_dtype, [&](auto* student) {
    with_dtype(p.teacher_dtype, [&](auto* teacher) {
      using S = std::remove_pointer_t<decltype(student)>;
      using T = std::remove_pointer_t<decltype(teacher)>;
      if constexpr (std::is_same<wide<S>, wide<T>>::value) {  // checked in kernels/cpu_prototypes.py
        prototype_cross_entropy_rows_of<S, T>(p, begin, end, logits, usage);
      }
    });
  });
}
