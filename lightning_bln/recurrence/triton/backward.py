"""The kernel of a recorded step's gradient, which computes elementwise values of the step again."""

from __future__ import annotations

from lightning_bln.recurrence.program.graph import Value, ordered
from lightning_bln.recurrence.triton.elementwise import written
from lightning_bln.recurrence.triton.forward import state
from lightning_bln.recurrence.triton.phases import backward_phases
from lightning_bln.recurrence.triton.source import Kernel, Recorded, room


class Backward(Kernel):
    """The gradient of all steps, from the last to the first.

    Args:
        recorded: The step and its gradient.
        chunks: For each product, tiles that the gates of all units come in.
    """

    def __init__(self, recorded: Recorded, chunks: list[int]) -> None:
        super().__init__(recorded)
        self.chunks, self.adjoint = chunks, recorded.adjoint
        self.order = ordered(self.adjoint.roots())
        self.phases = backward_phases(self.order, recorded.known, recorded.forms)
        self.start()
        ready = {value: self.ready(value) for value in self.wide_gradients()}
        last = max([*self.phases.values(), *ready.values()], default=0)
        for phase in range(last + 1):
            for value in self.order:
                if self.phases[value] == phase:
                    self.emit(value)
            left = [value for value, at in ready.items() if at == phase and self.is_shared(value)]
            for value in left:
                self.leave(value)
            if left and phase < last:
                self.wait()
        self.finish()

    def wide_gradients(self) -> list[Value]:
        """Products and norms whose output has a gradient."""
        return [value for value in (*self.recorded.products, *self.recorded.norms) if value in self.adjoint.products]

    def is_shared(self, value: Value) -> bool:
        """Whether other programs need something of an output's gradient."""
        return value.op == "product" or self.recorded.forms[value.key].exchanges

    def ready(self, value: Value) -> int:
        """The phase after which the gradient of a product's or norm's output is complete."""
        return max(self.phases[part] for part in self.adjoint.products[value].values())

    def start(self) -> None:
        """Load what stays: gradients from the steps after, vectors, norms and transposed weights."""
        self.before.append("zero = tl.zeros((BM, U), ACC)")
        for name in self.recorded.step.before:
            pointer = self.pointer(f"carry_{name}")
            self.before.append(f"{carry(name)} = tl.load({pointer} + own, mask=all, other=0.0).to(ACC)")
        for number, norm in enumerate(self.recorded.norms):
            if norm in self.adjoint.products:
                self.affine(number, norm)
                self.mixing(number)
                w, gates = self.wide(norm.key[1]), room(norm.key[1])
                for kind in ("weight", "bias"):
                    self.before.append(f"sum_{kind}{number} = tl.zeros((U, {gates}), ACC)")
                    at = f"{self.pointer(f'grad_{kind}{number}')} + columns{w}"
                    self.after.append(f"tl.store({at}, sum_{kind}{number}, mask=real{w})")
        wanted = {value.key for value in self.order if value.op == "product" and value not in self.recorded.known}
        for number, product in enumerate(self.recorded.products):
            if product in wanted:
                self.weights(number, product)
        for value in self.order:
            if not value.inputs and value.op in ("constant", "bias"):
                self.leaf(value)
        for name in self.adjoint.constants:
            self.before.append(f"sum_{name} = tl.zeros((U,), ACC)")
            self.after.append(f"tl.store({self.pointer(f'grad_{name}')} + u, sum_{name}, mask=units)")

    def weights(self, number: int, product: Value) -> None:
        """Load the transposed weights of a product."""
        width, first = self.recorded.width(product), "0"
        if isinstance(product.key, int):
            pointer, first = self.pointer("weight_hh"), f"{self.recorded.layout.rows_before(product.key)} * H"
        else:
            pointer = self.pointer(f"matrix_{product.key}")
        for chunk in range(self.chunks[number]):
            k = f"({chunk} * BK + kk)"
            at = f"{pointer} + ({first} + {k})[:, None] * H + u[None, :]"
            mask = f"({k} < {width} * H)[:, None] & units[None, :]"
            self.before.append(f"w{number}_{chunk} = tl.load({at}, mask={mask}, other=0.0)")

    def emit(self, value: Value) -> None:
        """Write the lines of a value."""
        if value in self.names:
            return
        if value in self.recorded.known:
            self.recall(value)
        elif value.op == "carry":
            self.names[value] = carry(value.key)
        elif value.op == "output":
            self.let(value, self.load("grad_output", "(t * B + n[:, None]) * H + u[None, :]"))
        elif value.op == "zero":
            self.names[value] = "zero"
        elif value.op == "norm_gradient":
            self.norm_gradient(value)
        elif value.op == "part":
            of = value.inputs[0]
            self.let(value, f"pick({self.names[of]}, {value.key}, {room(of.key.key[1])})")
        elif value.op == "product":
            self.product(value)
        else:
            self.let(value, written(value, [self.names[operand] for operand in value.inputs]))

    def recall(self, value: Value) -> None:
        """Load or compute again a value of the step."""
        if value.op != "product":
            for operand in value.inputs:
                self.emit(operand)
        if value.op == "state":
            self.let(value, self.load(f"state_{value.key}", "(t * B + n[:, None]) * H + u[None, :]"))
        elif not value.inputs:
            self.leaf(value)
        elif value.op == "product":
            number, width = self.recorded.numbers[value], self.recorded.width(value)
            w = self.wide(width)
            at = f"(t * B + n[:, None, None]) * {width} * H + columns{w}[None, :, :]"
            self.let(value, self.load(f"product{number}", at, f"rows[:, None, None] & real{w}[None, :, :]"))
        elif value.op == "norm":
            self.norm(value)
        elif value.op == "part":
            of = value.inputs[0]
            self.let(value, f"pick({self.names[of]}, {value.key}, {room(self.recorded.width(of))})")
        else:
            self.let(value, written(value, [self.names[operand] for operand in value.inputs]))

    def norm(self, norm: Value) -> None:
        """A norm's output again, by the moments that were kept."""
        number, form, of = self.recorded.numbers[norm], self.recorded.forms[norm.key], norm.inputs[0]
        w, columns = self.wide(norm.key[1]), 1 if form.joint else room(norm.key[1])
        self.body.append(f"in{number} = {self.names[of]}{'' if of.op == 'product' else '[:, :, None]'}")
        terms = []
        if form.has_feature:
            place = f"{self.pointer(f'feature{number}')}, t, n, rows, B, {form.groups}, {columns}"
            self.body.append(f"fm{number}, fv{number} = load_features({place})")
            self.body.append(f"xf{number}, rf{number} = of_features(in{number}, fm{number}, fv{number}, {form.eps!r})")
            terms.append(f"wf{number} * xf{number}")
        if form.has_batch:
            place = f"{self.pointer(f'batch{number}')}, t, columns{w}, real{w}, {form.width} * H"
            self.body.append(f"bm{number}, bv{number} = load_batch({place})")
            self.body.append(f"xb{number}, rb{number} = of_batch(in{number}, bm{number}, bv{number}, {form.eps!r})")
            terms.append(f"wb{number} * xb{number}")
        self.body.append(f"mix{number} = {' + '.join(terms)}")
        self.let(norm, f"weight{number}[None, :, :] * mix{number} + bias{number}[None, :, :]")

    def joined(self, value: Value) -> str:
        """The gradients of a product's or norm's gates side by side, zero where there is no data."""
        gates, parts = room(self.recorded.width(value)), self.adjoint.products[value]
        whole = {
            part.inputs[0] for part in parts.values() if part.op == "part" and part.inputs[0].op == "norm_gradient"
        }
        if value.op == "product" and len(whole) == 1 and len(parts) == self.recorded.width(value):
            return self.names[next(iter(whole))]
        return " + ".join(f"put({self.names[part]}, {k}, {gates})" for k, part in parts.items())

    def leave(self, value: Value) -> None:
        """Leave what others need of a complete gradient."""
        w = self.wide(self.recorded.width(value))
        real = f"rows[:, None, None] & real{w}[None, :, :]"
        if value.op == "product":
            number, width = self.recorded.numbers[value], self.recorded.width(value)
            self.body.append(f"d{number} = tl.where({real}, {self.joined(value)}, 0.0)")
            at = f"{self.pointer(f'grad_product{number}')} + (t * B + n[:, None, None]) * {width} * H"
            self.body.append(f"tl.store({at} + columns{w}[None, :, :], d{number}, mask={real})")
            return
        number, form = self.recorded.numbers[value], self.recorded.forms[value.key]
        self.emit(value)
        self.body += [
            f"q{number} = tl.where({real}, {self.joined(value)}, 0.0)",
            f"sum_weight{number} += tl.sum(q{number} * mix{number}, 0)",
            f"sum_bias{number} += tl.sum(q{number}, 0)",
            f"q{number} = q{number} * weight{number}[None, :, :]",
        ]
        if not form.exchanges:
            return
        columns = 1 if form.joint else room(form.width)
        sums = f"over_features(q{number}, {form.joint}), over_features(q{number} * xf{number}, {form.joint})"
        self.body += [
            f"place{number} = {self.place(columns)}",
            f"leave(place{number}, {sums}, n, rows, pid, B, PROGRAMS, {columns})",
        ]

    def norm_gradient(self, value: Value) -> None:
        """The gradient of a norm's input."""
        norm = value.key
        number, form = self.recorded.numbers[norm], self.recorded.forms[norm.key]
        columns, terms = 1 if form.joint else room(form.width), []
        if not form.exchanges:
            self.leave(norm)
        if form.has_feature:
            features = f"H * {form.width}" if form.joint else "H"
            place = f"place{number}, n, rows, B, {features}, PROGRAMS, ROOM, {columns}"
            self.body.append(f"fs{number}, fd{number} = summed({place})")
            part = f"feature_gradient(q{number}, xf{number}, rf{number}, fs{number}, fd{number})"
            terms.append(f"wf{number} * {part}")
        if form.has_batch:
            terms.append(f"wb{number} * batch_gradient(q{number}, xb{number}, rb{number}, rows, count)")
        self.let(value, " + ".join(terms))

    def product(self, value: Value) -> None:
        """The gradient of a product's input: transposed weights times the gradient of all units' gates."""
        product = value.key
        number, width = self.recorded.numbers[product], self.recorded.width(product)
        pointer = self.pointer(f"grad_product{number}")
        self.body.append(f"b{number} = tl.zeros((BM, U), ACC)")
        for chunk in range(self.chunks[number]):
            k = f"({chunk} * BK + kk)[None, :]"
            mask = f"rows[:, None] & ({k} < {width} * H)"
            rows = f"tl.load({pointer} + (t * B + n[:, None]) * {width} * H + {k}, mask={mask}, other=0.0)"
            self.body.append(f"b{number} = multiplied({rows}, w{number}_{chunk}, b{number}, PRECISION, WIDE)")
        self.let(value, f"b{number}")

    def finish(self) -> None:
        """Store the input's gradients, sum the vectors', and hand on those of the states."""
        for name in self.recorded.step.before:
            value = self.adjoint.state.get(name)
            text = "zero" if value is None else self.names[value]
            self.body.append(f"next_{carry(name)} = tl.where(rows[:, None], {text}, {carry(name)})")
        for gate, value in self.adjoint.gates.items():
            tensor, number, count = self.recorded.layout.gates[gate]
            at = f"{self.pointer(f'grad_x{tensor}')} + (t * B + n[:, None]) * {count} * H + {number} * H + u[None, :]"
            self.body.append(f"tl.store({at}, {self.names[value]}, mask=both)")
        for name, value in self.adjoint.constants.items():
            self.body.append(f"sum_{name} += tl.sum(tl.where(both, {self.names[value]}, 0.0), 0)")
        for name in self.recorded.step.before:
            self.body.append(f"{carry(name)} = next_{carry(name)}")
            at = f"{self.pointer(f'grad_state_{name}')} + own"
            self.after.append(f"tl.store({at}, {carry(name)}, mask=all)")


def carry(name: str) -> str:
    """The variable of a state's gradient from the steps after."""
    return state(name).replace("s_", "c_", 1)
