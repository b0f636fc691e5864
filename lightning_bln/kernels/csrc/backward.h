// The gradient of a sequence: the same steps backwards, weight gradients as one product a chunk of steps.
#pragma once
#include "recurrence.h"

namespace bln {

template <class T>
struct BackwardBuffers {
  bool separate;  // whether what flows into weight_hh h differs from what flows into weight_ih x
  Buffer<T> input_part, hidden_part, candidate, fresh_grad, cell_out_grad, gates, hidden_gates_grad;
  Buffer<T> input_grad, hidden_grad, unmasked;

  explicit BackwardBuffers(Plan<T>& plan) {
    const RecurrenceArgs<T>& a = plan.a;
    separate = a.norm_hh.enabled || a.norm_ih.enabled || a.cell == kGru;
    std::vector<Range> gate_columns, unit_columns;
    for (int c = 0; c < plan.column_teams; c++) {
      for (Range range : plan.columns_of(plan.units_of(c))) gate_columns.push_back(range);
      unit_columns.push_back(plan.units_of(c));
    }
    plan.backward_hh.plan(plan.D, unit_columns);
    if (a.weight_ih && a.grad_input) plan.backward_ih.plan(plan.D, {{0, plan.I}});
    const size_t step = size_t(plan.batch) * plan.D, state = size_t(plan.batch) * plan.H;
    const size_t chunk = size_t(plan.longest_chunk) * plan.D;
    if (a.weight_ih && !a.input_part) {
      plan.forward_ih.plan(plan.I, gate_columns);
      input_part.allocate(chunk);
    }
    if (!a.hidden_part) {
      plan.forward_hh.plan(plan.H, gate_columns);
      hidden_part.allocate(step);
    }
    if (a.cell == kLstm) {
      cell_out_grad.allocate(state);
      if (plan.zoneout) candidate.allocate(state), fresh_grad.allocate(state);
    }
    gates.allocate(step);
    if (a.cell == kGru) hidden_gates_grad.allocate(step);
    if (a.weight_ih || !a.grad_input) input_grad.allocate(chunk);
    if (separate) hidden_grad.allocate(chunk);
    if (a.hidden_mask) unmasked.allocate(state);
    Norm<T>::allocate(plan.shared_ih, a.norm_ih, plan.G, plan.H, plan.batch, plan.row_teams, plan.column_teams);
    Norm<T>::allocate(plan.shared_hh, a.norm_hh, plan.G, plan.H, plan.batch, plan.row_teams, plan.column_teams);
    Norm<T>::allocate(plan.shared_cell, a.norm_cell, 1, plan.H, plan.batch, plan.row_teams, plan.column_teams);
  }
};

template <class T>
class Backward : Walker<T> {
  using Base = Walker<T>;
  using Base::a, Base::plan, Base::me, Base::units, Base::rows, Base::ih, Base::hh, Base::cell;
  using Base::at, Base::running, Base::previous, Base::mask_row, Base::G, Base::H, Base::D;
  BackwardBuffers<T>& buffers;
  Buffer<T> packed_, masked_;
  Range own_hh_;

 public:
  Backward(Plan<T>& plan, BackwardBuffers<T>& buffers, int id)
      : Base(plan, id), buffers(buffers), packed_(size_t(plan.longest_chunk) * panel_width<T>) {
    if (a.hidden_mask && !a.hidden_part) masked_.allocate(size_t(plan.batch) * H);
  }

