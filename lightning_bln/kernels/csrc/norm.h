// The normalisation of one step: moments over the batch and over the features, the equation, and its gradient.
#pragma once
#include <cmath>
#include <vector>

#include "lanes.h"
#include "team.h"

namespace bln {

// Pointers may be null where said. G' is 1 for joint statistics, else the number of gates; D = gates * units.
template <class T>
struct NormArgs {
  int64_t enabled;  // 0: the identity, plus bias
  int64_t joint;    // feature statistics over all gates at once
  int64_t fixed;    // given statistics are the same at every step
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

// The equation's parts of one number x, and their gradients from that of y at x's distance to the current mean.
template <class T>
BLN_INLINED inline T batch_part(T x, T mean, T slope, T bias) {
  return (x - mean) * slope + bias;
}
template <class T>
BLN_INLINED inline T feature_part(T x, T mean, T slope) {
  return (x - mean) * slope;
}
template <class T>
BLN_INLINED inline T batch_gradient(T y, T slope, T of_mean, T distance, T of_var) {
  return (y * slope - of_mean) - distance * of_var;
}
template <class T>
BLN_INLINED inline T feature_gradient(T y, T of_mean, T distance, T of_var, T slope) {
  return ((y - of_mean) - distance * of_var) * slope;
}

// Whether a mean lies so far from zero that the distances to it, rounded as it is, have a mean of their own.
template <class T>
BLN_INLINED inline bool is_far(T mean, T var) {
  return mean * mean > T(16) * var;
}

// One gate of a row x, normalised. Each mean is taken away before anything is multiplied: an affine map of x itself, or
// one distance for both parts, would lose as many digits as the means are larger than the deviations.
template <class T, bool Feature>
struct Normalized {
  const T *x, *weight, *slope, *mean, *bias;
  T row_slope, row_mean;

  BLN_INLINED T operator[](int j) const {
    const T y = batch_part(x[j], mean[j], slope[j], bias[j]);
    return Feature ? feature_part(x[j], row_mean, weight[j] * row_slope) + y : y;
  }
};

template <class T>
class Norm {
  using V = typename Vector<T>::type;

 public:
  struct Shared {  // where members leave their part of a sum; two slots, so that one meeting a step is enough
    Buffer<T> columns, rows;
  };

  Norm(const NormArgs<T>& args, Shared& shared, const Member& member, int gates, int units, int batch, Range own_units)
      : a(args), shared_(shared), member_(member), gates_(gates), units_(units), batch_(batch), own_(own_units),
        groups_(args.joint ? 1 : gates), D(gates * units),
        lone_(batch == 1 && args.enabled && !args.batch_mean && !args.batch_var && args.w_feature[0] != 0),
        row_size_(size_t(groups_) * batch), columns_(size_t(D) * 11), rows_(row_size_ * 6) {
    T* at = columns_.get();
    for (T** to : {&weight_, &slope_, &mean_, &var_, &used_mean_, &inverse_, &scratch_, &c2_, &c3_, &bias_sum_, &bias_})
      *to = at, at += D;
    at = rows_.get();
    for (T** to : {&row_slope_, &row_mean_, &row_used_, &row_inverse_, &r2_, &r3_}) *to = at, at += row_size_;
    weight_sum_.allocate(D);
    for (int j = 0; j < D; j++) {
      weight_[j] = a.enabled ? T(a.scale) * (a.weight ? a.weight[j] : T(1)) : T(0);
      slope_[j] = lone_ ? T(0) : T(1);
      bias_[j] = a.bias ? a.bias[j] : T(0);
      mean_[j] = used_mean_[j] = inverse_[j] = bias_sum_[j] = weight_sum_[j] = T(0);
    }
    for (size_t i = 0; i < row_size_; i++) row_slope_[i] = row_mean_[i] = row_used_[i] = T(0);
  }

  static void allocate(Shared& shared, const NormArgs<T>& args, int gates, int units, int batch, int rows,
                       int columns) {
    if (!args.enabled && !args.grad_bias) return;
    shared.columns.allocate(size_t(2) * rows * 3 * gates * units);
    shared.rows.allocate(size_t(2) * columns * 3 * (args.joint ? 1 : gates) * batch);
  }

  const NormArgs<T>& a;

  // Row b of a gate, from its first column in `x`, once the step's coefficients are there.
  template <bool Feature = true>
  Normalized<T, Feature> normalized(int gate, int b, const T* x) const {
    const size_t j = size_t(gate) * units_, i = size_t(group(gate)) * batch_ + b;
    return {x, weight_ + j, slope_ + j, used_mean_ + j, bias_ + j, row_slope_[i], row_used_[i]};
  }

