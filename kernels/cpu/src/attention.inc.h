// Attention over paged keys and values: rotation and storing, then chunks of 128 keys for up to 12 rows, then merging.

namespace {

using namespace headrace;

// The nearest of the numbers that 8 bits hold, ties to even mantissas; what is larger than all of them becomes the largest, and what is not
// finite no number, whoever looks at it later. Without branches, so that a loop over it is one of vectors.
INLINE uint8_t to_e4m3(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Below 2 ** -6 all steps are 2 ** -9: those of float32 beside 2 ** 14.
  float size;
  memcpy(&size, &magnitude, 4);
  const float shifted = size + 16384.0f;
  uint32_t small;
  memcpy(&small, &shifted, 4);
  // Of the exponent's bias 127 - 7 go.
  const uint32_t normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  uint32_t code = magnitude < 0x3c800000 ? small - 0x46800000 : normal;
  code = magnitude > 0x43e00000 ? 0x7e : code;
  code = magnitude >= 0x7f800000 ? 0x7f : code;
  return (uint8_t)(code | ((bits >> 24) & 0x80));
}

// 16 pairs of a page, as products of bfloat16 take them.
INLINE vi vload_pairs(const uint16_t* p) { return viload(p); }
INLINE vi vload_pairs(const uint8_t* p) { return vload_e4m3(p); }

INLINE void norm_heads(float* heads, int64_t size, const float* weight, float eps, int64_t num_heads, int spans_heads) {
  const int64_t width = spans_heads ? size * num_heads : size, count = spans_heads ? 1 : num_heads;
  for (int64_t h = 0; h < count; h++) {
    float* x = heads + h * width;
    vf square = vset(0.0f);
    for (int64_t i = 0; i < width; i += 16) square = vfma(vload(x + i), vload(x + i), square);
    const vf inverse = vset(1.0f / sqrtf(vsum(square) / (float)width + eps));
    for (int64_t i = 0; i < width; i += 16) vstore(x + i, vmul(vmul(vload(x + i), inverse), vload(weight + i)));
  }
}

INLINE void rotate_heads(float* heads, int64_t num_heads, int64_t head_dim, const float* cos, const float* sin, int64_t num_pairs) {
  for (int64_t h = 0; h < num_heads; h++) {
    float *a = heads + h * head_dim, *b = a + num_pairs;
    int64_t i = 0;
    for (; i + 16 <= num_pairs; i += 16) {
      const vf x = vload(a + i), y = vload(b + i), c = vload(cos + i), s = vload(sin + i);
      vstore(a + i, vsub(vmul(x, c), vmul(y, s)));
      vstore(b + i, vfma(y, c, vmul(x, s)));
    }
    for (; i < num_pairs; i++) {
      const float x = a[i], y = b[i];
      a[i] = x * cos[i] - y * sin[i];
      b[i] = __builtin_fmaf(y, cos[i], x * sin[i]);
    }
  }
}

// Keys or values of a token as pages keep them.
INLINE void narrow(const float* x, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += 16) vstore_bf16(to + i, vload(x + i));
}
INLINE void narrow(const float* x, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i++) to[i] = to_e4m3(x[i]);
}

// A head's numbers into every other place, as values of two tokens lie.
INLINE void store_alternate(const uint16_t* from, int64_t count, bool is_second, uint16_t* to) {
  for (int64_t i = 0; i < count; i += 16) vstore_halves(to + 2 * i, from + i, is_second);
}
INLINE void store_alternate(const uint8_t* from, int64_t count, bool is_second, uint8_t* to) {
  for (int64_t i = 0; i < count; i++) to[2 * i + is_second] = from[i];
}

