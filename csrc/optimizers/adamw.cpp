#include "common.h"
#include "optimizers/pieces.h"

namespace fastjem {

struct AdamwTensor {
  void* parameter;
  const void* gradient;
  void* average;
  void* square;
  void* teacher;  // null: none
  Dtype dtype, gradient_dtype;
  bool skipped;  // the gradients aren't finite: only the teacher moves
  double rate, beta1, beta2, eps, weight_decay, teacher_momentum;
  double step;     // this one's number, from 1
  double unscale;  // what the gradient is multiplied by
};

}  // namespace fastjem

#define FASTJEM_KERNEL "optimizers/adamw.h"
#include "each_isa.h"

namespace fastjem {

// Columns of the table of tensors and of the settings of a group: kernels/optimizers/columns.py.
static constexpr int adamw_columns = 10;
static constexpr int adamw_settings = 6;

static void adamw(uintptr_t table, int64_t count, uintptr_t settings, double unscale, bool skipped, int threads) {
  std::vector<AdamwTensor> tensors(count);
  Pieces pieces;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* row = at<const int64_t>(table) + i * adamw_columns;
    const double* of_group = at<const double>(settings) + row[9] * adamw_settings;
    AdamwTensor& x = tensors[i];
    x.parameter = at<void>(row[0]);
    x.gradient = at<const void>(row[1]);
    x.average = at<void>(row[2]);
    x.square = at<void>(row[3]);
    x.teacher = at<void>(row[5]);
    x.dtype = static_cast<Dtype>(row[7]);
    x.gradient_dtype = static_cast<Dtype>(row[8]);
    x.rate = of_group[0];
    x.beta1 = of_group[1];
    x.beta2 = of_group[2];
    x.eps = of_group[3];
    x.weight_decay = of_group[4];
    x.teacher_momentum = of_group[5];
    x.unscale = unscale;
    x.skipped = skipped;
    float* step = at<float>(row[4]);
    if (!skipped) *step += 1;
    x.step = *step;
    pieces.add(i, row[6]);
  }
  pieces.each(threads, [&](size_t, const Piece& piece) {
    FASTJEM_BEST(adamw_range(tensors[piece.tensor], piece.begin, piece.end));
  });
}

void bind_adamw(pybind11::module_& m) { m.def("adamw", &adamw, pybind11::call_guard<pybind11::gil_scoped_release>()); }

}  // namespace fastjem
