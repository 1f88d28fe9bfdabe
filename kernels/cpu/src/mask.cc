// Tokens that a mask allows. Few rows of a step want this, and it is a pass over memory: one build does for all instruction sets.
#include <cmath>
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t LANES = 8;

float largest_of_32(const float* x) {
  float lanes[LANES];
  for (int64_t i = 0; i < LANES; i++) lanes[i] = x[i];
  for (int64_t first = LANES; first < 32; first += LANES) {
    for (int64_t i = 0; i < LANES; i++) lanes[i] = x[first + i] > lanes[i] ? x[first + i] : lanes[i];
  }
  float largest = lanes[0];
  for (int64_t i = 1; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

float largest_of(const float* x, uint32_t bits) {
  if (bits == ~0u) return largest_of_32(x);
  float largest = -INFINITY;
  for (; bits; bits &= bits - 1) {
    const float value = x[__builtin_ctz(bits)];
    largest = value > largest ? value : largest;
  }
  return largest;
}

}  // namespace

// The likeliest of the tokens whose bit is set, the first of equals; -1 where there is none. Bit t % 32 of word t / 32 is token t's.
EXPORT int64_t hr_likeliest_allowed(const float* logits, const uint32_t* mask, int64_t vocab_size) {
  int64_t likeliest = -1;
  float largest = -INFINITY;
  for (int64_t first = 0; first < vocab_size; first += 32) {
    uint32_t bits = mask[first / 32];
    if (vocab_size - first < 32) bits &= (1u << (vocab_size - first)) - 1;
    if (!bits) continue;
    const float here = largest_of(logits + first, bits);
    if (likeliest >= 0 && !(here > largest)) continue;
    // Where no number is the largest, since all are NaN, the last one is as good as any.
    while (logits[first + __builtin_ctz(bits)] != here && (bits & (bits - 1))) bits &= bits - 1;
    likeliest = first + __builtin_ctz(bits);
    largest = here;
  }
  return likeliest;
}
