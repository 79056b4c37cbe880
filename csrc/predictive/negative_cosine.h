// Rows [begin, end): the dot products p p, z z and p z in one read, then both gradients as combinations of p and z.

template <class T>
static void negative_cosine_rows_of(const NegativeCosine& c, int64_t begin, int64_t end) {
  using W = wide<T>;
  const int64_t d = c.width;
  for (int64_t i = begin; i < end; ++i) {
    const T* p = static_cast<const T*>(c.p) + i * c.p_stride;
    const T* z = static_cast<const T*>(c.z) + i * c.z_stride;
    double pp = 0;
    double zz = 0;
    double pz = 0;
    for (int64_t block = 0; block < d; block += terms_per_block) {
      const int64_t stop = std::min(block + terms_per_block, d);
      W block_pp = 0;
      W block_zz = 0;
      W block_pz = 0;
#pragma omp simd reduction(+ : block_pp, block_zz, block_pz)
      for (int64_t j = block; j < stop; ++j) {
        const W a = widen(p[j]);
        const W b = widen(z[j]);
        block_pp += a * a;
        block_zz += b * b;
        block_pz += a * b;
      }
      pp += block_pp;
      zz += block_zz;
      pz += block_pz;
    }
    const double p_norm = std::sqrt(pp);
    const double z_norm = std::sqrt(zz);
    const double p_divisor = std::max(p_norm, c.eps);
    const double z_divisor = std::max(z_norm, c.eps);
    const double cosine = pz / p_divisor / z_divisor;
    c.losses[i] = -cosine;

    // d(-cos)/dp = (cos p / |p| - z / |z|) / |p|, the first term only where |p| and not eps is the divisor.
    const W across = static_cast<W>(-c.scale / p_divisor / z_divisor);
    const auto combine = [d, across](const T* x, const T* other, double x_weight, T* out) {
      const W along = static_cast<W>(x_weight);
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) narrow(along * widen(x[j]) + across * widen(other[j]), out[j]);
    };
    if (c.p_gradient) {
      combine(p, z, p_norm > c.eps ? c.scale * cosine / pp : 0.0, static_cast<T*>(c.p_gradient) + i * d);
    }
    if (c.z_gradient) {
      combine(z, p, z_norm > c.eps ? c.scale * cosine / zz : 0.0, static_cast<T*>(c.z_gradient) + i * d);
    }
  }
}

static void negative_cosine_rows(const NegativeCosine& c, int64_t begin, int64_t end) {
  with_dtype(c.dtype,
             [&](auto* element) { negative_cosine_rows_of<std::remove_pointer_t<decltype(element)>>(c, begin, end); });
}
