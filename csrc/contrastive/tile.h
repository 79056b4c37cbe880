// A tile of similarities, and how its rows are divided among threads: for similarity.cpp and visible.cpp.
#pragma once

#include "common.h"

namespace fastjem {

// The product of some rows with some candidates, which are its columns.
//
// Own image: a row's sums leave out the columns that show the row's own image, and theirs leave out the row. Views of
// the same images are stacked, so images repeat with a period: row i shows image (row_start + i) % row_period + offset,
// column j image (column_start + j) % column_period. With column_period 0 every row sees every column.
//
// Logits are values * factor. There are two ways for their exponentials to stay finite, and whoever calls chooses:
// * `shift`, the same for all, is subtracted from each logit. It is safe where no logit can be large.
// * `running`: each row, and each column, has a maximum of its own, which rises tile by tile. The maximum is one of
//   similarities (of their negatives if the factor is negative): similarities near each other subtract exactly, where
//   logits of several hundred have lost the digits that count.
struct SimilarityTile {
  Dtype dtype;   // float32 or float64
  void* values;  // [rows, columns], rows `stride` elements apart
  int64_t rows, columns, stride;
  double factor;
  double shift;
  bool running;
  int64_t row_start, row_period, offset, column_start, column_period;
};

inline SimilarityTile tile(int dtype, uintptr_t values, int64_t rows, int64_t columns, int64_t stride) {
  SimilarityTile t{};
  t.dtype = static_cast<Dtype>(dtype);
  t.values = at<void>(values);
  t.rows = rows;
  t.columns = columns;
  t.stride = stride;
  t.factor = 1;
  t.row_period = 1;
  return t;
}

// As Python hands them over: (factor, shift, running) and (row_start, row_period, offset, column_start, column_period).
using Scaling = std::tuple<double, double, bool>;
using OwnImage = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

inline SimilarityTile tile(int dtype, uintptr_t values, int64_t rows, int64_t columns, int64_t stride,
                           const Scaling& scaling, const OwnImage& own_image) {
  SimilarityTile t = tile(dtype, values, rows, columns, stride);
  std::tie(t.factor, t.shift, t.running) = scaling;
  std::tie(t.row_start, t.row_period, t.offset, t.column_start, t.column_period) = own_image;
  return t;
}

// Into how many parts the rows are cut, each of them worth a thread. Sizes and the number of threads alone decide, so
// that the same call gives the same bits.
inline int64_t parts_of(int64_t rows, int64_t columns, int threads) {
  return std::max<int64_t>(1, std::min<int64_t>({threads, rows, rows * columns / 4096}));
}

// Calls f(begin, end, part).
template <class F>
void in_parts(int64_t rows, int64_t parts, F&& f) {
  if (parts == 1) return f(int64_t{0}, rows, int64_t{0});
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) f(rows * part / parts, rows * (part + 1) / parts, part);
}

// Of a tile that holds all logits of a loss, with one shift. Logits less the shift are between -bottom and top: sums of
// exponentials are normal numbers. The shift is 0 where it can be, as the exponents' rounding errors are in proportion
// to their size.
struct Range {
  double top, bottom;
  explicit Range(Dtype dtype) : top(dtype == Dtype::float64 ? 600 : 70), bottom(dtype == Dtype::float64 ? 700 : 80) {}
};

}  // namespace fastjem
