// Drawing tokens: the C interface, random numbers, and the memory that a draw works in.
#include <cstdint>

#include "abi.h"

using namespace headrace;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// A number in [0, 1) that depends on seed and position alone: Philox4x32 with ten rounds, as in services/worker/philox.py.
double uniform_of(uint64_t seed, int64_t position) {
  uint32_t c0 = (uint32_t)position, c1 = (uint32_t)((uint64_t)position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t first = (uint64_t)c0 * 0xD2511F53u, second = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(second >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)second;
    c2 = (uint32_t)(first >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)first;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  // 52 bits, so that scaling never rounds one up to the whole.
  return (double)(((uint64_t)c1 << 32 | c0) >> 12) * 0x1p-52;
}

int64_t num_blocks(int64_t vocab_size) { return (vocab_size + DRAW_BLOCK - 1) / DRAW_BLOCK; }

// Room for one vector past the end.
int64_t num_values(int64_t vocab_size) { return (vocab_size + 15) / 16 * 16 + 16; }

}  // namespace

// Bytes that a draw works in, for rows of a vocabulary; whoever draws keeps them, at a multiple of 64.
EXPORT int64_t hr_draw_scratch_bytes(int64_t vocab_size) {
  return 4 * (16 * num_blocks(vocab_size) + 2 * num_values(vocab_size)) + 8 * (DRAW_BINS + num_blocks(vocab_size));
}

// Draws a token for each of `indices` among the rows, into `tokens`.
EXPORT void hr_draw(int32_t isa, const DrawRows* rows, void* memory) {
  const Kernels* kernels = kernels_for(isa);
  DrawScratch scratch;
  scratch.maximums = (float*)memory;
  scratch.values = scratch.maximums + 16 * num_blocks(rows->vocab_size);
  scratch.masses = scratch.values + num_values(rows->vocab_size);
  scratch.bins = (double*)(scratch.masses + num_values(rows->vocab_size));
  scratch.totals = scratch.bins + DRAW_BINS;
  for (int64_t i = 0; i < rows->num_drawn; i++) {
    const int64_t row = rows->indices[i];
    const double uniform = uniform_of(rows->seeds[row], rows->positions[row]);
    const DrawParameters parameters = {rows->temperature[row], rows->top_k[row], rows->top_p[row], rows->min_p[row], uniform};
    rows->tokens[i] = kernels->draw(rows->logits + row * rows->stride, rows->vocab_size, parameters, scratch);
  }
}
