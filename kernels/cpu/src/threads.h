// Threads that do one thing side by side, again and again; between two times they sleep.
#pragma once

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace headrace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000LL + time.tv_nsec;
}

// One turn of waiting for another thread: the pieces of a step are microseconds; after some of these the core is given away, so that
// the services that share it run.
inline void wait_a_moment(int spins) {
  if (spins < 2000) {
    relax();
  } else {
    sched_yield();
  }
}

class Team {
 public:
  explicit Team(int size) : size_(size < 1 ? 1 : size), not_before_((size_t)size_) {
    for (int id = 1; id < size_; id++) {
      auto* start = new Start{this, id};
      pthread_t thread;
      if (pthread_create(&thread, nullptr, &Team::enter, start) != 0) {
        delete start;
        size_ = id;
        break;
      }
      threads_.push_back(thread);
    }
  }

  ~Team() {
    body_ = nullptr;
    wake();
    for (pthread_t thread : threads_) pthread_join(thread, nullptr);
  }

  int size() const { return size_; }

  // Let whoever waits for this core run now, when no other thread waits for a piece of work that this one has begun. Taken by force it
  // would be gone in the middle of one, and all threads would wait. A program that keeps the core is not let in again for some time.
  void make_way(int id) {
    if (size_ == 1) return;
    const int64_t begin = now_ns();
    int64_t& not_before = not_before_[(size_t)id].value;
    if (begin < not_before) return;
    sched_yield();
    const int64_t end = now_ns();
    if (end - begin > LONG_AWAY_NS) not_before = end + AWAY_PAUSES * (end - begin);
  }

  // Every thread calls `body(argument, id)`; the caller is thread 0. Gives back when all have ended.
  void run(void (*body)(void*, int), void* argument) {
    body_ = body;
    argument_ = argument;
    if (size_ > 1) wake();
    body(argument, 0);
    barrier();
  }

 private:
  static constexpr int SPINS_IDLE = 400;
  // Other services are done in a few hundred microseconds.
  static constexpr int64_t LONG_AWAY_NS = 1'000'000;
  // So that a program which takes all it can get costs a thirtieth beside what the kernel gives it anyway.
  static constexpr int64_t AWAY_PAUSES = 30;

  struct alignas(64) Moment {
    int64_t value = 0;
  };

  struct Start {
    Team* team;
    int id;
  };

  void barrier() {
    if (size_ == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == (uint32_t)size_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) wait_a_moment(spins);
  }

  void wake() {
    epoch_.fetch_add(1, std::memory_order_release);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      syscall(SYS_futex, (uint32_t*)&epoch_, FUTEX_WAKE_PRIVATE, size_, nullptr, nullptr, 0);
    }
  }

  static void* enter(void* argument) {
    auto* start = (Start*)argument;
    start->team->serve(start->id);
    delete start;
    return nullptr;
  }

  void serve(int id) {
    uint32_t seen = 0;
    for (;;) {
      for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen; spins++) {
        if (spins < SPINS_IDLE) {
          relax();
          continue;
        }
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        syscall(SYS_futex, (uint32_t*)&epoch_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (body_ == nullptr) return;
      body_(argument_, id);
      barrier();
    }
  }

  int size_;
  std::vector<Moment> not_before_;
  std::vector<pthread_t> threads_;
  void (*body_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<uint32_t> sleepers_{0};
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace headrace
