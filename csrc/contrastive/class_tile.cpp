#include "contrastive/tile.h"

namespace fastjem {

// A tile of rows and all of a batch's rows, which are its columns: row i is column i. Those of its class are its
// positives, the others its negatives.
struct ClassTile {
  Dtype dtype;   // float32 or float64
  void* values;  // [rows, columns] similarities; then each row's loss's derivatives by its logits, if `wanted`
  int64_t rows, columns;
  double factor;          // a logit is a similarity times it
  double hardness;        // negatives count by exp(hardness * logit), with a mean of 1
  const int64_t* labels;  // [columns]
  double* losses;         // [rows]
  bool wanted;
};

}  // namespace fastjem

#define FASTJEM_KERNEL "contrastive/class_tile.h"
#include "each_isa.h"

namespace fastjem {

// False where a loss isn't finite; then the values are of no use.
static bool losses(int dtype, uintptr_t values, int64_t rows, int64_t columns, double factor, double hardness,
                   uintptr_t labels, uintptr_t results, bool wanted, int threads) {
  const ClassTile p{static_cast<Dtype>(dtype), at<void>(values),    rows,  columns, factor, hardness,
                    at<const int64_t>(labels), at<double>(results), wanted};
  in_parts(rows, parts_of(rows, columns, threads),
           [&](int64_t begin, int64_t end, int64_t) { FASTJEM_BEST(class_tile_rows(p, begin, end)); });
  return std::all_of(p.losses, p.losses + rows, [](double x) { return std::isfinite(x); });
}

void bind_class_tile(pybind11::module_& m) {
  m.def("class_tile_losses", &losses, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
