// The normalisation of one step: moments over the batch and over the features, as an affine map, and its gradient.
#pragma once
#include <cmath>
#include <vector>

#include "team.h"

namespace bln {

// Pointers may be null where said. G' is 1 for joint statistics, else the number of gates; D = gates * units.
template <class T>
struct NormArgs {
  int64_t enabled;         // 0: the identity, plus bias
  int64_t joint;           // feature statistics over all gates at once
  int64_t fixed;           // given statistics are the same at every step
  double scale, eps;
  const double* w_feature;  // [steps]
  const double* w_batch;    // [steps]
  const T* weight;          // [D] or null
  const T* bias;            // [D] or null
  const T* batch_mean;      // given: [steps, D] or null
  const T* batch_var;       // given: [steps, D] or null
  const T* feature_mean;    // given: [steps, G'] or null
  const T* feature_var;     // given: [steps, G'] or null
  T* batch_moments;         // [steps, 2, D]: mean and biased variance of the current batch, or null
  T* feature_moments;       // [steps, 2, G', batch]: the same over features, or null
  T* grad_weight;           // [D] or null
  T* grad_bias;             // [D] or null
};

// Row and column coefficients of y = x * (weight[j] * alpha[b] + p[j]) + (q[j] - weight[j] * beta[b]).
template <class T>
class Norm {
 public:
  struct Shared {  // where members leave their part of a sum; two slots, so that one meeting a step is enough
    Buffer<T> columns, rows;
  };

  Norm(const NormArgs<T>& args, Shared& shared, const Member& member, int gates, int units, int batch, Range own_units)
      : a(args), shared_(shared), member_(member), gates_(gates), units_(units), batch_(batch), own_(own_units),
        groups_(args.joint ? 1 : gates), D(gates * units), row_size_(size_t(groups_) * batch),
        columns_(size_t(D) * 11), rows_(row_size_ * 7) {
    T* at = columns_.get();
    for (T** to : {&weight, &p, &q, &mean_, &used_mean_, &inverse_, &c1_, &c2_, &c3_, &bias_sum_, &bias_}) *to = at, at += D;
    at = rows_.get();
    for (T** to : {&alpha, &beta, &row_mean_, &row_used_, &row_inverse_, &r2_, &r3_}) *to = at, at += row_size_;
    weight_sum_.allocate(D);
    for (int j = 0; j < D; j++) {
      weight[j] = a.enabled ? T(a.scale) * (a.weight ? a.weight[j] : T(1)) : T(0);
      p[j] = T(1);
      q[j] = bias_[j] = a.bias ? a.bias[j] : T(0);
      mean_[j] = bias_sum_[j] = weight_sum_[j] = T(0);
    }
    for (size_t i = 0; i < row_size_; i++) alpha[i] = beta[i] = T(0);
  }

  static void allocate(Shared& shared, const NormArgs<T>& args, int gates, int units, int batch, int rows, int columns) {
    if (!args.enabled && !args.grad_bias) return;
    shared.columns.allocate(size_t(2) * rows * 2 * gates * units);
    shared.rows.allocate(size_t(2) * columns * 2 * (args.joint ? 1 : gates) * batch);
  }

  const NormArgs<T>& a;
  T *weight, *p, *q, *alpha, *beta;

  T* alpha_of(int gate) const { return alpha + size_t(group(gate)) * batch_; }
  T* beta_of(int gate) const { return beta + size_t(group(gate)) * batch_; }

  // Whether the step needs the other members' moments, and so a meeting between measure() and settle().
  bool meets(int t) const {
    return (member_.rows > 1 && current_batch(t)) || (member_.columns > 1 && current_feature(t));
  }

  // This member's part of the current moments of x (its rows of [batch, gates, units]), left for the others.
  void measure(int t, const T* x, ptrdiff_t ld, Range rows) {
    if (!a.enabled) return;
    slot_ ^= 1;
    const bool batch = current_batch(t), feature = current_feature(t);
    if (batch && feature)
      measure<true, true>(x, ld, rows);
    else if (batch)
      measure<true, false>(x, ld, rows);
    else if (feature)
      measure<false, true>(x, ld, rows);
  }

