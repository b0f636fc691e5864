// The library's entry points: raw pointers in, a status out. No header of torch or Python is included, so that one
// build serves every version of both.
#pragma once
#include "backward.h"
#include "dense.h"
#include "forward.h"
#include "gather.h"
#include "layout.h"
#include "planes_backward.h"
#include "planes_forward.h"
#include "product.h"
#include "program.h"

#if defined(_WIN32)
#define BLN_EXPORT extern "C" __declspec(dllexport)
#else
#define BLN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace bln {

// The OpenMP runtime that torch has loaded: threads of a second one would compete with torch's for the cores.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;
};
static Runtime runtime;

template <class F>
struct Job {
  F body;
  static void run(void* job) { static_cast<Job*>(job)->body(runtime.thread(), runtime.threads()); }
};

// body(id, members) on up to `threads` threads.
template <class F>
void in_parallel(int threads, F body) {
  if (threads <= 1 || !runtime.parallel) return body(0, 1);
  Job<F> job{body};
  runtime.parallel(&Job<F>::run, &job, unsigned(threads), 0);
}

// What an entry point returns.
enum Status : int { kDone, kNoMemory, kBadSizes };

// Whether running sequences fit the arrays: from all of them down to one at least, `rows` together unless that is zero.
inline bool fits(const int64_t* batch_sizes, int64_t steps, int64_t batch, int64_t rows = 0) {
  if (steps < 1 || batch < 1) return false;
  if (!batch_sizes) return rows == 0 || rows == steps * batch;
  int64_t before = batch, total = 0;
  for (int64_t t = 0; t < steps; t++) {
    if (batch_sizes[t] < 1 || batch_sizes[t] > before) return false;
    total += before = batch_sizes[t];
  }
  return rows == 0 || rows == total;
}

