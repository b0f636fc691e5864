// The forward pass over planes: moments, coefficients, output.
#pragma once
#include "planes.h"

namespace bln {

template <class T, bool Shared>
class PlanesForward : Planes<T, Shared> {
  using Base = Planes<T, Shared>;
  using Base::a, Base::n, Base::L, Base::C, Base::next, Base::written, Base::mean, Base::var, Base::used, Base::slope,
      Base::sum;
  using Base::dot, Base::row_mean, Base::row_var, Base::row_used, Base::row_slope, Base::row_sum, Base::row_dot;

 public:
  using Plan = PlanesPlan<T>;
  using Base::Base;

  void run() {
    const bool batch = this->current_batch(), feature = this->current_feature();
    this->for_sweeps([&, this] {
      if (batch) {
        set_anchor();
        if (measure(feature)) measure(false);
        save();
      } else
        this->clear({mean, var});
      this->column_coefficients();
      if (this->has_feature() && !feature) this->given_rows();
      this->choose(this->has_feature(), [&, this](auto has_feature) {
        this->template for_tiles<written>(batch, [&, this](auto rows, Tile tile) {
          if (feature && !batch) measure_tile<rows(), false, true>(tile);
          if (feature) this->template row_coefficients<rows()>(tile);
          write<rows(), has_feature()>(tile);
        });
      });
    });
  }

 private:
  // A mean of a few numbers of each column, the same for all members.
  void set_anchor() const {
    const int rows = int(std::min<int64_t>(a.rows, Plan::block));
    const int size = Shared ? int(std::min<int64_t>(a.positions, 64)) : this->sweep.size();
    const T share = T(1) / T(Shared ? rows * size : rows), *x = a.x + (Shared ? 0 : this->sweep.begin);
    this->clear({mean});
    for (int c = 0; c < C; c++, x += a.feature_stride)
      for (int b = 0; b < rows; b++) {
        const T* from = x + b * a.row_stride;
        T total = 0, *to = mean + c * L;
#pragma omp simd reduction(+ : total)
        for (int j = 0; j < size; j++) {
          if (Shared)
            total += from[j] * share;
          else
            to[j] += from[j] * share;
        }
        if (Shared) *to += total;
      }
  }

  // Moments from sums of the distances to an anchor, and of their squares; whether it lay so far that digits lack.
  BLN_INLINED static bool centre(T share, T limit, T total, T squares, T& mean, T& var) {
    const T distance = total * share, left = squares - total * distance;
    mean += distance;
    var = left < T(0) ? T(0) : left * share;
    return squares > limit * left;
  }

  // The sweep's moments over the batch, and over features; whether those of the batch want a second pass, now with the
  // mean as the anchor.
  bool measure(bool feature) {
    this->clear({sum, dot});
    this->choose(feature, [&, this](auto feature) {
      this->template for_tiles<Plan::block>(
          false, [&, this](auto rows, Tile tile) { measure_tile<rows(), true, feature()>(tile); });
    });
    this->combine({sum, dot});
    const T share = T(1 / this->count());
    int far = 0;
    for (int c = 0; c < C; c++) {
      T *m = mean + c * L, *v = var + c * L, *s = sum + c * L, *q = dot + c * L;
#pragma omp simd reduction(| : far)
      for (int j = 0; j < this->lanes(); j++) far |= centre(share, T(8), s[j], q[j], m[j], v[j]);
    }
    return far;
  }

  void save() const {
    if (!n.batch_moments || (Shared && this->id != 0)) return;
    this->store(mean, n.batch_moments);
    this->store(var, n.batch_moments + C * this->places());
  }

  template <int R, bool Batch, bool Feature>
  void measure_tile(Tile tile) const {
    const T* x = this->at(a.x, tile);
    if (Feature) {
      const int some = std::min(C, 8);
      for (int r = 0; r < R; r++) {
        T* to = row_mean + r * next;
        std::fill_n(to, tile.size, T(0));
        for (int k = 0; k < some; k++) {
          const T *from = x + r * a.row_stride + int64_t(C) * k / some * a.feature_stride, share = T(1) / T(some);
#pragma omp simd
          for (int j = 0; j < tile.size; j++) to[j] += from[j] * share;
        }
      }
    }
    add_distances<R, Batch, Feature>(x, tile.size);
    if (!Feature) return;
    if (centre_rows<R>(tile.size)) {
      add_distances<R, false, true>(x, tile.size);
      centre_rows<R>(tile.size);
    }
    T *means = this->moments_of_rows(), *vars = means + a.rows * a.positions;
    this->template for_lines<R>(
        tile, [=](int, size_t i, size_t k) BLN_INLINED { means[k] = row_mean[i], vars[k] = row_var[i]; });
  }

  template <int R>
  bool centre_rows(int size) const {
    const T share = T(1) / T(C);
    int far = 0;
    for (int r = 0; r < R; r++) {
      T *m = row_mean + r * next, *v = row_var + r * next, *s = row_sum + r * next, *q = row_dot + r * next;
#pragma omp simd reduction(| : far)
      for (int j = 0; j < size; j++) far |= centre(share, T(8), s[j], q[j], m[j], v[j]);
    }
    return far;
  }

  // Distances, and their squares, of a tile's rows to the anchors of columns and rows.
  template <int R, bool Batch, bool Feature>
  void add_distances(const T* x, int size) const {
    const ptrdiff_t ld = a.row_stride;
    T *f = row_mean, *rs = row_sum, *rq = row_dot;
    if (Feature)
      for (int r = 0; r < R; r++) std::fill_n(rs + r * next, size, T(0)), std::fill_n(rq + r * next, size, T(0));
    for (int c = 0; c < C; c++, x += a.feature_stride) {
      T *m = mean + c * L, *s = sum + c * L, *q = dot + c * L, column = 0, column_squares = 0;
      const T shared_anchor = *m;
#pragma omp simd reduction(+ : column, column_squares)
      for (int j = 0; j < size; j++) {
        const T anchor = Shared ? shared_anchor : Batch ? m[j] : T(0);
        T total = 0, squares = 0;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const T v = x[r * ld + j];
          if (Batch) {
            const T d = v - anchor;
            total += d, squares += d * d;
          }
          if (Feature) {
            const T d = v - f[r * next + j];
            rs[r * next + j] += d, rq[r * next + j] += d * d;
          }
        }
        if (Batch && Shared) column += total, column_squares += squares;
        if (Batch && !Shared) s[j] += total, q[j] += squares;
      }
      if (Batch && Shared) *s += column, *q += column_squares;
    }
  }

  template <int R, bool Feature>
  void write(Tile tile) const {
    const T *x = this->at(a.x, tile), *f = row_used, *fs = row_slope;
    T* y = a.output + (x - a.x);
    const ptrdiff_t ld = a.row_stride;
    for (int c = 0; c < C; c++, x += a.feature_stride, y += a.feature_stride) {
      const T *m = used + c * L, *s = slope + c * L, shared_mean = *m, shared_slope = *s;
      const T w = this->weight(c), bias = n.bias ? n.bias[c] : T(0);
#pragma omp simd
      for (int j = 0; j < tile.size; j++) {
        T of_batch[R], of_row[R];  // all before the first is stored, lest loads wait for it
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const T v = x[r * ld + j];
          of_batch[r] = batch_part(v, Shared ? shared_mean : m[j], Shared ? shared_slope : s[j], bias);
          of_row[r] = Feature ? feature_part(v, f[r * next + j], w * fs[r * next + j]) : T(0);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) y[r * ld + j] = Feature ? of_batch[r] + of_row[r] : of_batch[r];
      }
    }
  }
};

}  // namespace bln
