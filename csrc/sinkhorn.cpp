#include <atomic>

#include "common.h"
#include "flush_subnormals.h"
#include "huge_pages.h"

namespace fastjem {
struct Sinkhorn {
  Dtype dtype;
  const void* scores;  // [B, K], rows row_stride elements apart
  int64_t row_stride, rows, width;
  double scale;             // 1 / epsilon
  const void *bias, *bias_low;  // [K] float, two parts of a double (one double for float64 scores), or null
  const double* offsets;    // [B], subtracted from each row, or null
  double* row_logsumexp;    // [B]
  Dtype code_dtype;
  void* codes;  // [B, K]
};
}  // namespace fastjem

#define FASTJEM_KERNEL "sinkhorn.h"
#include "each_isa.h"

namespace fastjem {

// Sums over samples, by parts of the rows with sums of their own, added in order.
template <class F>
static std::vector<double> over_parts(int64_t rows, int64_t parts, int64_t width, F&& f) {
  std::vector<double> sums(parts * width, 0.0);
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    const FlushSubnormals flush;
    f(rows * part / parts, rows * (part + 1) / parts, part, sums.data() + part * width);
  }
  return sums;
}

// A double as two floats, for scores of other dtypes than float64.
struct BiasParts {
  std::vector<float> high, low;
  const void *first = nullptr, *second = nullptr;

  BiasParts(Dtype dtype, const double* bias, int64_t k) {
    if (bias == nullptr || dtype == Dtype::float64) {
      first = bias;
      return;
    }
    high.resize(k);
    low.resize(k);
    for (int64_t j = 0; j < k; ++j) {
      high[j] = static_cast<float>(bias[j]);
      low[j] = std::isfinite(high[j]) ? static_cast<float>(bias[j] - high[j]) : 0.0f;
    }
    first = high.data();
    second = low.data();
  }
};

// out_j = logsumexp_i(x_ij * scale - offset_i)
static void columns(const Sinkhorn& p, int64_t parts, const double* bias, double* out, int threads) {
  const int64_t k = p.width;
  std::vector<double> maxima(parts * k);
  const auto sums = over_parts(p.rows, parts, k, [&](int64_t begin, int64_t end, int64_t part, double* sum) {
    FASTJEM_BEST(column_logsumexp(p, begin, end, maxima.data() + part * k, sum));
  });
  parallel_for(k, 4096, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      double maximum = maxima[j], total = 0;
      for (int64_t part = 1; part < parts; ++part) maximum = std::max(maximum, maxima[part * k + j]);
      const double shift = std::isinf(maximum) && maximum < 0 ? 0 : maximum;
      for (int64_t part = 0; part < parts; ++part) {
        const double m = maxima[part * k + j];
        if (!(std::isinf(m) && m < 0) || sums[part * k + j] != 0) total += sums[part * k + j] * std::exp(m - shift);
      }
      out[j] = shift + std::log(total) - (bias ? bias[j] : 0.0);
    }
  });
}

// `bias`: double [K], or 0; `out`: double [K].
static void sinkhorn_step(int dtype, uintptr_t scores, int64_t rows, int64_t width, int64_t row_stride, double scale,
                          uintptr_t bias_address, uintptr_t out_address, int threads) {
  const double* bias = reinterpret_cast<const double*>(bias_address);
  double* out = reinterpret_cast<double*>(out_address);
  std::vector<double> row_logsumexp(bias ? rows : 0);
  const BiasParts two(static_cast<Dtype>(dtype), bias, width);
  Sinkhorn p{static_cast<Dtype>(dtype),
             reinterpret_cast<const void*>(scores),
             row_stride,
             rows,
             width,
             scale,
             two.first,
             two.second,
             nullptr,
             row_logsumexp.data(),
             Dtype::float32,
             nullptr};
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, rows / 16, rows * width / 16384}));
  if (!bias) return columns(p, parts, nullptr, out, threads);

  const auto sums = over_parts(rows, parts, width, [&](int64_t begin, int64_t end, int64_t, double* sum) {
    FASTJEM_BEST(column_sums_of_softmax(p, begin, end, sum));
  });
  // A term below the least exponential counts as 0. Where all of a prototype's together could matter, add in the log domain.
  const double least = static_cast<double>(rows) * (p.dtype == Dtype::float64 ? 1e-290 : 1e-30);
  std::atomic<bool> lost{false};
  parallel_for(width, 4096, threads, [&](int64_t begin, int64_t end) {
    bool low = false;
    for (int64_t j = begin; j < end; ++j) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums[part * width + j];
      low = low || total < least;
      out[j] = std::log(total) - bias[j];
    }
    if (low) lost = true;
  });
  if (lost) {
    p.offsets = row_logsumexp.data();
    columns(p, parts, bias, out, threads);
  }
}

static void sinkhorn_codes(int dtype, uintptr_t scores, int64_t rows, int64_t width, int64_t row_stride, double scale,
                           uintptr_t bias, int code_dtype, int64_t code_bytes, uintptr_t out, int threads) {
  const BiasParts two(static_cast<Dtype>(dtype), reinterpret_cast<const double*>(bias), width);
  const Sinkhorn p{static_cast<Dtype>(dtype),
                   reinterpret_cast<const void*>(scores),
                   row_stride,
                   rows,
                   width,
                   scale,
                   two.first,
                   two.second,
                   nullptr,
                   nullptr,
                   static_cast<Dtype>(code_dtype),
                   reinterpret_cast<void*>(out)};
  prefer_huge_pages(p.codes, code_bytes);
  parallel_for(rows, 1 + 16384 / width, threads, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    FASTJEM_BEST(codes(p, begin, end));
  });
}

void bind_sinkhorn(pybind11::module_& m) {
  m.def("sinkhorn_step", &sinkhorn_step, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("sinkhorn_codes", &sinkhorn_codes, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
