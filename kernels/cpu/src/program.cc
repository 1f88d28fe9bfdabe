// Programs: building them through the C interface, and running them.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

#include "abi.h"
#include "threads.h"

namespace headrace {
namespace {

enum OpKind { EMBED, NORM, PACK, LINEAR, GATED_LINEAR, GATED, ACTIVATE, ADD, SCALE, SOFT_CAP, GATHER, ROTATE_STORE, ATTEND, MERGE, BEST, NUM_OP_KINDS };

struct Op {
  OpKind kind;
  int in = -1;
  int out = -1;
  int activation = 0;
  int is_layer_norm = 0;
  float number = 1.0f;
  const float* weight = nullptr;
  const float* bias = nullptr;
  std::vector<Segment> segments{};
  LinearTarget target{};
  AttentionLayer attention{};
};

struct Value {
  int kind;
  int width;
  int domain;
  int buffer;
};

int64_t padded(int64_t width) { return (width + 31) / 32 * 32; }

// Numbers from row to row. Rows a multiple of a page apart would meet in the same places of a cache.
int64_t stride_of(const Value& value) {
  const int64_t stride = padded(value.width);
  return value.kind == KIND_F32 && stride % 512 == 0 ? stride + 32 : stride;
}

int64_t row_bytes(const Value& value) {
  const int64_t stride = stride_of(value);
  if (value.kind == KIND_F32) return stride * 4;
  if (value.kind == KIND_BF16) return stride * 2;
  return stride + (stride / 32 + 1) / 2 * 2 * (int64_t)sizeof(CodedGroup);
}

// Not a power of two, whose multiples would meet in the same places of a cache.
int64_t row_capacity(int64_t max_rows) { return (max_rows + 7) / 8 * 8 + 8; }

// Work on attention of one step, for layers with one number of query heads a key-value head; of all tokens, or for the sampled ones.
struct AttendPlan {
  int group;
  int num_kv_heads;
  bool only_sampled;
  std::vector<AttendMember> members;
  // Units whose result goes straight to the output.
  std::vector<AttendUnit> units;
  // One unit a chunk, merged afterwards: `splits` are ranges of `units`.
  struct Split {
    int64_t first;
    int64_t count;
  };
  std::vector<Split> splits;
  int64_t num_partials = 0;
};

}  // namespace

class Program {
 public:
  Program(const Kernels* kernels, int64_t max_tokens, int64_t max_sampled, int num_threads, int page_size, int page_format)
      : kernels_(kernels), max_rows_{max_tokens, max_sampled}, page_size_(page_size), page_format_(page_format), team_(num_threads) {
    scratch_.resize((size_t)team_.size(), nullptr);
  }

  ~Program() {
    for (void* memory : buffers_) free(memory);
    for (void* memory : scratch_) free(memory);
    free(partials_);
  }

  int add_value(int kind, int width, int domain, int buffer) {
    values_.push_back({kind, width, domain, buffer});
    return (int)values_.size() - 1;
  }

  void add_op(Op op) { ops_.push_back(std::move(op)); }

  const Value& value(int index) const { return values_[(size_t)index]; }