  // The step's coefficients from all members' moments; `running` sequences take part.
  void settle(int t, int running, Range rows) {
    if (!a.enabled) return;
    if (current_batch(t)) {
      for_own([&](int j0, int j1) { merge_columns(t, running, j0, j1); });
    }
    if (current_feature(t)) {
      for (int g = 0; g < groups_; g++) merge_rows(t, g, rows);
    }
    coefficients(t, rows);
  }

  // The step's coefficients from the moments that the forward pass saved.
  void recall(int t, Range rows) {
    if (!a.enabled) return;
    if (current_batch(t)) {
      const T* saved = a.batch_moments + size_t(t) * 2 * D;
      for_own([&](int j0, int j1) {
#pragma omp simd
        for (int j = j0; j < j1; j++) {
          mean_[j] = saved[j];
          inverse_[j] = saved[D + j];
        }
      });
    }
    if (current_feature(t)) {
      const T* saved = a.feature_moments + size_t(t) * 2 * row_size_;
      for (int g = 0; g < groups_; g++) {
        const size_t first = size_t(g) * batch_ + rows.begin, end = first + rows.size();
#pragma omp simd
        for (size_t i = first; i < end; i++) row_mean_[i] = saved[i], row_inverse_[i] = saved[row_size_ + i];
      }
    }
    coefficients(t, rows);
  }

  bool wants_sums() const { return a.enabled || a.grad_bias; }

  bool gradient_meets(int t) const { return a.enabled && meets(t); }

  // This member's part of the sums that the gradient needs; `grad` is that of y, both [batch, gates, units]. Rows may
  // be taken in stripes, between begin_sums() and end_sums().
  void sums(int t, const T* grad, ptrdiff_t ldg, const T* x, ptrdiff_t ldx, Range rows) {
    begin_sums(rows);
    for (int b = rows.begin; b < rows.end; b += stripe) add_sums(grad, ldg, x, ldx, clipped({b, b + stripe}, rows.end));
    end_sums(t);
  }

  void begin_sums(Range rows) {
    if (!a.enabled) return;
    slot_ ^= 1;
    T* sum = column_slot(member_.row);
    for_own([&](int j0, int j1) {
      for (int j = j0; j < j1; j++) sum[j] = sum[D + j] = c3_[j] = T(0);
    });
    T* row_sum = row_slot(member_.column);
    for (int g = 0; g < groups_; g++)
      for (int b = rows.begin; b < rows.end; b++) row_sum[size_t(g) * batch_ + b] = row_sum[row_size_ + size_t(g) * batch_ + b] = T(0);
  }

