// Attention over paged keys and values: rotation and storing, then chunks of 128 keys for up to 12 rows, then merging.

namespace {

using namespace headrace;

INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

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
    for (int64_t i = 0; i < num_heads * hd; i += 16) vstore_bf16(queries.bf16 + token * queries.stride + i, vload(q + i));
    const int64_t page = step.slot_mapping[token] / size, slot = step.slot_mapping[token] % size;
    for (int64_t h = 0; h < num_kv_heads; h++) {
      uint16_t* keys = pages.base + page * pages.page_stride + h * 2 * hd * size;
      uint16_t* values = keys + hd * size;
      for (int64_t d = 0; d < hd; d += 2) {
        keys[d * size + 2 * slot] = to_bf16(k[h * hd + d]);
        keys[d * size + 2 * slot + 1] = to_bf16(k[h * hd + d + 1]);
      }
      for (int64_t d = 0; d < hd; d++) values[(slot / 2) * 2 * hd + 2 * d + slot % 2] = to_bf16(v[h * hd + d]);
    }
  }
}

// Blocks of 16 keys of a chunk.
constexpr int BLOCKS = CHUNK / 16;

struct ChunkPlace {
  const uint16_t* keys[BLOCKS];
  const uint16_t* values[BLOCKS];
  int num_blocks;
};

// Scores of R rows against two blocks of keys.
template <int R>
INLINE void scores(const uint16_t* const* queries, const uint16_t* k0, const uint16_t* k1, int64_t hd, int64_t page_size,
                   float (*out)[CHUNK], int first) {
  vf sum[R][2];
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = vset(0.0f);
  for (int64_t pair = 0; pair < hd / 2; pair++) {
    const vi a = viload(k0 + pair * 2 * page_size), b = viload(k1 + pair * 2 * page_size);
    for (int r = 0; r < R; r++) {
      uint32_t two;
      memcpy(&two, queries[r] + 2 * pair, 4);
      sum[r][0] = vdot2(sum[r][0], a, two);
      sum[r][1] = vdot2(sum[r][1], b, two);
    }
  }
  for (int r = 0; r < R; r++) {
    vstore(out[r] + first, sum[r][0]);
    vstore(out[r] + first + 16, sum[r][1]);
  }
}

