#include "common.h"

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

// One tuple (teacher, student, elements, teacher's dtype, student's dtype) per pair of tensors.
static void ema_update(const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t, int, int>>& table, double momentum,
                       int threads) {
  std::vector<EmaPair> pairs;
  std::vector<int64_t> ends;  // the pairs laid end to end, so that threads share the elements evenly
  int64_t total = 0;
  for (const auto& [teacher, student, size, teacher_dtype, student_dtype] : table) {
    pairs.push_back({at<void>(teacher), at<const void>(student), size, static_cast<Dtype>(teacher_dtype),
                     static_cast<Dtype>(student_dtype)});
    total += size;
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

void bind_ema_update(pybind11::module_& m) {
  m.def("ema_update", [](const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t, int, int>>& table, double momentum,
                         int threads) {
    const pybind11::gil_scoped_release release;
    ema_update(table, momentum, threads);
  });
}

}  // namespace fastjem
