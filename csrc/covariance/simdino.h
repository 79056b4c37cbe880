// Rows of SimDINO: each view's at unit length, the cosines of pairs of views, and the gradients.

#include "covariance/unit_rows.h"

template <class T>
static void simdino_units_of(const Simdino& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t d = p.width;
  std::vector<W> other(d);
  for (size_t v = 0; v < p.teacher.size(); ++v) {
    for (int64_t i = begin; i < end; ++i) {
      const T* x = static_cast<const T*>(p.student[v]) + i * d;
      W* out = static_cast<W*>(p.units) + (v * p.rows + i) * d;
      unit_row(x, divisor_of_row(x, d), d, out);
      if (!p.mean) continue;
      const T* t = static_cast<const T*>(p.teacher[v]) + i * d;
      unit_row(t, divisor_of_row(t, d), d, other.data());
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) out[j] = (out[j] + other[j]) / 2;
    }
  }
}

static void simdino_units(const Simdino& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) { simdino_units_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}

template <class T>
static void simdino_rows_of(const Simdino& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t d = p.width;
  const size_t teachers = p.teacher.size();
  std::vector<W> units(teachers * d);  // the teacher's rows at unit length
  std::vector<W> sum(d);               // of them
  std::vector<W> own(d);
  std::vector<W> gradient(d);
  const W of_product = static_cast<W>(p.of_product);
  const W of_cosine = static_cast<W>(p.of_cosine);
  for (int64_t i = begin; i < end; ++i) {
    std::fill(sum.begin(), sum.end(), W(0));
    for (size_t v = 0; v < teachers; ++v) {
      const T* x = static_cast<const T*>(p.teacher[v]) + i * d;
      W* unit = units.data() + v * d;
      unit_row(x, divisor_of_row(x, d), d, unit);
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) sum[j] += unit[j];
    }
    double cosines = 0;
    for (size_t v = 0; v < p.student.size(); ++v) {
      const T* x = static_cast<const T*>(p.student[v]) + i * d;
      const double divisor = divisor_of_row(x, d);
      unit_row(x, divisor, d, own.data());
      const bool is_global = v < teachers;
      W* g = gradient.data();
      if (is_global) {  // which isn't compared with its own view of the teacher
        const W* same = units.data() + v * d;
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) g[j] = sum[j] - same[j];
      } else {
        std::copy(sum.begin(), sum.end(), g);
      }
      const double cosine = dot_of_rows(own.data(), g, d);
      cosines += cosine;
      T* out = static_cast<T*>(p.gradients[v]);
      if (!out) continue;
      double radial = cosine * p.of_cosine;
      if (is_global) {
        const W* product = static_cast<const W*>(p.product) + (v * p.rows + i) * d;
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) g[j] = g[j] * of_cosine + product[j] * of_product;
        radial = dot_of_rows(own.data(), g, d);
      } else {
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) g[j] *= of_cosine;
      }
      const W along = static_cast<W>(has_length(divisor) ? radial : 0.0);
      const W inverse = static_cast<W>(1 / divisor);
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) narrow((g[j] - own[j] * along) * inverse, out[i * d + j]);
    }
    p.cosines[i] = cosines;
  }
}

static void simdino_rows(const Simdino& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* x) { simdino_rows_of<std::remove_pointer_t<decltype(x)>>(p, begin, end); });
}
