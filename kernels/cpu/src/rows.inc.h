// Operations that take rows one by one: embedding, norms, packing for a matrix product, activations, sums.

namespace {

using namespace headrace;

INLINE float* f32_row(const Rows& rows, int64_t row) { return rows.f32 + row * rows.stride; }

INLINE void zero_tail(const Rows& rows, int64_t row) {
  float* out = f32_row(rows, row);
  for (int64_t i = rows.width; i < rows.stride; i++) out[i] = 0.0f;
}

// Roots of scales.
constexpr int NUM_ROOTS = 8;
constexpr float ROOTS[NUM_ROOTS] = {1.0f, 1.125f, 1.25f, 1.375f, 1.5f, 1.625f, 1.75f, 1.875f};

// Scales are from 2 ** -126 to 2 ** 104: numbers that need a smaller one are nothing beside any other, those that need a larger one
// are taken for infinite.
constexpr float SCALE_MIN = 1.17549435e-38f, SCALE_MAX = 2.02824096e31f;

// Groups of 32 numbers that are quantised together.
constexpr int GROUPS = 16;

// How groups are coded, a group a lane. Loops over lanes are without branches, so that they are of vectors.
struct Coding {
  alignas(64) float inverse[GROUPS];
  alignas(64) int32_t middle[GROUPS];
  alignas(64) int32_t eighths[GROUPS];  // the upper bits of the scale: its exponent, and three of its mantissa
  alignas(64) int32_t is_number[GROUPS];
  alignas(64) int32_t sums[GROUPS];
};

INLINE void choose_codes(const float* low, const float* high, const int32_t* has_nan, Coding& coding) {
  for (int i = 0; i < GROUPS; i++) {
    const float bottom = low[i] < 0.0f ? low[i] : 0.0f, top = high[i] > 0.0f ? high[i] : 0.0f;
    const float least = (top - bottom) * (1.0f / 253.0f);
    const bool is_nothing = !(least >= SCALE_MIN);
    const int32_t eighths = is_nothing ? 127 << 3 : (as_bits(least) + 0xfffff) >> 20;
    const float inverse = is_nothing ? 0.0f : 1.0f / as_float((uint32_t)eighths << 20);
    coding.inverse[i] = inverse;
    coding.middle[i] = (int32_t)rintf((0.5f * bottom + 0.5f * top) * inverse);
    coding.eighths[i] = eighths;
    coding.is_number[i] = least <= SCALE_MAX ? 1 - has_nan[i] : 0;
  }
}

// Where groups go: one of each row, or of a row one behind the other, and on in the next row.
struct Groups {
  int64_t row;
  int64_t group;
  int row_groups;  // of a row; 0: one of each
  int count;
};

INLINE void write_groups(const Coding& coding, const Rows& out, const Groups& at) {
  // The members of a group, a group a lane.
  alignas(64) uint32_t members[4][GROUPS];
  for (int i = 0; i < GROUPS; i++) {
    const int32_t total = coding.sums[i] + 32 * coding.middle[i];
    const int32_t base = coding.is_number[i] ? 0x4b400000 + ((coding.eighths[i] >> 3) - 127) * (1 << 23) : 0x7fc00000;
    members[0][i] = (uint32_t)base;
    members[1][i] = (uint32_t)(base - 128 * coding.sums[i]);
    members[2][i] = (uint32_t)(total & 0xffff) | (uint32_t)coding.middle[i] << 16;
    members[3][i] = (uint32_t)(128 * (coding.eighths[i] & 7)) | (uint32_t)to_bf16((float)total * as_float((uint32_t)coding.eighths[i] << 20)) << 16;
  }
  alignas(64) CodedGroup groups[GROUPS];
  vtranspose(members, groups);
  CodedGroup* row = out.groups + 2 * at.row;
  int64_t group = at.group;
  for (int i = 0; i < at.count; i++) {
    row[group / 2 * 2 * out.capacity + group % 2] = groups[i];
    if (!at.row_groups) {
      row += 2;
    } else if (++group == at.row_groups) {
      row += 2;
      group = 0;
    }
  }
}

// Quantise groups of 32 numbers: x = scale * (code + middle), codes from -128 to 127. Groups mostly reach further to one side of 0 than to
// the other: codes that are symmetric about 0 would err twice as far. Whatever the middle, 0 is met, as are small numbers beside a large
// one. The scale is the next number up with three bits behind the first. A group that is not finite gets a base that is not finite either.
template <bool IS_FULL>
INLINE void quantise_groups(const float* x, const Rows& out, const Groups& at) {
  const int count = IS_FULL ? GROUPS : at.count;
  vf lows[GROUPS], highs[GROUPS];
  alignas(64) int32_t has_nan[GROUPS];
  for (int i = count; i < GROUPS; i++) {
    lows[i] = highs[i] = vset(0.0f);
    has_nan[i] = 0;
  }
  for (int i = 0; i < count; i++) {
    const vf a = vload(x + 32 * i), b = vload(x + 32 * i + 16);
    lows[i] = vmin(a, b);
    highs[i] = vmax(a, b);
    has_nan[i] = vhas_nan(a, b);
  }
  alignas(64) float low[GROUPS], high[GROUPS];
  vstore(low, vminimums(lows));
  vstore(high, vmaximums(highs));
  Coding coding;
  choose_codes(low, high, has_nan, coding);
  vq codes[GROUPS];
  int8_t* to = out.q8 + at.row * out.stride + at.group * 32;
  for (int i = 0; i < count; i++) {
    const vf middle = vset((float)coding.middle[i]), inverse = vset(coding.inverse[i]);
    codes[i] = vquantise(vsub(vmul(vload(x + 32 * i), inverse), middle), vsub(vmul(vload(x + 32 * i + 16), inverse), middle));
    vqstore(to + i * (at.row_groups ? 32 : out.stride), codes[i]);
  }
  for (int i = count; i < GROUPS; i++) codes[i] = codes[0];
  vcode_sums(codes, coding.sums);
  write_groups(coding, out, at);
}

INLINE void quantise(const float* x, const Rows& out, const Groups& at) {
  if (at.count == GROUPS) {
    quantise_groups<true>(x, out, at);
  } else {
    quantise_groups<false>(x, out, at);
  }
}

// Put a group of 32 numbers of each of some rows, one behind the other, into a value of any kind.
INLINE void pack_groups(const float* x, const Rows& out, int64_t row, int64_t group, int64_t num_rows) {
  if (out.kind == KIND_Q8) {
    for (int64_t i = 0; i < num_rows; i += GROUPS) {
      quantise(x + 32 * i, out, {row + i, group, 0, (int)(num_rows - i < GROUPS ? num_rows - i : GROUPS)});
    }
    return;
  }
  for (int64_t i = 0; i < num_rows; i++) {
    for (int half = 0; half < 32; half += 16) {
      const vf value = vload(x + 32 * i + half);
      if (out.kind == KIND_BF16) {
        vstore_bf16(out.bf16 + (row + i) * out.stride + 32 * group + half, value);
      } else {
        vstore(f32_row(out, row + i) + 32 * group + half, value);
      }
    }
  }
}

// Put finished rows (padded with zeros to the stride), one behind the other, into a value of any kind but floats.
INLINE void pack_rows(const float* x, const Rows& out, int64_t row, int64_t num_rows) {
  if (out.kind == KIND_BF16) {
    for (int64_t i = 0; i < num_rows * out.stride; i += 16) vstore_bf16(out.bf16 + row * out.stride + i, vload(x + i));
    return;
  }
  const int64_t row_groups = out.stride / 32, num_groups = num_rows * row_groups;
  for (int64_t g = 0; g < num_groups; g += GROUPS) {
    const int count = (int)(num_groups - g < GROUPS ? num_groups - g : GROUPS);
    quantise(x + 32 * g, out, {row + g / row_groups, g % row_groups, (int)row_groups, count});
  }
}

// Where rows are worked out: in place when floats are wanted, else some at a time in memory of the thread.
struct RowPlace {
  RowPlace(const Rows& out, int64_t begin, int64_t end) : out_(out), begin_(begin), end_(end) {
    if (out.kind != KIND_F32) buffer_ = thread_buffer(ROWS * out.stride);
  }
  float* at(int64_t row) const { return out_.kind == KIND_F32 ? f32_row(out_, row) : buffer_ + place(row) * out_.stride; }
  void done(int64_t row) const {
    if (out_.kind != KIND_F32 && (place(row) == ROWS - 1 || row == end_ - 1)) pack_rows(buffer_, out_, row - place(row), place(row) + 1);
  }

