// Masks of rectangles, an image at a time: kernels/masks/reference.py says what they are. Nothing here is a loop that
// another instruction set would do faster: a row of patches is a few words of 64 bits.
#include "common.h"

namespace fastjem {

// Of a grid of patches, one bit each; a row begins a word.
class Patches {
 public:
  Patches(int64_t height, int64_t width)
      : height_(height), width_(width), words_((width + 63) / 64), bits_(height * words_) {}

  void clear() { std::fill(bits_.begin(), bits_.end(), 0); }

  // How many of a rectangle's patches aren't there yet; what is beyond the grid isn't counted.
  int64_t new_ones(int64_t top, int64_t left, int64_t tall, int64_t broad) const {
    int64_t count = 0;
    each_word(top, left, tall, broad,
              [&](int64_t at, uint64_t block) { count += __builtin_popcountll(block & ~bits_[at]); });
    return count;
  }

  void add(int64_t top, int64_t left, int64_t tall, int64_t broad) {
    each_word(top, left, tall, broad, [&](int64_t at, uint64_t block) { bits_[at] |= block; });
  }

  void remove(const Patches& others) {
    for (size_t at = 0; at < bits_.size(); ++at) bits_[at] &= ~others.bits_[at];
  }

  int64_t count() const {
    int64_t count = 0;
    for (const uint64_t word : bits_) count += __builtin_popcountll(word);
    return count;
  }

  // out [height, width]: true where a bit is `as`.
  void write(bool* out, bool as = true) const {
    for (int64_t row = 0; row < height_; ++row) {
      for (int64_t column = 0; column < width_; ++column) {
        out[row * width_ + column] = (bits_[row * words_ + column / 64] >> column % 64 & 1) == as;
      }
    }
  }

 private:
  static uint64_t ones(int64_t count) {
    return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << std::max<int64_t>(count, 0)) - 1;
  }

  template <class F>
  void each_word(int64_t top, int64_t left, int64_t tall, int64_t broad, F&& f) const {
    const int64_t bottom = std::min(top + tall, height_);
    const int64_t right = std::min(left + broad, width_);
    top = std::max<int64_t>(top, 0);
    left = std::max<int64_t>(left, 0);
    if (right <= left) return;
    for (int64_t word = left / 64; word <= (right - 1) / 64; ++word) {
      const uint64_t block = ones(right - 64 * word) & ~ones(left - 64 * word);
      for (int64_t row = top; row < bottom; ++row) f(row * words_ + word, block);
    }
  }

  int64_t height_, width_, words_;
  std::vector<uint64_t> bits_;
};

// A number from 0 to `most`, whatever came: NaN and what is below are 0.
static int64_t within(double x, int64_t most) {
  return static_cast<int64_t>(std::fmin(std::fmax(x, 0), static_cast<double>(most)));
}

static void block_masks(uintptr_t drawn, uintptr_t wanted, int64_t images, int64_t tries, int64_t height, int64_t width,
                        double share_of_images, double low, double high, double least, double most, double log_aspect,
                        int64_t attempts, uintptr_t out, int threads) {
  const int64_t patches = height * width;
  parallel_for(images, 64, threads, [&](int64_t begin, int64_t end) {
    Patches mask(height, width);
    for (int64_t image = begin; image < end; ++image) {
      const double* numbers = at<const double>(drawn) + image * (2 + 4 * tries);
      double left_over;  // patches that are still wanted
      if (wanted) {
        left_over = at<const double>(wanted)[image];
      } else {
        const double span = numbers[1] * (high - low);  // rounded by itself, as in torch
        left_over = numbers[0] < share_of_images ? std::floor((low + span) * static_cast<double>(patches)) : 0;
      }
      mask.clear();
      int64_t failed = 0;
      for (int64_t i = 0; i < tries && left_over > 0 && failed < attempts; ++i) {
        const double* drawn_now = numbers + 2 + 4 * i;
        const double room = std::fmin(left_over, most);
        const double area = least + drawn_now[0] * (room - least);
        const double ratio = std::exp((2 * drawn_now[1] - 1) * log_aspect);
        const double h = std::nearbyint(std::sqrt(std::fmax(area * ratio, 0)));
        const double w = std::nearbyint(std::sqrt(std::fmax(area / ratio, 0)));
        ++failed;
        if (!(h < height && w < width)) continue;
        const int64_t tall = within(h, height);
        const int64_t broad = within(w, width);
        const int64_t top = within(std::floor(drawn_now[2] * (height - h + 1)), height);
        const int64_t left = within(std::floor(drawn_now[3] * (width - w + 1)), width);
        const int64_t found = mask.new_ones(top, left, tall, broad);
        if (found == 0 || static_cast<double>(found) > room) continue;
        mask.add(top, left, tall, broad);
        left_over -= static_cast<double>(found);
        failed = 0;
      }
      mask.write(at<bool>(out) + image * patches);
    }
  });
}