template <class Number>
void rotate_store(const Rows& qkv, const Rows& queries, const AttentionLayer& layer, const Pages& pages, const Step& step,
                  int64_t begin, int64_t end) {
  const int64_t hd = layer.head_dim, num_heads = layer.num_heads, num_kv_heads = layer.num_kv_heads, size = pages.page_size;
  for (int64_t token = begin; token < end; token++) {
    float* q = f32_row(qkv, token);
    float *k = q + num_heads * hd, *v = k + num_kv_heads * hd;
    if (layer.q_norm) norm_heads(q, hd, layer.q_norm, layer.norm_eps, num_heads, layer.norm_spans_heads);
    if (layer.k_norm) norm_heads(k, hd, layer.k_norm, layer.norm_eps, num_kv_heads, layer.norm_spans_heads);
    if (layer.num_pairs) {
      const float* cos = layer.cos + step.positions[token] * layer.num_pairs;
      const float* sin = layer.sin + step.positions[token] * layer.num_pairs;
      rotate_heads(q, num_heads + num_kv_heads, hd, cos, sin, layer.num_pairs);
    }
    narrow(q, num_heads * hd, queries.bf16 + token * queries.stride);
    const int64_t page = step.slot_mapping[token] / size, slot = step.slot_mapping[token] % size;
    for (int64_t h = 0; h < num_kv_heads; h++) {
      Number* keys = (Number*)pages.base + page * pages.page_stride + h * 2 * hd * size;
      Number* values = keys + hd * size;
      alignas(64) Number numbers[256];
      narrow(k + h * hd, hd, numbers);
      for (int64_t d = 0; d < hd; d += 2) memcpy(keys + d * size + 2 * slot, numbers + d, 2 * sizeof(Number));
      narrow(v + h * hd, hd, numbers);
      store_alternate(numbers, hd, slot % 2, values + slot / 2 * 2 * hd);
    }
  }
}

// Blocks of 16 keys of a chunk.
constexpr int BLOCKS = CHUNK / 16;

template <class Number>
struct ChunkPlace {
  const Number* keys[BLOCKS];
  const Number* values[BLOCKS];
  int num_blocks;
  // Keys of the chunk after it, where these are to be fetched meanwhile.
  const Number* next_keys[BLOCKS];
  bool fetches_ahead;
};

// Ask for a line of memory that will be read soon.
INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// A chunk's keys or values as bfloat16, where so many rows want them that they are better read once.
struct Widened {
  alignas(64) uint16_t numbers[CHUNK * 256];
};

// More rows than these take several turns over a chunk, each of which would read 8 bits anew.
constexpr int DIRECT_ROWS = 3;

// As in pages of 16 tokens.
INLINE ChunkPlace<uint16_t> widen_keys(const ChunkPlace<uint8_t>& place, int64_t hd, int64_t page_size, Widened& widened) {
  ChunkPlace<uint16_t> out;
  out.num_blocks = place.num_blocks;
  out.fetches_ahead = false;
  for (int block = 0; block < BLOCKS; block++) {
    // One past the end repeats the last.
    uint16_t* to = widened.numbers + (block < place.num_blocks ? block : place.num_blocks - 1) * 16 * hd;
    out.keys[block] = to;
    if (block >= place.num_blocks) continue;
    for (int64_t pair = 0; pair < hd / 2; pair++) vistore(to + 32 * pair, vload_e4m3(place.keys[block] + pair * 2 * page_size));
  }
  return out;
}

INLINE ChunkPlace<uint16_t> widen_values(const ChunkPlace<uint8_t>& place, int64_t hd, Widened& widened) {
  ChunkPlace<uint16_t> out;
  out.num_blocks = place.num_blocks;
  out.fetches_ahead = false;
  for (int block = 0; block < place.num_blocks; block++) {
    uint16_t* to = widened.numbers + block * 16 * hd;
    out.values[block] = to;
    for (int64_t i = 0; i < 16 * hd; i += 32) vistore(to + i, vload_e4m3(place.values[block] + i));
  }
  return out;
}

// Scores of R rows against D blocks of keys, as products give them; each row's largest ones by lane are taken up into `largest`.
template <int R, int D, class Number>
ALONE void scores(const uint16_t* const* queries, const ChunkPlace<Number>& place, int block, int64_t hd, int64_t page_size,
                  bool fetches_values, float (*out)[CHUNK], float (*largest)[16]) {
  vf sum[R][D];
  UNROLLED for (int r = 0; r < R; r++) {
    UNROLLED for (int d = 0; d < D; d++) sum[r][d] = vset(0.0f);
  }
  const Number* from[D];
  UNROLLED for (int d = 0; d < D; d++) from[d] = place.keys[block + d];
  for (int64_t pair = 0; pair < hd / 2; pair++) {
    vi keys[D];
    UNROLLED for (int d = 0; d < D; d++) keys[d] = vload_pairs(from[d] + pair * 2 * page_size);
    if (fetches_values) {
      UNROLLED for (int d = 0; d < D; d++) fetch(place.values[block + d] + 32 * pair);
    }
    UNROLLED for (int r = 0; r < R; r++) {
      uint32_t two;
      memcpy(&two, queries[r] + 2 * pair, 4);
      UNROLLED for (int d = 0; d < D; d++) sum[r][d] = vdot2(sum[r][d], keys[d], two);
    }
  }
  UNROLLED for (int r = 0; r < R; r++) {
    vf lanes = vload(largest[r]);
    UNROLLED for (int d = 0; d < D; d++) {
      vstore(out[r] + 16 * (block + d), sum[r][d]);
      lanes = vmax(lanes, sum[r][d]);
    }
    vstore(largest[r], lanes);
  }
}

