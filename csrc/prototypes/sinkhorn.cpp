#include <atomic>

#include "common.h"
#include "flush_subnormals.h"
#include "huge_pages.h"

namespace fastjem {
struct Sinkhorn {
  Dtype dtype;
  const void* scores;  // [B, K], rows row_stride elements apart
  int64_t row_stride, rows, width;
  double scale;              // 1 / epsilon
  const void* bias;          // [K], the potentials rounded to float (doubles as they are for float64 scores), or null
  const void* bias_low;      // [K] float, what they have lost by it, or null
  const float* bias_factor;  // [K], exp(bias - largest_bias), or null where one would be below exp(-40)
  double largest_bias;
  double near_shift;      // for logits that lie near each other (see Near): a whole power of 2
  float near_range;       // the highest power of 2 above the shift: 126
  const double* offsets;  // [B], subtracted from each row's logits, or null
  double* row_logsumexp;  // [B]
  const double* log_floors;  // [B], logs of what is added to the rows' sums of exponentials, or null
  Dtype code_dtype;
  void* codes;  // [B, K]
};
}  // namespace fastjem

#define FASTJEM_KERNEL "prototypes/sinkhorn.h"
#include "each_isa.h"

namespace fastjem {

// Calls f(begin, end, part, sums) for each part of the rows; returns the sums [parts, width], to be added in order.
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

// The memory of potentials for scores of other dtypes than float64: each in two parts, and as a factor, if they lie
// near each other.
struct Potentials {
  std::vector<float> high, low, factor;

  // Sets in p all that depends on them.
  Potentials(Sinkhorn& p, const double* bias, int threads) {
    if (bias == nullptr || p.dtype == Dtype::float64) {
      p.bias = bias;
      return;
    }
    high.resize(p.width);
    low.resize(p.width);
    double lowest = bias[0];
    p.largest_bias = bias[0];
    for (int64_t j = 0; j < p.width; ++j) {
      high[j] = static_cast<float>(bias[j]);
      low[j] = std::isfinite(high[j]) ? static_cast<float>(bias[j] - high[j]) : 0.0f;
      lowest = std::min(lowest, bias[j]);
      p.largest_bias = std::max(p.largest_bias, bias[j]);
    }
    p.bias = high.data();
    p.bias_low = low.data();
    if (!(p.largest_bias - lowest < 40) || p.rows == 0) return;
    factor.resize(p.width);
    parallel_for(p.width, 4096, threads, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) factor[j] = static_cast<float>(std::exp(bias[j] - p.largest_bias));
    });
    double first = 0;
    FASTJEM_BEST(first_logsumexp(p, &first));
    // The first sample's sum becomes exp(3), in the middle of those that sample_softmax takes, 0.01 to 1e6.
    p.near_shift = std::round((first - p.largest_bias - 3) / std::log(2.0));
    if (std::abs(p.near_shift) < 1e6) p.bias_factor = factor.data();
  }
};

// out_j = logsumexp_i(x_ij * scale) without maxima; false where that isn't safe.
static bool near_columns(Sinkhorn p, int64_t parts, double* out, int threads) {
  if (p.dtype == Dtype::float64 || p.rows == 0) return false;
  double first = 0;
  FASTJEM_BEST(first_logsumexp(p, &first));
  p.near_shift = std::round(first / std::log(2.0));
  if (!(std::abs(p.near_shift) < 1e6)) return false;
  const auto sums = over_parts(p.rows, parts, p.width, [&](int64_t begin, int64_t end, int64_t, double* sum) {
    FASTJEM_BEST(near_column_sums(p, begin, end, sum));
  });
  std::atomic<bool> safe{true};
  parallel_for(p.width, 4096, threads, [&](int64_t begin, int64_t end) {
    bool all = true;
    for (int64_t j = begin; j < end; ++j) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums[part * p.width + j];
      all = all && total > 1e-20 && total < 1e30;
      out[j] = p.near_shift * std::log(2.0) + std::log(total);
    }
    if (!all) safe = false;
  });
  return safe;
}

// out_j = logsumexp_i(x_ij * scale - offset_i)
static void columns(const Sinkhorn& p, int64_t parts, const double* bias, double* out, int threads) {
  const int64_t k = p.width;
  std::vector<double> maxima(parts * k);
  const auto sums = over_parts(p.rows, parts, k, [&](int64_t begin, int64_t end, int64_t part, double* sum) {
    FASTJEM_BEST(column_logsumexp(p, begin, end, maxima.data() + part * k, sum));
  });
  parallel_for(k, 4096, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      double maximum = maxima[j];
      double total = 0;
      for (int64_t part = 1; part < parts; ++part) maximum = std::max(maximum, maxima[part * k + j]);
      const double shift = baseline::to_finite(maximum);
      for (int64_t part = 0; part < parts; ++part) {
        total += sums[part * k + j] * std::exp(baseline::to_finite(maxima[part * k + j]) - shift);
      }
      out[j] = shift + std::log(total) - (bias ? bias[j] : 0.0);
    }
  });
}

static int64_t element_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// The scores of one of several problems that begin `problem_stride` elements apart.
static Sinkhorn problem(int dtype, uintptr_t scores, int64_t index, int64_t problem_stride, int64_t rows, int64_t width,
                        int64_t row_stride, double scale) {
  Sinkhorn p{};
  p.dtype = static_cast<Dtype>(dtype);
  p.scores = at<const char>(scores) + index * problem_stride * element_size(p.dtype);
  p.row_stride = row_stride;
  p.rows = rows;
  p.width = width;
  p.scale = scale;
  p.near_range = 126;
  return p;
}

