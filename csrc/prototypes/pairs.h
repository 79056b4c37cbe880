// Which views of the teacher a student's view learns from: those of other crops, that of the same crop, or all.
#pragma once

namespace fastjem {

enum class Pairs : int { different = 0, same = 1, all = 2 };  // kernels/prototypes: PAIRS

}  // namespace fastjem
