// Elements [begin, end) of one pair of tensors: torch.lerp, which is exact at momentum 0 and 1.

template <class T, class S>
static void ema_update_range_of(T* teacher, const S* student, int64_t begin, int64_t end, double momentum) {
  const T weight = static_cast<T>(1 - momentum);  // of the student
  const T teacher_weight = 1 - weight;
  if (weight < T(0.5)) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      const T t = teacher[j];
      teacher[j] = t + weight * (static_cast<T>(widen(student[j])) - t);
    }
  } else {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      const T s = static_cast<T>(widen(student[j]));
      teacher[j] = s - (s - teacher[j]) * teacher_weight;
    }
  }
}

static void ema_update_range(const EmaPair& pair, int64_t begin, int64_t end, double momentum) {
  with_dtype(pair.student_dtype, [&](auto* student) {
    using S = std::remove_pointer_t<decltype(student)>;
    const S* from = static_cast<const S*>(pair.student);
    if (pair.teacher_dtype == Dtype::float64) {
      ema_update_range_of(static_cast<double*>(pair.teacher), from, begin, end, momentum);
    } else {
      ema_update_range_of(static_cast<float*>(pair.teacher), from, begin, end, momentum);
    }
  });
}
