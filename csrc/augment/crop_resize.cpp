#include "augment/columns.h"
#include "common.h"

namespace fastjem {

struct CropResize {
  const uint8_t* images;    // [N, H, W, 3]
  const int64_t* indices;   // [B], in [0, N)
  const float* parameters;  // [B, COLUMNS]
  int64_t height, width;
  int64_t out_height, out_width;
  bool bicubic;
  uint8_t* out;  // [B, out_height, out_width, 3]
};

}  // namespace fastjem

#define FASTJEM_KERNEL "augment/crop_resize.h"
#include "each_isa.h"

namespace fastjem {

static void crop_resize(uintptr_t images, uintptr_t indices, uintptr_t parameters, int64_t batch, int64_t height,
                        int64_t width, int64_t out_height, int64_t out_width, bool bicubic, uintptr_t out,
                        int threads) {
  const CropResize problem{at<const uint8_t>(images),
                           at<const int64_t>(indices),
                           at<const float>(parameters),
                           height,
                           width,
                           out_height,
                           out_width,
                           bicubic,
                           at<uint8_t>(out)};
  parallel_for(batch, 1 + 4096 / (out_height * out_width), threads,
               [&](int64_t begin, int64_t end) { FASTJEM_BEST(crop_resize_views(problem, begin, end)); });
}

void bind_crop_resize(pybind11::module_& m) {
  m.def("crop_resize", &crop_resize, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastjem
