#include "covariance/columns.h"

namespace fastjem {

// Wide matrices (float, double for float64) are contiguous.

struct Standardise {
  Dtype dtype;
  const void* x;  // [rows, width], rows `stride` elements apart
  int64_t stride, rows, width;
  double divisor, eps;  // std = sqrt(sum of squares / divisor + eps)
  bool divide;          // by std, after centring
  void* out;            // [rows, width] wide
  double* std;          // [width]
  const void* other;    // [rows, width] wide, or null
  double* dots;         // [width]: of the columns of out with those of other
};

struct ThroughStandardise {
  Dtype dtype;
  const void* product;      // [rows, width] wide
  const void *own, *other;  // [rows, width] wide: the standardised columns of this view and of the other one
  int64_t rows, width;
  double factor, scale;         // of the product, of the result
  const double *weights, *std;  // [width]
  const double* diagonal;       // [width]: means over rows of own * other
  const double* dots;           // [width]: sums over rows of product * own, or null
  void* out;                    // [rows, width]; may be `product`
};

struct VicregRows {
  Dtype dtype;
  const void *x, *y;  // [rows, width], rows x_stride and y_stride elements apart
  int64_t x_stride, y_stride, width;
  const void* centred[2];    // [rows, width] wide each
  const void* product[2];    // [rows, width] wide each
  const double* weights[2];  // [width] each
  double factor, invariance;
  void* out[2];       // [rows, width] each, may be `product`, or null
  double* distances;  // [rows]
};

struct Dot {
  Dtype dtype;  // float32 or float64
  const void *x, *y;
};

struct Correlation {
  Dtype dtype;        // float32 or float64
  const void* cross;  // [width, width] of it
  int64_t width;
  double* row_squares;     // [width]: each row's sum of squares
  double* column_squares;  // [parts, width]: the same of columns, of a part of the rows
};

}  // namespace fastjem

#define FASTJEM_KERNEL "covariance/covariance.h"
#include "each_isa.h"

namespace fastjem {

static void standardise(int dtype, uintptr_t x, int64_t stride, int64_t rows, int64_t width, double divisor, double eps,
                        bool divide, uintptr_t out, uintptr_t std, uintptr_t other, uintptr_t dots, int threads) {
  const Standardise problem{static_cast<Dtype>(dtype),
                            at<const void>(x),
                            stride,
                            rows,
                            width,
                            divisor,
                            eps,
                            divide,
                            at<void>(out),
                            at<double>(std),
                            at<const void>(other),
                            at<double>(dots)};
  for_columns(rows, width, threads,
              [&](int64_t begin, int64_t end) { FASTJEM_BEST(standardise_columns(problem, begin, end)); });
}

static void through_standardise(int dtype, uintptr_t product, uintptr_t own, uintptr_t other, int64_t rows,
                                int64_t width, double factor, double scale, uintptr_t weights, uintptr_t std,
                                uintptr_t diagonal, uintptr_t dots, uintptr_t out, int threads) {
  const ThroughStandardise problem{static_cast<Dtype>(dtype),
                                   at<const void>(product),
                                   at<const void>(own),
                                   at<const void>(other),
                                   rows,
                                   width,
                                   factor,
                                   scale,
                                   at<const double>(weights),
                                   at<const double>(std),
                                   at<const double>(diagonal),
                                   at<const double>(dots),
                                   at<void>(out)};
  for_columns(rows, width, threads,
              [&](int64_t begin, int64_t end) { FASTJEM_BEST(through_standardise_columns(problem, begin, end)); });
}

// `views`: (centred, product, weights, out) of each. Returns the sum of squared distances.
static double vicreg(int dtype, uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride, int64_t rows,
                     int64_t width, const std::vector<std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>>& views,
                     double factor, double invariance, int threads) {
  std::vector<double> distances(rows);
  VicregRows problem{static_cast<Dtype>(dtype),
                     at<const void>(x),
                     at<const void>(y),
                     x_stride,
                     y_stride,
                     width,
                     {},
                     {},
                     {},
                     factor,
                     invariance,
                     {},
                     distances.data()};
  for (size_t side = 0; side < 2; ++side) {
    const auto& [centred, product, weights, out] = views.at(side);
    problem.centred[side] = at<const void>(centred);
    problem.product[side] = at<const void>(product);
    problem.weights[side] = at<const double>(weights);
    problem.out[side] = at<void>(out);
  }
  parallel_for(rows, 1 + 65536 / width, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(vicreg_rows(problem, begin, end)); });
  double total = 0;
  for (const double distance : distances) total += distance;
  return total;
}