  // Whether the step has a part over features; without one, numbers that overflowed are not to become NaN.
  bool has_feature(int t) const { return a.enabled && a.w_feature[t] != 0; }

  // Whether the step needs the other members' moments, and so a meeting between measure() and settle().
  bool meets(int t) const {
    return (member_.rows > 1 && current_batch(t)) || (member_.columns > 1 && current_feature(t));
  }

  // This member's part of the current moments of x (its rows of [batch, gates, units]), left for the others.
  void measure(int t, const T* x, ptrdiff_t ld, Range rows) {
    if (!a.enabled) return;
    slot_ ^= 1;
    const bool batch = current_batch(t), feature = current_feature(t);
    if (lone_ && a.batch_moments && rows.size() > 0) keep_lone(t, x);
    if (batch && feature)
      measure<true, true>(x, ld, rows);
    else if (batch)
      measure<true, false>(x, ld, rows);
    else if (feature)
      measure<false, true>(x, ld, rows);
  }

  // Ask for the other members' sums, all lines at once: they come from far away, and only then are worked on.
  void fetch(int t) const {
    if (!a.enabled || !current_batch(t)) return;
    for (int k = 0; k < member_.rows; k++) {
      if (k == member_.row) continue;
      const T* other = column_slot(k);
      for (int g = 0; g < gates_; g++)
        for (int j = g * units_ + own_.begin; j < g * units_ + own_.end; j += int(64 / sizeof(T)))
          for (int i = 0; i < 3; i++) __builtin_prefetch(other + i * D + j);
    }
  }

  // The step's coefficients from all members' moments; `running` sequences take part.
  void settle(int t, int running, Range rows) {
    if (!a.enabled) return;
    for_own([&](int j0, int j1) { merge_columns(t, running, j0, j1); });
    if (current_feature(t)) {
      for (int g = 0; g < groups_; g++) merge_rows(t, g, rows);
    }
    row_coefficients(t, rows);
  }

  // The step's coefficients from the moments that the forward pass saved.
  void recall(int t, Range rows) {
    if (!a.enabled) return;
    const T *saved = a.batch_moments + size_t(t) * 2 * D, *saved_var = saved + D;
    for_own([&](int j0, int j1) {
      if (current_batch(t))
        column_coefficients(t, j0, j1,
                            [=](int j, T& mean, T& var) BLN_INLINED { mean = saved[j], var = saved_var[j]; });
      else
        given_columns(t, j0, j1);
    });
    if (current_feature(t)) {
      const T* saved_rows = a.feature_moments + size_t(t) * 2 * row_size_;
      for (int g = 0; g < groups_; g++) {
        const size_t first = size_t(g) * batch_ + rows.begin, end = first + rows.size();
#pragma omp simd
        for (size_t i = first; i < end; i++) row_mean_[i] = saved_rows[i], row_inverse_[i] = saved_rows[row_size_ + i];
      }
    }
    note_far_means(t, rows);
    row_coefficients(t, rows);
  }

  bool wants_sums() const { return a.enabled || a.grad_bias; }

  bool gradient_meets(int t) const { return a.enabled && meets(t); }

  // This member's part of the sums that the gradient needs; `grad` is that of y, both [batch, gates, units]. Rows may
  // be taken in stripes, after begin_sums().
  void sums(int t, const T* grad, ptrdiff_t ldg, const T* x, ptrdiff_t ldx, Range rows) {
    begin_sums(t, rows);
    for (int b = rows.begin; b < rows.end; b += stripe) add_sums(grad, ldg, x, ldx, clipped({b, b + stripe}, rows.end));
  }

  void begin_sums(int t, Range rows) {
    if (!a.enabled) return;
    slot_ ^= 1;
    has_batch_ = a.w_batch[t] != 0 && !lone_, has_feature_ = a.w_feature[t] != 0;
    T* sum = column_slot(member_.row);
    for_own([&](int j0, int j1) {
      clear(sum, j0, j1), clear(sum + D, j0, j1), clear(c3_, j0, j1);
      if (far_columns_) clear(sum + 2 * D, j0, j1);
    });
    T* row_sum = row_slot(member_.column);
    for (int g = 0; g < groups_; g++)
      for (int b = rows.begin; b < rows.end; b++)
        for (int k = 0; k < 3; k++) row_sum[k * row_size_ + size_t(g) * batch_ + b] = T(0);
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
    if (has_batch_ && has_feature_)
      accumulate<true, true>(grad, ldg, x, ldx, rows);
    else if (has_batch_)
      accumulate<true, false>(grad, ldg, x, ldx, rows);
    else
      accumulate<false, true>(grad, ldg, x, ldx, rows);
    if (far_columns_ || far_rows_) add_rests(x, ldx, rows);
  }

