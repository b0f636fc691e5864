// The backward pass over planes: sums over the batch and over features, and the gradients that they make.
#pragma once
#include "planes.h"

namespace bln {

template <class T, bool Shared>
class PlanesBackward : Planes<T, Shared> {
  using Base = Planes<T, Shared>;
  using Base::a, Base::n, Base::L, Base::C, Base::next, Base::written, Base::mean, Base::var, Base::used, Base::inverse,
      Base::slope;
  using Base::row_mean, Base::row_used, Base::row_inverse, Base::row_slope, Base::row_sum, Base::row_dot;
  using Base::row_rest, Base::sum, Base::dot, Base::feature_dot, Base::rest, Base::w_batch, Base::w_feature;

 public:
  using Plan = PlanesPlan<T>;
  using Base::Base;

  void run() {
    T* totals = this->plan.totals.get() + size_t(this->id) * 2 * C;
    std::fill(totals, totals + 2 * C, T(0));
    this->choose(this->has_batch(), [&, this](auto batch) {
      if constexpr (decltype(batch)::value)
        this->choose(this->has_feature(), [&, this](auto feature) { walk<batch(), feature()>(totals); });
      else
        walk<false, true>(totals);
    });
    if (this->plan.members > 1) this->plan.barrier.wait(this->id);
    if (this->id == 0) write_totals();
  }

 private:
  template <bool Batch, bool Feature>
  void walk(T* totals) {
    const bool waits = this->current_batch() && a.grad_x;  // for the sums over all tiles
    this->for_sweeps([&, this] {
      recall();
      this->clear({sum, dot, feature_dot, rest});
      this->template for_tiles<Plan::block>(false, [&, this](auto rows, Tile tile) {
        add<rows(), Batch, Feature>(tile);
        if (a.grad_x && !waits) apply<rows(), Batch, Feature>(tile);
      });
      settle(totals, totals + C);
      if (waits)
        this->template for_tiles<written>(true,
                                          [&, this](auto rows, Tile tile) { apply<rows(), Batch, Feature>(tile); });
    });
  }

  bool far_ = false;  // whether some means of the columns are far from zero, which makes them inexact

  // Coefficients from the moments that the forward pass saved.
  void recall() {
    far_ = false;
    if (this->current_batch()) {
      this->load(n.batch_moments, mean, C);
      this->load(n.batch_moments + C * this->places(), var, C);
      for (int c = 0; c < C; c++) far_ |= any_far(mean + c * L, var + c * L, this->lanes());
    } else
      this->clear({mean, var});
    this->column_coefficients();
  }

  static bool any_far(const T* mean, const T* var, int size) {
    int far = 0;
#pragma omp simd reduction(| : far)
    for (int j = 0; j < size; j++) far |= is_far(mean[j], var[j]);
    return far;
  }

  // A tile's part of the columns' sums, and what the gradient of its rows needs of theirs.
  template <int R, bool Batch, bool Feature>
  void add(Tile tile) {
    const T share = T(1) / T(C), mean_share = n.feature_mean ? T(0) : share, var_share = n.feature_var ? T(0) : share;
    bool far_rows = false;
    if (Feature) {
      this->template row_coefficients<R>(tile);
      const T* means = n.feature_moments + tile.row * a.positions + tile.begin;
      for (int r = 0; r < R && var_share > T(0); r++, means += a.positions)
        far_rows |= any_far(means, means + a.rows * a.positions, tile.size);
      for (T* array : {row_sum, row_dot, row_rest}) std::fill_n(array, R * next, T(0));
    }
    add_products<R, Batch, Feature>(tile);
    for (int r = 0; r < R && (far_ || far_rows); r++) add_rests(tile, r, far_rows);
    if (!Feature) return;
    const size_t numbers = a.rows * a.positions;
    T *mean = this->plan.rows.get(), *slope = mean + numbers, *of_mean = slope + numbers, *of_var = of_mean + numbers;
    this->template for_lines<R>(tile, [=](int, size_t i, size_t k) BLN_INLINED {
      mean[k] = row_mean[i], slope[k] = row_slope[i];
      // not times a share of zero: sums may be no numbers
      of_var[k] = var_share > T(0) ? row_inverse[i] * row_dot[i] * var_share : T(0);
      of_mean[k] = (mean_share > T(0) ? row_sum[i] * mean_share : T(0)) - of_var[k] * row_rest[i] * share;
    });
  }

  template <int R, bool Batch, bool Feature>
  void add_products(Tile tile) const {
    const ptrdiff_t ldx = a.row_stride, ldg = a.grad_row_stride;
    const T *x = this->at(a.x, tile), *grad = a.grad + tile.row * ldg + tile.begin;
    const T *f = row_used, *fi = row_inverse;
    T *rs = row_sum, *rd = row_dot;
    for (int c = 0; c < C; c++, x += a.feature_stride, grad += a.grad_feature_stride) {
      T *S = sum + c * L, *E = dot + c * L, *F = feature_dot + c * L, s_all = 0, e_all = 0, p_all = 0;
      const T *m = used + c * L, shared_mean = *m, w = this->weight(c);
#pragma omp simd reduction(+ : s_all, e_all, p_all)
      for (int j = 0; j < tile.size; j++) {
        const T of_mean = Shared ? shared_mean : m[j];
        T s = 0, e = 0, p = 0;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const T y = grad[r * ldg + j], v = x[r * ldx + j];
          s += y;
          if (Batch) e += y * (v - of_mean);
          if (!Feature) continue;
          const ptrdiff_t i = r * next + j;
          const T product = y * ((v - f[i]) * fi[i]);
          p += product;
          rs[i] += y * w, rd[i] += product * w;
        }
        if (Shared) {
          s_all += s, e_all += e, p_all += p;
          continue;
        }
        S[j] += s;
        if (Batch) E[j] += e;
        if (Feature) F[j] += p;
      }
      if (Shared) *S += s_all, *E += e_all, *F += p_all;
    }
  }