  void add_sums(const T* grad, ptrdiff_t ldg, const T* x, ptrdiff_t ldx, Range rows) {
    if (!a.enabled) {
      if (a.grad_bias)
        for (int b = rows.begin; b < rows.end; b++)
          for_own([&](int j0, int j1) {
            const T* from = grad + b * ldg;
#pragma omp simd
            for (int j = j0; j < j1; j++) bias_sum_[j] += from[j];
          });
      return;
    }
    T* sum = column_slot(member_.row);
    T* dot = sum + D;
    T* row_sum = row_slot(member_.column);
    T* row_dot = row_sum + row_size_;
    for (int g = 0; g < gates_; g++) {
      const int j0 = g * units_ + own_.begin, n = own_.size();
      const size_t at = size_t(group(g)) * batch_;
      T *S = sum + j0, *E = dot + j0, *F = c3_ + j0;
      const T *w = weight + j0, *mu = used_mean_ + j0;
      int b = rows.begin;
      for (; b + 4 <= rows.end; b += 4) {
        const T *y0 = grad + b * ldg + j0, *y1 = y0 + ldg, *y2 = y1 + ldg, *y3 = y2 + ldg;
        const T *x0 = x + b * ldx + j0, *x1 = x0 + ldx, *x2 = x1 + ldx, *x3 = x2 + ldx;
        const T *m = row_used_ + at + b, *r = row_inverse_ + at + b;
        const T m0 = m[0], m1 = m[1], m2 = m[2], m3 = m[3], r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];
        T s0 = 0, s1 = 0, s2 = 0, s3 = 0, d0 = 0, d1 = 0, d2 = 0, d3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, d0, d1, d2, d3)
        for (int j = 0; j < n; j++) {
          const T f0 = y0[j] * ((x0[j] - m0) * r0), f1 = y1[j] * ((x1[j] - m1) * r1);
          const T f2 = y2[j] * ((x2[j] - m2) * r2), f3 = y3[j] * ((x3[j] - m3) * r3);
          S[j] += (y0[j] + y1[j]) + (y2[j] + y3[j]);
          E[j] += (y0[j] * (x0[j] - mu[j]) + y1[j] * (x1[j] - mu[j])) + (y2[j] * (x2[j] - mu[j]) + y3[j] * (x3[j] - mu[j]));
          F[j] += (f0 + f1) + (f2 + f3);
          s0 += y0[j] * w[j], s1 += y1[j] * w[j], s2 += y2[j] * w[j], s3 += y3[j] * w[j];
          d0 += f0 * w[j], d1 += f1 * w[j], d2 += f2 * w[j], d3 += f3 * w[j];
        }
        T *to = row_sum + at + b, *to_dot = row_dot + at + b;
        to[0] += s0, to[1] += s1, to[2] += s2, to[3] += s3;
        to_dot[0] += d0, to_dot[1] += d1, to_dot[2] += d2, to_dot[3] += d3;
      }
      for (; b < rows.end; b++) {
        const T *y0 = grad + b * ldg + j0, *x0 = x + b * ldx + j0;
        const T m0 = row_used_[at + b], r0 = row_inverse_[at + b];
        T s0 = 0, d0 = 0;
#pragma omp simd reduction(+ : s0, d0)
        for (int j = 0; j < n; j++) {
          const T f0 = y0[j] * ((x0[j] - m0) * r0);
          S[j] += y0[j];
          E[j] += y0[j] * (x0[j] - mu[j]);
          F[j] += f0;
          s0 += y0[j] * w[j];
          d0 += f0 * w[j];
        }
        row_sum[at + b] += s0;
        row_dot[at + b] += d0;
      }
    }
  }

  void end_sums(int t) {
    if (!a.enabled) return;
    const T w_batch = T(a.w_batch[t]), w_feature = T(a.w_feature[t]), scale = T(a.scale);
    T *S = column_slot(member_.row), *E = S + D, *gain = weight_sum_.get();
    for_own([&](int j0, int j1) {
#pragma omp simd
      for (int j = j0; j < j1; j++) {
        bias_sum_[j] += S[j];
        E[j] *= inverse_[j];
        gain[j] += scale * (w_batch * E[j] + w_feature * c3_[j]);
      }
    });
  }

  // The coefficients of x's gradient from all members' sums.
  void begin_apply(int t, int running, Range rows) {
    if (!a.enabled) return;
    const T wb = T(a.w_batch[t]), wf = T(a.w_feature[t]);
    const bool through_mean = wb != T(0) && !a.batch_mean, through_var = wb != T(0) && !a.batch_var;
    for_own([&](int j0, int j1) {
      const T mean_share = through_mean ? T(1) / T(running) : T(0), var_share = through_var ? T(1) / T(running) : T(0);
      T *S = column_slot(member_.row), *E = S + D;
      if (!through_mean && !through_var) {  // nobody has waited for the other members' sums, and nothing needs them
#pragma omp simd
        for (int j = j0; j < j1; j++) {
          c1_[j] = weight[j] * wb * inverse_[j];
          c2_[j] = c3_[j] = T(0);
        }
        return;
      }
      if (member_.rows > 1) {
        S = c2_, E = c3_;
        for (int j = j0; j < j1; j++) S[j] = E[j] = T(0);
        for (int k = 0; k < member_.rows; k++) {
          const T* other = column_slot(k);
#pragma omp simd
          for (int j = j0; j < j1; j++) {
            S[j] += other[j];
            E[j] += other[D + j];
          }
        }
      }
#pragma omp simd
      for (int j = j0; j < j1; j++) {
        const T slope = weight[j] * wb * inverse_[j], sum = S[j], dot = E[j];
        c1_[j] = slope;
        c3_[j] = slope * inverse_[j] * dot * var_share;
        c2_[j] = slope * (sum * mean_share - inverse_[j] * dot * var_share * mean_[j]);
      }
    });
    const bool row_mean = wf != T(0) && !a.feature_mean, row_var = wf != T(0) && !a.feature_var;
    const T count = T(features());
    for (int g = 0; g < groups_; g++)
      for (int b = rows.begin; b < rows.end; b++) {
        const size_t i = size_t(g) * batch_ + b;
        T S = 0, E = 0;
        for (int k = 0; k < member_.columns && (row_mean || row_var); k++) S += row_slot(k)[i], E += row_slot(k)[row_size_ + i];
        r3_[i] = row_var ? alpha[i] * row_inverse_[i] * E / count : T(0);
        r2_[i] = (row_mean ? alpha[i] * S / count : T(0)) - (row_var ? r3_[i] * row_mean_[i] : T(0));
      }
  }

  // The gradient of x, to `out` (or added to it), once its coefficients are there.
  template <bool Add>
  void apply(const T* grad, ptrdiff_t ldg, const T* x, ptrdiff_t ldx, T* out, ptrdiff_t ldo, Range rows) const {
    for (int g = 0; g < gates_; g++) {
      const int j0 = g * units_ + own_.begin, n = own_.size();
      const size_t at = size_t(group(g)) * batch_;
      const T *w = weight + j0, *c1 = c1_ + j0, *c2 = c2_ + j0, *c3 = c3_ + j0;
      for (int b = rows.begin; b < rows.end; b++) {
        const T *y = grad + b * ldg + j0, *v = x + b * ldx + j0;
        T* to = out + b * ldo + j0;
        const T r1 = alpha[at + b], r2 = r2_[at + b], r3 = r3_[at + b];
#pragma omp simd
        for (int j = 0; j < n; j++) {
          const T value = y[j] * (w[j] * r1 + c1[j]) - v[j] * (r3 + c3[j]) - (r2 + c2[j]);
          to[j] = Add ? to[j] + value : value;
        }
      }
    }
  }

  // Gradients of weight and bias, once all steps are summed: left by each member, added up by those of the first row.
  void leave_totals() {
    if (!wants_sums() || member_.rows == 1) return;
    slot_ ^= 1;
    T* to = column_slot(member_.row);
    for_own([&](int j0, int j1) {
      for (int j = j0; j < j1; j++) to[j] = bias_sum_[j], to[D + j] = weight_sum_[j];
    });
  }
  void write_totals() {
    if (!wants_sums() || member_.row != 0) return;
    for_own([&](int j0, int j1) {
      for (int j = j0; j < j1; j++) {
        T bias = bias_sum_[j], gain = weight_sum_[j];
        for (int k = 1; k < member_.rows; k++) bias += column_slot(k)[j], gain += column_slot(k)[D + j];
        if (a.grad_bias) a.grad_bias[j] = bias;
        if (a.grad_weight && a.enabled) a.grad_weight[j] = gain;
      }
    });
  }

  // What leave_totals() would leave, for members that walk alone.
  void copy_totals(T* bias, T* gain) const {
    for (int j = 0; j < D; j++) bias[j] = bias_sum_[j], gain[j] = weight_sum_[j];
  }

 private:
  int group(int gate) const { return groups_ == 1 ? 0 : gate; }
  int features() const { return groups_ == 1 ? D : units_; }
  bool current_batch(int t) const { return a.enabled && a.w_batch[t] != 0 && !(a.batch_mean && a.batch_var); }
  bool current_feature(int t) const { return a.enabled && a.w_feature[t] != 0 && !(a.feature_mean && a.feature_var); }
  T* column_slot(int k) const { return shared_.columns.get() + (size_t(slot_) * member_.rows + k) * 2 * D; }
  T* row_slot(int k) const { return shared_.rows.get() + (size_t(slot_) * member_.columns + k) * 2 * row_size_; }

  template <class F>
  void for_own(F body) {
    for (int g = 0; g < gates_; g++) body(g * units_ + own_.begin, g * units_ + own_.end);
  }

  template <bool Batch, bool Feature>
  void measure(const T* x, ptrdiff_t ld, Range rows) {
    T* mean = column_slot(member_.row);
    T* spread = mean + D;
    // Blocks that stay in the cache between their two passes.
    const int most = block_size / (gates_ * own_.size() > 0 ? gates_ * own_.size() : 1), step = most < 32 ? 32 : most;
    for (int begin = rows.begin; begin == rows.begin || begin < rows.end; begin += step) {
      const Range block{begin, rows.end - begin < step ? rows.end : begin + step};
      if (begin == rows.begin) {
        measure_block<Batch, Feature>(x, ld, block, mean, spread);
        continue;
      }
      measure_block<Batch, Feature>(x, ld, block, c1_, c2_);
      if (!Batch) continue;
      const T before = T(begin - rows.begin), share = T(block.size()) / (before + T(block.size()));
      for_own([&](int j0, int j1) {
        for (int j = j0; j < j1; j++) {
          const T distance = c1_[j] - mean[j];
          mean[j] += distance * share;
          spread[j] += c2_[j] + distance * distance * before * share;
        }
      });
    }
  }

  template <bool Batch, bool Feature>
  void measure_block(const T* x, ptrdiff_t ld, Range rows, T* mean, T* spread) {
    T* row_mean = row_slot(member_.column);
    T* row_spread = row_mean + row_size_;
    const T many = T(rows.size() > 0 ? rows.size() : 1);
    const T own_features = T((groups_ == 1 ? gates_ : 1) * own_.size() > 0 ? (groups_ == 1 ? gates_ : 1) * own_.size() : 1);
    if (Feature)
      for (int g = 0; g < groups_; g++)
        for (int b = rows.begin; b < rows.end; b++)
          row_mean[size_t(g) * batch_ + b] = row_spread[size_t(g) * batch_ + b] = T(0);
    if (Batch)
      for_own([&](int j0, int j1) {
        for (int j = j0; j < j1; j++) mean[j] = spread[j] = T(0);
      });
    total<Batch, Feature, false>(x, ld, rows, mean, mean, row_mean, row_mean);
    if (Batch)
      for_own([&](int j0, int j1) {
        const T inverse = T(1) / many;
        for (int j = j0; j < j1; j++) mean[j] *= inverse;
      });
    if (Feature)
      for (int g = 0; g < groups_; g++)
        for (int b = rows.begin; b < rows.end; b++) row_mean[size_t(g) * batch_ + b] /= own_features;
    total<Batch, Feature, true>(x, ld, rows, spread, mean, row_spread, row_mean);
  }

  // Adds column and row sums of x, or of its squared distances to the means, reading memory in its order.
  template <bool Batch, bool Feature, bool Centred>
  void total(const T* x, ptrdiff_t ld, Range rows, T* column, const T* mean, T* row, const T* row_mean) const {
    for (int b = rows.begin; b < rows.end; b += stripe)
      for (int g = 0; g < gates_; g++) {
        const int j0 = g * units_ + own_.begin;
        const size_t at = size_t(group(g)) * batch_;
        total_of_gate<Batch, Feature, Centred>(x + j0, ld, clipped({b, b + stripe}, rows.end), own_.size(), column + j0,
                                               mean + j0, row + at, row_mean + at);
      }
  }

  template <bool Batch, bool Feature, bool Centred>
  static void total_of_gate(const T* x, ptrdiff_t ld, Range rows, int n, T* column, const T* mean, T* row, const T* row_mean) {
    int b = rows.begin;
    for (; b + 4 <= rows.end; b += 4) {
      const T *x0 = x + b * ld, *x1 = x0 + ld, *x2 = x1 + ld, *x3 = x2 + ld;
      T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      const T m0 = Centred && Feature ? row_mean[b] : T(0), m1 = Centred && Feature ? row_mean[b + 1] : T(0);
      const T m2 = Centred && Feature ? row_mean[b + 2] : T(0), m3 = Centred && Feature ? row_mean[b + 3] : T(0);
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int j = 0; j < n; j++) {
        if (Batch) {
          const T m = Centred ? mean[j] : T(0);
          column[j] += Centred ? (square(x0[j] - m) + square(x1[j] - m)) + (square(x2[j] - m) + square(x3[j] - m))
                               : (x0[j] + x1[j]) + (x2[j] + x3[j]);
        }
        if (Feature) {
          s0 += Centred ? square(x0[j] - m0) : x0[j];
          s1 += Centred ? square(x1[j] - m1) : x1[j];
          s2 += Centred ? square(x2[j] - m2) : x2[j];
          s3 += Centred ? square(x3[j] - m3) : x3[j];
        }
      }
      if (Feature) row[b] += s0, row[b + 1] += s1, row[b + 2] += s2, row[b + 3] += s3;
    }
    for (; b < rows.end; b++) {
      const T* x0 = x + b * ld;
      T s0 = 0;
      const T m0 = Centred && Feature ? row_mean[b] : T(0);
#pragma omp simd reduction(+ : s0)
      for (int j = 0; j < n; j++) {
        if (Batch) column[j] += Centred ? square(x0[j] - mean[j]) : x0[j];
        if (Feature) s0 += Centred ? square(x0[j] - m0) : x0[j];
      }
      if (Feature) row[b] += s0;
    }
  }

  static T square(T x) { return x * x; }

  // Chan's merge of the rows' members, for the columns [j0, j1).
  void merge_columns(int t, int running, int j0, int j1) {
    const T inverse = T(1) / T(running);
    if (member_.rows == 1) {
      const T* own = column_slot(0);
#pragma omp simd
      for (int j = j0; j < j1; j++) {
        mean_[j] = own[j];
        inverse_[j] = own[D + j] * inverse;
      }
    } else {
      for (int j = j0; j < j1; j++) mean_[j] = inverse_[j] = T(0);
      for (int k = 0; k < member_.rows; k++) {
        const T share = T(clipped(part(batch_, k, member_.rows), running).size()) * inverse;
        const T* other = column_slot(k);
        if (share > T(0)) {
#pragma omp simd
          for (int j = j0; j < j1; j++) mean_[j] += share * other[j];
        }
      }
      for (int k = 0; k < member_.rows; k++) {
        const T share = T(clipped(part(batch_, k, member_.rows), running).size()) * inverse;
        const T* other = column_slot(k);
        if (share > T(0)) {
#pragma omp simd
          for (int j = j0; j < j1; j++) inverse_[j] += share * square(other[j] - mean_[j]) + other[D + j] * inverse;
        }
      }
    }
    if (a.batch_moments && member_.row == 0) {
      T* saved = a.batch_moments + size_t(t) * 2 * D;
#pragma omp simd
      for (int j = j0; j < j1; j++) {
        saved[j] = mean_[j];
        saved[D + j] = inverse_[j];
      }
    }
  }

  void merge_rows(int t, int g, Range rows) {
    const size_t first = size_t(g) * batch_ + rows.begin, end = first + rows.size();
    const T inverse = T(1) / T(features());
    for (size_t i = first; i < end; i++) row_mean_[i] = row_inverse_[i] = T(0);
    for (int k = 0; k < member_.columns; k++) {
      const T share = T((groups_ == 1 ? gates_ : 1) * unit_part(k).size()) * inverse;
      const T* other = row_slot(k);
#pragma omp simd
      for (size_t i = first; i < end; i++) row_mean_[i] += share * other[i];
    }
    for (int k = 0; k < member_.columns; k++) {
      const T share = T((groups_ == 1 ? gates_ : 1) * unit_part(k).size()) * inverse;
      const T *other = row_slot(k), *spread = other + row_size_;
#pragma omp simd
      for (size_t i = first; i < end; i++) row_inverse_[i] += share * square(other[i] - row_mean_[i]) + spread[i] * inverse;
    }
    if (!a.feature_moments || member_.column != 0) return;
    T* saved = a.feature_moments + size_t(t) * 2 * row_size_;
#pragma omp simd
    for (size_t i = first; i < end; i++) saved[i] = row_mean_[i], saved[row_size_ + i] = row_inverse_[i];
  }

  // Expects the current variances in the places of the inverse deviations, and turns them into these.
  void coefficients(int t, Range rows) {
    const T wb = T(a.w_batch[t]), wf = T(a.w_feature[t]), eps = T(a.eps);
    const size_t at = a.fixed ? 0 : size_t(t);
    const T *mean = a.batch_mean ? a.batch_mean + at * D : mean_, *var = a.batch_var ? a.batch_var + at * D : inverse_;
    for_own([&](int j0, int j1) {
      if (wb == T(0)) {
        for (int j = j0; j < j1; j++) used_mean_[j] = mean_[j] = inverse_[j] = p[j] = T(0), q[j] = bias_[j];
        return;
      }
#pragma omp simd
      for (int j = j0; j < j1; j++) {
        const T inverse = T(1) / std::sqrt(var[j] + eps);
        const T m = mean[j];
        used_mean_[j] = m;
        inverse_[j] = inverse;
        p[j] = weight[j] * wb * inverse;
        q[j] = bias_[j] - weight[j] * wb * inverse * m;
      }
    });
    for (int g = 0; g < groups_; g++) {
      const size_t first = size_t(g) * batch_ + rows.begin, end = first + rows.size();
      if (wf == T(0)) {
        for (size_t i = first; i < end; i++) row_used_[i] = row_mean_[i] = row_inverse_[i] = alpha[i] = beta[i] = T(0);
        continue;
      }
      const bool has_mean = a.feature_mean, has_var = a.feature_var;
      const T fixed_mean = has_mean ? a.feature_mean[at * groups_ + g] : T(0);
      const T fixed_var = has_var ? a.feature_var[at * groups_ + g] : T(0);
#pragma omp simd
      for (size_t i = first; i < end; i++) {
        const T m = has_mean ? fixed_mean : row_mean_[i];
        const T inverse = T(1) / std::sqrt((has_var ? fixed_var : row_inverse_[i]) + eps);
        row_used_[i] = m;
        row_inverse_[i] = inverse;
        alpha[i] = wf * inverse;
        beta[i] = wf * inverse * m;
      }
    }
  }

 public:
  static Range clipped(Range range, int limit) {
    return {range.begin < limit ? range.begin : limit, range.end < limit ? range.end : limit};
  }
  static constexpr int grain = 16;
  static constexpr int stripe = 4;  // rows that several passes take one after the other while they lie in the cache
  static constexpr int block_size = 65536 / sizeof(T);
  Range unit_part(int k) const { return part(units_, k, member_.columns, grain); }

 private:
  Shared& shared_;
  Member member_;
  int gates_, units_, batch_;
  Range own_;
  int groups_, D, slot_ = 0;
  size_t row_size_;
  Buffer<T> columns_, rows_, weight_sum_;
  T *mean_, *used_mean_, *inverse_, *c1_, *c2_, *c3_, *bias_sum_, *bias_;
  T *row_mean_, *row_used_, *row_inverse_, *r2_, *r3_;
};

}  // namespace bln