  // Takes in this member's sums, and sets the coefficients of x's gradient from all members'.
  void end_sums(int t, int running, Range rows) {
    if (!a.enabled) return;
    const T wb = T(a.w_batch[t]), wf = T(a.w_feature[t]), scale = T(a.scale);
    const T *own = column_slot(member_.row), *other = column_slot(member_.row ^ 1);
    const T *own_dot = own + D, *other_dot = other + D;
    for_own([&](int j0, int j1) {
      // nobody has waited for the other members' sums where nothing needs them
      if (!current_batch(t))
        column_gradients(t, j0, j1, T(0), T(0), [](int, T& sum, T& dot) BLN_INLINED { sum = dot = T(0); });
      else {
        const T share = T(1) / T(running);
        const T mean_share = a.batch_mean ? T(0) : share, var_share = a.batch_var ? T(0) : share;
        if (member_.rows == 1)
          column_gradients(t, j0, j1, mean_share, var_share,
                           [=](int j, T& sum, T& dot) BLN_INLINED { sum = own[j], dot = own_dot[j]; });
        else if (member_.rows == 2)
          column_gradients(t, j0, j1, mean_share, var_share, [=](int j, T& sum, T& dot) BLN_INLINED {
            sum = own[j] + other[j], dot = own_dot[j] + other_dot[j];
          });
        else {
          T *sums = scratch_, *dots = c2_;
          for (int j = j0; j < j1; j++) sums[j] = dots[j] = T(0);
          for (int k = 0; k < member_.rows; k++) {
            const T* some = column_slot(k);
#pragma omp simd
            for (int j = j0; j < j1; j++) sums[j] += some[j], dots[j] += some[D + j];
          }
          column_gradients(t, j0, j1, mean_share, var_share,
                           [=](int j, T& sum, T& dot) BLN_INLINED { sum = sums[j], dot = dots[j]; });
        }
        if (far_columns_) correct(j0, j1, share, a.batch_mean ? T(0) : scale * wb, var_share > T(0) ? T(1) : T(0));
      }
    });
    const bool row_mean = wf != T(0) && !a.feature_mean, row_var = wf != T(0) && !a.feature_var;
    const T count = T(features());
    const T mean_share = row_mean ? T(1) / count : T(0), var_share = row_var ? T(1) / count : T(0);
    for (int g = 0; g < groups_; g++) {
      const size_t first = size_t(g) * batch_ + rows.begin, end = first + rows.size();
      T *sum = r2_, *dot = r3_;
      for (size_t i = first; i < end; i++) sum[i] = dot[i] = T(0);
      for (int k = 0; k < member_.columns && (row_mean || row_var); k++) {
        const T *some = row_slot(k), *some_dot = some + row_size_;
#pragma omp simd
        for (size_t i = first; i < end; i++) sum[i] += some[i], dot[i] += some_dot[i];
      }
#pragma omp simd
      for (size_t i = first; i < end; i++) {
        r2_[i] = sum[i] * mean_share;
        r3_[i] = row_inverse_[i] * dot[i] * var_share;
      }
      for (int k = 0; k < member_.columns && far_rows_; k++) {
        const T* rest = row_slot(k) + 2 * row_size_;
#pragma omp simd
        for (size_t i = first; i < end; i++) r2_[i] -= r3_[i] * rest[i] * var_share;
      }
    }
  }

  // The gradient of x, to `out` (or added to it), once its coefficients are there. The variances' part has distances to
  // the current means, also where the values are normalised by given ones.
  template <bool Add>
  void apply(const T* grad, ptrdiff_t ldg, const T* x, ptrdiff_t ldx, T* out, ptrdiff_t ldo, Range rows) const {
    if (has_batch_ && has_feature_)
      apply<Add, true, true>(grad, ldg, x, ldx, out, ldo, rows);
    else if (has_batch_)
      apply<Add, true, false>(grad, ldg, x, ldx, out, ldo, rows);
    else
      apply<Add, false, true>(grad, ldg, x, ldx, out, ldo, rows);
  }

