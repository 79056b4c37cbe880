// Rows [begin, end) of a tile that holds all similarities of a loss in which not every row sees every column. First
// come the exponentials, which are 0 where nothing is seen, and what each row's loss is made of; then, when the loss's
// derivative by each row's loss is known, the gradient's weights. Each exponential is computed once.

#include "contrastive/look.h"

template <class T>
static void seen_tile_range_of(const SeenTile& p, double* least_of_rows, double* largest_of_rows, int64_t begin,
                               int64_t end) {
  const SimilarityTile& t = p.tile;
  for (int64_t i = begin; i < end; ++i) {
    const T* s = static_cast<const T*>(t.values) + i * t.columns;
    T least = std::numeric_limits<T>::infinity();
    T largest = -least;
#pragma omp simd reduction(min : least) reduction(max : largest)
    for (int64_t j = 0; j < t.columns; ++j) {
      least = s[j] < least ? s[j] : least;
      largest = s[j] > largest ? s[j] : largest;
    }
    least_of_rows[i] = least;
    largest_of_rows[i] = largest;
    for (int64_t k = 0; k < p.positives; ++k) {  // in double: a small loss is what they and the log-sum-exp leave
      const T* x = static_cast<const T*>(p.rows) + i * p.width;
      const T* y = static_cast<const T*>(p.partners) + p.partner_of(i, k) * p.width;
      double dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < p.width; ++d) dot += static_cast<double>(x[d]) * static_cast<double>(y[d]);
      p.state.positives[i * p.positives + k] = dot * t.factor;
    }
  }
}

// Sums over a block of columns of what a row sees: of exponentials, of logits, and their number.
template <class T>
struct BlockSums {
  T sum = 0, total = 0, count = 0;
};

// s becomes its exponentials. `column` points to what the columns have so far, or is null: sums, and behind `stride`
// elements each totals and numbers.
template <class T, bool with_totals, bool with_columns>
static FASTJEM_INLINE BlockSums<T> exponentials_of_block(T* s, const T* seen, int64_t n, T factor, T shift, T* column,
                                                         int64_t stride) {
  T sum = 0;
  T total = 0;
  T count = 0;
#pragma omp simd reduction(+ : sum, total, count)
  for (int64_t j = 0; j < n; ++j) {
    const T logit = s[j] * factor - shift;
    const T e = seen[j] > 0 ? exponential(logit) : T(0);
    s[j] = e;
    sum += e;
    if (with_columns) column[j] += e;
    if (with_totals) {
      const T of_seen = seen[j] > 0 ? logit : T(0);
      total += of_seen;
      count += seen[j];
      if (with_columns) {
        column[stride + j] += of_seen;
        column[2 * stride + j] += seen[j];
      }
    }
  }
  return {sum, total, count};
}

template <class T, bool with_totals, bool with_columns>
static void seen_tile_exponentials_of(const SeenTile& p, double* column_sums, int64_t begin, int64_t end) {
  const SimilarityTile& t = p.tile;
  const int64_t m = t.columns;
  std::vector<T> of_columns(with_columns ? 3 * m : 0);
  T seen[terms_per_block];
  for (int64_t i = begin; i < end; ++i) {
    double sum = 0;
    double total = 0;
    double count = 0;
    for (int64_t block = 0; block < m; block += terms_per_block) {
      const int64_t n = std::min(terms_per_block, m - block);
      look(t, p.visible, i, block, n, seen);
      T* s = static_cast<T*>(t.values) + i * m + block;
      T* column = with_columns ? of_columns.data() + block : nullptr;
      const BlockSums<T> sums = exponentials_of_block<T, with_totals, with_columns>(
          s, seen, n, static_cast<T>(t.factor), static_cast<T>(t.shift), column, m);
      sum += sums.sum;
      total += sums.total;
      count += sums.count;
    }
    p.state.row_sums[i] = sum;
    p.row_totals[i] = total;
    p.row_counts[i] = count;
    if (with_columns && ends_block_of_rows(i, begin, end)) {
      add_block(of_columns.data(), with_totals ? 3 * m : m, column_sums);
    }
  }
}

// A weight is that of its row's loss and that of its column's, if columns have losses.
template <class T>
static void seen_tile_weights_of(const SeenTileWeights& p, int64_t begin, int64_t end) {
  const int64_t m = p.columns;
  std::vector<T> of_columns(3 * m);  // inverse sums, slopes, and slopes' uniform parts; 0 without losses of columns
  T* inverse = of_columns.data();
  T* slope = inverse + m;
  T* uniform = slope + m;
  const SeenTileState& state = p.state;
  for (int64_t j = 0; state.column_sums && j < m; ++j) {
    inverse[j] = static_cast<T>(1 / state.column_sums[j]);
    slope[j] = static_cast<T>(p.slopes[j]);
    uniform[j] = static_cast<T>(p.slopes[j] * state.column_uniform[j]);
  }
  for (int64_t i = begin; i < end; ++i) {
    const T* e = static_cast<const T*>(p.exponentials) + i * m;
    T* weight = static_cast<T*>(p.weights) + i * m;
    const T row_inverse = static_cast<T>(1 / state.row_sums[i]);
    const T row_slope = static_cast<T>(p.slopes[i]);
    const T row_uniform = static_cast<T>(p.slopes[i] * state.row_uniform[i]);
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) {  // a sum's inverse first: with it an exponential is at most 1
      const T probabilities = (e[j] * row_inverse) * row_slope + (e[j] * inverse[j]) * slope[j];
      weight[j] = e[j] > 0 ? probabilities - (row_uniform + uniform[j]) : T(0);
    }
    for (int64_t k = 0; k < p.positives; ++k) {
      const int64_t partner = p.partner_of(i, k);
      const double logit = state.positives[i * p.positives + k];
      const auto of_loss = [&](double of_slope, double sum, double uniform_part) {
        return of_slope * (std::expm1(logit - std::log(sum)) + 1 - (p.of_positive() + uniform_part));
      };
      double of_positive = of_loss(p.slopes[i], state.row_sums[i], state.row_uniform[i]);
      if (state.column_sums) {
        of_positive += of_loss(p.slopes[partner], state.column_sums[partner], state.column_uniform[partner]);
      }
      if (p.of_positives) {
        static_cast<T*>(p.of_positives)[i * p.positives + k] = static_cast<T>(of_positive);
      } else {
        weight[partner] = static_cast<T>(of_positive);
      }
    }
  }
}

static void seen_tile_range(const SeenTile& p, double* least, double* largest, int64_t begin, int64_t end) {
  with_wide_dtype(p.tile.dtype, [&](auto* x) {
    seen_tile_range_of<std::remove_pointer_t<decltype(x)>>(p, least, largest, begin, end);
  });
}

// column_sums [3, columns]: sums, totals, numbers; or null.
static void seen_tile_exponentials(const SeenTile& p, double* column_sums, int64_t begin, int64_t end) {
  with_wide_dtype(p.tile.dtype, [&](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    if (p.smoothing != 0) {
      if (column_sums) return seen_tile_exponentials_of<T, true, true>(p, column_sums, begin, end);
      return seen_tile_exponentials_of<T, true, false>(p, column_sums, begin, end);
    }
    if (column_sums) return seen_tile_exponentials_of<T, false, true>(p, column_sums, begin, end);
    return seen_tile_exponentials_of<T, false, false>(p, column_sums, begin, end);
  });
}

static void seen_tile_weights(const SeenTileWeights& p, int64_t begin, int64_t end) {
  with_wide_dtype(p.dtype, [&](auto* x) { seen_tile_weights_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
