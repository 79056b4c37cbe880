#include "augment/columns.h"
#include "common.h"

namespace fastjem {

struct Augment {
  Dtype dtype;
  const void* images;  // [B, H, W, C] uint8, or float: levels, of which what is beyond 0 and 255 is cut off
  bool of_floats;
  const float* parameters;  // [B, COLUMNS]
  int64_t height, width, channels;
  const float *scale, *shift;  // [C]: normalised = level * scale + shift
  float threshold;             // the level from which on solarize inverts
  bool channels_last;
  bool exact;  // of uint8: between steps levels become whole, where torchvision's do
  void* out;   // [B, C, H, W], or [B, H, W, C] where channels come last
};

}  // namespace fastjem

#define FASTJEM_KERNEL "augment/augment.h"
#include "each_isa.h"

namespace fastjem {

static void augment(int dtype, uintptr_t images, bool of_floats, uintptr_t parameters, int64_t batch, int64_t height,
                    int64_t width, const std::vector<double>& mean, const std::vector<double>& std, float threshold,
                    bool channels_last, bool exact, uintptr_t out, int threads) {
  std::vector<float> scale, shift;
  for (size_t c = 0; c < mean.size(); ++c) {
    scale.push_back(static_cast<float>(1 / (255 * std.at(c))));
    shift.push_back(static_cast<float>(-mean[c] / std.at(c)));
  }
  const Augment problem{static_cast<Dtype>(dtype),
                        at<const void>(images),
                        of_floats,
                        at<const float>(parameters),
                        height,
                        width,
                        static_cast<int64_t>(mean.size()),
                        scale.data(),
                        shift.data(),
                        threshold,
                        channels_last,
                        exact,
                        at<void>(out)};
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
