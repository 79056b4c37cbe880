// KoLeo: the nearest other rows by tiles of similarities, then distances and their gradient. Neighbours are few, and so
// the second part is sums over rows that are in the caches.

// The best k so far of one row, best first: keys and the numbers they belong to. Of equal keys the first stays.
template <class T>
static FASTJEM_INLINE void insert_neighbor(T key, int64_t number, int64_t k, T* best, int64_t* numbers) {
  if (!(key > best[k - 1])) return;
  int64_t place = k - 1;
  for (; place > 0 && key > best[place - 1]; --place) {
    best[place] = best[place - 1];
    numbers[place] = numbers[place - 1];
  }
  best[place] = key;
  numbers[place] = number;
}

// NaN counts as the best, as in torch.argmax; no cosine is infinite.
template <class T>
static FASTJEM_INLINE T neighbor_key(T s) {
  return s == s ? s : std::numeric_limits<T>::infinity();
}

// Rows [begin, end) look along their columns. Of the few values that pass the worst of a row's best, most are met
// early: so a block of columns is only looked into where one of them does.
template <class T>
static void neighbors_of_rows_of(const NeighborTile& t, int64_t begin, int64_t end) {
  constexpr int64_t block = 64;
  for (int64_t i = begin; i < end; ++i) {
    T* s = static_cast<T*>(t.values) + i * t.columns;
    const int64_t column_start = t.column_start + i / t.rows_per_group * t.columns;
    const int64_t itself = t.row_start + i - column_start;
    if (itself >= 0 && itself < t.columns) s[itself] = -2;  // less than any cosine
    T* best = static_cast<T*>(t.row_best) + i * t.topk;
    int64_t* numbers = t.row_numbers + i * t.topk;
    for (int64_t first = 0; first < t.columns; first += block) {
      const int64_t stop = std::min(first + block, t.columns);
      const T least = best[t.topk - 1];
      int any = 0;
#pragma omp simd reduction(| : any)
      for (int64_t j = first; j < stop; ++j) any |= !(s[j] <= least);
      if (!any) continue;
      for (int64_t j = first; j < stop; ++j)
        insert_neighbor(neighbor_key(s[j]), column_start + j, t.topk, best, numbers);
    }
  }
}

// The same tile as its transpose shows it: columns [begin, end) look along the rows.
template <class T>
static void neighbors_of_columns_of(const NeighborTile& t, int64_t begin, int64_t end) {
  constexpr int64_t block = 16;
  const int64_t k = t.topk;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t width = std::min(block, end - first);
    T* best = static_cast<T*>(t.column_best) + first * k;
    int64_t* numbers = t.column_numbers + first * k;
    T least[block];
    for (int64_t j = 0; j < block; ++j) least[j] = j < width ? best[j * k + k - 1] : std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < t.rows; ++i) {
      const T* s = static_cast<const T*>(t.values) + i * t.columns + first;
      int any = 0;
      if (width == block) {
#pragma omp simd reduction(| : any)
        for (int64_t j = 0; j < block; ++j) any |= !(s[j] <= least[j]);
      } else {
        any = 1;
      }
      if (!any) continue;
      for (int64_t j = 0; j < width; ++j) {
        insert_neighbor(neighbor_key(s[j]), t.row_start + i, k, best + j * k, numbers + j * k);
        least[j] = best[j * k + k - 1];
      }
    }
  }
}

static void neighbors_of_rows(const NeighborTile& t, int64_t begin, int64_t end) {
  with_wide_dtype(t.dtype, [&](auto* x) { neighbors_of_rows_of<std::remove_pointer_t<decltype(x)>>(t, begin, end); });
}
static void neighbors_of_columns(const NeighborTile& t, int64_t begin, int64_t end) {
  with_wide_dtype(t.dtype,
                  [&](auto* x) { neighbors_of_columns_of<std::remove_pointer_t<decltype(x)>>(t, begin, end); });
}

// ||a - b + eps||_p. A sum of squares that left float's range is made again in double.
template <class W>
static FASTJEM_INLINE double koleo_distance(const W* a, const W* b, int64_t d, double p, W eps) {
  double total = 0;
  if (p == 2) {
    for (int64_t block = 0; block < d; block += terms_per_block) {
      const int64_t stop = std::min(block + terms_per_block, d);
      W sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = block; j < stop; ++j) {
        const W difference = a[j] - b[j] + eps;
        sum += difference * difference;
      }
      total += sum;
    }
    if (!(total > 1e-30)) {
      total = 0;
      for (int64_t j = 0; j < d; ++j) {
        const double difference = a[j] - b[j] + eps;
        total += difference * difference;
      }
    }
    return std::sqrt(total);
  }
  for (int64_t j = 0; j < d; ++j) total += std::pow(std::abs(static_cast<double>(a[j] - b[j] + eps)), p);
  return std::pow(total, 1 / p);
}

