// Loss and gradients of a few rows in one go, all of it in double: what a call costs there is the number of its steps.

using Square = std::vector<double>;  // [N, M]

// Rows [N, D], of unit length if `normalize`, and what they were divided by (else 1), as `unit_rows` of the engine.
struct SmallRows {
  int64_t n, width;
  std::vector<double> unit;
  std::vector<double> divisors;
};

template <class T>
static void read_row(const T* x, int64_t d, bool normalize, double* out, double* divisor) {
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < d; ++j) {
    const double value = static_cast<double>(widen(x[j]));
    out[j] = value;
    squares += value * value;
  }
  if (!normalize) return;
  *divisor = std::max(std::sqrt(squares), unit_eps);
  const double inverse = 1 / *divisor;
#pragma omp simd
  for (int64_t j = 0; j < d; ++j) out[j] *= inverse;
}

static SmallRows read_rows(const std::vector<const void*>& views, Dtype dtype, int64_t rows_per_view, int64_t d,
                           bool normalize) {
  const int64_t n = static_cast<int64_t>(views.size()) * rows_per_view;
  SmallRows rows{n, d, std::vector<double>(n * d), std::vector<double>(n, 1.0)};
  with_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    for (int64_t i = 0; i < n; ++i) {
      const T* x = static_cast<const T*>(views[i / rows_per_view]) + i % rows_per_view * d;
      read_row(x, d, normalize, rows.unit.data() + i * d, &rows.divisors[i]);
    }
  });
  return rows;
}

// The gradient [N, D] for rows as they came, given that for their unit rows, into the memory of each view; null: none.
static void write_gradients(const SmallRows& rows, const Square& gradient, bool normalize, Dtype dtype,
                            int64_t rows_per_view, const std::vector<void*>& views) {
  const int64_t d = rows.width;
  with_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    for (int64_t i = 0; i < rows.n; ++i) {
      T* out = static_cast<T*>(views[i / rows_per_view]);
      if (!out) continue;
      out += i % rows_per_view * d;
      const double* g = gradient.data() + i * d;
      const double* u = rows.unit.data() + i * d;
      if (!normalize) {
        for (int64_t j = 0; j < d; ++j) narrow(static_cast<wide<T>>(g[j]), out[j]);
        continue;
      }
      double radial = 0;  // the part along the row, which normalising takes away, unless eps was the divisor
      if (!(rows.divisors[i] <= unit_eps)) {
#pragma omp simd reduction(+ : radial)
        for (int64_t j = 0; j < d; ++j) radial += g[j] * u[j];
      }
      const double inverse = 1 / rows.divisors[i];
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) narrow(static_cast<wide<T>>((g[j] - radial * u[j]) * inverse), out[j]);
    }
  });
}

// a @ b.T
static Square products(const SmallRows& a, const SmallRows& b) {
  Square out(a.n * b.n);
  const int64_t d = a.width;
  for (int64_t i = 0; i < a.n; ++i) {
    const double* x = a.unit.data() + i * d;
    for (int64_t j = 0; j < b.n; ++j) {
      const double* y = b.unit.data() + j * d;
      double dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t k = 0; k < d; ++k) dot += x[k] * y[k];
      out[i * b.n + j] = dot;
    }
  }
  return out;
}

// out [N, D] += g [N, M] @ rows [M, D]; `transposed`: out [M, D] += g.T @ rows [N, D].
static void add_product(const Square& g, int64_t n, int64_t m, const SmallRows& rows, bool transposed, Square& out) {
  const int64_t d = rows.width;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const double weight = g[i * m + j];
      const double* x = rows.unit.data() + (transposed ? i : j) * d;
      double* y = out.data() + (transposed ? j : i) * d;
#pragma omp simd
      for (int64_t k = 0; k < d; ++k) y[k] += weight * x[k];
    }
  }
}

// The log-sum-exp of n logits `stride` apart. In their place come their softmax's probabilities.
static double softmax(double* x, int64_t n, int64_t stride) {
  double maximum = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < n; ++j) maximum = std::max(maximum, x[j * stride]);
  const double pivot = to_finite(maximum);
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += x[j * stride] = std::exp(x[j * stride] - pivot);
  const double inverse = 1 / sum;
  for (int64_t j = 0; j < n; ++j) x[j * stride] *= inverse;
  return pivot + std::log(sum);
}

