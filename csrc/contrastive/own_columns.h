// Calls f(j) for each column of the tile that shows row i's own image.
template <class F>
static inline void for_each_own_column(const SimilarityTile& t, int64_t i, F&& f) {
  if (t.column_period == 0) return;
  const int64_t image = (t.row_start + i) % t.row_period + t.offset;
  if (image < 0 || image >= t.column_period) return;
  const int64_t distance = t.column_start - image;
  const int64_t periods_before = distance > 0 ? (distance + t.column_period - 1) / t.column_period : 0;
  int64_t column = image + periods_before * t.column_period;
  for (; column < t.column_start + t.columns; column += t.column_period) f(column - t.column_start);
}