// Less than any score.
constexpr float NOTHING_SEEN = -3.4e38f;

// What some chunks give the rows of a tile, a row a lane: the largest score (in units of the base-2 logarithm), the sum of weights; and
// the weighted sums of values [head_dim].
struct Partials {
  alignas(64) float maximum[16];
  alignas(64) float weight[16];
  float* sums[ATTEND_ROWS];
};

// Before the first chunk. What is taken up first is so taken as it is, whoever merges it.
INLINE void see_nothing(Partials& total) {
  vstore(total.maximum, vset(NOTHING_SEEN));
  vstore(total.weight, vset(0.0f));
}

// How a tile's rows take up one more chunk: sums = sums * keep + the chunk's sums * take.
struct Uptake {
  alignas(64) float keep[16];
  alignas(64) float take[16];
};

// Take the largest scores of a chunk up into those of the chunks before.
INLINE void take_up_maximums(Partials& total, const float* chunk_maximum, Uptake& uptake) {
  const vf maximum = vload(chunk_maximum), before = vload(total.maximum), largest = vmax(before, maximum);
  vstore(uptake.keep, vexp2(vsub(before, largest)));
  vstore(uptake.take, vexp2(vsub(maximum, largest)));
  vstore(total.maximum, largest);
}

INLINE void take_up_weights(Partials& total, const float* chunk_weight, const Uptake& uptake) {
  vstore(total.weight, vfma(vload(total.weight), vload(uptake.keep), vmul(vload(chunk_weight), vload(uptake.take))));
}

INLINE void take_up_sums(float* total, vf sums, float keep, float take) {
  vstore(total, vfma(vload(total), vset(keep), vmul(sums, vset(take))));
}

// A chunk's scores on their way to weights, 2 ** (score * factor - maximum), and the sums of these.
struct Softmax {
  float factor;
  alignas(64) float maximum[16];
  alignas(64) float weight_sum[16];
  // What is added to scores: minus the maximum, and minus 6, the logarithm of 64.
  float shift[16];
  alignas(64) float score[ATTEND_ROWS][CHUNK];
  alignas(64) uint16_t weight[ATTEND_ROWS][CHUNK];
};

template <int R>
INLINE void make_weights(Softmax& softmax, int row, int block) {
  const vf factor = vset(softmax.factor);
  for (int r = row; r < row + R; r++) {
    const vf score = vload(softmax.score[r] + 16 * block);
    vstore_bf16(softmax.weight[r] + 16 * block, vexp2_64(vfma(score, factor, vset(softmax.shift[r]))));
  }
}

// Weighted sums of a chunk's values: rows [row, row + R), D blocks of 16 dimensions from `dim`, taken up into `sums`. The first dimensions
// make a block's weights while they multiply the block before it, a row after two values: exponentials mostly run where products do not,
// but only those that are near enough.
template <int R, int D, class Number>
ALONE void weighted(Softmax& softmax, const ChunkPlace<Number>& place, int64_t hd, int64_t page_size, int64_t dim, const Uptake& uptake,
                    float* const* sums, int row) {
  vf sum[R][D];
  UNROLLED for (int r = 0; r < R; r++) {
    UNROLLED for (int d = 0; d < D; d++) sum[r][d] = vset(0.0f);
  }
  for (int block = 0; block < place.num_blocks; block++) {
    const bool makes = dim == 0 && block + 1 < place.num_blocks;
    const Number* values = place.values[block] + 2 * dim;
    const Number* ahead = place.fetches_ahead && row == 0 ? place.next_keys[block] : nullptr;
    for (int pair = 0; pair < 8; pair++) {
      if (ahead) {
        UNROLLED for (int d = 0; d < D; d++) fetch(ahead + (dim / 2 + pair * D + d) * 2 * page_size);
      }
      vi v[D];
      UNROLLED for (int d = 0; d < D; d++) v[d] = vload_pairs(values + pair * 2 * hd + 32 * d);
      UNROLLED for (int r = 0; r < R; r++) {
        uint32_t two;
        memcpy(&two, softmax.weight[row + r] + block * 16 + 2 * pair, 4);
        UNROLLED for (int d = 0; d < D; d++) sum[r][d] = vdot2(sum[r][d], v[d], two);
      }
      if (makes && pair < R) make_weights<1>(softmax, row + pair, block + 1);
    }
  }
  UNROLLED for (int r = 0; r < R; r++) {
    float* total = sums[row + r] + dim;
    UNROLLED for (int d = 0; d < D; d++) take_up_sums(total + 16 * d, sum[r][d], uptake.keep[row + r], uptake.take[row + r]);
  }
}

