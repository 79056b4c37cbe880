#include "common.h"

namespace fastjem {

// The similarities of some queries with some rows of a bank, and the k best so far of each query. They are a heap whose
// root is the worst of them, until `nearest_sorted` sorts them.
struct Nearest {
  const void* similarities;  // [rows, columns], rows `stride` elements apart
  int64_t columns, stride;
  int64_t column_start;  // the number of the first column in the bank
  int64_t k;
  void* values;    // [rows, k]
  int64_t* index;  // [rows, k]
  int64_t kept;    // how many of the k there are already, in each row alike
};

// Rows that were assigned to centroids, to be added up.
struct Assigned {
  const void* rows;  // [N, width], wide
  int64_t count, width;
  const int64_t* assignments;  // [N]
  const void* centroids;       // [K, width], wide
  double* sums;                // [K, width], or null
  int64_t* counts;             // [K], or null
  double* distances;           // [N], squared, each row's to its centroid
};

}  // namespace fastjem

#define FASTJEM_KERNEL "neighbors/neighbors.h"
#include "each_isa.h"

namespace fastjem {

static void nearest(int dtype, uintptr_t similarities, int64_t rows, int64_t columns, int64_t stride,
                    int64_t column_start, int64_t k, uintptr_t values, uintptr_t index, int64_t kept, int threads) {
  const Nearest problem{at<const void>(similarities), columns, stride, column_start, k, at<void>(values),
                        at<int64_t>(index),           kept};
  parallel_for(rows, 1 + 16384 / columns, threads, [&](int64_t begin, int64_t end) {
    FASTJEM_BEST(nearest(static_cast<Dtype>(dtype), problem, begin, end));
  });
}

static void nearest_sorted(int dtype, int64_t rows, int64_t k, uintptr_t values, uintptr_t index, int threads) {
  const Nearest problem{nullptr, 0, 0, 0, k, at<void>(values), at<int64_t>(index), k};
  parallel_for(rows, 1 + 4096 / k, threads, [&](int64_t begin, int64_t end) {
    FASTJEM_BEST(nearest_sorted(static_cast<Dtype>(dtype), problem, begin, end));
  });
}

// Returns the sum of the squared distances. A thread adds the rows of its own centroids, in order: every sum has the
// same bits with any number of threads.
static double add_assigned(int dtype, uintptr_t rows, int64_t count, int64_t width, uintptr_t assignments,
                           uintptr_t centroids, uintptr_t sums, uintptr_t counts, int threads) {
  std::vector<double> distances(count);
  const Assigned problem{at<const void>(rows),
                         count,
                         width,
                         at<const int64_t>(assignments),
                         at<const void>(centroids),
                         at<double>(sums),
                         at<int64_t>(counts),
                         distances.data()};
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, count * width / 16384));
  parallel_for(parts, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      FASTJEM_BEST(add_assigned(static_cast<Dtype>(dtype), problem, part, parts));
    }
  });
  double total = 0;
  for (const double distance : distances) total += distance;
  return total;
}

void bind_neighbors(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> release;
  m.def("nearest", &nearest, release);
  m.def("nearest_sorted", &nearest_sorted, release);
  m.def("add_assigned", &add_assigned, release);
}

}  // namespace fastjem
