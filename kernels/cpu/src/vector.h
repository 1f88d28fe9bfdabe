// Sixteen lanes, in intrinsics where the target has AVX-512, else in the compiler's own vectors. The rest of the kernels is written in these.
// Nothing is contracted behind our back (-ffp-contract=off): one order of operations for every shape of a tile.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
// A function of its own has all registers for its inner loop.
#define ALONE static __attribute__((noinline))
// Before a loop over an array of vectors, so that these are registers from the start.
#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

INLINE int32_t as_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// Without branches, so that a loop over it is one of vectors.
INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = (uint32_t)as_bits(x);
  return (uint16_t)(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
INLINE void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vf vset(float x) { return _mm512_set1_ps(x); }
INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vabs(vf a) { return _mm512_abs_ps(a); }
INLINE vf vround(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vi viload(const void* p) { return _mm512_loadu_si512(p); }
INLINE void vistore(void* p, vi x) { _mm512_storeu_si512(p, x); }
INLINE vi viset(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vf vcast(vi a) { return _mm512_castsi512_ps(a); }
INLINE vi viadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi vior(vi a, vi b) { return _mm512_or_si512(a, b); }
template <int BITS>
INLINE vi vshift_left(vi a) { return _mm512_slli_epi32(a, BITS); }
// The nearest whole numbers.
INLINE vi vwhole(vf a) { return _mm512_cvtps_epi32(a); }
INLINE vi vlow_nibbles(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE vi vhigh_nibbles(vi a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
// Whole numbers of 16 bits side by side in each lane.
INLINE vi vwords(vi low, vi high) { return _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_slli_epi32(high, 16)); }
INLINE vf vload_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE float vsum(vf a) { return _mm512_reduce_add_ps(a); }
INLINE float vmaximum(vf a) { return _mm512_reduce_max_ps(a); }
// Lanes whose index from `first` is in [low, high).
INLINE vm vbetween(int32_t first, int32_t low, int32_t high) {
  const vi index = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  return _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(low)) & _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(high));
}
INLINE vf vselect(vm mask, vf a, vf b) { return _mm512_mask_blend_ps(mask, b, a); }
INLINE vm vat_least(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// Stores the lanes of a mask one behind another and gives how many; what stands behind them, up to 16 lanes in all, is spoiled.
INLINE int vkeep(float* p, vm mask, vf x) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(mask, x));
  return __builtin_popcount(mask);
}
// 2 ** n for whole n from -126 to 127.
INLINE vf vexp2i(vf n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
// What is above the whole number below, from 0 to 1, and that number, for `vscale2`, which rounds down itself. Other ports than those of
// products do both.
INLINE vf vsplit(vf x, vf* whole) {
  *whole = x;
  return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
// x * 2 ** n, where n is rounded down.
INLINE vf vscale2(vf x, vf n) { return _mm512_scalef_ps(x, n); }
// Rows [16] of 32 numbers at a time: 16 vectors become one whose lanes are what is left of each.
template <class Join>
INLINE vf vreduce(const vf (&x)[16], Join join) {
  vf quarters[4];
  for (int i = 0; i < 4; i++) {
    const vf* four = x + 4 * i;
    const vf left = join(_mm512_shuffle_ps(four[0], four[1], 0x88), _mm512_shuffle_ps(four[0], four[1], 0xdd));
    const vf right = join(_mm512_shuffle_ps(four[2], four[3], 0x88), _mm512_shuffle_ps(four[2], four[3], 0xdd));
    quarters[i] = join(_mm512_shuffle_ps(left, right, 0x88), _mm512_shuffle_ps(left, right, 0xdd));
  }
  const vf left = join(_mm512_shuffle_f32x4(quarters[0], quarters[1], 0x88), _mm512_shuffle_f32x4(quarters[0], quarters[1], 0xdd));
  const vf right = join(_mm512_shuffle_f32x4(quarters[2], quarters[3], 0x88), _mm512_shuffle_f32x4(quarters[2], quarters[3], 0xdd));
  return join(_mm512_shuffle_f32x4(left, right, 0x88), _mm512_shuffle_f32x4(left, right, 0xdd));
}
INLINE vf vminimums(const vf (&x)[16]) { return vreduce(x, [](vf a, vf b) { return _mm512_min_ps(a, b); }); }
INLINE vf vmaximums(const vf (&x)[16]) { return vreduce(x, [](vf a, vf b) { return _mm512_max_ps(a, b); }); }
INLINE bool vhas_nan(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0; }
// 32 numbers as the nearest of int8, those beyond its bounds as these.
typedef __m256i vq;
INLINE vq vquantise(vf a, vf b) {
  const __m128i low = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)), high = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(b));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
INLINE void vqstore(int8_t* p, vq x) { _mm256_storeu_si256((__m256i*)p, x); }
// The sum of each row's codes.
INLINE void vcode_sums(const vq (&x)[16], int32_t* sums) {
  vf eights[2];
  for (int i = 0; i < 2; i++) {
    vf pairs[4];
    for (int j = 0; j < 4; j++) {
      const vi codes = _mm512_inserti64x4(_mm512_castsi256_si512(x[8 * i + j]), x[8 * i + 4 + j], 1);
#if defined(__AVX512VNNI__)
      const vi fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), codes);
#else
      const vi fours = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_set1_epi8(1), codes), _mm512_set1_epi16(1));
#endif
      pairs[j] = _mm512_castsi512_ps(fours);
    }
    const auto join = [](vf a, vf b) {
      const vi even = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), odd = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd));
      return _mm512_castsi512_ps(_mm512_add_epi32(even, odd));
    };
    eights[i] = join(join(pairs[0], pairs[1]), join(pairs[2], pairs[3]));
  }
  const vi first = _mm512_castps_si512(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88));
  _mm512_storeu_si512(sums, _mm512_add_epi32(first, _mm512_castps_si512(_mm512_shuffle_f32x4(eights[0], eights[1], 0xdd))));
}

// Four members of 16 things, a thing a lane, become these, 16 bytes each.
INLINE void vtranspose(const uint32_t (&x)[4][16], void* out) {
  const vi a = viload(x[0]), b = viload(x[1]), c = viload(x[2]), d = viload(x[3]);
  const vi ab[2] = {_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)};
  const vi cd[2] = {_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)};
  for (int i = 0; i < 4; i++) {
    // Of each quarter the i-th thing.
    const vi things = i % 2 ? _mm512_unpackhi_epi64(ab[i / 2], cd[i / 2]) : _mm512_unpacklo_epi64(ab[i / 2], cd[i / 2]);
    char* to = (char*)out + 16 * i;
    _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(things));
    _mm_storeu_si128((__m128i*)(to + 64), _mm512_extracti32x4_epi32(things, 1));
    _mm_storeu_si128((__m128i*)(to + 128), _mm512_extracti32x4_epi32(things, 2));
    _mm_storeu_si128((__m128i*)(to + 192), _mm512_extracti32x4_epi32(things, 3));
  }
}

// acc + four products a lane; codes are unsigned, `four` holds four signed bytes.
template <int BITS>
INLINE vi vdot4(vi acc, vi codes, int32_t four) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(four));
#else
  const vi a = _mm512_set1_epi32(four), ones = _mm512_set1_epi16(1);
  if (BITS <= 6) return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, a), ones));
  // Pairs of products of whole bytes would not fit into 16 bits: by nibbles.
  const vi low = _mm512_madd_epi16(_mm512_maddubs_epi16(vlow_nibbles(codes), a), ones);
  const vi high = _mm512_madd_epi16(_mm512_maddubs_epi16(vhigh_nibbles(codes), a), ones);
  return _mm512_add_epi32(acc, _mm512_add_epi32(low, _mm512_slli_epi32(high, 4)));
#endif
}

// 4-bit codes as `vdot4` takes them: times 2 ** CODE_SHIFT.
#if defined(__AVX512VNNI__)
constexpr int CODE_SHIFT = 4;
INLINE vi vlow_codes(vi a) { return _mm512_and_si512(_mm512_slli_epi16(a, 4), _mm512_set1_epi8((char)0xf0)); }
INLINE vi vhigh_codes(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8((char)0xf0)); }
#else
constexpr int CODE_SHIFT = 0;
INLINE vi vlow_codes(vi a) { return vlow_nibbles(a); }
INLINE vi vhigh_codes(vi a) { return vhigh_nibbles(a); }
#endif

