// The momentum average (teacher) of weights (student): torch.lerp, which is exact at momentum 0 and 1.

template <class T>
static FASTJEM_INLINE T blend(T teacher, T student, T weight) {
  const T difference = student - teacher;
  return weight < T(0.5) ? teacher + weight * difference : student - difference * (1 - weight);
}

// Elements [begin, end) of a teacher and its student.
template <class T, class S>
static void blend_range(T* teacher, const S* student, int64_t begin, int64_t end, double momentum) {
  const T weight = static_cast<T>(1 - momentum);  // of the student
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) teacher[j] = blend(teacher[j], static_cast<T>(widen(student[j])), weight);
}