  void run() {
    own_hh_ = this->own_panels(plan.backward_hh, 1);
    const Range forward_panels = this->own_panels(plan.forward_hh, G);
    this->fill(plan.backward_hh, own_hh_, a.weight_hh, H, 1);
    if (a.weight_ih && a.grad_input) {
      const Range mine = part(int(plan.backward_ih.panels.size()), me.id, me.size);
      for (int i = mine.begin; i < mine.end; i++) plan.backward_ih.fill(i, a.weight_ih, plan.I, 1);
    }
    if (a.weight_ih && !a.input_part) this->fill(plan.forward_ih, forward_panels, a.weight_ih, 1, plan.I);
    if (!a.hidden_part) this->fill(plan.forward_hh, forward_panels, a.weight_hh, 1, H);
    start(a.grad_h0, a.grad_hn);
    if (a.cell == kLstm) start(a.grad_c0, a.grad_cn);
    me.wait();
    for (size_t i = plan.chunks.size(); i-- > 0;) {
      const Range chunk = plan.chunks[i];
      const size_t first = at(chunk.begin);
      const T* inputs =
          a.weight_ih ? a.input_part ? a.input_part + first * D : buffers.input_part.get() : a.input + first * D;
      if (a.weight_ih && !a.input_part) this->project_input(chunk, forward_panels, buffers.input_part.get());
      T* input_grad = a.weight_ih || !a.grad_input ? buffers.input_grad.get() : a.grad_input + first * D;
      T* hidden_grad = buffers.separate ? buffers.hidden_grad.get() : input_grad;
      for (int t = chunk.end; t-- > chunk.begin;) {
        const size_t offset = (at(t) - first) * D;
        step(t, inputs + offset, input_grad + offset, hidden_grad + offset, forward_panels);
      }
      if (me.rows > 1 || me.columns > 1) me.wait();
      weight_gradients(chunk, input_grad, hidden_grad, i + 1 == plan.chunks.size());
      me.wait();
    }
    for (Norm<T>* norm : {&ih, &hh, &cell}) norm->leave_totals();
    me.wait();
    for (Norm<T>* norm : {&ih, &hh, &cell}) norm->write_totals();
  }

 private:
  void start(T* to, const T* from) {
    for (int b = rows.begin; b < rows.end; b++)
      for (int j = units.begin; j < units.end; j++) to[size_t(b) * H + j] = from ? from[size_t(b) * H + j] : T(0);
  }

  void step(int t, const T* x, T* input_grad, T* hidden_grad, Range forward_panels) {
    const Range some = running(t);
    const int m = plan.sizes[t];
    const bool gru = a.cell == kGru;
    T* gates = !ih.a.enabled ? input_grad : hh.a.enabled || gru ? buffers.gates.get() : hidden_grad;
    T* hidden_gates_grad = !gru ? gates : hh.a.enabled ? buffers.hidden_gates_grad.get() : hidden_grad;
    ih.recall(t, some);
    hh.recall(t, some);
    const T* v = a.hidden_part ? a.hidden_part + at(t) * D : project_again(t, some, forward_panels);
    if (a.cell == kLstm) {
      cell.recall(t, some);
      cell.begin_sums(t, some);
      this->in_stripes(some, [&](Range stripe) {
        this->fetch_ahead(x, D, stripe, some);
        this->fetch_ahead(v, D, stripe, some);
        this->activate_all(t, x, v, gates, stripe);
        lstm_output(t, gates, stripe);
      });
      if (cell.gradient_meets(t)) me.wait();
      cell.fetch(t);
      cell.end_sums(t, m, some);
    }
    hh.begin_sums(t, some);
    ih.begin_sums(t, some);
    this->in_stripes(some, [&](Range stripe) {
      if (a.cell != kLstm) this->activate_all(t, x, v, gates, stripe);
      if (a.cell == kLstm)
        lstm_state(t, gates, stripe);
      else if (gru)
        this->gru(t, v, gates, hidden_gates_grad, stripe);
      else
        rnn(t, gates, stripe);
      hh.add_sums(hidden_gates_grad, D, v, D, stripe);
      ih.add_sums(gates, D, x, D, stripe);
    });
    if (hh.gradient_meets(t) || ih.gradient_meets(t)) me.wait();
    hh.fetch(t);
    ih.fetch(t);
    hh.end_sums(t, m, some);
    ih.end_sums(t, m, some);
    this->in_stripes(some, [&](Range stripe) {
      if (hh.a.enabled) hh.template apply<false>(hidden_gates_grad, D, v, D, hidden_grad, D, stripe);
      if (ih.a.enabled) ih.template apply<false>(gates, D, x, D, input_grad, D, stripe);
    });
    if (me.columns > 1) me.wait();
    if (!a.hidden_mask) {
      this->project(plan.backward_hh, own_hh_, hidden_grad, D, some, a.grad_h0, H, true);
      return;
    }
    T* unmasked = buffers.unmasked.get();
    this->project(plan.backward_hh, own_hh_, hidden_grad, D, some, unmasked, H, false);
    for (int b = some.begin; b < some.end; b++) {
      const size_t row = size_t(b) * H;
      for (int j = units.begin; j < units.end; j++) a.grad_h0[row + j] += a.hidden_mask[row + j] * unmasked[row + j];
    }
  }