// acc + two products of signed 16 bits a lane.
INLINE vi vdot2(vi acc, vi weights, uint32_t pair) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(acc, weights, _mm512_set1_epi32((int32_t)pair));
#else
  return _mm512_add_epi32(acc, _mm512_madd_epi16(weights, _mm512_set1_epi32((int32_t)pair)));
#endif
}

// acc + two products of bfloat16 a lane.
INLINE vf vdot2(vf acc, vi weights, uint32_t pair) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int32_t)pair));
#else
  const vi p = _mm512_set1_epi32((int32_t)pair), high = _mm512_set1_epi32((int32_t)0xffff0000u);
  acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(p, 16)), acc);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(weights, high)), _mm512_castsi512_ps(_mm512_and_si512(p, high)), acc);
#endif
}

#if defined(__AVX512BF16__)
INLINE void vstore_bf16(uint16_t* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
// Both rounded to bfloat16, side by side in each lane.
INLINE vi vpair(vf low, vf high) {
  const vi places = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007, 0x160006,
                                     0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  return _mm512_permutexvar_epi16(places, (vi)_mm512_cvtne2ps_pbh(high, low));
}
#else
// The nearest of bfloat16, in the upper halves of the lanes.
INLINE vi vround_bf16(vf x) {
  const vi bits = _mm512_castps_si512(x);
  const vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const vi rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  // Rounding would carry a NaN over into infinity or zero.
  const vm nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_and_si512(_mm512_mask_set1_epi32(rounded, nan, 0x7fc00000), _mm512_set1_epi32((int32_t)0xffff0000));
}
INLINE void vstore_bf16(uint16_t* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(vround_bf16(x), 16)));
}
INLINE vi vpair(vf low, vf high) { return _mm512_or_si512(_mm512_srli_epi32(vround_bf16(low), 16), vround_bf16(high)); }
#endif

// 32 numbers of 8 bits (PAGES_E4M3) as bfloat16, which holds them all.
INLINE vi vload_e4m3(const uint8_t* p) {
  // The sign in all upper bits, exponent and mantissa below.
  const vi codes = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
  const vi placed = _mm512_and_si512(_mm512_slli_epi16(codes, 4), _mm512_set1_epi16((int16_t)0x87f0));
  // What is added is the difference of the biases, but for exponent 0 (m * 2 ** -9, by m) and for what is no number. A table by the lower
  // five bits has both, and is wrong only where the halves of the exponent differ.
  const vi table = _mm512_set_epi32(0x77d03c00, 0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00,
                                    0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3bf03be0, 0x3bd03bc0, 0x3b903b60, 0x3af00000);
  const __mmask32 special = _mm512_testn_epi16_mask(_mm512_xor_si512(codes, _mm512_srli_epi16(codes, 2)), _mm512_set1_epi16(0x18));
  return _mm512_add_epi16(placed, _mm512_mask_permutexvar_epi16(_mm512_set1_epi16(0x3c00), special, codes, table));
}

#elif defined(__AVX2__)

// Two halves of eight lanes.
struct vf { __m256 a, b; };
struct vi { __m256i a, b; };
typedef vi vm;

