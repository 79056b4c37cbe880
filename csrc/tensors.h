// Tensors seen from C++ without a torch header: through DLPack's exchange table, a C interface that torch.Tensor has
// from torch 2.10 on. A look at a tensor takes 0.2 us, in Python 1.5 us.
#pragma once

#include "common.h"

namespace fastjem {

// A plain tensor: torch.Tensor or Parameter itself, in the host's memory, which is there and as large as shape and
// strides ask.
struct Plain {
  char* data;
  int dims;
  const int64_t *shape, *strides;  // the tensor's own
  int64_t elements;
  int dtype;         // as in enum Dtype; `int64` for int64; -1 for others
  int64_t itemsize;  // bytes
  const char* storage_end;

  static constexpr int int64 = 4;

  bool is_floating() const { return dtype >= 0 && dtype <= 3; }
  bool is_contiguous() const;
  bool has_shape_of(const Plain& other) const;
  // Whether the same index into each one's memory is the same element of each: one block, in one order.
  bool has_layout_of(const Plain& other) const;
};

// Whether x is a plain tensor, which it then is told of. False, and no Python error, for anything else.
bool look_at(pybind11::handle x, Plain& plain);

// Dense tensors of `dims` dimensions and one dtype, as an operator takes them; `good` tells whether that is so.
class Given {
 public:
  bool good = true;

  // dims: how many x must have; 0: any but none.
  Plain operator()(pybind11::handle x, int dims) {
    Plain plain{};
    good = good && look_at(x, plain) && (dims ? plain.dims == dims : plain.dims > 0) && plain.is_contiguous();
    good = good && plain.elements && plain.is_floating();
    good = good && (first_ < 0 || plain.dtype == first_);
    first_ = plain.dtype;
    return plain;
  }

  // int64, one for each row.
  const int64_t* labels(pybind11::handle x, int64_t rows) {
    Plain plain{};
    good = good && look_at(x, plain) && plain.dtype == Plain::int64 && plain.dims == 1 && plain.shape[0] == rows &&
           plain.is_contiguous();
    return reinterpret_cast<const int64_t*>(plain.data);
  }

  // Memory for a gradient of x: its shape and dtype, or None.
  void* gradient_of(const Plain& x, pybind11::handle gradient) {
    if (gradient.is_none() || !good) return nullptr;
    Plain plain{};
    good = look_at(gradient, plain) && plain.has_shape_of(x) && plain.is_contiguous() && plain.dtype == x.dtype;
    return plain.data;
  }

 private:
  int first_ = -1;
};

inline uintptr_t address(const void* memory) { return reinterpret_cast<uintptr_t>(memory); }

// The tensors that `facts` (tensors.cpp) was told of, which lives longer than they do.
std::vector<Plain> tensors_of(const char* facts, size_t bytes);

}  // namespace fastjem
