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

// Loops run along positions, so sums over features are vectors that grow from feature to feature. Sums over the batch
// are vectors of a tile's width as well, one for each feature. Where positions are shared, all tiles add to the same
// one, whose numbers are added up in the end, and coefficients stand there as often as the tile is wide.
template <class T>
struct PlanesPlan {
  static constexpr int block = 4;                           // rows of a tile
  static constexpr int column_arrays = 9, line_arrays = 9;  // of numbers for each feature or row, and position of a tile
  static constexpr int summed = 4;                          // arrays that members add up
  static constexpr int64_t cache = 1 << 19;

  const DenseArgs<T>& a;
  int members, width;
  Buffer<T> columns, lines, rows, parts, totals;
  Barrier barrier;

  PlanesPlan(const DenseArgs<T>& args, int members)
      : a(args), members(members), width(tile_width(args)),
        columns(size_t(members) * column_arrays * args.features * width),
        lines(size_t(members) * (line_arrays * block + 4) * width), rows(size_t(2) * args.rows * args.positions),
        parts(size_t(2) * members * summed * args.features), totals(size_t(members) * 2 * args.features),
        barrier(members) {}

  // As wide as the arrays of all features may be in the second-level cache: the longer the runs in memory, the better.
  static int tile_width(const DenseArgs<T>& args) {
    const int64_t fit = cache / int64_t(column_arrays * sizeof(T)) / args.features;
    return int(std::min(std::clamp<int64_t>(fit / 16 * 16, 16, 256), args.positions));
  }
};

template <class T>
class Planes {
 public:
  using Plan = PlanesPlan<T>;

  Planes(Plan& plan, int id)
      : plan(plan), a(plan.a), n(plan.a.norm), id(id), W(plan.width), C(int(a.features)), shared(a.shared != 0),
        by_rows(shared && a.rows >= Plan::block * plan.members),
        rows(by_rows ? part(int(a.rows), id, plan.members) : Range{0, int(a.rows)}),
        positions(by_rows ? Range{0, int(a.positions)} : part(int(a.positions), id, plan.members, 16)),
        count(T(a.rows) * T(shared ? a.positions : 1)) {
    T* at = plan.columns.get() + size_t(id) * Plan::column_arrays * C * W;
    for (T** to : {&mean, &var, &used, &inverse, &slope, &sum, &dot, &feature_dot, &rest}) *to = at, at += size_t(C) * W;
    at = plan.lines.get() + size_t(id) * (Plan::line_arrays * Plan::block + 4) * W;
    for (T** to : {&row_mean, &row_var, &row_used, &row_inverse, &row_slope, &row_sum, &row_dot, &row_rest, &row_share})
      *to = at, at += Plan::block * W;
    w_batch = at, w_feature = at + W, given_mean = at + 2 * W, given_var = at + 3 * W;
  }

 protected:
  Plan& plan;
  const DenseArgs<T>& a;
  const NormArgs<T>& n;
  int id, W, C;
  bool shared, by_rows;  // whether members take rows of their own, else positions
  Range rows, positions;
  Range sweep;  // positions that the column arrays stand for
  T count;      // numbers of a batch statistic
  int slot_ = 0;
  T *mean, *var, *used, *inverse, *slope, *sum, *dot, *feature_dot, *rest;  // [features, width]
  T *row_mean, *row_var, *row_used, *row_inverse, *row_slope, *row_sum, *row_dot, *row_rest, *row_share;  // [block, width]
  T *w_batch, *w_feature, *given_mean, *given_var;  // [width]

  bool has_batch() const { return n.w_batch[0] != 0; }
  bool has_feature() const { return n.w_feature[0] != 0; }
  bool current_batch() const { return has_batch() && !(n.batch_mean && n.batch_var); }
  bool current_feature() const { return has_feature() && !(n.feature_mean && n.feature_var); }
  int lanes() const { return shared ? W : sweep.size(); }
  T weight(int c) const { return T(n.scale) * (n.weight ? n.weight[c] : T(1)); }

