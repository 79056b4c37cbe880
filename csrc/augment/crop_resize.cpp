#include "augment/columns.h"
#include "common.h"

namespace fastjem {

struct CropResize {
  const void* images;  // [N, H, W, C] uint8 or float
  bool of_floats;
  const int64_t* indices;   // [B], in [0, N)
  const float* parameters;  // [B, COLUMNS]
  int64_t height, width, channels;
  int64_t out_height, out_width;
  bool bicubic;
  void* out;  // [B, out_height, out_width, C] as the images
};

}  // namespace fastjem

#define FASTJEM_KERNEL "augment/crop_resize.h"
#include "each_isa.h"

namespace fastjem {

static void crop_resize(uintptr_t images, bool of_floats, uintptr_t indices, uintptr_t parameters, int64_t batch,
                        int64_t height, int64_t width, int64_t channels, int64_t out_height, int64_t out_width,
                        bool bicubic, uintptr_t out, int threads) {
  const CropResize problem{at<const void>(images),
                           of_floats,
                           at<const int64_t>(indices),
                           at<const float>(parameters),
                           height,
                           width,
                           channels,
                           out_height,
                           out_width,
                           bicubic,
                           at<void>(out)};
  parallel_for(batch, 1 + 4096 / (out_height * out_width), threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(crop_resize_views(problem, begin, end)); });
}

void bind_crop_resize(pybind11::module_& m) {
  m.def("crop_resize", &crop_resize, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
