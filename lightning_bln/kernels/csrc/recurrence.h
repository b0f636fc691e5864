// One layer and one direction of a recurrent network over a whole sequence: the arguments, and what cells are built on.
#pragma once
#include "gemm.h"
#include "norm.h"

namespace bln {

enum Cell : int64_t { kLstm, kGru, kRnnTanh, kRnnRelu };

// All sequence arrays are packed: the rows of step t, batch_sizes[t] of them, follow those of step t - 1. G gates, H
// units, D = G * H. Null where said; what is kept for the gradient may be null in inference, and `hidden_part` and
// `input_part` are computed anew in the gradient where they are null, as the gates always are.
template <class T>
struct RecurrenceArgs {
  int64_t cell, steps, batch, rows, inputs, units, threads;  // rows of all steps together
  int64_t row_teams, column_teams;  // how many threads, as a grid that shares rows and units; 0: chosen here
  int64_t chunk_rows;               // rows whose products with the input weights are taken together; 0: chosen here
  int64_t keep;                     // forward: a gradient will follow
  double zoneout_h, zoneout_c;
  const int64_t* batch_sizes;  // [steps], or null if all sequences run to the end
  const T* input;              // [N, inputs], or [N, D] already projected if weight_ih is null
  const T* weight_ih;          // [D, inputs] or null
  const T* weight_hh;          // [D, H]
  const T* h0;                 // [batch, H]
  const T* c0;                 // [batch, H], LSTM
  const T* hidden_mask;        // [batch, H] or null: multiplies the hidden state on its way into weight_hh
  const T* zoneout_mask_h;     // [N, H] or null: 1 where a unit keeps its value, in place of the rate zoneout_h
  const T* zoneout_mask_c;     // [N, H] or null
  T* output;                   // [N, H]
  T* hn;                       // [batch, H]
  T* cn;                       // [batch, H], LSTM
  T* input_part;               // [N, D] or null: weight_ih x
  T* hidden_part;              // [N, D] or null: weight_hh h
  T* cells;                    // [N, H] or null, LSTM: the carried state
  const T* grad_output;        // [N, H] or null
  const T* grad_hn;            // [batch, H] or null
  const T* grad_cn;            // [batch, H] or null
  T* grad_input;               // [N, inputs], [N, D] if weight_ih is null, or null
  T* grad_weight_ih;           // [D, inputs] or null
  T* grad_weight_hh;           // [D, H] or null
  T* grad_h0;                  // [batch, H]
  T* grad_c0;                  // [batch, H], LSTM
  NormArgs<T> norm_ih, norm_hh, norm_cell;
};

inline int gates_of(int64_t cell) { return cell == kLstm ? 4 : cell == kGru ? 3 : 1; }

// Whether members that share rows have to meet at every step, for moments of the batch.
template <class T>
bool meets_over_rows(const RecurrenceArgs<T>& a) {
  for (const NormArgs<T>* norm : {&a.norm_ih, &a.norm_hh, &a.norm_cell})
    if (norm->enabled && norm->w_batch[0] != 0 && !(norm->batch_mean && norm->batch_var)) return true;
  return false;
}

// A grid of threads, no larger than pays for the data that its members exchange at every step.
struct Teams {
  int rows, columns;
  int size() const { return rows * columns; }
};

// Rows are shared out where there are enough, so that only sums over the batch pass between members. With few rows,
// units are shared out, and each member reads its own part of the weights. The costs of a step are counted in
// multiplications of one gate and were measured on two cores.
template <class T>
Teams divide(const RecurrenceArgs<T>& a) {
  if (a.row_teams > 0) return {int(a.row_teams), int(a.column_teams)};
  const bool ragged = a.batch_sizes && a.batch_sizes[a.steps - 1] != a.batch;
  const bool meets = meets_over_rows(a);
  const int batch = int(a.batch), H = int(a.units);
  Teams best{1, 1};
  double least = 0;
  for (int rows = 1; rows <= a.threads; rows++)
    for (int columns = 1; rows * columns <= a.threads; columns++) {
      const int most_rows = (batch + rows - 1) / rows, most_units = ((H + 15) / 16 + columns - 1) / columns * 16;
      if (rows > 1 && (ragged || most_rows < 4)) continue;
      const double meeting = columns > 1 ? 30000.0 + 20.0 * most_rows * H : meets && rows > 1 ? 5000.0 : 0.0;
      const double cost = double(most_rows < 6 ? 6 : most_rows) * most_units * H + meeting * std::log2(rows * columns);
      if (least == 0 || cost < least) least = cost, best = {rows, columns};
    }
  return best;
}

// What all members share: packed weights, buffers of a step or of a chunk of steps, and the order of both.
template <class T>
struct Plan {
  const RecurrenceArgs<T>& a;
  int G, H, D, I, steps, batch;
  int row_teams, column_teams;
  bool zoneout;
  std::vector<int> sizes;     // how many sequences run at each step
  std::vector<int> offset;    // of each step's rows, and the total
  std::vector<Range> chunks;  // of steps
  int longest_chunk = 0;      // in rows
  Packed<T> forward_hh, forward_ih, backward_hh, backward_ih;
  typename Norm<T>::Shared shared_ih, shared_hh, shared_cell;
  Barrier barrier;

  Plan(const RecurrenceArgs<T>& args, Teams teams)
      : a(args), G(gates_of(args.cell)), H(int(args.units)), D(G * H), I(int(args.inputs)), steps(int(args.steps)),
        batch(int(args.batch)), row_teams(teams.rows), column_teams(teams.columns),
        zoneout(args.zoneout_h != 0 || args.zoneout_c != 0 || args.zoneout_mask_h || args.zoneout_mask_c),
        barrier(teams.size()) {
    sizes.resize(steps);
    offset.resize(steps + 1);
    offset[0] = 0;
    for (int t = 0; t < steps; t++) {
      sizes[t] = a.batch_sizes ? int(a.batch_sizes[t]) : batch;
      offset[t + 1] = offset[t] + sizes[t];
    }
    const int wanted = a.chunk_rows ? int(a.chunk_rows) : 192;
    for (int t = 0; t < steps;) {
      Range chunk{t, t + 1};
      while (chunk.end < steps && offset[chunk.end + 1] - offset[t] <= wanted) chunk.end++;
      chunks.push_back(chunk);
      const int rows = offset[chunk.end] - offset[t];
      longest_chunk = rows > longest_chunk ? rows : longest_chunk;
      t = chunk.end;
    }
  }

  // Members are numbered along the rows of their grid.
  Member member(int id) {
    return {id, row_teams * column_teams, id / column_teams, row_teams, id % column_teams, column_teams, &barrier};
  }

  // A member's hidden units as ranges of gate columns: one range where it owns all of them.
  std::vector<Range> columns_of(Range units) const {
    if (units.size() == H) return {{0, D}};
    std::vector<Range> ranges;
    for (int g = 0; g < G; g++) ranges.push_back({g * H + units.begin, g * H + units.end});
    return ranges;
  }

  Range units_of(int column) const { return part(H, column, column_teams, Norm<T>::grain); }
};

// What one member needs at every step.
template <class T>
class Walker {
 public:
  Walker(Plan<T>& plan, int id)
      : plan(plan), a(plan.a), G(plan.G), H(plan.H), D(plan.D), me(plan.member(id)), units(plan.units_of(me.column)),
        rows(part(plan.batch, me.row, me.rows)), ih(a.norm_ih, plan.shared_ih, me, G, H, plan.batch, units),
        hh(a.norm_hh, plan.shared_hh, me, G, H, plan.batch, units),
        cell(a.norm_cell, plan.shared_cell, me, 1, H, plan.batch, units) {}

