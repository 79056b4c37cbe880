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

// For a kernel of few numbers, which is called with the tensors themselves: whether x is plain, of so many dimensions,
// and contiguous.
bool look_at_dense(pybind11::handle x, int dims, Plain& plain);

// The tensors that `facts` (tensors.cpp) was told of, which lives longer than they do.
std::vector<Plain> tensors_of(const char* facts, size_t bytes);

}  // namespace fastjem
