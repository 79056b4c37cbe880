#include "common.h"

namespace fastjem {

// Similarities of some rows with their candidates. Rows of several groups, `rows_per_group` each, may be in one tile:
// the columns of the next group's rows are then the next `columns` candidates.
struct NeighborTile {
  Dtype dtype;   // float32 or float64
  void* values;  // [rows, columns], dense; a row's similarity with itself is overwritten
  int64_t rows, columns, row_start, column_start, rows_per_group, topk;
  void* row_best;        // [rows, topk], the largest similarities so far, best first
  int64_t* row_numbers;  // [rows, topk], and whose they are
  void* column_best;     // [columns, topk], the same for columns
  int64_t* column_numbers;
};

struct Koleo {
  Dtype dtype;               // of the gradient
  const void* unit;          // [N, width] wide
  const double* divisors;    // [N], what rows were divided by
  const int64_t* neighbors;  // [N, topk]
  int64_t width, topk;
  double p, eps, largest;  // largest: finite number of the gradient's dtype
  double* distances;       // [N, topk]
  double* losses;          // [N]
  const int64_t* begins;   // [N + 1], of each row's part of `pairs`
  const int64_t* pairs;    // [N topk], places in `neighbors`, by whom they name
  void* gradient;          // [N, width]
};

}  // namespace fastjem

#define FASTJEM_KERNEL "contrastive/koleo.h"
#include "each_isa.h"

namespace fastjem {

// Columns before `first_column` (the tile's diagonal block, whose rows see both halves) have no part in columns' best.
static void neighbors(int dtype, uintptr_t values, int64_t rows, int64_t columns, int64_t row_start,
                      int64_t column_start, int64_t rows_per_group, int64_t topk, uintptr_t row_best,
                      uintptr_t row_numbers, uintptr_t column_best, uintptr_t column_numbers, int64_t first_column,
                      int threads) {
  const NeighborTile t{static_cast<Dtype>(dtype),
                       at<void>(values),
                       rows,
                       columns,
                       row_start,
                       column_start,
                       rows_per_group,
                       topk,
                       at<void>(row_best),
                       at<int64_t>(row_numbers),
                       at<void>(column_best),
                       at<int64_t>(column_numbers)};
  parallel_for(rows, 1 + 65536 / columns, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(neighbors_of_rows(t, begin, end)); });
  if (first_column >= columns) return;
  parallel_for(columns - first_column, 1 + 65536 / rows, threads, [&](int64_t begin, int64_t end) {
    FASTJEM_BEST(neighbors_of_columns(t, first_column + begin, first_column + end));
  });
}

// Returns the sum of the losses over rows and neighbours, and writes the gradient if there is memory for it.
static double koleo(int dtype, uintptr_t unit, uintptr_t divisors, uintptr_t neighbors, int64_t rows, int64_t width,
                    int64_t topk, double p, double eps, double largest, uintptr_t gradient, int threads) {
  const int64_t* numbers = at<const int64_t>(neighbors);
  for (int64_t n = 0; n < rows * topk; ++n) {
    if (numbers[n] < 0 || numbers[n] >= rows) {
      throw std::invalid_argument("koleo: neighbors must be in [0, " + std::to_string(rows) + "), got " +
                                  std::to_string(numbers[n]) + " at row " + std::to_string(n / topk));
    }
  }
  std::vector<double> distances(rows * topk);
  std::vector<double> losses(rows);
  std::vector<int64_t> begins(rows + 1);
  std::vector<int64_t> pairs(gradient ? rows * topk : 0);
  if (gradient) {  // pairs by whom they name, in their order
    for (int64_t n = 0; n < rows * topk; ++n) ++begins[numbers[n]];
    int64_t total = 0;
    for (int64_t i = 0; i <= rows; ++i) {
      total += begins[i];
      begins[i] = total;
    }
    for (int64_t n = rows * topk - 1; n >= 0; --n) pairs[--begins[numbers[n]]] = n;
  }
  const Koleo problem{static_cast<Dtype>(dtype),
                      at<const void>(unit),
                      at<const double>(divisors),
                      numbers,
                      width,
                      topk,
                      p,
                      eps,
                      largest,
                      distances.data(),
                      losses.data(),
                      begins.data(),
                      pairs.data(),
                      at<void>(gradient)};
  const int64_t grain = 1 + 16384 / (width * topk);
  parallel_for(rows, grain, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(koleo_distances(problem, begin, end)); });
  if (gradient) {
    parallel_for(rows, grain, threads,
                 [&](int64_t begin, int64_t end) { FASTJEM_BEST(koleo_gradients(problem, begin, end)); });
  }
  double total = 0;
  for (const double loss : losses) total += loss;
  return total;
}

void bind_koleo(pybind11::module_& m) {
  m.def("koleo_neighbors", &neighbors, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("koleo", &koleo, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
