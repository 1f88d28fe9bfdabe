// Drawing tokens from rows of logits: temperature, then top-k, top-p and min-p, then the inverse of the cumulative distribution.
//
// What every filter comes to is a floor: a token is in if its scaled logit (at most 0, the likeliest has 0) is no smaller. A row is read for
// its largest logits, and, where a filter may drop most of it, after that only where a block's largest say that there is something to find.

namespace {

using namespace headrace;

// A token whose scaled logit is below has no mass.
constexpr float LEAST_EXPONENT = -87.0f;
// A text's next token mostly has a nucleus of tokens above this.
constexpr float NEAR_EXPONENT = -6.0f;

// One row and what is known of it. A block is DRAW_BLOCK tokens; the last vector of a row may be short.
struct Draw {
  const float* logits;
  int64_t size;  // tokens
  float largest;
  float inverse;  // of the temperature
  DrawScratch scratch;

  int64_t num_blocks() const { return (size + DRAW_BLOCK - 1) / DRAW_BLOCK; }

  // Calls `function(token, logits)` for each sixteen tokens of a block; past the row's end they are ruled out.
  template <class Function>
  void each(int64_t block, Function function) const {
    const int64_t end = (block + 1) * DRAW_BLOCK < size ? (block + 1) * DRAW_BLOCK : size;
    int64_t token = block * DRAW_BLOCK;
    for (; token + 16 <= end; token += 16) function(token, vload(logits + token));
    if (token < end) {
      float tail[16];
      for (int i = 0; i < 16; i++) tail[i] = token + i < size ? logits[token + i] : -INFINITY;
      function(token, vload(tail));
    }
  }

  // The largest becomes 0 before it is scaled, so that the smallest temperature cannot overflow.
  vf scaled(vf x) const { return vmul(vsub(x, vset(largest)), vset(inverse)); }
  vf mass(vf x, float floor) const {
    const vf s = scaled(x);
    return vselect(vat_least(s, vset(floor)), vexp(s), vset(0.0f));
  }
  bool reaches(int64_t block, float floor) const { return vmaximum(vload(scratch.maximums + 16 * block)) >= floor; }
};

// Finds the largest logit, and the largest of each lane of each block, scaled.
INLINE void survey(Draw& draw) {
  vf largest = vset(-INFINITY);
  for (int64_t block = 0; block < draw.num_blocks(); block++) {
    vf lanes = vset(-INFINITY);
    draw.each(block, [&](int64_t, vf x) { lanes = vmax(lanes, x); });
    vstore(draw.scratch.maximums + 16 * block, lanes);
    largest = vmax(largest, lanes);
  }
  draw.largest = vmaximum(largest);
  for (int64_t i = 0; i < 16 * draw.num_blocks(); i += 16) {
    vstore(draw.scratch.maximums + i, draw.scaled(vload(draw.scratch.maximums + i)));
  }
}

// Puts the scaled logits that reach a floor into `values`, in order of tokens; gives how many.
INLINE int64_t gather(const Draw& draw, float floor, float* values) {
  int64_t count = 0;
  for (int64_t block = 0; block < draw.num_blocks(); block++) {
    if (!draw.reaches(block, floor)) continue;
    draw.each(block, [&](int64_t, vf x) {
      const vf s = draw.scaled(x);
      count += vkeep(values + count, vat_least(s, vset(floor)), s);
    });
  }
  return draw.size < count ? draw.size : count;
}

// The largest value such that all that are no smaller weigh `target` or more; the smallest where rounding leaves less. Values are at most 0;
// `weights` are theirs, or null where each counts as one. Both are used up. Sorts by eleven, ten and ten bits of the size of the values.
INLINE float border(float* values, float* weights, int64_t count, double target, double* bins) {
  double before = 0.0;
  for (int shift = 20; shift >= 0; shift -= 10) {
    if (count == 1) break;
    const uint32_t num_bins = shift == 20 ? 2048 : 1024;
    memset(bins, 0, sizeof(double) * num_bins);
    const auto bin_of = [=](int64_t i) {
      uint32_t bits;
      memcpy(&bits, values + i, 4);
      return (bits & 0x7fffffffu) >> shift & (num_bins - 1);
    };
    for (int64_t i = 0; i < count; i++) bins[bin_of(i)] += weights ? (double)weights[i] : 1.0;
    uint32_t last = 0;
    double before_last = before;
    for (uint32_t bin = 0; bin < num_bins; bin++) {
      if (bins[bin] == 0.0) continue;
      last = bin;
      before_last = before;
      before += bins[bin];
      if (before >= target) break;
    }
    before = before_last;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
      if (bin_of(i) != last) continue;
      values[kept] = values[i];
      if (weights) weights[kept] = weights[i];
      kept++;
    }
    count = kept;
  }
  return values[0];
}

