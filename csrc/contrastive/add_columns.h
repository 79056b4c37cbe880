// After each_isa.h, whose arithmetic it takes.
#pragma once

namespace fastjem {

// Adds each part's sums of columns to those of the tiles before; `maxima` [parts, columns], or null with a shift.
template <class T>
static void add_columns(const SimilarityTile& t, int64_t parts, const double* sums, const T* maxima, double* column_max,
                        double* column_sum) {
  const double scale = std::abs(t.factor);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t j = 0; j < t.columns; ++j) {
      const double sum = sums[part * t.columns + j];
      if (!maxima) {
        column_sum[j] += sum;
        continue;
      }
      const double maximum = maxima[part * t.columns + j];
      const double before = column_max[j];
      column_max[j] = std::max(before, maximum);
      const double pivot = baseline::to_finite(column_max[j]);
      column_sum[j] = column_sum[j] * std::exp((baseline::to_finite(before) - pivot) * scale) +
                      sum * std::exp((baseline::to_finite(maximum) - pivot) * scale);
    }
  }
}

}  // namespace fastjem
