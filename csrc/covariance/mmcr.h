// The nuclear norm of each image's few rows Z [m, d], tr (Z Z^T)^1/2, and its gradient (Z Z^T)^-1/2 Z: by the
// eigenvalues of Z Z^T, in double. A singular value of float rows has at most 16 digits there and 7 in their own
// decomposition, so even one of 1e-7 of the largest keeps its first digits.

// Of the largest eigenvalue. Below that rows of floats have no direction, and the gradient has nothing there.
constexpr double least_eigenvalue = 1e-14;

// Jacobi's rotations: a [m, m], symmetric, becomes diagonal, and the rows of q its eigenvectors.
static inline void rotate_to_diagonal(double* a, double* q, int64_t m) {
  for (int64_t i = 0; i < m * m; ++i) q[i] = i % (m + 1) == 0;
  for (int sweep = 0; sweep < 30; ++sweep) {
    bool is_diagonal = true;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = i + 1; j < m; ++j) {
        const double off = a[i * m + j];
        if (!(std::abs(off) > 1e-17 * std::sqrt(std::abs(a[i * m + i] * a[j * m + j])))) continue;
        is_diagonal = false;
        const double cotangent = (a[j * m + j] - a[i * m + i]) / (2 * off);  // of twice the angle
        const double tangent = (cotangent < 0 ? -1 : 1) / (std::abs(cotangent) + std::sqrt(cotangent * cotangent + 1));
        const double cosine = 1 / std::sqrt(tangent * tangent + 1);
        const double sine = tangent * cosine;
        for (int64_t k = 0; k < m; ++k) {  // rows
          const double x = a[i * m + k];
          const double y = a[j * m + k];
          a[i * m + k] = cosine * x - sine * y;
          a[j * m + k] = sine * x + cosine * y;
          const double u = q[i * m + k];
          const double v = q[j * m + k];
          q[i * m + k] = cosine * u - sine * v;
          q[j * m + k] = sine * u + cosine * v;
        }
        for (int64_t k = 0; k < m; ++k) {  // columns
          const double x = a[k * m + i];
          const double y = a[k * m + j];
          a[k * m + i] = cosine * x - sine * y;
          a[k * m + j] = sine * x + cosine * y;
        }
        a[i * m + j] = 0;
        a[j * m + i] = 0;
      }
    }
    if (is_diagonal) return;
  }
}

// Row r of image i: the online views, then those of the momentum encoder.
template <class T>
static FASTJEM_INLINE const T* mmcr_row(const Mmcr& p, int64_t i, int64_t r) {
  return static_cast<const T*>(p.halves[r >= p.views]) + (i * p.views + r % p.views) * p.width;
}

template <class T>
static void mmcr_images_of(const Mmcr& p, int64_t begin, int64_t end) {
  const int64_t m = 2 * p.views;
  const int64_t d = p.width;
  double gram[most_rows * most_rows];
  double vectors[most_rows * most_rows];
  std::vector<double> wide_rows(m * d);
  double* rows = wide_rows.data();
  for (int64_t i = begin; i < end; ++i) {
    double* mean = p.means + i * d;
    std::fill(mean, mean + d, 0.0);
    for (int64_t r = 0; r < m; ++r) {
      const T* x = mmcr_row<T>(p, i, r);
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        rows[r * d + j] = static_cast<double>(widen(x[j]));
        mean[j] += rows[r * d + j] / m;
      }
    }
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t s = 0; s <= r; ++s) {
        const double *x = rows + r * d, *y = rows + s * d;
        double dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < d; ++j) dot += x[j] * y[j];
        gram[r * m + s] = dot;
        gram[s * m + r] = dot;
      }
    }
    rotate_to_diagonal(gram, vectors, m);
    double largest = 0;
    for (int64_t k = 0; k < m; ++k) largest = std::max(largest, gram[k * (m + 1)]);
    double norm = 0;
    double inverses[most_rows];
    for (int64_t k = 0; k < m; ++k) {
      const double eigenvalue = gram[k * (m + 1)];
      norm += std::sqrt(eigenvalue < 0 ? 0 : eigenvalue);  // NaN stays
      inverses[k] = eigenvalue > least_eigenvalue * largest ? 1 / std::sqrt(eigenvalue) : 0;
    }
    p.norms[i] = norm;
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t s = 0; s < m; ++s) {
        double sum = 0;
        for (int64_t k = 0; k < m; ++k) sum += vectors[k * m + r] * vectors[k * m + s] * inverses[k];
        p.polar[(i * m + r) * m + s] = static_cast<float>(sum);
      }
    }
  }
}

template <class T>
static void mmcr_gradients_of(const Mmcr& p, int64_t begin, int64_t end) {
  const int64_t m = 2 * p.views;
  const int64_t d = p.width;
  std::vector<float> row(d);
  float* sum = row.data();
  for (int64_t i = begin; i < end; ++i) {
    const double* of_mean = p.of_means + i * d;
    for (int64_t r = 0; r < m; ++r) {
      T* gradients = static_cast<T*>(p.gradients[r >= p.views]);
      if (!gradients) continue;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) sum[j] = static_cast<float>(of_mean[j] * p.of_mean);
      for (int64_t s = 0; s < m; ++s) {
        const T* x = mmcr_row<T>(p, i, s);
        const float factor = static_cast<float>(p.polar[(i * m + r) * m + s] * p.of_images);
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) sum[j] += widen(x[j]) * factor;
      }
      T* out = gradients + (i * p.views + r % p.views) * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) narrow(sum[j], out[j]);
    }
  }
}

static void mmcr_images(const Mmcr& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if constexpr (!std::is_same_v<T, double>) mmcr_images_of<T>(p, begin, end);
  });
}

static void mmcr_gradients(const Mmcr& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if constexpr (!std::is_same_v<T, double>) mmcr_gradients_of<T>(p, begin, end);
  });
}
