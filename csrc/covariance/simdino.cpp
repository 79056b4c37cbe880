#include "tensors.h"

namespace fastjem {

struct Simdino {
  Dtype dtype;
  std::vector<const void*> student, teacher;  // [rows, width] each, dense; the first student views are the teacher's
  int64_t rows, width;
  bool mean;                     // the rate is of (student + teacher) / 2
  void* units;                   // [teacher views, rows, width] wide: the rows whose rate is taken
  const void* product;           // [teacher views, rows, width] wide: what the rate's gradient is made of
  double of_product, of_cosine;  // factors in the gradient: of the product, of the sum of other views
  std::vector<void*> gradients;  // as the students, or null
  double* cosines;               // [rows]: the sum over pairs of different views
};

}  // namespace fastjem

#define FASTJEM_KERNEL "covariance/simdino.h"
#include "each_isa.h"

namespace fastjem {

namespace py = pybind11;

static bool read(const py::list& student, const py::list& teacher, Simdino& p) {
  Given given;
  bool is_first = true;
  const auto read_all = [&](const py::list& views, std::vector<const void*>& data) {
    for (const py::handle x : views) {
      const Plain view = given(x, 2);
      if (!given.good) return false;
      if (is_first) {
        p.dtype = static_cast<Dtype>(view.dtype);
        p.rows = view.shape[0];
        p.width = view.shape[1];
      }
      is_first = false;
      if (view.shape[0] != p.rows || view.shape[1] != p.width) return false;
      data.push_back(view.data);
    }
    return true;
  };
  return read_all(student, p.student) && read_all(teacher, p.teacher);
}

// Fills `units` for plain views of one shape and dtype; false for others.
static bool simdino_units(const py::list& student, const py::list& teacher, bool mean, uintptr_t units, int threads) {
  Simdino p{};
  if (!read(student, teacher, p)) return false;
  p.mean = mean;
  p.units = at<void>(units);
  const py::gil_scoped_release release;
  parallel_for(p.rows, 1 + 32768 / (p.width * static_cast<int64_t>(p.teacher.size())), threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(simdino_units(p, begin, end)); });
  return true;
}

// The sum of cosines of all pairs of different views and rows, for views that `simdino_units` has taken. Gradients come
// in the shape and dtype of the students, or as 0.
static double simdino(const py::list& student, const py::list& teacher, bool mean, uintptr_t product, double of_product,
                      double of_cosine, const std::vector<uintptr_t>& gradients, int threads) {
  Simdino p{};
  if (!read(student, teacher, p)) throw std::invalid_argument("simdino: views must be plain");
  p.mean = mean;
  p.product = at<const void>(product);
  p.of_product = of_product;
  p.of_cosine = of_cosine;
  for (const uintptr_t gradient : gradients) p.gradients.push_back(at<void>(gradient));
  const py::gil_scoped_release release;
  std::vector<double> cosines(p.rows);
  p.cosines = cosines.data();
  const int64_t work = p.width * static_cast<int64_t>(p.student.size() + p.teacher.size());
  parallel_for(p.rows, 1 + 16384 / work, threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(simdino_rows(p, begin, end)); });
  double total = 0;
  for (const double cosine : cosines) total += cosine;
  return total;
}

void bind_simdino(py::module_& m) {
  m.def("simdino_units", &simdino_units);
  m.def("simdino", &simdino);
}

}  // namespace fastjem
