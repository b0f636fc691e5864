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
  static constexpr int block = 4;                       // rows of a tile
  static constexpr int widest = int(1024 / sizeof(T));  // and its positions
  static constexpr int column_arrays = 9, line_arrays = 9;
  static constexpr int summed = 4;  // arrays that members add up
  static constexpr int64_t cache = 1 << 19;

  const DenseArgs<T>& a;
  int members, width;
  size_t column_size;
  Buffer<T> columns, lines, rows, parts, totals;
  Barrier barrier;

  PlanesPlan(const DenseArgs<T>& args, int members)
      : a(args), members(members), width(tile_width(args)),
        column_size(size_t(args.features) * (args.shared ? 1 : width)), columns(members * column_arrays * column_size),
        lines(size_t(members) * line_arrays * block * widest),
        rows(size_t(row_arrays(args)) * args.rows * args.positions),
        parts(size_t(2) * members * summed * args.features), totals(size_t(members) * 2 * args.features),
        barrier(members) {}

  // Arrays [rows, positions]: what the gradient of a row needs, or moments that nobody else keeps.
  static int row_arrays(const DenseArgs<T>& args) {
    const bool given = args.norm.feature_mean && args.norm.feature_var;
    return args.grad ? 4 : given || args.norm.feature_moments ? 0 : 2;
  }

  // As wide as the arrays of all features may be in the second-level cache: the longer the runs in memory, the better.
  static int tile_width(const DenseArgs<T>& args) {
    if (args.shared) return widest;
    if (args.positions < 16) return int(args.positions);
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
  static constexpr ptrdiff_t next = Plan::widest;           // from a line to that of the next row
  static constexpr int written = Shared ? 1 : Plan::block;  // rows written at once, which share loads of coefficients

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

  // Between an array of all places, of a feature beside each other, and one of the sweep's.
  template <class From>
  void load(const From* from, T* to, int features) const {
    for (int c = 0; c < features; c++, from += places(), to += L)
      for (int j = 0; j < lanes(); j++) to[j] = T(from[(Shared ? 0 : sweep.begin) + j]);
  }
  // Of given statistics, the features of a place lie beside each other.
  void load_given(const T* from, T* to) const {
    from += Shared ? 0 : int64_t(sweep.begin) * C;
    for (int j = 0; j < lanes(); j++, from += C)
      for (int c = 0; c < C; c++) to[c * L + j] = from[c];
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
    // a line array has room for as many rows, or for one that is as much longer
    const int width = Shared ? Plan::block * Plan::widest / R : W;
    const int chunks = (sweep.size() + width - 1) / width, full = rows.size() / R;
    const int blocks = full + rows.size() % R, tiles = blocks * chunks;
    for (int i = 0; i < tiles; i++) {
      const int k = backwards ? tiles - 1 - i : i, b = k / chunks, begin = sweep.begin + k % chunks * width;
      const int row = rows.begin + (b < full ? b * R : full * (R - 1) + b);
      const Tile tile{row, begin, std::min(width, sweep.end - begin)};
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
    n.batch_mean ? load_given(n.batch_mean, used) : void(std::copy_n(mean, plan.column_size, used));
    n.batch_var ? load_given(n.batch_var, inverse) : void(std::copy_n(var, plan.column_size, inverse));
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

  // Coefficients of the rows from given statistics alone, which are the same for all.
  void given_rows() const {
    const T eps = T(n.eps);
    for (int r = 0; r < Plan::block; r++)
#pragma omp simd
      for (int j = 0; j < int(next); j++) {
        const int lane = Shared ? 0 : j;
        row_used[r * next + j] = given_mean[lane];
        row_slope[r * next + j] = w_feature[lane] * (T(1) / std::sqrt(given_var[lane] + eps));
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

}  // namespace bln
