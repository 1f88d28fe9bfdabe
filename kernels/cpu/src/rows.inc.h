// Operations that take rows one by one: embedding, norms, packing for a matrix product, activations, sums.

namespace {

using namespace headrace;

INLINE float* f32_row(const Rows& rows, int64_t row) { return rows.f32 + row * rows.stride; }

INLINE void zero_tail(const Rows& rows, int64_t row) {
  float* out = f32_row(rows, row);
  for (int64_t i = rows.width; i < rows.stride; i++) out[i] = 0.0f;
}

// Quantise 32 numbers: x = scale * (code - zero), codes from -128 to 127, so that the largest and the smallest number (and 0) are met.
// Groups mostly reach further to one side than to the other: that halves the error of codes that are symmetric about 0. A group that is
// not finite gets a scale that is not finite either.
INLINE void quantise_32(vf a, vf b, const Rows& out, int64_t row, int64_t group) {
  float low, high;
  const bool is_finite = vbounds(a, b, &low, &high);
  low = low < 0.0f ? low : 0.0f;
  high = high > 0.0f ? high : 0.0f;
  const float scale = is_finite ? (high - low) * (1.0f / 255.0f) : NAN;
  // A smaller scale has no inverse; what it would scale is nothing beside any other number.
  const float inverse = scale > 1e-38f ? 1.0f / scale : 0.0f;
  const float zero = rintf(-128.0f - low * inverse);
  const vf qa = vadd(vround(vmul(a, vset(inverse))), vset(zero)), qb = vadd(vround(vmul(b, vset(inverse))), vset(zero));
  int8_t* q = out.q8 + row * out.stride + group * 32;
  const int32_t sum_a = vstore_int8(q, qa), sum_b = vstore_int8(q + 16, qb);
  const int64_t at = group * out.capacity + row;
  out.q8_sums[2 * at] = sum_a;
  out.q8_sums[2 * at + 1] = sum_b;
  out.q8_scales[4 * at] = scale;
  out.q8_scales[4 * at + 1] = scale * ((float)(sum_a + sum_b) - 32.0f * zero);
  out.q8_scales[4 * at + 2] = -zero;
}

// Put 32 numbers into a value of any kind.
INLINE void pack_32(vf a, vf b, const Rows& out, int64_t row, int64_t group) {
  if (out.kind == KIND_Q8) {
    quantise_32(a, b, out, row, group);
  } else if (out.kind == KIND_BF16) {
    vstore_bf16(out.bf16 + row * out.stride + 32 * group, a);
    vstore_bf16(out.bf16 + row * out.stride + 32 * group + 16, b);
  } else {
    vstore(f32_row(out, row) + 32 * group, a);
    vstore(f32_row(out, row) + 32 * group + 16, b);
  }
}

// Put a finished row (padded with zeros to the stride) into a value of any kind.
INLINE void pack_row(const float* x, const Rows& out, int64_t row) {
  for (int64_t group = 0; group < out.stride / 32; group++) {
    pack_32(vload(x + 32 * group), vload(x + 32 * group + 16), out, row, group);
  }
}

// Where a row is worked out: in place when floats are wanted, else in memory of the thread.
struct RowPlace {
  explicit RowPlace(const Rows& out) : out_(out) {
    if (out.kind != KIND_F32) buffer_ = thread_buffer(out.stride);
  }
  float* at(int64_t row) const { return out_.kind == KIND_F32 ? f32_row(out_, row) : buffer_; }
  void done(int64_t row) const {
    if (out_.kind != KIND_F32) pack_row(buffer_, out_, row);
  }

 private:
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

void norm(const Rows& in, const Rows& out, int64_t begin, int64_t end, const float* weight, const float* bias, float eps,
          int is_layer_norm) {
  const RowPlace place(out);
  const int64_t width = in.width;
  for (int64_t row = begin; row < end; row++) {
    const float* x = f32_row(in, row);
    vf sum = vset(0.0f), square = vset(0.0f);
    for (int64_t i = 0; i < width; i += 16) sum = vadd(sum, vload(x + i));
    const vf mean = vset(is_layer_norm ? vsum(sum) / (float)width : 0.0f);
    for (int64_t i = 0; i < width; i += 16) {
      const vf centred = vsub(vload(x + i), mean);
      square = vfma(centred, centred, square);
    }
    const vf inverse = vset(1.0f / sqrtf(vsum(square) / (float)width + eps));
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
  for (int64_t row = begin; row < end; row++) pack_row(f32_row(in, row), out, row);
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
      return vdiv(x, vadd(vset(1.0f), vexp(vsub(vset(0.0f), x))));
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

void gated(const Rows& in, const Rows& out, int64_t begin, int64_t end, int activation) {
  const RowPlace place(out);
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
  const RowPlace place(out);
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
