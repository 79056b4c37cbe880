// What every optimiser's loop does with an element of the teacher, its momentum copy: torch.lerp, as ema_update_ does.

template <class T>
static FASTJEM_INLINE T blend(T teacher, T student, T weight) {
  const T difference = student - teacher;
  return weight < T(0.5) ? teacher + weight * difference : student - difference * (1 - weight);
}

// The optimiser's step is left out (found_inf), the teacher follows all the same.
template <class T>
static void blend_range(T* teacher, const T* student, int64_t begin, int64_t end, double teacher_momentum) {
  const T weight = static_cast<T>(1 - teacher_momentum);
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) teacher[j] = blend(teacher[j], student[j], weight);
}
