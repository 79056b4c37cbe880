#include "covariance/columns.h"

namespace fastjem {

struct Whitened {
  Dtype dtype;       // float32 or float64, of all matrices
  const void* rows;  // [2, count, width]
  void* gradient;    // [2, count, width], for the whitened rows, or null
  int64_t count, width;
  double scale;     // of the gradient
  double* cosines;  // [count]
};

}  // namespace fastjem

#define FASTJEM_KERNEL "covariance/factored.h"
#include "each_isa.h"

namespace fastjem {

// x = x * scale + diagonal * I for matrices [count, side, side]; false where one holds a NaN or an infinity.
static bool shifted_identity(int dtype, uintptr_t x, int64_t count, int64_t side, double scale, double diagonal,
                             int threads) {
  std::vector<double> nothing(count * side);
  parallel_for(count * side, 1 + 32768 / side, threads, [&](int64_t begin, int64_t end) {
    if (static_cast<Dtype>(dtype) == Dtype::float64) {
      FASTJEM_BEST(shifted_rows(at<double>(x), side, scale, diagonal, begin, end, nothing.data()));
    } else {
      FASTJEM_BEST(shifted_rows(at<float>(x), side, scale, diagonal, begin, end, nothing.data()));
    }
  });
  return std::all_of(nothing.begin(), nothing.end(), [](double row) { return row == 0; });
}

// Sum of the logarithms of the diagonals of x [count, side, side].
static double log_diagonals(int dtype, uintptr_t x, int64_t count, int64_t side) {
  double total = 0;
  for (int64_t i = 0; i < count * side; ++i) {
    const int64_t place = i / side * side * side + i % side * (side + 1);
    total +=
        std::log(static_cast<Dtype>(dtype) == Dtype::float64 ? at<const double>(x)[place] : at<const float>(x)[place]);
  }
  return total;
}

// The upper triangle of x [count, side, side] becomes that of the lower one, and all of it is multiplied by `factor`.
static void mirrored(int dtype, uintptr_t x, int64_t count, int64_t side, double factor, int threads) {
  parallel_for(count, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (static_cast<Dtype>(dtype) == Dtype::float64) {
        baseline::mirror(at<double>(x) + k * side * side, side, factor);
      } else {
        baseline::mirror(at<float>(x) + k * side * side, side, static_cast<float>(factor));
      }
    }
  });
}

// The sum of the rows' cosines; and the gradient of `-count / 2` times the loss, whose columns have no mean: that is
// what centring, from which the whitened rows come, does to a gradient.
static double w_mse_rows(int dtype, uintptr_t rows, int64_t count, int64_t width, double scale, uintptr_t gradient,
                         int threads) {
  std::vector<double> cosines(count);
  const Whitened p{
      static_cast<Dtype>(dtype), at<const void>(rows), at<void>(gradient), count, width, scale, cosines.data()};
  parallel_for(count, 1 + 16384 / width, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(w_mse_rows(p, begin, end)); });
  if (p.gradient) {
    for_columns(count, width, threads, [&](int64_t begin, int64_t end) { FASTJEM_BEST(w_mse_columns(p, begin, end)); });
  }
  double total = 0;
  for (const double cosine : cosines) total += cosine;
  return total;
}

void bind_factored(pybind11::module_& m) {
  const auto nogil = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("shifted_identity", &shifted_identity, nogil);
  m.def("log_diagonals", &log_diagonals, nogil);
  m.def("mirrored", &mirrored, nogil);
  m.def("w_mse_rows", &w_mse_rows, nogil);
}

}  // namespace fastjem
