// VICReg and Barlow Twins of few rows in one go, all of it in double: what a call costs there is the number of its
// steps. As in covariance.h, N x N products take the place of D x D ones where they are smaller.

using Matrix = std::vector<double>;

// A view's columns without their means, over their std if `divide`.
struct FewColumns {
  Matrix columns;               // [rows, width]
  std::vector<double> squares;  // [width]: of what is centred, summed
  std::vector<double> std;      // [width]
};

static FewColumns few_columns(const FewRows& p, const void* view, double divisor, double eps, bool divide) {
  const int64_t d = p.width;
  FewColumns found{Matrix(p.rows * d), std::vector<double>(d), std::vector<double>(d)};
  double* columns = found.columns.data();
  std::vector<double> mean(d);
  with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* x = static_cast<const T*>(view);
    for (int64_t i = 0; i < p.rows; ++i) {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        const double value = static_cast<double>(widen(x[i * d + j]));
        columns[i * d + j] = value;
        mean[j] += value;
      }
    }
  });
  for (double& value : mean) value /= p.rows;
  double* squares = found.squares.data();
  for (int64_t i = 0; i < p.rows; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) {
      const double centred = columns[i * d + j] - mean[j];
      columns[i * d + j] = centred;
      squares[j] += centred * centred;
    }
  }
  for (int64_t j = 0; j < d; ++j) found.std[j] = std::sqrt(squares[j] / divisor + eps);
  if (!divide) return found;
  for (int64_t i = 0; i < p.rows; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) columns[i * d + j] /= found.std[j];
  }
  return found;
}

// a @ b for a [n, k], whose elements lie a_row and a_column apart, and dense b [k, m].
static Matrix few_product(const double* a, int64_t a_row, int64_t a_column, const double* b, int64_t n, int64_t k,
                          int64_t m) {
  Matrix product(n * m);
  for (int64_t i = 0; i < n; ++i) {
    double* out = product.data() + i * m;
    int64_t l = 0;
    for (; l + 4 <= k; l += 4) {  // a row of the product is read and written once for four terms
      const double* first = a + i * a_row + l * a_column;
      const double f0 = first[0], f1 = first[a_column], f2 = first[2 * a_column], f3 = first[3 * a_column];
      const double *b0 = b + l * m, *b1 = b0 + m, *b2 = b1 + m, *b3 = b2 + m;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) out[j] += (f0 * b0[j] + f1 * b1[j]) + (f2 * b2[j] + f3 * b3[j]);
    }
    for (; l < k; ++l) {
      const double factor = a[i * a_row + l * a_column];
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) out[j] += factor * b[l * m + j];
    }
  }
  return product;
}

// [n, m] -> [m, n]
static Matrix few_transposed(const Matrix& x, int64_t n, int64_t m) {
  Matrix out(n * m);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) out[j * n + i] = x[i * m + j];
  }
  return out;
}

// x @ x.T, [n, n]
static Matrix few_gram(const Matrix& x, int64_t n, int64_t d) {
  const Matrix transposed = few_transposed(x, n, d);
  return few_product(x.data(), d, 1, transposed.data(), n, d, n);
}

static double few_dot(const Matrix& x, const Matrix& y) {
  double dot = 0;
#pragma omp simd reduction(+ : dot)
  for (size_t i = 0; i < x.size(); ++i) dot += x[i] * y[i];
  return dot;
}

// The loss of a view's variance and covariance; `gradient` [rows, width], where it isn't null, becomes that of its
// elements times rows.
static double few_vicreg_view(const FewRows& p, const FewVicreg& w, const FewColumns& view, Matrix* gradient) {
  const int64_t n = p.rows, d = p.width;
  const double* c = view.columns.data();
  const bool by_columns = n >= d;
  const double scale = 1.0 / (n - 1);
  double off_diagonal = 0;
  Matrix square;
  if (by_columns) {
    square = few_product(c, 1, d, c, d, n, d);
    for (int64_t j = 0; j < d; ++j) square[j * d + j] = 0;
    off_diagonal = few_dot(square, square);
    for (const double value : view.squares) off_diagonal += value - value;  // NaN where the diagonal was
  } else {
    square = few_gram(view.columns, n, d);
    off_diagonal = few_dot(square, square) - few_dot(view.squares, view.squares);
  }
  double variance = 0;
  for (const double std : view.std) variance += 1 - std < 0 ? 0 : 1 - std;  // NaN stays
  const double loss = w.mu / 2 * variance / d + w.nu * scale * scale / d * off_diagonal;
  if (!gradient) return loss;

  *gradient = by_columns ? few_product(c, d, 1, square.data(), n, d, d) : few_product(square.data(), n, 1, c, n, n, d);
  const double factor = 4 * w.nu * n * scale * scale / d;
  std::vector<double> weights(d);
  for (int64_t j = 0; j < d; ++j) {
    weights[j] = (view.std[j] < 1 ? 1.0 : 0.0) / view.std[j] * (-w.mu / 2 * n * scale / d);
    if (!by_columns) weights[j] -= factor * view.squares[j];
  }
  double* g = gradient->data();
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) g[i * d + j] = g[i * d + j] * factor + c[i * d + j] * weights[j];
  }
  return loss;
}

