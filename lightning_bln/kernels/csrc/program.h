// The recorded program of a cell's step, run over all steps of a sequence: forward, or backwards for the gradient.
#pragma once
#include <deque>

#include "gemm.h"
#include "norm.h"

namespace bln {

// In the order of OPERATIONS in recurrence/program/codegen.py.
enum Operation : int64_t {  // clang-format off
  kProduct, kSum, kSigmoid, kTanh, kRelu, kSoftplus, kHardsigmoid, kSigmoidGradient, kTanhGradient, kReluGradient,
  kSoftplusGradient, kHardsigmoidGradient, kAffine, kBlend, kMultiply, kFused, kLerp, kDifference, kDivide,
  kExp, kMaximum, kMaximumGradient, kEquals, kDiffers, kGreater, kAtLeast, kLess,
  kAtMost, kWhere, kClampMax, kClampMaxGradient, kNorm, kNormGradient
};  // clang-format on

// Operands are indices into `places`; of a product, c is the index of its matrix, of a norm and its gradient that of the
// norm. A norm's gradient has that of its output as a, and its input as b; s is set where it needs another's result. Narrow values have the features of the
// output, which may be projected; all others those of a gate.
struct Instruction {
  int64_t operation, narrow, to, a, b, c;
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
  int64_t steps, batch, units, outputs, threads, reversed, instructions, matrices, norms;
  const int64_t* batch_sizes;  // [steps], or null if all sequences run to the end
  const Instruction* code;
  const Place* places;
  const Matrix* matrix;
  const int64_t* norm_gates;  // gates side by side that each norm takes
  const void* norm;           // NormArgs of each, in the arrays' dtype
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

// What all members share: packed matrices, and where the norms leave their parts of sums.
template <class T>
struct ProgramPlan {
  const ProgramArgs& a;
  const NormArgs<T>* norms;
  int members;
  int block;  // sequences that instructions between two products take at a time
  bool learns = false;
  std::vector<Packed<T>> matrices;
  std::vector<typename Norm<T>::Shared> shared;
  Barrier barrier;

  ProgramPlan(const ProgramArgs& args, int members)
      : a(args), norms(static_cast<const NormArgs<T>*>(args.norm)), members(members), block(int(2048 / args.units)),
        matrices(size_t(args.matrices)), shared(size_t(args.norms)), barrier(members) {
    for (size_t i = 0; i < matrices.size(); i++) {
      const Matrix& m = a.matrix[i];
      matrices[i].plan(int(m.depth), {{0, int(m.columns)}});
      for (size_t k = 0; k < matrices[i].panels.size(); k++)
        matrices[i].fill(k, reinterpret_cast<const T*>(m.address), m.row, m.column);
    }
    for (size_t i = 0; i < shared.size(); i++) {
      Norm<T>::allocate(shared[i], norms[i], int(a.norm_gates[i]), int(a.units), int(a.batch), members, 1);
      learns |= norms[i].grad_weight || norms[i].grad_bias;
    }
    block = block < 1 ? 1 : block;
  }
};

// One member: all steps of some sequences. Members meet where a norm takes moments over the batch.
template <class T>
class Program {
 public:
  Program(ProgramPlan<T>& plan, int id)
      : a(plan.a), plan(plan), me{id, plan.members, id, plan.members, 0, 1, &plan.barrier},
        rows(part(int(a.batch), id, plan.members)) {
    for (size_t i = 0; i < plan.shared.size(); i++)
      norms.emplace_back(plan.norms[i], plan.shared[i], me, int(a.norm_gates[i]), int(a.units), int(a.batch),
                         Range{0, int(a.units)});
  }

  void run() {
    for (int64_t i = 0; i < a.steps; i++) {
      const int64_t t = a.reversed ? a.steps - 1 - i : i;
      const int running = a.batch_sizes ? int(a.batch_sizes[t]) : int(a.batch);
      const Range some = Norm<T>::clipped(rows, running);
      if (some.size() > 0 || !norms.empty()) step(t, running, some);
    }
    if (!plan.learns) return;
    for (Norm<T>& norm : norms) norm.leave_totals();
    me.wait();
    for (Norm<T>& norm : norms) norm.write_totals();
  }

 private:
  const ProgramArgs& a;
  ProgramPlan<T>& plan;
  Member me;
  Range rows;
  std::deque<Norm<T>> norms;  // which cannot be moved

  // Instructions of a kind that takes all sequences of a step together, or of the others, which run on a few at a time:
  // these then lie in the cache.
  void step(int64_t t, int running, Range some) {
    for (int64_t i = 0, end; i < a.instructions; i = end) {
      const int64_t kind = whole(a.code[i].operation);
      for (end = i + 1; end < a.instructions && whole(a.code[end].operation) == kind;) {
        if (kind >= kNorm && a.code[end].s != 0) break;  // it takes what one before it gives
        end++;
      }
      if (kind == kProduct)
        for (int64_t k = i; k < end; k++) multiply_rows(a.code[k], t, some);
      else if (kind == kNorm)
        normalize(i, end, t, running, some);
      else if (kind == kNormGradient)
        differentiate(i, end, t, running, some);
      else
        for (int b = some.begin; b < some.end; b += plan.block) {
          const Range few = Norm<T>::clipped({b, b + plan.block}, some.end);
          for (int64_t k = i; k < end; k++) execute(a.code[k], t, few);
        }
    }
  }