  // Memory for all buffers; false when there is none.
  bool finish(int logits) {
    logits_ = logits;
    Op best{BEST};
    best.in = logits;
    add_op(std::move(best));
    std::vector<int64_t> sizes;
    for (size_t i = 0; i < values_.size(); i++) {
      const Value& value = values_[i];
      if ((int)i == logits_) continue;
      if ((size_t)value.buffer >= sizes.size()) sizes.resize((size_t)value.buffer + 1, 0);
      int64_t& size = sizes[(size_t)value.buffer];
      size = std::max(size, row_bytes(value) * row_capacity(max_rows_[value.domain]));
    }
    for (int64_t size : sizes) {
      // The memory of the logits is the caller's.
      if (size == 0) {
        buffers_.push_back(nullptr);
        continue;
      }
      void* memory = aligned_alloc(64, (size_t)((size + 63) / 64 * 64));
      if (!memory) return false;
      memset(memory, 0, (size_t)((size + 63) / 64 * 64));
      buffers_.push_back(memory);
    }
    int64_t k = 32;
    for (const Op& op : ops_) {
      for (const Segment& segment : op.segments) k = std::max<int64_t>(k, segment.k);
      if (op.kind == ATTEND) plan_for(op.attention);
    }
    // Unpacked weights, then gates of a gated product.
    gates_offset_ = (scratch_bytes(k) + 63) / 64 * 64;
    for (void*& memory : scratch_) {
      memory = aligned_alloc(64, (size_t)(gates_offset_ + 128 * max_rows_[0]));
      if (!memory) return false;
    }
    for (int parity = 0; parity < 2; parity++) {
      for (int thread = 0; thread < team_.size(); thread++) counters_[parity].emplace_back(ops_.size());
      done_[parity] = std::vector<Counter>(ops_.size());
    }
    return true;
  }

  void set_pages(int layer, void* base, int64_t page_stride) {
    if ((size_t)layer >= pages_.size()) pages_.resize((size_t)layer + 1, Pages{nullptr, 0, page_size_});
    pages_[(size_t)layer] = {base, page_stride, page_size_};
  }

  bool run(const Step& step) {
    if (step.num_tokens > max_rows_[0] || step.num_sampled > max_rows_[1]) return false;
    step_ = step;
    for (AttendPlan& plan : plans_) make_plan(plan);
    int64_t partial_floats = 0;
    for (const Op& op : ops_) {
      if (op.kind != ATTEND) continue;
      const AttendPlan& plan = plan_for(op.attention);
      partial_floats = std::max<int64_t>(
          partial_floats, plan.num_partials * op.attention.num_kv_heads * (op.attention.head_dim + PARTIAL_HEAD));
    }
    if (partial_floats > partials_capacity_) {
      free(partials_);
      partials_capacity_ = partial_floats + partial_floats / 2;
      partials_ = (float*)aligned_alloc(64, (size_t)((partials_capacity_ * 4 + 63) / 64 * 64));
      if (!partials_) {
        partials_capacity_ = 0;
        return false;
      }
    }
    parity_ = 1 - parity_;
    team_.run([](void* self, int id) { ((Program*)self)->work(id); }, this);
    return true;
  }

  int num_threads() const { return team_.size(); }

  // From now on, time each operation; `profile` gives nanoseconds so far by kind, and the number of kinds.
  void start_profile() { nanoseconds_.assign(NUM_OP_KINDS, 0); }

  int profile(int64_t* out) const {
    for (size_t kind = 0; kind < nanoseconds_.size(); kind++) out[kind] = nanoseconds_[kind];
    return (int)nanoseconds_.size();
  }

 private:
  // In a line of its own.
  struct alignas(64) Counter : std::atomic<int64_t> {
    Counter() : std::atomic<int64_t>(0) {}
  };

  int64_t num_rows(int domain) const { return domain == DOMAIN_TOKENS ? step_.num_tokens : step_.num_sampled; }

  Rows rows(int index) const {
    const Value& value = values_[(size_t)index];
    Rows out{};
    out.kind = value.kind;
    out.width = value.width;
    out.stride = stride_of(value);
    if (index == logits_) {
      out.stride = step_.logits_stride;
      out.f32 = step_.logits;
      return out;
    }
    char* memory = (char*)buffers_[(size_t)value.buffer];
    if (value.kind == KIND_F32) out.f32 = (float*)memory;
    if (value.kind == KIND_BF16) out.bf16 = (uint16_t*)memory;
    if (value.kind == KIND_Q8) {
      const int64_t groups = (out.stride / 32 + 1) / 2 * 2;
      out.capacity = row_capacity(max_rows_[value.domain]);
      out.groups = (CodedGroup*)memory;
      out.q8 = (int8_t*)(out.groups + out.capacity * groups);
    }
    return out;
  }