  // Between an array of all positions, or of one, and one of the sweep's columns.
  void load(const T* from, T* to, int features) const {
    for (int c = 0; c < features; c++, to += W)
      if (shared)
        std::fill_n(to, W, from[c]);
      else
        std::copy_n(from + size_t(c) * a.positions + sweep.begin, sweep.size(), to);
  }
  void store(const T* from, T* to) const {
    for (int c = 0; c < C; c++, from += W)
      std::copy_n(from, shared ? 1 : sweep.size(), shared ? to + c : to + size_t(c) * a.positions + sweep.begin);
  }
  template <class F>
  static void choose(bool flag, F body) {
    flag ? body(std::true_type{}) : body(std::false_type{});
  }

  // body() for each range of positions that has statistics of its own.
  template <class F>
  void for_sweeps(F body) {
    const int step = shared ? std::max(positions.size(), 1) : W;
    // of shared positions there is one, also for a member that has none
    for (int p = positions.begin; p < positions.end || (shared && p == positions.begin); p += step) {
      sweep = {p, std::min(p + step, positions.end)};
      for (int j = 0; j < lanes(); j++) {
        const int position = shared ? 0 : p + j;
        w_batch[j] = T(n.w_batch[position]), w_feature[j] = T(n.w_feature[position]);
      }
      if (n.feature_mean) load(n.feature_mean, given_mean, 1);
      if (n.feature_var) load(n.feature_var, given_var, 1);
      body();
    }
  }

  // body(rows, tile) for all tiles of the sweep; a second pass goes the other way, from what still lies in the cache.
  template <class F>
  void for_tiles(bool backwards, F body) const {
    const int chunks = (sweep.size() + W - 1) / W, full = rows.size() / Plan::block;
    const int blocks = full + rows.size() % Plan::block, tiles = blocks * chunks;
    for (int i = 0; i < tiles; i++) {
      const int k = backwards ? tiles - 1 - i : i, b = k / chunks, begin = sweep.begin + k % chunks * W;
      const int row = rows.begin + (b < full ? b * Plan::block : full * (Plan::block - 1) + b);
      const Tile tile{row, begin, std::min(W, sweep.end - begin)};
      if (b < full)
        body(std::integral_constant<int, Plan::block>{}, tile);
      else
        body(std::integral_constant<int, 1>{}, tile);
    }
  }

  // body(i, k) for the k-th number of [rows, positions] that is the i-th of a line array.
  template <int R, class F>
  void for_lines(Tile tile, F body) const {
    for (int r = 0; r < R; r++) {
      const size_t at = size_t(tile.row + r) * a.positions + tile.begin;
#pragma omp simd
      for (int j = 0; j < tile.size; j++) body(j, size_t(r) * W + j, at + j);
    }
  }

  const T* at(const T* x, Tile tile) const { return x + tile.row * a.row_stride + tile.begin; }

  void clear(std::initializer_list<T*> arrays) const {
    for (T* array : arrays) std::fill(array, array + size_t(C) * W, T(0));
  }

  // Adds up lanes and members where positions are shared.
  void combine(std::initializer_list<T*> arrays) {
    if (!shared) return;
    slot_ ^= 1;
    const size_t size = size_t(Plan::summed) * C;
    T* slots = plan.parts.get() + slot_ * plan.members * size;
    T* own = slots + id * size;
    for (const T* array : arrays)
      for (int c = 0; c < C; c++) {
        T total = 0;
#pragma omp simd reduction(+ : total)
        for (int j = 0; j < W; j++) total += array[size_t(c) * W + j];
        *own++ = total;
      }
    if (plan.members > 1) plan.barrier.wait(id);
    for (T* array : arrays)
      for (int c = 0; c < C; c++, slots++) {
        T total = 0;
        for (int k = 0; k < plan.members; k++) total += slots[k * size];
        std::fill(array + size_t(c) * W, array + size_t(c + 1) * W, total);
      }
  }

