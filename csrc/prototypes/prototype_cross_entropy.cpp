#include "common.h"
#include "flush_subnormals.h"
#include "huge_pages.h"
#include "prototypes/pairs.h"

namespace fastjem {

struct Rows {
  const void* address;  // [B, K]
  int64_t row_stride;
};

struct PrototypeCrossEntropy {
  Dtype student_dtype, teacher_dtype;
  std::vector<Rows> student, teacher;
  int64_t width;
  double student_scale, teacher_scale;  // 1 / temperature
  const void* bias;                     // [K] or [T, K], float (double for float64 logits), or null
  int64_t bias_stride;                  // between teacher views
  const double* weights;                // [B], or null
  double factor;                        // of the gradients
  Pairs pairs;
  bool statistics;
  std::vector<void*> gradients;  // [B, K] each, or null
  double *losses, *entropies;    // [B]
};

}  // namespace fastjem

#define FASTJEM_KERNEL "prototypes/prototype_cross_entropy.h"
#include "each_isa.h"

namespace fastjem {

using Table = std::vector<std::pair<uintptr_t, int64_t>>;

static std::vector<Rows> rows_of(const Table& table) {
  std::vector<Rows> rows;
  for (const auto& [address, stride] : table) rows.push_back({at<const void>(address), stride});
  return rows;
}

// Returns the weighted sum of the losses over rows and pairs, and of the teacher's entropies over rows and views.
// `statistics` is 0 or the address of double [2, K]: the sums of the teacher's logits, and of its probabilities.
static std::pair<double, double> prototype_cross_entropy(int student_dtype, const Table& student, int teacher_dtype,
                                                         const Table& teacher, int64_t rows, int64_t width,
                                                         double student_scale, double teacher_scale, uintptr_t bias,
                                                         int64_t bias_stride, uintptr_t weights, double factor,
                                                         int pairs, const std::vector<uintptr_t>& gradients,
                                                         int64_t gradient_bytes, uintptr_t statistics, int threads) {
  std::vector<double> losses(rows), entropies(rows);
  PrototypeCrossEntropy p{static_cast<Dtype>(student_dtype),
                          static_cast<Dtype>(teacher_dtype),
                          rows_of(student),
                          rows_of(teacher),
                          width,
                          student_scale,
                          teacher_scale,
                          at<const void>(bias),
                          bias_stride,
                          at<const double>(weights),
                          factor,
                          static_cast<Pairs>(pairs),
                          statistics != 0,
                          {},
                          losses.data(),
                          entropies.data()};
  for (const uintptr_t gradient : gradients) {
    p.gradients.push_back(at<void>(gradient));
    if (gradient) prefer_huge_pages(p.gradients.back(), gradient_bytes);
  }
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
  std::vector<double> sums(statistics ? parts * 2 * width : 0, 0.0);
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    const FlushSubnormals flush;
    double* logits = statistics ? sums.data() + part * 2 * width : nullptr;
    double* usage = statistics ? logits + width : nullptr;
    FASTJEM_BEST(prototype_cross_entropy_rows(p, rows * part / parts, rows * (part + 1) / parts, logits, usage));
  }
  if (statistics) {
    double* out = at<double>(statistics);
    for (int64_t j = 0; j < 2 * width; ++j) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums[part * 2 * width + j];
      out[j] = total;
    }
  }
  double loss = 0, entropy = 0;
  for (const double x : losses) loss += x;
  for (const double x : entropies) entropy += x;
  return {loss, entropy};
}

void bind_prototype_cross_entropy(pybind11::module_& m) {
  m.def("prototype_cross_entropy", &prototype_cross_entropy, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