  AttendPlan& plan_for(const AttentionLayer& layer) {
    const int group = layer.num_heads / layer.num_kv_heads;
    const bool only_sampled = layer.only_sampled != 0;
    for (AttendPlan& plan : plans_) {
      if (plan.group == group && plan.only_sampled == only_sampled) return plan;
    }
    plans_.push_back({});
    plans_.back().group = group;
    plans_.back().num_kv_heads = layer.num_kv_heads;
    plans_.back().only_sampled = only_sampled;
    return plans_.back();
  }

  // Long rows first, so that no thread is left with one at the end. Rows of one token are split by chunks where there are too few of them
  // to keep the threads busy, and else attend together to the pages they share; the result is the same in any case.
  void make_plan(AttendPlan& plan) {
    plan.members.clear();
    plan.units.clear();
    plan.splits.clear();
    plan.num_partials = 0;
    short_rows_.clear();
    const bool is_split = step_.num_rows < 2 * team_.size();
    if (plan.only_sampled) {
      is_wanted_.assign((size_t)step_.num_tokens, 0);
      for (int64_t i = 0; i < step_.num_sampled; i++) is_wanted_[(size_t)step_.sampled_tokens[i]] = 1;
    }
    int64_t first_token = 0;
    for (int64_t row = 0; row < step_.num_rows; row++) {
      const int64_t start = step_.row_starts[row], count = step_.row_counts[row];
      const int64_t pairs = count * plan.group;
      const int32_t all_chunks = (int32_t)((start + count - 1) / CHUNK + 1);
      const bool is_short = all_chunks > 1 && pairs <= (is_split ? ATTEND_ROWS : ATTEND_ROWS / 2);
      if (is_short && is_wanted(plan, first_token, 0, pairs)) {
        const AttendMember member{row, first_token, 0, (int32_t)pairs, all_chunks};
        if (is_split) {
          add_split(plan, member);
        } else {
          short_rows_.push_back(member);
        }
      } else if (!is_short) {
        for (int64_t first = (pairs - 1) / ATTEND_ROWS * ATTEND_ROWS; first >= 0; first -= ATTEND_ROWS) {
          const int64_t size = std::min<int64_t>(ATTEND_ROWS, pairs - first);
          const int64_t last = start + (first + size - 1) / plan.group;
          if (!is_wanted(plan, first_token, first, size)) continue;
          add_unit(plan, {row, first_token, (int32_t)first, (int32_t)size, (int32_t)(last / CHUNK + 1)}, 0);
        }
      }
      first_token += count;
    }
    add_joint_units(plan);
  }

  void add_unit(AttendPlan& plan, const AttendMember& member, int32_t is_read_once) {
    plan.units.push_back({(int32_t)plan.members.size(), 1, 0, member.end_chunk, is_read_once, -1});
    plan.members.push_back(member);
  }

  void add_split(AttendPlan& plan, const AttendMember& member) {
    plan.splits.push_back({(int64_t)plan.units.size(), member.end_chunk});
    for (int32_t chunk = 0; chunk < member.end_chunk; chunk++) {
      plan.units.push_back({(int32_t)plan.members.size(), 1, chunk, chunk + 1, 1, plan.num_partials});
      plan.num_partials += member.count;
    }
    plan.members.push_back(member);
    plan.members.back().end_chunk = 0;
  }

