// One matrix product, any strides on the left and on the right.
#pragma once
#include "gemm.h"

namespace bln {

// c[rows, columns] = a[rows, depth] b[depth, columns] + bias; element (i, k) lies at i * row + k * column.
struct ProductArgs {
  int64_t rows, columns, depth, threads;
  const void* a;
  int64_t a_row, a_column;
  const void* b;
  int64_t b_row, b_column;
  void* c;
  int64_t c_row;     // each row of c is contiguous
  const void* bias;  // [columns] or null
};

// Threads own panels of columns, and parts of the rows where there are more threads than panels; they never meet.
template <class T>
void product(const ProductArgs& p, int id, int members) {
  constexpr int deep = 256, tall = 16 * tile_rows;  // what stays in the first and in the second level of the cache
  const int panels = int((p.columns + panel_width<T> - 1) / panel_width<T>);
  const int across = members < panels ? members : panels, down = members / across;
  if (id >= across * down) return;
  const Range mine = part(panels, id % across, across), rows = part(int(p.rows), id / across, down);
  const int first = mine.begin * panel_width<T>;
  const int columns = int(mine.end * panel_width<T> < p.columns ? mine.end * panel_width<T> : p.columns) - first;
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b) + first * p.b_column;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + first : nullptr;
  T* c = static_cast<T*>(p.c) + first;
  const int depth = int(p.depth);
  Packed<T> packed;
  packed.plan(depth < deep ? depth : deep, {{0, columns}});
  for (int k = 0; k < depth; k += deep) {
    packed.depth = depth - k < deep ? depth - k : deep;
    for (size_t i = 0; i < packed.panels.size(); i++) packed.fill(i, b + k * p.b_row, p.b_row, p.b_column);
    for (int from = rows.begin; from < rows.end; from += tall) {
      const int some = rows.end - from < tall ? rows.end - from : tall;
      if (k == 0 && bias)
        for (int i = from; i < from + some; i++)
          for (int j = 0; j < columns; j++) c[i * p.c_row + j] = bias[j];
      for (size_t i = 0; i < packed.panels.size(); i++)
        multiply(a + from * p.a_row + k * p.a_column, p.a_row, p.a_column, some, packed.at(i), packed.depth,
                 c + from * p.c_row + packed.panels[i].begin, p.c_row, packed.panels[i].width, k > 0 || bias);
    }
  }
}

}  // namespace bln
