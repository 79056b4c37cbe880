// Elements [begin, end) of x times the factor, in place.

template <class T>
static void rescale_range_of(T* x, int64_t begin, int64_t end, double factor) {
  const wide<T> wide_factor = static_cast<wide<T>>(factor);
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) narrow(widen(x[j]) * wide_factor, x[j]);
}

static void rescale_range(Dtype dtype, void* x, int64_t begin, int64_t end, double factor) {
  with_dtype(dtype, [&](auto* element) { rescale_range_of(static_cast<decltype(element)>(x), begin, end, factor); });
}
