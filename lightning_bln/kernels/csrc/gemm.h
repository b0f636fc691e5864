// Matrix products over packed right-hand sides: one register tile, whatever the vector width.
#pragma once
#include <cstddef>
#include <vector>

#include "approx.h"
#include "lanes.h"
#include "team.h"

#if defined(__AVX512F__)
#define BLN_TILE_ROWS 12
#else
#define BLN_TILE_ROWS 6
#endif

namespace bln {

constexpr int tile_rows = BLN_TILE_ROWS;

template <class T>
constexpr int panel_width = 2 * Vector<T>::size;

// c[M, width] (+)= a[M, depth] b[depth, panel_width], element (i, k) of a lying at i * row + k * column. Of a panel no
// wider than one vector (Both = false), the second vector is left alone.
template <class T, int M, bool Both>
BLN_INLINE void tile(const T* a, ptrdiff_t row, ptrdiff_t column, const T* b, int depth, T* c, ptrdiff_t ldc, int width,
                     bool add) {
  using V = typename Vector<T>::type;
  constexpr int W = Vector<T>::size;
  // A few rows alone would wait for the latency of one addition after the other: they run several chains.
  constexpr int chains = M >= (Both ? 4 : 8) ? 1 : M >= 2 ? 2 : 4;
  constexpr int anchors = (M + 3) / 4;
  V left[chains][M], right[chains][M];
#pragma GCC unroll 4
  for (int u = 0; u < chains; u++)
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) left[u][i] = right[u][i] = V{};
  const T* at[anchors];
#pragma GCC unroll 4
  for (int i = 0; i < anchors; i++) at[i] = a + 4 * i * row;
  const ptrdiff_t row3 = 3 * row;
  int k = 0;
  for (; k + chains <= depth; k += chains) {
#pragma GCC unroll 4
    for (int u = 0; u < chains; u++) {
      const V b0 = load(b), b1 = Both ? load(b + W) : V{};
      b += 2 * W;
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        const T* p = at[i / 4];
        const T x = i % 4 == 0 ? p[0] : i % 4 == 1 ? p[row] : i % 4 == 2 ? p[2 * row] : p[row3];
        const V wide = x - V{};
        left[u][i] += wide * b0;
        if (Both) right[u][i] += wide * b1;
      }
#pragma GCC unroll 4
      for (int i = 0; i < anchors; i++) at[i] += column;
    }
  }
  if constexpr (chains > 1) {
    for (; k < depth; k++, b += 2 * W)
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        const V wide = a[i * row + k * column] - V{};
        left[0][i] += wide * load(b);
        if (Both) right[0][i] += wide * load(b + W);
      }
#pragma GCC unroll 4
    for (int u = 1; u < chains; u++)
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        left[0][i] += left[u][i];
        if (Both) right[0][i] += right[u][i];
      }
  }
  if (width == (Both ? 2 * W : W)) {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      T* out = c + i * ldc;
      store(out, add ? load(out) + left[0][i] : left[0][i]);
      if (Both) store(out + W, add ? load(out + W) + right[0][i] : right[0][i]);
    }
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) {
    T narrow[2 * W];
    store(narrow, left[0][i]);
    store(narrow + W, right[0][i]);
    for (int j = 0; j < width; j++) c[i * ldc + j] = add ? c[i * ldc + j] + narrow[j] : narrow[j];
  }
}

template <class T, int M>
void any_tile(int rows, const T* a, ptrdiff_t row, ptrdiff_t column, const T* b, int depth, T* c, ptrdiff_t ldc,
              int width, bool add) {
  if constexpr (M > 0) {
    if (rows != M)
      any_tile<T, M - 1>(rows, a, row, column, b, depth, c, ldc, width, add);
    else if (width > Vector<T>::size)
      tile<T, M, true>(a, row, column, b, depth, c, ldc, width, add);
    else
      tile<T, M, false>(a, row, column, b, depth, c, ldc, width, add);
  }
}