  template <bool Add, bool Batch, bool Feature>
  void apply(const T* grad, ptrdiff_t ldg, const T* x, ptrdiff_t ldx, T* out, ptrdiff_t ldo, Range rows) const {
    for (int g = 0; g < gates_; g++) {
      const int j0 = g * units_ + own_.begin, n = own_.size();
      const size_t at = size_t(group(g)) * batch_;
      const T *w = weight_ + j0, *slope = slope_ + j0, *mean = mean_ + j0, *c2 = c2_ + j0, *c3 = c3_ + j0;
      for (int b = rows.begin; b < rows.end; b++) {
        const T *y = grad + b * ldg + j0, *v = x + b * ldx + j0;
        T* to = out + b * ldo + j0;
        const T row_slope = row_slope_[at + b], row_mean = row_mean_[at + b], r2 = r2_[at + b], r3 = r3_[at + b];
#pragma omp simd
        for (int j = 0; j < n; j++) {
          const T of_batch = Batch ? batch_gradient(y[j], slope[j], c2[j], v[j] - mean[j], c3[j]) : T(0);
          const T of_row = Feature ? feature_gradient(y[j] * w[j], r2, v[j] - row_mean, r3, row_slope) : T(0);
          const T value = of_batch + of_row;
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
  int own_features() const { return (groups_ == 1 ? gates_ : 1) * own_.size(); }
  bool current_batch(int t) const { return a.enabled && a.w_batch[t] != 0 && !(a.batch_mean && a.batch_var) && !lone_; }
  bool current_feature(int t) const { return a.enabled && a.w_feature[t] != 0 && !(a.feature_mean && a.feature_var); }
  T* column_slot(int k) const { return shared_.columns.get() + (size_t(slot_) * member_.rows + k) * 3 * D; }
  T* row_slot(int k) const { return shared_.rows.get() + (size_t(slot_) * member_.columns + k) * 3 * row_size_; }

  template <class F>
  void for_own(F body) const {
    for (int g = 0; g < gates_; g++) body(g * units_ + own_.begin, g * units_ + own_.end);
  }

  // One pass: sums of distances, and of their squares, to an anchor: the mean of the first rows for columns, of two
  // numbers for rows. Where an anchor turns out to lie far from the mean, a second pass takes distances to the mean.
  template <bool Batch, bool Feature>
  void measure(const T* x, ptrdiff_t ld, Range rows) {
    T *mean = column_slot(member_.row), *spread = mean + D;
    T *row_mean = row_slot(member_.column), *row_spread = row_mean + row_size_;
    if (Batch) for_own([&](int j0, int j1) { clear(mean, j0, j1), clear(spread, j0, j1), clear(spread + D, j0, j1); });
    if (Feature)
      for (int g = 0; g < groups_; g++)
        for (int b = rows.begin; b < rows.end; b++)
          row_mean[size_t(g) * batch_ + b] = row_spread[size_t(g) * batch_ + b] = T(0);
    if (rows.size() == 0 || own_.size() == 0) return;
    if (Batch) set_anchor(x + rows.begin * ld, ld, rows.size() < stripe ? rows.size() : stripe);
    total<Batch, Feature>(x, ld, rows);
    if (Batch && centre(mean, spread, rows.size())) {
      for_own([&](int j0, int j1) {
        for (int j = j0; j < j1; j++) scratch_[j] = mean[j];
        clear(mean, j0, j1), clear(spread, j0, j1);
      });
      total<true, false>(x, ld, rows);
      centre(mean, spread, rows.size());
    }
    if (Feature)
      for (int g = 0; g < groups_; g++) centre_rows(g, x + g * units_ + own_.begin, ld, rows);
  }

  // The moments of a batch of one.
  void keep_lone(int t, const T* x) const {
    T* saved = a.batch_moments + size_t(t) * 2 * D;
    for_own([&](int j0, int j1) {
      for (int j = j0; j < j1; j++) saved[j] = x[j], saved[D + j] = T(0);
    });
  }

  void set_anchor(const T* x, ptrdiff_t ld, int rows) {
    const T share = T(1) / T(rows);
    // in place of a row that is not there stands the one before it, with no weight
    const T *x1 = x + (rows > 1) * ld, *x2 = x1 + (rows > 2) * ld, *x3 = x2 + (rows > 3) * ld;
    const T share1 = rows > 1 ? share : T(0), share2 = rows > 2 ? share : T(0), share3 = rows > 3 ? share : T(0);
    for_own([&](int j0, int j1) {
      // loops from zero: where integers wrap, others gather and scatter
      const T *y0 = x + j0, *y1 = x1 + j0, *y2 = x2 + j0, *y3 = x3 + j0;
      T* to = scratch_ + j0;
#pragma omp simd
      for (int j = 0; j < j1 - j0; j++) to[j] = (y0[j] * share + y1[j] * share1) + (y2[j] * share2 + y3[j] * share3);
    });
  }

  T row_anchor(const T* row) const { return (row[0] + row[own_.size() / 2]) * T(0.5); }

  // From sums of the columns' distances to the anchor and of their squares to mean and spread; whether an anchor lay so
  // far that the spread lacks digits. Random numbers of any count hardly ever have one.
  bool centre(T* mean, T* spread, int rows) const {
    const T share = T(1) / T(rows);
    bool any = false;
    for_own([&](int j0, int j1) {
      const T* anchor = scratch_ + j0;
      T *of_mean = mean + j0, *of_spread = spread + j0, *rest_of_mean = of_spread + D;
      int far = 0;
#pragma omp simd reduction(| : far)
      for (int j = 0; j < j1 - j0; j++) {
        const T distance = of_mean[j] * share, rest = of_spread[j] - of_mean[j] * distance;
        far |= of_spread[j] > T(8) * rest;
        of_mean[j] = anchor[j] + distance;
        rest_of_mean[j] = (anchor[j] - of_mean[j]) + distance;
        of_spread[j] = rest < T(0) ? T(0) : rest;
      }
      any |= far != 0;
    });
    return any;
  }

  // The same for the rows of a group, of which some may have to be taken again.
  void centre_rows(int g, const T* x, ptrdiff_t ld, Range rows) const {
    const size_t at = size_t(g) * batch_;
    T *means = row_slot(member_.column) + at, *spreads = means + row_size_, *anchors = r2_ + at;
    const T share = T(1) / T(own_features());
    for (int b = rows.begin; b < rows.end; b++) anchors[b] = row_anchor(x + b * ld);
    int far = 0;
#pragma omp simd reduction(| : far)
    for (int b = rows.begin; b < rows.end; b++) far |= centre(anchors[b], share, means[b], spreads[b], r3_[at + b]);
    if (!far) return;
    for (int b = rows.begin; b < rows.end; b++)
      if (r3_[at + b] != T(0)) centre_again(x + b * ld, means[b], spreads[b]);
  }

  // The same for one row, noted in `again` too.
  BLN_INLINED static bool centre(T anchor, T share, T& mean, T& spread, T& again) {
    const T distance = mean * share, rest = spread - mean * distance;
    const bool far = spread > T(4) * rest;
    mean = anchor + distance;
    spread = rest < T(0) ? T(0) : rest;
    again = far ? T(1) : T(0);
    return far;
  }

  void centre_again(const T* row, T& mean, T& spread) const {
    const T anchor = mean;
    T sum = 0, squares = 0;
    for (int g = 0; g < (groups_ == 1 ? gates_ : 1); g++) {
      const T* x = row + g * units_;
      for (int j0 = 0; j0 < own_.size(); j0 += 64) {  // small squares are not added one by one to a large one
        T part_sum = 0, part_squares = 0;
#pragma omp simd reduction(+ : part_sum, part_squares)
        for (int j = j0; j < clipped({0, j0 + 64}, own_.size()).end; j++) {
          const T distance = x[j] - anchor;
          part_sum += distance, part_squares += distance * distance;
        }
        sum += part_sum, squares += part_squares;
      }
    }
    mean = sum, spread = squares;
    T again;
    centre(anchor, T(1) / T(own_features()), mean, spread, again);
  }

  // Distances, and their squares, of all rows.
  template <bool Batch, bool Feature>
  void total(const T* x, ptrdiff_t ld, Range rows) {
    T *mean = column_slot(member_.row), *spread = mean + D;
    T *row_mean = row_slot(member_.column), *row_spread = row_mean + row_size_;
    for (int b = rows.begin; b < rows.end; b += stripe)
      for (int g = 0; g < gates_; g++) {
        const int j0 = g * units_ + own_.begin;
        const size_t at = size_t(group(g)) * batch_;
        total<Batch, Feature>(x + j0, ld, clipped({b, b + stripe}, rows.end), own_.size(), scratch_ + j0, mean + j0,
                              spread + j0, x + group(g) * units_ + own_.begin, row_mean + at, row_spread + at);
      }
  }

  // Adds the distances, and their squares, of some rows of a gate's columns. Where lanes are taken a second time at
  // the end of a row, they count for nothing.
  template <bool Batch, bool Feature>
  void total(const T* x, ptrdiff_t ld, Range rows, int n, const T* anchor, T* column, T* squares, const T* first,
             T* row, T* row_squares) const {
    int b = rows.begin;
    for (; b + 4 <= rows.end; b += 4) {
      const T* at[4];
      T m[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) at[i] = x + (b + i) * ld, m[i] = row_anchor(first + (b + i) * ld);
      V sums[8] = {};
      in_vectors<T>(n, [&](int j, auto edge) {
        V from[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) from[i] = edge.load(at[i] + j);
        if (Batch) {
          const V shift = edge.load(anchor + j);
          V d[4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) d[i] = edge.counts(from[i] - shift);
          edge.store(column + j, edge.load(column + j) + ((d[0] + d[1]) + (d[2] + d[3])));
          edge.store(squares + j, edge.load(squares + j) + ((d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3])));
        }
        if (Feature) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) {
            const V d = edge.counts(from[i] - m[i]);
            sums[i] += d, sums[4 + i] += d * d;
          }
        }
      });
      if (Feature) add_lanes<T>(sums, row + b, row_squares + b);
    }
    for (; b < rows.end; b++) {
      const T* at = x + b * ld;
      const T m = row_anchor(first + b * ld);
      V sum{}, square{};
      in_vectors<T>(n, [&](int j, auto edge) {
        const V from = edge.load(at + j);
        if (Batch) {
          const V d = edge.counts(from - edge.load(anchor + j));
          edge.store(column + j, edge.load(column + j) + d);
          edge.store(squares + j, edge.load(squares + j) + d * d);
        }
        const V d = edge.counts(from - m);
        sum += d, square += d * d;
      });
      if (Feature) row[b] += sum_of<T>(sum), row_squares[b] += sum_of<T>(square);
    }
  }

  // Of the gradient's rows: their column sums S, dots with the batch's distances E and the features' F, and row sums.
  template <bool Batch, bool Feature>
  void accumulate(const T* grad, ptrdiff_t ldg, const T* x, ptrdiff_t ldx, Range rows) {
    T* sum = column_slot(member_.row);
    T* dot = sum + D;
    T* row_sum = row_slot(member_.column);
    T* row_dot = row_sum + row_size_;
    for (int g = 0; g < gates_; g++) {
      const int j0 = g * units_ + own_.begin, n = own_.size();
      const size_t at = size_t(group(g)) * batch_;
      T *S = sum + j0, *E = dot + j0, *F = c3_ + j0;
      const T *w = weight_ + j0, *mu = used_mean_ + j0, *m = row_used_ + at, *r = row_inverse_ + at;
      int b = rows.begin;
      for (; b + 4 <= rows.end; b += 4) {
        V sums[8] = {};
        in_vectors<T>(n, [&](int j, auto edge) {
          const V weight = edge.load(w + j), mean = edge.load(mu + j);
          V y[4], d[4], f[4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) {
            y[i] = edge.counts(edge.load(grad + (b + i) * ldg + j0 + j));
            const V from = edge.load(x + (b + i) * ldx + j0 + j);
            if (Batch) d[i] = y[i] * (from - mean);
            if (Feature) {
              f[i] = y[i] * ((from - m[b + i]) * r[b + i]);
              sums[i] += y[i] * weight, sums[4 + i] += f[i] * weight;
            }
          }
          edge.store(S + j, edge.load(S + j) + ((y[0] + y[1]) + (y[2] + y[3])));
          if (Batch) edge.store(E + j, edge.load(E + j) + ((d[0] + d[1]) + (d[2] + d[3])));
          if (Feature) edge.store(F + j, edge.load(F + j) + ((f[0] + f[1]) + (f[2] + f[3])));
        });
        if (Feature) add_lanes<T>(sums, row_sum + at + b, row_dot + at + b);
      }
      for (; b < rows.end; b++) {
        V own_sum{}, own_dot{};
        in_vectors<T>(n, [&](int j, auto edge) {
          const V y = edge.counts(edge.load(grad + b * ldg + j0 + j)), from = edge.load(x + b * ldx + j0 + j),
                  weight = edge.load(w + j);
          edge.store(S + j, edge.load(S + j) + y);
          if (Batch) edge.store(E + j, edge.load(E + j) + y * (from - edge.load(mu + j)));
          if (!Feature) return;
          const V f = y * ((from - m[b]) * r[b]);
          edge.store(F + j, edge.load(F + j) + f);
          own_sum += y * weight, own_dot += f * weight;
        });
        if (Feature) row_sum[at + b] += sum_of<T>(own_sum), row_dot[at + b] += sum_of<T>(own_dot);
      }
    }
  }

  // A mean far from zero is rounded, and the distances to it have a mean of their own. The gradient takes that away
  // too: else a column's gradient would not add up to zero, and its product with an input far from zero would show it.
  void note_far_means(int t, Range rows) {
    int far = 0;
    if (current_batch(t)) {
      const T *mean = a.batch_moments + size_t(t) * 2 * D, *var = mean + D;
      for_own([&](int j0, int j1) {
#pragma omp simd reduction(| : far)
        for (int j = j0; j < j1; j++) far |= is_far(mean[j], var[j]);
      });
    }
    far_columns_ = far;
    far = 0;
    if (current_feature(t) && !a.feature_var)
      for (int g = 0; g < groups_; g++) {
        const size_t first = size_t(g) * batch_ + rows.begin;
        const T *mean = a.feature_moments + size_t(t) * 2 * row_size_ + first, *var = mean + row_size_;
#pragma omp simd reduction(| : far)
        for (int b = 0; b < rows.size(); b++) far |= is_far(mean[b], var[b]);
      }
    far_rows_ = far;
  }

  // Of the columns' gradients; `gain` and `curve` are zero where nothing that lies in those hangs on the current mean.
  void correct(int j0, int j1, T share, T gain, T curve) {
    T *rest = scratch_, *weights = weight_sum_.get();
    const T* own = column_slot(member_.row);
    for (int j = j0; j < j1; j++) rest[j] = T(0);
    for (int k = 0; k < member_.rows; k++) {
      const T* some = column_slot(k) + 2 * D;
#pragma omp simd
      for (int j = j0; j < j1; j++) rest[j] += some[j] * share;
    }
#pragma omp simd
    for (int j = j0; j < j1; j++) {
      weights[j] -= gain * inverse_[j] * own[j] * rest[j];
      c3_[j] -= curve * square(inverse_[j]) * c2_[j] * rest[j];
      c2_[j] -= c3_[j] * rest[j];
    }
  }

  // The sums of some rows' distances to the means.
  void add_rests(const T* x, ptrdiff_t ld, Range rows) {
    T *rest = column_slot(member_.row) + 2 * D, *row_rest = row_slot(member_.column) + 2 * row_size_;
    for (int g = 0; g < gates_; g++) {
      const int j0 = g * units_ + own_.begin, n = own_.size();
      const T* mean = mean_ + j0;
      for (int b = rows.begin; b < rows.end; b++) {
        const T *from = x + b * ld + j0, row_mean = row_mean_[size_t(group(g)) * batch_ + b];
        if (far_columns_) {
          T* to = rest + j0;
#pragma omp simd
          for (int j = 0; j < n; j++) to[j] += from[j] - mean[j];
        }
        if (far_rows_) {
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int j = 0; j < n; j++) sum += from[j] - row_mean;
          row_rest[size_t(group(g)) * batch_ + b] += sum;
        }
      }
    }
  }

