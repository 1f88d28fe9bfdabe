// The C interface of the library, and what its parts share. Every pointer handed in must live as long as the program.
//
// A program is a list of operations over values. A value has one row for each token of a step, or for each sampled token; its
// memory is a buffer, which values that do not live at the same time share. Rows are padded to 32 numbers.
#pragma once

#include <cstdint>

namespace headrace {

enum ValueKind : int32_t {
  KIND_F32 = 0,
  // int8 in groups of 32 with a scale and a middle each, as the products with integer codes want their input.
  KIND_Q8 = 1,
  KIND_BF16 = 2,
};

enum Domain : int32_t { DOMAIN_TOKENS = 0, DOMAIN_SAMPLED = 1 };

// Matrices are packed in panels of 32 outputs, two blocks of 16 lanes, so that a product reads one stream of memory. A panel is:
enum Format : int32_t {
  // [k][2][16] float
  FORMAT_F32 = 0,
  // [k/2][2][16][2] bfloat16
  FORMAT_BF16 = 1,
  // [k/32] groups of: nibbles [2][4][16][4] (of quads of k: the low ones are the even quads), then scales, then minimums
  FORMAT_Q4 = 2,
  // [k/32] groups of: codes [2][8][16][4], then scales, then minimums
  FORMAT_Q8 = 3,
};

enum Activation : int32_t { ACTIVATION_SILU = 0, ACTIVATION_GELU = 1, ACTIVATION_GELU_TANH = 2, ACTIVATION_RELU = 3 };

// A matrix [n, k] or a part of one, packed. Weight = scale * (code - zero), plus a minimum where there are minimums. Products count codes
// from 8 or 128, so these had better be about the middle.
// Scales and minimums of a group of 32 codes: [2][32/group][16] float16 or float.
struct Segment {
  int32_t format;
  int32_t n;
  int32_t k;            // padded to 32
  int32_t group;        // codes a scale: 16 or 32
  int32_t half_scales;  // scales and minimums are float16
  int32_t has_minimums;
  int32_t zero;
  int32_t out_offset;   // column of the first output
  const void* data;
};

// Bytes of a panel of 32 outputs.
inline int64_t unit_bytes(const Segment& segment) {
  if (segment.format == FORMAT_F32) return (int64_t)segment.k * 128;
  if (segment.format == FORMAT_BF16) return (int64_t)segment.k * 64;
  const int64_t scales = 2 * (32 / segment.group) * 16 * (segment.half_scales ? 2 : 4) * (segment.has_minimums ? 2 : 1);
  return segment.k / 32 * ((segment.format == FORMAT_Q4 ? 512 : 1024) + scales);
}

struct AttentionLayer {
  int32_t layer;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t num_pairs;  // rotated pairs of a head; 0: no rotation
  int32_t window;     // 0: all
  float scale;
  float soft_cap;  // 0: none
  float norm_eps;
  int32_t norm_spans_heads;
  int32_t only_sampled;  // whether outputs of sampled tokens alone are read
  const float* cos;  // [positions][num_pairs]
  const float* sin;
  const float* q_norm;
  const float* k_norm;
  const float* sinks;
};

// One step; see StepTensors in services/worker/layers/ops.py.
struct Step {
  int64_t num_tokens;
  int64_t num_rows;
  int64_t num_sampled;
  int64_t table_stride;
  const int64_t* token_ids;
  const int64_t* positions;
  const int64_t* slot_mapping;
  const int64_t* row_starts;
  const int64_t* row_counts;
  const int64_t* page_tables;
  const int64_t* sampled_tokens;
  float* logits;  // [num_sampled][logits_stride]
  int64_t logits_stride;
  int64_t* best;       // [num_sampled], where each row's largest logit is; the first of equals
  uint8_t* is_finite;  // [num_sampled], whether all of a row's logits are
};

// What goes with 32 codes of a row: number = scale * (code + middle), scale = root * 2 ** exponent, the root one of 1, 1.125 .. 1.875. Products
// multiply by powers of 2 without multiplying: a whole number added to the bits of 1.5 * 2 ** (23 + exponent) is added to that number in
// units of 2 ** exponent.
struct CodedGroup {
  int32_t base;          // these bits; those of a NaN where a number of the group is not finite
  int32_t start;         // `base` less 128 times the sum of the codes, since they meet unsigned bytes whose middle is 128
  uint32_t pair;         // two of 16 bits: below, the sum of the group's numbers over the scale; above, the middle
  uint16_t root_offset;  // which root, times the bytes of a vector of 32 floats
  uint16_t total;        // the sum of the group's numbers, as bfloat16
};

// Rows of a value, whatever its kind.
struct Rows {
  int32_t kind;
  int32_t width;   // numbers a row
  int64_t stride;  // numbers from row to row
  float* f32;
  uint16_t* bf16;
  // What belongs to a group lies by group, then by row, so that threads that make different groups write to different places.
  int8_t* q8;
  CodedGroup* groups;  // [stride/64, rounded up][capacity][2]: read two by two, they come by fewer lines of the cache
  int64_t capacity;    // rows
};

// What keys and values are kept as: bfloat16, or 8 bits with a sign, 4 of exponent and 3 of mantissa, largest 448, whose codes 0x7f and 0xff
// are no numbers.
enum PageFormat : int32_t { PAGES_BF16 = 0, PAGES_E4M3 = 1 };

// Keys and values of one layer: [num_pages][num_kv_heads]{keys [head_dim/2][page_size][2], values [page_size/2][head_dim][2]}.
struct Pages {
  void* base;           // uint16_t or uint8_t, by format
  int64_t page_stride;  // numbers from page to page
  int32_t page_size;
};

// Keys are attended to in chunks of this many, counted from the start of the sequence; a chunk's result does not depend on who else
// is computed, and chunks are merged in order. So a token's result is the same in prefill, decode and any batch.
constexpr int CHUNK = 128;

// Rows (a token and one of the query heads that share a key-value head) attended to together.
constexpr int ATTEND_ROWS = 12;

// Rows of one sequence in a piece of attention work.
struct AttendMember {
  int64_t row;         // of the step
  int64_t first_token; // flat index of the row's first token
  int32_t first;       // first (token, head) pair, counted within the row and the head group
  int32_t count;
  int32_t end_chunk;
};

// One piece of attention work: up to ATTEND_ROWS rows of one key-value head. The chunks before `shared_end` lie in the same pages for all
// of them, and are read once; then each member goes on alone, to its own end.
struct AttendUnit {
  int32_t first_member;
  int32_t num_members;
  int32_t first_chunk;
  int32_t shared_end;
  int32_t is_read_once;  // whether no other unit reads the same keys
  int64_t partial;     // where the result goes before it is merged; -1: straight to the output
};

constexpr int PARTIAL_HEAD = 16;  // floats before a partial's sums: maximum, weight; the rest is padding

struct AttendContext {
  const AttentionLayer* layer;
  Pages pages;
  const Step* step;
  const AttendMember* members;
  Rows queries;
  Rows out;
  float* partials;
};

// What a product does with its sums.
struct LinearTarget {
  const float* bias;  // by output column, or null
  float scale;        // with `accumulate`: of what is added to the output
  int32_t accumulate;
  int32_t activation;
};

// Tokens are drawn from rows in blocks of this many.
constexpr int64_t DRAW_BLOCK = 256;
constexpr int64_t DRAW_BINS = 2048;

// How one row's token is drawn; the uniform number is in [0, 1). 0 tokens keep all, as do a mass of 1 and a share of 0.
struct DrawParameters {
  float temperature;  // above 0
  int32_t top_k;
  float top_p;
  float min_p;
  double uniform;
};

// What a draw works in.
struct DrawScratch {
  float* maximums;  // [blocks][16]
  float* values;    // [tokens + 16]
  float* masses;    // [tokens + 16]
  double* bins;     // [DRAW_BINS]
  double* totals;   // [blocks]
};

// Rows to draw from, and which of them; arrays without a size are by row.
struct DrawRows {
  int64_t num_drawn;
  int64_t vocab_size;
  int64_t stride;  // numbers from row to row
  const float* logits;
  const int64_t* indices;  // [num_drawn]
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const uint64_t* seeds;
  const int64_t* positions;  // of the tokens to be drawn in their sequences
  int64_t* tokens;           // [num_drawn]
};

// What a build for one instruction set offers.
struct Kernels {
  const char* name;
  void (*embed)(const Segment& table, const int64_t* ids, int64_t begin, int64_t end, float scale, const Rows& out);
  void (*norm)(const Rows& in, const Rows& out, int64_t begin, int64_t end, const float* weight, const float* bias, float eps,
               int is_layer_norm);
  void (*pack)(const Rows& in, const Rows& out, int64_t begin, int64_t end);
  void (*gated)(const Rows& in, const Rows& out, int64_t begin, int64_t end, int activation);
  void (*activate)(const Rows& in, const Rows& out, int64_t begin, int64_t end, int activation);
  void (*add)(const Rows& x, const Rows& y, int64_t begin, int64_t end, float scale);
  void (*scale)(const Rows& x, int64_t begin, int64_t end, float scale);
  void (*soft_cap)(const Rows& x, int64_t begin, int64_t end, float cap);
  // Outputs [32 * unit, 32 * unit + 32) of a segment for rows [begin, end). `scratch` holds `scratch_bytes(k)`.
  void (*linear)(const Segment& segment, int64_t unit, const Rows& in, const Rows& out, int64_t begin, int64_t end,
                 const LinearTarget& target, uint8_t* scratch);
  // activation(gate) * up for 32 outputs of both; `gates` holds 32 floats a row.
  void (*gated_linear)(const Segment& gate, const Segment& up, int64_t unit, const Rows& in, const Rows& out, int64_t begin,
                       int64_t end, const LinearTarget& target, uint8_t* scratch, float* gates);
  // By format of the pages.
  void (*rotate_store[2])(const Rows& qkv, const Rows& queries, const AttentionLayer& layer, const Pages& pages, const Step& step,
                          int64_t begin, int64_t end);
  void (*attend[2])(const AttendContext& context, const AttendUnit& unit, int kv_head);
  void (*merge)(const AttendContext& context, const AttendUnit* units, int64_t num_units, int kv_head);
  void (*best)(const Rows& in, int64_t begin, int64_t end, int64_t* best, uint8_t* is_finite);
  int64_t (*draw)(const float* logits, int64_t size, const DrawParameters& parameters, const DrawScratch& scratch);
};

// Of a panel's groups, at 16 codes a scale: scales times 8 roots, pairs, and rests.
inline int64_t scratch_bytes(int64_t k) { return k / 32 * (9 * 256 + 128) + 256; }

const Kernels* kernels_avx512_bf16();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_generic();

// By the number of the instruction set, as `hr_best_isa` tells it.
inline const Kernels* kernels_for(int32_t isa) {
#if defined(__x86_64__)
  if (isa == 1) return kernels_avx2();
  if (isa == 2) return kernels_avx512();
  if (isa == 3) return kernels_avx512_bf16();
#endif
  (void)isa;
  return kernels_generic();
}

}  // namespace headrace