// `bias`: [K], or null; `out`: [K].
static void step(Sinkhorn p, const double* bias, double* out, int threads) {
  const Sinkhorn given = p;
  const int64_t rows = p.rows;
  const int64_t width = p.width;
  std::vector<double> row_logsumexp(bias ? rows : 0);
  const Potentials potentials(p, bias, threads);
  p.row_logsumexp = row_logsumexp.data();
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, rows / 16, rows * width / 16384}));
  if (!bias) {
    if (!near_columns(p, parts, out, threads)) columns(p, parts, nullptr, out, threads);
    return;
  }

  const auto sums = over_parts(rows, parts, width, [&](int64_t begin, int64_t end, int64_t, double* sum) {
    FASTJEM_BEST(column_sums_of_softmax(p, begin, end, sum));
  });
  // A term below the least exponential counts as 0. Where all of a prototype's together could matter, and where a sum
  // is NaN (0 times infinity is, for instance), add in the log domain.
  const double least = static_cast<double>(rows) * (p.dtype == Dtype::float64 ? 1e-290 : p.bias_factor ? 1e-27 : 1e-30);
  std::atomic<bool> underflow{false};
  parallel_for(width, 4096, threads, [&](int64_t begin, int64_t end) {
    bool low = false;
    for (int64_t j = begin; j < end; ++j) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums[part * width + j];
      low = low || !(total >= least);
      out[j] = std::log(total) - bias[j];
    }
    if (low) underflow = true;
  });
  if (underflow) {
    // A prototype's own potential is added and taken off again, so an infinite one may be any number there.
    std::vector<double> finite(bias, bias + width);
    for (double& x : finite) x = std::isinf(x) ? 0 : x;
    p = given;
    const Potentials of_columns(p, finite.data(), threads);
    p.offsets = row_logsumexp.data();
    columns(p, parts, finite.data(), out, threads);
  }
}

static void write_rows(Sinkhorn p, const double* bias, double* out, int threads) {
  const Potentials potentials(p, bias, threads);
  p.row_logsumexp = out;
  parallel_for(p.rows, 1 + 16384 / p.width, threads, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    FASTJEM_BEST(row_logsumexps(p, begin, end));
  });
}

static void write_codes(Sinkhorn p, const double* bias, int threads) {
  const Potentials potentials(p, bias, threads);
  parallel_for(p.rows, 1 + 16384 / p.width, threads, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    FASTJEM_BEST(codes(p, begin, end));
  });
}

// Calls f(problem, threads): problems side by side, a thread each, or one after another where they are too few for
// that.
template <class F>
static void for_each_problem(int64_t problems, int threads, F&& f) {
  if (problems < threads) {
    for (int64_t i = 0; i < problems; ++i) f(i, threads);
    return;
  }
  parallel_for(problems, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, 1);
  });
}

// `bias`: double [problems, K], or 0; `out`: double [problems, K].
static void sinkhorn_step(int dtype, uintptr_t scores, int64_t problems, int64_t rows, int64_t width,
                          int64_t problem_stride, int64_t row_stride, double scale, uintptr_t bias,
                          uintptr_t log_floors, uintptr_t out, int threads) {
  for_each_problem(problems, threads, [&](int64_t i, int threads_of_one) {
    Sinkhorn p = problem(dtype, scores, i, problem_stride, rows, width, row_stride, scale);
    p.log_floors = log_floors ? at<const double>(log_floors) + i * rows : nullptr;
    step(p, bias ? at<const double>(bias) + i * width : nullptr, at<double>(out) + i * width, threads_of_one);
  });
}

// `bias`: double [problems, K]; `out`: double [problems, B].
static void sinkhorn_rows(int dtype, uintptr_t scores, int64_t problems, int64_t rows, int64_t width,
                          int64_t problem_stride, int64_t row_stride, double scale, uintptr_t bias, uintptr_t out,
                          int threads) {
  for_each_problem(problems, threads, [&](int64_t i, int threads_of_one) {
    const Sinkhorn p = problem(dtype, scores, i, problem_stride, rows, width, row_stride, scale);
    write_rows(p, at<const double>(bias) + i * width, at<double>(out) + i * rows, threads_of_one);
  });
}

static void sinkhorn_codes(int dtype, uintptr_t scores, int64_t problems, int64_t rows, int64_t width,
                           int64_t problem_stride, int64_t row_stride, double scale, uintptr_t bias, int code_dtype,
                           int64_t code_bytes, uintptr_t out, int threads) {
  prefer_huge_pages(at<void>(out), code_bytes);
  for_each_problem(problems, threads, [&](int64_t i, int threads_of_one) {
    Sinkhorn p = problem(dtype, scores, i, problem_stride, rows, width, row_stride, scale);
    p.code_dtype = static_cast<Dtype>(code_dtype);
    p.codes = at<char>(out) + i * rows * width * element_size(p.code_dtype);
    write_codes(p, at<const double>(bias) + i * width, threads_of_one);
  });
}

void bind_sinkhorn(pybind11::module_& m) {
  m.def("sinkhorn_step", &sinkhorn_step, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("sinkhorn_rows", &sinkhorn_rows, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("sinkhorn_codes", &sinkhorn_codes, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
