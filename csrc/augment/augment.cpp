#include "augment/columns.h"
#include "common.h"

namespace fastjem {

struct Augment {
  Dtype dtype;
  const uint8_t* images;    // [B, H, W, 3]
  const float* parameters;  // [B, COLUMNS]
  int64_t height, width;
  float scale[3], shift[3];  // normalised = level * scale + shift, of red, green, blue
  float threshold;           // the level from which on solarize inverts
  bool channels_last;
  bool exact;  // between steps levels become whole, where torchvision's do
  void* out;   // [B, 3, H, W], or [B, H, W, 3] where channels come last
};

}  // namespace fastjem

#define FASTJEM_KERNEL "augment/augment.h"
#include "each_isa.h"

namespace fastjem {

static void augment(int dtype, uintptr_t images, uintptr_t parameters, int64_t batch, int64_t height, int64_t width,
                    const std::vector<double>& mean, const std::vector<double>& std, float threshold,
                    bool channels_last, bool exact, uintptr_t out, int threads) {
  Augment problem{static_cast<Dtype>(dtype),
                  at<const uint8_t>(images),
                  at<const float>(parameters),
                  height,
                  width,
                  {},
                  {},
                  threshold,
                  channels_last,
                  exact,
                  at<void>(out)};
  for (int c = 0; c < 3; ++c) {
    problem.scale[c] = static_cast<float>(1 / (255 * std.at(c)));
    problem.shift[c] = static_cast<float>(-mean.at(c) / std.at(c));
  }
  parallel_for(batch, 1 + 4096 / (height * width), threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(augment_images(problem, begin, end)); });
}

static pybind11::dict augment_columns() {
  pybind11::dict columns;
#define FASTJEM_ENTRY(name) columns[#name] = static_cast<int>(name);
  FASTJEM_AUGMENT_COLUMNS(FASTJEM_ENTRY)
#undef FASTJEM_ENTRY
  return columns;
}

void bind_augment(pybind11::module_& m) {
  m.def("augment_columns", &augment_columns, "The columns of the table of parameters, by name; COLUMNS of them.");
  m.def("augment", &augment, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