  // Short rows whose sequences begin with the same pages become members of one unit, as long as every thread has two pieces of work: the
  // shared keys and values are then loaded once for up to ATTEND_ROWS rows instead of once for each sequence.
  void add_joint_units(AttendPlan& plan) {
    const auto less = [this](const AttendMember& a, const AttendMember& b) {
      const int64_t *x = page_table(a), *y = page_table(b);
      return std::lexicographical_compare(x, x + num_full_pages(a), y, y + num_full_pages(b));
    };
    if (short_rows_.size() > 1) std::sort(short_rows_.begin(), short_rows_.end(), less);
    const int64_t num_units_min = (2 * team_.size() + plan.num_kv_heads - 1) / plan.num_kv_heads;
    const int64_t num_members_max = std::max<int64_t>(1, (int64_t)short_rows_.size() / num_units_min);
    int32_t num_rows = 0;
    for (const AttendMember& member : short_rows_) {
      if (!plan.units.empty() && num_rows > 0) {
        AttendUnit& unit = plan.units.back();
        const int32_t shared = std::min(unit.shared_end, num_shared_chunks(plan.members[(size_t)unit.first_member], member));
        // One that shares far less would make the others read the rest alone.
        const bool is_worth_it = shared > 0 && (unit.num_members == 1 || 2 * shared >= unit.shared_end);
        if (is_worth_it && unit.num_members < num_members_max && num_rows + member.count <= ATTEND_ROWS) {
          plan.members.push_back(member);
          unit.num_members++;
          unit.shared_end = shared;
          num_rows += member.count;
          continue;
        }
      }
      add_unit(plan, member, 1);
      num_rows = member.count;
    }
  }

  const int64_t* page_table(const AttendMember& member) const { return step_.page_tables + member.row * step_.table_stride; }

  // Pages of a row's sequence that the row sees whole.
  int64_t num_full_pages(const AttendMember& member) const { return step_.row_starts[member.row] / CHUNK * CHUNK / page_size_; }

  int32_t num_shared_chunks(const AttendMember& a, const AttendMember& b) const {
    const int64_t num_pages = std::min(num_full_pages(a), num_full_pages(b));
    const int64_t* x = page_table(a);
    return (int32_t)((std::mismatch(x, x + num_pages, page_table(b)).first - x) * page_size_ / CHUNK);
  }

  // Whether anything reads what (token, head) pairs [first, first + size) of a row attend to.
  bool is_wanted(const AttendPlan& plan, int64_t first_token, int64_t first, int64_t size) const {
    if (!plan.only_sampled) return true;
    const auto begin = is_wanted_.begin() + first_token;
    return std::any_of(begin + first / plan.group, begin + (first + size - 1) / plan.group + 1, [](uint8_t wanted) { return wanted; });
  }

  // Calls `body(begin, end)` for ranges of [0, count) that together are all of it. Each thread has a part of its own, the same in every
  // step, so that what it writes stays in its cache; when it is done it takes from the others' parts. Ranges begin at multiples of `unit`.
  template <class Body>
  void share(size_t op, int id, int64_t count, int64_t unit, Body body) {
    if (count == 0) return;
    const int64_t size = team_.size(), num_units = (count + unit - 1) / unit;
    for (int64_t turn = 0; turn < size; turn++) {
      const int64_t part = (id + turn) % size, first = num_units * part / size, last = num_units * (part + 1) / size;
      // Small enough to share the end of the work, large enough to be worth the counter.
      const int64_t grain = std::max<int64_t>(1, (last - first) / 16);
      Counter& counter = counters_[parity_][(size_t)part][op];
      int64_t num_done = 0;
      for (;;) {
        if (turn > 0 && counter.load(std::memory_order_relaxed) >= last - first) break;
        const int64_t begin = first + counter.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= last) break;
        const int64_t end = std::min(begin + grain, last);
        body(begin * unit, std::min(end * unit, count));
        num_done += end - begin;
      }
      if (num_done > 0) done_[parity_][op].fetch_add(num_done, std::memory_order_release);
    }
    // The operation is over when its pieces are, not when the threads are here: one that lost its core between two operations holds up
    // nobody.
    const Counter& done = done_[parity_][op];
    for (int spins = 0; done.load(std::memory_order_acquire) < num_units; spins++) wait_a_moment(spins);
  }

