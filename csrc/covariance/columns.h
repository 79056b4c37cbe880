// How work on the columns of a matrix is cut into blocks and threads.
#pragma once

#include "common.h"

namespace fastjem {

constexpr int64_t max_columns = 256;

// Columns are computed by blocks of this width: 64 or more, as each row's piece is a jump in memory, and not so many
// that all rows of a block outgrow the L2 cache.
inline int64_t columns_at_a_time(int64_t rows) {
  return std::max<int64_t>(64, std::min(max_columns, 65536 / rows / 64 * 64));
}

// Calls f(begin, end) for parts of the columns, of whole blocks.
template <class F>
void for_columns(int64_t rows, int64_t width, int threads, F&& f) {
  const int64_t step = columns_at_a_time(rows);
  const int64_t blocks = (width + step - 1) / step;
  parallel_for(blocks, 1 + 32768 / (rows * step), threads,
               [&](int64_t begin, int64_t end) { f(begin * step, std::min(end * step, width)); });
}

}  // namespace fastjem
