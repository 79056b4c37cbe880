#include <algorithm>
#include <cmath>
#include <limits>

#include "common.h"

namespace fastjem {

// Which pairs of a tile belong together, which count, and what the rows weigh. Pointers to what isn't given are null.
struct SiglipPairs {
  Dtype dtype;   // float32 or float64
  void* values;  // [rows, columns], rows `stride` elements apart
  int64_t rows, columns, stride;
  double factor, bias;                       // a logit is value * factor + bias
  int64_t partner;                           // the column of row 0's own pair
  const int64_t *row_ids, *column_ids;       // [rows], [columns]: pairs of equal ids belong together too
  const unsigned char *positives, *exclude;  // [rows, columns], rows `mask_stride` apart
  int64_t mask_stride;                       // of both
  double positive, negative;                 // the targets of those that belong together, and of the others
  const double* weights;                     // [rows], of the derivatives, or null
  double *losses, *sums, *dots;              // [rows], each is added to; sums and dots are weighted
};

}  // namespace fastjem

#define FASTJEM_KERNEL "contrastive/siglip_pairs.h"
#include "each_isa.h"

namespace fastjem {

static void siglip_pairs(int dtype, uintptr_t values, int64_t rows, int64_t columns, int64_t stride, double factor,
                         double bias, int64_t partner, uintptr_t row_ids, uintptr_t column_ids, uintptr_t positives,
                         uintptr_t exclude, int64_t mask_stride, double positive, double negative, uintptr_t weights,
                         uintptr_t losses, uintptr_t sums, uintptr_t dots, int threads) {
  const SiglipPairs problem{static_cast<Dtype>(dtype),
                            at<void>(values),
                            rows,
                            columns,
                            stride,
                            factor,
                            bias,
                            partner,
                            at<const int64_t>(row_ids),
                            at<const int64_t>(column_ids),
                            at<const unsigned char>(positives),
                            at<const unsigned char>(exclude),
                            mask_stride,
                            positive,
                            negative,
                            at<const double>(weights),
                            at<double>(losses),
                            at<double>(sums),
                            at<double>(dots)};
  parallel_for(rows, 1 + 8192 / columns, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(siglip_pairs_rows(problem, begin, end)); });
}

void bind_siglip_pairs(pybind11::module_& m) {
  m.def("siglip_pairs", &siglip_pairs, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
