// Laying weights out for the products: panels of 32 outputs, lane by lane. Called at load, from several threads at once.
#include <cstdint>
#include <cstring>

#include "abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using headrace::Segment;

int64_t padded(int64_t k) { return (k + 31) / 32 * 32; }

// The panel of row `row`, and the group of codes `g` in it.
uint8_t* group_at(const Segment& segment, int64_t row, int64_t g) {
  const int64_t bytes = headrace::unit_bytes(segment);
  return (uint8_t*)segment.data + row / 32 * bytes + g * (bytes / (segment.k / 32));
}

// 32 codes of one output. Nibbles: bytes 4 i .. 4 i + 3 of a lane hold k 8 i .. 8 i + 3 (low) and 8 i + 4 .. 8 i + 7 (high).
void put_codes(const Segment& segment, int64_t row, uint8_t* group, const uint8_t* codes) {
  const int64_t block = row % 32 / 16, lane = row % 16;
  if (segment.format == headrace::FORMAT_Q4) {
    uint8_t* out = group + block * 256 + lane * 4;
    for (int i = 0; i < 4; i++) {
      for (int j = 0; j < 4; j++) out[i * 64 + j] = (uint8_t)(codes[8 * i + j] | codes[8 * i + 4 + j] << 4);
    }
  } else {
    uint8_t* out = group + block * 512 + lane * 4;
    for (int i = 0; i < 8; i++) memcpy(out + i * 64, codes + 4 * i, 4);
  }
}

// One scale (`which` 0) or minimum (1) of one output.
void put_scale(const Segment& segment, int64_t row, uint8_t* group, int part, int which, const void* value) {
  const int64_t item = segment.half_scales ? 2 : 4, parts = 32 / segment.group, block = row % 32 / 16, lane = row % 16;
  uint8_t* scales = group + (segment.format == headrace::FORMAT_Q4 ? 512 : 1024) + which * 2 * parts * 16 * item;
  memcpy(scales + ((block * parts + part) * 16 + lane) * item, value, (size_t)item);
}

void split_block(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 16; i++) {
    codes[i] = packed[i] & 15;
    codes[16 + i] = packed[i] >> 4;
  }
}

}  // namespace

EXPORT int64_t hr_unit_bytes(const Segment* segment) { return headrace::unit_bytes(*segment); }

// Numbers [n, k] as float or raw bfloat16, by the segment's format.
EXPORT void hr_pack_dense(const Segment* segment, const void* in, int64_t k) {
  const int64_t kp = padded(k);
  for (int64_t row = 0; row < segment->n; row++) {
    const int64_t block = row % 32 / 16, lane = row % 16;
    if (segment->format == headrace::FORMAT_F32) {
      float* out = (float*)segment->data + row / 32 * kp * 32 + block * 16 + lane;
      for (int64_t i = 0; i < k; i++) out[32 * i] = ((const float*)in)[row * k + i];
    } else {
      uint16_t* out = (uint16_t*)segment->data + row / 32 * kp * 32 + block * 32 + lane * 2;
      for (int64_t i = 0; i < k; i++) out[i / 2 * 64 + i % 2] = ((const uint16_t*)in)[row * k + i];
    }
  }
}

// Codes [n, k], k a multiple of 32, with scales and minimums [n, num_scales] in the segment's type; each serves k / num_scales codes.
// They are kept with `shift` added, as is the segment's zero.
EXPORT void hr_pack_codes(const Segment* segment, const uint8_t* codes, const uint8_t* scales, const uint8_t* minimums,
                          int64_t num_scales, int32_t shift) {
  uint8_t shifted[32];
  const int64_t k = segment->k, item = segment->half_scales ? 2 : 4, span = k / num_scales, parts = 32 / segment->group;
  for (int64_t row = 0; row < segment->n; row++) {
    for (int64_t g = 0; g < k / 32; g++) {
      uint8_t* group = group_at(*segment, row, g);
      for (int i = 0; i < 32; i++) shifted[i] = (uint8_t)(codes[row * k + 32 * g + i] + shift);
      put_codes(*segment, row, group, shifted);
      for (int64_t part = 0; part < parts; part++) {
        const int64_t at = (row * num_scales + (32 * g + part * segment->group) / span) * item;
        put_scale(*segment, row, group, (int)part, 0, scales + at);
        if (minimums) put_scale(*segment, row, group, (int)part, 1, minimums + at);
      }
    }
  }
}

// GGUF blocks of 32 values: float16 scale, float16 minimum where the segment has them, then nibbles (the low ones are the first 16) or
// signed bytes, which are kept with 128 added. Source: block layouts of ggml (ggml-common.h).
EXPORT void hr_pack_blocks(const Segment* segment, const uint8_t* in) {
  uint8_t codes[32];
  for (int64_t row = 0; row < segment->n; row++) {
    for (int64_t g = 0; g < segment->k / 32; g++) {
      uint8_t* group = group_at(*segment, row, g);
      for (int which = 0; which < 1 + segment->has_minimums; which++, in += 2) put_scale(*segment, row, group, 0, which, in);
      if (segment->format == headrace::FORMAT_Q4) {
        split_block(in, codes);
        in += 16;
      } else {
        for (int i = 0; i < 32; i++) codes[i] = in[i] ^ 0x80;
        in += 32;
      }
      put_codes(*segment, row, group, codes);
    }
  }
}