  static int64_t whole(int64_t operation) {
    return operation == kProduct || operation == kNorm || operation == kNormGradient ? operation : -1;
  }

  // Norms one after the other, whose members meet once for all of them.
  void normalize(int64_t begin, int64_t end, int64_t t, int running, Range some) {
    bool meets = false;
    for (int64_t k = begin; k < end; k++) {
      Norm<T>& norm = norms[size_t(a.code[k].c)];
      norm.measure(int(t), at(a.code[k].a, t), a.places[a.code[k].a].row, some);
      meets |= norm.meets(int(t));
    }
    if (meets) me.wait();
    for (int64_t k = begin; k < end; k++) {
      Norm<T>& norm = norms[size_t(a.code[k].c)];
      norm.fetch(int(t));
      norm.settle(int(t), running, some);
      if (norm.has_feature(int(t)))
        write<true>(norm, a.code[k], t, some);
      else
        write<false>(norm, a.code[k], t, some);
    }
  }

  template <bool Feature>
  void write(const Norm<T>& norm, const Instruction& code, int64_t t, Range some) const {
    const T* x = at(code.a, t);
    T* to = at(code.to, t);
    const int64_t n = a.units, from_row = a.places[code.a].row, to_row = a.places[code.to].row;
    for (int64_t b = some.begin; b < some.end; b++)
      for (int64_t g = 0; g < a.norm_gates[code.c]; g++) {
        const auto y = norm.template normalized<Feature>(int(g), int(b), x + b * from_row + g * n);
        T* out = to + b * to_row + g * n;
#pragma omp simd
        for (int j = 0; j < int(n); j++) out[j] = y[j];
      }
  }

  void differentiate(int64_t begin, int64_t end, int64_t t, int running, Range some) {
    bool meets = false;
    for (int64_t k = begin; k < end; k++) {
      const Instruction& code = a.code[k];
      Norm<T>& norm = norms[size_t(code.c)];
      norm.recall(int(t), some);
      norm.sums(int(t), at(code.a, t), a.places[code.a].row, at(code.b, t), a.places[code.b].row, some);
      meets |= norm.gradient_meets(int(t));
    }
    if (meets) me.wait();
    for (int64_t k = begin; k < end; k++) {
      const Instruction& code = a.code[k];
      Norm<T>& norm = norms[size_t(code.c)];
      norm.fetch(int(t));
      norm.end_sums(int(t), running, some);
      norm.template apply<false>(at(code.a, t), a.places[code.a].row, at(code.b, t), a.places[code.b].row,
                                 at(code.to, t), a.places[code.to].row, some);
    }
  }

  T* at(int64_t place, int64_t t) const {
    const Place& p = a.places[place];
    return reinterpret_cast<T*>(p.address) + t * p.step;
  }

  void multiply_rows(const Instruction& code, int64_t t, Range rows) const {
    if (rows.size() == 0) return;
    const Packed<T>& packed = plan.matrices[size_t(code.c)];
    const int64_t from = a.places[code.a].row, to = a.places[code.to].row;
    for (size_t i = 0; i < packed.panels.size(); i++)
      multiply(at(code.a, t) + rows.begin * from, from, 1, rows.size(), packed.at(i), packed.depth,
               at(code.to, t) + rows.begin * to + packed.panels[i].begin, to, packed.panels[i].width, false);
  }

  // to = f(a, b, c), unit by unit.
  template <class F>
  void map(const Instruction& code, int64_t t, Range rows, F f) const {
    const int64_t n = code.narrow ? a.outputs : a.units;
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
      case kExp:  // whose bounds are those of sigmoids: of half the argument they lie beyond the numbers' range
        return map(code, t, rows, [](T x, T, T) {
          const T root = exponential(x * T(0.5));
          return root * root;
        });
      case kMaximum: return map(code, t, rows, [](T x, T y, T) { return x > y || x != x ? x : y; });
      case kMaximumGradient:  // of x, which shares it with y where they are equal
        return map(code, t, rows, [=](T g, T x, T y) { return x > y ? g : x < y ? zero : g / T(2); });
      case kEquals: return map(code, t, rows, [=](T x, T, T) { return x == s ? one : zero; });
      case kDiffers: return map(code, t, rows, [=](T x, T, T) { return x != s ? one : zero; });
      case kGreater: return map(code, t, rows, [=](T x, T, T) { return x > s ? one : zero; });
      case kAtLeast: return map(code, t, rows, [=](T x, T, T) { return x >= s ? one : zero; });
      case kLess: return map(code, t, rows, [=](T x, T, T) { return x < s ? one : zero; });
      case kAtMost: return map(code, t, rows, [=](T x, T, T) { return x <= s ? one : zero; });
      case kWhere: return map(code, t, rows, [=](T is, T x, T y) { return is != zero ? x : y; });
      case kClampMax: return map(code, t, rows, [=](T x, T, T) { return x > s ? s : x; });
      case kClampMaxGradient: return map(code, t, rows, [=](T g, T x, T) { return x > s ? zero : g; });
      default: return;
    }
  }
};

}  // namespace bln