// NT-Xent, DCL and SupCon: sum_i counted_i (lse_i - sum_j share_ij logit_ij), where share are the positives' weights.
static void small_views(const SmallViews& p, double& loss) {
  const SmallRows rows = read_rows(p.views, p.dtype, p.images, p.width, p.normalize);
  const int64_t m = rows.n;
  const Square logits = products(rows, rows);
  const double factor = 1 / p.temperature;
  constexpr double hidden = -std::numeric_limits<double>::infinity();
  Square weights(m * m, 0.0);  // of the gradient, row by row: counted_i (probability_ij - share_ij)
  std::vector<double> shares(m);
  loss = 0;
  for (int64_t i = 0; i < m; ++i) {
    if (p.one_anchor && i >= p.images) break;
    double positives = 0;
    for (int64_t j = 0; j < m; ++j) {
      const bool same_image = i % p.images == j % p.images;
      const bool positive = j != i && (p.labels ? p.labels[i % p.images] == p.labels[j % p.images] : same_image);
      shares[j] = positive;
      positives += positive;
      weights[i * m + j] = j == i || (p.decoupled && same_image) ? hidden : logits[i * m + j] * factor;
    }
    if (positives == 0) {  // no anchor; an only view has no positives and still is NT-Xent's
      std::fill_n(weights.begin() + i * m, m, 0.0);
      continue;
    }
    double pulled = 0;
    for (int64_t j = 0; j < m; ++j) {
      if (shares[j] == 0) continue;
      shares[j] /= positives;
      pulled += shares[j] * logits[i * m + j] * factor;
    }
    if (p.decoupled && p.images == 1) {  // there is no other image
      std::fill_n(weights.begin() + i * m, m, 0.0);
      loss = hidden;
    } else {
      loss += softmax(&weights[i * m], m, 1) - pulled;
    }
    for (int64_t j = 0; j < m; ++j) weights[i * m + j] -= shares[j];
  }
  if (std::none_of(p.gradients.begin(), p.gradients.end(), [](void* g) { return g != nullptr; })) return;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      const double both = weights[i * m + j] + weights[j * m + i];
      weights[i * m + j] = both;
      weights[j * m + i] = both;
    }
  }
  Square gradient(m * p.width, 0.0);
  add_product(weights, m, m, rows, false, gradient);
  write_gradients(rows, gradient, p.normalize, p.dtype, p.images, p.gradients);
}

// InfoNCE: the sum over queries of the log-sum-exp less the positive's logit.
static void small_info_nce(const SmallInfoNce& p, double& loss) {
  const SmallRows q = read_rows({p.query}, p.dtype, p.n, p.width, true);
  const SmallRows positive = read_rows({p.positive}, p.dtype, p.n, p.width, true);
  const SmallRows bank = read_rows({p.negatives}, p.dtype, p.k, p.width, true);
  const double factor = 1 / p.temperature;
  Square weights = products(q, bank);
  Square positive_weights(p.n);
  loss = 0;
  std::vector<double> logits(1 + p.k);
  for (int64_t i = 0; i < p.n; ++i) {
    double dot = 0;
    for (int64_t k = 0; k < p.width; ++k) dot += q.unit[i * p.width + k] * positive.unit[i * p.width + k];
    logits[0] = dot * factor;
    for (int64_t j = 0; j < p.k; ++j) {
      const bool itself = j == i + p.offset;
      logits[1 + j] = itself ? -std::numeric_limits<double>::infinity() : weights[i * p.k + j] * factor;
    }
    const double lse = softmax(logits.data(), 1 + p.k, 1);
    loss += lse - dot * factor;
    positive_weights[i] = std::expm1(dot * factor - lse);
    std::copy(logits.begin() + 1, logits.end(), weights.begin() + i * p.k);
  }
  const auto by_row = [&](const SmallRows& rows, Square& out) {
    for (int64_t i = 0; i < p.n; ++i) {
      for (int64_t k = 0; k < p.width; ++k) out[i * p.width + k] += positive_weights[i] * rows.unit[i * p.width + k];
    }
  };
  if (p.query_gradient) {
    Square gradient(p.n * p.width, 0.0);
    by_row(positive, gradient);
    add_product(weights, p.n, p.k, bank, false, gradient);
    write_gradients(q, gradient, true, p.dtype, p.n, {p.query_gradient});
  }
  if (p.positive_gradient) {
    Square gradient(p.n * p.width, 0.0);
    by_row(q, gradient);
    write_gradients(positive, gradient, true, p.dtype, p.n, {p.positive_gradient});
  }
  if (p.negatives_gradient) {
    Square gradient(p.k * p.width, 0.0);
    add_product(weights, p.n, p.k, q, true, gradient);
    write_gradients(bank, gradient, true, p.dtype, p.k, {p.negatives_gradient});
  }
}