INLINE vf vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void vstore(float* p, vf x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
INLINE vf vset(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
INLINE vf vadd(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE vf vsub(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE vf vmul(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE vf vdiv(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE vf vfma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE vf vmax(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE vf vmin(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE vf vabs(vf x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
INLINE vf vround(vf x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
INLINE vi viload(const void* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}; }
INLINE void vistore(void* p, vi x) { _mm256_storeu_si256((__m256i*)p, x.a); _mm256_storeu_si256((__m256i*)p + 1, x.b); }
INLINE vi viset(int32_t x) { const __m256i v = _mm256_set1_epi32(x); return {v, v}; }
INLINE vf vcast(vi x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
INLINE vi viadd(vi x, vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE vi vior(vi x, vi y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int BITS>
INLINE vi vshift_left(vi x) { return {_mm256_slli_epi32(x.a, BITS), _mm256_slli_epi32(x.b, BITS)}; }
INLINE vi vwhole(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE vi vwords(vi low, vi high) {
  return {_mm256_blend_epi16(low.a, _mm256_slli_epi32(high.a, 16), 0xaa), _mm256_blend_epi16(low.b, _mm256_slli_epi32(high.b, 16), 0xaa)};
}
INLINE vi vlow_nibbles(vi x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
INLINE vi vhigh_nibbles(vi x) { return vlow_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
INLINE vf vload_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
INLINE float vsum(vf x) {
  const __m256 h = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
INLINE float vmaximum(vf x) {
  const __m256 h = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
INLINE __m256i between_half(int32_t first, int32_t low, int32_t high) {
  const __m256i index = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), index), _mm256_cmpgt_epi32(_mm256_set1_epi32(high), index));
}
INLINE vm vbetween(int32_t first, int32_t low, int32_t high) { return {between_half(first, low, high), between_half(first + 8, low, high)}; }
INLINE vf vselect(vm mask, vf x, vf y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(mask.a)), _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(mask.b))};
}
INLINE vm vat_least(vf x, vf y) {
  return {_mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ)), _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ))};
}
INLINE int vkeep(float* p, vm mask, vf x) {
  const int low = _mm256_movemask_ps(_mm256_castsi256_ps(mask.a)), high = _mm256_movemask_ps(_mm256_castsi256_ps(mask.b));
  float lanes[16];
  vstore(lanes, x);
  int count = 0;
  for (int left = low | high << 8; left; left &= left - 1) p[count++] = lanes[__builtin_ctz((unsigned)left)];
  return count;
}
INLINE __m256 exp2i_half(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE vf vexp2i(vf n) { return {exp2i_half(n.a), exp2i_half(n.b)}; }
// The whole number below x, or 0.5 above it at most, and how far x is above it, from 0 to 1. Numbers below -126.5 count as that.
INLINE vf vsplit(vf x, vf* whole) {
  // A NaN is the second operand and stays one.
  x = vmax(vset(-126.5f), x);
  *whole = vround(vsub(x, vset(0.5f)));
  return vsub(x, *whole);
}
// x * 2 ** n for whole n; 0 for -127.
INLINE vf vscale2(vf x, vf n) { return vmul(x, vexp2i(n)); }
INLINE bool vhas_nan(vf x, vf y) {
  const __m256 either = _mm256_or_ps(_mm256_cmp_ps(x.a, y.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, y.b, _CMP_UNORD_Q));
  return _mm256_movemask_ps(either) != 0;
}
INLINE vf vminimums(const vf (&x)[16]) {
  float out[16];
  for (int i = 0; i < 16; i++) out[i] = -vmaximum(vsub(vset(0.0f), x[i]));
  return vload(out);
}
INLINE vf vmaximums(const vf (&x)[16]) {
  float out[16];
  for (int i = 0; i < 16; i++) out[i] = vmaximum(x[i]);
  return vload(out);
}
struct vq {
  int8_t codes[32];
};
INLINE void vqstore(int8_t* p, const vq& x) { memcpy(p, x.codes, 32); }
INLINE void vcode_sums(const vq (&x)[16], int32_t* sums) {
  for (int i = 0; i < 16; i++) {
    sums[i] = 0;
    for (int j = 0; j < 32; j++) sums[i] += x[i].codes[j];
  }
}
INLINE vq vquantise(vf x, vf y) {
  const __m256i first = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  const __m256i last = _mm256_packs_epi32(_mm256_cvtps_epi32(y.a), _mm256_cvtps_epi32(y.b));
  // Packing works within halves: of each vector 0-3, then 8-11; then 4-7 and 12-15.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  vq out;
  _mm256_storeu_si256((__m256i*)out.codes, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, last), order));
  return out;
}
INLINE __m256i dot4_half(__m256i codes, __m256i four, int bits) {
  const __m256i ones = _mm256_set1_epi16(1);
  if (bits <= 6) return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, four), ones);
  // Pairs of products of whole bytes would not fit into 16 bits: by nibbles.
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i low = _mm256_and_si256(codes, mask), high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask);
  const __m256i l = _mm256_madd_epi16(_mm256_maddubs_epi16(low, four), ones);
  const __m256i h = _mm256_madd_epi16(_mm256_maddubs_epi16(high, four), ones);
  return _mm256_add_epi32(l, _mm256_slli_epi32(h, 4));
}
template <int BITS>
INLINE vi vdot4(vi acc, vi codes, int32_t four) {
  const __m256i f = _mm256_set1_epi32(four);
  return {_mm256_add_epi32(acc.a, dot4_half(codes.a, f, BITS)), _mm256_add_epi32(acc.b, dot4_half(codes.b, f, BITS))};
}
constexpr int CODE_SHIFT = 0;
INLINE vi vlow_codes(vi x) { return vlow_nibbles(x); }
INLINE vi vhigh_codes(vi x) { return vhigh_nibbles(x); }
INLINE vi vdot2(vi acc, vi weights, uint32_t pair) {
  const __m256i p = _mm256_set1_epi32((int32_t)pair);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(weights.a, p)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(weights.b, p))};
}
INLINE vf vdot2(vf acc, vi weights, uint32_t pair) {
  const __m256i p = _mm256_set1_epi32((int32_t)pair), high = _mm256_set1_epi32((int32_t)0xffff0000u);
  const __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(p, 16)), y = _mm256_castsi256_ps(_mm256_and_si256(p, high));
  acc.a = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(weights.a, 16)), x, acc.a);
  acc.b = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(weights.b, 16)), x, acc.b);
  acc.a = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(weights.a, high)), y, acc.a);
  acc.b = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(weights.b, high)), y, acc.b);
  return acc;
}
INLINE __m256i round_bf16_half(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  // Rounding would carry a NaN over into infinity or zero.
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_and_si256(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), _mm256_set1_epi32((int32_t)0xffff0000));
}
INLINE vi vround_bf16(vf x) { return {round_bf16_half(x.a), round_bf16_half(x.b)}; }
INLINE __m128i narrow_bf16(__m256 x) {
  const __m256i kept = _mm256_srli_epi32(round_bf16_half(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
}
INLINE void vstore_bf16(uint16_t* p, vf x) {
  _mm_storeu_si128((__m128i*)p, narrow_bf16(x.a));
  _mm_storeu_si128((__m128i*)(p + 8), narrow_bf16(x.b));
}
INLINE __m256i pair_half(__m256 low, __m256 high) {
  return _mm256_or_si256(_mm256_srli_epi32(round_bf16_half(low), 16), round_bf16_half(high));
}
INLINE vi vpair(vf low, vf high) { return {pair_half(low.a, high.a), pair_half(low.b, high.b)}; }
// 32 numbers of 8 bits (PAGES_E4M3) as bfloat16, which holds them all: upper and lower bytes apart, then side by side.
INLINE vi vload_e4m3(const uint8_t* p) {
  // Bytes go side by side within halves.
  const __m256i codes = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i*)p), 0xd8);
  const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi8(0x7f));
  const __m256i is_small = _mm256_cmpgt_epi8(_mm256_set1_epi8(8), magnitude);
  // m * 2 ** -9 by m, where the exponent is 0.
  const __m256i small_upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256i small_lower =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, (char)0x80, (char)0xc0, 0, 0x20, 0x40, 0x60, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256i exponent = _mm256_and_si256(_mm256_srli_epi16(magnitude, 4), _mm256_set1_epi8(7));
  __m256i upper = _mm256_add_epi8(exponent, _mm256_set1_epi8(0x3c));
  upper = _mm256_blendv_epi8(upper, _mm256_shuffle_epi8(small_upper, magnitude), is_small);
  upper = _mm256_or_si256(upper, _mm256_and_si256(codes, _mm256_set1_epi8((char)0x80)));
  // All exponent bits, where there is no number.
  upper = _mm256_or_si256(upper, _mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(0x7f)));
  __m256i lower = _mm256_and_si256(_mm256_slli_epi16(magnitude, 4), _mm256_set1_epi8((char)0xf0));
  lower = _mm256_blendv_epi8(lower, _mm256_shuffle_epi8(small_lower, magnitude), is_small);
  return {_mm256_unpacklo_epi8(lower, upper), _mm256_unpackhi_epi8(lower, upper)};
}