 private:
  static constexpr int64_t ROWS = 8;

  int64_t place(int64_t row) const { return (row - begin_) % ROWS; }

  static float* thread_buffer(int64_t size) {
    static thread_local float* buffer = nullptr;
    static thread_local int64_t capacity = 0;
    if (size > capacity) {
      free(buffer);
      buffer = (float*)aligned_alloc(64, (size_t)((size * 4 + 63) / 64 * 64));
      capacity = size;
    }
    return buffer;
  }
  const Rows& out_;
  const int64_t begin_;
  const int64_t end_;
  float* buffer_ = nullptr;
};

INLINE float read_scale(const uint8_t* p, int64_t item) {
  float lanes[16];
  if (item == 4) {
    memcpy(lanes, p, 4);
    return lanes[0];
  }
  uint16_t half[16] = {};
  memcpy(half, p, 2);
  vstore(lanes, vload_half(half));
  return lanes[0];
}

// One lane of a panel: a row of a packed matrix as numbers.
INLINE void unpack_row(const Segment& table, int64_t n, float* x) {
  const uint8_t* panel = (const uint8_t*)table.data + n / 32 * unit_bytes(table);
  const int64_t block = n % 32 / 16, lane = n % 16;
  if (table.format == FORMAT_F32) {
    for (int64_t k = 0; k < table.k; k++) x[k] = ((const float*)panel)[k * 32 + block * 16 + lane];
    return;
  }
  if (table.format == FORMAT_BF16) {
    for (int64_t k = 0; k < table.k; k++) {
      const uint32_t bits = (uint32_t)((const uint16_t*)panel)[k / 2 * 64 + block * 32 + lane * 2 + k % 2] << 16;
      memcpy(&x[k], &bits, 4);
    }
    return;
  }
  const int64_t code_bytes = table.format == FORMAT_Q4 ? 512 : 1024, parts = 32 / table.group, item = table.half_scales ? 2 : 4;
  const int64_t scale_bytes = 2 * parts * 16 * item;
  const int64_t stride = code_bytes + scale_bytes * (table.has_minimums ? 2 : 1);
  for (int64_t g = 0; g < table.k / 32; g++, panel += stride) {
    const uint8_t* codes = panel + block * code_bytes / 2 + lane * 4;
    for (int64_t part = 0; part < parts; part++) {
      const uint8_t* scale = panel + code_bytes + ((block * parts + part) * 16 + lane) * item;
      const float factor = read_scale(scale, item);
      const float minimum = table.has_minimums ? read_scale(scale + scale_bytes, item) : 0.0f;
      for (int64_t i = part * table.group; i < (part + 1) * table.group; i++) {
        int32_t code = table.format == FORMAT_Q4 ? codes[i / 8 * 64 + i % 4] : codes[i / 4 * 64 + i % 4];
        if (table.format == FORMAT_Q4) code = i % 8 < 4 ? code & 15 : code >> 4;
        x[32 * g + i] = __builtin_fmaf(factor, (float)(code - table.zero), minimum);
      }
    }
  }
}

void embed(const Segment& table, const int64_t* ids, int64_t begin, int64_t end, float scale, const Rows& out) {
  for (int64_t row = begin; row < end; row++) {
    float* x = f32_row(out, row);
    unpack_row(table, ids[row], x);
    if (scale != 1.0f) {
      for (int64_t k = 0; k < out.stride; k += 16) vstore(x + k, vmul(vload(x + k), vset(scale)));
    }
  }
}

// The sum of a row, four sums at a time, since one would wait for itself.
template <class Add>
INLINE float sum_of(int64_t width, Add add) {
  vf sums[4] = {vset(0.0f), vset(0.0f), vset(0.0f), vset(0.0f)};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) {
    for (int j = 0; j < 4; j++) sums[j] = add(i + 16 * j, sums[j]);
  }
  for (; i < width; i += 16) sums[0] = add(i, sums[0]);
  return vsum(vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3])));
}