constexpr float LOG2_E = 1.44269504088896341f;

// A tile of rows on its way through the chunks of its sequence.
struct Tile {
  int count;
  int head_dim;
  const uint16_t* queries[ATTEND_ROWS];
  int32_t position[ATTEND_ROWS];  // of the row's token in its sequence
};

// Caps and hides a row's scores against a chunk: soft caps are put on, and what the token does not see becomes minus infinity.
INLINE void revise_scores(const AttentionLayer& layer, int32_t position, int32_t start, int num_blocks, float* score,
                          float* largest) {
  const int32_t high = position + 1, low = layer.window ? high - layer.window : 0;
  vf lanes = vset(-INFINITY);
  for (int block = 0; block < num_blocks; block++) {
    vf s = vload(score + 16 * block);
    if (layer.soft_cap > 0.0f) {
      s = vmul(vset(layer.soft_cap * LOG2_E), vtanh(vmul(s, vset(layer.scale / layer.soft_cap))));
    } else if (layer.scale <= 0.0f) {
      s = vmul(s, vset(layer.scale * LOG2_E));
    }
    s = vselect(vbetween(start + 16 * block, low, high), s, vset(-INFINITY));
    vstore(score + 16 * block, s);
    lanes = vmax(lanes, s);
  }
  vstore(largest, lanes);
}

// Take the largest of rows' scores from what they are by lane.
template <int R>
INLINE void find_maximums(const AttentionLayer& layer, const Tile& tile, int row, int32_t start, int num_blocks, float (*largest)[16],
                          Softmax& softmax) {
  const bool is_revised = layer.soft_cap > 0.0f || layer.scale <= 0.0f;
  for (int r = 0; r < R; r++) {
    const int32_t position = tile.position[row + r];
    const bool sees_all = position + 1 >= start + 16 * num_blocks && (!layer.window || position + 1 - layer.window <= start);
    if (is_revised || !sees_all) revise_scores(layer, position, start, num_blocks, softmax.score[row + r], largest[r]);
    const float maximum = vmaximum(vload(largest[r])) * softmax.factor;
    // A chunk that a row does not see; a NaN goes on.
    softmax.maximum[row + r] = maximum < NOTHING_SEEN ? NOTHING_SEEN : maximum;
    softmax.shift[row + r] = -6.0f - softmax.maximum[row + r];
  }
}

// Weights are summed as they are used, rounded.
template <int R>
INLINE void sum_weights(Softmax& softmax, int row, int num_blocks) {
  for (int r = row; r < row + R; r++) {
    uint16_t* weight = softmax.weight[r];
    if (num_blocks % 2) memset(weight + 16 * num_blocks, 0, 32);
    vf sum = vset(0.0f);
    for (int block = 0; block < num_blocks; block += 2) sum = vdot2(sum, viload(weight + 16 * block), 0x3f803f80);
    softmax.weight_sum[r] = vsum(sum);
  }
}

// Scores of rows [row, row + R) of a tile against a chunk, all that makes weights of them, and the first weights: what waits for one
// another here is computed while the next rows' products are.
template <int R, class Number>
INLINE void score_rows(const AttentionLayer& layer, const Tile& tile, const ChunkPlace<Number>& place, int row, int32_t start,
                       int64_t size, bool fetches_values, Softmax& softmax) {
  alignas(64) float largest[R][16];
  for (int r = 0; r < R; r++) vstore(largest[r], vset(-INFINITY));
  // The first rows' scores fetch the values.
  const bool fetches = fetches_values && row == 0;
  int block = 0;
  if constexpr (TILE_ROWS == 12) {
    for (; place.num_blocks - block > 2; block += 4) {
      scores<R, 4>(tile.queries + row, place, block, tile.head_dim, size, fetches, softmax.score + row, largest);
    }
  }
  for (; block < place.num_blocks; block += 2) {
    scores<R, 2>(tile.queries + row, place, block, tile.head_dim, size, fetches, softmax.score + row, largest);
  }
  find_maximums<R>(layer, tile, row, start, place.num_blocks, largest, softmax);
  make_weights<R>(softmax, row, 0);
}