  static T square(T x) { return x * x; }
  static void clear(T* values, int begin, int end) {
    for (int j = begin; j < end; j++) values[j] = T(0);
  }

  // The coefficients of the columns [j0, j1) from Chan's merge of the members' moments. Distances between means may be
  // small beside what rounding takes from these, hence the rests.
  void merge_columns(int t, int running, int j0, int j1) {
    if (!current_batch(t)) return given_columns(t, j0, j1);
    const T inverse = T(1) / T(running);
    const T *own = column_slot(0), *other = column_slot(1), *own_spread = own + D, *other_spread = other + D;
    const T *own_rest = own_spread + D, *other_rest = other_spread + D;
    if (member_.rows == 1)
      column_coefficients(t, j0, j1,
                          [=](int j, T& mean, T& var) BLN_INLINED { mean = own[j], var = own_spread[j] * inverse; });
    else if (member_.rows == 2) {
      const T share = T(clipped(part(batch_, 1, 2), running).size()) * inverse, between = share * (T(1) - share);
      column_coefficients(t, j0, j1, [=](int j, T& mean, T& var) BLN_INLINED {
        const T distance = (other[j] - own[j]) + (other_rest[j] - own_rest[j]);
        mean = own[j] + (own_rest[j] + share * distance);
        var = (own_spread[j] + other_spread[j]) * inverse + between * square(distance);
      });
    } else {
      T *mean = mean_, *var = inverse_, *shift = scratch_;  // of the mean from the first member's
      for (int j = j0; j < j1; j++) shift[j] = var[j] = T(0);
      for (int k = 0; k < member_.rows; k++) {
        const T share = T(clipped(part(batch_, k, member_.rows), running).size()) * inverse;
        const T* some = column_slot(k);
        if (share > T(0)) {
#pragma omp simd
          for (int j = j0; j < j1; j++) shift[j] += share * ((some[j] - own[j]) + some[2 * D + j]);
        }
      }
      for (int k = 0; k < member_.rows; k++) {
        const T share = T(clipped(part(batch_, k, member_.rows), running).size()) * inverse;
        const T* some = column_slot(k);
        if (share > T(0)) {
#pragma omp simd
          for (int j = j0; j < j1; j++)
            var[j] += share * square((some[j] - own[j]) + some[2 * D + j] - shift[j]) + some[D + j] * inverse;
        }
      }
      for (int j = j0; j < j1; j++) mean[j] = own[j] + shift[j];
      column_coefficients(t, j0, j1,
                          [=](int j, T& to_mean, T& to_var) BLN_INLINED { to_mean = mean[j], to_var = var[j]; });
    }
    if (a.batch_moments && member_.row == 0) {
      T* saved = a.batch_moments + size_t(t) * 2 * D;
#pragma omp simd
      for (int j = j0; j < j1; j++) saved[j] = mean_[j], saved[D + j] = var_[j];
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
      for (size_t i = first; i < end; i++)
        row_inverse_[i] += share * square(other[i] - row_mean_[i]) + spread[i] * inverse;
    }
    if (!a.feature_moments || member_.column != 0) return;
    T* saved = a.feature_moments + size_t(t) * 2 * row_size_;
#pragma omp simd
    for (size_t i = first; i < end; i++) saved[i] = row_mean_[i], saved[row_size_ + i] = row_inverse_[i];
  }

