// Philox4x32-10: kernels/masks/philox.py. A sample's blocks follow one another, so that the compiler vectorises over
// them.

constexpr int64_t AT_ONCE = 64;  // blocks

// Four numbers of each of some blocks of one sample and view.
FASTJEM_INLINE void philox_blocks(const KeyedUniform& of, uint32_t sample, uint32_t view, int64_t first_block,
                                  int64_t blocks, uint32_t (&words)[4][AT_ONCE]) {
  for (int64_t i = 0; i < blocks; ++i) {
    words[0][i] = sample;
    words[1][i] = of.epoch;
    words[2][i] = view;
    words[3][i] = static_cast<uint32_t>(of.first + first_block + i);
  }
  uint32_t low = static_cast<uint32_t>(of.seed);
  uint32_t high = static_cast<uint32_t>(of.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int64_t i = 0; i < blocks; ++i) {
      const uint64_t product0 = uint64_t{words[0][i]} * 0xD2511F53u;
      const uint64_t product1 = uint64_t{words[2][i]} * 0xCD9E8D57u;
      words[0][i] = static_cast<uint32_t>(product1 >> 32) ^ words[1][i] ^ low;
      words[1][i] = static_cast<uint32_t>(product1);
      words[2][i] = static_cast<uint32_t>(product0 >> 32) ^ words[3][i] ^ high;
      words[3][i] = static_cast<uint32_t>(product0);
    }
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
}

// Rows [begin, end) of the views' samples.
FASTJEM_NOINLINE void keyed_uniform_rows(const KeyedUniform& of, int64_t begin, int64_t end) {
  uint32_t words[4][AT_ONCE];
  const int64_t all_blocks = (of.count + 3) / 4;
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t sample = static_cast<uint32_t>(of.samples[row % of.images]);
    const uint32_t view = static_cast<uint32_t>(of.view + row / of.images);
    for (int64_t first = 0; first < all_blocks; first += AT_ONCE) {
      const int64_t blocks = all_blocks - first < AT_ONCE ? all_blocks - first : AT_ONCE;
      philox_blocks(of, sample, view, first, blocks, words);
      double* out = of.out + row * of.count + 4 * first;
      const int64_t numbers = of.count - 4 * first < 4 * blocks ? of.count - 4 * first : 4 * blocks;
      for (int64_t i = 0; i < numbers; ++i) out[i] = (words[i % 4][i / 4] + 0.5) * 0x1p-32;
    }
  }
}