// out += weight * the distance's slope, which is difference / distance for p = 2. By way of `slope` [d], as it is to be
// rounded before it is added: those of two equal rows, of size 1 / eps, cancel, and a fused addition leaves their last
// digits.
template <class W>
static FASTJEM_INLINE void add_slope(const W* a, const W* b, int64_t d, double p, W eps, double distance, W weight,
                                     W* slope, W* out) {
  const W inverse = static_cast<W>(1 / distance);
  if (p == 2) {
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) slope[j] = (a[j] - b[j] + eps) * inverse * weight;
  } else {
    for (int64_t j = 0; j < d; ++j) {
      const W difference = a[j] - b[j] + eps;
      const W sign = difference > 0 ? W(1) : difference < 0 ? W(-1) : difference;  // 0 and NaN stay
      slope[j] = sign * static_cast<W>(std::pow(std::abs(difference) / distance, p - 1)) * weight;
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < d; ++j) out[j] += slope[j];
}

template <class W>
static void koleo_distances_of(const Koleo& t, int64_t begin, int64_t end) {
  const W* unit = static_cast<const W*>(t.unit);
  const W eps = static_cast<W>(t.eps);
  for (int64_t i = begin; i < end; ++i) {
    double loss = 0;
    for (int64_t n = i * t.topk; n < (i + 1) * t.topk; ++n) {
      const double distance = koleo_distance(unit + i * t.width, unit + t.neighbors[n] * t.width, t.width, t.p, eps);
      t.distances[n] = distance;
      loss -= std::log(distance + t.eps);
    }
    t.losses[i] = loss;
  }
}

// A row's gradient: by its own neighbours, less by the rows that it is a neighbour of; then through the unit length.
template <class T>
static void koleo_gradients_of(const Koleo& t, int64_t begin, int64_t end) {
  using W = wide<T>;
  const W* units = static_cast<const W*>(t.unit);
  const W eps = static_cast<W>(t.eps);
  const int64_t d = t.width;
  const W largest = static_cast<W>(t.largest);
  std::vector<W> sum(d);
  std::vector<W> slope(d);
  const auto weight = [&](int64_t n) { return static_cast<W>(1 / (t.distances[n] + t.eps)); };
  for (int64_t i = begin; i < end; ++i) {
    const W* u = units + i * d;
    std::fill(sum.begin(), sum.end(), W(0));
    for (int64_t n = i * t.topk; n < (i + 1) * t.topk; ++n) {
      add_slope(u, units + t.neighbors[n] * d, d, t.p, eps, t.distances[n], -weight(n), slope.data(), sum.data());
    }
    for (int64_t at = t.begins[i]; at < t.begins[i + 1]; ++at) {
      const int64_t n = t.pairs[at];
      add_slope(units + n / t.topk * d, u, d, t.p, eps, t.distances[n], weight(n), slope.data(), sum.data());
    }
    const W* g = sum.data();
    W radial = 0;
    if (t.divisors[i] > t.eps) {
#pragma omp simd reduction(+ : radial)
      for (int64_t j = 0; j < d; ++j) radial += g[j] * u[j];
    }
    const W scale = static_cast<W>(1 / t.divisors[i]);
    T* out = static_cast<T*>(t.gradient) + i * d;
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) {
      W value = (g[j] - radial * u[j]) * scale;
      value = value < -largest ? -largest : value;
      value = value > largest ? largest : value;  // NaN stays
      narrow(value, out[j]);
    }
  }
}

static void koleo_distances(const Koleo& t, int64_t begin, int64_t end) {
  with_dtype(t.dtype, [&](auto* x) { koleo_distances_of<wide<std::remove_pointer_t<decltype(x)>>>(t, begin, end); });
}
static void koleo_gradients(const Koleo& t, int64_t begin, int64_t end) {
  with_dtype(t.dtype, [&](auto* x) { koleo_gradients_of<std::remove_pointer_t<decltype(x)>>(t, begin, end); });
}
