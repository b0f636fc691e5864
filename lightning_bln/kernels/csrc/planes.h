// Batch layer normalization of an array [rows, features, positions] whose positions are contiguous, as in images with
// channels first.
#pragma once
#include <algorithm>
#include <type_traits>

#include "dense.h"

namespace bln {

// A few rows at some neighbouring positions, with all features.
struct Tile {
  int row, begin, size;
};

template <class T>
struct PlanesPlan {
  static constexpr int block = 4;     // rows of a tile
  static constexpr int widest = 1024 / sizeof(T);  // and its positions
  static constexpr int column_arrays = 9, line_arrays = 9, row_arrays = 4;
  static constexpr int summed = 4;  // arrays that members add up
  static constexpr int64_t cache = 1 << 19;

  const DenseArgs<T>& a;
  int members, width;
  size_t column_size;
  Buffer<T> columns, lines, rows, parts, totals;
  Barrier barrier;

  PlanesPlan(const DenseArgs<T>& args, int members)
      : a(args), members(members), width(tile_width(args)), column_size(size_t(args.features) * (args.shared ? 1 : width)),
        columns(members * column_arrays * column_size), lines(size_t(members) * line_arrays * block * widest),
        rows(size_t(row_arrays) * args.rows * args.positions), parts(size_t(2) * members * summed * args.features),
        totals(size_t(members) * 2 * args.features), barrier(members) {}

  // As wide as the arrays of all features may be in the second-level cache: the longer the runs in memory, the better.
  static int tile_width(const DenseArgs<T>& args) {
    if (args.shared) return widest;
    const int64_t fit = cache / int64_t(column_arrays * sizeof(T)) / args.features;
    return int(std::min((args.positions + 15) / 16 * 16, std::clamp<int64_t>(fit / 16 * 16, 64, widest)));
  }
};

// Loops run along positions, so sums over features are vectors that grow from feature to feature. So are those over the
// batch where each position has its own: a range of positions, no wider than a tile, is done with before the next.
// Column arrays have a number for each feature, and position of that range unless positions are shared.
template <class T, bool Shared>
class Planes {
 public:
  using Plan = PlanesPlan<T>;

  Planes(Plan& plan, int id)
      : plan(plan), a(plan.a), n(plan.a.norm), id(id), W(plan.width), L(Shared ? 1 : plan.width), C(int(a.features)) {
    const int members = plan.members;
    const bool by_rows = Shared && a.rows >= Plan::block * members;
    rows = by_rows ? part(int(a.rows), id, members) : Range{0, int(a.rows)};
    positions = by_rows ? Range{0, int(a.positions)} : part(int(a.positions), id, members, 16);
    T* at = plan.columns.get() + id * Plan::column_arrays * plan.column_size;
    for (T** to : {&mean, &var, &used, &inverse, &slope, &sum, &dot, &feature_dot, &rest})
      *to = at, at += plan.column_size;
    at = plan.lines.get() + size_t(id) * Plan::line_arrays * Plan::block * Plan::widest;
    for (T** to : {&row_mean, &row_var, &row_used, &row_inverse, &row_slope, &row_sum, &row_dot, &row_rest})
      *to = at, at += Plan::block * Plan::widest;
    for (T** to : {&w_batch, &w_feature, &given_mean, &given_var}) *to = at, at += Plan::widest;
  }

 protected:
  static constexpr ptrdiff_t next = Plan::widest;                 // from a line to that of the next row
  static constexpr int written = Shared ? 1 : Plan::block;  // rows written at once: more save loads of coefficients

  Plan& plan;
  const DenseArgs<T>& a;
  const NormArgs<T>& n;
  int id, W, L, C;
  Range rows, positions, sweep;  // this member's, and the positions that the column arrays stand for
  int slot_ = 0;
  T *mean, *var, *used, *inverse, *slope, *sum, *dot, *feature_dot, *rest;
  T *row_mean, *row_var, *row_used, *row_inverse, *row_slope, *row_sum, *row_dot, *row_rest;
  T *w_batch, *w_feature, *given_mean, *given_var;  // one line each