  // Coefficients of columns of which nothing current is used.
  void given_columns(int t, int j0, int j1) {
    if (lone_) return;
    if (a.w_batch[t] != 0)
      return column_coefficients(t, j0, j1, [](int, T& mean, T& var) BLN_INLINED { mean = var = T(0); });
    for (int j = j0; j < j1; j++) used_mean_[j] = mean_[j] = inverse_[j] = slope_[j] = T(0);
  }

  // moments(j, mean, var) gives those of the current batch.
  template <class F>
  void column_coefficients(int t, int j0, int j1, F moments) {
    const T wb = T(a.w_batch[t]), eps = T(a.eps);
    const size_t at = (a.fixed ? 0 : size_t(t)) * D;
    const bool has_mean = a.batch_mean, has_var = a.batch_var;
    // never null: a masked load from there is suppressed, at the price of hundreds of instructions
    const T *given_mean = has_mean ? a.batch_mean + at : bias_, *given_var = has_var ? a.batch_var + at : bias_;
#pragma omp simd
    for (int j = j0; j < j1; j++) {
      T mean, var;
      moments(j, mean, var);
      const T used = has_mean ? given_mean[j] : mean;
      const T inverse = T(1) / std::sqrt((has_var ? given_var[j] : var) + eps);
      mean_[j] = mean;
      var_[j] = var;
      used_mean_[j] = used;
      inverse_[j] = inverse;
      slope_[j] = weight_[j] * wb * inverse;
    }
  }