// The gradients for x and y over the scale, given `weights` [N, N] of the similarities; and that for the scale.
static double write_pairs(const SmallPairs& p, const SmallRows& x, const SmallRows& y, const Square& similarities,
                          const Square& weights) {
  if (p.x_gradient) {
    Square gradient(p.n * p.width, 0.0);
    add_product(weights, p.n, p.n, y, false, gradient);
    write_gradients(x, gradient, false, p.dtype, p.n, {p.x_gradient});
  }
  if (p.y_gradient) {
    Square gradient(p.n * p.width, 0.0);
    add_product(weights, p.n, p.n, x, true, gradient);
    write_gradients(y, gradient, false, p.dtype, p.n, {p.y_gradient});
  }
  double of_scale = 0;
  for (int64_t i = 0; i < p.n * p.n; ++i) of_scale += weights[i] * similarities[i];
  return of_scale;
}

// CLIP: the sum over pairs of both log-sum-exps less twice the pair's logit; and the gradient for the scale.
static void small_clip(const SmallPairs& p, SmallPairsFound& found) {
  const int64_t n = p.n;
  const SmallRows x = read_rows({p.x}, p.dtype, n, p.width, false);
  const SmallRows y = read_rows({p.y}, p.dtype, n, p.width, false);
  const Square similarities = products(x, y);
  Square weights(n * n);
  for (int64_t i = 0; i < n * n; ++i) weights[i] = similarities[i] * p.scale;
  Square by_column = weights;
  double loss = 0;
  std::vector<double> own(n);
  for (int64_t i = 0; i < n; ++i) {
    const double logit = weights[i * n + i];
    const double row_lse = softmax(&weights[i * n], n, 1);
    const double column_lse = softmax(&by_column[i], n, n);
    loss += (row_lse - logit) + (column_lse - logit);
    own[i] = std::expm1(logit - row_lse) + std::expm1(logit - column_lse);
  }
  for (int64_t i = 0; i < n * n; ++i) weights[i] += by_column[i];
  for (int64_t i = 0; i < n; ++i) weights[i * n + i] = own[i];
  const double of_scale = write_pairs(p, x, y, similarities, weights);
  found = {loss, of_scale, 0};
}

// SigLIP: the sum over all pairs; and the gradients for the scale and the bias.
static void small_siglip(const SmallPairs& p, SmallPairsFound& found) {
  const int64_t n = p.n;
  const SmallRows x = read_rows({p.x}, p.dtype, n, p.width, false);
  const SmallRows y = read_rows({p.y}, p.dtype, n, p.width, false);
  const Square similarities = products(x, y);
  Square weights(n * n);
  double loss = 0;
  double of_bias = 0;
  for (int64_t i = 0; i < n * n; ++i) {
    const double label = i % (n + 1) == 0 ? 1 : -1;
    const double logit = label * (similarities[i] * p.scale + p.bias);
    const double e = std::exp(-std::abs(logit));
    loss += std::max(-logit, 0.0) + std::log1p(e);
    weights[i] = -label * (logit > 0 ? e : 1.0) / (1 + e);  // of NaN: NaN, as e is
    of_bias += weights[i];
  }
  const double of_scale = write_pairs(p, x, y, similarities, weights);
  found = {loss, of_scale, of_bias};
}