  bool has_batch() const { return n.w_batch[0] != 0; }
  bool has_feature() const { return n.w_feature[0] != 0; }
  bool current_batch() const { return has_batch() && !(n.batch_mean && n.batch_var); }
  bool current_feature() const { return has_feature() && !(n.feature_mean && n.feature_var); }
  int lanes() const { return Shared ? 1 : sweep.size(); }
  int64_t places() const { return Shared ? 1 : a.positions; }
  double count() const { return double(a.rows) * double(Shared ? a.positions : 1); }  // numbers of a batch statistic
  T weight(int c) const { return T(n.scale) * (n.weight ? n.weight[c] : T(1)); }

  // Between an array of all places and one of the sweep's.
  template <class From>
  void load(const From* from, T* to, int features) const {
    for (int c = 0; c < features; c++, from += places(), to += L)
      for (int j = 0; j < lanes(); j++) to[j] = T(from[(Shared ? 0 : sweep.begin) + j]);
  }
  void store(const T* from, T* to) const {
    for (int c = 0; c < C; c++) std::copy_n(from + c * L, lanes(), to + c * places() + (Shared ? 0 : sweep.begin));
  }
  void clear(std::initializer_list<T*> arrays) const {
    for (T* array : arrays) std::fill_n(array, plan.column_size, T(0));
  }

  template <class F>
  static void choose(bool flag, F body) {
    flag ? body(std::true_type{}) : body(std::false_type{});
  }

  // body() for each range of positions that has statistics of its own.
  template <class F>
  void for_sweeps(F body) {
    const int step = Shared ? std::max(positions.size(), 1) : W;
    // shared positions are one range, which a member without any takes part in
    for (int p = positions.begin; p < positions.end || (Shared && p == positions.begin); p += step) {
      sweep = {p, std::min(p + step, positions.end)};
      load(n.w_batch, w_batch, 1);
      load(n.w_feature, w_feature, 1);
      if (n.feature_mean) load(n.feature_mean, given_mean, 1);
      if (n.feature_var) load(n.feature_var, given_var, 1);
      body();
    }
  }

  // body(rows, tile) for all tiles of the sweep; a second pass goes the other way, from what still lies in the cache.
  template <int R, class F>
  void for_tiles(bool backwards, F body) const {
    const int chunks = (sweep.size() + W - 1) / W, full = rows.size() / R;
    const int blocks = full + rows.size() % R, tiles = blocks * chunks;
    for (int i = 0; i < tiles; i++) {
      const int k = backwards ? tiles - 1 - i : i, b = k / chunks, begin = sweep.begin + k % chunks * W;
      const int row = rows.begin + (b < full ? b * R : full * (R - 1) + b);
      const Tile tile{row, begin, std::min(W, sweep.end - begin)};
      if (b < full)
        body(std::integral_constant<int, R>{}, tile);
      else
        body(std::integral_constant<int, 1>{}, tile);
    }
  }

  // body(j, i, k) for the number j of a line, i of a line array, and k of [rows, positions].
  template <int R, class F>
  void for_lines(Tile tile, F body) const {
    for (int r = 0; r < R; r++) {
      const size_t at = size_t(tile.row + r) * a.positions + tile.begin;
#pragma omp simd
      for (int j = 0; j < tile.size; j++) body(j, r * next + j, at + j);
    }
  }

  const T* at(const T* x, Tile tile) const { return x + tile.row * a.row_stride + tile.begin; }

  // Adds up the members' arrays where they share columns.
  void combine(std::initializer_list<T*> arrays) {
    if (!Shared || plan.members == 1) return;
    slot_ ^= 1;
    const size_t size = size_t(Plan::summed) * C;
    T *slots = plan.parts.get() + slot_ * plan.members * size, *own = slots + id * size;
    for (const T* array : arrays) own = std::copy_n(array, C, own);
    plan.barrier.wait(id);
    for (T* array : arrays)
      for (int c = 0; c < C; c++, slots++) {
        array[c] = slots[0];
        for (int k = 1; k < plan.members; k++) array[c] += slots[k * size];
      }
  }

