// A hash of the structures that Python fills in: name, type and offset of every field. kernels/library.py computes the
// same of its own, and refuses a library built from other sources, which would read its arguments at wrong places.
#pragma once
#include "dense.h"
#include "gather.h"
#include "product.h"
#include "program.h"
#include "recurrence.h"

namespace bln {

struct Field {
  const char *name, *type;
  size_t offset, size;
};

template <class T>
constexpr const char* type_name = nullptr;
template <class T>
constexpr const char* type_name<T*> = "pointer";
template <>
constexpr const char* type_name<int64_t> = "integer";
template <>
constexpr const char* type_name<double> = "number";
template <>
constexpr const char* type_name<NormArgs<float>> = "NormArgs";

// Whether the fields, one after the other, make up a structure of this size.
template <size_t N>
constexpr bool make_up(size_t size, const Field (&fields)[N]) {
  size_t end = 0;
  for (const Field& field : fields) {
    if (field.offset != end) return false;
    end += field.size;
  }
  return end == size;
}

// 64-bit FNV-1a.
struct Hash {
  uint64_t value = 0xcbf29ce484222325;

  constexpr Hash& operator<<(const char* text) {
    for (; *text; text++) value = (value ^ uint64_t(*text)) * 0x100000001b3;
    return *this;
  }
  constexpr Hash& operator<<(size_t number) {
    if (number > 9) *this << number / 10;
    const char digit[] = {char('0' + number % 10), 0};
    return *this << digit;
  }
  template <size_t N>
  constexpr void add(const char* structure, const Field (&fields)[N]) {
    for (const Field& field : fields)
      *this << structure << "." << field.name << ":" << field.type << "@" << field.offset << ";";
  }
};

#define FIELD(name) \
  Field { #name, type_name<decltype(Struct::name)>, offsetof(Struct, name), sizeof(Struct::name) }
#define ADD(structure, type, ...)                                                                 \
  {                                                                                               \
    using Struct = type;                                                                          \
    constexpr Field fields[] = {__VA_ARGS__};                                                     \
    static_assert(make_up(sizeof(Struct), fields), "list the fields of " #structure " in order"); \
    hash.add(#structure, fields);                                                                 \
  }

// The structures in the order of STRUCTURES in library.py. That their numbers may be doubles changes nothing here.
constexpr uint64_t layout_hash() {
  Hash hash;
  ADD(NormArgs, NormArgs<float>, FIELD(enabled), FIELD(joint), FIELD(fixed), FIELD(scale), FIELD(eps), FIELD(w_feature),
      FIELD(w_batch), FIELD(weight), FIELD(bias), FIELD(batch_mean), FIELD(batch_var), FIELD(feature_mean),
      FIELD(feature_var), FIELD(batch_moments), FIELD(feature_moments), FIELD(grad_weight), FIELD(grad_bias))
  ADD(RecurrenceArgs, RecurrenceArgs<float>, FIELD(cell), FIELD(steps), FIELD(batch), FIELD(rows), FIELD(inputs),
      FIELD(units), FIELD(threads), FIELD(row_teams), FIELD(column_teams), FIELD(chunk_rows), FIELD(keep),
      FIELD(zoneout_h), FIELD(zoneout_c), FIELD(batch_sizes), FIELD(input), FIELD(weight_ih), FIELD(weight_hh),
      FIELD(h0), FIELD(c0), FIELD(hidden_mask), FIELD(zoneout_mask_h), FIELD(zoneout_mask_c), FIELD(output), FIELD(hn),
      FIELD(cn), FIELD(input_part), FIELD(hidden_part), FIELD(cells), FIELD(grad_output), FIELD(grad_hn),
      FIELD(grad_cn), FIELD(grad_input), FIELD(grad_weight_ih), FIELD(grad_weight_hh), FIELD(grad_h0), FIELD(grad_c0),
      FIELD(norm_ih), FIELD(norm_hh), FIELD(norm_cell))
  ADD(DenseArgs, DenseArgs<float>, FIELD(rows), FIELD(positions), FIELD(features), FIELD(groups), FIELD(threads),
      FIELD(shared), FIELD(row_stride), FIELD(position_stride), FIELD(feature_stride), FIELD(grad_row_stride),
      FIELD(grad_position_stride), FIELD(grad_feature_stride), FIELD(x), FIELD(output), FIELD(grad), FIELD(grad_x),
      FIELD(batch_sizes), FIELD(norm))
  ADD(GatherArgs, GatherArgs<float>, FIELD(steps), FIELD(groups), FIELD(width), FIELD(samples), FIELD(batch),
      FIELD(has_batch), FIELD(has_feature), FIELD(batch_sizes), FIELD(batch_moments), FIELD(feature_moments),
      FIELD(old_count), FIELD(old_mean), FIELD(old_m2), FIELD(count), FIELD(mean), FIELD(m2))
  ADD(ProgramArgs, ProgramArgs, FIELD(steps), FIELD(batch), FIELD(units), FIELD(outputs), FIELD(threads),
      FIELD(reversed), FIELD(instructions), FIELD(matrices), FIELD(norms), FIELD(batch_sizes), FIELD(code),
      FIELD(places), FIELD(matrix), FIELD(norm_gates), FIELD(norm))
  ADD(Instruction, Instruction, FIELD(operation), FIELD(narrow), FIELD(to), FIELD(a), FIELD(b), FIELD(c), FIELD(s),
      FIELD(u))
  ADD(ProductArgs, ProductArgs, FIELD(rows), FIELD(columns), FIELD(depth), FIELD(threads), FIELD(a), FIELD(a_row),
      FIELD(a_column), FIELD(b), FIELD(b_row), FIELD(b_column), FIELD(c), FIELD(c_row), FIELD(bias))
  return hash.value;
}

#undef FIELD
#undef ADD

}  // namespace bln
