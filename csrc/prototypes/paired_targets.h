// The targets of a student's views of one image: sums of the teacher's probabilities. Included by kernel headers inside
// their namespaces.

// The sum [K] of the targets that a view is paired with, and how many they are.
template <class W>
struct Target {
  const W* sum;
  double count;
};

// An image's targets, one after another: view t of the teacher is at q + t * stride.
template <class W>
class PairedTargets {
  const Pairs pairs;
  const int64_t teachers, width;
  std::vector<W> total;   // [K], over the teacher's views
  std::vector<W> others;  // [K], over all but one of them

 public:
  PairedTargets(Pairs pairs, int64_t teachers, int64_t width)
      : pairs(pairs), teachers(teachers), width(width), total(pairs == Pairs::same ? 0 : width), others(total.size()) {}

  // To be called for each view t of the teacher in order, before `of`.
  void add(const W* target, int64_t t) {
    if (pairs == Pairs::same) return;
    W* sum = total.data();
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) sum[j] = t ? sum[j] + target[j] : target[j];
  }

  // For view s of the student; the sum stays as it is until the next call.
  Target<W> of(int64_t s, const W* q, int64_t stride) {
    const bool has_same_crop = s < teachers;
    if (pairs == Pairs::same) return {q + s * stride, has_same_crop ? 1.0 : 0.0};
    if (pairs == Pairs::all || !has_same_crop) return {total.data(), static_cast<double>(teachers)};
    if (teachers == 2) return {q + (1 - s) * stride, 1.0};
    // Added anew: the total less the target of the same crop would cancel.
    W* sum = others.data();
    std::fill(sum, sum + width, W(0));
    for (int64_t t = 0; t < teachers; ++t) {
      if (t == s) continue;
      const W* target = q + t * stride;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) sum[j] += target[j];
    }
    return {sum, static_cast<double>(teachers - 1)};
  }
};