#else  // any CPU: the compiler's own vectors

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef vi vm;
typedef uint16_t v16 __attribute__((vector_size(32)));

INLINE vf vload(const float* p) { vf x; memcpy(&x, p, 64); return x; }
INLINE void vstore(float* p, vf x) { memcpy(p, &x, 64); }
INLINE vf vset(float x) { return vf{} + x; }
INLINE vf vadd(vf a, vf b) { return a + b; }
INLINE vf vsub(vf a, vf b) { return a - b; }
INLINE vf vmul(vf a, vf b) { return a * b; }
INLINE vf vdiv(vf a, vf b) { return a / b; }
INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
// Numbers of up to 2 ** 22: what is added leaves no room for a fraction.
INLINE vf vround(vf a) { return (a + 12582912.0f) - 12582912.0f; }
INLINE vi viload(const void* p) { vi x; memcpy(&x, p, 64); return x; }
INLINE void vistore(void* p, vi x) { memcpy(p, &x, 64); }
INLINE vi viset(int32_t x) { return vi{} + x; }
INLINE vf vcast(vi a) { return (vf)a; }
INLINE vi viadd(vi a, vi b) { return a + b; }
INLINE vi vior(vi a, vi b) { return a | b; }
template <int BITS>
INLINE vi vshift_left(vi a) { return a << BITS; }
INLINE vi vwhole(vf a) { return __builtin_convertvector(vround(a), vi); }
INLINE vi vwords(vi low, vi high) { return (low & 0xffff) | high << 16; }
INLINE vi vlow_nibbles(vi a) { return a & 0x0f0f0f0f; }
INLINE vi vhigh_nibbles(vi a) { return (a >> 4) & 0x0f0f0f0f; }
INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 0) return (sign ? -5.9604644775390625e-8f : 5.9604644775390625e-8f) * (float)mantissa;
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
INLINE vf vload_half(const uint16_t* p) {
  float x[16];
  for (int i = 0; i < 16; i++) x[i] = half_to_float(p[i]);
  return vload(x);
}
INLINE float vsum(vf a) {
  float s[16];
  vstore(s, a);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  }
  return s[0];
}
INLINE float vmaximum(vf a) {
  float s[16];
  vstore(s, a);
  for (int i = 1; i < 16; i++) s[0] = s[i] > s[0] ? s[i] : s[0];
  return s[0];
}
INLINE vm vbetween(int32_t first, int32_t low, int32_t high) {
  const vi index = vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + first;
  return (index >= low) & (index < high);
}
INLINE vf vselect(vm mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vm vat_least(vf a, vf b) { return a >= b; }
INLINE int vkeep(float* p, vm mask, vf x) {
  int count = 0;
  for (int i = 0; i < 16; i++) {
    p[count] = x[i];
    count += mask[i] & 1;
  }
  return count;
}
INLINE vf vexp2i(vf n) { return (vf)((__builtin_convertvector(n, vi) + 127) << 23); }
// The whole number below x, or 0.5 above it at most, and how far x is above it, from 0 to 1. Numbers below -126.5 count as that.
INLINE vf vsplit(vf x, vf* whole) {
  // A NaN is the second operand and stays one.
  x = vmax(vset(-126.5f), x);
  *whole = vround(vsub(x, vset(0.5f)));
  return vsub(x, *whole);
}
// x * 2 ** n for whole n; 0 for -127.
INLINE vf vscale2(vf x, vf n) { return vmul(x, vexp2i(n)); }
INLINE bool vhas_nan(vf a, vf b) {
  const vi is_nan = (a != a) | (b != b);
  int32_t any = 0;
  for (int i = 0; i < 16; i++) any |= is_nan[i];
  return any != 0;
}
INLINE vf vminimums(const vf (&x)[16]) {
  float out[16];
  for (int i = 0; i < 16; i++) out[i] = -vmaximum(vsub(vset(0.0f), x[i]));
  return vload(out);
}
INLINE vf vmaximums(const vf (&x)[16]) {
  float out[16];
  for (int i = 0; i < 16; i++) out[i] = vmaximum(x[i]);
  return vload(out);
}
struct vq {
  int8_t codes[32];
};
INLINE void vqstore(int8_t* p, const vq& x) { memcpy(p, x.codes, 32); }
INLINE void vcode_sums(const vq (&x)[16], int32_t* sums) {
  for (int i = 0; i < 16; i++) {
    sums[i] = 0;
    for (int j = 0; j < 32; j++) sums[i] += x[i].codes[j];
  }
}
INLINE vq vquantise(vf a, vf b) {
  vq out;
  const vf limits[2] = {vset(-128.0f), vset(127.0f)};
  const vf x[2] = {vround(vmin(limits[1], vmax(limits[0], a))), vround(vmin(limits[1], vmax(limits[0], b)))};
  for (int i = 0; i < 32; i++) out.codes[i] = (int8_t)(int32_t)x[i / 16][i % 16];
  return out;
}
#if defined(__ARM_FEATURE_DOTPROD)
template <int BITS>
INLINE vi vdot4(vi acc, vi codes, int32_t four) {
  const int8x16_t f = vreinterpretq_s8_s32(vdupq_n_s32(four));
  int8x16_t c[4];
  int32x4_t a[4];
  memcpy(c, &codes, 64);
  memcpy(a, &acc, 64);
  for (int i = 0; i < 4; i++) {
    if (BITS <= 6) {
      a[i] = vdotq_s32(a[i], c[i], f);
    } else {
      // Codes are unsigned: those from 128 on become negative, and 128 times the sum of the four is put back.
      a[i] = vdotq_s32(a[i], veorq_s8(c[i], vdupq_n_s8((int8_t)0x80)), f);
      a[i] = vaddq_s32(a[i], vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), f), 7));
    }
  }
  vi out;
  memcpy(&out, a, 64);
  return out;
}
#else
template <int BITS>
INLINE vi vdot4(vi acc, vi codes, int32_t four) {
  for (int j = 0; j < 4; j++) acc += ((codes >> (8 * j)) & 255) * (int32_t)(int8_t)(uint8_t)((uint32_t)four >> (8 * j));
  return acc;
}
#endif
constexpr int CODE_SHIFT = 0;
INLINE vi vlow_codes(vi a) { return vlow_nibbles(a); }
INLINE vi vhigh_codes(vi a) { return vhigh_nibbles(a); }
INLINE vi vdot2(vi acc, vi weights, uint32_t pair) {
  return acc + ((weights << 16) >> 16) * (int32_t)(int16_t)(uint16_t)pair + (weights >> 16) * ((int32_t)pair >> 16);
}
INLINE vf vdot2(vf acc, vi weights, uint32_t pair) {
  acc = vfma((vf)(weights << 16), vset(as_float(pair << 16)), acc);
  return vfma((vf)(weights & (int32_t)0xffff0000u), vset(as_float(pair & 0xffff0000u)), acc);
}
INLINE vi vround_bf16(vf x) {
  const vi bits = (vi)x;
  const vi rounded = bits + (((bits >> 16) & 1) + 0x7fff);
  return (x == x ? rounded : viset(0x7fc00000)) & (int32_t)0xffff0000;
}
INLINE void vstore_bf16(uint16_t* p, vf x) {
  const v16 out = __builtin_convertvector((vround_bf16(x) >> 16) & 0xffff, v16);
  memcpy(p, &out, 32);
}
INLINE vi vpair(vf low, vf high) { return ((vround_bf16(low) >> 16) & 0xffff) | vround_bf16(high); }
// 32 numbers of 8 bits (PAGES_E4M3) as bfloat16, which holds them all.
INLINE vi vload_e4m3(const uint8_t* p) {
  typedef uint8_t bytes __attribute__((vector_size(32)));
  typedef uint16_t words __attribute__((vector_size(64)));
  bytes given;
  memcpy(&given, p, 32);
  const words codes = __builtin_convertvector(given, words), magnitude = codes & 0x7f, none = words{};
  // m * 2 ** -9, where the exponent is 0.
  const words below_four = magnitude < 2 ? magnitude * 0x3b00 : magnitude * 0x40 + 0x3b00;
  const words small = magnitude < 4 ? below_four : magnitude * 0x20 + 0x3b80;
  words out = magnitude < 8 ? small : (magnitude << 4) + 0x3c00;
  out = magnitude == 0x7f ? none + 0x7fc0 : out;
  return (vi)(out | (codes & 0x80) << 8);
}

