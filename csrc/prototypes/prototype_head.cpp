#include "common.h"
#include "flush_subnormals.h"
#include "prototypes/pairs.h"

namespace fastjem {

struct LogSumExpTile {
  Dtype dtype;         // float32 or float64
  const void* logits;  // [rows, n] dense
  int64_t width;       // n
  double scale;        // 1 / temperature
  const void* bias;    // [n], or null
  double* logsumexp;   // [rows], of the tiles before, to which this one is added; -infinity where there are none
};

struct HeadGradient {
  Dtype dtype;              // float32 or float64
  void *student, *teacher;  // [S, B, n] and [T, B, n] logits, dense; the student's become the unscaled gradient
  int64_t students, teachers, images, width;
  double student_scale, teacher_scale;
  const void* bias;  // [n] or [T, n], bias_stride between teacher views, or null
  int64_t bias_stride;
  const double *student_logsumexp, *teacher_logsumexp;  // [S, B], [T, B]
  const double* weights;                                // [B], or null
  Pairs pairs;
  double* losses;  // [B], to which this tile's part is added
};

}  // namespace fastjem

#define FASTJEM_KERNEL "prototypes/prototype_head.h"
#include "each_isa.h"

namespace fastjem {

static void head_logsumexp(int dtype, uintptr_t logits, int64_t rows, int64_t width, double scale, uintptr_t bias,
                           uintptr_t logsumexp, int threads) {
  const LogSumExpTile p{static_cast<Dtype>(dtype), at<const void>(logits), width, scale,
                        at<const void>(bias),      at<double>(logsumexp)};
  parallel_for(rows, 1 + 16384 / width, threads, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    FASTJEM_BEST(update_logsumexp(p, begin, end));
  });
}

static void head_gradient(int dtype, uintptr_t student, uintptr_t teacher, int64_t students, int64_t teachers,
                          int64_t images, int64_t width, double student_scale, double teacher_scale, uintptr_t bias,
                          int64_t bias_stride, uintptr_t student_logsumexp, uintptr_t teacher_logsumexp,
                          uintptr_t weights, int pairs, uintptr_t losses, int threads) {
  const HeadGradient p{static_cast<Dtype>(dtype),
                       at<void>(student),
                       at<void>(teacher),
                       students,
                       teachers,
                       images,
                       width,
                       student_scale,
                       teacher_scale,
                       at<const void>(bias),
                       bias_stride,
                       at<const double>(student_logsumexp),
                       at<const double>(teacher_logsumexp),
                       at<const double>(weights),
                       static_cast<Pairs>(pairs),
                       at<double>(losses)};
  parallel_for(images, 1 + 16384 / (width * students), threads, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    FASTJEM_BEST(head_gradient_rows(p, begin, end));
  });
}

void bind_prototype_head(pybind11::module_& m) {
  m.def("head_logsumexp", &head_logsumexp, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("head_gradient", &head_gradient, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
