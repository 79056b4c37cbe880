#include "common.h"
#include "optimizers/gathered.h"
#include "optimizers/pieces.h"

namespace fastjem {

struct LarsTensor {
  void* parameter;
  const void* gradient;
  void* buffer;   // null: no momentum
  void* teacher;  // null: none
  int64_t size;
  Dtype dtype, gradient_dtype;
  bool nesterov, adapts, clips, decay_in_norm;
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
static constexpr int lars_settings = 10;

static void set_group(LarsTensor& x, const double* settings, int64_t group) {
  const double* of_group = settings + group * lars_settings;
  x.rate = of_group[0];
  x.momentum = of_group[1];
  x.weight_decay = of_group[2];
  x.teacher_momentum = of_group[3];
  x.trust = of_group[4];
  x.eps = of_group[5];
  x.nesterov = of_group[6] != 0;
  x.adapts = of_group[7] == 2 || (of_group[7] == 1 && x.weight_decay != 0);
  x.clips = of_group[8] != 0;
  x.decay_in_norm = of_group[9] != 0;
}

static std::vector<LarsTensor> lars_tensors(const int64_t* table, int64_t count, const double* settings, double unscale,
                                            bool skipped) {
  std::vector<LarsTensor> tensors;
  tensors.reserve(count);
  for (const int64_t* row = table; row < table + count * lars_columns; row += lars_columns) {
    LarsTensor x{};
    x.parameter = at<void>(row[0]);
    x.gradient = at<const void>(row[1]);
    x.buffer = at<void>(row[2]);
    x.teacher = at<void>(row[3]);
    x.size = row[4];
    x.dtype = static_cast<Dtype>(row[5]);
    x.gradient_dtype = static_cast<Dtype>(row[6]);
    set_group(x, settings, row[7]);
    x.unscale = unscale;
    x.skipped = skipped;
    tensors.push_back(x);
  }
  return tensors;
}

// From the squares' sums of parameter and gradient.
static void set_ratio(LarsTensor& x, double parameter_squares, double gradient_squares) {
  const double parameter_norm = std::sqrt(parameter_squares);
  const double gradient_norm = std::sqrt(gradient_squares);
  const double decay = x.decay_in_norm ? 0 : x.weight_decay;  // what the norm lacks of it
  x.ratio = 1;
  if (parameter_norm > 0 && gradient_norm > 0) {
    x.ratio = x.trust * parameter_norm / (gradient_norm + decay * parameter_norm + x.eps);
  }
  if (x.clips) {
    const double clipped = x.ratio / x.rate;
    x.ratio = clipped > 1 ? 1 : clipped;
  }
}

static void add_squares(const LarsTensor& x, const Piece& piece, double* sums) {
  FASTJEM_BEST(squares_range(x, piece.begin, piece.end, sums));
}

// By all threads: the squares of pieces, which are then added in order.
static void add_squares(const std::vector<LarsTensor>& tensors, const Pieces& pieces, double* norms, int threads) {
  std::vector<double> sums(2 * pieces.size());
  pieces.each(threads, [&](size_t i, const Piece& piece) { add_squares(tensors[piece.tensor], piece, &sums[2 * i]); });
  for (size_t i = 0; i < pieces.size(); ++i) {
    norms[2 * pieces[i].tensor] += sums[2 * i];
    norms[2 * pieces[i].tensor + 1] += sums[2 * i + 1];
  }
}

static void update(const LarsTensor& x, const Piece& piece) { FASTJEM_BEST(lars_range(x, piece.begin, piece.end)); }

// One thread: the update begins where the squares ended, as the caches hold that part of a large tensor still.
static void squares_and_update(LarsTensor& x, bool has_norms, double* norms) {
  Pieces pieces;
  pieces.add(0, x.size);
  if (x.adapts) {
    for (size_t i = 0; i < pieces.size() && !has_norms; ++i) add_squares(x, pieces[i], norms);
    set_ratio(x, norms[0], norms[1]);
  }
  for (size_t i = pieces.size(); i > 0; --i) update(x, pieces[i - 1]);
}

// A tensor's rate is known when all of its squares are added. Where one thread does both, nobody waits for anybody:
// each takes whole tensors, the largest first to whoever has least. Only a tensor that is too large a part of all for
// that is shared, as are updates without squares. (ResNet-50, two threads: tensors shared a few at a time, with a wait
// behind the squares of each, took twice as long.)
static void take_step(std::vector<LarsTensor>& tensors, const double* given, int threads) {
  std::vector<double> norms(2 * tensors.size());
  if (given) std::copy_n(given, norms.size(), norms.begin());
  int64_t total = 0;
  for (const LarsTensor& x : tensors) total += x.size;
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, total / 65536));