#endif

#if !defined(__AVX512F__)
INLINE void vtranspose(const uint32_t (&x)[4][16], void* out) {
  for (int i = 0; i < 64; i++) memcpy((char*)out + 4 * i, &x[i % 4][i / 4], 4);
}
#endif

// 16 numbers into the first or the second halves of 16 lanes; the other halves may be written by another thread.
INLINE void vstore_halves(uint16_t* p, const uint16_t* x, bool is_second) {
#if defined(__AVX512F__)
  const vi lanes = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
  _mm512_mask_storeu_epi16(p, is_second ? 0xaaaaaaaau : 0x55555555u, is_second ? _mm512_slli_epi32(lanes, 16) : lanes);
#else
  for (int i = 0; i < 16; i++) p[2 * i + is_second] = x[i];
#endif
}

// The largest tiles that the registers hold: rows times blocks of 16 outputs.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12;
#else
constexpr int TILE_ROWS = 2;
#endif

// e ** x to about 2 units in the last place, between e ** -87.3 and e ** 88.
INLINE vf vexp(vf x) {
  // A NaN is the second operand and stays one.
  const vf clamped = vmax(vset(-87.3f), vmin(vset(88.0f), x));
  const vf n = vround(vmul(clamped, vset(1.44269504088896341f)));
  vf r = vfma(n, vset(-0.693359375f), clamped);
  r = vfma(n, vset(2.12194440e-4f), r);
  vf p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vadd(vfma(p, vmul(r, r), r), vset(1.0f));
  return vmul(p, vexp2i(n));
}