 protected:
  Plan<T>& plan;
  const RecurrenceArgs<T>& a;
  const int G, H, D;
  Member me;
  Range units, rows;
  Norm<T> ih, hh, cell;

  Range running(int t) const { return Norm<T>::clipped(rows, plan.sizes[t]); }
  size_t at(int t) const { return size_t(plan.offset[t]); }
  const T* previous(int t, const T* sequence, const T* initial) const { return t ? sequence + at(t - 1) * H : initial; }

  // body(rows) for a few rows at a time, so that passes one after the other find them in the cache.
  template <class F>
  static void in_stripes(Range rows, F body) {
    for (int b = rows.begin; b < rows.end; b += Norm<T>::stripe)
      body(Norm<T>::clipped({b, b + Norm<T>::stripe}, rows.end));
  }

  // Ask for the stripe after this one where the data last lay in a far cache.
  void fetch_ahead(const T* rows, ptrdiff_t ld, Range stripe, Range some) const {
    for (int b = stripe.end; b < stripe.end + stripe.size() && b < some.end; b++)
      for (int g = 0; g < G; g++)
        for (int j = units.begin; j < units.end; j += int(64 / sizeof(T)))
          __builtin_prefetch(rows + b * ld + g * H + j);
  }

  // The panels of a packed right-hand side that hold this member's columns.
  Range own_panels(const Packed<T>& packed, int repeats) const {
    int begin = 0;
    for (int c = 0; c < me.column; c++) begin += repeats_of(c, repeats);
    (void)packed;
    return {begin, begin + repeats_of(me.column, repeats)};
  }
  int repeats_of(int column, int repeats) const {
    const Range range = plan.units_of(column);
    const int width = panel_width<T>;
    if (range.size() == H) return (repeats * H + width - 1) / width;
    return repeats * ((range.size() + width - 1) / width);
  }

  void fill(Packed<T>& packed, Range panels, const T* w, ptrdiff_t row, ptrdiff_t column) const {
    if (packed.left) return;
    const Range mine = part(panels.size(), me.row, me.rows);
    for (int i = mine.begin; i < mine.end; i++) packed.fill(panels.begin + i, w, row, column);
  }

  // Own rows and columns of a product whose left rows are those of step t, `ld` apart.
  void project(const Packed<T>& packed, Range panels, const T* left, ptrdiff_t ld, Range some, T* out, ptrdiff_t ldo,
               bool add) const {
    if (some.size() == 0) return;
    for (int i = panels.begin; i < panels.end; i++) {
      const auto& panel = packed.panels[i];
      if (packed.left)
        multiply_as_it_lies(left + some.begin * ld, ld, some.size(),
                            packed.left + ptrdiff_t(panel.begin) * packed.depth, packed.depth, packed.depth,
                            out + some.begin * ldo + panel.begin, ldo, panel.width);
      else
        multiply(left + some.begin * ld, ld, 1, some.size(), packed.at(i), packed.depth,
                 out + some.begin * ldo + panel.begin, ldo, panel.width, add);
    }
  }

  // weight_ih x for the steps of a chunk; all rows in one go where this member owns them all.
  void project_input(Range chunk, Range panels, T* out) const {
    const size_t first = at(chunk.begin);
    for (int i = panels.begin; i < panels.end; i++) {
      const Range one{i, i + 1};
      if (me.rows == 1)
        project(plan.forward_ih, one, a.input + first * plan.I, plan.I, {0, int(at(chunk.end) - first)}, out, D, false);
      else
        for (int t = chunk.begin; t < chunk.end; t++)
          project(plan.forward_ih, one, a.input + at(t) * plan.I, plan.I, running(t), out + (at(t) - first) * D, D,
                  false);
    }
  }

  // The gates' activations on the sums of both normalised parts.
  void activate_all(int t, const T* x, const T* v, T* gates, Range some) const {
    activate_all(t, x, v, gates, some, gates + 3 * H, D);
  }