void norm(const Rows& in, const Rows& out, int64_t begin, int64_t end, const float* weight, const float* bias, float eps,
          int is_layer_norm) {
  const RowPlace place(out, begin, end);
  const int64_t width = in.width;
  for (int64_t row = begin; row < end; row++) {
    const float* x = f32_row(in, row);
    const vf mean = vset(is_layer_norm ? sum_of(width, [=](int64_t i, vf sum) { return vadd(sum, vload(x + i)); }) / (float)width : 0.0f);
    const float square = sum_of(width, [=](int64_t i, vf sum) {
      const vf centred = vsub(vload(x + i), mean);
      return vfma(centred, centred, sum);
    });
    const vf inverse = vset(1.0f / sqrtf(square / (float)width + eps));
    float* y = place.at(row);
    for (int64_t i = 0; i < width; i += 16) {
      vf value = vmul(vmul(vsub(vload(x + i), mean), inverse), vload(weight + i));
      if (bias) value = vadd(value, vload(bias + i));
      vstore(y + i, value);
    }
    for (int64_t i = width; i < out.stride; i++) y[i] = 0.0f;
    place.done(row);
  }
}

void pack(const Rows& in, const Rows& out, int64_t begin, int64_t end) {
  if (in.stride == out.stride) {
    pack_rows(f32_row(in, begin), out, begin, end - begin);
  } else {
    for (int64_t row = begin; row < end; row++) pack_rows(f32_row(in, row), out, row, 1);
  }
}

