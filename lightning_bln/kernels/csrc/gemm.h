// Matrix products over packed right-hand sides: one register tile, whatever the vector width.
#pragma once
#include <cstddef>
#include <vector>

#include "approx.h"
#include "team.h"

#if defined(__AVX512F__)
#define BLN_VECTOR_BYTES 64
#define BLN_TILE_ROWS 12
#elif defined(__AVX2__)
#define BLN_VECTOR_BYTES 32
#define BLN_TILE_ROWS 6
#else
#define BLN_VECTOR_BYTES 16
#define BLN_TILE_ROWS 6
#endif

namespace bln {

constexpr int tile_rows = BLN_TILE_ROWS;

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(BLN_VECTOR_BYTES), may_alias));
  typedef T loose __attribute__((vector_size(BLN_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int size = BLN_VECTOR_BYTES / sizeof(T);
};

template <class T>
constexpr int panel_width = 2 * Vector<T>::size;

// c[M, width] (+)= a[M, depth] b[depth, panel_width], element (i, k) of a lying at i * row + k * column.
template <class T, int M>
BLN_INLINE void tile(const T* a, ptrdiff_t row, ptrdiff_t column, const T* b, int depth, T* c, ptrdiff_t ldc, int width,
                     bool add) {
  using V = typename Vector<T>::type;
  using Loose = typename Vector<T>::loose;
  constexpr int W = Vector<T>::size;
  // A few rows alone would wait for the latency of one addition after the other: they run several chains.
  constexpr int chains = M >= 4 ? 1 : M >= 2 ? 2 : 4;
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
      const V b0 = *reinterpret_cast<const Loose*>(b), b1 = *reinterpret_cast<const Loose*>(b + W);
      b += 2 * W;
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        const T* p = at[i / 4];
        const T x = i % 4 == 0 ? p[0] : i % 4 == 1 ? p[row] : i % 4 == 2 ? p[2 * row] : p[row3];
        const V wide = x - V{};
        left[u][i] += wide * b0;
        right[u][i] += wide * b1;
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
        left[0][i] += wide * *reinterpret_cast<const Loose*>(b);
        right[0][i] += wide * *reinterpret_cast<const Loose*>(b + W);
      }
#pragma GCC unroll 4
    for (int u = 1; u < chains; u++)
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        left[0][i] += left[u][i];
        right[0][i] += right[u][i];
      }
  }
  if (width == 2 * W) {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      Loose* out = reinterpret_cast<Loose*>(c + i * ldc);
      out[0] = add ? out[0] + left[0][i] : left[0][i];
      out[1] = add ? out[1] + right[0][i] : right[0][i];
    }
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) {
    T narrow[2 * W];
    *reinterpret_cast<Loose*>(narrow) = left[0][i];
    *reinterpret_cast<Loose*>(narrow + W) = right[0][i];
    for (int j = 0; j < width; j++) c[i * ldc + j] = add ? c[i * ldc + j] + narrow[j] : narrow[j];
  }
}

template <class T, int M>
void any_tile(int rows, const T* a, ptrdiff_t row, ptrdiff_t column, const T* b, int depth, T* c, ptrdiff_t ldc,
              int width, bool add) {
  if constexpr (M > 0) {
    if (rows == M)
      tile<T, M>(a, row, column, b, depth, c, ldc, width, add);
    else
      any_tile<T, M - 1>(rows, a, row, column, b, depth, c, ldc, width, add);
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

// A right-hand side [depth, columns] as panels of panel_width columns, the last of each range filled up with zeros.
template <class T>
struct Packed {
  struct Panel {
    int begin, width;
  };
  int depth = 0;
  std::vector<Panel> panels;
  Buffer<T> data;

  void plan(int depth_, const std::vector<Range>& ranges) {
    depth = depth_;
    for (const Range& range : ranges)
      for (int j = range.begin; j < range.end; j += panel_width<T>)
        panels.push_back({j, range.end - j < panel_width<T> ? range.end - j : panel_width<T>});
    data.allocate(panels.size() * size());
  }
  size_t size() const { return size_t(depth) * panel_width<T>; }
  const T* at(size_t i) const { return data.get() + i * size(); }

  // Element (k, j) of the right-hand side lies at w[k * row + j * column].
  void fill(size_t i, const T* w, ptrdiff_t row, ptrdiff_t column) {
    T* to = data.get() + i * size();
    const Panel& panel = panels[i];
    for (int k = 0; k < depth; k++, to += panel_width<T>) {
      const T* from = w + k * row + panel.begin * column;
      for (int j = 0; j < panel.width; j++) to[j] = from[j * column];
      for (int j = panel.width; j < panel_width<T>; j++) to[j] = T(0);
    }
  }
};

}  // namespace bln
