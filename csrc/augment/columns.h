// The columns of the table of augmentation parameters, of which a row is one view of one image [COLUMNS] float.
// kernels/augment/columns.py says what they mean; a test holds that the two agree.
#pragma once

#define FASTJEM_AUGMENT_COLUMNS(column)                                                                  \
  column(TOP) column(LEFT) column(HEIGHT) column(WIDTH) column(FLIP) column(BRIGHTNESS) column(CONTRAST) \
      column(SATURATION) column(HUE) column(ORDER) column(GRAYSCALE) column(SIGMA) column(SOLARIZE) column(COLUMNS)

namespace fastjem {

enum Column : int {
#define FASTJEM_ENUMERATOR(name) name,
  FASTJEM_AUGMENT_COLUMNS(FASTJEM_ENUMERATOR)
#undef FASTJEM_ENUMERATOR
};

}  // namespace fastjem
