// What decides which columns a row sees: for visible.cpp and seen_tile.cpp.
#pragma once

#include "contrastive/tile.h"

namespace fastjem {

// Which columns a row sees, and which rows a column sees: kernels/contrastive/visible.py says it in words. Vectors are
// of all rows and all columns, not of a tile's; logits are similarities (a factor of 1).
struct Visible {
  const int64_t *row_ids, *column_ids;                    // or null both
  const uint8_t* exclude;                                 // or null; it repeats in both directions
  int64_t exclude_rows, exclude_columns, exclude_stride;  // its size, and how far apart its rows are
  const void* row_limit;                                  // or null
  const void* column_limit;                               // not null where columns have sums or slopes
};

// As Python hands it over: row_ids, column_ids, exclude, its rows, columns and stride, row_limit, column_limit.
using VisibleArguments = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t>;

inline Visible visible(const VisibleArguments& given) {
  const auto& [row_ids, column_ids, exclude, rows, columns, stride, row_limit, column_limit] = given;
  return {at<const int64_t>(row_ids), at<const int64_t>(column_ids), at<const uint8_t>(exclude), rows, columns, stride,
          at<const void>(row_limit),  at<const void>(column_limit)};
}

}  // namespace fastjem