static void few_vicreg(const FewRows& p, const FewVicreg& w, double& loss) {
  const int64_t n = p.rows, d = p.width;
  loss = 0;
  Matrix gradients[2];
  for (int side = 0; side < 2; ++side) {
    const FewColumns view = few_columns(p, p.views[side], static_cast<double>(n - 1), w.eps, false);
    loss += few_vicreg_view(p, w, view, p.gradients[side] ? &gradients[side] : nullptr);
  }
  with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* x = static_cast<const T*>(p.views[0]);
    const T* y = static_cast<const T*>(p.views[1]);
    double distance = 0;
#pragma omp simd reduction(+ : distance)
    for (int64_t k = 0; k < n * d; ++k) {
      const double difference = static_cast<double>(widen(x[k])) - static_cast<double>(widen(y[k]));
      distance += difference * difference;
    }
    loss += w.lambda / (n * d) * distance;
    for (int side = 0; side < 2; ++side) {
      T* out = static_cast<T*>(p.gradients[side]);
      if (!out) continue;
      const double* g = gradients[side].data();
      const double pull = (side ? -2 : 2) * w.lambda / d;
#pragma omp simd
      for (int64_t k = 0; k < n * d; ++k) {
        const double difference = static_cast<double>(widen(x[k])) - static_cast<double>(widen(y[k]));
        narrow(static_cast<wide<T>>((g[k] + pull * difference) * p.scale), out[k]);
      }
    }
  });
}

// The gradient for a view, given that for its standardised columns: (g - own mean(g own)) / std * scale. Those of the
// other view are centred, and so g has no mean to take off.
static void few_through_columns(const FewRows& p, const Matrix& gradient, const FewColumns& own, void* result) {
  const int64_t n = p.rows, d = p.width;
  const double* g = gradient.data();
  const double* c = own.columns.data();
  std::vector<double> dots(d);
  std::vector<double> factors(d);
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) dots[j] += g[i * d + j] * c[i * d + j];
  }
  for (int64_t j = 0; j < d; ++j) {
    dots[j] /= n;
    factors[j] = p.scale / own.std[j];
  }
  with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    T* out = static_cast<T*>(result);
    for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        const double value = (g[i * d + j] - c[i * d + j] * dots[j]) * factors[j];
        narrow(static_cast<wide<T>>(value), out[i * d + j]);
      }
    }
  });
}

static void few_barlow_twins(const FewRows& p, double lambda, double& loss) {
  const int64_t n = p.rows, d = p.width;
  const FewColumns views[2] = {few_columns(p, p.views[0], static_cast<double>(n), 1e-5, true),
                               few_columns(p, p.views[1], static_cast<double>(n), 1e-5, true)};
  const double* columns[2] = {views[0].columns.data(), views[1].columns.data()};
  loss = 0;
  if (n >= d) {
    // In place of the correlation come the gradient's weights: its diagonal less 1, and lambda times the rest.
    Matrix weights = few_product(columns[0], 1, d, columns[1], d, n, d);
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < d; ++j) {
        double& value = weights[i * d + j];
        const double difference = value / n - (i == j ? 1 : 0);
        value = i == j ? difference : lambda * difference;
        loss += difference * value;
      }
    }
    if (p.gradients[0]) {
      const Matrix transposed = few_transposed(weights, d, d);
      few_through_columns(p, few_product(columns[1], d, 1, transposed.data(), n, d, d), views[0], p.gradients[0]);
    }
    if (p.gradients[1]) {
      few_through_columns(p, few_product(columns[0], d, 1, weights.data(), n, d, d), views[1], p.gradients[1]);
    }
    return;
  }
  const Matrix grams[2] = {few_gram(views[0].columns, n, d), few_gram(views[1].columns, n, d)};
  std::vector<double> diagonal(d);
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) diagonal[j] += columns[0][i * d + j] * columns[1][i * d + j];
  }
  double off_diagonal = few_dot(grams[0], grams[1]) / (static_cast<double>(n) * n);
  for (double& value : diagonal) {
    value /= n;
    off_diagonal -= value * value;
    loss += (value - 1) * (value - 1);
    value = (1 - lambda) * value - 1;  // of the other view's columns in the gradient
  }
  loss += lambda * off_diagonal;
  for (int side = 0; side < 2; ++side) {
    if (!p.gradients[side]) continue;
    Matrix gradient = few_product(grams[1 - side].data(), n, 1, columns[side], n, n, d);
    const double* other = columns[1 - side];
    for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        gradient[i * d + j] = gradient[i * d + j] * (lambda / n) + diagonal[j] * other[i * d + j];
      }
    }
    few_through_columns(p, gradient, views[side], p.gradients[side]);
  }
}
