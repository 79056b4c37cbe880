// What happens to a tile of similarities where not every row sees every column: sums of exponentials, and the weights
// of a gradient. A row is taken in blocks of columns. For each block there is `seen`, 1 or 0 a column, of what neither
// the row nor the column sees of the other; limits are compared where the exponentials are made.

#include "contrastive/look.h"

// Whether what is seen isn't above the limit: NaN is above nothing.
template <class T>
static FASTJEM_INLINE bool counts(T seen, T value, T limit) {
  return (seen > 0) & !(value > limit);
}

// Running: raises the row's maximum to that of a block. Returns the maximum as a pivot.
template <class T>
static FASTJEM_INLINE T raise_row(const VisibleSums& p, int64_t i, const T* s, const T* seen, int64_t n, T limit) {
  T maximum = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) {
    const T x = counts(seen[j], s[j], limit) ? s[j] : -std::numeric_limits<T>::infinity();
    maximum = x > maximum ? x : maximum;
  }
  const double before = p.row_max[i];
  const double now = std::max(before, static_cast<double>(maximum));
  p.row_sum[i] *= before == now ? 1 : std::exp(before - now);  // of -infinity: 0
  p.row_max[i] = now;
  return to_finite(static_cast<T>(now));
}

// Sums of columns over some rows, in T, before they are added to those in double.
template <class T>
struct ColumnSums {
  std::vector<T> sum, total, count;
  ColumnSums(int64_t n, bool totals) : sum(n), total(totals ? n : 0), count(totals ? n : 0) {}
};

template <class T>
static FASTJEM_INLINE void add_totals(double& total, double& count, const T* s, const T* seen, int64_t n, T limit) {
  T block_total = 0;
  T block_count = 0;
#pragma omp simd reduction(+ : block_total, block_count)
  for (int64_t j = 0; j < n; ++j) {
    const bool is_counted = counts(seen[j], s[j], limit);
    block_total += is_counted ? s[j] : T(0);
    block_count += is_counted ? T(1) : T(0);
  }
  total += block_total;
  count += block_count;
}

template <class T>
static FASTJEM_INLINE void add_column_totals(T* total, T* count, const T* s, const T* seen, int64_t n, const T* limit) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const bool is_counted = counts(seen[j], s[j], limit[j]);
    total[j] += is_counted ? s[j] : T(0);
    count[j] += is_counted ? T(1) : T(0);
  }
}

// A block's row sum; with `column_sum`, each exponential is added to its column's as well.
template <class T>
static FASTJEM_INLINE T sum_seen(const T* s, const T* seen, int64_t n, T pivot, T limit, T* column_sum,
                                 const T* column_limit) {
  T sum = 0;
  if (!column_sum) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += counts(seen[j], s[j], limit) ? exponential(s[j] - pivot) : T(0);
    return sum;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T e = exponential(s[j] - pivot);
    sum += counts(seen[j], s[j], limit) ? e : T(0);
    column_sum[j] += counts(seen[j], s[j], column_limit[j]) ? e : T(0);
  }
  return sum;
}

// Adds part `part`'s sums of columns so far to those in double.
template <class T>
static void add_block_of_rows(const SimilarityTile& t, const VisibleSums& p, ColumnSums<T>& columns, int64_t part) {
  add_block(columns.sum.data(), t.columns, p.column_parts + part * t.columns);
  if (columns.total.empty()) return;
  add_block(columns.total.data(), t.columns, p.column_total_parts + part * t.columns);
  add_block(columns.count.data(), t.columns, p.column_count_parts + part * t.columns);
}

// Running: the columns' sums of rows [begin, end), whose maxima are known by now.
template <class T>
static void sum_columns(const SimilarityTile& t, const Visible& v, const VisibleSums& p, ColumnSums<T>& columns,
                        const T* column_max, const T* column_limit, int64_t begin, int64_t end, int64_t part) {
  T seen[terms_per_block];
  std::vector<T> pivots(column_max, column_max + t.columns);
  for (T& pivot : pivots) pivot = to_finite(pivot);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t block = 0; block < t.columns; block += terms_per_block) {
      const int64_t n = std::min(terms_per_block, t.columns - block);
      const T* s = static_cast<const T*>(t.values) + i * t.stride + block;
      const T* pivot = pivots.data() + block;
      const T* limit = column_limit + block;
      T* sum = columns.sum.data() + block;
      look(t, v, i, block, n, seen);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        sum[j] += counts(seen[j], s[j], limit[j]) ? exponential(s[j] - pivot[j]) : T(0);
      }
    }
    if (ends_block_of_rows(i, begin, end)) add_block_of_rows(t, p, columns, part);
  }
}