  // Coefficients of the columns from mean and var, or given statistics.
  void column_coefficients() const {
    if (!has_batch()) return clear({used, inverse, slope});
    const size_t size = size_t(C) * W;
    n.batch_mean ? load(n.batch_mean, used, C) : void(std::copy_n(mean, size, used));
    n.batch_var ? load(n.batch_var, inverse, C) : void(std::copy_n(var, size, inverse));
    const T eps = T(n.eps);
    for (int c = 0; c < C; c++) {
      T *of_inverse = inverse + size_t(c) * W, *of_slope = slope + size_t(c) * W, w = weight(c);
#pragma omp simd
      for (int j = 0; j < W; j++) {
        of_inverse[j] = T(1) / std::sqrt(of_inverse[j] + eps);
        of_slope[j] = w * w_batch[j] * of_inverse[j];
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
      row_mean[i] = current ? means[k] : T(0);
      row_used[i] = has_mean ? given_mean[j] : row_mean[i];
      row_inverse[i] = T(1) / std::sqrt((has_var ? given_var[j] : vars[k]) + eps);
      row_slope[i] = w_feature[j] * row_inverse[i];
    });
  }
};

template <class T>
class PlanesForward : Planes<T> {
  using Base = Planes<T>;
  using Base::a, Base::n, Base::W, Base::C, Base::mean, Base::var, Base::used, Base::slope, Base::sum, Base::dot;
  using Base::row_mean, Base::row_var, Base::row_used, Base::row_slope, Base::row_sum, Base::row_dot;

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
        this->for_tiles(batch, [&, this](auto rows, Tile tile) {
          if (feature && !batch) measure_tile<rows(), false, true>(tile);
          if (has_feature()) this->template row_coefficients<rows()>(tile);
          write<rows(), has_feature()>(tile);
        });
      });
    });
  }

 private:
  // A mean of a few numbers of each column.
  void set_anchor() const {
    const int count = int(std::min<int64_t>(a.rows, Plan::block));
    const T share = T(1) / T(count), *x = a.x + (this->shared ? 0 : this->sweep.begin);
    for (int c = 0; c < C; c++, x += a.feature_stride) {
      T *lane = mean + size_t(c) * W, total = 0;
      for (int j = 0; j < this->lanes(); j++) {
        lane[j] = T(0);
        for (int b = 0; b < count; b++) lane[j] += x[b * a.row_stride + j] * share;
        total += lane[j] / T(W);
      }
      if (this->shared) std::fill_n(lane, W, total);
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
      this->for_tiles(false, [&, this](auto rows, Tile tile) { measure_tile<rows(), true, feature()>(tile); });
    });
    this->combine({sum, dot});
    const T share = T(1) / this->count;
    const int size = this->lanes();
    int far = 0;
    for (int c = 0; c < C; c++) {
      const size_t at = size_t(c) * W;
      T *m = mean + at, *v = var + at, *s = sum + at, *q = dot + at;
#pragma omp simd reduction(| : far)
      for (int j = 0; j < size; j++) far |= centre(share, T(8), s[j], q[j], m[j], v[j]);
    }
    return far;
  }

  void save() const {
    if (!n.batch_moments || (this->shared && this->id != 0)) return;
    this->store(mean, n.batch_moments);
    this->store(var, n.batch_moments + C * (this->shared ? 1 : a.positions));
  }

  template <int R, bool Batch, bool Feature>
  void measure_tile(Tile tile) const {
    const T* x = this->at(a.x, tile);
    if (Feature) {
      const T* middle = x + C / 2 * a.feature_stride;
      for (int r = 0; r < R; r++)
        for (int j = 0; j < tile.size; j++)
          row_mean[r * W + j] = (x[r * a.row_stride + j] + middle[r * a.row_stride + j]) * T(0.5);
    }
    add_distances<R, Batch, Feature>(x, tile.size);
    if (!Feature) return;
    if (centre_rows<R>(tile.size)) {
      add_distances<R, false, true>(x, tile.size);
      centre_rows<R>(tile.size);
    }
    T *means = this->moments_of_rows(), *vars = means + a.rows * a.positions;
    this->template for_lines<R>(tile, [=](int, size_t i, size_t k) BLN_INLINED {
      means[k] = row_mean[i], vars[k] = row_var[i];
    });
  }

  template <int R>
  bool centre_rows(int size) const {
    const T share = T(1) / T(C);
    int far = 0;
    for (int r = 0; r < R; r++) {
      T *m = row_mean + r * W, *v = row_var + r * W, *s = row_sum + r * W, *q = row_dot + r * W;
#pragma omp simd reduction(| : far)
      for (int j = 0; j < size; j++) far |= centre(share, T(4), s[j], q[j], m[j], v[j]);
    }
    return far;
  }

  // Distances, and their squares, of a tile's rows to the anchors of columns and rows.
  template <int R, bool Batch, bool Feature>
  void add_distances(const T* x, int size) const {
    if (Feature)
      for (int r = 0; r < R; r++)
        for (int j = 0; j < size; j++) row_sum[r * W + j] = row_dot[r * W + j] = T(0);
    const ptrdiff_t ld = a.row_stride, W = this->W;
    for (int c = 0; c < C; c++) {
      const T *from = x + c * a.feature_stride, *m = mean + c * W, *f = row_mean;
      T *s = sum + c * W, *q = dot + c * W, *rs = row_sum, *rq = row_dot;
#pragma omp simd
      for (int j = 0; j < size; j++) {
        T total = 0, squares = 0;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const T v = from[r * ld + j];
          if (Batch) {
            const T d = v - m[j];
            total += d, squares += d * d;
          }
          if (Feature) {
            const T d = v - f[r * W + j];
            rs[r * W + j] += d, rq[r * W + j] += d * d;
          }
        }
        if (Batch) s[j] += total, q[j] += squares;
      }
    }
  }

  template <int R, bool Feature>
  void write(Tile tile) const {
    const T* x = this->at(a.x, tile);
    T* y = a.output + (x - a.x);
    const ptrdiff_t ld = a.row_stride, W = this->W;
    for (int c = 0; c < C; c++, x += a.feature_stride, y += a.feature_stride) {
      const T *m = used + c * W, *s = slope + c * W, *f = row_used, *fs = row_slope;
      const T w = this->weight(c), bias = n.bias ? n.bias[c] : T(0);
#pragma omp simd
      for (int j = 0; j < tile.size; j++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const T v = x[r * ld + j], of_batch = batch_part(v, m[j], s[j], bias);
          y[r * ld + j] = Feature ? feature_part(v, f[r * W + j], w * fs[r * W + j]) + of_batch : of_batch;
        }
    }
  }
};

