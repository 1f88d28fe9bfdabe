// Products with packed matrices: 32 outputs of some rows at a time. Whatever the number of rows, an output is made by the same
// operations in the same order, so a row's result does not depend on its neighbours.

namespace {

using namespace headrace;

// What becomes of a tile's sums: MR rows of 32 outputs.
struct Sink {
  const Rows& out;
  const LinearTarget& target;
  const Segment& segment;
  int64_t n;       // first output, within the segment
  int64_t begin;   // first row of the piece
  float* gates;    // [rows of the piece][32], for gated products
  bool is_gate;    // keep the sums in `gates`
  bool is_gated;   // they meet what is in `gates`
};

template <int MR>
INLINE void sink_tile(const vf (&sum)[MR][2], const Sink& sink, int64_t row) {
  const LinearTarget& target = sink.target;
  for (int b = 0; b < 2; b++) {
    const int64_t first = sink.n + 16 * b, column = sink.segment.out_offset + first;
    const int64_t count = sink.segment.n - first < 16 ? sink.segment.n - first : 16;
    if (count <= 0) return;
    for (int r = 0; r < MR; r++) {
      vf value = sum[r][b];
      if (count == 16) {
        if (target.bias) value = vadd(value, vload(target.bias + column));
        if (sink.is_gate) {
          vstore(sink.gates + (row + r - sink.begin) * 32 + 16 * b, value);
          continue;
        }
        float* y = f32_row(sink.out, row + r) + column;
        vstore(y, target.accumulate ? vfma(vset(target.scale), value, vload(y)) : value);
      } else {
        float lanes[16];
        vstore(lanes, value);
        float* y = f32_row(sink.out, row + r) + column;
        for (int64_t i = 0; i < count; i++) {
          const float x = lanes[i] + (target.bias ? target.bias[column + i] : 0.0f);
          y[i] = target.accumulate ? __builtin_fmaf(target.scale, x, y[i]) : x;
        }
      }
    }
  }
}

// The other half of a gated product: `activation(gate) * up`, and straight into the form that the next product wants.
template <int MR>
INLINE void sink_gated(const vf (&sum)[MR][2], const Sink& sink, int64_t row) {
  const int64_t column = sink.segment.out_offset + sink.n;
  for (int r = 0; r < MR; r++) {
    const float* gate = sink.gates + (row + r - sink.begin) * 32;
    vf up[2] = {sum[r][0], sum[r][1]};
    for (int b = 0; b < 2; b++) {
      if (sink.target.bias) up[b] = vadd(up[b], vload(sink.target.bias + column + 16 * b));
      up[b] = vmul(vactivate(vload(gate + 16 * b), sink.target.activation), up[b]);
    }
    pack_32(up[0], up[1], sink.out, row + r, sink.n / 32);
  }
}

template <bool HALF>
INLINE vf load_scales(const uint8_t* scales, int index) {
  return HALF ? vload_half((const uint16_t*)scales + 16 * index) : vload((const float*)scales + 16 * index);
}

// Weights are read once a step: fetched as such they leave keys, values and the other services' memory in the caches behind the first.
INLINE void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 0);
}

constexpr int32_t ONES = 0x01010101;

// How far ahead of a stream of weights memory is asked for.
constexpr int64_t AHEAD_BYTES = 8192;