// Weighted sums of values: R rows, D blocks of 16 dimensions from `dim`.
template <int R, int D>
INLINE void weighted(const uint16_t (*weights)[CHUNK], const ChunkPlace& place, int64_t hd, int64_t dim, float* const* out) {
  vf sum[R][D];
  for (int r = 0; r < R; r++) {
    for (int d = 0; d < D; d++) sum[r][d] = vset(0.0f);
  }
  for (int block = 0; block < place.num_blocks; block++) {
    const uint16_t* values = place.values[block] + 2 * dim;
    for (int pair = 0; pair < 8; pair++) {
      vi v[D];
      for (int d = 0; d < D; d++) v[d] = viload(values + pair * 2 * hd + 32 * d);
      for (int r = 0; r < R; r++) {
        uint32_t two;
        memcpy(&two, weights[r] + block * 16 + 2 * pair, 4);
        for (int d = 0; d < D; d++) sum[r][d] = vdot2(sum[r][d], v[d], two);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    for (int d = 0; d < D; d++) vstore(out[r] + dim + 16 * d, sum[r][d]);
  }
}

template <int R>
INLINE void weighted_rows(const uint16_t (*weights)[CHUNK], const ChunkPlace& place, int64_t hd, float* const* out) {
  int64_t dim = 0;
  if constexpr (TILE_ROWS == 12) {
    for (; dim + 64 <= hd; dim += 64) weighted<R, 4>(weights, place, hd, dim, out);
  }
  for (; dim + 32 <= hd; dim += 32) weighted<R, 2>(weights, place, hd, dim, out);
  for (; dim < hd; dim += 16) weighted<R, 1>(weights, place, hd, dim, out);
}

constexpr float LOG2_E = 1.44269504088896341f;

// What one chunk gives a row: the largest score (in units of the base-2 logarithm), the sum of weights, the weighted sum of values
// [head_dim].
struct Partial {
  float maximum;
  float weight;
  float* sums;
};

// 2 ** (x - maximum) for both at once.
INLINE void rescale(float x, float y, float maximum, float* factors) {
  float lanes[16] = {};
  lanes[0] = x - maximum;
  lanes[1] = y - maximum;
  vstore(lanes, vexp2(vload(lanes)));
  factors[0] = lanes[0];
  factors[1] = lanes[1];
}

INLINE void merge_partial(Partial& total, const Partial& part, int64_t hd) {
  if (part.weight == 0.0f) return;
  if (total.weight == 0.0f) {
    total.maximum = part.maximum;
    total.weight = part.weight;
    memcpy(total.sums, part.sums, sizeof(float) * (size_t)hd);
    return;
  }
  float factors[2];
  const float maximum = total.maximum > part.maximum ? total.maximum : part.maximum;
  rescale(total.maximum, part.maximum, maximum, factors);
  total.maximum = maximum;
  total.weight = __builtin_fmaf(total.weight, factors[0], part.weight * factors[1]);
  for (int64_t d = 0; d < hd; d += 16) {
    vstore(total.sums + d, vfma(vload(total.sums + d), vset(factors[0]), vmul(vload(part.sums + d), vset(factors[1]))));
  }
}

// A tile of rows on its way through the chunks of its sequence.
struct Tile {
  int count;
  int head_dim;
  const uint16_t* queries[ATTEND_ROWS];
  int32_t position[ATTEND_ROWS];  // of the row's token in its sequence
};

void attend_chunk(const AttendContext& context, const Tile& tile, const int64_t* table, int kv_head, int chunk, Partial* parts) {
  const AttentionLayer& layer = *context.layer;
  const int64_t hd = layer.head_dim, size = context.pages.page_size;
  const int32_t start = chunk * CHUNK;
  int32_t last = 0, first_seen = tile.position[0], all_see = tile.position[0];
  for (int r = 0; r < tile.count; r++) {
    last = tile.position[r] > last ? tile.position[r] : last;
    first_seen = tile.position[r] < first_seen ? tile.position[r] : first_seen;
  }
  all_see = first_seen;
  ChunkPlace place;
  const int32_t num_keys = last + 1 - start < CHUNK ? last + 1 - start : CHUNK;
  place.num_blocks = (num_keys + 15) / 16;
  for (int block = 0; block < BLOCKS; block++) {
    // Pairs of blocks are computed together; one past the end repeats the last and is never looked at.
    const int64_t key = start + 16 * (block < place.num_blocks ? block : place.num_blocks - 1);
    const uint16_t* keys = context.pages.base + table[key / size] * context.pages.page_stride + kv_head * 2 * hd * size;
    place.keys[block] = keys + 2 * (key % size);
    place.values[block] = keys + hd * size + (key % size) * hd;
  }
  alignas(64) float score[ATTEND_ROWS][CHUNK];
  alignas(64) uint16_t weight[ATTEND_ROWS][CHUNK];
  for (int block = 0; block < place.num_blocks; block += 2) {
    const uint16_t *k0 = place.keys[block], *k1 = place.keys[block + 1];
    int r = 0;
    if constexpr (TILE_ROWS == 12) {
      for (; tile.count - r >= 12; r += 12) scores<12>(tile.queries + r, k0, k1, hd, size, score + r, 16 * block);
      for (; tile.count - r >= 4; r += 4) scores<4>(tile.queries + r, k0, k1, hd, size, score + r, 16 * block);
    }
    for (; tile.count - r >= 3; r += 3) scores<3>(tile.queries + r, k0, k1, hd, size, score + r, 16 * block);
    for (; r < tile.count; r++) scores<1>(tile.queries + r, k0, k1, hd, size, score + r, 16 * block);
  }
  const int32_t end = start + 16 * place.num_blocks;
  for (int r = 0; r < tile.count; r++) {
    const int32_t high = tile.position[r] + 1, low = layer.window ? high - layer.window : 0;
    const bool is_whole = end <= all_see + 1 && start >= low;
    vf largest = vset(-INFINITY);
    for (int block = 0; block < place.num_blocks; block++) {
      vf s = vload(score[r] + 16 * block);
      if (layer.soft_cap > 0.0f) {
        s = vmul(vset(layer.soft_cap * LOG2_E), vtanh(vmul(s, vset(layer.scale / layer.soft_cap))));
      } else {
        s = vmul(s, vset(layer.scale * LOG2_E));
      }
      if (!is_whole) s = vselect(vbetween(start + 16 * block, low, high), s, vset(-INFINITY));
      vstore(score[r] + 16 * block, s);
      largest = vmax(largest, s);
    }
    const float maximum = vmaximum(largest);
    parts[r].maximum = maximum;
    // Not by the maximum: that of scores which are all NaN may be what hides the other lanes.
    if (high <= start || low >= end) {
      parts[r].weight = 0.0f;
      memset(weight[r], 0, sizeof(weight[r]));
      continue;
    }
    vf total = vset(0.0f);
    for (int block = 0; block < place.num_blocks; block++) {
      vf p = vexp2(vsub(vload(score[r] + 16 * block), vset(maximum)));
      if (!is_whole) p = vselect(vbetween(start + 16 * block, low, high), p, vset(0.0f));
      vstore_bf16(weight[r] + 16 * block, p);
      // Weights are summed as they are used, rounded.
      total = vadd(total, vload_bf16(weight[r] + 16 * block));
    }
    parts[r].weight = vsum(total);
  }
  float* sums[ATTEND_ROWS];
  for (int r = 0; r < tile.count; r++) sums[r] = parts[r].sums;
  int r = 0;
  if constexpr (TILE_ROWS == 12) {
    for (; tile.count - r >= 6; r += 6) weighted_rows<6>(weight + r, place, hd, sums + r);
  }
  for (; tile.count - r >= 3; r += 3) weighted_rows<3>(weight + r, place, hd, sums + r);
  for (; r < tile.count; r++) weighted_rows<1>(weight + r, place, hd, sums + r);
}

INLINE void finish_row(const AttendContext& context, Partial& total, int64_t token, int64_t head) {
  const AttentionLayer& layer = *context.layer;
  const int64_t hd = layer.head_dim;
  if (layer.sinks) {
    // A sink takes weight and gives nothing.
    float factors[2];
    const float sink = layer.sinks[head] * LOG2_E, maximum = total.maximum > sink ? total.maximum : sink;
    rescale(total.maximum, sink, maximum, factors);
    total.weight = __builtin_fmaf(total.weight, factors[0], factors[1]);
    for (int64_t d = 0; d < hd; d += 16) vstore(total.sums + d, vmul(vload(total.sums + d), vset(factors[0])));
  }
  const vf inverse = vset(1.0f / total.weight);
  float* out = f32_row(context.out, token) + head * hd;
  for (int64_t d = 0; d < hd; d += 16) vstore(out + d, vmul(vload(total.sums + d), inverse));
}

void attend(const AttendContext& context, const AttendUnit& unit, int kv_head) {
  const AttentionLayer& layer = *context.layer;
  const Step& step = *context.step;
  const int64_t hd = layer.head_dim, group = layer.num_heads / layer.num_kv_heads, start = step.row_starts[unit.row];
  const int64_t* table = step.page_tables + unit.row * step.table_stride;
  alignas(64) float part_sums[ATTEND_ROWS][256], total_sums[ATTEND_ROWS][256];
  Partial parts[ATTEND_ROWS], totals[ATTEND_ROWS];
  Tile tile;
  tile.count = unit.count;
  int64_t tokens[ATTEND_ROWS], heads[ATTEND_ROWS];
  for (int r = 0; r < unit.count; r++) {
    const int64_t token = (unit.first + r) / group;
    heads[r] = kv_head * group + (unit.first + r) % group;
    tokens[r] = unit.first_token + token;
    tile.queries[r] = context.queries.bf16 + tokens[r] * context.queries.stride + heads[r] * hd;
    tile.position[r] = (int32_t)(start + token);
    parts[r].sums = part_sums[r];
    totals[r] = {-INFINITY, 0.0f, total_sums[r]};
    memset(total_sums[r], 0, sizeof(float) * (size_t)hd);
  }
  // A window may hide all of a chunk from all rows.
  int first_chunk = unit.first_chunk;
  if (layer.window) {
    const int32_t low = tile.position[0] + 1 - layer.window;
    if (low > 0 && low / CHUNK > first_chunk) first_chunk = low / CHUNK;
  }
  for (int chunk = first_chunk; chunk < unit.end_chunk; chunk++) {
    attend_chunk(context, tile, table, kv_head, chunk, parts);
    for (int r = 0; r < unit.count; r++) merge_partial(totals[r], parts[r], hd);
  }
  for (int r = 0; r < unit.count; r++) {
    if (unit.partial < 0) {
      finish_row(context, totals[r], tokens[r], heads[r]);
    } else {
      float* out = context.partials + ((unit.partial + r) * layer.num_kv_heads + kv_head) * (hd + PARTIAL_HEAD);
      out[0] = totals[r].maximum;
      out[1] = totals[r].weight;
      memcpy(out + PARTIAL_HEAD, total_sums[r], sizeof(float) * (size_t)hd);
    }
  }
}

// Merge the chunks of one row's split work, in order: `units` are one chunk each.
void merge(const AttendContext& context, const AttendUnit* units, int64_t num_units, int kv_head) {
  const AttentionLayer& layer = *context.layer;
  const int64_t hd = layer.head_dim, group = layer.num_heads / layer.num_kv_heads;
  alignas(64) float sums[256];
  for (int r = 0; r < units[0].count; r++) {
    Partial total = {-INFINITY, 0.0f, sums};
    memset(sums, 0, sizeof(float) * (size_t)hd);
    for (int64_t u = 0; u < num_units; u++) {
      float* part = context.partials + ((units[u].partial + r) * layer.num_kv_heads + kv_head) * (hd + PARTIAL_HEAD);
      merge_partial(total, {part[0], part[1], part + PARTIAL_HEAD}, hd);
    }
    finish_row(context, total, units[0].first_token + (units[0].first + r) / group, kv_head * group + (units[0].first + r) % group);
  }
}

}  // namespace
