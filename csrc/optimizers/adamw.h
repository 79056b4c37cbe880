// Elements [begin, end) of one tensor: AdamW's update of a parameter and its two averages, and its teacher's.
#include "weights/blend.h"

template <bool has_teacher, class T, class G>
static void adamw_range_of(const AdamwTensor& x, T* parameter, const G* gradient, int64_t begin, int64_t end) {
  T* average = static_cast<T*>(x.average);
  T* square = static_cast<T*>(x.square);
  T* teacher = static_cast<T*>(x.teacher);
  const T unscale = static_cast<T>(x.unscale);
  const T kept = static_cast<T>(1 - x.rate * x.weight_decay);
  const T new_average = static_cast<T>(1 - x.beta1);
  const T old_square = static_cast<T>(x.beta2);
  const T new_square = static_cast<T>(1 - x.beta2);
  const T rate = static_cast<T>(x.rate / (1 - std::pow(x.beta1, x.step)));
  const T root = static_cast<T>(1 / std::sqrt(1 - std::pow(x.beta2, x.step)));
  const T eps = static_cast<T>(x.eps);
  const T weight = static_cast<T>(1 - x.teacher_momentum);
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) {
    const T g = static_cast<T>(widen(gradient[j])) * unscale;
    const T m = average[j] + new_average * (g - average[j]);
    const T v = old_square * square[j] + new_square * (g * g);
    average[j] = m;
    square[j] = v;
    const T updated = kept * parameter[j] - rate * (m / (std::sqrt(v) * root + eps));
    parameter[j] = updated;
    if constexpr (has_teacher) teacher[j] = blend(teacher[j], updated, weight);
  }
}

template <class T>
static void adamw_range_for(const AdamwTensor& x, int64_t begin, int64_t end) {
  T* parameter = static_cast<T*>(x.parameter);
  if (x.skipped) {
    if (x.teacher) blend_range(static_cast<T*>(x.teacher), parameter, begin, end, x.teacher_momentum);
    return;
  }
  with_dtype(x.gradient_dtype, [&](auto* element) {
    const auto* gradient = static_cast<const std::remove_pointer_t<decltype(element)>*>(x.gradient);
    if (x.teacher) return adamw_range_of<true>(x, parameter, gradient, begin, end);
    adamw_range_of<false>(x, parameter, gradient, begin, end);
  });
}

static void adamw_range(const AdamwTensor& x, int64_t begin, int64_t end) {
  if (x.dtype == Dtype::float64) return adamw_range_for<double>(x, begin, end);
  adamw_range_for<float>(x, begin, end);
}
