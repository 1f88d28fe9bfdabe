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

// Codes beside which scales and minimums are as they are packed, or prepared (`prepare_panel`).
enum Product { PRODUCT_F32, PRODUCT_BF16, PRODUCT_Q4, PRODUCT_Q8, PRODUCT_PREPARED_Q4, PRODUCT_PREPARED_Q8 };

constexpr bool is_prepared(Product product) { return product >= PRODUCT_PREPARED_Q4; }

constexpr int bits_of(Product product) { return product == PRODUCT_Q8 || product == PRODUCT_PREPARED_Q8 ? 8 : 4; }

// For more rows a panel is prepared.
constexpr int64_t PACKED_ROWS_MAX = TILE_ROWS == 12 ? 8 : 4;

// The weights of 32 outputs, and those that follow them in memory.
struct Panel {
  const uint8_t* packed;
  int64_t stride;  // bytes of a group of 32
  const uint8_t* prepared;
  int64_t prepared_stride;
  uint8_t* rests;  // [pieces / 2][2][16] pairs of bfloat16
  const uint8_t* next;
};

// Where codes are counted from, about their middle, so that what that stands for is small.
template <int BITS>
constexpr int32_t CENTRE = BITS == 4 ? 8 : 128;

// What sums over codes are counted in: as bytes, codes of 4 bits are 16 times as large (`CODE_SHIFT`; or their sums are).
template <int BITS>
constexpr int32_t UNITS = BITS == 4 ? 16 : 1;

// A piece's sum in units.
template <int BITS>
INLINE vi in_units(vi sum) {
  if constexpr (BITS == 4) return vshift_left<4 - CODE_SHIFT>(sum);
  return sum;
}

// The weights of a piece, 16 or 32 codes with one scale: scale / UNITS * (UNITS * (code - CENTRE) + steps) + rest.
struct PieceWeights {
  vf scales;  // over UNITS
  vi pairs;   // of 16 bits: steps, at most 256 of either sign; the sum of UNITS * (code - CENTRE)
  vf rests;
};

template <int BITS>
INLINE PieceWeights piece_weights(vf scales, const vf* minimums, float offset, vi code_sums) {
  constexpr float unit = 1.0f / (float)UNITS<BITS>;
  if (!minimums) return {vmul(scales, vset(unit)), vwords(viset((int32_t)offset * UNITS<BITS>), code_sums), vset(0.0f)};
  const vf exact = vfma(scales, vset(offset), *minimums), units = vmul(scales, vset(unit));
  // What is no number, since the scale is 0, becomes a bound: it is the second operand.
  const vf steps = vround(vmin(vmax(vdiv(exact, units), vset(-256.0f)), vset(256.0f)));
  return {units, vwords(vwhole(steps), code_sums), vfma(vsub(vset(0.0f), steps), units, exact)};
}

// Rests of pieces go in pairs, as bfloat16, the first below.
INLINE void keep_rests(uint8_t* rests, int64_t piece, int block, vf x) {
  uint8_t* at = rests + (piece / 2 * 2 + block) * 64;
  vistore(at, piece % 2 ? vior(viload(at), vpair(vset(0.0f), x)) : vpair(x, vset(0.0f)));
}

// What goes with a piece of a row's codes: see `CodedGroup`.
struct Piece {
  int32_t start;
  uint32_t pair;
  float total;  // the sum of the numbers
};

// Of half a group it is worked out when it is wanted.
INLINE Piece half_piece(const CodedGroup& group, const int8_t* codes) {
  int32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += codes[i];
  const int32_t middle = (int32_t)group.pair >> 16, total = sum + 16 * middle;
  const float scale = as_float((uint32_t)group.base) * (ROOTS[group.root_offset / 128] / 12582912.0f);
  return {group.base - 128 * sum, (uint32_t)(total & 0xffff) | (uint32_t)middle << 16, (float)total * scale};
}

// Adds the products of two pieces' rests with the sums of the rows' numbers, both of bfloat16. The pieces are those of two groups, of which
// there may be one alone, or the halves of one.
template <int PARTS, int MR>
INLINE void add_rests(const uint8_t* rests, const CodedGroup* groups, bool is_alone, const int8_t* const (&a)[MR], vf (&sum)[MR][2]) {
  const vi weights[2] = {viload(rests), viload(rests + 64)};
  for (int r = 0; r < MR; r++) {
    const CodedGroup* two = groups + 2 * r;
    uint32_t totals;
    if (PARTS == 1) {
      totals = two[0].total | (is_alone ? 0 : (uint32_t)two[1].total << 16);
    } else {
      totals = to_bf16(half_piece(*two, a[r]).total) | (uint32_t)to_bf16(half_piece(*two, a[r] + 16).total) << 16;
    }
    for (int b = 0; b < 2; b++) sum[r][b] = vdot2(sum[r][b], weights[b], totals);
  }
}

