// The k best columns of rows of similarities, and the sums of rows by the centroid that each was assigned to.

// Whether (value, index) a is worse than b: the lower value, and of equal ones the later column. NaN is the highest.
template <class T>
static FASTJEM_INLINE bool is_worse(T a, int64_t i_a, T b, int64_t i_b) {
  const bool a_nan = a != a;
  const bool b_nan = b != b;
  if (a_nan || b_nan) return a_nan == b_nan ? i_a > i_b : b_nan;
  return a == b ? i_a > i_b : a < b;
}

// Puts (value, index) where `place` is, or below it, so that no element of the heap [0, size) is above a worse one.
template <class T>
static FASTJEM_INLINE void sift_down(T* values, int64_t* index, int64_t size, int64_t place, T value, int64_t i) {
  for (int64_t child = 2 * place + 1; child < size; child = 2 * place + 1) {
    const int64_t other = child + 1;
    if (other < size && is_worse(values[other], index[other], values[child], index[child])) child = other;
    if (!is_worse(values[child], index[child], value, i)) break;
    values[place] = values[child];
    index[place] = index[child];
    place = child;
  }
  values[place] = value;
  index[place] = i;
}

// Columns come in order, so one that equals the worst of the heap is later than it, and worse.
template <class T>
static void nearest_of(const Nearest& p, int64_t begin, int64_t end) {
  constexpr int64_t block = 64;
  for (int64_t i = begin; i < end; ++i) {
    const T* s = static_cast<const T*>(p.similarities) + i * p.stride;
    T* values = static_cast<T*>(p.values) + i * p.k;
    int64_t* index = p.index + i * p.k;
    const int64_t first = std::min(p.columns, p.k - p.kept);
    for (int64_t j = 0; j < first; ++j) {
      values[p.kept + j] = s[j];
      index[p.kept + j] = p.column_start + j;
    }
    if (p.kept + first < p.k) continue;
    if (first > 0) {
      for (int64_t place = p.k / 2 - 1; place >= 0; --place) {
        sift_down(values, index, p.k, place, values[place], index[place]);
      }
    }
    for (int64_t start = first; start < p.columns; start += block) {
      const int64_t stop = std::min(start + block, p.columns);
      const T worst = values[0];
      int better = 0;
#pragma omp simd reduction(+ : better)
      for (int64_t j = start; j < stop; ++j) better += s[j] <= worst ? 0 : 1;  // a NaN is better, whatever is worst
      if (!better) continue;
      for (int64_t j = start; j < stop; ++j) {
        if (s[j] <= values[0]) continue;
        const int64_t column = p.column_start + j;
        if (is_worse(values[0], index[0], s[j], column)) sift_down(values, index, p.k, int64_t{0}, s[j], column);
      }
    }
  }
}

// Best first: the worst goes to the end, again and again.
template <class T>
static void nearest_sorted_of(const Nearest& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* values = static_cast<T*>(p.values) + i * p.k;
    int64_t* index = p.index + i * p.k;
    for (int64_t place = p.k / 2 - 1; place >= 0; --place) {
      sift_down(values, index, p.k, place, values[place], index[place]);
    }
    for (int64_t last = p.k - 1; last > 0; --last) {
      const T value = values[last];
      const int64_t column = index[last];
      values[last] = values[0];
      index[last] = index[0];
      sift_down(values, index, last, int64_t{0}, value, column);
    }
  }
}

// The rows of every parts-th centroid.
template <class T>
static void add_assigned_of(const Assigned& a, int64_t part, int64_t parts) {
  const int64_t d = a.width;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t k = a.assignments[i];
    if (k % parts != part) continue;
    const T* x = static_cast<const T*>(a.rows) + i * d;
    const T* centroid = static_cast<const T*>(a.centroids) + k * d;
    double distance = 0;
    for (int64_t block = 0; block < d; block += terms_per_block) {
      const int64_t stop = std::min(block + terms_per_block, d);
      T partial = 0;
#pragma omp simd reduction(+ : partial)
      for (int64_t j = block; j < stop; ++j) partial += (x[j] - centroid[j]) * (x[j] - centroid[j]);
      distance += partial;
    }
    a.distances[i] = distance;
    if (!a.sums) continue;
    ++a.counts[k];
    double* sum = a.sums + k * d;
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) sum[j] += x[j];
  }
}

static void nearest(Dtype dtype, const Nearest& p, int64_t begin, int64_t end) {
  with_wide_dtype(dtype, [&](auto* x) { nearest_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
static void nearest_sorted(Dtype dtype, const Nearest& p, int64_t begin, int64_t end) {
  with_wide_dtype(dtype, [&](auto* x) { nearest_sorted_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
static void add_assigned(Dtype dtype, const Assigned& a, int64_t part, int64_t parts) {
  with_wide_dtype(dtype, [&](auto* x) { add_assigned_of<std::remove_pointer_t<decltype(x)>>(a, part, parts); });
}