  // Coefficients of the columns from mean and var, or given statistics.
  void column_coefficients() const {
    if (!has_batch()) return clear({used, inverse, slope});
    n.batch_mean ? load(n.batch_mean, used, C) : void(std::copy_n(mean, plan.column_size, used));
    n.batch_var ? load(n.batch_var, inverse, C) : void(std::copy_n(var, plan.column_size, inverse));
    const T eps = T(n.eps);
    for (int c = 0; c < C; c++) {
      T *inv = inverse + c * L, *s = slope + c * L, w = weight(c);
#pragma omp simd
      for (int j = 0; j < lanes(); j++) {
        inv[j] = T(1) / std::sqrt(inv[j] + eps);
        s[j] = w * w_batch[j] * inv[j];
      }
    }
  }

  // Where the current moments over features lie: means, then variances.
  T* moments_of_rows() const { return n.feature_moments ? n.feature_moments : plan.rows.get(); }

  // Coefficients of a tile's rows from the current moments, or given statistics.
  template <int R>
  void row_coefficients(Tile tile) const {
    const T eps = T(n.eps), *means = moments_of_rows(), *vars = means + a.rows * a.positions;
    const bool current = current_feature(), has_mean = n.feature_mean, has_var = n.feature_var;
    for_lines<R>(tile, [=](int j, size_t i, size_t k) BLN_INLINED {
      const int lane = Shared ? 0 : j;
      row_mean[i] = current ? means[k] : T(0);
      row_used[i] = has_mean ? given_mean[lane] : row_mean[i];
      row_inverse[i] = T(1) / std::sqrt((has_var ? given_var[lane] : vars[k]) + eps);
      row_slope[i] = w_feature[lane] * row_inverse[i];
    });
  }
};

template <class T, bool Shared>
class PlanesForward : Planes<T, Shared> {
  using Base = Planes<T, Shared>;
  using Base::a, Base::n, Base::L, Base::C, Base::next, Base::written, Base::mean, Base::var, Base::used, Base::slope, Base::sum;
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
      this->choose(this->has_feature(), [&, this](auto has_feature) {
        this->template for_tiles<written>(batch, [&, this](auto rows, Tile tile) {
          if (feature && !batch) measure_tile<rows(), false, true>(tile);
          if (has_feature()) this->template row_coefficients<rows()>(tile);
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
      this->template for_tiles<Plan::block>(false, [&, this](auto rows, Tile tile) { measure_tile<rows(), true, feature()>(tile); });
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

template <class T, bool Shared>
class PlanesBackward : Planes<T, Shared> {
  using Base = Planes<T, Shared>;
  using Base::a, Base::n, Base::L, Base::C, Base::next, Base::written, Base::mean, Base::var, Base::used, Base::inverse, Base::slope;
  using Base::row_mean, Base::row_used, Base::row_inverse, Base::row_slope, Base::row_sum, Base::row_dot;
  using Base::row_rest, Base::sum, Base::dot, Base::feature_dot, Base::rest, Base::w_batch, Base::w_feature;

 public:
  using Plan = PlanesPlan<T>;
  using Base::Base;

  void run() {
    T* totals = this->plan.totals.get() + size_t(this->id) * 2 * C;
    std::fill(totals, totals + 2 * C, T(0));
    const bool waits = this->current_batch() && a.grad_x;  // for the sums over all tiles
    this->choose(this->has_batch(), [&, this](auto batch) {
      this->choose(this->has_feature(), [&, this](auto feature) {
        this->for_sweeps([&, this] {
          recall();
          this->clear({sum, dot, feature_dot, rest});
          this->template for_tiles<Plan::block>(false, [&, this](auto rows, Tile tile) {
            add<rows(), batch(), feature()>(tile);
            if (a.grad_x && !waits) apply<rows(), batch(), feature()>(tile);
          });
          settle(totals, totals + C);
          if (waits)
            this->template for_tiles<written>(true, [&, this](auto rows, Tile tile) { apply<rows(), batch(), feature()>(tile); });
        });
      });
    });
    if (this->plan.members > 1) this->plan.barrier.wait(this->id);
    if (this->id == 0) write_totals();
  }

 private:
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
    bool far = far_;
    if (Feature) {
      this->template row_coefficients<R>(tile);
      const T* means = n.feature_moments + tile.row * a.positions + tile.begin;
      for (int r = 0; r < R && var_share > T(0); r++, means += a.positions)
        far |= any_far(means, means + a.rows * a.positions, tile.size);
    }
    this->choose(far, [&](auto far) { add_products<R, Batch, Feature, far()>(tile); });
    if (!Feature) return;
    const size_t numbers = a.rows * a.positions;
    T *mean = this->plan.rows.get(), *slope = mean + numbers, *of_mean = slope + numbers, *of_var = of_mean + numbers;
    this->template for_lines<R>(tile, [=](int, size_t i, size_t k) BLN_INLINED {
      mean[k] = row_mean[i], slope[k] = row_slope[i];
      of_var[k] = row_inverse[i] * row_dot[i] * var_share;
      of_mean[k] = row_sum[i] * mean_share - of_var[k] * row_rest[i] * share;
    });
  }

  template <int R, bool Batch, bool Feature, bool Far>
  void add_products(Tile tile) const {
    const ptrdiff_t ldx = a.row_stride, ldg = a.grad_row_stride;
    const T *x = this->at(a.x, tile), *grad = a.grad + tile.row * ldg + tile.begin;
    if (Feature)
      for (T* array : {row_sum, row_dot, row_rest}) std::fill_n(array, R * next, T(0));
    const T *f = row_used, *fi = row_inverse, *fm = row_mean;
    T *rs = row_sum, *rd = row_dot, *rr = row_rest;
    for (int c = 0; c < C; c++, x += a.feature_stride, grad += a.grad_feature_stride) {
      T *S = sum + c * L, *E = dot + c * L, *F = feature_dot + c * L, *rests = rest + c * L;
      const T *m = used + c * L, *current = mean + c * L, w = this->weight(c), shared_used = *m, shared_mean = *current;
      T s_all = 0, e_all = 0, p_all = 0, q_all = 0;
#pragma omp simd reduction(+ : s_all, e_all, p_all, q_all)
      for (int j = 0; j < tile.size; j++) {
        const T of_used = Shared ? shared_used : m[j], of_mean = Shared ? shared_mean : Far ? current[j] : T(0);
        T s = 0, e = 0, p = 0, q = 0;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const T y = grad[r * ldg + j], v = x[r * ldx + j];
          s += y;
          if (Batch) e += y * (v - of_used);
          if (Batch && Far) q += v - of_mean;
          if (!Feature) continue;
          const ptrdiff_t i = r * next + j;
          const T product = y * ((v - f[i]) * fi[i]);
          p += product;
          rs[i] += y * w, rd[i] += product * w;
          if (Far) rr[i] += v - fm[i];
        }
        if (Shared) {
          s_all += s, e_all += e, p_all += p, q_all += q;
          continue;
        }
        S[j] += s;
        if (Batch) E[j] += e;
        if (Batch && Far) rests[j] += q;
        if (Feature) F[j] += p;
      }
      if (Shared) *S += s_all, *E += e_all, *F += p_all, *rests += q_all;
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
        const T of_mean = s[j] * c2[j] * mean_share, of_var = s[j] * square * c3[j] * var_share;
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
        T of_batch[R], of_row[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const T y = grad[r * ldg + j], v = x[r * ld + j];
          of_batch[r] = Batch ? batch_gradient(y, Shared ? s0 : s[j], Shared ? c20 : c2[j], v - (Shared ? m0 : m[j]), Shared ? c30 : c3[j]) : T(0);
          const ptrdiff_t i = r * ldr + j;
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