  // totals(j, sum, dot) gives the sums over all members.
  template <class F>
  void column_gradients(int t, int j0, int j1, T mean_share, T var_share, F totals) {
    const T wb = T(a.w_batch[t]), wf = T(a.w_feature[t]), scale = T(a.scale);
    const T *own = column_slot(member_.row), *own_dot = own + D;
    T* gain = weight_sum_.get();
#pragma omp simd
    for (int j = j0; j < j1; j++) {
      T sum, dot;
      totals(j, sum, dot);
      const T inverse = inverse_[j], slope = slope_[j];
      const T curve = slope * inverse * inverse * dot * var_share;
      bias_sum_[j] += own[j];
      gain[j] += scale * (wb * inverse * own_dot[j] + wf * c3_[j]);
      c2_[j] = slope * sum * mean_share;
      c3_[j] = curve;
    }
  }

  void row_coefficients(int t, Range rows) {
    const T wf = T(a.w_feature[t]), eps = T(a.eps);
    const size_t at = a.fixed ? 0 : size_t(t);
    for (int g = 0; g < groups_; g++) {
      const size_t first = size_t(g) * batch_ + rows.begin, end = first + rows.size();
      if (wf == T(0)) {
        for (size_t i = first; i < end; i++) row_used_[i] = row_mean_[i] = row_inverse_[i] = row_slope_[i] = T(0);
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
        row_slope_[i] = wf * inverse;
      }
    }
  }

 public:
  static Range clipped(Range range, int limit) {
    return {range.begin < limit ? range.begin : limit, range.end < limit ? range.end : limit};
  }
  static constexpr int grain = 16;
  static constexpr int stripe = 4;  // rows that several passes take one after the other while they lie in the cache
  Range unit_part(int k) const { return part(units_, k, member_.columns, grain); }

 private:
  Shared& shared_;
  Member member_;
  int gates_, units_, batch_;
  Range own_;
  int groups_, D;
  bool lone_;  // one sequence lies at its batch's mean: that part is zero, and so is its gradient
  int slot_ = 0;
  size_t row_size_;
  bool has_batch_ = false, has_feature_ = false;  // parts that the step's gradient has
  bool far_columns_ = false, far_rows_ = false;   // whether some means of the step are far from zero
  Buffer<T> columns_, rows_, weight_sum_;
  T *weight_, *slope_, *mean_, *var_, *used_mean_, *inverse_, *scratch_, *c2_, *c3_, *bias_sum_, *bias_;
  T *row_slope_, *row_mean_, *row_used_, *row_inverse_, *r2_, *r3_;
};

}  // namespace bln