  // The output gate of an LSTM may have a place of its own.
  void activate_all(int t, const T* x, const T* v, T* gates, Range some, T* output_gate, ptrdiff_t ldo) const {
    if (ih.has_feature(t) || hh.has_feature(t))
      activate_all<true>(x, v, gates, some, output_gate, ldo);
    else
      activate_all<false>(x, v, gates, some, output_gate, ldo);
  }

  template <bool Feature>
  void activate_all(const T* x, const T* v, T* gates, Range some, T* output_gate, ptrdiff_t ldo) const {
    const auto squash = [](T z) { return sigmoid(z); };
    const auto bend = [](T z) { return hyperbolic_tangent(z); };
    switch (a.cell) {
      case kLstm:
        for (int g : {0, 1}) activate<Feature>(g, x, v, gates + g * H, D, some, squash);
        activate<Feature>(2, x, v, gates + 2 * H, D, some, bend);
        activate<Feature>(3, x, v, output_gate, ldo, some, squash);
        break;
      case kGru:
        for (int g : {0, 1}) activate<Feature>(g, x, v, gates + g * H, D, some, squash);
        activate_new<Feature>(x, v, gates, some);
        break;
      case kRnnTanh: activate<Feature>(0, x, v, gates, D, some, bend); break;
      default: activate<Feature>(0, x, v, gates, D, some, [](T z) { return z < T(0) ? T(0) : z; });
    }
  }

  // One gate, to rows `ldo` apart.
  template <bool Feature, class F>
  void activate(int g, const T* x, const T* v, T* out, ptrdiff_t ldo, Range some, F activation) const {
    const auto row = [=](int b) BLN_INLINED {
      const auto from_x = ih.template normalized<Feature>(g, b, x + size_t(b) * D + g * H);
      const auto from_v = hh.template normalized<Feature>(g, b, v + size_t(b) * D + g * H);
      return [=](int j) BLN_INLINED { return activation(from_x[j] + from_v[j]); };
    };
    write_rows(some, out, ldo, row);
  }

  // The new gate of a GRU: its hidden part is multiplied by the reset gate after the normalisation.
  template <bool Feature>
  void activate_new(const T* x, const T* v, T* gates, Range some) const {
    const auto row = [=](int b) BLN_INLINED {
      const auto from_x = ih.template normalized<Feature>(2, b, x + size_t(b) * D + 2 * H);
      const auto from_v = hh.template normalized<Feature>(2, b, v + size_t(b) * D + 2 * H);
      const T* reset = gates + size_t(b) * D;
      return [=](int j) BLN_INLINED { return hyperbolic_tangent(from_x[j] + reset[j] * from_v[j]); };
    };
    write_rows(some, gates + 2 * H, D, row);
  }

  // row(b)(j) for own units of some rows, to rows `ldo` apart.
  template <class F>
  void write_rows(Range some, T* out, ptrdiff_t ldo, F row) const {
    for (int b = some.begin; b < some.end; b++) {
      const auto y = row(b);
      T* to = out + b * ldo;
      in_whole_vectors<T>(units.begin, units.end, [=](int begin, int end) BLN_INLINED {
#pragma omp simd
        for (int j = begin; j < end; j++) to[j] = y(j);
      });
    }
  }

  // What part of its value a unit keeps at step t: the mask's row, or null for the rate.
  const T* mask_row(const T* mask, int t, int b) const { return mask ? mask + (at(t) + b) * H : nullptr; }
};

// body(j, kept) over own units, `kept` being the zoneout mask's value or the rate.
template <class T, class F>
BLN_INLINE void with_zoneout(Range units, const T* mask, T rate, F body) {
  if (mask) {
#pragma omp simd
    for (int j = units.begin; j < units.end; j++) body(j, mask[j]);
  } else {
#pragma omp simd
    for (int j = units.begin; j < units.end; j++) body(j, rate);
  }
}

}  // namespace bln
