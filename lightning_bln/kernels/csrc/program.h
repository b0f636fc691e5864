// The recorded program of a cell's step, run over all steps of a sequence: forward, or backwards for the gradient.
#pragma once
#include "gemm.h"

namespace bln {

// In the order of OPERATIONS in recurrence/program/codegen.py.
enum Operation : int64_t {  // clang-format off
  kProduct, kSum, kSigmoid, kTanh, kRelu, kSoftplus, kHardsigmoid, kSigmoidGradient, kTanhGradient, kReluGradient,
  kSoftplusGradient, kHardsigmoidGradient, kAffine, kBlend, kMultiply, kFused, kLerp, kDifference, kDivide
};  // clang-format on

// Operands are indices into `places`; of a product, c is the index of its matrix.
struct Instruction {
  int64_t operation, to, a, b, c;
  double s, u;
};

// Where the numbers of a step and a sequence begin: address + t * step + b * row, counted in numbers.
struct Place {
  int64_t address, step, row;
};

// The right-hand side of a product: element (k, j) lies at address + k * row + j * column.
struct Matrix {
  int64_t address, depth, columns, row, column;
};

struct ProgramArgs {
  int64_t steps, batch, units, threads, reversed, instructions, matrices;
  const int64_t* batch_sizes;  // [steps], or null if all sequences run to the end
  const Instruction* code;
  const Place* places;
  const Matrix* matrix;
};

// log(1 + exp(x)), by the series of atanh: log(1 + e) = 2 atanh(e / (2 + e)).
template <class T>
BLN_INLINE T soft_plus(T x) {
  const T e = exponential(x < T(0) ? x : -x), s = e / (T(2) + e), q = s * s;
  T p = T(0);
#pragma GCC unroll 32
  for (int k = sizeof(T) == 4 ? 15 : 35; k > 0; k -= 2) p = p * q + T(2) / T(k);
  return p * s + (x < T(0) ? T(0) : x);
}

template <class T>
class Program {
 public:
  explicit Program(const ProgramArgs& args) : a(args), matrices(size_t(args.matrices)) {
    for (size_t i = 0; i < matrices.size(); i++) {
      const Matrix& m = a.matrix[i];
      matrices[i].plan(int(m.depth), {{0, int(m.columns)}});
      for (size_t k = 0; k < matrices[i].panels.size(); k++)
        matrices[i].fill(k, reinterpret_cast<const T*>(m.address), m.row, m.column);
    }
    block = int(2048 / (a.units < 1 ? 1 : a.units));
    block = block < 1 ? 1 : block;
  }

  // All steps of some sequences, which depend on no others.
  void run(Range rows) const {
    for (int64_t i = 0; i < a.steps; i++) {
      const int64_t t = a.reversed ? a.steps - 1 - i : i;
      const int running = a.batch_sizes ? int(a.batch_sizes[t]) : int(a.batch);
      const Range some{rows.begin, rows.end < running ? rows.end : running};
      if (some.begin < some.end) step(t, some);
    }
  }

 private:
  const ProgramArgs& a;
  std::vector<Packed<T>> matrices;
  int block;

  // Instructions between two products run on a few sequences at a time, which then lie in the cache.
  void step(int64_t t, Range rows) const {
    for (int64_t i = 0; i < a.instructions;) {
      if (a.code[i].operation == kProduct) {
        multiply_rows(a.code[i++], t, rows);
        continue;
      }
      int64_t end = i;
      while (end < a.instructions && a.code[end].operation != kProduct) end++;
      for (int b = rows.begin; b < rows.end; b += block) {
        const Range some{b, rows.end < b + block ? rows.end : b + block};
        for (int64_t k = i; k < end; k++) execute(a.code[k], t, some);
      }
      i = end;
    }
  }

  T* at(int64_t place, int64_t t) const {
    const Place& p = a.places[place];
    return reinterpret_cast<T*>(p.address) + t * p.step;
  }

  void multiply_rows(const Instruction& code, int64_t t, Range rows) const {
    const Packed<T>& packed = matrices[size_t(code.c)];
    const int64_t from = a.places[code.a].row, to = a.places[code.to].row;
    for (size_t i = 0; i < packed.panels.size(); i++)
      multiply(at(code.a, t) + rows.begin * from, from, 1, rows.size(), packed.at(i), packed.depth,
               at(code.to, t) + rows.begin * to + packed.panels[i].begin, to, packed.panels[i].width, false);
  }

  // to = f(a, b, c), unit by unit.
  template <class F>
  void map(const Instruction& code, int64_t t, Range rows, F f) const {
    const int64_t n = a.units;
    const Place *to = a.places + code.to, *pa = a.places + code.a, *pb = a.places + code.b, *pc = a.places + code.c;
    for (int64_t row = rows.begin; row < rows.end; row++) {
      T* out = at(code.to, t) + row * to->row;
      const T *x = at(code.a, t) + row * pa->row, *y = at(code.b, t) + row * pb->row;
      const T* z = at(code.c, t) + row * pc->row;
#pragma omp simd
      for (int64_t j = 0; j < n; j++) out[j] = f(x[j], y[j], z[j]);
    }
  }

  void execute(const Instruction& code, int64_t t, Range rows) const {
    const T s = T(code.s), u = T(code.u), one = T(1), zero = T(0);
    const T sixth = T(1.0f / 6.0f);  // as torch's gradient has it, for doubles too
    switch (code.operation) {
      case kSum: return map(code, t, rows, [](T x, T y, T z) { return x + y + z; });
      case kSigmoid: return map(code, t, rows, [](T x, T y, T z) { return sigmoid(x + y + z); });
      case kTanh: return map(code, t, rows, [](T x, T y, T z) { return hyperbolic_tangent(x + y + z); });
      case kRelu:
        return map(code, t, rows, [=](T x, T y, T z) {
          const T v = x + y + z;
          return v < zero ? zero : v;
        });
      case kSoftplus: return map(code, t, rows, [](T x, T y, T z) { return soft_plus(x + y + z); });
      case kHardsigmoid:
        return map(code, t, rows, [=](T x, T y, T z) {
          const T v = (x + y + z + T(3)) / T(6);
          return v < zero ? zero : v > one ? one : v;
        });
      case kSigmoidGradient: return map(code, t, rows, [=](T g, T y, T) { return g * y * (one - y); });
      case kTanhGradient: return map(code, t, rows, [=](T g, T y, T) { return g * (one - y * y); });
      case kReluGradient: return map(code, t, rows, [=](T g, T y, T) { return y > zero ? g : zero; });
      case kSoftplusGradient: return map(code, t, rows, [=](T g, T y, T) { return g * (one - exponential(-y)); });
      case kHardsigmoidGradient:
        return map(code, t, rows, [=](T g, T y, T) { return y > zero && y < one ? g * sixth : zero; });
      case kAffine: return map(code, t, rows, [=](T x, T, T) { return s * x + u; });
      case kBlend: return map(code, t, rows, [=](T x, T y, T) { return s * x + u * y; });
      case kMultiply: return map(code, t, rows, [](T x, T y, T) { return x * y; });
      case kFused: return map(code, t, rows, [=](T x, T y, T z) { return x + s * y * z; });
      case kLerp: return map(code, t, rows, [](T x, T y, T w) { return x + w * (y - x); });
      case kDifference: return map(code, t, rows, [](T g, T x, T y) { return g * (x - y); });
      case kDivide: return map(code, t, rows, [](T x, T y, T) { return x / y; });
      default: return;
    }
  }
};

}  // namespace bln
