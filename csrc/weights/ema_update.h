// Elements [begin, end) of one pair of tensors.
#include "weights/blend.h"

static void ema_update_range(const EmaPair& pair, int64_t begin, int64_t end, double momentum) {
  with_dtype(pair.student_dtype, [&](auto* student) {
    using S = std::remove_pointer_t<decltype(student)>;
    const S* from = static_cast<const S*>(pair.student);
    if (pair.teacher_dtype == Dtype::float64) {
      blend_range(static_cast<double*>(pair.teacher), from, begin, end, momentum);
    } else {
      blend_range(static_cast<float*>(pair.teacher), from, begin, end, momentum);
    }
  });
}