  // The sums of the distances of a tile's row r to the means.
  void add_rests(Tile tile, int r, bool far_row) const {
    const T *x = this->at(a.x, tile) + r * a.row_stride, *f = row_mean + r * next;
    T* of_row = row_rest + r * next;
    for (int c = 0; c < C; c++, x += a.feature_stride) {
      const T *m = mean + c * L, shared_mean = *m;
      T *to = rest + c * L, total = 0;
      if (far_row) {
#pragma omp simd
        for (int j = 0; j < tile.size; j++) of_row[j] += x[j] - f[j];
      }
      if (!far_) continue;
#pragma omp simd reduction(+ : total)
      for (int j = 0; j < tile.size; j++) {
        if (Shared)
          total += x[j] - shared_mean;
        else
          to[j] += x[j] - m[j];
      }
      if (Shared) *to += total;
    }
  }

  // Takes the sums into the totals of weight and bias, and makes of them what x's gradient needs. A mean far from zero
  // is rounded, and the distances to it have a mean of their own, which is taken away, as Norm does.
  void settle(T* bias, T* gain) {
    this->combine({sum, dot, feature_dot, rest});
    const T scale = T(n.scale), share = T(1 / this->count());
    const T mean_share = n.batch_mean ? T(0) : share, var_share = n.batch_var ? T(0) : share;
    const T rest_share = far_ ? share : T(0), gain_rest = n.batch_mean ? T(0) : rest_share;
    for (int c = 0; c < C; c++) {
      T *c2 = sum + c * L, *c3 = dot + c * L, of_bias = 0, of_gain = 0;
      const T *F = feature_dot + c * L, *left = rest + c * L, *inv = inverse + c * L, *s = slope + c * L;
#pragma omp simd reduction(+ : of_bias, of_gain)
      for (int j = 0; j < this->lanes(); j++) {
        of_bias += c2[j];
        of_gain += w_batch[j] * (inv[j] * (c3[j] - c2[j] * left[j] * gain_rest)) + w_feature[j] * F[j];
        const T r = left[j] * rest_share, square = inv[j] * inv[j];
        const T of_mean = mean_share > T(0) ? s[j] * c2[j] * mean_share : T(0);
        const T of_var = var_share > T(0) ? s[j] * square * c3[j] * var_share : T(0);
        c3[j] = of_var - (var_share > T(0) ? square * of_mean * r : T(0));
        c2[j] = of_mean - c3[j] * r;
      }
      if (Shared && this->id != 0) continue;  // the sums are all members'
      bias[c] += of_bias;
      gain[c] += scale * of_gain;
    }
  }

  template <int R, bool Batch, bool Feature>
  void apply(Tile tile) const {
    const size_t numbers = a.rows * a.positions;
    const ptrdiff_t ld = a.row_stride, ldg = a.grad_row_stride, ldr = a.positions;
    const T *x = this->at(a.x, tile), *grad = a.grad + tile.row * ldg + tile.begin;
    const T *f = this->plan.rows.get() + tile.row * ldr + tile.begin, *fs = f + numbers;
    const T *of_mean = fs + numbers, *of_var = of_mean + numbers;
    T* to = a.grad_x + (x - a.x);
    const T *sums = this->current_batch() ? sum : var, *dots = this->current_batch() ? dot : var;  // zeros if not
    for (int c = 0; c < C; c++, x += a.feature_stride, to += a.feature_stride, grad += a.grad_feature_stride) {
      const T *m = mean + c * L, *s = slope + c * L, *c2 = sums + c * L, *c3 = dots + c * L;
      const T m0 = *m, s0 = *s, c20 = *c2, c30 = *c3, w = this->weight(c);
#pragma omp simd
      for (int j = 0; j < tile.size; j++) {
        const T mj = Shared ? m0 : m[j], sj = Shared ? s0 : s[j], c2j = Shared ? c20 : c2[j],
                c3j = Shared ? c30 : c3[j];
        T of_batch[R], of_row[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const T y = grad[r * ldg + j], v = x[r * ld + j];
          const ptrdiff_t i = r * ldr + j;
          of_batch[r] = Batch ? batch_gradient(y, sj, c2j, v - mj, c3j) : T(0);
          of_row[r] = Feature ? feature_gradient(y * w, of_mean[i], v - f[i], of_var[i], fs[i]) : T(0);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) to[r * ld + j] = of_batch[r] + of_row[r];
      }
    }
  }

  void write_totals() const {
    for (int c = 0; c < C; c++) {
      T bias = 0, gain = 0;
      for (int k = 0; k < this->plan.members; k++) {
        const T* some = this->plan.totals.get() + size_t(k) * 2 * C;
        bias += some[c], gain += some[C + c];
      }
      if (n.grad_bias) n.grad_bias[c] = bias;
      if (n.grad_weight) n.grad_weight[c] = gain;
    }
  }
};

}  // namespace bln