// 2 ** x for x of at most 0, to 3e-6, more than bfloat16 keeps, and exactly 1 for 0; below 2 ** -126 at most that, and 0 in the end.
INLINE vf vexp2(vf x) {
  vf whole;
  const vf f = vsplit(x, &whole);
  vf p = vset(1.34266643e-02f);
  p = vfma(p, f, vset(5.22425063e-02f));
  p = vfma(p, f, vset(2.41280198e-01f));
  p = vfma(p, f, vset(6.93044841e-01f));
  p = vfma(p, f, vset(1.0f));
  return vscale2(p, whole);
}

// 64 * 2 ** x for x of at most 0, to 1.4e-5, a hundredth of what bfloat16 rounds; 0 in the end. With a last coefficient of 1 the polynomial
// comes to two multiplications and four sums: y = (f + a) * f + b, then (y + f + c) * y + d.
INLINE vf vexp2_64(vf x) {
  vf whole;
  const vf f = vsplit(x, &whole);
  const vf y = vfma(vadd(f, vset(1.03989220f)), f, vset(30.3185749f));
  return vscale2(vfma(vadd(y, vadd(f, vset(-47.1652832f))), y, vset(574.768982f)), whole);
}

// x / (1 + e ** -x), to 1e-7 of x. What is below the rounding of e ** -x, up to 126 powers of 2 of it, is nothing beside 1 or beside x.
INLINE vf vsilu(vf x) {
  // A NaN is the second operand and stays one.
  vf whole;
  const vf f = vsub(vsplit(vmin(vset(126.0f), vmul(x, vset(-1.44269504088896341f))), &whole), vset(0.5f));
  vf p = vset(0.00187757669f);
  p = vfma(p, f, vset(0.0136832818f));
  p = vfma(p, f, vset(0.0784989372f));
  p = vfma(p, f, vset(0.339724064f));
  p = vfma(p, f, vset(0.980257869f));
  p = vfma(p, f, vset(1.41421366f));
  return vdiv(x, vadd(vset(1.0f), vscale2(p, whole)));
}

INLINE vf vtanh(vf x) {
  // 1 - 2 / (e^2x + 1); saturates by itself, since the exponential is clamped.
  const vf e = vexp(vadd(x, x));
  return vsub(vset(1.0f), vdiv(vset(2.0f), vadd(e, vset(1.0f))));
}
