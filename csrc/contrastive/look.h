// Which of a block of columns a row of the tile sees: `seen`, 1 or 0 a column.

#include "contrastive/own_columns.h"

// seen[j] = 0 where ids[j] is `id`. Few are, so blocks are looked at before their elements.
template <class T>
static FASTJEM_INLINE void hide_equal_ids(T* seen, const int64_t* ids, int64_t id, int64_t n) {
  constexpr int64_t at_once = 128;
  for (int64_t block = 0; block < n; block += at_once) {
    const int64_t stop = std::min(block + at_once, n);
    int64_t equal = 0;
#pragma omp simd reduction(+ : equal)
    for (int64_t j = block; j < stop; ++j) equal += ids[j] == id;
    if (!equal) continue;
    for (int64_t j = block; j < stop; ++j) seen[j] = ids[j] == id ? T(0) : seen[j];
  }
}

template <class T>
static FASTJEM_INLINE void hide_excluded(T* seen, const uint8_t* exclude, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) seen[j] = exclude[j] ? T(0) : seen[j];
}

// `seen` of the tile's row i and its columns [begin, begin + n).
template <class T>
static FASTJEM_INLINE void look(const SimilarityTile& t, const Visible& v, int64_t i, int64_t begin, int64_t n,
                                T* seen) {
  std::fill(seen, seen + n, T(1));
  for_each_own_column(t, i, [&](int64_t j) {
    if (j >= begin && j < begin + n) seen[j - begin] = 0;
  });
  const int64_t row = t.row_start + i;
  const int64_t column = t.column_start + begin;
  if (v.row_ids) hide_equal_ids(seen, v.column_ids + column, v.row_ids[row], n);
  if (!v.exclude) return;
  const uint8_t* exclude = v.exclude + (row % v.exclude_rows) * v.exclude_stride;
  int64_t from = column % v.exclude_columns;
  for (int64_t done = 0; done < n;) {  // from where the mask's row goes on to its end, and again from its beginning
    const int64_t count = std::min(n - done, v.exclude_columns - from);
    hide_excluded(seen + done, exclude + from, count);
    done += count;
    from = 0;
  }
}