// Adds the products of a group: of its codes at `packed` with those at `a`. Rests are left to `add_rests`, which gets them at `rests`.
template <Product PRODUCT, bool HALF, bool MINIMUMS, int PARTS, int MR>
INLINE void multiply_group(const uint8_t* packed, const uint8_t* prepared, uint8_t* rests, float offset, const CodedGroup* groups, int which,
                           const int8_t* const (&a)[MR], vf (&sum)[MR][2]) {
  constexpr int BITS = bits_of(PRODUCT), LOADS = BITS / PARTS;
  constexpr bool PREPARED = is_prepared(PRODUCT), IS_SHIFTED = BITS == 4 && CODE_SHIFT == 0;
  constexpr int64_t CODES = 128 * BITS, SCALES = 2 * PARTS * 16 * (HALF ? 2 : 4);
#pragma GCC unroll 2
  for (int part = 0; part < PARTS; part++) {
    Piece halves[MR];
    vi acc[MR][2], code_sums[2];
    for (int r = 0; r < MR; r++) {
      if (PARTS == 2) halves[r] = half_piece(groups[2 * r], a[r] + part * 16);
      acc[r][0] = acc[r][1] = viset(IS_SHIFTED ? 0 : PARTS == 2 ? halves[r].start : groups[2 * r].start);
    }
    if (!PREPARED) code_sums[0] = code_sums[1] = viset(0);
#pragma GCC unroll 8
    for (int i = part * LOADS; i < (part + 1) * LOADS; i++) {
      // Nibbles: two quads at once.
      vi quads[2][2];
      for (int b = 0; b < 2; b++) {
        const vi bytes = viload(packed + 64 * (BITS * b + i));
        quads[b][0] = BITS == 4 ? vlow_codes(bytes) : bytes;
        quads[b][1] = vhigh_codes(bytes);
        for (int j = 0; j < 8 / BITS; j++) {
          if (!PREPARED) code_sums[b] = vdot4<BITS>(code_sums[b], quads[b][j], ONES);
        }
      }
      for (int r = 0; r < MR; r++) {
        for (int j = 0; j < 8 / BITS; j++) {
          // Copied one by one, so that they go from memory to all lanes at once.
          int32_t four;
          memcpy(&four, a[r] + 4 * (8 / BITS * i + j), 4);
          for (int b = 0; b < 2; b++) acc[r][b] = vdot4<BITS>(acc[r][b], quads[b][j], four);
        }
      }
    }
    for (int b = 0; b < 2; b++) {
      const int at = b * PARTS + part;
      PieceWeights weights;
      if (PREPARED) {
        weights.pairs = viload(prepared + (2 * NUM_ROOTS * PARTS + at) * 64);
      } else {
        const vf minimums = MINIMUMS ? load_scales<HALF>(packed + CODES + SCALES, at) : vset(0.0f);
        const vi centred = viadd(in_units<BITS>(code_sums[b]), viset(-128 * 32 / PARTS));
        weights = piece_weights<BITS>(load_scales<HALF>(packed + CODES, at), MINIMUMS ? &minimums : nullptr, offset, centred);
        if (MINIMUMS) keep_rests(rests, which, b, weights.rests);
      }
      for (int r = 0; r < MR; r++) {
        if (IS_SHIFTED) acc[r][b] = viadd(in_units<BITS>(acc[r][b]), viset(PARTS == 2 ? halves[r].start : groups[2 * r].start));
        const vi whole = vdot2(acc[r][b], weights.pairs, PARTS == 2 ? halves[r].pair : groups[2 * r].pair);
        const vf products = vsub(vcast(whole), vcast(viset(groups[2 * r].base)));
        const vf scaled = PREPARED ? vload((const float*)(prepared + 64 * at + PARTS * groups[2 * r].root_offset))
                                   : vmul(weights.scales, vset(ROOTS[groups[2 * r].root_offset / 128]));
        sum[r][b] = vfma(products, scaled, sum[r][b]);
      }
    }
  }
}

