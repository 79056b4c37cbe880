#include "contrastive/tile.h"

namespace fastjem {

// The log-sum-exp of the logits seen so far is kept as a maximum and a sum: running, it is maximum * |factor| +
// log(sum); with a shift, which is then every maximum, shift + log(sum).
struct SimilaritySums {
  bool keep;                  // the exponentials stay in the tile
  double *row_max, *row_sum;  // [rows]
  double* rescale;            // [rows], what earlier exponentials are to be multiplied by, or null
  double* column_parts;       // [parts, columns], or null
  void* column_max_parts;     // [parts, columns], if running, or null
};

// What is needed of the rows' and the columns' log-sum-exps (lse) for exp(logit - lse). With a shift, `row` and
// `column` are exp(shift - lse), a factor of exp(logit - shift). Running, they are pivots, lse / factor rounded, and
// the weight is exp((value - pivot) * factor) * rest: as the pivot is a similarity, its difference from one near it is
// exact, and `row_rest`, a number near 1, makes up for its rounding. (cpu_engine.py calls
// exp(shift - lse) and `row_rest` adjustments: an exponential is multiplied by them.)
struct SimilarityWeights {
  const void *row, *column;            // [rows], and [columns] or null
  const void *row_rest, *column_rest;  // the same, if running
  double* dots;                        // [rows]: += the sum over columns of weight * value; or null
};

struct SimilaritySigmoid {
  double bias;
  double *losses, *sums, *dots;  // [rows], each is added to: the losses, their derivatives, derivative * value
};

struct SimilarityBest {
  void* values;      // [rows]
  int64_t* columns;  // [rows], -1 where there is none yet
};

struct UnitRows {
  Dtype dtype;
  const void* rows;  // [N, width], row_stride elements apart
  int64_t row_stride, width;
  double eps;
  void* out;         // [N, width] wide
  double* divisors;  // [N], or null
};

struct ThroughUnitRows {
  Dtype dtype;                  // of out
  const void *gradient, *unit;  // [N, width] wide; without divisors, `unit` isn't needed
  const double* divisors;       // [N], or null
  int64_t width;
  double eps, factor;
  void* out;  // [N, width]
};

}  // namespace fastjem

#define FASTJEM_KERNEL "contrastive/similarity.h"
#include "each_isa.h"
//
#include "contrastive/add_columns.h"

namespace fastjem {

static void sums(int dtype, uintptr_t values, int64_t rows, int64_t columns, int64_t stride, const Scaling& scaling,
                 const OwnImage& own_image, bool keep, uintptr_t row_max, uintptr_t row_sum, uintptr_t rescale,
                 uintptr_t column_max, uintptr_t column_sum, int threads) {
  const SimilarityTile t = tile(dtype, values, rows, columns, stride, scaling, own_image);
  const int64_t parts = parts_of(rows, columns, threads);
  std::vector<double> sum_buffer(column_sum ? parts * columns : 0);
  std::vector<double> max_buffer(t.running ? sum_buffer.size() : 0);
  double* sum_parts = column_sum ? sum_buffer.data() : nullptr;
  void* max_parts = column_sum && t.running ? max_buffer.data() : nullptr;
  const SimilaritySums problem{keep,     at<double>(row_max), at<double>(row_sum), at<double>(rescale), sum_parts,
                               max_parts};
  in_parts(rows, parts, [&](int64_t begin, int64_t end, int64_t part) {
    FASTJEM_BEST(similarity_sums(t, problem, begin, end, part));
  });
  if (!column_sum) return;
  if (t.dtype == Dtype::float64) {
    add_columns(t, parts, sum_parts, static_cast<double*>(max_parts), at<double>(column_max), at<double>(column_sum));
  } else {
    add_columns(t, parts, sum_parts, static_cast<float*>(max_parts), at<double>(column_max), at<double>(column_sum));
  }
}

static void weights(int dtype, uintptr_t values, int64_t rows, int64_t columns, int64_t stride, const Scaling& scaling,
                    const OwnImage& own_image, uintptr_t row, uintptr_t column, uintptr_t row_rest,
                    uintptr_t column_rest, uintptr_t dots, int threads) {
  const SimilarityTile t = tile(dtype, values, rows, columns, stride, scaling, own_image);
  const SimilarityWeights problem{at<void>(row), at<void>(column), at<void>(row_rest), at<void>(column_rest),
                                  at<double>(dots)};
  in_parts(rows, parts_of(rows, columns, threads),
           [&](int64_t begin, int64_t end, int64_t) { FASTJEM_BEST(similarity_weights(t, problem, begin, end)); });
}

static void sigmoid(int dtype, uintptr_t values, int64_t rows, int64_t columns, int64_t stride, double factor,
                    double bias, int64_t row_start, int64_t offset, int64_t column_start, uintptr_t losses,
                    uintptr_t sums, uintptr_t dots, int threads) {
  SimilarityTile t = tile(dtype, values, rows, columns, stride);
  t.factor = factor;
  t.row_start = row_start;
  t.offset = offset;
  t.column_start = column_start;
  const SimilaritySigmoid problem{bias, at<double>(losses), at<double>(sums), at<double>(dots)};
  in_parts(rows, parts_of(rows, columns, threads),
           [&](int64_t begin, int64_t end, int64_t) { FASTJEM_BEST(similarity_sigmoid(t, problem, begin, end)); });
}

static void best(int dtype, uintptr_t values, int64_t rows, int64_t columns, int64_t stride, int64_t column_start,
                 uintptr_t best_values, uintptr_t best_columns, int threads) {
  SimilarityTile t = tile(dtype, values, rows, columns, stride);
  t.column_start = column_start;
  const SimilarityBest problem{at<void>(best_values), at<int64_t>(best_columns)};
  in_parts(rows, parts_of(rows, columns, threads),
           [&](int64_t begin, int64_t end, int64_t) { FASTJEM_BEST(similarity_best(t, problem, begin, end)); });
}

static void unit_rows(int dtype, uintptr_t rows, int64_t count, int64_t width, int64_t row_stride, double eps,
                      uintptr_t out, uintptr_t divisors, int threads) {
  const UnitRows problem{static_cast<Dtype>(dtype), at<const void>(rows), row_stride, width, eps, at<void>(out),
                         at<double>(divisors)};
  in_parts(count, parts_of(count, width, threads),
           [&](int64_t begin, int64_t end, int64_t) { FASTJEM_BEST(unit_rows(problem, begin, end)); });
}

static void through_unit_rows(int dtype, uintptr_t gradient, uintptr_t unit, uintptr_t divisors, int64_t count,
                              int64_t width, double eps, double factor, uintptr_t out, int threads) {
  const ThroughUnitRows problem{static_cast<Dtype>(dtype),
                                at<const void>(gradient),
                                at<const void>(unit),
                                at<const double>(divisors),
                                width,
                                eps,
                                factor,
                                at<void>(out)};
  in_parts(count, parts_of(count, width, threads),
           [&](int64_t begin, int64_t end, int64_t) { FASTJEM_BEST(through_unit_rows(problem, begin, end)); });
}

void bind_similarity(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> release;
  m.def("similarity_sums", &sums, release);
  m.def("similarity_weights", &weights, release);
  m.def("similarity_sigmoid", &sigmoid, release);
  m.def("similarity_best", &best, release);
  m.def("unit_rows", &unit_rows, release);
  m.def("through_unit_rows", &through_unit_rows, release);
}

}  // namespace fastjem
