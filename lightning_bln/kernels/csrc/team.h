// Threads that walk through a sequence together: who owns which rows and units, and where they meet.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(_WIN32)
#include <malloc.h>
#endif
#include <thread>
#include <vector>

namespace bln {

struct Range {
  int begin = 0, end = 0;
  int size() const { return end - begin; }
};

// The i-th of n nearly equal parts of [0, size), cut at multiples of `grain` where there are enough of them.
inline Range part(int size, int i, int n, int grain = 1) {
  const int64_t grains = size / grain;
  if (grain > 1 && grains >= n) {
    const int end = i + 1 == n ? size : int(grains * (i + 1) / n) * grain;
    return {int(grains * i / n) * grain, end};
  }
  return {int(int64_t(size) * i / n), int(int64_t(size) * (i + 1) / n)};
}

// Uninitialised memory on a cache line's boundary.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size) { allocate(size); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }
  void allocate(size_t size) {
    release();
    const size_t bytes = (size * sizeof(T) + 127) / 64 * 64;
#if defined(_WIN32)
    data_ = static_cast<T*>(_aligned_malloc(bytes, 64));
#else
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
#endif
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  void release() {
#if defined(_WIN32)
    _aligned_free(data_);
#else
    std::free(data_);
#endif
    data_ = nullptr;
  }
  T* data_ = nullptr;
};

// A dissemination barrier: in the k-th of log2(size) rounds each member signals the one 2^k places on and waits for its
// own signal, so that no cache line has two writers. Members spin first, since they meet after microseconds, and then
// yield, since another program may hold the core.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {
    while (1 << rounds_ < size) rounds_++;
    flags_ = std::vector<Flag>(size_t(size) * rounds_);
    visits_ = std::vector<Flag>(size);
  }
  void wait(int id) {
    const unsigned visit = visits_[id].count.load(std::memory_order_relaxed) + 1;
    visits_[id].count.store(visit, std::memory_order_relaxed);
    for (int k = 0; k < rounds_; k++) {
      flags_[size_t((id + (1 << k)) % size_) * rounds_ + k].count.store(visit, std::memory_order_release);
      const auto& own = flags_[size_t(id) * rounds_ + k].count;
      for (int spins = 0; int(own.load(std::memory_order_acquire) - visit) < 0; spins++) {
        if (spins > 4000) std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
        else
          __builtin_ia32_pause();
#endif
      }
    }
  }

 private:
  struct alignas(64) Flag {
    std::atomic<unsigned> count{0};
  };
  int size_, rounds_ = 0;
  std::vector<Flag> flags_, visits_;
};

// One thread of a grid of rows x columns: it owns a range of the batch and a range of the hidden units.
struct Member {
  int id, size, row, rows, column, columns;
  Barrier* barrier;
  void wait() const {
    if (size > 1) barrier->wait(id);
  }
};

}  // namespace bln
