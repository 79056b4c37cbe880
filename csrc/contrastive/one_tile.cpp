#include "contrastive/tile.h"

namespace fastjem {

// All similarities of n rows with n columns, every row with its one partner: column (i + distance) % n for row i. With
// a distance of 0 these are CLIP's pairs; else the columns are the rows themselves, and none sees itself.
struct OneTile {
  Dtype dtype;   // float32 or float64
  void* values;  // [n, n]: similarities, then exponentials, then weights
  int64_t n;
  const void *rows, *columns;  // [n, width], whose products the similarities are
  int64_t width, distance;
  double factor;   // a logit is a similarity times it
  bool decoupled;  // a row's partner isn't one of its candidates
  double shift;    // subtracted from each logit

  int64_t partner_of(int64_t i) const { return i + distance < n ? i + distance : i + distance - n; }
};

struct OneTileSums {
  double *least, *largest;  // [n], of each row's similarities
  double* positives;        // [n], the logit of each row with its partner
  double* row_sums;         // [n], of exp(logit - shift)
  double* column_parts;     // [parts, n]: the same of columns, or null where the columns are the rows
  double* column_sums;      // [n]; the row sums where the columns are the rows
};

}  // namespace fastjem

#define FASTJEM_KERNEL "contrastive/one_tile.h"
#include "each_isa.h"

namespace fastjem {

namespace py = pybind11;

// The sum of the rows' losses, and of the columns' where they aren't the rows. In place of the similarities come the
// weights of the gradient, if they are wanted: `weights @ columns` is the rows' gradient over the factor, and
// `weights.T @ rows` the columns'. Without a result where the logits' range is too wide for one shift.
static std::pair<bool, double> one_tile(int dtype, uintptr_t values, int64_t n, uintptr_t rows, uintptr_t columns,
                                        int64_t width, int64_t distance, double factor, bool decoupled, bool wanted,
                                        int threads) {
  OneTile t{static_cast<Dtype>(dtype),
            at<void>(values),
            n,
            at<const void>(rows),
            at<const void>(columns),
            width,
            distance,
            factor,
            decoupled,
            0};
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n * n / 4096));
  const bool pairs = distance == 0;
  std::vector<double> memory(n * (5 + (pairs ? parts : 0)));
  double* next = memory.data();
  const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
  OneTileSums sums{take(n), take(n), take(n), take(n), nullptr, nullptr};
  double* own_column_sums = take(n);
  sums.column_sums = pairs ? own_column_sums : sums.row_sums;
  sums.column_parts = pairs ? take(parts * n) : nullptr;
  const auto in_parts = [&](auto&& f) {
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1) if (parts > 1)
    for (int64_t part = 0; part < parts; ++part) f(n * part / parts, n * (part + 1) / parts, part);
  };

  in_parts([&](int64_t begin, int64_t end, int64_t) { FASTJEM_BEST(one_tile_range(t, sums, begin, end)); });
  const double least = *std::min_element(sums.least, sums.least + n);
  const double largest = *std::max_element(sums.largest, sums.largest + n);
  const Range range(t.dtype);
  const double least_logit = factor * (factor < 0 ? largest : least);
  t.shift = std::max(0.0, factor * (factor < 0 ? least : largest) - range.top);
  if (!(least_logit - t.shift >= -range.bottom)) return {false, 0};

  in_parts([&](int64_t begin, int64_t end, int64_t part) {
    FASTJEM_BEST(one_tile_exponentials(t, sums, begin, end, part));
  });
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double of_partner = decoupled ? 0 : std::exp(sums.positives[i] - t.shift);
    sums.row_sums[i] += of_partner;
    total += std::log(sums.row_sums[i]) + t.shift - sums.positives[i];
    if (!pairs) continue;
    double column_sum = of_partner;
    for (int64_t part = 0; part < parts; ++part) column_sum += sums.column_parts[part * n + i];
    sums.column_sums[i] = column_sum;
    total += std::log(column_sum) + t.shift - sums.positives[i];
  }
  if (wanted) {
    in_parts([&](int64_t begin, int64_t end, int64_t) { FASTJEM_BEST(one_tile_weights(t, sums, begin, end)); });
  }
  return {true, total};
}

void bind_one_tile(py::module_& m) { m.def("one_tile", &one_tile, py::call_guard<py::gil_scoped_release>()); }

}  // namespace fastjem
