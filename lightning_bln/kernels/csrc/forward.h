// The forward pass over a sequence.
#pragma once
#include "recurrence.h"

namespace bln {

template <class T>
struct ForwardBuffers {
  Buffer<T> input_chunk, hidden, gates, cells, candidate, masked;

  ForwardBuffers(Plan<T>& plan) {
    const RecurrenceArgs<T>& a = plan.a;
    std::vector<Range> columns;
    for (int c = 0; c < plan.column_teams; c++)
      for (Range range : plan.columns_of(plan.units_of(c))) columns.push_back(range);
    if (plan.offset[plan.steps] <= few_rows) {
      plan.forward_hh.leave(a.weight_hh, plan.H, columns);
      if (a.weight_ih) plan.forward_ih.leave(a.weight_ih, plan.I, columns);
    } else {
      plan.forward_hh.plan(plan.H, columns);
      if (a.weight_ih) plan.forward_ih.plan(plan.I, columns);
    }
    const size_t step = size_t(plan.batch) * plan.D, state = size_t(plan.batch) * plan.H;
    if (a.weight_ih && !a.input_part) input_chunk.allocate(size_t(plan.longest_chunk) * plan.D);
    if (!a.hidden_part) hidden.allocate(step);
    gates.allocate(size_t(plan.row_teams) * Norm<T>::stripe * plan.D);
    if (a.cell == kLstm && !a.cells) cells.allocate(state);
    if (a.cell == kLstm && plan.zoneout) candidate.allocate(state);
    if (a.hidden_mask) masked.allocate(2 * state);
    Norm<T>::allocate(plan.shared_ih, a.norm_ih, plan.G, plan.H, plan.batch, plan.row_teams, plan.column_teams);
    Norm<T>::allocate(plan.shared_hh, a.norm_hh, plan.G, plan.H, plan.batch, plan.row_teams, plan.column_teams);
    Norm<T>::allocate(plan.shared_cell, a.norm_cell, 1, plan.H, plan.batch, plan.row_teams, plan.column_teams);
  }
};

template <class T>
class Forward : Walker<T> {
  using Base = Walker<T>;
  using Base::a, Base::plan, Base::me, Base::units, Base::rows, Base::ih, Base::hh, Base::cell;
  using Base::at, Base::running, Base::previous, Base::mask_row, Base::G, Base::H, Base::D;
  ForwardBuffers<T>& buffers;

 public:
  Forward(Plan<T>& plan, ForwardBuffers<T>& buffers, int id) : Base(plan, id), buffers(buffers) {}

  void run() {
    const Range panels_hh = this->own_panels(plan.forward_hh, G), panels_ih = panels_hh;
    this->fill(plan.forward_hh, panels_hh, a.weight_hh, 1, H);
    if (a.weight_ih) this->fill(plan.forward_ih, panels_ih, a.weight_ih, 1, plan.I);
    if (a.hidden_mask) mask_state(a.h0, 1, rows);
    me.wait();
    for (Range chunk : plan.chunks) {
      T* projected = a.input_part ? a.input_part + at(chunk.begin) * D : buffers.input_chunk.get();
      if (a.weight_ih) this->project_input(chunk, panels_ih, projected);
      for (int t = chunk.begin; t < chunk.end; t++) {
        const T* x = a.weight_ih ? projected + (at(t) - at(chunk.begin)) * D : a.input + at(t) * D;
        step(t, x, panels_hh);
      }
    }
    finish();
  }

 private:
  void step(int t, const T* x, Range panels) {
    const Range some = running(t);
    const int m = plan.sizes[t];
    T* v = a.hidden_part ? a.hidden_part + at(t) * D : buffers.hidden.get();
    const T* h = previous(t, a.output, a.h0);
    this->project(plan.forward_hh, panels, a.hidden_mask ? masked(t + 1) : h, H, some, v, D, false);
    ih.measure(t, x, D, some);
    hh.measure(t, v, D, some);
    if (ih.meets(t) || hh.meets(t)) me.wait();
    ih.fetch(t);
    hh.fetch(t);
    ih.settle(t, m, some);
    hh.settle(t, m, some);
    T* out = a.output + at(t) * H;
    this->in_stripes(some, [&](Range stripe) {
      T* gates = buffers.gates.get() + (ptrdiff_t(me.row) * Norm<T>::stripe - stripe.begin) * D;
      this->activate_all(t, x, v, gates, stripe, out, H);
      if (a.cell == kLstm)
        carry(t, gates, stripe);
      else
        simple(t, gates, h, out, stripe);
    });
    if (a.cell == kLstm) lstm(t, m, h, out, some);
    if (a.hidden_mask) mask_state(out, t, some);
    if (me.columns > 1) me.wait();
  }