template <class Number>
INLINE void score_tile(const AttentionLayer& layer, const Tile& tile, const ChunkPlace<Number>& place, int32_t start, int64_t size,
                       bool fetches_values, Softmax& softmax) {
  softmax.factor = layer.soft_cap > 0.0f || layer.scale <= 0.0f ? 1.0f : layer.scale * LOG2_E;
  vstore(softmax.maximum, vset(NOTHING_SEEN));
  vstore(softmax.weight_sum, vset(0.0f));
  int row = 0;
  if constexpr (TILE_ROWS == 12) {
    for (; tile.count - row >= 6; row += 6) score_rows<6>(layer, tile, place, row, start, size, fetches_values, softmax);
  }
  for (; tile.count - row >= 3; row += 3) score_rows<3>(layer, tile, place, row, start, size, fetches_values, softmax);
  for (; row < tile.count; row++) score_rows<1>(layer, tile, place, row, start, size, fetches_values, softmax);
}

template <int R, class Number>
INLINE void weighted_rows(Softmax& softmax, const ChunkPlace<Number>& place, int64_t hd, int64_t page_size, const Uptake& uptake,
                          float* const* sums, int row) {
  int64_t dim = 0;
  if constexpr (TILE_ROWS == 12) {
    for (; dim + 64 <= hd; dim += 64) weighted<R, 4>(softmax, place, hd, page_size, dim, uptake, sums, row);
  }
  for (; dim + 32 <= hd; dim += 32) weighted<R, 2>(softmax, place, hd, page_size, dim, uptake, sums, row);
  for (; dim < hd; dim += 16) weighted<R, 1>(softmax, place, hd, page_size, dim, uptake, sums, row);
  sum_weights<R>(softmax, row, place.num_blocks);
}

// Weighted sums of a chunk's values for all rows of a tile, taken up into `sums`.
template <class Number>
INLINE void weigh_tile(Softmax& softmax, int count, const ChunkPlace<Number>& place, int64_t hd, int64_t size, const Uptake& uptake,
                       float* const* sums) {
  int row = 0;
  if constexpr (TILE_ROWS == 12) {
    for (; count - row >= 6; row += 6) weighted_rows<6>(softmax, place, hd, size, uptake, sums, row);
  }
  for (; count - row >= 3; row += 3) weighted_rows<3>(softmax, place, hd, size, uptake, sums, row);
  for (; row < count; row++) weighted_rows<1>(softmax, place, hd, size, uptake, sums, row);
}

template <class Number>
INLINE void place_chunk(const AttendContext& context, const int64_t* table, int kv_head, int chunk, int next_chunk, int32_t last,
                        ChunkPlace<Number>& place) {
  const int64_t hd = context.layer->head_dim, size = context.pages.page_size;
  // Pages hold 16, 32, 64 or 128 tokens.
  const int page_shift = __builtin_ctzll((uint64_t)size);
  const int32_t start = chunk * CHUNK;
  const Number* base = (const Number*)context.pages.base;
  const int32_t num_keys = last + 1 - start < CHUNK ? last + 1 - start : CHUNK;
  place.num_blocks = (num_keys + 15) / 16;
  for (int block = 0; block < BLOCKS; block++) {
    // Two or four blocks are computed together; those past the end repeat the last and are never looked at.
    const int64_t key = start + 16 * (block < place.num_blocks ? block : place.num_blocks - 1);
    const int64_t slot = key & (size - 1);
    const Number* keys = base + table[key >> page_shift] * context.pages.page_stride + kv_head * 2 * hd * size;
    place.keys[block] = keys + 2 * slot;
    place.values[block] = keys + hd * size + slot * hd;
  }
  place.fetches_ahead = next_chunk > chunk;
  for (int block = 0; block < (place.fetches_ahead ? BLOCKS : 0); block++) {
    const int64_t key = (int64_t)next_chunk * CHUNK + 16 * block;
    place.next_keys[block] =
        base + table[key >> page_shift] * context.pages.page_stride + kv_head * 2 * hd * size + 2 * (key & (size - 1));
  }
}