// The floor that keeps the `top_k` likeliest, with what ties with the last of them. Gives in `count` how many `values` there are then.
INLINE float top_k_floor(const Draw& draw, int64_t top_k, int64_t* count) {
  const DrawScratch& scratch = draw.scratch;
  const int64_t num_lanes = 16 * draw.num_blocks();
  // As many tokens as lanes are no smaller than the k-th of the lanes' largest.
  float least = -INFINITY;
  if (top_k < num_lanes) {
    memcpy(scratch.masses, scratch.maximums, sizeof(float) * (size_t)num_lanes);
    least = border(scratch.masses, nullptr, num_lanes, (double)top_k, scratch.bins);
  }
  const int64_t num_values = gather(draw, least, scratch.values);
  memcpy(scratch.masses, scratch.values, sizeof(float) * (size_t)num_values);
  const float floor = border(scratch.masses, nullptr, num_values, (double)top_k, scratch.bins);
  *count = 0;
  for (int64_t i = 0; i < num_values; i++) {
    scratch.values[*count] = scratch.values[i];
    *count += scratch.values[i] >= floor;
  }
  return floor;
}

// Masses of blocks, each with those before it; gives that of all.
INLINE double accumulate(const Draw& draw, float floor) {
  double total = 0.0;
  for (int64_t block = 0; block < draw.num_blocks(); block++) {
    if (draw.reaches(block, floor)) {
      vf sum = vset(0.0f);
      draw.each(block, [&](int64_t, vf x) { sum = vadd(sum, draw.mass(x, floor)); });
      total += (double)vsum(sum);
    }
    draw.scratch.totals[block] = total;
  }
  return total;
}

// Masses of the first `count` of `values`; gives that of all.
INLINE double weigh(const DrawScratch& scratch, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; i += 16) vstore(scratch.masses + i, vexp(vload(scratch.values + i)));
  for (int64_t i = 0; i < count; i++) total += (double)scratch.masses[i];
  return total;
}

// The floor that keeps the fewest likeliest tokens whose mass reaches `top_p`, with what ties with the last of them: among the first `count`
// of `values`, which top-k left, or among all tokens where there are none.
INLINE float top_p_floor(const Draw& draw, float top_p, int64_t count) {
  const DrawScratch& scratch = draw.scratch;
  if (count > 0) return border(scratch.values, scratch.masses, count, (double)top_p * weigh(scratch, count), scratch.bins);
  const double total = accumulate(draw, LEAST_EXPONENT), target = (double)top_p * total;
  count = gather(draw, NEAR_EXPONENT, scratch.values);
  if (weigh(scratch, count) < target) {
    // All tokens that are smaller together have less than what goes; the margin is for rounding.
    const float floor = (float)log((1.0 - (double)top_p) * total / (double)draw.size) - 1e-3f;
    count = gather(draw, floor > LEAST_EXPONENT ? floor : LEAST_EXPONENT, scratch.values);
    weigh(scratch, count);
  }
  return border(scratch.values, scratch.masses, count, target, scratch.bins);
}

// The first token at which the cumulative mass is above `uniform` of it all.
INLINE int64_t invert(const Draw& draw, float floor, double uniform) {
  const double target = uniform * accumulate(draw, floor);
  int64_t block = 0;
  while (block + 1 < draw.num_blocks() && draw.scratch.totals[block] <= target) block++;
  double cumulative = block == 0 ? 0.0 : draw.scratch.totals[block - 1];
  // Within a block sums are rounded otherwise than the block's: its last token with a mass takes what that leaves.
  int64_t found = 0;
  bool is_found = false;
  draw.each(block, [&](int64_t token, vf x) {
    float masses[16];
    if (is_found) return;
    vstore(masses, draw.mass(x, floor));
    for (int i = 0; i < 16 && !is_found; i++) {
      if (masses[i] == 0.0f) continue;
      found = token + i;
      cumulative += (double)masses[i];
      is_found = cumulative > target;
    }
  });
  return found;
}

int64_t draw_row(const float* logits, int64_t size, const DrawParameters& parameters, const DrawScratch& scratch) {
  // The smallest temperatures have no inverse; what is then not the largest has no mass either way.
  const float inverse = 1.0f / parameters.temperature;
  Draw draw{logits, size, 0.0f, inverse < 3e38f ? inverse : 3e38f, scratch};
  survey(draw);
  float floor = LEAST_EXPONENT;
  int64_t count = 0;
  if (parameters.top_k > 0 && parameters.top_k < size) {
    const float least = top_k_floor(draw, parameters.top_k, &count);
    floor = least > floor ? least : floor;
  }
  if (parameters.top_p < 1.0f) {
    const float least = top_p_floor(draw, parameters.top_p, count);
    floor = least > floor ? least : floor;
  }
  if (parameters.min_p > 0.0f) {
    const float least = logf(parameters.min_p);
    floor = least > floor ? least : floor;
  }
  return invert(draw, floor, parameters.uniform);
}

}  // namespace