// With weights d * (c - z) (+ m) and activations s * (a - y), a group of 32 gives d * s * (sum of (c - z) * a - y * sum of (c - z)), and
// m * s * sum of (a - y). The sum over codes is worked out here, or was when the panel was unpacked (UNPACKED).
//
// BITS 4: codes as nibbles; 8: as bytes. PARTS: scales in 32 codes, 1 or 2. `next` is asked for from memory meanwhile, where it is not null.
template <int BITS, bool UNPACKED, bool HALF, bool MINIMUMS, int PARTS, int MR>
INLINE void multiply_codes(const uint8_t* panel, const uint8_t* next, int64_t next_bytes, int64_t k, int32_t zero, const Rows& in,
                           int64_t row, vf (&sum)[MR][2]) {
  constexpr int64_t CODES = BITS == 4 ? 512 : 1024, SCALES = 2 * PARTS * 16 * (HALF ? 2 : 4);
  constexpr int64_t STRIDE = CODES + ((MINIMUMS ? 2 : 1) + (UNPACKED ? 1 : 0)) * SCALES;
  constexpr int QUADS = 8 / PARTS;
  const int64_t num_groups = k / 32;
  const int8_t* a[MR];
  for (int r = 0; r < MR; r++) {
    a[r] = in.q8 + (row + r) * in.stride;
    sum[r][0] = sum[r][1] = vset(0.0f);
  }
  for (int64_t g = 0; g < num_groups; g++, panel += STRIDE) {
    const float* scales_of = in.q8_scales + 4 * (g * in.capacity + row);
    const int32_t* sums_of = in.q8_sums + 2 * (g * in.capacity + row);
    if (next) prefetch(next + g * next_bytes, next_bytes);
    for (int part = 0; part < PARTS; part++) {
      vi acc[MR][2];
      for (int r = 0; r < MR; r++) {
        const int32_t total = PARTS == 1 ? sums_of[2 * r] + sums_of[2 * r + 1] : sums_of[2 * r + part];
        const int32_t start = zero == 0 ? 0 : -zero * total;
        acc[r][0] = acc[r][1] = viset(start);
      }
      vi code_sums[2];
      if (!UNPACKED) code_sums[0] = code_sums[1] = viset(-zero * 32 / PARTS);
      if (BITS == 4) {
        for (int pair = part * QUADS / 2; pair < (part + 1) * QUADS / 2; pair++) {
          vi low[2], high[2];
          for (int b = 0; b < 2; b++) {
            const vi bytes = viload(panel + 256 * b + 64 * pair);
            low[b] = vlow_nibbles(bytes);
            high[b] = vhigh_nibbles(bytes);
            code_sums[b] = vdot4<4>(vdot4<4>(code_sums[b], low[b], ONES), high[b], ONES);
          }
          for (int r = 0; r < MR; r++) {
            int32_t four[2];
            memcpy(four, a[r] + g * 32 + pair * 8, 8);
            for (int b = 0; b < 2; b++) acc[r][b] = vdot4<4>(vdot4<4>(acc[r][b], low[b], four[0]), high[b], four[1]);
          }
        }
      } else {
#pragma GCC unroll 8
        for (int quad = part * QUADS; quad < (part + 1) * QUADS; quad++) {
          const vi codes[2] = {viload(panel + 64 * quad), viload(panel + 512 + 64 * quad)};
          if (!UNPACKED) {
            for (int b = 0; b < 2; b++) code_sums[b] = vdot4<BITS>(code_sums[b], codes[b], ONES);
          }
          for (int r = 0; r < MR; r++) {
            int32_t four;
            memcpy(&four, a[r] + g * 32 + quad * 4, 4);
            for (int b = 0; b < 2; b++) acc[r][b] = vdot4<BITS>(acc[r][b], codes[b], four);
          }
        }
      }
      for (int b = 0; b < 2; b++) {
        const vf scales = load_scales<HALF>(panel + CODES, b * PARTS + part);
        const vf minimums = MINIMUMS ? load_scales<HALF>(panel + CODES + SCALES, b * PARTS + part) : vset(0.0f);
        const vf totals = UNPACKED ? load_scales<HALF>(panel + CODES + (MINIMUMS ? 2 : 1) * SCALES, b * PARTS + part) : vcvt(code_sums[b]);
        for (int r = 0; r < MR; r++) {
          const vf products = vfma(totals, vset(scales_of[4 * r + 2]), vcvt(acc[r][b]));
          sum[r][b] = vfma(products, vmul(scales, vset(scales_of[4 * r])), sum[r][b]);
          if (MINIMUMS) {
            const float half = (float)sums_of[2 * r + part] + 16.0f * scales_of[4 * r + 2];
            const float total = PARTS == 1 ? scales_of[4 * r + 1] : scales_of[4 * r] * half;
            sum[r][b] = vfma(minimums, vset(total), sum[r][b]);
          }
        }
      }
    }
  }
}

template <int MR>
INLINE void multiply_bf16(const uint8_t* panel, int64_t k, const Rows& in, int64_t row, vf (&sum)[MR][2]) {
  const uint16_t* a[MR];
  for (int r = 0; r < MR; r++) {
    a[r] = in.bf16 + (row + r) * in.stride;
    sum[r][0] = sum[r][1] = vset(0.0f);
  }
  for (int64_t pair = 0; pair < k / 2; pair++, panel += 128) {
    if (MR <= 4) prefetch(panel + AHEAD_BYTES, 128);
    const vi weights[2] = {viload(panel), viload(panel + 64)};
    for (int r = 0; r < MR; r++) {
      uint32_t two;
      memcpy(&two, a[r] + 2 * pair, 4);
      for (int b = 0; b < 2; b++) sum[r][b] = vdot2(sum[r][b], weights[b], two);
    }
  }
}

