#include "common.h"
#include "optimizers/pieces.h"

namespace fastjem {

struct LarsTensor {
  void* parameter;
  const void* gradient;
  void* buffer;   // null: no momentum
  void* teacher;  // null: none
  int64_t size;
  Dtype dtype, gradient_dtype;
  bool nesterov, adapts, clips;
  bool skipped;  // the gradients aren't finite: only the teacher moves
  double rate, momentum, weight_decay, teacher_momentum, trust, eps;
  double unscale;    // what the gradient is multiplied by
  double ratio = 1;  // LARS's: how much larger this tensor's rate is than its group's
};

}  // namespace fastjem

#define FASTJEM_KERNEL "optimizers/lars.h"
#include "each_isa.h"

namespace fastjem {

// Columns of the table of tensors and of the settings of a group: kernels/optimizers/columns.py.
static constexpr int lars_columns = 8;
static constexpr int lars_settings = 9;

static std::vector<LarsTensor> lars_tensors(const int64_t* table, int64_t count, const double* settings, double unscale,
                                            bool skipped) {
  std::vector<LarsTensor> tensors;
  tensors.reserve(count);
  for (const int64_t* row = table; row < table + count * lars_columns; row += lars_columns) {
    const double* of_group = settings + row[7] * lars_settings;
    LarsTensor x{};
    x.parameter = at<void>(row[0]);
    x.gradient = at<const void>(row[1]);
    x.buffer = at<void>(row[2]);
    x.teacher = at<void>(row[3]);
    x.size = row[4];
    x.dtype = static_cast<Dtype>(row[5]);
    x.gradient_dtype = static_cast<Dtype>(row[6]);
    x.rate = of_group[0];
    x.momentum = of_group[1];
    x.weight_decay = of_group[2];
    x.teacher_momentum = of_group[3];
    x.trust = of_group[4];
    x.eps = of_group[5];
    x.nesterov = of_group[6] != 0;
    x.adapts = of_group[7] == 2 || (of_group[7] == 1 && x.weight_decay != 0);
    x.clips = of_group[8] != 0;
    x.unscale = unscale;
    x.skipped = skipped;
    x.ratio = 1;
    tensors.push_back(x);
  }
  return tensors;
}

// From the squares' sums of parameter and gradient.
static void set_ratio(LarsTensor& x, double parameter_squares, double gradient_squares) {
  const double parameter_norm = std::sqrt(parameter_squares);
  const double gradient_norm = std::sqrt(gradient_squares) * x.unscale;
  x.ratio = 1;
  if (parameter_norm > 0 && gradient_norm > 0) {
    x.ratio = x.trust * parameter_norm / (gradient_norm + x.weight_decay * parameter_norm + x.eps);
  }
  if (x.clips) {
    const double clipped = x.ratio / x.rate;
    x.ratio = clipped > 1 ? 1 : clipped;
  }
}

static void add_squares(const std::vector<LarsTensor>& tensors, const Pieces& pieces, size_t first, double* norms,
                        int threads) {
  std::vector<double> sums(2 * pieces.size());
  pieces.each(threads, [&](size_t i, const Piece& piece) {
    const LarsTensor& x = tensors[piece.tensor];
    FASTJEM_BEST(squares_range(x.dtype, x.parameter, piece.begin, piece.end, &sums[2 * i]));
    FASTJEM_BEST(squares_range(x.gradient_dtype, x.gradient, piece.begin, piece.end, &sums[2 * i + 1]));
  });
  for (size_t i = 0; i < pieces.size(); ++i) {
    double* of_tensor = norms + 2 * (pieces[i].tensor - first);
    of_tensor[0] += sums[2 * i];
    of_tensor[1] += sums[2 * i + 1];
  }
}

// Tensors are taken a few at a time, so that the second reading of a parameter and its gradient, for the update, finds
// them in the second-level caches. A single one may be larger, and is then read from memory twice.
static constexpr int64_t elements_at_a_time = 1 << 18;

static void lars(uintptr_t table, int64_t count, uintptr_t settings, uintptr_t norms, double unscale, bool skipped,
                 int threads) {
  const double* given = at<const double>(norms);
  std::vector<LarsTensor> tensors =
      lars_tensors(at<const int64_t>(table), count, at<const double>(settings), unscale, skipped);
  for (size_t first = 0, last = 0; first < tensors.size(); first = last) {
    Pieces all, adapted;
    int64_t elements = 0;
    for (; last < tensors.size() && (last == first || elements + tensors[last].size <= elements_at_a_time); ++last) {
      elements += tensors[last].size;
      all.add(last, tensors[last].size);
      if (tensors[last].adapts && !skipped) adapted.add(last, tensors[last].size);
    }
    std::vector<double> sums(2 * (last - first));
    if (given) {
      std::copy(given + 2 * first, given + 2 * last, sums.begin());
    } else {
      add_squares(tensors, adapted, first, sums.data(), threads);
    }
    for (size_t i = first; i < last; ++i) {
      if (tensors[i].adapts) set_ratio(tensors[i], sums[2 * (i - first)], sums[2 * (i - first) + 1]);
    }
    all.each(threads, [&](size_t, const Piece& piece) {
      FASTJEM_BEST(lars_range(tensors[piece.tensor], piece.begin, piece.end));
    });
  }
}

static void lars_norms(uintptr_t table, int64_t count, uintptr_t norms, int threads) {
  const std::vector<double> none(lars_settings);
  std::vector<LarsTensor> tensors = lars_tensors(at<const int64_t>(table), count, none.data(), 1, false);
  Pieces pieces;
  for (size_t i = 0; i < tensors.size(); ++i) pieces.add(i, tensors[i].size);
  double* sums = at<double>(norms);
  std::fill(sums, sums + 2 * count, 0.0);
  add_squares(tensors, pieces, 0, sums, threads);
}

void bind_lars(pybind11::module_& m) {
  m.def("lars", &lars, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("lars_norms", &lars_norms, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
