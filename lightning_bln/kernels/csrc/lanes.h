// Vectors of numbers as wide as the processor's registers, and sums over their lanes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "approx.h"

#if defined(__AVX512F__)
#define BLN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define BLN_VECTOR_BYTES 32
#else
#define BLN_VECTOR_BYTES 16
#endif

// For the bodies of loops that would not vectorise around a call.
#define BLN_INLINED __attribute__((always_inline))

namespace bln {

template <class T>
struct Vector {
  using integer = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
  typedef T type __attribute__((vector_size(BLN_VECTOR_BYTES), may_alias));
  typedef T loose __attribute__((vector_size(BLN_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  typedef integer bits __attribute__((vector_size(BLN_VECTOR_BYTES), may_alias));
  static constexpr int size = BLN_VECTOR_BYTES / sizeof(T);
};

template <class T>
BLN_INLINE typename Vector<T>::type load(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::loose*>(from);
}

template <class T>
BLN_INLINE void store(T* to, typename Vector<T>::type value) {
  *reinterpret_cast<typename Vector<T>::loose*>(to) = value;
}

// The even (First = 0) or odd (First = 1) lanes of two vectors.
template <class T, int First, int... I>
BLN_INLINE typename Vector<T>::type every_other(typename Vector<T>::type a, typename Vector<T>::type b,
                                                std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (2 * I + First)...);
#else
  return __builtin_shuffle(a, b, typename Vector<T>::bits{(2 * I + First)...});
#endif
}

// Lanes of two vectors in turns: of their first halves (Half = 0) or their second ones (Half = 1).
template <class T, int Half, int... I>
BLN_INLINE typename Vector<T>::type in_turns(typename Vector<T>::type a, typename Vector<T>::type b,
                                             std::integer_sequence<int, I...>) {
  constexpr int W = Vector<T>::size;
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (Half * W / 2 + I / 2 + I % 2 * W)...);
#else
  return __builtin_shuffle(a, b, typename Vector<T>::bits{(Half * W / 2 + I / 2 + I % 2 * W)...});
#endif
}

// A square block, as wide as a vector, turned: its rows lie `ld` apart, and those of `to`, its columns, `ldt`. Each round
// moves one bit of the row's number to the end of the column's.
template <class T>
BLN_INLINE void transpose(const T* from, ptrdiff_t ld, T* to, ptrdiff_t ldt) {
  constexpr int W = Vector<T>::size;
  using V = typename Vector<T>::type;
  using Places = std::make_integer_sequence<int, W>;
  V rows[W], next[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) rows[i] = load(from + i * ld);
#pragma GCC unroll 4
  for (int n = W; n > 1; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++) {
      next[2 * i] = in_turns<T, 0>(rows[i], rows[i + W / 2], Places{});
      next[2 * i + 1] = in_turns<T, 1>(rows[i], rows[i + W / 2], Places{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) store(to + i * ldt, rows[i]);
}

// Sums of neighbouring lanes, those of `a` before those of `b`.
template <class T>
BLN_INLINE typename Vector<T>::type pairwise(typename Vector<T>::type a, typename Vector<T>::type b) {
  using Places = std::make_integer_sequence<int, Vector<T>::size>;
  return every_other<T, 0>(a, b, Places{}) + every_other<T, 1>(a, b, Places{});
}

// How a body that works on whole vectors meets the ends of a row: all lanes of a vector within it.
template <class T>
struct Whole {
  using V = typename Vector<T>::type;
  BLN_INLINED V load(const T* from) const { return bln::load(from); }
  BLN_INLINED void store(T* to, V value) const { bln::store(to, value); }
  BLN_INLINED V counts(V value) const { return value; }
};

// The last vector of a row, whose first lanes were taken before and count for nothing.
template <class T>
struct Overlapping : Whole<T> {
  using V = typename Vector<T>::type;
  typename Vector<T>::bits fresh;
  explicit Overlapping(int taken) {
    for (int i = 0; i < Vector<T>::size; i++) fresh[i] = i < taken ? 0 : -1;
  }
  BLN_INLINED V counts(V value) const { return (V)((typename Vector<T>::bits)value & fresh); }
};

// A row narrower than a vector.
template <class T>
struct Narrow {
  using V = typename Vector<T>::type;
  int n;
  BLN_INLINED V load(const T* from) const {
    V value{};
    for (int i = 0; i < n; i++) value[i] = from[i];
    return value;
  }
  BLN_INLINED void store(T* to, V value) const {
    for (int i = 0; i < n; i++) to[i] = value[i];
  }
  BLN_INLINED V counts(V value) const {
    for (int i = n; i < Vector<T>::size; i++) value[i] = T(0);
    return value;
  }
};

// body(j, edge) for each vector of a row of n numbers, from its j-th on.
template <class T, class F>
BLN_INLINE void in_vectors(int n, F body) {
  constexpr int W = Vector<T>::size;
  if (n < W) return body(0, Narrow<T>{n});
  int j = 0;
  for (; j + W <= n; j += W) body(j, Whole<T>{});
  if (j < n) body(n - W, Overlapping<T>(j - (n - W)));
}

// body(begin, end) for parts of a range that fill vectors: numbers at its end may come twice.
template <class T, class F>
BLN_INLINE void in_whole_vectors(int begin, int end, F body) {
  constexpr int W = Vector<T>::size;
  const int rest = (end - begin) % W;
  if (end - begin < W) return body(begin, end);
  body(begin, end - rest);
  if (rest) body(end - W, end);
}

// The sum of a vector's lanes.
template <class T>
BLN_INLINE T sum_of(typename Vector<T>::type value) {
  for (int n = Vector<T>::size; n > 1; n /= 2) value = pairwise<T>(value, value);
  return value[0];
}

// Adds the sums of the lanes of eight vectors to four numbers and to four others: together they take a third of the
// instructions that they take one by one.
template <class T>
BLN_INLINE void add_lanes(typename Vector<T>::type (&sums)[8], T* first, T* second) {
  constexpr int W = Vector<T>::size;
  int number = 8;
#pragma GCC unroll 4
  for (int n = W; n > 1 && number > 1; n /= 2, number /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < number / 2; i++) sums[i] = pairwise<T>(sums[2 * i], sums[2 * i + 1]);
  for (int n = W; n > 8; n /= 2) sums[0] = pairwise<T>(sums[0], sums[0]);
  T found[8 > W ? 8 : W];
#pragma GCC unroll 4
  for (int i = 0; i < number; i++) store(found + i * W, sums[i]);
  for (int i = 0; i < 4; i++) first[i] += found[i], second[i] += found[4 + i];
}

}  // namespace bln
