// The supervised contrastive loss of rows [begin, end) of a tile that holds all their similarities:
// log(sum of exp(positives) + H) - mean of positives, with H = negatives * A / B, A the sum of exp((1 + hardness) *
// logit) over negatives and B that of exp(hardness * logit). A row needs no sums of another row, so its derivatives
// follow while it is in the cache, and each exponential is computed once.
//
// Exponents are differences of similarities from the row's largest positive or negative, a pivot of each, times the
// factor: at most 0, for any temperature. With a negative factor the largest logit is the least similarity, so `sign`
// goes before.

// Of one row: its columns, in which it doesn't see itself.
template <class T>
struct ClassRow {
  T* s;         // similarities, then exponentials, then derivatives
  T* harder;    // exp(hardness * logit), of negatives
  T* positive;  // 1 of the row's class, and 0
  T sign, scale, hardness;
  T positive_pivot, negative_pivot;
};

// Calls f(begin, end) for blocks of all columns but column i.
template <class F>
static inline void for_each_block_but(int64_t i, int64_t columns, F&& f) {
  const int64_t ends[] = {0, i, i + 1, columns};
  for (int64_t side = 0; side < 4; side += 2) {
    for (int64_t begin = ends[side]; begin < ends[side + 1]; begin += terms_per_block) {
      f(begin, std::min(begin + terms_per_block, ends[side + 1]));
    }
  }
}

// Which are positives, and the pivots. Returns how many are.
template <class T>
static FASTJEM_NOINLINE T class_pivots(ClassRow<T>& row, const int64_t* labels, int64_t label, int64_t begin,
                                       int64_t end) {
  T positives = 0;
  T of_positives = row.positive_pivot;
  T of_negatives = row.negative_pivot;
  const T sign = row.sign;
  const T* s = row.s;
  T* positive = row.positive;
#pragma omp simd reduction(+ : positives) reduction(max : of_positives, of_negatives)
  for (int64_t j = begin; j < end; ++j) {
    const bool is_positive = labels[j] == label;
    const T key = s[j] * sign;
    positive[j] = is_positive ? T(1) : T(0);
    positives += positive[j];
    of_positives = is_positive && key > of_positives ? key : of_positives;
    of_negatives = !is_positive && key > of_negatives ? key : of_negatives;
  }
  row.positive_pivot = of_positives;
  row.negative_pivot = of_negatives;
  return positives;
}

struct ClassSums {
  double positives = 0;    // of exponentials, less the pivot; so are the others
  double differences = 0;  // of positives' logits less their pivot
  double both = 0;         // A
  double harder = 0;       // B
};

template <class T>
static FASTJEM_NOINLINE void class_exponentials(const ClassRow<T>& row, int64_t begin, int64_t end, ClassSums& sums) {
  T positives = 0;
  T differences = 0;
  T both = 0;
  T harder = 0;
  const ClassRow<T> r = row;
#pragma omp simd reduction(+ : positives, differences, both, harder)
  for (int64_t j = begin; j < end; ++j) {
    const bool is_positive = r.positive[j] > 0;
    const T difference = (r.s[j] * r.sign - (is_positive ? r.positive_pivot : r.negative_pivot)) * r.scale;
    const T e = exponential(difference);
    const T of_hardness = exponential(difference * r.hardness);
    r.s[j] = e;
    r.harder[j] = of_hardness;
    positives += is_positive ? e : T(0);
    differences += is_positive ? difference : T(0);
    both += is_positive ? T(0) : e * of_hardness;
    harder += is_positive ? T(0) : of_hardness;
  }
  sums.positives += positives;
  sums.differences += differences;
  sums.both += both;
  sums.harder += harder;
}

template <class T>
static FASTJEM_NOINLINE void class_derivatives(const ClassRow<T>& row, int64_t begin, int64_t end, T of_positive,
                                               T share, T of_both, T of_harder) {
  const ClassRow<T> r = row;
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) {
    const T of_negative = r.harder[j] * (r.s[j] * of_both - of_harder);
    r.s[j] = r.positive[j] > 0 ? r.s[j] * of_positive - share : of_negative;
  }
}

template <class T>
static void class_tile_rows_of(const ClassTile& p, int64_t begin, int64_t end) {
  const int64_t m = p.columns;
  std::vector<T> memory(2 * m);
  for (int64_t i = begin; i < end; ++i) {
    constexpr T nothing = -std::numeric_limits<T>::infinity();
    ClassRow<T> row{static_cast<T*>(p.values) + i * m,
                    memory.data(),
                    memory.data() + m,
                    static_cast<T>(p.factor < 0 ? -1 : 1),
                    static_cast<T>(std::abs(p.factor)),
                    static_cast<T>(p.hardness),
                    nothing,
                    nothing};
    double positives = 0;
    for_each_block_but(
        i, m, [&](int64_t from, int64_t to) { positives += class_pivots(row, p.labels, p.labels[i], from, to); });
    ClassSums sums;
    for_each_block_but(i, m, [&](int64_t from, int64_t to) { class_exponentials(row, from, to, sums); });

    // Logarithms of sums less the positives' pivot, of what positives and what negatives come to.
    const double negatives = static_cast<double>(m - 1) - positives;
    const double distance = static_cast<double>(row.negative_pivot) - static_cast<double>(row.positive_pivot);
    const double of_negatives = negatives > 0
                                    ? std::log(negatives * sums.both / sums.harder) + distance * std::abs(p.factor)
                                    : -std::numeric_limits<double>::infinity();
    const double of_positives = std::log(sums.positives);
    const double largest = std::max(of_positives, of_negatives);
    const double log_sum = largest + std::log(std::exp(of_positives - largest) + std::exp(of_negatives - largest));
    // A row without a positive has neither loss nor derivatives, unless something of it isn't finite.
    p.losses[i] = positives > 0 ? log_sum - sums.differences / positives : 0 * (sums.both + sums.harder);
    if (!p.wanted) continue;
    row.s[i] = 0;
    if (positives == 0) {
      std::fill(row.s, row.s + m, T(0));
      continue;
    }
    const double negative_share = negatives > 0 ? std::exp(of_negatives - log_sum) : 0;
    const T of_both = negatives > 0 ? static_cast<T>(negative_share * (1 + p.hardness) / sums.both) : T(0);
    const T of_harder = negatives > 0 ? static_cast<T>(negative_share * p.hardness / sums.harder) : T(0);
    for_each_block_but(i, m, [&](int64_t from, int64_t to) {
      class_derivatives(row, from, to, static_cast<T>(std::exp(-log_sum)), static_cast<T>(1 / positives), of_both,
                        of_harder);
    });
  }
}

static void class_tile_rows(const ClassTile& p, int64_t begin, int64_t end) {
  with_wide_dtype(p.dtype, [&](auto* x) { class_tile_rows_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