static double dot(int dtype, uintptr_t x, uintptr_t y, int64_t size, int threads) {
  const Dot problem{static_cast<Dtype>(dtype), at<const void>(x), at<const void>(y)};
  constexpr int64_t part = 65536;
  std::vector<double> sums((size + part - 1) / part);
  parallel_for(static_cast<int64_t>(sums.size()), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      FASTJEM_BEST(dot_range(problem, i * part, std::min((i + 1) * part, size), &sums[i]));
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// What a view's square says (centred.T @ centred, or centred @ centred.T of fewer rows than columns): the loss of its
// variance and covariance, and the sum of its squares. `diagonal` [width] is written: that of centred.T @ centred,
// which the square has lost where weights are wanted. `weights` [width], or null: the gradient, times rows and `scale`,
// is centred * weights + product * factor.
static std::pair<double, double> vicreg_square(int dtype, uintptr_t square, int64_t rows, int64_t width, uintptr_t std,
                                               uintptr_t diagonal, uintptr_t weights, double mu, double nu, double eps,
                                               double factor, double scale, int threads) {
  const bool by_columns = rows >= width;
  const int64_t side = std::min(rows, width);
  const double total = dot(dtype, square, square, side * side, threads);
  const double* deviation = at<const double>(std);
  double* own = at<double>(diagonal);
  double* slope = at<double>(weights);
  const double inverse = 1.0 / (rows - 1);
  const auto of_square = [&](auto* elements) {
    for (int64_t j = 0; j < width; ++j) {
      own[j] = by_columns ? elements[j * (width + 1)] : (deviation[j] * deviation[j] - eps) * (rows - 1);
      if (by_columns && slope) elements[j * (width + 1)] = 0;
    }
  };
  if (static_cast<Dtype>(dtype) == Dtype::float64) {
    of_square(at<double>(square));
  } else {
    of_square(at<float>(square));
  }
  double variance = 0;
  double squares = 0;
  for (int64_t j = 0; j < width; ++j) {
    squares += own[j] * own[j];
    variance += 1 - deviation[j] < 0 ? 0 : 1 - deviation[j];  // NaN stays
    if (!slope) continue;
    slope[j] = (deviation[j] < 1 ? 1.0 : 0.0) / deviation[j] * (-mu / 2 * rows * inverse / width);
    if (!by_columns) slope[j] -= factor * own[j];
    slope[j] *= scale;
  }
  return {mu / 2 * variance / width + nu * inverse * inverse / width * (total - squares), total};
}

// What is needed of cross = a.T @ b: its sum of squares, `diagonal` [width] over rows, and `dots` [2, width], the sums
// of squares of its rows and columns.
static double correlation(int dtype, uintptr_t cross, int64_t rows, int64_t width, uintptr_t diagonal, uintptr_t dots,
                          int threads) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, width * width / 16384));
  std::vector<double> of_columns(parts * width);
  const Correlation problem{static_cast<Dtype>(dtype), at<const void>(cross), width, at<double>(dots),
                            of_columns.data()};
  parallel_for(parts, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      FASTJEM_BEST(correlation_rows(problem, width * part / parts, width * (part + 1) / parts, part));
    }
  });
  double* own = at<double>(diagonal);
  double* column_squares = at<double>(dots) + width;
  double total = 0;
  for (int64_t j = 0; j < width; ++j) {
    const int64_t place = j * (width + 1);
    own[j] = problem.dtype == Dtype::float64 ? at<const double>(cross)[place] : at<const float>(cross)[place];
    own[j] /= rows;
    column_squares[j] = 0;
    for (int64_t part = 0; part < parts; ++part) column_squares[j] += of_columns[part * width + j];
    total += problem.row_squares[j];
  }
  return total;
}

// The loss of Barlow Twins, of the cross-correlation's diagonal and of the sum of squares of a.T @ b; and `weights`
// [width] of the other view's columns in the gradient.
static double barlow_twins(int64_t rows, int64_t width, double lambda, double total, uintptr_t diagonal,
                           uintptr_t weights) {
  const double* own = at<const double>(diagonal);
  double* slope = at<double>(weights);
  double on_diagonal = 0;
  double squares = 0;
  for (int64_t j = 0; j < width; ++j) {
    on_diagonal += (own[j] - 1) * (own[j] - 1);
    squares += own[j] * own[j];
    slope[j] = (1 - lambda) * own[j] - 1;
  }
  return on_diagonal + lambda * (total / rows / rows - squares);
}

void bind_covariance(pybind11::module_& m) {
  const auto nogil = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("standardise", &standardise, nogil);
  m.def("through_standardise", &through_standardise, nogil);
  m.def("dot", &dot, nogil);
  m.def("vicreg_square", &vicreg_square, nogil);
  m.def("correlation", &correlation, nogil);
  m.def("barlow_twins", &barlow_twins);
  m.def("vicreg", [](int dtype, uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride, int64_t rows,
                     int64_t width, const std::vector<std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>>& views,
                     double factor, double invariance, int threads) {
    const pybind11::gil_scoped_release release;
    return vicreg(dtype, x, x_stride, y, y_stride, rows, width, views, factor, invariance, threads);
  });
}

}  // namespace fastjem
