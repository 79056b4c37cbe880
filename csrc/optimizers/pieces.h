// The tensors of an optimiser laid end to end and cut into blocks of one size, which threads share evenly. A block is
// one or more pieces, each of one tensor. Where blocks end doesn't depend on the number of threads, and what is summed
// over pieces is added in their order: the bits are the same for any number of threads.
#pragma once

#include "common.h"

namespace fastjem {

struct Piece {
  size_t tensor;
  int64_t begin, end;
};

class Pieces {
  static constexpr int64_t elements_per_block = 16384;
  static constexpr int64_t blocks_per_thread = 2;  // at the least: fewer aren't worth a thread
  std::vector<Piece> pieces;
  std::vector<size_t> ends;  // of each block, among the pieces
  int64_t room = 0;          // elements that the last block still has room for

 public:
  void add(size_t tensor, int64_t size) {
    for (int64_t begin = 0; begin < size;) {
      if (room == 0) {
        ends.push_back(pieces.size());
        room = elements_per_block;
      }
      const int64_t end = std::min(size, begin + room);
      pieces.push_back({tensor, begin, end});
      ends.back() = pieces.size();
      room -= end - begin;
      begin = end;
    }
  }

  // What is added next begins a block.
  void end_block() { room = 0; }

  size_t size() const { return pieces.size(); }
  const Piece& operator[](size_t i) const { return pieces[i]; }

  // Calls f(piece's number, piece) for all of them, by at most so many threads.
  template <class F>
  void each(int threads, F&& f) const {
    parallel_for(static_cast<int64_t>(ends.size()), blocks_per_thread, threads, [&](int64_t begin, int64_t end) {
      if (begin == end) return;
      for (size_t i = begin ? ends[begin - 1] : 0; i < ends[end - 1]; ++i) f(i, pieces[i]);
    });
  }
};

}  // namespace fastjem
