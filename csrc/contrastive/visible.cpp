#include "contrastive/seen.h"

namespace fastjem {

// As `SimilaritySums`, with totals and counts of what is seen, or null.
struct VisibleSums {
  double *row_max, *row_sum, *row_total, *row_count;               // [rows]
  double *column_parts, *column_total_parts, *column_count_parts;  // [parts, columns]
  void* column_max_parts;                                          // [parts, columns], if running
};

// A side's part of the weights, exp(logit - lse) * of_lse + of_total: with a shift, `of_lse` is the factor of
// exp(logit - shift); running, it is that of exp(logit - pivot).
struct VisibleSlopes {
  const void *row_pivot, *row_of_lse, *row_of_total;           // [rows] of the tile
  const void *column_pivot, *column_of_lse, *column_of_total;  // [columns] of the tile
};

}  // namespace fastjem

#define FASTJEM_KERNEL "contrastive/visible.h"
#include "each_isa.h"
//
#include "contrastive/add_columns.h"

namespace fastjem {

// (maximum, sum, total, count), each [rows] or [columns] of the tile; the last two are 0 where no totals are wanted,
// all are where the side has no sums.
using SumsArguments = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

template <class T>
static void add_tile_columns(const SimilarityTile& t, int64_t parts, const VisibleSums& p,
                             const SumsArguments& columns) {
  const auto [maximum, sum, total, count] = columns;
  add_columns(t, parts, p.column_parts, static_cast<const T*>(p.column_max_parts), at<double>(maximum),
              at<double>(sum));
  if (!total) return;
  for (int64_t at_part = 0; at_part < parts * t.columns; ++at_part) {
    at<double>(total)[at_part % t.columns] += p.column_total_parts[at_part];
    at<double>(count)[at_part % t.columns] += p.column_count_parts[at_part];
  }
}

static void sums(int dtype, uintptr_t values, int64_t rows, int64_t columns, int64_t stride, const Scaling& scaling,
                 const OwnImage& own_image, const VisibleArguments& visible_arguments, const SumsArguments& of_rows,
                 const SumsArguments& of_columns, int threads) {
  const SimilarityTile t = tile(dtype, values, rows, columns, stride, scaling, own_image);
  const Visible v = visible(visible_arguments);
  const int64_t parts = parts_of(rows, columns, threads);
  const bool both = std::get<1>(of_columns) != 0;
  const bool totals = std::get<2>(of_columns) != 0;
  std::vector<double> sum_parts(both ? parts * columns : 0);
  std::vector<double> max_parts(both && t.running ? parts * columns : 0);
  std::vector<double> total_parts(totals ? 2 * parts * columns : 0);
  const VisibleSums p{at<double>(std::get<0>(of_rows)),
                      at<double>(std::get<1>(of_rows)),
                      at<double>(std::get<2>(of_rows)),
                      at<double>(std::get<3>(of_rows)),
                      both ? sum_parts.data() : nullptr,
                      totals ? total_parts.data() : nullptr,
                      totals ? total_parts.data() + parts * columns : nullptr,
                      both && t.running ? max_parts.data() : nullptr};
  in_parts(rows, parts,
           [&](int64_t begin, int64_t end, int64_t part) { FASTJEM_BEST(visible_sums(t, v, p, begin, end, part)); });
  if (!both) return;
  if (t.dtype == Dtype::float64) {
    add_tile_columns<double>(t, parts, p, of_columns);
  } else {
    add_tile_columns<float>(t, parts, p, of_columns);
  }
}

// (pivot, of_lse, of_total) of the tile's rows and of its columns; `of_lse` is 0 where a side has no slopes.
using SlopesArguments = std::tuple<uintptr_t, uintptr_t, uintptr_t>;

static void weights(int dtype, uintptr_t values, int64_t rows, int64_t columns, int64_t stride, const Scaling& scaling,
                    const OwnImage& own_image, const VisibleArguments& visible_arguments, const SlopesArguments& row,
                    const SlopesArguments& column, int threads) {
  const SimilarityTile t = tile(dtype, values, rows, columns, stride, scaling, own_image);
  const Visible v = visible(visible_arguments);
  const VisibleSlopes p{at<const void>(std::get<0>(row)),    at<const void>(std::get<1>(row)),
                        at<const void>(std::get<2>(row)),    at<const void>(std::get<0>(column)),
                        at<const void>(std::get<1>(column)), at<const void>(std::get<2>(column))};
  in_parts(rows, parts_of(rows, columns, threads),
           [&](int64_t begin, int64_t end, int64_t) { FASTJEM_BEST(visible_weights(t, v, p, begin, end)); });
}

void bind_visible(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> release;
  m.def("visible_sums", &sums, release);
  m.def("visible_weights", &weights, release);
}

}  // namespace fastjem