// The plan depends on the number of threads, which is known only inside the region. Where fewer threads came than were
// asked for, as in a nested region, the pass runs on a plan for one.
template <class T, template <class> class Pass, template <class> class Buffers>
int run(const RecurrenceArgs<T>& args) {
  if (!fits(args.batch_sizes, args.steps, args.batch, args.rows)) return kBadSizes;
  try {
    const Teams teams = divide(args);
    Plan<T> plan(args, teams);
    Buffers<T> buffers(plan);
    std::atomic<int> granted{0};
    in_parallel(teams.size(), [&](int id, int members) {
      if (members != teams.size()) {
        if (id == 0) granted = members;
        return;
      }
      Pass<T>(plan, buffers, id).run();
    });
    if (granted) {
      Plan<T> alone(args, {1, 1});
      Buffers<T> own(alone);
      Pass<T>(alone, own, 0).run();
    }
    return kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

// Independent forward passes, each on one thread.
template <class T>
int run_each(const RecurrenceArgs<T>* calls, int64_t count, int64_t threads) {
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{kDone};
  in_parallel(int(std::min(threads, count)), [&](int, int) {
    for (int64_t k = next++; k < count; k = next++)
      if (const int status = run<T, Forward, ForwardBuffers>(calls[k])) failed = status;
  });
  return failed;
}

template <class Pass, class T>
int run_dense(const DenseArgs<T>& args) {
  if (args.batch_sizes && !fits(args.batch_sizes, args.positions, args.rows)) return kBadSizes;
  try {
    const int threads = dense_members(args);
    typename Pass::Plan plan(args, threads);
    std::atomic<int> granted{0};
    in_parallel(threads, [&](int id, int members) {
      if (members != threads) {
        if (id == 0) granted = members;
        return;
      }
      Pass(plan, id).run();
    });
    if (granted) {
      typename Pass::Plan alone(args, 1);
      Pass(alone, 0).run();
    }
    return kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

template <class T>
int run_product(const ProductArgs& args) {
  std::atomic<int> failed{kDone};
  in_parallel(int(args.threads), [&](int id, int members) {
    try {
      product<T>(args, id, members);
    } catch (const std::bad_alloc&) {
      failed = kNoMemory;
    }
  });
  return failed;
}

template <class T>
int run_program(const ProgramArgs& args) {
  if (!fits(args.batch_sizes, args.steps, args.batch)) return kBadSizes;
  try {
    const int threads = int(args.threads);
    ProgramPlan<T> plan(args, threads);
    std::deque<Program<T>>
        members_of_plan;  // made here, since memory that lacks inside the region would end the process
    for (int id = 0; id < threads; id++) members_of_plan.emplace_back(plan, id);
    std::atomic<int> granted{0};
    in_parallel(threads, [&](int id, int members) {
      if (members == threads)
        members_of_plan[size_t(id)].run();
      else if (id == 0)
        granted = members;
    });
    if (granted) {
      ProgramPlan<T> alone(args, 1);
      Program<T>(alone, 0).run();
    }
    return kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

template <class T>
int run_gather(const GatherArgs<T>& args) {
  if (!fits(args.batch_sizes, args.steps, args.samples)) return kBadSizes;
  gather(args);
  return kDone;
}

}  // namespace bln

BLN_EXPORT void bln_set_runtime(void* parallel, void* thread, void* threads) {
  bln::runtime.parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(parallel);
  bln::runtime.thread = reinterpret_cast<int (*)()>(thread);
  bln::runtime.threads = reinterpret_cast<int (*)()>(threads);
}

BLN_EXPORT uint64_t bln_layout_hash() {
  constexpr uint64_t hash = bln::layout_hash();
  return hash;
}

// One entry point for each dtype.
#define BLN_ENTRIES(T)                                                                                       \
  BLN_EXPORT int bln_forward_##T(const bln::RecurrenceArgs<T>* args) {                                       \
    return bln::run<T, bln::Forward, bln::ForwardBuffers>(*args);                                            \
  }                                                                                                          \
  BLN_EXPORT int bln_forward_each_##T(const bln::RecurrenceArgs<T>* calls, int64_t count, int64_t threads) { \
    return bln::run_each(calls, count, threads);                                                             \
  }                                                                                                          \
  BLN_EXPORT int bln_backward_##T(const bln::RecurrenceArgs<T>* args) {                                      \
    return bln::run<T, bln::Backward, bln::BackwardBuffers>(*args);                                          \
  }                                                                                                          \
  BLN_EXPORT int bln_dense_forward_##T(const bln::DenseArgs<T>* args) {                                      \
    return bln::run_dense<bln::DenseForward<T>>(*args);                                                      \
  }                                                                                                          \
  BLN_EXPORT int bln_dense_backward_##T(const bln::DenseArgs<T>* args) {                                     \
    return bln::run_dense<bln::DenseBackward<T>>(*args);                                                     \
  }                                                                                                          \
  BLN_EXPORT int bln_planes_forward_##T(const bln::DenseArgs<T>* args) {                                     \
    return args->shared ? bln::run_dense<bln::PlanesForward<T, true>>(*args)                                 \
                        : bln::run_dense<bln::PlanesForward<T, false>>(*args);                               \
  }                                                                                                          \
  BLN_EXPORT int bln_planes_backward_##T(const bln::DenseArgs<T>* args) {                                    \
    return args->shared ? bln::run_dense<bln::PlanesBackward<T, true>>(*args)                                \
                        : bln::run_dense<bln::PlanesBackward<T, false>>(*args);                              \
  }                                                                                                          \
  BLN_EXPORT int bln_gather_##T(const bln::GatherArgs<T>* args) { return bln::run_gather(*args); }           \
  BLN_EXPORT int bln_program_##T(const bln::ProgramArgs* args) { return bln::run_program<T>(*args); }        \
  BLN_EXPORT int bln_product_##T(const bln::ProductArgs* args) { return bln::run_product<T>(*args); }

BLN_ENTRIES(float)
BLN_ENTRIES(double)