  const T* project_again(int t, Range some, Range panels) {
    const T* h = previous(t, a.output, a.h0);
    if (a.hidden_mask) {
      for (size_t i = size_t(some.begin) * H; i < size_t(some.end) * H; i++) masked_[i] = h[i] * a.hidden_mask[i];
      h = masked_.get();
    }
    this->project(plan.forward_hh, panels, h, H, some, buffers.hidden_part.get(), D, false);
    return buffers.hidden_part.get();
  }

  // Gradient of the unzoned hidden state in row b, through `body(j, grad)`; what zoneout carries over stays in grad_h0.
  template <class F>
  void hidden_gradient(int t, int b, F body) {
    T* grad = a.grad_h0 + size_t(b) * H;
    const T* from = a.grad_output ? a.grad_output + (at(t) + b) * H : nullptr;
    if (from) {
#pragma omp simd
      for (int j = units.begin; j < units.end; j++) grad[j] += from[j];
    }
    if (plan.zoneout) {
      with_zoneout(units, mask_row(a.zoneout_mask_h, t, b), T(a.zoneout_h), [=](int j, T kept) {
        const T all = grad[j];
        grad[j] = kept * all;
        body(j, (T(1) - kept) * all);
      });
      return;
    }
#pragma omp simd
    for (int j = units.begin; j < units.end; j++) {
      const T all = grad[j];
      grad[j] = T(0);
      body(j, all);
    }
  }

  // The gradient that reaches the cell state through the output. The output gate is overwritten by its gradient, as the
  // other gates are later.
  void lstm_output(int t, T* gates, Range some) {
    const T *c = a.cells + at(t) * H, *c_before = previous(t, a.cells, a.c0);
    const T* fresh = c;
    if (plan.zoneout) {
      fresh = buffers.candidate.get();
      for (int b = some.begin; b < some.end; b++) {
        const T *i = gates + size_t(b) * D, *f = i + H, *g = f + H, *old = c_before + size_t(b) * H;
        T *to = buffers.candidate.get() + size_t(b) * H, *all = a.grad_c0 + size_t(b) * H;
        T* own = buffers.fresh_grad.get() + size_t(b) * H;
        with_zoneout(units, mask_row(a.zoneout_mask_c, t, b), T(a.zoneout_c), [=](int j, T kept) {
          to[j] = f[j] * old[j] + i[j] * g[j];
          own[j] = (T(1) - kept) * all[j];
          all[j] = kept * all[j];
        });
      }
    }
    T* out_grad = buffers.cell_out_grad.get();
    for (int b = some.begin; b < some.end; b++) {
      const auto y = cell.normalized(0, b, fresh + size_t(b) * H);
      T *o = gates + size_t(b) * D + 3 * H, *to = out_grad + size_t(b) * H;
      hidden_gradient(t, b, [=](int j, T grad) {
        const T squashed = hyperbolic_tangent(y[j]);
        const T gate = o[j];
        o[j] = grad * squashed * gate * (T(1) - gate);
        to[j] = grad * gate * (T(1) - squashed * squashed);
      });
    }
    cell.add_sums(out_grad, H, fresh, H, some);
  }

  // The gradients of the other gates and of the state carried in.
  void lstm_state(int t, T* gates, Range some) {
    const T* c_before = previous(t, a.cells, a.c0);
    const T* fresh = plan.zoneout ? buffers.candidate.get() : a.cells + at(t) * H;
    T* fresh_grad = plan.zoneout ? buffers.fresh_grad.get() : a.grad_c0;
    const T* out_grad = buffers.cell_out_grad.get();
    if (cell.a.enabled)
      cell.template apply<true>(out_grad, H, fresh, H, fresh_grad, H, some);
    else
      for (int b = some.begin; b < some.end; b++)
        for (int j = units.begin; j < units.end; j++) fresh_grad[size_t(b) * H + j] += out_grad[size_t(b) * H + j];
    for (int b = some.begin; b < some.end; b++) {
      const T *old = c_before + size_t(b) * H, *grad = fresh_grad + size_t(b) * H;
      T *i = gates + size_t(b) * D, *f = i + H, *g = f + H, *carried = a.grad_c0 + size_t(b) * H;
      const T keep = plan.zoneout ? T(1) : T(0);
#pragma omp simd
      for (int j = units.begin; j < units.end; j++) {
        const T z = grad[j], in = i[j], forget = f[j], fresh_cell = g[j];
        i[j] = z * fresh_cell * in * (T(1) - in);
        f[j] = z * old[j] * forget * (T(1) - forget);
        g[j] = z * in * (T(1) - fresh_cell * fresh_cell);
        carried[j] = keep * carried[j] + z * forget;
      }
    }
  }

