// exp, sigmoid and tanh as plain arithmetic, so that a loop around them vectorises. NaN passes through.
#pragma once
#include <cstdint>

#define BLN_INLINE static inline __attribute__((always_inline))

namespace bln {

// Adding 1.5 * 2^(mantissa bits) leaves the nearest integer in the low bits, without a conversion or a rounding mode.
// exp(x) as power * (1 + rest).
template <class T>
struct Exponential {
  T power, rest;
};

BLN_INLINE Exponential<float> split_exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  union {
    float value;
    int32_t bits;
  } shifted, power;
  shifted.value = x * 1.44269504088896341f + 12582912.0f;
  const float n = shifted.value - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333338e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  power.bits = static_cast<int32_t>(static_cast<uint32_t>(shifted.bits + 127) << 23);
  return {power.value, p * r};
}

BLN_INLINE Exponential<double> split_exponential(double x) {
  x = x < -700.0 ? -700.0 : x;
  x = x > 700.0 ? 700.0 : x;
  union {
    double value;
    int64_t bits;
  } shifted, power;
  shifted.value = x * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted.value - 6755399441055744.0;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  power.bits = static_cast<int64_t>(static_cast<uint64_t>(shifted.bits + 1023) << 52);
  return {power.value, p * r};
}

template <class T>
BLN_INLINE T exponential(T x) {
  const Exponential<T> e = split_exponential(x);
  return e.power * e.rest + e.power;
}

template <class T>
BLN_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

template <class T>
BLN_INLINE T hyperbolic_tangent(T x) {
  const Exponential<T> e = split_exponential(T(2) * x);
  const T less_one = e.power * e.rest + (e.power - T(1));  // keeps the digits of a small x
  return less_one / (less_one + T(2));
}

}  // namespace bln