  void work(int id) {
    // Nobody looks at the other set of counters in this step.
    for (Counter& counter : counters_[1 - parity_][(size_t)id]) counter.store(0, std::memory_order_relaxed);
    if (id == 0) {
      for (Counter& counter : done_[1 - parity_]) counter.store(0, std::memory_order_relaxed);
    }
    const bool is_timed = id == 0 && !nanoseconds_.empty();
    int64_t begin = is_timed ? now_ns() : 0;
    for (size_t i = 0; i < ops_.size(); i++) {
      execute(i, id);
      if (ops_[i].kind == LINEAR || ops_[i].kind == GATED_LINEAR || ops_[i].kind == ATTEND) team_.make_way(id);
      if (is_timed) {
        const int64_t end = now_ns();
        nanoseconds_[ops_[i].kind] += end - begin;
        begin = end;
      }
    }
  }

  void execute(size_t index, int id) {
    const Op& op = ops_[index];
    const Kernels& k = *kernels_;
    const int domain = values_[(size_t)(op.out >= 0 ? op.out : op.in)].domain;
    const int64_t count = num_rows(domain);
    if (count == 0) return;
    const Rows in = op.in >= 0 ? rows(op.in) : Rows{}, out = op.out >= 0 ? rows(op.out) : Rows{};
    switch (op.kind) {
      case EMBED:
        share(index, id, count, 1, [&](int64_t b, int64_t e) { k.embed(op.segments[0], step_.token_ids, b, e, op.number, out); });
        break;
      case NORM:
        share(index, id, count, 1,
              [&](int64_t b, int64_t e) { k.norm(in, out, b, e, op.weight, op.bias, op.number, op.is_layer_norm); });
        break;
      case PACK:
        share(index, id, count, 1, [&](int64_t b, int64_t e) { k.pack(in, out, b, e); });
        break;
      case LINEAR:
      case GATED_LINEAR:
        linear(index, id, in, out, count);
        break;
      case GATED:
        share(index, id, count, 1, [&](int64_t b, int64_t e) { k.gated(in, out, b, e, op.activation); });
        break;
      case ACTIVATE:
        share(index, id, count, 1, [&](int64_t b, int64_t e) { k.activate(in, out, b, e, op.activation); });
        break;
      case ADD:
        share(index, id, count, 1, [&](int64_t b, int64_t e) { k.add(out, in, b, e, op.number); });
        break;
      case SCALE:
        share(index, id, count, 1, [&](int64_t b, int64_t e) { k.scale(out, b, e, op.number); });
        break;
      case SOFT_CAP:
        share(index, id, count, 1, [&](int64_t b, int64_t e) { k.soft_cap(out, b, e, op.number); });
        break;
      case GATHER:
        share(index, id, count, 1, [&](int64_t b, int64_t e) {
          for (int64_t row = b; row < e; row++) {
            memcpy(out.f32 + row * out.stride, in.f32 + step_.sampled_tokens[row] * in.stride, sizeof(float) * (size_t)in.stride);
          }
        });
        break;
      case ROTATE_STORE:
        share(index, id, count, 1, [&](int64_t b, int64_t e) {
          k.rotate_store[page_format_](in, out, op.attention, pages_[(size_t)op.attention.layer], step_, b, e);
        });
        break;
      case BEST:
        share(index, id, count, 1, [&](int64_t b, int64_t e) { k.best(in, b, e, step_.best, step_.is_finite); });
        break;
      case NUM_OP_KINDS:
        break;
      case ATTEND:
      case MERGE: {
        const AttendPlan& plan = plan_for(op.attention);
        const AttendContext context{&op.attention, pages_[(size_t)op.attention.layer], &step_, plan.members.data(), in, out, partials_};
        const int64_t heads = op.attention.num_kv_heads;
        const int64_t pieces = op.kind == ATTEND ? (int64_t)plan.units.size() : (int64_t)plan.splits.size();
        // One head after the other: its keys and values then stay in a core's cache while the rows of a long prompt go by.
        share(index, id, pieces * heads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t piece = begin; piece < end; piece++) {
            const int head = (int)(piece / pieces);
            if (op.kind == ATTEND) {
              k.attend[page_format_](context, plan.units[(size_t)(piece % pieces)], head);
            } else {
              const AttendPlan::Split& split = plan.splits[(size_t)(piece % pieces)];
              k.merge(context, plan.units.data() + split.first, split.count, head);
            }
          }
        });
        break;
      }
    }
  }

  // Fewer rows than these are not worth unpacking a panel once more for.
  static constexpr int64_t BLOCK_ROWS_MIN = 64;

  void linear(size_t index, int id, const Rows& in, const Rows& out, int64_t count) {
    const Op& op = ops_[index];
    const bool is_gated = op.kind == GATED_LINEAR;
    int64_t num_units = 0;
    for (const Segment& segment : op.segments) num_units += (segment.n + 31) / 32;
    if (is_gated) num_units /= 2;
    // Many rows are shared by rows: a thread then meets its own rows in every operation. Few are shared by outputs.
    int64_t num_blocks = std::clamp<int64_t>(count / BLOCK_ROWS_MIN, 1, team_.size());
    const int64_t block_rows = (count + num_blocks - 1) / num_blocks;
    // Two panels at a time where a line of outputs, 64 bytes, holds those of two.
    const int64_t step_units = out.kind != KIND_F32 && num_units % 2 == 0 && num_blocks == 1 ? 2 : 1;
    auto* scratch = (uint8_t*)scratch_[(size_t)id];
    share(index, id, num_units * num_blocks, step_units, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; piece++) {
        int64_t unit = piece % num_units;
        const int64_t first = piece / num_units * block_rows, last = std::min(count, first + block_rows);
        if (is_gated) {
          kernels_->gated_linear(op.segments[0], op.segments[1], unit, in, out, first, last, op.target, scratch,
                                 (float*)(scratch + gates_offset_));
          continue;
        }
        size_t s = 0;
        while (unit >= (op.segments[s].n + 31) / 32) unit -= (op.segments[s++].n + 31) / 32;
        kernels_->linear(op.segments[s], unit, in, out, first, last, op.target, scratch);
      }
    });
  }

  const Kernels* kernels_;
  int64_t max_rows_[2];
  int page_size_;
  int page_format_;
  Team team_;
  std::vector<Value> values_;
  std::vector<Op> ops_;
  std::vector<void*> buffers_;
  std::vector<void*> scratch_;
  std::vector<Pages> pages_;
  std::vector<AttendPlan> plans_;
  // By token, whether it is sampled; of the plan that is being made.
  std::vector<uint8_t> is_wanted_;
  std::vector<AttendMember> short_rows_;
  // Pieces given out, by parity of the step, thread and operation; and pieces done.
  std::vector<std::vector<Counter>> counters_[2];
  std::vector<Counter> done_[2];
  int parity_ = 0;
  float* partials_ = nullptr;
  int64_t partials_capacity_ = 0;
  int64_t gates_offset_ = 0;
  int logits_ = -1;
  std::vector<int64_t> nanoseconds_;
  Step step_{};
};

}  // namespace headrace

