// Batch layer normalization of an array [rows, positions, features], with no recurrence.
#pragma once
#include "norm.h"

namespace bln {

// Statistics of the batch run over rows, one set for each position; features are contiguous, the other axes strided.
// Groups of features are normalised by themselves. Of planes (planes.h) positions are contiguous instead.
template <class T>
struct DenseArgs {
  int64_t rows, positions, features, groups, threads;
  int64_t shared;                                                      // of planes: statistics run over positions too
  int64_t row_stride, position_stride, feature_stride;                 // of x, output and grad_x
  int64_t grad_row_stride, grad_position_stride, grad_feature_stride;  // of grad
  const T* x;
  T* output;
  const T* grad;
  T* grad_x;                   // or null
  const int64_t* batch_sizes;  // [positions]: rows that hold data, the others being left alone; null if all do
  NormArgs<T> norm;

  int running(int t) const { return int(batch_sizes ? batch_sizes[t] : rows); }
  int units() const { return int(features / groups); }
};

template <class T>
int dense_members(const DenseArgs<T>& a) {
  const int64_t work = a.rows * a.positions * a.features / 8192;
  const int64_t threads = a.threads < work ? a.threads : work;
  return threads < 1 ? 1 : int(threads);
}

template <class T>
struct DensePlan {
  const DenseArgs<T>& a;
  int members;
  bool alone;  // each member takes positions of its own; else all share the rows of one after the other
  std::vector<typename Norm<T>::Shared> shared;
  Buffer<T> totals;
  Barrier barrier;

  DensePlan(const DenseArgs<T>& args, int members)
      : a(args), members(members), alone(members == 1 || args.positions >= members), shared(alone ? members : 1),
        totals(size_t(members) * 2 * args.features), barrier(members) {
    for (auto& one : shared)
      Norm<T>::allocate(one, a.norm, int(a.groups), a.units(), int(a.rows), alone ? 1 : members, 1);
  }
};

template <class T>
class Dense {
 public:
  Dense(DensePlan<T>& plan, int id)
      : plan(plan), a(plan.a), me(plan.alone ? Member{id, 1, 0, 1, 0, 1, &plan.barrier}
                                             : Member{id, plan.members, id, plan.members, 0, 1, &plan.barrier}),
        positions(plan.alone ? part(int(a.positions), id, plan.members) : Range{0, int(a.positions)}),
        rows(part(int(a.rows), me.row, me.rows)),
        norm(a.norm, plan.shared[plan.alone ? id : 0], me, int(a.groups), a.units(), int(a.rows), {0, a.units()}) {}

 protected:
  DensePlan<T>& plan;
  const DenseArgs<T>& a;
  Member me;
  Range positions, rows;
  Norm<T> norm;

  Range running(int t) const { return Norm<T>::clipped(rows, a.running(t)); }
};

template <class T>
class DenseForward : Dense<T> {
  using Dense<T>::a, Dense<T>::me, Dense<T>::positions, Dense<T>::running, Dense<T>::norm;

 public:
  using Plan = DensePlan<T>;
  using Dense<T>::Dense;
  void run() {
    for (int t = positions.begin; t < positions.end; t++) {
      const T* x = a.x + t * a.position_stride;
      const Range some = running(t);
      norm.measure(t, x, a.row_stride, some);
      if (norm.meets(t)) me.wait();
      norm.settle(t, a.running(t), some);
      if (norm.has_feature(t))
        write<true>(x, a.output + t * a.position_stride, some);
      else
        write<false>(x, a.output + t * a.position_stride, some);
    }
  }

 private:
  template <bool Feature>
  void write(const T* x, T* output, Range some) const {
    const int n = a.units();
    for (int b = some.begin; b < some.end; b++)
      for (int g = 0; g < int(a.groups); g++) {
        const auto y = norm.template normalized<Feature>(g, b, x + b * a.row_stride + g * n);
        T* to = output + b * a.row_stride + g * n;
#pragma omp simd
        for (int j = 0; j < n; j++) to[j] = y[j];
      }
  }
};

template <class T>
class DenseBackward : Dense<T> {
  using Dense<T>::a, Dense<T>::plan, Dense<T>::me, Dense<T>::positions, Dense<T>::running, Dense<T>::norm;
  int id_;

 public:
  using Plan = DensePlan<T>;
  DenseBackward(DensePlan<T>& plan, int id) : Dense<T>(plan, id), id_(id) {}
  void run() {
    const int features = int(a.features);
    for (int t = positions.begin; t < positions.end; t++) {
      const T *x = a.x + t * a.position_stride, *grad = a.grad + t * a.grad_position_stride;
      const Range some = running(t);
      norm.recall(t, some);
      norm.sums(t, grad, a.grad_row_stride, x, a.row_stride, some);
      if (norm.gradient_meets(t)) me.wait();
      norm.end_sums(t, a.running(t), some);
      if (a.grad_x)
        norm.template apply<false>(grad, a.grad_row_stride, x, a.row_stride, a.grad_x + t * a.position_stride,
                                   a.row_stride, some);
    }
    T* own = plan.totals.get() + size_t(id_) * 2 * features;
    norm.copy_totals(own, own + features);
    if (plan.members > 1) plan.barrier.wait(id_);
    if (id_ != 0) return;
    for (int j = 0; j < features; j++) {
      T bias = 0, gain = 0;
      for (int k = 0; k < plan.members; k++)
        bias += plan.totals[size_t(k) * 2 * features + j], gain += plan.totals[(size_t(k) * 2 + 1) * features + j];
      if (a.norm.grad_bias) a.norm.grad_bias[j] = bias;
      if (a.norm.grad_weight) a.norm.grad_weight[j] = gain;
    }
  }
};

}  // namespace bln
