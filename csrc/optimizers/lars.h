// Elements [begin, end) of one tensor: their squares' sums, and SGD with momentum at the tensor's own rate.
#include "weights/blend.h"

// In double: the square of a float32 gradient of 1e-20 would be 0, and that of 1e20 infinite.
template <class T, class G>
static void squares_of(const LarsTensor& x, const T* parameter, const G* gradient, int64_t begin, int64_t end,
                       double* sums) {
  const double unscale = x.unscale;
  const double decay = x.decay_in_norm ? x.weight_decay : 0;
  double of_parameter = 0, of_gradient = 0;
#pragma omp simd reduction(+ : of_parameter, of_gradient)
  for (int64_t j = begin; j < end; ++j) {
    const double p = parameter[j];
    const double g = widen(gradient[j]) * unscale + decay * p;
    of_parameter += p * p;
    of_gradient += g * g;
  }
  sums[0] += of_parameter;
  sums[1] += of_gradient;
}

// Adds to two sums: of the parameter's squares and of the gradient's.
static void squares_range(const LarsTensor& x, int64_t begin, int64_t end, double* sums) {
  with_dtype(x.gradient_dtype, [&](auto* element) {
    const auto* gradient = static_cast<const std::remove_pointer_t<decltype(element)>*>(x.gradient);
    if (x.dtype == Dtype::float64) {
      squares_of(x, static_cast<const double*>(x.parameter), gradient, begin, end, sums);
    } else {
      squares_of(x, static_cast<const float*>(x.parameter), gradient, begin, end, sums);
    }
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