  void gru(int t, const T* v, T* gates, T* hidden_gates_grad, Range some) {
    const T* h = previous(t, a.output, a.h0);
    for (int b = some.begin; b < some.end; b++) {
      const T* old = h + size_t(b) * H;
      const auto hidden = hh.normalized(2, b, v + size_t(b) * D + 2 * H);
      T *r = gates + size_t(b) * D, *z = r + H, *n = z + H;
      T *r_too = hidden_gates_grad + size_t(b) * D, *z_too = r_too + H, *n_too = z_too + H;
      T* carried = a.grad_h0 + size_t(b) * H;
      hidden_gradient(t, b, [=](int j, T grad) {
        const T reset = r[j], update = z[j], fresh = n[j];
        const T dn = grad * (T(1) - update) * (T(1) - fresh * fresh);
        const T dz = grad * (old[j] - fresh) * update * (T(1) - update);
        const T dr = dn * hidden[j] * reset * (T(1) - reset);
        r[j] = r_too[j] = dr;
        z[j] = z_too[j] = dz;
        n[j] = dn;
        n_too[j] = dn * reset;
        carried[j] += grad * update;
      });
    }
  }

  void rnn(int t, T* gates, Range some) {
    for (int b = some.begin; b < some.end; b++) {
      T* h = gates + size_t(b) * D;
      if (a.cell == kRnnTanh)
        hidden_gradient(t, b, [=](int j, T grad) { h[j] = grad * (T(1) - h[j] * h[j]); });
      else
        hidden_gradient(t, b, [=](int j, T grad) { h[j] = h[j] > T(0) ? grad : T(0); });
    }
  }

  // This member's rows of both weight gradients, and its tiles of the input's gradient.
  void weight_gradients(Range chunk, const T* input_grad, const T* hidden_grad, bool first) {
    const size_t begin = at(chunk.begin);
    const int depth = int(at(chunk.end) - begin);
    const Range mine = part(D, me.id, me.size, tile_rows);
    if (a.grad_weight_hh)
      for (int j = 0; j < H; j += panel_width<T>) {
        const int width = H - j < panel_width<T> ? H - j : panel_width<T>;
        T* to = packed_.get();
        for (int t = chunk.begin; t < chunk.end; t++) {
          const T* h = previous(t, a.output, a.h0);
          for (int b = 0; b < plan.sizes[t]; b++, to += panel_width<T>)
            pack_row(to, h + size_t(b) * H + j, a.hidden_mask ? a.hidden_mask + size_t(b) * H + j : nullptr, width);
        }
        multiply(hidden_grad + mine.begin, 1, D, mine.size(), packed_.get(), depth,
                 a.grad_weight_hh + size_t(mine.begin) * H + j, H, width, !first);
      }
    if (!a.weight_ih) return;
    if (a.grad_weight_ih)
      for (int j = 0; j < plan.I; j += panel_width<T>) {
        const int width = plan.I - j < panel_width<T> ? plan.I - j : panel_width<T>;
        for (int b = 0; b < depth; b++)
          pack_row(packed_.get() + size_t(b) * panel_width<T>, a.input + (begin + b) * plan.I + j, nullptr, width);
        multiply(input_grad + mine.begin, 1, D, mine.size(), packed_.get(), depth,
                 a.grad_weight_ih + size_t(mine.begin) * plan.I + j, plan.I, width, !first);
      }
    if (!a.grad_input) return;
    const int tiles = (depth + tile_rows - 1) / tile_rows, panels = int(plan.backward_ih.panels.size());
    const Range work = part(tiles * panels, me.id, me.size);
    for (int i = work.begin; i < work.end; i++) {
      const auto& panel = plan.backward_ih.panels[i / tiles];
      const Range some = part(depth, i % tiles, tiles);
      multiply(input_grad + size_t(some.begin) * D, D, 1, some.size(), plan.backward_ih.at(i / tiles), D,
               a.grad_input + (begin + some.begin) * plan.I + panel.begin, plan.I, panel.width, false);
    }
  }

  static void pack_row(T* to, const T* from, const T* mask, int width) {
    for (int j = 0; j < width; j++) to[j] = mask ? from[j] * mask[j] : from[j];
    for (int j = width; j < panel_width<T>; j++) to[j] = T(0);
  }
};

}  // namespace bln