// With weights d * (c - 8 + w) + v, where w is of whole sixteenths, and activations s * (a + y), a piece gives d * s times: the sum of
// (c - 8) * a, and y * sum of (c - 8) + w * sum of (a + y). All of it is whole numbers in units of a sixteenth: products of bytes, and one
// operation for two products of 16 bits. Of the scale s the power of 2 is where the sum begins (`CodedGroup`), and d times its root is worked
// out for all roots when a panel is prepared: so no operation but the last is spent on scales. v is at most half a sixteenth of a step, or
// what is beyond 16 steps; what it adds, times the sum of the row's numbers, follows two pieces an operation.
//
// HALF and MINIMUMS: of the packed panel. PARTS: pieces of 32 codes, 1 or 2. What follows the panel is asked for from memory meanwhile.
template <Product PRODUCT, bool HALF, bool MINIMUMS, int PARTS, int MR>
INLINE void multiply_codes(const Panel& panel, const Segment& segment, const Rows& in, int64_t row, vf (&sum)[MR][2]) {
  const int64_t num_groups = segment.k / 32;
  const float offset = (float)(CENTRE<bits_of(PRODUCT)> - segment.zero);
  const bool has_rests = is_prepared(PRODUCT) ? segment.has_minimums : MINIMUMS;
  const int8_t* a[MR];
  for (int r = 0; r < MR; r++) {
    a[r] = in.q8 + (row + r) * in.stride;
    sum[r][0] = sum[r][1] = vset(0.0f);
  }
  const uint8_t *packed = panel.packed, *prepared = panel.prepared;
  uint8_t* rests = panel.rests;
  const CodedGroup* groups = in.groups + 2 * row;
  for (int64_t first = 0; first < num_groups; first += 2, groups += 2 * in.capacity) {
#pragma GCC unroll 2
    for (int which = 0; which < 2; which++, packed += panel.stride, prepared += panel.prepared_stride) {
      if (first + which == num_groups) break;
      if (panel.next) prefetch(panel.next + (first + which) * panel.stride, panel.stride);
      multiply_group<PRODUCT, HALF, MINIMUMS, PARTS, MR>(packed, prepared, rests, offset, groups + which, which, a, sum);
      if (PARTS == 2 && has_rests) add_rests<PARTS, MR>(rests + 128 * which, groups + which, false, a, sum);
      for (int r = 0; r < MR; r++) a[r] += 32;
    }
    if (PARTS == 1 && has_rests) add_rests<PARTS, MR>(rests, groups, first + 1 == num_groups, a, sum);
    rests += 128 * PARTS;
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
    multiply_f32<MR>(panel.packed, segment.k, in, row, sum);
  } else if constexpr (PRODUCT == PRODUCT_BF16) {
    multiply_bf16<MR>(panel.packed, segment.k, in, row, sum);
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
__attribute__((noinline)) void tiles(Panel& panel, const Segment& segment, const Rows& in, int64_t row, int64_t end, const Sink& sink) {
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

// Of each group, in place of scales and minimums: scales times all roots, and pairs (`PieceWeights`). Rests go where `rests` says.
template <int BITS>
INLINE void prepare_panel(const Segment& segment, const uint8_t* data, uint8_t* out, uint8_t* rests) {
  const int64_t num_scales = 64 / segment.group, item = segment.half_scales ? 32 : 64, parts = num_scales / 2;
  const float offset = (float)(CENTRE<BITS> - segment.zero);
  for (int64_t g = 0; g < segment.k / 32; g++) {
    // By block and half of the group.
    vi sums[2][2] = {{viset(0), viset(0)}, {viset(0), viset(0)}};
    for (int i = 0; i < BITS; i++) {
      for (int b = 0; b < 2; b++) {
        const vi bytes = viload(data + 64 * (BITS * b + i));
        vi& sum = sums[b][i / (BITS / 2)];
        if (BITS == 4) {
          sum = vdot4<4>(vdot4<4>(sum, vlow_codes(bytes), ONES), vhigh_codes(bytes), ONES);
        } else {
          sum = vdot4<8>(sum, bytes, ONES);
        }
      }
    }
    data += 128 * BITS;
    for (int64_t i = 0; i < num_scales; i++, data += item, out += 64) {
      const vf scales = segment.half_scales ? vload_half((const uint16_t*)data) : vload((const float*)data);
      const uint8_t* at = data + num_scales * item;
      vf minimums = vset(0.0f);
      if (segment.has_minimums) minimums = segment.half_scales ? vload_half((const uint16_t*)at) : vload((const float*)at);
      const vi codes = parts == 1 ? viadd(sums[i][0], sums[i][1]) : sums[i / 2][i % 2];
      const vi centred = viadd(in_units<BITS>(codes), viset(-128 * segment.group));
      const PieceWeights weights = piece_weights<BITS>(scales, segment.has_minimums ? &minimums : nullptr, offset, centred);
      for (int root = 0; root < NUM_ROOTS; root++) vstore((float*)(out + root * 64 * num_scales), vmul(weights.scales, vset(ROOTS[root])));
      vistore(out + NUM_ROOTS * 64 * num_scales, weights.pairs);
      if (segment.has_minimums) keep_rests(rests, parts * g + i % parts, (int)(i / parts), weights.rests);
    }
    out += NUM_ROOTS * 64 * num_scales;
    if (segment.has_minimums) data += num_scales * item;
  }
}

// A panel, ready for some number of rows, and what multiplies with it.
struct Unit {
  Panel panel;
  const Segment& segment;
  void (*tiles)(Panel& panel, const Segment& segment, const Rows& in, int64_t row, int64_t end, const Sink& sink);

  void multiply(const Rows& in, int64_t row, int64_t end, const Sink& sink) { tiles(panel, segment, in, row, end, sink); }
};

Unit unit_of(const Segment& segment, int64_t unit, int64_t num_rows, uint8_t* scratch) {
  const int64_t bytes = unit_bytes(segment), num_scales = 64 / segment.group;
  const uint8_t* data = (const uint8_t*)segment.data + unit * bytes;
  const bool is_whole = segment.group == 32, is_q4 = segment.format == FORMAT_Q4;
  Panel panel{data, bytes / (segment.k / 32), nullptr, 0, scratch, data + AHEAD_BYTES};
#define UNIT(PRODUCT, HALF, MINIMUMS, PARTS) return {panel, segment, tiles<PRODUCT, HALF, MINIMUMS, PARTS>}
  if (segment.format == FORMAT_F32) UNIT(PRODUCT_F32, false, false, 1);
  if (segment.format == FORMAT_BF16) UNIT(PRODUCT_BF16, false, false, 1);
  if (num_rows <= PACKED_ROWS_MAX && is_whole && (is_q4 || segment.half_scales)) {
    if (!is_q4 && segment.has_minimums) UNIT(PRODUCT_Q8, true, true, 1);
    if (!is_q4) UNIT(PRODUCT_Q8, true, false, 1);
    if (segment.half_scales && segment.has_minimums) UNIT(PRODUCT_Q4, true, true, 1);
    if (segment.half_scales) UNIT(PRODUCT_Q4, true, false, 1);
    if (segment.has_minimums) UNIT(PRODUCT_Q4, false, true, 1);
    UNIT(PRODUCT_Q4, false, false, 1);
  }
  panel.prepared = scratch;
  panel.prepared_stride = (NUM_ROOTS + 1) * 64 * num_scales;
  panel.rests = scratch + segment.k / 32 * panel.prepared_stride;
  panel.next = data + bytes;
  if (is_q4) {
    prepare_panel<4>(segment, data, scratch, panel.rests);
    if (is_whole) UNIT(PRODUCT_PREPARED_Q4, false, false, 1);
    UNIT(PRODUCT_PREPARED_Q4, false, false, 2);
  }
  prepare_panel<8>(segment, data, scratch, panel.rests);
  if (is_whole) UNIT(PRODUCT_PREPARED_Q8, false, false, 1);
  UNIT(PRODUCT_PREPARED_Q8, false, false, 2);
#undef UNIT
}

void linear(const Segment& segment, int64_t unit, const Rows& in, const Rows& out, int64_t begin, int64_t end,
            const LinearTarget& target, uint8_t* scratch) {
  unit_of(segment, unit, end - begin, scratch).multiply(in, begin, end, {out, target, segment, 32 * unit, begin, nullptr, false, false});
}

// Rows whose gates are read while they are in the first cache: whole tiles, and whole lots of groups.
constexpr int64_t GATED_ROWS = 48;

void gated_linear(const Segment& gate, const Segment& up, int64_t unit, const Rows& in, const Rows& out, int64_t begin, int64_t end,
                  const LinearTarget& target, uint8_t* scratch, float* gates) {
  unit_of(gate, unit, end - begin, scratch).multiply(in, begin, end, {out, target, gate, 32 * unit, begin, gates, true, false});
  Unit ups = unit_of(up, unit, end - begin, scratch);
  for (int64_t row = begin; row < end; row += GATED_ROWS) {
    const int64_t last = row + GATED_ROWS < end ? row + GATED_ROWS : end;
    float* some = gates + 32 * (row - begin);
    activate_numbers(some, 32 * (last - row), target.activation);
    ups.multiply(in, row, last, {out, target, up, 32 * unit, begin, gates, false, true});
    // Straight into the form that the next product wants.
    pack_groups(some, out, row, unit, last - row);
  }
}

}  // namespace
