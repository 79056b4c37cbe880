// Filters of resizing by the distance x >= 0 from the middle of an output pixel: Pillow's and torch's triangle and
// Keys' cubic (a = -0.5). In double they have Pillow's bits.

static inline double triangle(double x) { return x < 1 ? 1 - x : 0; }
static inline double cubic(double x) {
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}