template <int MR>
INLINE void multiply_f32(const uint8_t* panel, int64_t k, const Rows& in, int64_t row, vf (&sum)[MR][2]) {
  const float* a[MR];
  for (int r = 0; r < MR; r++) {
    a[r] = f32_row(in, row + r);
    sum[r][0] = sum[r][1] = vset(0.0f);
  }
  for (int64_t i = 0; i < k; i++, panel += 128) {
    const vf weights[2] = {vload((const float*)panel), vload((const float*)panel + 16)};
    for (int r = 0; r < MR; r++) {
      for (int b = 0; b < 2; b++) sum[r][b] = vfma(weights[b], vset(a[r][i]), sum[r][b]);
    }
  }
}

enum Product { PRODUCT_F32, PRODUCT_BF16, PRODUCT_Q4, PRODUCT_Q8, PRODUCT_UNPACKED };

// The weights of 32 outputs, and those that follow them in memory.
struct Panel {
  const uint8_t* data;
  const uint8_t* next;
  int64_t next_bytes;  // of each group of 32
};

// Up to so many rows multiply codes as they are packed; for more a panel is unpacked first. Small tiles would read nibbles too often.
constexpr int64_t PACKED_ROWS_MAX = TILE_ROWS == 12 ? 16 : 4;

// Whole tiles of MR rows; gives the first row left.
template <Product PRODUCT, bool HALF, bool MINIMUMS, int PARTS, int MR>
INLINE int64_t whole_tiles(Panel& panel, const Segment& segment, const Rows& in, int64_t row, int64_t end, const Sink& sink) {
  // The sums of codes and of products of more than 8 rows do not fit into the registers together.
  constexpr bool HAS_CODES = PRODUCT == PRODUCT_Q4 || PRODUCT == PRODUCT_Q8 || PRODUCT == PRODUCT_UNPACKED;
  constexpr bool FITS = !HAS_CODES || MR <= 8;
  if constexpr (MR <= TILE_ROWS && FITS) {
    for (; end - row >= MR; row += MR) {
      vf sum[MR][2];
      if constexpr (PRODUCT == PRODUCT_F32) {
        multiply_f32<MR>(panel.data, segment.k, in, row, sum);
      } else if constexpr (PRODUCT == PRODUCT_BF16) {
        multiply_bf16<MR>(panel.data, segment.k, in, row, sum);
      } else {
        constexpr int BITS = PRODUCT == PRODUCT_Q4 ? 4 : 8;
        constexpr bool UNPACKED = PRODUCT == PRODUCT_UNPACKED;
        multiply_codes<BITS, UNPACKED, HALF, MINIMUMS, PARTS, MR>(panel.data, panel.next, panel.next_bytes, segment.k, segment.zero, in,
                                                                  row, sum);
        panel.next = nullptr;
      }
      if (sink.is_gated) {
        sink_gated<MR>(sum, sink, row);
      } else {
        sink_tile<MR>(sum, sink, row);
      }
    }
  }
  return row;
}

// Never inlined: what it does must not depend on where it is called.
template <Product PRODUCT, bool HALF, bool MINIMUMS, int PARTS>
__attribute__((noinline)) void tiles(Panel panel, const Segment& segment, const Rows& in, int64_t row, int64_t end, const Sink& sink) {
  row = whole_tiles<PRODUCT, HALF, MINIMUMS, PARTS, 12>(panel, segment, in, row, end, sink);
  row = whole_tiles<PRODUCT, HALF, MINIMUMS, PARTS, 8>(panel, segment, in, row, end, sink);
  row = whole_tiles<PRODUCT, HALF, MINIMUMS, PARTS, 4>(panel, segment, in, row, end, sink);
  row = whole_tiles<PRODUCT, HALF, MINIMUMS, PARTS, 2>(panel, segment, in, row, end, sink);
  whole_tiles<PRODUCT, HALF, MINIMUMS, PARTS, 1>(panel, segment, in, row, end, sink);
}

