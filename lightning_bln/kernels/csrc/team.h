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

// Spins, since the threads meet after microseconds, then yields, since another program may hold the core.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins > 4000) std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
      else
        __builtin_ia32_pause();
#endif
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
  int size_;
};

// One thread of a grid of rows x columns: it owns a range of the batch and a range of the hidden units.
struct Member {
  int id, size, row, rows, column, columns;
  Barrier* barrier;
  void wait() const {
    if (size > 1) barrier->wait();
  }
};

}  // namespace bln
