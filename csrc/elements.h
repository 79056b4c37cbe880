// Elements of every dtype, and exp and log1p, which as calls to the library would keep a loop scalar: branch-free code
// that the compiler vectorises. Included inside a namespace by each_isa.h, so it includes nothing itself.
//
// Wide: kernels compute in double where elements are double, and else in float. widen() reads an element, narrow()
// rounds a result to one; `wide<T>` is the type between them, W in the kernels.
//
// Sums in two levels: a float sum of many terms loses what is below its last digit, and double has half as many lanes.
// Kernels add a block of terms in W, and the blocks' sums in double.

static constexpr int64_t terms_per_block = 1024;  // of a sum along a row
static constexpr int64_t rows_per_block = 32;     // of the sums of all columns, which are read and written each row

// Whether the block of rows that row i of [begin, end) is in ends with it.
static inline bool ends_block_of_rows(int64_t i, int64_t begin, int64_t end) {
  return (i - begin) % rows_per_block == rows_per_block - 1 || i + 1 == end;
}

// total += block, and the next block starts from 0.
template <class W>
static FASTJEM_INLINE void add_block(W* block, int64_t n, double* total) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    total[j] += block[j];
    block[j] = 0;
  }
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
static FASTJEM_INLINE To bit_cast(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class T>
using wide = typename Wide<T>::type;

static FASTJEM_INLINE float widen(float x) { return x; }
static FASTJEM_INLINE double widen(double x) { return x; }
static FASTJEM_INLINE float widen(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
static FASTJEM_INLINE float widen(float16 x) {  // passes through no subnormal float: kernels may flush those to 0
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t least_normal = 0x38800000u;  // 2^-14. A subnormal is the fraction that follows it, without it
  const float subnormal = bit_cast<float>(magnitude + least_normal) - bit_cast<float>(least_normal);
  const uint32_t finite = magnitude < 0x00800000u ? bit_cast<uint32_t>(subnormal) : magnitude + 0x38000000u;
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN
  return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
}

static FASTJEM_INLINE void narrow(float x, float& out) { out = x; }
static FASTJEM_INLINE void narrow(double x, double& out) { out = x; }
static FASTJEM_INLINE void narrow(float x, double& out) { out = x; }
static FASTJEM_INLINE void narrow(double x, float& out) { out = static_cast<float>(x); }
static FASTJEM_INLINE void narrow(float x, bfloat16& out) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
static FASTJEM_INLINE void narrow(float x, float16& out) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;  // rounds at 2^-24
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520 and more round to infinity
  half = magnitude > 0x7f800000 ? 0x7e00 : half;   // NaN
  out.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000));
}

// 1.5 * 2^23: a float near 0 plus this is rounded to a whole number, which stands in the sum's low bits.
static constexpr float integer_shift = 12582912.0f;
static constexpr uint32_t integer_shift_bits = 0x4b400000u;

// 2^n, for the n that is in the low bits of n + integer_shift.
static FASTJEM_INLINE float power_of_2(float shifted) {
  return bit_cast<float>((bit_cast<uint32_t>(shifted) - integer_shift_bits + 127u) << 23);
}

static FASTJEM_INLINE double exponential(double x) { return std::exp(x); }
// 2^n exp(r), |r| <= ln(2) / 2, by Taylor's series to r^7 (error below 1e-8). 0 where x < -87.3, the end of the normal
// numbers; infinity where 2^n is, from 88.4 on.
static FASTJEM_INLINE float exponential(float x) {
  const float clamped = x > 88.8f ? 88.8f : x;  // NaN stays; what is too low comes to nothing in the last line
  const float shifted = clamped * 1.44269504f + integer_shift;
  const float n = shifted - integer_shift;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return x < -87.3f ? 0.0f : p * power_of_2(shifted);
}

static FASTJEM_INLINE double log1p_of_unit(double e) { return std::log1p(e); }
// log(1 + e) for 0 <= e <= 1: 2 atanh(s), s = e / (2 + e) <= 1 / 3, to s^15 (relative error below 1e-8).
static FASTJEM_INLINE float log1p_of_unit(float e) {
  const float s = e / (2.0f + e);
  const float z = s * s;
  float p = 2.0f / 15;
  p = p * z + 2.0f / 13;
  p = p * z + 2.0f / 11;
  p = p * z + 2.0f / 9;
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  return s * (p * z + 2.0f);
}

// x where it is finite, and otherwise the largest finite number of its sign; NaN stays. An infinity may be subtracted
// from nothing (infinity less infinity is NaN) and multiplied by no 0.
//
// Pivots: a maximum of -infinity (nothing was seen, or all of it was masked) becomes a number from which -infinity is
// still infinitely far, and so does one of +infinity: each exponential is 0, 1 or infinity, and their sum's logarithm,
// with the pivot added again, is the infinity that it was.
template <class W>
static FASTJEM_INLINE W to_finite(W x) {
  constexpr W largest = std::numeric_limits<W>::max();
  x = x < -largest ? -largest : x;
  return x > largest ? largest : x;
}

// x, or the lowest finite number for -infinity: the half of `to_finite` that a loop can afford for each element.
template <class W>
static FASTJEM_INLINE W not_minus_infinity(W x) {
  constexpr W lowest = std::numeric_limits<W>::lowest();
  return x < lowest ? lowest : x;
}

// Calls f with a null pointer of the dtype's element type, from which it takes its template argument.
template <class F>
static inline void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float32: return f(static_cast<float*>(nullptr));
    case Dtype::float64: return f(static_cast<double*>(nullptr));
    case Dtype::bfloat16: return f(static_cast<bfloat16*>(nullptr));
    case Dtype::float16: return f(static_cast<float16*>(nullptr));
  }
}
// For kernels that take wide elements alone.
template <class F>
static inline void with_wide_dtype(Dtype dtype, F&& f) {
  if (dtype == Dtype::float64) return f(static_cast<double*>(nullptr));
  f(static_cast<float*>(nullptr));
}