static void even_block_scores(uintptr_t drawn, int64_t images, int64_t rectangles, int64_t height, int64_t width,
                              uintptr_t out, int threads) {
  const int64_t patches = height * width;
  parallel_for(images, 16, threads, [&](int64_t begin, int64_t end) {
    std::vector<double> first(patches);  // 2 ** the number of the first rectangle over a patch
    for (int64_t image = begin; image < end; ++image) {
      const double* numbers = at<const double>(drawn) + image * (4 * rectangles + patches);
      std::fill(first.begin(), first.end(), std::ldexp(1.0, static_cast<int>(rectangles)));
      for (int64_t i = rectangles - 1; i >= 0; --i) {  // the first ones last, over the others
        const double area = static_cast<double>(patches) * (0.08 + 0.32 * numbers[i]);
        const double aspect = std::pow(1 / 0.3, 2 * numbers[rectangles + i] - 1);
        const double h = std::nearbyint(std::sqrt(area * aspect));
        const double w = std::nearbyint(std::sqrt(area / aspect));
        const int64_t tall = std::max<int64_t>(within(h, height), 1);
        const int64_t broad = std::max<int64_t>(within(w, width), 1);
        const int64_t top = within(std::floor(numbers[2 * rectangles + i] * static_cast<double>(height)), height - 1);
        const int64_t left = within(std::floor(numbers[3 * rectangles + i] * static_cast<double>(width)), width - 1);
        const double turn = std::ldexp(1.0, static_cast<int>(i));
        for (int64_t y = 0; y < tall; ++y) {
          double* row = first.data() + (top + y) % height * width;
          for (int64_t x = left; x < std::min(left + broad, width); ++x) row[x] = turn;
          for (int64_t x = 0; x < left + broad - width; ++x) row[x] = turn;
        }
      }
      double* scores = at<double>(out) + image * patches;
      for (int64_t i = 0; i < patches; ++i) scores[i] = -first[i] * (1 + numbers[4 * rectangles + i]);
    }
  });
}

static void inverse_rectangle_masks(uintptr_t drawn, int64_t images, int64_t height, int64_t width, int64_t seen,
                                    double low, double high, uintptr_t out, int threads) {
  parallel_for(images, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const double* numbers = at<const double>(drawn) + image * 3;
      const double ratio = std::exp(low + (high - low) * numbers[0]);
      const double patches = static_cast<double>(seen);
      const double h = std::ceil(std::sqrt(patches * ratio) - 1e-4);
      const int64_t tall = std::max<int64_t>(within(h, height), 1);
      const double w = std::ceil(patches / static_cast<double>(tall) - 1e-4);
      const int64_t broad = std::max<int64_t>(within(w, width), 1);
      const int64_t top = within(std::floor(numbers[1] * static_cast<double>(height)), height - 1);
      const int64_t left = within(std::floor(numbers[2] * static_cast<double>(width)), width - 1);
      bool* hidden = at<bool>(out) + image * height * width;
      for (int64_t row = 0; row < height; ++row) {
        const int64_t below = (row - top + height) % height;
        for (int64_t column = 0; column < width; ++column) {
          const int64_t beside = (column - left + width) % width;
          hidden[row * width + column] = !(beside < broad && below * broad + beside < seen);
        }
      }
    }
  });
}

// Sides are a rectangle's height and width; numbers are its top and left.
static int64_t corner(double number, int64_t size, int64_t side) {
  const int64_t room = size - side;
  return within(std::floor(number * static_cast<double>(room)), room - 1);
}

static void multi_block_masks(uintptr_t drawn, int64_t images, int64_t places, int64_t height, int64_t width,
                              int64_t target_height, int64_t target_width, int64_t context_height,
                              int64_t context_width, int64_t targets, int64_t keep, uintptr_t out, uintptr_t indices,
                              int threads) {
  const int64_t inside = target_height * target_width;
  parallel_for(images, 16, threads, [&](int64_t begin, int64_t end) {
    Patches context(height, width);
    Patches taken(height, width);
    for (int64_t image = begin; image < end; ++image) {
      const double* numbers = at<const double>(drawn) + image * 2 * (targets + (targets + 1) * places);
      int64_t* index = at<int64_t>(indices) + image * targets * inside;
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t top = corner(numbers[2 * t], height, target_height);
        const int64_t left = corner(numbers[2 * t + 1], width, target_width);
        for (int64_t i = 0; i < inside; ++i) {
          *index++ = (top + i / target_width) * width + left + i % target_width;
        }
      }
      bool found = false;
      for (int64_t allowed = 0; allowed <= targets && !found; ++allowed) {
        taken.clear();
        for (int64_t t = 0; t < targets - allowed; ++t) {
          taken.add(corner(numbers[2 * t], height, target_height), corner(numbers[2 * t + 1], width, target_width),
                    target_height, target_width);
        }
        for (int64_t place = 0; place < places && !found; ++place) {
          const double* at_place = numbers + 2 * (targets + allowed * places + place);
          context.clear();
          context.add(corner(at_place[0], height, context_height), corner(at_place[1], width, context_width),
                      context_height, context_width);
          context.remove(taken);
          found = context.count() > keep;
        }
        if (!found && allowed == targets) {  // the first place, as good as any
          const double* at_place = numbers + 2 * (targets + allowed * places);
          context.clear();
          context.add(corner(at_place[0], height, context_height), corner(at_place[1], width, context_width),
                      context_height, context_width);
        }
      }
      context.write(at<bool>(out) + image * height * width, false);
    }
  });
}

void bind_rectangles(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> release;
  m.def("block_masks", &block_masks, release);
  m.def("even_block_scores", &even_block_scores, release);
  m.def("inverse_rectangle_masks", &inverse_rectangle_masks, release);
  m.def("multi_block_masks", &multi_block_masks, release);
}

}  // namespace fastjem
