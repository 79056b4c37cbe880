// Sums over rows for columns side by side. Included by kernel headers inside their namespaces.

// sums_j += sum_i f(i, j) over all rows i, for the columns j of a block.
template <class W, class F>
static inline void column_sums(int64_t rows, int64_t width, double* sums, F&& f) {
  for (int64_t start = 0; start < rows; start += terms_per_block) {
    const int64_t stop = std::min(start + terms_per_block, rows);
    W partial[max_columns] = {};
    for (int64_t i = start; i < stop; ++i) {
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) partial[j] += f(i, j);
    }
    for (int64_t j = 0; j < width; ++j) sums[j] += partial[j];
  }
}