// Codes to bytes and scales to float, and sums of codes, once for all rows.
INLINE void unpack_panel(const Segment& segment, const uint8_t* data, uint8_t* out) {
  const int64_t parts = 32 / segment.group, num_scales = 2 * parts * (segment.has_minimums ? 2 : 1);
  for (int64_t g = 0; g < segment.k / 32; g++) {
    const uint8_t* codes = out;
    if (segment.format == FORMAT_Q4) {
      for (int i = 0; i < 8; i++, data += 64, out += 128) {
        const vi bytes = viload(data);
        vistore(out, vlow_nibbles(bytes));
        vistore(out + 64, vhigh_nibbles(bytes));
      }
    } else {
      for (int i = 0; i < 16; i++, data += 64, out += 64) vistore(out, viload(data));
    }
    for (int64_t i = 0; i < num_scales; i++, out += 64) {
      vstore((float*)out, segment.half_scales ? vload_half((const uint16_t*)data) : vload((const float*)data));
      data += segment.half_scales ? 32 : 64;
    }
    for (int64_t block = 0; block < 2; block++) {
      for (int64_t part = 0; part < parts; part++, out += 64) {
        vi sums = viset(-segment.zero * segment.group);
        for (int64_t quad = part * 8 / parts; quad < (part + 1) * 8 / parts; quad++) {
          sums = vdot4<8>(sums, viload(codes + 512 * block + 64 * quad), ONES);
        }
        vstore((float*)out, vcvt(sums));
      }
    }
  }
}

void unit_product(const Segment& segment, int64_t unit, const Rows& in, int64_t begin, int64_t end, const Sink& sink, uint8_t* scratch) {
  const int64_t bytes = unit_bytes(segment);
  const uint8_t* data = (const uint8_t*)segment.data + unit * bytes;
  const bool is_whole = segment.group == 32, is_few = end - begin <= PACKED_ROWS_MAX;
  const int64_t group_bytes = bytes / (segment.k / 32);
  Panel panel{data, data + AHEAD_BYTES, group_bytes};
#define TILES(PRODUCT, HALF, MINIMUMS, PARTS) return tiles<PRODUCT, HALF, MINIMUMS, PARTS>(panel, segment, in, begin, end, sink)
  if (segment.format == FORMAT_F32) TILES(PRODUCT_F32, false, false, 1);
  if (segment.format == FORMAT_BF16) TILES(PRODUCT_BF16, false, false, 1);
  if (segment.format == FORMAT_Q4 && is_few && is_whole) {
    if (segment.half_scales) {
      if (segment.has_minimums) TILES(PRODUCT_Q4, true, true, 1);
      TILES(PRODUCT_Q4, true, false, 1);
    }
    if (segment.has_minimums) TILES(PRODUCT_Q4, false, true, 1);
    TILES(PRODUCT_Q4, false, false, 1);
  }
  if (segment.format == FORMAT_Q8 && is_few && segment.half_scales && is_whole) {
    if (segment.has_minimums) TILES(PRODUCT_Q8, true, true, 1);
    TILES(PRODUCT_Q8, true, false, 1);
  }
  unpack_panel(segment, data, scratch);
  panel = {scratch, data + bytes, group_bytes};
  if (is_whole) {
    if (segment.has_minimums) TILES(PRODUCT_UNPACKED, false, true, 1);
    TILES(PRODUCT_UNPACKED, false, false, 1);
  }
  if (segment.has_minimums) TILES(PRODUCT_UNPACKED, false, true, 2);
  TILES(PRODUCT_UNPACKED, false, false, 2);
#undef TILES
}

void linear(const Segment& segment, int64_t unit, const Rows& in, const Rows& out, int64_t begin, int64_t end,
            const LinearTarget& target, uint8_t* scratch) {
  unit_product(segment, unit, in, begin, end, {out, target, segment, 32 * unit, begin, nullptr, false, false}, scratch);
}

void gated_linear(const Segment& gate, const Segment& up, int64_t unit, const Rows& in, const Rows& out, int64_t begin, int64_t end,
                  const LinearTarget& target, uint8_t* scratch, float* gates) {
  unit_product(gate, unit, in, begin, end, {out, target, gate, 32 * unit, begin, gates, true, false}, scratch);
  unit_product(up, unit, in, begin, end, {out, target, up, 32 * unit, begin, gates, false, true}, scratch);
}

}  // namespace