template <class Number>
void attend_chunk(const AttendContext& context, const Tile& tile, const int64_t* table, int kv_head, int chunk, int next_chunk,
                  Partials& total) {
  const AttentionLayer& layer = *context.layer;
  const int64_t hd = layer.head_dim, size = context.pages.page_size;
  int32_t last = 0;
  for (int r = 0; r < tile.count; r++) last = tile.position[r] > last ? tile.position[r] : last;
  ChunkPlace<Number> place;
  place_chunk(context, table, kv_head, chunk, next_chunk, last, place);
  Softmax softmax;
  Widened widened;
  const int32_t start = chunk * CHUNK;
  const bool is_widened = sizeof(Number) == 1 && tile.count > DIRECT_ROWS;
  if constexpr (sizeof(Number) == 1) {
    if (is_widened) score_tile(layer, tile, widen_keys(place, hd, size, widened), start, 16, false, softmax);
  }
  if (!is_widened) score_tile(layer, tile, place, start, size, next_chunk >= chunk, softmax);
  Uptake uptake;
  take_up_maximums(total, softmax.maximum, uptake);
  if constexpr (sizeof(Number) == 1) {
    if (is_widened) weigh_tile(softmax, tile.count, widen_values(place, hd, widened), hd, 16, uptake, total.sums);
  }
  if (!is_widened) weigh_tile(softmax, tile.count, place, hd, size, uptake, total.sums);
  take_up_weights(total, softmax.weight_sum, uptake);
}

// Write a row's result: what it has summed by the weight of it all.
INLINE void finish_row(const AttendContext& context, Partials& total, int r, int64_t token, int64_t head) {
  const AttentionLayer& layer = *context.layer;
  const int64_t hd = layer.head_dim;
  float* sums = total.sums[r];
  if (layer.sinks) {
    // A sink takes weight and gives nothing.
    const float sink = layer.sinks[head] * LOG2_E, maximum = total.maximum[r] > sink ? total.maximum[r] : sink;
    alignas(64) float factors[16] = {total.maximum[r] - maximum, sink - maximum};
    vstore(factors, vexp2(vload(factors)));
    total.weight[r] = __builtin_fmaf(total.weight[r], factors[0], factors[1]);
    for (int64_t d = 0; d < hd; d += 16) vstore(sums + d, vmul(vload(sums + d), vset(factors[0])));
  }
  const vf inverse = vset(1.0f / total.weight[r]);
  float* out = f32_row(context.out, token) + head * hd;
  for (int64_t d = 0; d < hd; d += 16) vstore(out + d, vmul(vload(sums + d), inverse));
}

// A window may hide all of a chunk from all rows: the first one that it does not.
INLINE int first_seen(const AttentionLayer& layer, const Tile& tile, int first_chunk) {
  if (!layer.window) return first_chunk;
  int32_t position = tile.position[0];
  for (int r = 1; r < tile.count; r++) position = tile.position[r] < position ? tile.position[r] : position;
  const int32_t low = position + 1 - layer.window;
  return low > 0 && low / CHUNK > first_chunk ? low / CHUNK : first_chunk;
}

// A member's rows, which are the tile's from `begin` on, over the chunks that are its own.
template <class Number>
void attend_alone(const AttendContext& context, const AttendMember& member, const Tile& tile, int begin, int first_chunk, int kv_head,
                  Partials& total) {
  Tile own;
  own.count = member.count;
  own.head_dim = tile.head_dim;
  Partials part;
  see_nothing(part);
  for (int r = 0; r < member.count; r++) {
    own.queries[r] = tile.queries[begin + r];
    own.position[r] = tile.position[begin + r];
    part.maximum[r] = total.maximum[begin + r];
    part.weight[r] = total.weight[begin + r];
    part.sums[r] = total.sums[begin + r];
  }
  const int64_t* table = context.step->page_tables + member.row * context.step->table_stride;
  for (int chunk = first_seen(*context.layer, own, first_chunk); chunk < member.end_chunk; chunk++) {
    attend_chunk<Number>(context, own, table, kv_head, chunk, chunk, part);
  }
  for (int r = 0; r < member.count; r++) {
    total.maximum[begin + r] = part.maximum[r];
    total.weight[begin + r] = part.weight[r];
  }
}