template <class T>
class PlanesBackward : Planes<T> {
  using Base = Planes<T>;
  using Base::a, Base::n, Base::W, Base::C, Base::mean, Base::var, Base::used, Base::inverse, Base::slope;
  using Base::row_mean, Base::row_used, Base::row_inverse, Base::row_slope, Base::row_sum, Base::row_dot;
  using Base::sum, Base::dot, Base::feature_dot, Base::rest, Base::row_rest, Base::w_batch, Base::w_feature;

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
          this->for_tiles(false, [&, this](auto rows, Tile tile) {
            add<rows(), batch(), feature()>(tile);
            if (a.grad_x && !waits) apply<rows(), batch(), feature()>(tile);
          });
          settle(totals, totals + C);
          if (waits)
            this->for_tiles(true, [&, this](auto rows, Tile tile) { apply<rows(), batch(), feature()>(tile); });
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
      this->load(n.batch_moments + C * (this->shared ? 1 : a.positions), var, C);
      for (int c = 0; c < C; c++) far_ |= any_far(mean + size_t(c) * W, var + size_t(c) * W, this->lanes());
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
    T *of_mean = this->plan.rows.get(), *of_var = of_mean + a.rows * a.positions;
    this->template for_lines<R>(tile, [=](int, size_t i, size_t k) BLN_INLINED {
      of_var[k] = row_inverse[i] * row_dot[i] * var_share;
      of_mean[k] = row_sum[i] * mean_share - of_var[k] * row_rest[i] * share;
    });
  }

  template <int R, bool Batch, bool Feature, bool Far>
  void add_products(Tile tile) const {
    const ptrdiff_t ldx = a.row_stride, ldg = a.grad_row_stride, W = this->W;
    const T *x = this->at(a.x, tile), *grad = a.grad + tile.row * ldg + tile.begin;
    if (Feature)
      for (T* array : {row_sum, row_dot, row_rest}) std::fill_n(array, R * W, T(0));
    const T *f = row_used, *fi = row_inverse, *fm = row_mean;
    T *rs = row_sum, *rd = row_dot, *rr = row_rest;
    for (int c = 0; c < C; c++, x += a.feature_stride, grad += a.grad_feature_stride) {
      T *S = sum + c * W, *E = dot + c * W, *F = feature_dot + c * W, *rests = rest + c * W;
      const T *m = used + c * W, *current = mean + c * W, w = this->weight(c);
#pragma omp simd
      for (int j = 0; j < tile.size; j++) {
        T s = 0, e = 0, p = 0, q = 0;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const T y = grad[r * ldg + j], v = x[r * ldx + j];
          s += y;
          if (Batch) e += y * (v - m[j]);
          if (Batch && Far) q += v - current[j];
          if (!Feature) continue;
          const ptrdiff_t i = r * W + j;
          const T product = y * ((v - f[i]) * fi[i]);
          p += product;
          rs[i] += y * w, rd[i] += product * w;
          if (Far) rr[i] += v - fm[i];
        }
        S[j] += s;
        if (Batch) E[j] += e;
        if (Batch && Far) rests[j] += q;
        if (Feature) F[j] += p;
      }
    }
  }

  // Takes the sums into the totals of weight and bias, and makes of them what x's gradient needs. A mean far from zero
  // is rounded, and the distances to it have a mean of their own, which is taken away, as Norm does.
  void settle(T* bias, T* gain) {
    this->combine({sum, dot, feature_dot, rest});
    const T scale = T(n.scale), share = T(1) / this->count;
    const T mean_share = n.batch_mean ? T(0) : share, var_share = n.batch_var ? T(0) : share;
    const T rest_share = far_ ? share : T(0), gain_rest = n.batch_mean ? T(0) : rest_share;
    const int lanes = this->lanes(), totalled = !this->shared ? lanes : this->id == 0 ? 1 : 0;
    for (int c = 0; c < C; c++) {
      const size_t at = size_t(c) * W;
      T *c2 = sum + at, *c3 = dot + at;
      const T *F = feature_dot + at, *left = rest + at, *inv = inverse + at, *s = slope + at;
      for (int j = 0; j < totalled; j++) {
        bias[c] += c2[j];
        const T of_batch = inv[j] * (c3[j] - c2[j] * left[j] * gain_rest);
        gain[c] += scale * (w_batch[j] * of_batch + w_feature[j] * F[j]);
      }
#pragma omp simd
      for (int j = 0; j < lanes; j++) {
        const T r = left[j] * rest_share, square = inv[j] * inv[j];
        const T of_mean = s[j] * c2[j] * mean_share, of_var = s[j] * square * c3[j] * var_share;
        c3[j] = n.batch_var ? T(0) : of_var - square * of_mean * r;
        c2[j] = of_mean - c3[j] * r;
      }
    }
  }

  template <int R, bool Batch, bool Feature>
  void apply(Tile tile) {
    if (Feature) this->template row_coefficients<R>(tile);
    const ptrdiff_t ldx = a.row_stride, ldg = a.grad_row_stride, ldr = a.positions, W = this->W;
    const T *x = this->at(a.x, tile), *grad = a.grad + tile.row * ldg + tile.begin;
    T* to = a.grad_x + (x - a.x);
    const T *r2 = this->plan.rows.get() + tile.row * ldr + tile.begin, *r3 = r2 + a.rows * ldr;
    const bool current = this->current_batch();
    const T *f = row_mean, *fs = row_slope;
    for (int c = 0; c < C; c++, x += a.feature_stride, to += a.feature_stride, grad += a.grad_feature_stride) {
      // variances are zero where none is current
      const T *m = mean + c * W, *s = slope + c * W, *c2 = (current ? sum : var) + c * W, *c3 = (current ? dot : var) + c * W;
      const T w = this->weight(c);
#pragma omp simd
      for (int j = 0; j < tile.size; j++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const T y = grad[r * ldg + j], v = x[r * ldx + j];
          const T of_batch = Batch ? batch_gradient(y, s[j], c2[j], v - m[j], c3[j]) : T(0);
          const ptrdiff_t i = r * W + j, k = r * ldr + j;
          const T of_row = Feature ? feature_gradient(y * w, r2[k], v - f[i], r3[k], fs[i]) : T(0);
          to[r * ldx + j] = of_batch + of_row;
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
