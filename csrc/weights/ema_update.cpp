#include "tensors.h"

namespace fastjem {

struct EmaPair {
  void* teacher;
  const void* student;
  int64_t size;
  Dtype teacher_dtype, student_dtype;
};

}  // namespace fastjem

#define FASTJEM_KERNEL "weights/ema_update.h"
#include "each_isa.h"

namespace fastjem {

static void ema_update(const std::vector<EmaPair>& pairs, double momentum, int threads) {
  std::vector<int64_t> ends;  // the pairs laid end to end, so that threads share the elements evenly
  int64_t total = 0;
  for (const EmaPair& pair : pairs) {
    total += pair.size;
    ends.push_back(total);
  }
  parallel_for(total, 65536, threads, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; i < pairs.size() && begin < end; ++i) {
      const int64_t start = ends[i] - pairs[i].size;
      const int64_t stop = std::min(end, ends[i]);
      FASTJEM_BEST(ema_update_range(pairs[i], begin - start, stop - start, momentum));
      begin = stop;
    }
  });
}

// One tuple (teacher, student, elements, teacher's dtype, student's dtype) per pair of tensors.
static void ema_update_table(const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t, int, int>>& table,
                             double momentum, int threads) {
  std::vector<EmaPair> pairs;
  for (const auto& [teacher, student, size, teacher_dtype, student_dtype] : table) {
    pairs.push_back({at<void>(teacher), at<const void>(student), size, static_cast<Dtype>(teacher_dtype),
                     static_cast<Dtype>(student_dtype)});
  }
  const pybind11::gil_scoped_release release;
  ema_update(pairs, momentum, threads);
}

// The facts of all teachers, then of all students, which were checked to fit one another. False, and nothing is
// written, where a student's layout isn't its teacher's.
static bool ema_update_plain(const pybind11::bytes& facts, double momentum, int threads) {
  char* data;
  Py_ssize_t bytes;
  if (PyBytes_AsStringAndSize(facts.ptr(), &data, &bytes) != 0) throw pybind11::error_already_set();
  const std::vector<Plain> tensors = tensors_of(data, bytes);
  const size_t count = tensors.size() / 2;
  std::vector<EmaPair> pairs;
  for (size_t i = 0; i < count; ++i) {
    const Plain& teacher = tensors[i];
    const Plain& student = tensors[count + i];
    if (!teacher.has_layout_of(student) || !student.is_floating() || teacher.dtype < 0 || teacher.dtype > 1)
      return false;
    pairs.push_back({teacher.data, student.data, teacher.elements, static_cast<Dtype>(teacher.dtype),
                     static_cast<Dtype>(student.dtype)});
  }
  const pybind11::gil_scoped_release release;
  ema_update(pairs, momentum, threads);
  return true;
}

void bind_ema_update(pybind11::module_& m) {
  m.def("ema_update", &ema_update_table);
  m.def("ema_update_plain", &ema_update_plain);
}

}  // namespace fastjem
