// Merges the moments of a training sequence into a population, in one pass.
#pragma once
#include "team.h"

namespace bln {

// Chan's merge of the moments seen so far with those of one batch, for quantities [steps, groups, width + 3]: the batch
// mean of each feature, then the mean over samples of feature mean and variance, and the inverse batch size.
template <class T>
struct GatherArgs {
  int64_t steps, groups, width, samples;
  int64_t batch;                   // samples of the batch, where several count as one; 0: as many
  int64_t has_batch, has_feature;  // 0: that half was not computed, and counts as mean 0 and variance 1
  const int64_t* batch_sizes;      // [steps] or null: all samples at every step
  const T* batch_moments;          // [steps, 2, groups * width]
  const T* feature_moments;        // [steps, 2, groups, samples]
  const int64_t* old_count;        // [steps, groups], or null at the first batch
  const T *old_mean, *old_m2;      // [steps, groups, width + 3]
  int64_t* count;
  T *mean, *m2;
};

template <class T>
void gather(const GatherArgs<T>& a) {
  const int64_t columns = a.groups * a.width;
  for (int64_t t = 0; t < a.steps; t++) {
    const int64_t size = a.batch_sizes ? a.batch_sizes[t] : a.samples;
    for (int64_t g = 0; g < a.groups; g++) {
      const int64_t at = t * a.groups + g, first = at * (a.width + 3), seen = a.old_count ? a.old_count[at] : 0;
      a.count[at] = seen + size;
      const T share = T(size) / T(seen + size), cross = T(seen) * share;
      const T *batch = a.batch_moments + t * 2 * columns + g * a.width, *spread = batch + columns;
      T *mean = a.mean + first, *m2 = a.m2 + first;
      const auto merge = [&](int64_t j, T value, T square) {
        const T old = seen ? a.old_mean[first + j] : T(0), delta = value - old;
        mean[j] = old + delta * share;
        m2[j] = (seen ? a.old_m2[first + j] : T(0)) + square + delta * delta * cross;
      };
      if (a.has_batch && seen) {
        const T *old_mean = a.old_mean + first, *old_m2 = a.old_m2 + first;
#pragma omp simd
        for (int64_t j = 0; j < a.width; j++) {
          const T delta = batch[j] - old_mean[j];
          mean[j] = old_mean[j] + delta * share;
          m2[j] = old_m2[j] + spread[j] * T(size) + delta * delta * cross;
        }
      } else {
        for (int64_t j = 0; j < a.width; j++)
          merge(j, a.has_batch ? batch[j] : T(0), (a.has_batch ? spread[j] : T(1)) * T(size));
      }
      T sums[2] = {0, 1};
      for (int64_t k = 0; a.has_feature && k < 2; k++) {
        const T* of_rows = a.feature_moments + ((t * 2 + k) * a.groups + g) * a.samples;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t b = 0; b < size; b++) sum += of_rows[b];
        sums[k] = sum / T(size);
      }
      merge(a.width, sums[0], T(0));
      merge(a.width + 1, sums[1], T(0));
      merge(a.width + 2, T(1) / T(a.batch ? a.batch : size), T(0));
    }
  }
}

}  // namespace bln
