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

// The last outputs of a segment, where these are no whole panel.
template <int MR>
INLINE void sink_part(const vf (&sum)[MR][2], const Sink& sink, int64_t row) {
  const LinearTarget& target = sink.target;
  const int64_t column = sink.segment.out_offset + sink.n, count = sink.segment.n - sink.n;
  for (int r = 0; r < MR; r++) {
    float lanes[32];
    vstore(lanes, sum[r][0]);
    vstore(lanes + 16, sum[r][1]);
    float* y = f32_row(sink.out, row + r) + column;
    for (int64_t i = 0; i < count; i++) {
      const float x = lanes[i] + (target.bias ? target.bias[column + i] : 0.0f);
      y[i] = target.accumulate ? __builtin_fmaf(target.scale, x, y[i]) : x;
    }
  }
}

template <int MR>
INLINE void sink_tile(vf (&sum)[MR][2], const Sink& sink, int64_t row) {
  const LinearTarget& target = sink.target;
  const int64_t column = sink.segment.out_offset + sink.n;
  if (sink.segment.n - sink.n < 32) {
    sink_part<MR>(sum, sink, row);
    return;
  }
  if (target.bias) {
    for (int b = 0; b < 2; b++) {
      const vf bias = vload(target.bias + column + 16 * b);
#pragma GCC unroll 12
      for (int r = 0; r < MR; r++) sum[r][b] = vadd(sum[r][b], bias);
    }
  }
  // Sums stay in registers where loops over them have no end but MR.
  float* y = sink.is_gate ? sink.gates + (row - sink.begin) * 32 : f32_row(sink.out, row) + column;
  const int64_t stride = sink.is_gate ? 32 : sink.out.stride;
  if (target.accumulate) {
    const vf scale = vset(target.scale);
#pragma GCC unroll 12
    for (int r = 0; r < MR; r++) {
      for (int b = 0; b < 2; b++) sum[r][b] = vfma(scale, sum[r][b], vload(y + r * stride + 16 * b));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; r++) {
    for (int b = 0; b < 2; b++) vstore(y + r * stride + 16 * b, sum[r][b]);
  }
}

// The other half of a gated product: times the activated gate, in its place.
template <int MR>
INLINE void sink_gated(const vf (&sum)[MR][2], const Sink& sink, int64_t row) {
  const int64_t column = sink.segment.out_offset + sink.n;
  float* gates = sink.gates + (row - sink.begin) * 32;
#pragma GCC unroll 12
  for (int r = 0; r < MR; r++) {
    for (int b = 0; b < 2; b++) {
      float* gate = gates + 32 * r + 16 * b;
      const vf up = sink.target.bias ? vadd(sum[r][b], vload(sink.target.bias + column + 16 * b)) : sum[r][b];
      vstore(gate, vmul(vload(gate), up));
    }
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

// Codes as they are packed; with what else there is prepared (`prepare_panel`); and nibbles unpacked to bytes as well.
enum Product { PRODUCT_F32, PRODUCT_BF16, PRODUCT_Q4, PRODUCT_Q8, PRODUCT_PREPARED_Q4, PRODUCT_PREPARED_Q8, PRODUCT_UNPACKED_Q4 };

constexpr bool is_prepared(Product product) { return product >= PRODUCT_PREPARED_Q4; }

constexpr int bits_of(Product product) { return product == PRODUCT_Q8 || product == PRODUCT_PREPARED_Q8 ? 8 : 4; }

// So many rows multiply codes as they are packed; so many multiply nibbles; for more these are unpacked once.
constexpr int64_t PACKED_ROWS_MAX = TILE_ROWS == 12 ? 8 : 4, NIBBLE_ROWS_MAX = TILE_ROWS == 12 ? 16 : 4;

// The weights of 32 outputs, and those that follow them in memory.
struct Panel {
  const uint8_t* codes;
  int64_t code_stride;  // bytes of a group of 32
  const uint8_t* prepared;
  int64_t prepared_stride;
  const uint8_t* next;
  int64_t next_stride;
};

// The code from which others are counted: about the middle, so that what it stands for is small.
template <int BITS>
constexpr int32_t CENTRE = BITS == 4 ? 8 : 128;

// What a group's weights, d * (code - centre) + rest, are beside sums of activations (`CodedGroup::pair`).
struct GroupWeights {
  vf scales;   // d, but at least 2 ** -30 of the rest: beside more of it codes make no difference
  vi pairs;    // of bfloat16: rest / d, and the sum of (code - centre)
  vi remains;  // what that sum has beyond 8 bits, which sums of 4-bit codes have not
};

template <int BITS>
INLINE GroupWeights group_weights(vf scales, const vf* minimums, float offset, vi code_sums) {
  vf ratios = vset(offset);
  if (minimums) {
    const vf rests = vfma(scales, ratios, *minimums), least = vmul(rests, vset(9.31322575e-10f));
    scales = vselect(vat_least(vabs(least), vabs(scales)), least, scales);
    ratios = vdiv(rests, vselect(vat_least(vset(0.0f), vabs(scales)), vset(1.0f), scales));
  }
  const vf sums = vcvt(code_sums);
  if (BITS == 4) return {scales, vpair(ratios, sums), viset(0)};
  // Adding and taking away leaves a multiple of 32.
  const vf rounded = vsub(vadd(sums, vset(12582912.0f * 32)), vset(12582912.0f * 32));
  return {scales, vpair(ratios, rounded), vpair(vset(0.0f), vsub(sums, rounded))};
}

INLINE int32_t code_sum(const CodedGroup& group) { return (group.base - group.start) / 8; }

INLINE int32_t half_code_sum(const CodedGroup& group, int half) {
  return half ? code_sum(group) - group.first_sum : group.first_sum;
}

// Where the sum over unsigned codes begins, of a group or of half of one.
template <int BITS, int PARTS>
INLINE int32_t start_of(const CodedGroup& group, int part) {
  if (PARTS == 2) return group.base - CENTRE<BITS> * half_code_sum(group, part);
  return BITS == 4 ? group.start : group.base - CENTRE<BITS> / 8 * (group.base - group.start);
}

// A row's numbers beside the pairs of a group, or of half of one.
template <int PARTS>
INLINE uint32_t pair_of(const CodedGroup& group, int part) {
  if (PARTS == 1) return group.pair;
  const float unit = as_float((uint32_t)group.base) * (1.0f / 12582912.0f), middle = as_float(group.pair & 0xffff0000u);
  return to_bf16((float)half_code_sum(group, part) * unit + 16.0f * middle) | (group.pair & 0xffff0000u);
}

// With weights d * (c - 8 + w) and activations s * (a + y), a group of 32 gives d * s times: the sum of (c - 8) * a, and y * sum of (c - 8),
// both in whole numbers, and w * sum of (a + y). The first is added up by products of bytes, the others by one operation for two
// products of bfloat16. Of the scale s the power of 2 is where the first sum begins (`CodedGroup`), and d times its root is worked out for all
// roots when a panel is unpacked: so no operation but the last is spent on scales.
//
// HALF and MINIMUMS: of the packed panel. PARTS: scales in 32 codes, 1 or 2. What follows the panel is asked for from memory meanwhile.
template <Product PRODUCT, bool HALF, bool MINIMUMS, int PARTS, int MR>
INLINE void multiply_codes(const Panel& panel, const Segment& segment, const Rows& in, int64_t row, vf (&sum)[MR][2]) {
  constexpr int BITS = bits_of(PRODUCT), QUADS = 8 / PARTS;
  constexpr bool NIBBLES = PRODUCT == PRODUCT_Q4 || PRODUCT == PRODUCT_PREPARED_Q4, PREPARED = is_prepared(PRODUCT);
  constexpr int64_t CODES = NIBBLES ? 512 : 1024, SCALES = 2 * PARTS * 16 * (HALF ? 2 : 4);
  const int64_t num_groups = segment.k / 32;
  const float offset = (float)(CENTRE<BITS> - segment.zero);
  const int8_t* a[MR];
  for (int r = 0; r < MR; r++) {
    a[r] = in.q8 + (row + r) * in.stride;
    sum[r][0] = sum[r][1] = vset(0.0f);
  }
  const uint8_t *codes_of = panel.codes, *prepared = panel.prepared;
  for (int64_t g = 0; g < num_groups; g++, codes_of += panel.code_stride, prepared += panel.prepared_stride) {
    const CodedGroup* groups = in.groups + g * in.capacity + row;
    if (panel.next) prefetch(panel.next + g * panel.next_stride, panel.next_stride);
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part++) {
      vi acc[MR][2];
      for (int r = 0; r < MR; r++) {
        acc[r][0] = acc[r][1] = viset(start_of<BITS, PARTS>(groups[r], part));
      }
      vi code_sums[2];
      if (!PREPARED) code_sums[0] = code_sums[1] = viset(-CENTRE<BITS> * 32 / PARTS);
      if (NIBBLES) {
#pragma GCC unroll 4
        for (int pair = part * QUADS / 2; pair < (part + 1) * QUADS / 2; pair++) {
          vi low[2], high[2];
          for (int b = 0; b < 2; b++) {
            const vi bytes = viload(codes_of + 256 * b + 64 * pair);
            low[b] = vlow_nibbles(bytes);
            high[b] = vhigh_nibbles(bytes);
            if (!PREPARED) code_sums[b] = vdot4<4>(vdot4<4>(code_sums[b], low[b], ONES), high[b], ONES);
          }
          for (int r = 0; r < MR; r++) {
            // Copied one by one, so that they go from memory to all lanes at once.
            int32_t first, second;
            memcpy(&first, a[r] + g * 32 + pair * 8, 4);
            memcpy(&second, a[r] + g * 32 + pair * 8 + 4, 4);
            for (int b = 0; b < 2; b++) acc[r][b] = vdot4<4>(vdot4<4>(acc[r][b], low[b], first), high[b], second);
          }
        }
      } else {
#pragma GCC unroll 8
        for (int quad = part * QUADS; quad < (part + 1) * QUADS; quad++) {
          const vi codes[2] = {viload(codes_of + 64 * quad), viload(codes_of + 512 + 64 * quad)};
          if (!PREPARED) {
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
        const int at = b * PARTS + part;
        GroupWeights weights;
        if (PREPARED) {
          weights.pairs = viload(prepared + (8 * PARTS + at) * 64);
          if (BITS == 8) weights.remains = viload(prepared + (10 * PARTS + at) * 64);
        } else {
          const vf minimums = MINIMUMS ? load_scales<HALF>(codes_of + CODES + SCALES, at) : vset(0.0f);
          weights = group_weights<BITS>(load_scales<HALF>(codes_of + CODES, at), MINIMUMS ? &minimums : nullptr, offset, code_sums[b]);
        }
        for (int r = 0; r < MR; r++) {
          const uint32_t pair = pair_of<PARTS>(groups[r], part);
          vf products = vsub(vcast(acc[r][b]), vcast(viset(groups[r].base)));
          products = vdot2(products, weights.pairs, pair);
          if (BITS == 8) products = vdot2(products, weights.remains, pair);
          const vf scaled = PREPARED ? vload((const float*)(prepared + 64 * at + PARTS * groups[r].root_offset))
                                     : vmul(weights.scales, vset(ROOTS[groups[r].root_offset / 128]));
          sum[r][b] = vfma(products, scaled, sum[r][b]);
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

template <Product PRODUCT, bool HALF, bool MINIMUMS, int PARTS, int MR>
__attribute__((noinline)) void tile(Panel& panel, const Segment& segment, const Rows& in, int64_t row, const Sink& sink) {
  vf sum[MR][2];
  if constexpr (PRODUCT == PRODUCT_F32) {
    multiply_f32<MR>(panel.codes, segment.k, in, row, sum);
  } else if constexpr (PRODUCT == PRODUCT_BF16) {
    multiply_bf16<MR>(panel.codes, segment.k, in, row, sum);
  } else {
    multiply_codes<PRODUCT, HALF, MINIMUMS, PARTS, MR>(panel, segment, in, row, sum);
    panel.next = nullptr;
  }
  if (sink.is_gated) {
    sink_gated<MR>(sum, sink, row);
  } else {
    sink_tile<MR>(sum, sink, row);
  }
}

// Rows of a tile that the registers hold: those of products with codes have sums of two kinds.
constexpr int tile_rows(Product product) {
  if (TILE_ROWS < 12) return TILE_ROWS;
  return product == PRODUCT_F32 || product == PRODUCT_BF16 ? 12 : is_prepared(product) ? 6 : 8;
}

// As many rows as may be at a time, and about the same number each time. Never inlined: what it does must not depend on where it is called.
template <Product PRODUCT, bool HALF, bool MINIMUMS, int PARTS>
__attribute__((noinline)) void tiles(Panel panel, const Segment& segment, const Rows& in, int64_t row, int64_t end, const Sink& sink) {
  constexpr int MR = tile_rows(PRODUCT);
  for (int64_t left = (end - row + MR - 1) / MR; left > 0; left--) {
    const int64_t rows = (end - row + left - 1) / left, last = row + rows;
#define TILE(SIZE)                                                                  \
  if constexpr (SIZE <= MR) {                                                       \
    for (; last - row >= SIZE; row += SIZE) tile<PRODUCT, HALF, MINIMUMS, PARTS, SIZE>(panel, segment, in, row, sink); \
  }
    TILE(12)
    TILE(8)
    TILE(6)
    TILE(5)
    TILE(4)
    TILE(3)
    TILE(2)
    TILE(1)
#undef TILE
  }
}

// Scales times all roots, and pairs (`GroupWeights`), once for all rows; where they are UNPACKED, after the group's nibbles as bytes.
template <int BITS, bool UNPACKED>
INLINE void prepare_panel(const Segment& segment, const uint8_t* data, uint8_t* out) {
  const int64_t num_scales = 64 / segment.group, item = segment.half_scales ? 32 : 64;
  const float offset = (float)(CENTRE<BITS> - segment.zero);
  for (int64_t g = 0; g < segment.k / 32; g++) {
    // By block and half of the group.
    vi sums[2][2] = {{viset(0), viset(0)}, {viset(0), viset(0)}};
    for (int i = 0; i < BITS; i++) {
      // Nibbles: two quads at once.
      for (int b = 0; b < 2; b++) {
        vi quads[2];
        if (BITS == 4) {
          const vi bytes = viload(data + 256 * b + 64 * i);
          quads[0] = vlow_nibbles(bytes);
          quads[1] = vhigh_nibbles(bytes);
        } else {
          quads[0] = viload(data + 512 * b + 64 * i);
        }
        vi& sum = sums[b][i / (BITS / 2)];
        for (int j = 0; j < 8 / BITS; j++) {
          sum = vdot4<BITS>(sum, quads[j], ONES);
          if (UNPACKED) vistore(out + 512 * b + 64 * (2 * i + j), quads[j]);
        }
      }
    }
    data += 128 * BITS;
    if (UNPACKED) out += 1024;
    for (int64_t i = 0; i < num_scales; i++, data += item, out += 64) {
      const vf scales = segment.half_scales ? vload_half((const uint16_t*)data) : vload((const float*)data);
      const uint8_t* at = data + num_scales * item;
      vf minimums = vset(0.0f);
      if (segment.has_minimums) minimums = segment.half_scales ? vload_half((const uint16_t*)at) : vload((const float*)at);
      const vi codes = num_scales == 2 ? viadd(sums[i][0], sums[i][1]) : sums[i / 2][i % 2];
      const vi centred = viadd(codes, viset(-CENTRE<BITS> * segment.group));
      const GroupWeights weights = group_weights<BITS>(scales, segment.has_minimums ? &minimums : nullptr, offset, centred);
      for (int root = 0; root < 4; root++) vstore((float*)(out + root * 64 * num_scales), vmul(weights.scales, vset(ROOTS[root])));
      vistore(out + 4 * 64 * num_scales, weights.pairs);
      if (BITS == 8) vistore(out + 5 * 64 * num_scales, weights.remains);
    }
    out += (BITS == 4 ? 4 : 5) * 64 * num_scales;
    if (segment.has_minimums) data += num_scales * item;
  }
}

void unit_product(const Segment& segment, int64_t unit, const Rows& in, int64_t begin, int64_t end, const Sink& sink, uint8_t* scratch) {
  const int64_t bytes = unit_bytes(segment), stride = bytes / (segment.k / 32), num_scales = 64 / segment.group;
  const uint8_t* data = (const uint8_t*)segment.data + unit * bytes;
  const bool is_whole = segment.group == 32, is_q4 = segment.format == FORMAT_Q4;
  Panel panel{data, stride, nullptr, 0, data + AHEAD_BYTES, stride};
#define TILES(PRODUCT, HALF, MINIMUMS, PARTS) return tiles<PRODUCT, HALF, MINIMUMS, PARTS>(panel, segment, in, begin, end, sink)
  if (segment.format == FORMAT_F32) TILES(PRODUCT_F32, false, false, 1);
  if (segment.format == FORMAT_BF16) TILES(PRODUCT_BF16, false, false, 1);
  if (end - begin <= PACKED_ROWS_MAX && is_whole && (is_q4 || segment.half_scales)) {
    if (!is_q4 && segment.has_minimums) TILES(PRODUCT_Q8, true, true, 1);
    if (!is_q4) TILES(PRODUCT_Q8, true, false, 1);
    if (segment.half_scales && segment.has_minimums) TILES(PRODUCT_Q4, true, true, 1);
    if (segment.half_scales) TILES(PRODUCT_Q4, true, false, 1);
    if (segment.has_minimums) TILES(PRODUCT_Q4, false, true, 1);
    TILES(PRODUCT_Q4, false, false, 1);
  }
  panel.prepared = scratch;
  panel.prepared_stride = (is_q4 ? 5 : 6) * 64 * num_scales;
  panel.next = data + bytes;
  if (!is_q4) {
    prepare_panel<8, false>(segment, data, scratch);
    if (is_whole) TILES(PRODUCT_PREPARED_Q8, false, false, 1);
    TILES(PRODUCT_PREPARED_Q8, false, false, 2);
  }
  if (end - begin <= NIBBLE_ROWS_MAX && is_whole) {
    prepare_panel<4, false>(segment, data, scratch);
    TILES(PRODUCT_PREPARED_Q4, false, false, 1);
  }
  prepare_panel<4, true>(segment, data, scratch);
  panel.codes = scratch;
  panel.prepared = scratch + 1024;
  panel.code_stride = panel.prepared_stride += 1024;
  if (is_whole) TILES(PRODUCT_UNPACKED_Q4, false, false, 1);
  TILES(PRODUCT_UNPACKED_Q4, false, false, 2);
#undef TILES
}

void linear(const Segment& segment, int64_t unit, const Rows& in, const Rows& out, int64_t begin, int64_t end,
            const LinearTarget& target, uint8_t* scratch) {
  unit_product(segment, unit, in, begin, end, {out, target, segment, 32 * unit, begin, nullptr, false, false}, scratch);
}

void gated_linear(const Segment& gate, const Segment& up, int64_t unit, const Rows& in, const Rows& out, int64_t begin, int64_t end,
                  const LinearTarget& target, uint8_t* scratch, float* gates) {
  unit_product(gate, unit, in, begin, end, {out, target, gate, 32 * unit, begin, gates, true, false}, scratch);
  activate_numbers(gates, 32 * (end - begin), target.activation);
  unit_product(up, unit, in, begin, end, {out, target, up, 32 * unit, begin, gates, false, true}, scratch);
  // Straight into the form that the next product wants.
  pack_groups(gates, out, begin, unit, end - begin);
}

}  // namespace