  Pieces shared_squares, shared;
  std::vector<size_t> whole;
  for (size_t i = 0; i < tensors.size(); ++i) {
    LarsTensor& x = tensors[i];
    x.adapts = x.adapts && !x.skipped;
    const bool is_large = 4 * workers * x.size > total && workers > 1;
    if (x.adapts && !is_large) {
      whole.push_back(i);
      continue;
    }
    shared.add(i, x.size);
    if (x.adapts && !given) {
      shared_squares.end_block();  // its pieces are those of a tensor that one thread has to itself
      shared_squares.add(i, x.size);
    }
  }
  std::stable_sort(whole.begin(), whole.end(), [&](size_t i, size_t j) { return tensors[i].size > tensors[j].size; });
  std::vector<std::vector<size_t>> of_worker(workers);
  std::vector<int64_t> load(workers);
  for (size_t i : whole) {
    const size_t least = std::min_element(load.begin(), load.end()) - load.begin();
    of_worker[least].push_back(i);
    load[least] += tensors[i].size;
  }
  parallel_for(workers, 1, static_cast<int>(workers), [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (size_t i : of_worker[worker]) squares_and_update(tensors[i], given != nullptr, &norms[2 * i]);
    }
  });
  add_squares(tensors, shared_squares, norms.data(), threads);
  for (size_t i = 0; i < shared.size(); ++i) {
    LarsTensor& x = tensors[shared[i].tensor];
    if (x.adapts) set_ratio(x, norms[2 * shared[i].tensor], norms[2 * shared[i].tensor + 1]);
  }
  shared.each(threads, [&](size_t, const Piece& piece) { update(tensors[piece.tensor], piece); });
}

static void lars(uintptr_t table, int64_t count, uintptr_t settings, uintptr_t given, double unscale, bool skipped,
                 int threads) {
  std::vector<LarsTensor> tensors =
      lars_tensors(at<const int64_t>(table), count, at<const double>(settings), unscale, skipped);
  take_step(tensors, at<const double>(given), threads);
}

// Of lists of tensors, buffers and teachers with None where a parameter has none. False, and nothing is written, where
// one isn't plain, doesn't fit its parameter, or isn't apart from the others.
static bool lars_of_plain(pybind11::handle parameters, pybind11::handle gradients, pybind11::handle buffers,
                          pybind11::handle teachers, const std::vector<int64_t>& groups, uintptr_t settings,
                          int threads) {
  Gathered gathered(parameters);
  if (!gathered.good || gathered.size() != groups.size()) return false;
  std::vector<LarsTensor> tensors(gathered.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    LarsTensor& x = tensors[i];
    x.parameter = gathered[i].data;
    x.size = gathered[i].elements;
    x.dtype = static_cast<Dtype>(gathered[i].dtype);
    x.unscale = 1;
    set_group(x, at<const double>(settings), groups[i]);
  }
  gathered.gradients(gradients, [&](size_t i, const Plain& gradient) {
    tensors[i].gradient = gradient.data;
    tensors[i].gradient_dtype = static_cast<Dtype>(gradient.dtype);
  });
  gathered.beside(buffers, [&](size_t i, void* buffer) { tensors[i].buffer = buffer; });
  gathered.beside(teachers, [&](size_t i, void* teacher) { tensors[i].teacher = teacher; });
  if (!gathered.may_be_written()) return false;
  const pybind11::gil_scoped_release release;
  take_step(tensors, nullptr, threads);
  return true;
}

static void lars_norms(uintptr_t table, int64_t count, uintptr_t settings, uintptr_t norms, double unscale,
                       int threads) {
  const std::vector<LarsTensor> tensors =
      lars_tensors(at<const int64_t>(table), count, at<const double>(settings), unscale, false);
  Pieces pieces;
  for (size_t i = 0; i < tensors.size(); ++i) pieces.add(i, tensors[i].size);
  double* sums = at<double>(norms);
  std::fill(sums, sums + 2 * count, 0.0);
  add_squares(tensors, pieces, sums, threads);
}

void bind_lars(pybind11::module_& m) {
  m.def("lars", &lars, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("lars_of_plain", &lars_of_plain);
  m.def("lars_norms", &lars_norms, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
