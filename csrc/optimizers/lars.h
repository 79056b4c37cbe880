// Elements [begin, end) of one tensor: their squares' sum, and SGD with momentum at the tensor's own rate.
#include "optimizers/blend.h"

// In double: the square of a float32 gradient of 1e-20 would be 0, and that of 1e20 infinite.
template <class T>
static double squares_of(const T* x, int64_t begin, int64_t end) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = begin; j < end; ++j) {
    const double wide_x = widen(x[j]);
    sum += wide_x * wide_x;
  }
  return sum;
}

static void squares_range(Dtype dtype, const void* x, int64_t begin, int64_t end, double* sum) {
  with_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    *sum = squares_of(static_cast<const T*>(x), begin, end);
  });
}

template <bool has_buffer, bool has_teacher, class T, class G>
static void lars_range_of(const LarsTensor& x, T* parameter, const G* gradient, int64_t begin, int64_t end) {
  T* buffer = static_cast<T*>(x.buffer);
  T* teacher = static_cast<T*>(x.teacher);
  const T unscale = static_cast<T>(x.unscale);
  const T decay = static_cast<T>(x.weight_decay);
  const T ratio = static_cast<T>(x.ratio);
  const T momentum = static_cast<T>(x.momentum);
  const T rate = static_cast<T>(x.rate);
  const T weight = static_cast<T>(1 - x.teacher_momentum);
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) {
    const T p = parameter[j];
    T step = (static_cast<T>(widen(gradient[j])) * unscale + decay * p) * ratio;
    if constexpr (has_buffer) {
      const T b = momentum * buffer[j] + step;
      buffer[j] = b;
      step = x.nesterov ? step + momentum * b : b;
    }
    const T updated = p - rate * step;
    parameter[j] = updated;
    if constexpr (has_teacher) teacher[j] = blend(teacher[j], updated, weight);
  }
}

template <class T>
static void lars_range_for(const LarsTensor& x, int64_t begin, int64_t end) {
  T* parameter = static_cast<T*>(x.parameter);
  if (x.skipped) {
    if (x.teacher) blend_range(static_cast<T*>(x.teacher), parameter, begin, end, x.teacher_momentum);
    return;
  }
  with_dtype(x.gradient_dtype, [&](auto* element) {
    const auto* gradient = static_cast<const std::remove_pointer_t<decltype(element)>*>(x.gradient);
    if (x.buffer && x.teacher) return lars_range_of<true, true>(x, parameter, gradient, begin, end);
    if (x.buffer) return lars_range_of<true, false>(x, parameter, gradient, begin, end);
    if (x.teacher) return lars_range_of<false, true>(x, parameter, gradient, begin, end);
    lars_range_of<false, false>(x, parameter, gradient, begin, end);
  });
}

static void lars_range(const LarsTensor& x, int64_t begin, int64_t end) {
  if (x.dtype == Dtype::float64) return lars_range_for<double>(x, begin, end);
  lars_range_for<float>(x, begin, end);
}