  T* carried_state(int t) const { return a.cells ? a.cells + at(t) * H : buffers.cells.get(); }
  T* fresh_state(int t) const { return plan.zoneout ? buffers.candidate.get() : carried_state(t); }

  void carry(int t, const T* gates, Range some) {
    T *c = carried_state(t), *fresh = fresh_state(t);
    const T* c_before = a.cells ? previous(t, a.cells, a.c0) : t ? c : a.c0;
    for (int b = some.begin; b < some.end; b++) {
      const T *i = gates + size_t(b) * D, *f = i + H, *g = f + H, *old = c_before + size_t(b) * H;
      T* to = fresh + size_t(b) * H;
#pragma omp simd
      for (int j = units.begin; j < units.end; j++) to[j] = f[j] * old[j] + i[j] * g[j];
      if (plan.zoneout) {
        T* carried = c + size_t(b) * H;
        with_zoneout(units, mask_row(a.zoneout_mask_c, t, b), T(a.zoneout_c),
                     [=](int j, T kept) { carried[j] = kept * old[j] + (T(1) - kept) * to[j]; });
      }
    }
  }

  // The output, whose rows hold the output gate so far.
  void lstm(int t, int m, const T* h, T* out, Range some) {
    const T* fresh = fresh_state(t);
    cell.measure(t, fresh, H, some);
    if (cell.meets(t)) me.wait();
    cell.fetch(t);
    cell.settle(t, m, some);
    for (int b = some.begin; b < some.end; b++) {
      const auto y = cell.normalized(0, b, fresh + size_t(b) * H);
      T* to = out + size_t(b) * H;
#pragma omp simd
      for (int j = units.begin; j < units.end; j++) to[j] *= hyperbolic_tangent(y[j]);
      keep_hidden(t, b, h, to);
    }
  }

  void simple(int t, const T* gates, const T* h, T* out, Range some) {
    for (int b = some.begin; b < some.end; b++) {
      const T *gate = gates + size_t(b) * D, *old = h + size_t(b) * H;
      T* to = out + size_t(b) * H;
      if (a.cell == kGru) {
        const T *z = gate + H, *n = gate + 2 * H;
#pragma omp simd
        for (int j = units.begin; j < units.end; j++) to[j] = n[j] + z[j] * (old[j] - n[j]);
      } else {
#pragma omp simd
        for (int j = units.begin; j < units.end; j++) to[j] = gate[j];
      }
      keep_hidden(t, b, h, to);
    }
  }

  void keep_hidden(int t, int b, const T* h, T* to) {
    if (!plan.zoneout) return;
    const T* old = h + size_t(b) * H;
    with_zoneout(units, mask_row(a.zoneout_mask_h, t, b), T(a.zoneout_h),
                 [=](int j, T kept) { to[j] = kept * old[j] + (T(1) - kept) * to[j]; });
  }

  T* masked(int t) const { return buffers.masked.get() + size_t(t & 1) * plan.batch * H; }

  void mask_state(const T* h, int t, Range some) {
    T* to = masked(t);
    for (int b = some.begin; b < some.end; b++)
      for (int j = units.begin; j < units.end; j++)
        to[size_t(b) * H + j] = h[size_t(b) * H + j] * a.hidden_mask[size_t(b) * H + j];
  }

  void finish() {
    if (me.rows > 1 || me.columns > 1) me.wait();
    int t = plan.steps - 1;
    for (int b = rows.begin; b < rows.end; b++) {
      t = plan.steps - 1;
      while (t >= 0 && plan.sizes[t] <= b) t--;
      const T* h = t >= 0 ? a.output + (at(t) + b) * H : a.h0 + size_t(b) * H;
      for (int j = units.begin; j < units.end; j++) a.hn[size_t(b) * H + j] = h[j];
      if (a.cell != kLstm) continue;
      const T* c = t < 0     ? a.c0 + size_t(b) * H
                   : a.cells ? a.cells + (at(t) + b) * H
                             : buffers.cells.get() + size_t(b) * H;
      for (int j = units.begin; j < units.end; j++) a.cn[size_t(b) * H + j] = c[j];
    }
  }
};

}  // namespace bln