// Rows [begin, end), and their share of the columns' sums, which is part number `part`.
template <class T>
static void visible_sums_of(const SimilarityTile& t, const Visible& v, const VisibleSums& p, int64_t begin, int64_t end,
                            int64_t part) {
  const T infinity = std::numeric_limits<T>::infinity();
  const bool both = p.column_parts != nullptr;
  ColumnSums<T> columns(both ? t.columns : 0, p.column_total_parts != nullptr);
  const T* column_limit = both ? static_cast<const T*>(v.column_limit) + t.column_start : nullptr;
  T* column_max = p.column_max_parts ? static_cast<T*>(p.column_max_parts) + part * t.columns : nullptr;
  if (column_max) std::fill(column_max, column_max + t.columns, -infinity);
  T seen[terms_per_block];
  for (int64_t i = begin; i < end; ++i) {
    const T limit = v.row_limit ? static_cast<const T*>(v.row_limit)[t.row_start + i] : infinity;
    for (int64_t block = 0; block < t.columns; block += terms_per_block) {
      const int64_t n = std::min(terms_per_block, t.columns - block);
      const T* s = static_cast<const T*>(t.values) + i * t.stride + block;
      const T* limits = both ? column_limit + block : nullptr;
      look(t, v, i, block, n, seen);
      T pivot = static_cast<T>(t.shift);
      T* column_sum = both ? columns.sum.data() + block : nullptr;
      if (t.running) {
        pivot = raise_row(p, i, s, seen, n, limit);
        column_sum = nullptr;
        if (column_max) {
          T* maximum = column_max + block;
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) {
            const T x = counts(seen[j], s[j], limits[j]) ? s[j] : -infinity;
            maximum[j] = x > maximum[j] ? x : maximum[j];
          }
        }
      }
      p.row_sum[i] += sum_seen(s, seen, n, pivot, limit, column_sum, limits);
      if (p.row_total) add_totals(p.row_total[i], p.row_count[i], s, seen, n, limit);
      if (p.column_total_parts) {
        add_column_totals(columns.total.data() + block, columns.count.data() + block, s, seen, n, limits);
      }
    }
    if (both && ends_block_of_rows(i, begin, end)) add_block_of_rows(t, p, columns, part);
  }
  if (column_max) sum_columns(t, v, p, columns, column_max, column_limit, begin, end, part);
}

// A side's numbers for the tile's rows or columns; null pointers where it has none.
template <class T>
struct Side {
  const T *pivot, *of_lse, *of_total;
};

// s becomes its weights.
template <class T>
static FASTJEM_INLINE void weigh_seen(const SimilarityTile& t, T* s, const T* seen, int64_t n, const Side<T>& row,
                                      int64_t i, T limit, const Side<T>& column, const T* column_limit) {
  const T shift = static_cast<T>(t.shift);
  const bool has_row = row.of_lse != nullptr;
  const T row_pivot = has_row && t.running ? row.pivot[i] : shift;
  const T row_of_lse = has_row ? row.of_lse[i] : T(0);
  const T row_of_total = row.of_total ? row.of_total[i] : T(0);
  const auto of_row = [=](T seen_j, T x, T e) {
    return counts(seen_j, x, limit) ? e * row_of_lse + row_of_total : T(0);
  };
  if (!column.of_lse) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) s[j] = of_row(seen[j], s[j], exponential(s[j] - row_pivot));
    return;
  }
  const T* of_lse = column.of_lse;
  const T* of_total = column.of_total;
  const T* pivot = column.pivot;
  if (!t.running) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T e = exponential(s[j] - shift);
      const T of_column = counts(seen[j], s[j], column_limit[j]) ? e * of_lse[j] + of_total[j] : T(0);
      s[j] = of_column + (has_row ? of_row(seen[j], s[j], e) : T(0));
    }
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T e = exponential(s[j] - pivot[j]);
    const T of_column = counts(seen[j], s[j], column_limit[j]) ? e * of_lse[j] + of_total[j] : T(0);
    s[j] = of_column + (has_row ? of_row(seen[j], s[j], exponential(s[j] - row_pivot)) : T(0));
  }
}

template <class T>
static void visible_weights_of(const SimilarityTile& t, const Visible& v, const VisibleSlopes& p, int64_t begin,
                               int64_t end) {
  const Side<T> row{static_cast<const T*>(p.row_pivot), static_cast<const T*>(p.row_of_lse),
                    static_cast<const T*>(p.row_of_total)};
  const T* column_limit = p.column_of_lse ? static_cast<const T*>(v.column_limit) + t.column_start : nullptr;
  T seen[terms_per_block];
  for (int64_t i = begin; i < end; ++i) {
    const T limit =
        v.row_limit ? static_cast<const T*>(v.row_limit)[t.row_start + i] : std::numeric_limits<T>::infinity();
    for (int64_t block = 0; block < t.columns; block += terms_per_block) {
      const int64_t n = std::min(terms_per_block, t.columns - block);
      const auto from_block = [&](const void* x) { return x ? static_cast<const T*>(x) + block : nullptr; };
      const Side<T> column{from_block(p.column_pivot), from_block(p.column_of_lse), from_block(p.column_of_total)};
      T* s = static_cast<T*>(t.values) + i * t.stride + block;
      look(t, v, i, block, n, seen);
      weigh_seen(t, s, seen, n, row, i, limit, column, from_block(column_limit));
    }
  }
}

static void visible_sums(const SimilarityTile& t, const Visible& v, const VisibleSums& p, int64_t begin, int64_t end,
                         int64_t part) {
  with_wide_dtype(t.dtype,
                  [&](auto* x) { visible_sums_of<std::remove_pointer_t<decltype(x)>>(t, v, p, begin, end, part); });
}
static void visible_weights(const SimilarityTile& t, const Visible& v, const VisibleSlopes& p, int64_t begin,
                            int64_t end) {
  with_wide_dtype(t.dtype,
                  [&](auto* x) { visible_weights_of<std::remove_pointer_t<decltype(x)>>(t, v, p, begin, end); });
}