using namespace headrace;

#define EXPORT extern "C" __attribute__((visibility("default")))

// The number of the interface: a library of another build is refused.
EXPORT int32_t hr_abi_version() { return 6; }

// The best instruction set of this CPU that is built in: 3 AVX-512 with BF16 and VNNI, 2 AVX-512 with VNNI, 1 AVX2, 0 any.
EXPORT int32_t hr_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool is_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (is_avx512 && __builtin_cpu_supports("avx512bf16")) return 3;
  if (is_avx512) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

EXPORT void* hr_program_new(int32_t isa, int64_t max_tokens, int64_t max_sampled, int32_t num_threads, int32_t page_size,
                            int32_t page_format) {
  return new Program(kernels_for(isa), max_tokens, max_sampled, num_threads, page_size, page_format);
}

EXPORT void hr_program_free(void* program) { delete (Program*)program; }

EXPORT int32_t hr_program_threads(void* program) { return ((Program*)program)->num_threads(); }

EXPORT int32_t hr_value(void* program, int32_t kind, int32_t width, int32_t domain, int32_t buffer) {
  return ((Program*)program)->add_value(kind, width, domain, buffer);
}

EXPORT int32_t hr_finish(void* program, int32_t logits) { return ((Program*)program)->finish(logits); }

EXPORT void hr_set_pages(void* program, int32_t layer, void* base, int64_t page_stride) {
  ((Program*)program)->set_pages(layer, base, page_stride);
}