template <class Number>
void attend(const AttendContext& context, const AttendUnit& unit, int kv_head) {
  const AttentionLayer& layer = *context.layer;
  const Step& step = *context.step;
  const int64_t hd = layer.head_dim, group = layer.num_heads / layer.num_kv_heads;
  const AttendMember* members = context.members + unit.first_member;
  alignas(64) float sums[ATTEND_ROWS][256];
  Partials total;
  see_nothing(total);
  Tile tile;
  tile.count = 0;
  tile.head_dim = (int)hd;
  int64_t tokens[ATTEND_ROWS], heads[ATTEND_ROWS];
  for (int m = 0; m < unit.num_members; m++) {
    for (int pair = members[m].first; pair < members[m].first + members[m].count; pair++) {
      const int r = tile.count++;
      const int64_t token = pair / group;
      heads[r] = kv_head * group + pair % group;
      tokens[r] = members[m].first_token + token;
      tile.queries[r] = context.queries.bf16 + tokens[r] * context.queries.stride + heads[r] * hd;
      tile.position[r] = (int32_t)(step.row_starts[members[m].row] + token);
      total.sums[r] = sums[r];
      memset(sums[r], 0, sizeof(float) * (size_t)hd);
    }
  }
  const int64_t* table = step.page_tables + members[0].row * step.table_stride;
  for (int chunk = first_seen(layer, tile, unit.first_chunk); chunk < unit.shared_end; chunk++) {
    // What a prompt's rows read stays in a cache for the rows after them; what decoding rows read comes from memory.
    const int next_chunk = !unit.is_read_once ? -1 : chunk + 1 < unit.shared_end ? chunk + 1 : chunk;
    attend_chunk<Number>(context, tile, table, kv_head, chunk, next_chunk, total);
  }
  for (int m = 0, begin = 0; m < unit.num_members; begin += members[m++].count) {
    if (members[m].end_chunk > unit.shared_end) attend_alone<Number>(context, members[m], tile, begin, unit.shared_end, kv_head, total);
  }
  for (int r = 0; r < tile.count; r++) {
    if (unit.partial < 0) {
      finish_row(context, total, r, tokens[r], heads[r]);
    } else {
      float* out = context.partials + ((unit.partial + r) * layer.num_kv_heads + kv_head) * (hd + PARTIAL_HEAD);
      out[0] = total.maximum[r];
      out[1] = total.weight[r];
      memcpy(out + PARTIAL_HEAD, sums[r], sizeof(float) * (size_t)hd);
    }
  }
}

// Merge the chunks of one row's split work, in order: `units` are one chunk each, of one member.
void merge(const AttendContext& context, const AttendUnit* units, int64_t num_units, int kv_head) {
  const AttentionLayer& layer = *context.layer;
  const int64_t hd = layer.head_dim, group = layer.num_heads / layer.num_kv_heads;
  alignas(64) float sums[ATTEND_ROWS][256];
  Partials total;
  see_nothing(total);
  const AttendMember& member = context.members[units[0].first_member];
  const int count = member.count;
  for (int r = 0; r < count; r++) {
    total.sums[r] = sums[r];
    memset(sums[r], 0, sizeof(float) * (size_t)hd);
  }
  for (int64_t u = 0; u < num_units; u++) {
    alignas(64) float maximums[16] = {}, weights[16] = {};
    Uptake uptake;
    const float* parts[ATTEND_ROWS];
    for (int r = 0; r < count; r++) {
      parts[r] = context.partials + ((units[u].partial + r) * layer.num_kv_heads + kv_head) * (hd + PARTIAL_HEAD);
      maximums[r] = parts[r][0];
      weights[r] = parts[r][1];
    }
    take_up_maximums(total, maximums, uptake);
    take_up_weights(total, weights, uptake);
    for (int r = 0; r < count; r++) {
      for (int64_t d = 0; d < hd; d += 16) {
        take_up_sums(sums[r] + d, vload(parts[r] + PARTIAL_HEAD + d), uptake.keep[r], uptake.take[r]);
      }
    }
  }
  for (int r = 0; r < count; r++) {
    finish_row(context, total, r, member.first_token + (member.first + r) / group, kv_head * group + (member.first + r) % group);
  }
}

}  // namespace