// c[rows, width] (+)= a b for one packed panel, in tiles of nearly equal height.
template <class T>
void multiply(const T* a, ptrdiff_t row, ptrdiff_t column, int rows, const T* b, int depth, T* c, ptrdiff_t ldc,
              int width, bool add) {
  const int tiles = (rows + tile_rows - 1) / tile_rows;
  for (int i = 0; i < tiles; i++) {
    const Range mine = part(rows, i, tiles);
    // What the next tile writes is asked for while this one computes: it may lie in memory.
    if (!add && i + 1 < tiles)
      for (int r = mine.end; r < mine.end + mine.size() && r < rows; r++)
        for (int j = 0; j < width; j += int(64 / sizeof(T))) __builtin_prefetch(c + r * ldc + j, 1);
    any_tile<T, tile_rows>(mine.size(), a + mine.begin * row, row, column, b, depth, c + mine.begin * ldc, ldc, width,
                           add);
  }
}

// Rows so few that to pack a right-hand side would take longer than to multiply by it.
constexpr int few_rows = 8;

// c[rows, width] = a b, where column j of b lies as row j of w, `ld` apart.
template <class T>
void multiply_as_it_lies(const T* a, ptrdiff_t row, int rows, const T* w, ptrdiff_t ld, int depth, T* c, ptrdiff_t ldc,
                         int width) {
  using V = typename Vector<T>::type;
  constexpr int W = Vector<T>::size, together = 8;
  for (int b = 0; b < rows; b++) {
    const T* x = a + b * row;
    T* out = c + b * ldc;
    for (int j = 0; j < width; j += together) {
      // the last ones may come twice
      const int first = width < together ? 0 : j + together <= width ? j : width - together;
      const T* at[together];
      for (int i = 0; i < together; i++) at[i] = w + ptrdiff_t(first + i < width ? first + i : width - 1) * ld;
      V sums[together]{};
      T found[together]{};
      int k = 0;
      for (; k + W <= depth; k += W) {
        const V left = load(x + k);
#pragma GCC unroll 8
        for (int i = 0; i < together; i++) sums[i] += left * load(at[i] + k);
      }
      for (; k < depth; k++)
        for (int i = 0; i < together; i++) found[i] += x[k] * at[i][k];
      add_lanes<T>(sums, found, found + together / 2);
      for (int i = 0; i < together && first + i < width; i++) out[first + i] = found[i];
    }
  }
}

// A right-hand side [depth, columns] as panels of panel_width columns, the last of each range filled up with zeros; for
// a few rows it is left where it lies.
template <class T>
struct Packed {
  struct Panel {
    int begin, width;
  };
  int depth = 0;
  std::vector<Panel> panels;
  Buffer<T> data;
  const T* left = nullptr;  // columns one after the other, `depth` numbers each

  void plan(int depth_, const std::vector<Range>& ranges) {
    plan_panels(depth_, ranges);
    data.allocate(panels.size() * size());
  }
  void leave(const T* w, int depth_, const std::vector<Range>& ranges) {
    plan_panels(depth_, ranges);
    left = w;
  }
  void plan_panels(int depth_, const std::vector<Range>& ranges) {
    depth = depth_;
    for (const Range& range : ranges)
      for (int j = range.begin; j < range.end; j += panel_width<T>)
        panels.push_back({j, range.end - j < panel_width<T> ? range.end - j : panel_width<T>});
  }
  size_t size() const { return size_t(depth) * panel_width<T>; }
  const T* at(size_t i) const { return data.get() + i * size(); }

  // Element (k, j) of the right-hand side lies at w[k * row + j * column].
  void fill(size_t i, const T* w, ptrdiff_t row, ptrdiff_t column) {
    constexpr int W = Vector<T>::size;
    T* to = data.get() + i * size();
    const Panel& panel = panels[i];
    w += panel.begin * column;
    // blocks of a matrix that lies the other way round are turned as a whole
    const int whole = row == 1 ? depth / W * W : 0, columns = panel.width / W * W;
    for (int k = 0; k < whole; k += W)
      for (int j = 0; j < columns; j += W)
        transpose(w + k + j * column, column, to + k * panel_width<T> + j, panel_width<T>);
    for (int k = 0; k < depth; k++, to += panel_width<T>) {
      const T* from = w + k * row;
      for (int j = k < whole ? columns : 0; j < panel.width; j++) to[j] = from[j * column];
      for (int j = panel.width; j < panel_width<T>; j++) to[j] = T(0);
    }
  }
};

}  // namespace bln