INLINE vf verf(vf x) {
  // Abramowitz and Stegun 7.1.26 with its error of 1.5e-7.
  const vf a = vabs(x);
  const vf t = vdiv(vset(1.0f), vfma(vset(0.3275911f), a, vset(1.0f)));
  vf p = vset(1.061405429f);
  p = vfma(p, t, vset(-1.453152027f));
  p = vfma(p, t, vset(1.421413741f));
  p = vfma(p, t, vset(-0.284496736f));
  p = vfma(p, t, vset(0.254829592f));
  const vf y = vsub(vset(1.0f), vmul(vmul(p, t), vexp(vsub(vset(0.0f), vmul(a, a)))));
  return vmul(vdiv(x, vmax(a, vset(1e-30f))), y);
}

INLINE vf vactivate(vf x, int activation) {
  switch (activation) {
    case ACTIVATION_SILU:
      return vsilu(x);
    case ACTIVATION_GELU:
      return vmul(vmul(x, vset(0.5f)), vadd(vset(1.0f), verf(vmul(x, vset(0.70710678118654752f)))));
    case ACTIVATION_GELU_TANH: {
      const vf cube = vmul(vmul(x, x), x);
      const vf inner = vmul(vset(0.79788456080286536f), vfma(cube, vset(0.044715f), x));
      return vmul(vmul(x, vset(0.5f)), vadd(vset(1.0f), vtanh(inner)));
    }
    default:
      return vmax(vset(0.0f), x);
  }
}

// In place; a multiple of 16 numbers.
template <int ACTIVATION>
INLINE void activate_all(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) vstore(x + i, vactivate(vload(x + i), ACTIVATION));
}

