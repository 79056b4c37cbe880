#include "contrastive/seen.h"

namespace fastjem {

// What is kept of rows and columns for the gradient. Logits and sums are those less the tile's shift.
struct SeenTileState {
  double* positives;                     // [rows, positives], logits
  double *row_sums, *row_uniform;        // [rows], of exponentials, positives among them; smoothing / candidates
  double *column_sums, *column_uniform;  // [columns]; null where columns have no losses
};

struct SeenTile {
  SimilarityTile tile;
  Visible visible;
  const void* rows;      // [rows, width], of which the tile has the products with the columns
  const void* partners;  // [rows, width]: row i's positives are its rows `partner_of(i, k)`
  int64_t width, positives, distance;
  double smoothing;
  SeenTileState state;
  double *row_totals, *row_counts;  // [rows], of what is seen; 0 without smoothing

  int64_t partner_of(int64_t i, int64_t k) const { return (i + (k + 1) * distance) % tile.rows; }
};

struct SeenTileWeights {
  Dtype dtype;
  const void* exponentials;  // [rows, columns]
  void* weights;             // [rows, columns]; may be the exponentials' memory
  int64_t rows, columns, positives, distance;
  double smoothing;
  SeenTileState state;
  const double* slopes;  // [rows]: a loss's derivative by each row's loss, and by that of the column of its number
  void* of_positives;    // [rows, positives], their weights; null: they are columns of the tile

  int64_t partner_of(int64_t i, int64_t k) const { return (i + (k + 1) * distance) % rows; }
  double of_positive() const { return (1 - smoothing) / static_cast<double>(positives); }
};

}  // namespace fastjem

#define FASTJEM_KERNEL "contrastive/seen_tile.h"
#include "each_isa.h"

namespace fastjem {

// Which losses there are: of rows; of rows and of columns, which see each other as rows do; or of rows that are the
// columns, and whose weights are wanted in either place.
enum class Sides : int { rows = 0, both = 1, same = 2 };

// Positives [rows, positives], and sums and uniform parts of rows, and of columns.
static SeenTileState state_at(uintptr_t memory, int64_t rows, int64_t columns, int64_t positives, Sides sides) {
  double* next = at<double>(memory);
  const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
  SeenTileState state{take(rows * positives), take(rows), take(rows), nullptr, nullptr};
  if (sides == Sides::both) {
    state.column_sums = take(columns);
    state.column_uniform = take(columns);
  }
  return state;
}

// As Python hands them over: (rows, partners, width, positives, distance).
using Positives = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;

// A row's loss, given the sums over its negatives; `sum` becomes that over all candidates.
static double loss_of_row(const SeenTile& p, const double* positives, double& sum, double& uniform, double total,
                          double count) {
  double positive_total = 0;
  for (int64_t k = 0; k < p.positives; ++k) {
    sum += std::exp(positives[k]);
    positive_total += positives[k];
  }
  const double number = static_cast<double>(p.positives);
  uniform = p.smoothing / (count + number);
  const double rest = p.smoothing == 0 ? 0 : uniform * (total + positive_total);
  return std::log(sum) - (1 - p.smoothing) * (positive_total / number) - rest;
}

// [rows] losses; of both sides, the mean of row i's and column i's. False where the logits' range is too wide for one
// shift, or something isn't finite.
static bool losses(int dtype, uintptr_t values, int64_t rows, int64_t columns, double factor, const OwnImage& own_image,
                   const VisibleArguments& visible_arguments, const Positives& of_positives, double smoothing, int of,
                   uintptr_t memory, uintptr_t results, int threads) {
  const auto [a, partners, width, positives, distance] = of_positives;
  const Sides sides = static_cast<Sides>(of);
  SeenTile p{tile(dtype, values, rows, columns, columns, Scaling{factor, 0, false}, own_image),
             visible(visible_arguments),
             at<const void>(a),
             at<const void>(partners),
             width,
             positives,
             distance,
             smoothing,
             state_at(memory, rows, columns, positives, sides),
             nullptr,
             nullptr};
  const int64_t parts = parts_of(rows, columns, threads);
  const bool both = sides == Sides::both;
  std::vector<double> of_rows(2 * rows);
  std::vector<double> of_columns(both ? 3 * parts * columns : 0);
  p.row_totals = of_rows.data();
  p.row_counts = p.row_totals + rows;

  double* least = p.row_totals;  // whose memory the totals take next
  double* largest = p.row_counts;
  in_parts(rows, parts,
           [&](int64_t begin, int64_t end, int64_t) { FASTJEM_BEST(seen_tile_range(p, least, largest, begin, end)); });
  double* logits = p.state.positives;
  const auto [least_positive, largest_positive] = std::minmax_element(logits, logits + rows * positives);
  const double lowest = *std::min_element(least, least + rows) * factor;
  const double highest = *std::max_element(largest, largest + rows) * factor;
  const Range range(p.tile.dtype);
  p.tile.shift = std::max(0.0, std::max({lowest, highest, *largest_positive}) - range.top);
  if (!(std::min({lowest, highest, *least_positive}) - p.tile.shift >= -range.bottom)) return false;
  for (int64_t k = 0; k < rows * positives; ++k) logits[k] -= p.tile.shift;

  in_parts(rows, parts, [&](int64_t begin, int64_t end, int64_t part) {
    double* column_sums = both ? of_columns.data() + part * 3 * columns : nullptr;
    FASTJEM_BEST(seen_tile_exponentials(p, column_sums, begin, end));
  });
  double* loss = at<double>(results);
  bool finite = true;
  for (int64_t i = 0; i < rows; ++i) {
    SeenTileState& state = p.state;
    loss[i] = loss_of_row(p, logits + i * positives, state.row_sums[i], state.row_uniform[i], p.row_totals[i],
                          p.row_counts[i]);
    if (both) {
      double sums[3] = {0, 0, 0};
      for (int64_t at_part = 0; at_part < 3 * parts; ++at_part) sums[at_part % 3] += of_columns[at_part * columns + i];
      state.column_sums[i] = sums[0];
      loss[i] += loss_of_row(p, logits + i, state.column_sums[i], state.column_uniform[i], sums[1], sums[2]);
      loss[i] /= 2;
    }
    finite &= std::isfinite(loss[i]);
  }
  return finite;
}

static void weights(int dtype, uintptr_t exponentials, uintptr_t result, int64_t rows, int64_t columns,
                    int64_t positives, int64_t distance, double smoothing, int of, uintptr_t memory, uintptr_t slopes,
                    uintptr_t of_positives, int threads) {
  const Sides sides = static_cast<Sides>(of);
  SeenTileWeights p{static_cast<Dtype>(dtype),
                    at<const void>(exponentials),
                    at<void>(result),
                    rows,
                    columns,
                    positives,
                    distance,
                    smoothing,
                    state_at(memory, rows, columns, positives, sides),
                    at<const double>(slopes),
                    at<void>(of_positives)};
  if (sides == Sides::same) {
    p.state.column_sums = p.state.row_sums;
    p.state.column_uniform = p.state.row_uniform;
  }
  in_parts(rows, parts_of(rows, columns, threads),
           [&](int64_t begin, int64_t end, int64_t) { FASTJEM_BEST(seen_tile_weights(p, begin, end)); });
}

void bind_seen_tile(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> release;
  m.def("seen_tile_losses", &losses, release);
  m.def("seen_tile_weights", &weights, release);
}

}  // namespace fastjem