EXPORT int32_t hr_run(void* program, const Step* step) { return ((Program*)program)->run(*step); }

EXPORT void hr_start_profile(void* program) { ((Program*)program)->start_profile(); }

EXPORT int32_t hr_profile(void* program, int64_t* nanoseconds) { return ((Program*)program)->profile(nanoseconds); }

EXPORT void hr_embed(void* program, int32_t out, const Segment* table, float scale) {
  Op op{EMBED};
  op.out = out;
  op.segments.push_back(*table);
  op.number = scale;
  ((Program*)program)->add_op(std::move(op));
}

EXPORT void hr_norm(void* program, int32_t in, int32_t out, const float* weight, const float* bias, float eps, int32_t is_layer_norm) {
  Op op{NORM};
  op.in = in;
  op.out = out;
  op.weight = weight;
  op.bias = bias;
  op.number = eps;
  op.is_layer_norm = is_layer_norm;
  ((Program*)program)->add_op(std::move(op));
}

EXPORT void hr_linear(void* program, int32_t in, int32_t out, const Segment* segments, int32_t num_segments, const float* bias,
                      float scale, int32_t accumulate) {
  Op op{LINEAR};
  op.in = in;
  op.out = out;
  op.segments.assign(segments, segments + num_segments);
  op.target = {bias, scale, accumulate, 0};
  ((Program*)program)->add_op(std::move(op));
}

// `segments` are the gate and the other factor, of one size, a multiple of 32.
EXPORT void hr_gated_linear(void* program, int32_t in, int32_t out, const Segment* segments, const float* bias, int32_t activation) {
  Op op{GATED_LINEAR};
  op.in = in;
  op.out = out;
  op.segments.assign(segments, segments + 2);
  op.target = {bias, 1.0f, 0, activation};
  ((Program*)program)->add_op(std::move(op));
}

// Operations with an input, an output and one number: PACK, GATED and ACTIVATE (the function), ADD (onto the output), SCALE, SOFT_CAP, GATHER.
EXPORT int32_t hr_plain(void* program, int32_t kind, int32_t in, int32_t out, float number) {
  static const OpKind kinds[] = {PACK, GATED, ACTIVATE, ADD, SCALE, SOFT_CAP, GATHER};
  if (kind < 0 || kind >= (int32_t)(sizeof(kinds) / sizeof(kinds[0]))) return 0;
  Op op{kinds[kind]};
  op.in = in;
  op.out = out;
  op.number = number;
  op.activation = (int)number;
  ((Program*)program)->add_op(std::move(op));
  return 1;
}

// Rotates and stores `qkv`, leaving the queries in `queries`, then attends into `out`.
EXPORT void hr_attend(void* program, int32_t qkv, int32_t queries, int32_t out, const AttentionLayer* layer) {
  Op op{ROTATE_STORE};
  op.in = qkv;
  op.out = queries;
  op.attention = *layer;
  ((Program*)program)->add_op(op);
  op.in = queries;
  op.out = out;
  op.kind = ATTEND;
  ((Program*)program)->add_op(op);
  op.kind = MERGE;
  ((Program*)program)->add_op(std::move(op));
}