INLINE void activate_numbers(float* x, int64_t count, int activation) {
  switch (activation) {
    case ACTIVATION_SILU:
      return activate_all<ACTIVATION_SILU>(x, count);
    case ACTIVATION_GELU:
      return activate_all<ACTIVATION_GELU>(x, count);
    case ACTIVATION_GELU_TANH:
      return activate_all<ACTIVATION_GELU_TANH>(x, count);
    default:
      return activate_all<ACTIVATION_RELU>(x, count);
  }
}

void gated(const Rows& in, const Rows& out, int64_t begin, int64_t end, int activation) {
  const RowPlace place(out, begin, end);
  const int64_t width = out.width;
  for (int64_t row = begin; row < end; row++) {
    const float* x = f32_row(in, row);
    float* y = place.at(row);
    for (int64_t i = 0; i < width; i += 16) vstore(y + i, vmul(vactivate(vload(x + i), activation), vload(x + width + i)));
    for (int64_t i = width; i < out.stride; i++) y[i] = 0.0f;
    place.done(row);
  }
}

void activate(const Rows& in, const Rows& out, int64_t begin, int64_t end, int activation) {
  const RowPlace place(out, begin, end);
  for (int64_t row = begin; row < end; row++) {
    const float* x = f32_row(in, row);
    float* y = place.at(row);
    for (int64_t i = 0; i < out.width; i += 16) vstore(y + i, vactivate(vload(x + i), activation));
    for (int64_t i = out.width; i < out.stride; i++) y[i] = 0.0f;
    place.done(row);
  }
}

void add(const Rows& x, const Rows& y, int64_t begin, int64_t end, float scale) {
  for (int64_t row = begin; row < end; row++) {
    float* a = f32_row(x, row);
    const float* b = f32_row(y, row);
    for (int64_t i = 0; i < x.width; i += 16) vstore(a + i, vfma(vset(scale), vload(b + i), vload(a + i)));
  }
}

// Also for logits, whose rows are not padded.
template <class Function>
INLINE void map_row(float* x, int64_t width, Function function) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) vstore(x + i, function(vload(x + i)));
  if (i < width) {
    float tail[16] = {};
    memcpy(tail, x + i, sizeof(float) * (size_t)(width - i));
    vstore(tail, function(vload(tail)));
    memcpy(x + i, tail, sizeof(float) * (size_t)(width - i));
  }
}

void scale_rows(const Rows& x, int64_t begin, int64_t end, float scale) {
  for (int64_t row = begin; row < end; row++) map_row(f32_row(x, row), x.width, [=](vf a) { return vmul(a, vset(scale)); });
}

void soft_cap_rows(const Rows& x, int64_t begin, int64_t end, float cap) {
  const float inverse = 1.0f / cap;
  for (int64_t row = begin; row < end; row++) {
    map_row(f32_row(x, row), x.width, [=](vf a) { return vmul(vset(cap), vtanh(vmul(a, vset(inverse)))); });
  }
}

void best(const Rows& in, int64_t begin, int64_t end, int64_t* best, uint8_t* is_finite) {
  for (int64_t row = begin; row < end; row++) {
    const float* x = f32_row(in, row);
    const int64_t whole = in.width / 16 * 16;
    vf largest = vset(-INFINITY), zero = vset(0.0f);
    for (int64_t i = 0; i < whole; i += 16) {
      const vf value = vload(x + i);
      largest = vmax(largest, value);
      // What is not finite becomes a NaN and stays one.
      zero = vfma(value, vset(0.0f), zero);
    }
    float maximum = vmaximum(largest), poison = vsum(zero);
    for (int64_t i = whole; i < in.width; i++) {
      maximum = x[i] > maximum ? x[i] : maximum;
      poison += x[i] * 0.0f;
    }
    is_finite[row] = poison == 0.0f;
    best[row] = 0;
    if (!is_finite[row]) continue;
    int64_t at = 0;
    while (x[at] != maximum) at++;
    best[row] = at;
  }
}

}  // namespace
