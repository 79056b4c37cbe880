// Rows of TiCo: 1 - mean <a, b> + rho mean a^T C a, a and b the rows of the views at unit length.

#include "covariance/unit_rows.h"

template <class T>
static void tico_units_of(const Tico& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.x) + i * p.width;
    unit_row(x, divisor_of_row(x, p.width), p.width, static_cast<wide<T>*>(p.unit) + i * p.width);
  }
}

static void tico_units(const Tico& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* element) { tico_units_of<std::remove_pointer_t<decltype(element)>>(p, begin, end); });
}

template <class T>
static void tico_rows_of(const Tico& p, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t d = p.width;
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.x) + i * d;
    const T* y = static_cast<const T*>(p.y) + i * d;
    const W* a = static_cast<const W*>(p.unit) + i * d;
    const W* product = static_cast<const W*>(p.product) + i * d;
    const double x_divisor = divisor_of_row(x, d);
    const double y_divisor = divisor_of_row(y, d);
    const double cosine = dot_of_rows(a, y, d) / y_divisor;
    const double squared = dot_of_rows(a, product, d);
    p.terms[i] = p.rho * squared - cosine;
    if (T* out = static_cast<T*>(p.gradients[0])) {  // (2 rho C a - b, without its part along a) / length
      const double radial = has_length(x_divisor) ? cosine - 2 * p.rho * squared : 0.0;
      const W of_product = static_cast<W>(2 * p.rho / x_divisor * p.scale);
      const W of_other = static_cast<W>(-1 / (x_divisor * y_divisor) * p.scale);
      const W of_own = static_cast<W>(radial / x_divisor * p.scale);
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        narrow(product[j] * of_product + widen(y[j]) * of_other + a[j] * of_own, out[i * d + j]);
      }
    }
    if (T* out = static_cast<T*>(p.gradients[1])) {  // (-a, without its part along b) / length
      const double radial = has_length(y_divisor) ? cosine : 0.0;
      const W of_own = static_cast<W>(radial / (y_divisor * y_divisor) * p.scale);
      const W of_other = static_cast<W>(-1 / y_divisor * p.scale);
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) narrow(widen(y[j]) * of_own + a[j] * of_other, out[i * d + j]);
    }
  }
}

static void tico_rows(const Tico& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* element) { tico_rows_of<std::remove_pointer_t<decltype(element)>>(p, begin, end); });
}
