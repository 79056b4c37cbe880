// Rows [begin, end): three dot products in one read, then both gradients as combinations of p and z.

template <class T>
static void negative_cosine_rows_of(const NegativeCosine& c, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t d = c.width;
  for (int64_t i = begin; i < end; ++i) {
    const T* p = static_cast<const T*>(c.p) + i * c.p_stride;
    const T* z = static_cast<const T*>(c.z) + i * c.z_stride;
    double pp = 0, zz = 0, pz = 0;
    for (int64_t block = 0; block < d; block += 1024) {
      const int64_t stop = std::min(block + 1024, d);
      W b_pp = 0, b_zz = 0, b_pz = 0;
#pragma omp simd reduction(+ : b_pp, b_zz, b_pz)
      for (int64_t j = block; j < stop; ++j) {
        const W a = widen(p[j]), b = widen(z[j]);
        b_pp += a * a;
        b_zz += b * b;
        b_pz += a * b;
      }
      pp += b_pp;
      zz += b_zz;
      pz += b_pz;
    }
    const double p_norm = std::sqrt(pp), z_norm = std::sqrt(zz);
    const double p_divisor = std::max(p_norm, c.eps), z_divisor = std::max(z_norm, c.eps);
    const double cosine = pz / p_divisor / z_divisor;
    c.losses[i] = -cosine;

    // d(-cos)/dp = (cos p / |p| - z / |z|) / |p|, the first term only where |p| and not eps is the divisor.
    const W across = static_cast<W>(-1 / p_divisor / z_divisor);
    const auto combine = [d, across](const T* own, const T* other, double own_weight, T* out) {
      const W along = static_cast<W>(own_weight);
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) narrow(along * widen(own[j]) + across * widen(other[j]), out[j]);
    };
    if (c.p_gradient) {
      combine(p, z, p_norm > c.eps ? cosine / pp : 0.0, static_cast<T*>(c.p_gradient) + i * d);
    }
    if (c.z_gradient) {
      combine(z, p, z_norm > c.eps ? cosine / zz : 0.0, static_cast<T*>(c.z_gradient) + i * d);
    }
  }
}

static void negative_cosine_rows(const NegativeCosine& c, int64_t begin, int64_t end) {
  with_dtype(c.dtype,
             [&](auto* element) { negative_cosine_rows_of<std::remove_pointer_t<decltype(element)>>(c, begin, end); });
}
