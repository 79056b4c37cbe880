#include "common.h"
#include "optimizers/gathered.h"
#include "optimizers/pieces.h"

namespace fastjem {

struct AdamwTensor {
  void* parameter;
  const void* gradient;
  void* average;
  void* square;
  void* teacher;  // null: none
  int64_t size;
  float* count;  // of the steps before
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

static void set_group(AdamwTensor& x, const double* settings, int64_t group) {
  const double* of_group = settings + group * adamw_settings;
  x.rate = of_group[0];
  x.beta1 = of_group[1];
  x.beta2 = of_group[2];
  x.eps = of_group[3];
  x.weight_decay = of_group[4];
  x.teacher_momentum = of_group[5];
}

static void take_step(std::vector<AdamwTensor>& tensors, double unscale, bool skipped, int threads) {
  Pieces pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    AdamwTensor& x = tensors[i];
    x.unscale = unscale;
    x.skipped = skipped;
    if (!skipped) *x.count += 1;
    x.step = *x.count;
    pieces.add(i, x.size);
  }
  pieces.each(threads, [&](size_t, const Piece& piece) {
    FASTJEM_BEST(adamw_range(tensors[piece.tensor], piece.begin, piece.end));
  });
}

static void adamw(uintptr_t table, int64_t count, uintptr_t settings, double unscale, bool skipped, int threads) {
  std::vector<AdamwTensor> tensors(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* row = at<const int64_t>(table) + i * adamw_columns;
    AdamwTensor& x = tensors[i];
    x.parameter = at<void>(row[0]);
    x.gradient = at<const void>(row[1]);
    x.average = at<void>(row[2]);
    x.square = at<void>(row[3]);
    x.count = at<float>(row[4]);
    x.teacher = at<void>(row[5]);
    x.size = row[6];
    x.dtype = static_cast<Dtype>(row[7]);
    x.gradient_dtype = static_cast<Dtype>(row[8]);
    set_group(x, at<const double>(settings), row[9]);
  }
  take_step(tensors, unscale, skipped, threads);
}

// Of lists of tensors, teachers with None where a parameter has none. False, and nothing is written, where one isn't
// plain, doesn't fit its parameter, or isn't apart from the others.
static bool adamw_of_plain(pybind11::handle parameters, pybind11::handle gradients, pybind11::handle averages,
                           pybind11::handle squares, pybind11::handle steps, pybind11::handle teachers,
                           const std::vector<int64_t>& groups, uintptr_t settings, int threads) {
  Gathered gathered(parameters);
  if (!gathered.good || gathered.size() != groups.size()) return false;
  std::vector<AdamwTensor> tensors(gathered.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    AdamwTensor& x = tensors[i];
    x.parameter = gathered[i].data;
    x.size = gathered[i].elements;
    x.dtype = static_cast<Dtype>(gathered[i].dtype);
    set_group(x, at<const double>(settings), groups[i]);
  }
  gathered.gradients(gradients, [&](size_t i, const Plain& gradient) {
    tensors[i].gradient = gradient.data;
    tensors[i].gradient_dtype = static_cast<Dtype>(gradient.dtype);
  });
  gathered.beside(averages, [&](size_t i, void* average) { tensors[i].average = average; });
  gathered.beside(squares, [&](size_t i, void* square) { tensors[i].square = square; });
  gathered.beside(teachers, [&](size_t i, void* teacher) { tensors[i].teacher = teacher; });
  gathered.steps(steps, [&](size_t i, float* count) { tensors[i].count = count; });
  if (!gathered.may_be_written()) return false;
  for (const AdamwTensor& x : tensors) {
    if (x.size && !(x.average && x.square)) return false;
  }
  const pybind11::gil_scoped_release release;
  take_step(tensors, 1, false, threads);
  return true;
}

void bind_adamw(pybind11::module_& m) {
  m.def("adamw", &adamw, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("adamw_of_plain", &adamw_of_plain);
}

}  // namespace fastjem
