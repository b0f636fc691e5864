"""The forward kernel of a recorded step."""

from __future__ import annotations

from lightning_bln.recurrence.program.graph import Value
from lightning_bln.recurrence.triton.elementwise import written
from lightning_bln.recurrence.triton.phases import forward_phases, is_masked_state, source_of
from lightning_bln.recurrence.triton.source import Kernel, Recorded, argument, room


class Forward(Kernel):
    """All steps of a sequence.

    Args:
        recorded: The step.
        keeps: Whether products are kept for the gradient.
        chunks: Tiles that the units of a product's input come in.
    """

    def __init__(self, recorded: Recorded, keeps: bool, chunks: int) -> None:
        super().__init__(recorded)
        self.keeps, self.chunks = keeps, chunks
        self.phases = forward_phases(recorded.values, recorded.forms)
        self.start()
        for phase in range(max(self.phases.values(), default=0) + 1):
            if phase:
                self.wait()
            for value in recorded.values:
                if value.inputs and self.phases[value] == phase:
                    self.emit(value)
            self.publish(phase)
        self.finish()

    def start(self) -> None:
        """Load what stays, and the input of a step."""
        for name in self.recorded.step.before:
            pointer = self.pointer(f"state_{name}")
            self.before.append(f"{state(name)} = tl.load({pointer} + own, mask=all, other=0.0).to(ACC)")
        for number, norm in enumerate(self.recorded.norms):
            self.affine(number, norm)
            self.mixing(number)
        for number, product in enumerate(self.recorded.products):
            self.weights(number, product)
        for value in self.recorded.values:
            if value.op == "state":
                self.names[value] = state(value.key)
            elif not value.inputs:
                self.leaf(value)

    def weights(self, number: int, product: Value) -> None:
        """Load a product's weights before the first step: they stay for all."""
        w = self.wide(self.recorded.width(product))
        first = "0"
        if isinstance(product.key, int):
            pointer, first = self.pointer("weight_hh"), f"{self.recorded.layout.rows_before(product.key)} * H"
        else:
            pointer = self.pointer(f"matrix_{product.key}")
        for chunk in range(self.chunks):
            k = f"({chunk} * BK + kk)"
            at = f"{pointer} + ({first} + row{w})[None, :] * H + {k}[:, None]"
            mask = f"whole{w}[None, :] & ({k} < H)[:, None]"
            self.before.append(f"w{number}_{chunk} = tl.load({at}, mask={mask}, other=0.0)")

    def emit(self, value: Value) -> None:
        """Write the lines of a value."""
        if value.op == "product":
            self.product(value)
        elif value.op == "norm":
            self.norm(value)
        elif value.op == "part":
            of = value.inputs[0]
            gates = room(self.recorded.width(of))
            self.let(value, f"pick({self.names[of]}, {value.key}, {gates})")
        elif not is_masked_state(value):
            self.let(value, written(value, [self.names[operand] for operand in value.inputs]))

    def product(self, value: Value) -> None:
        """A product of all gates of own units with all units of its input."""
        number, width = self.recorded.numbers[value], self.recorded.width(value)
        w, gates, source = self.wide(width), room(width), source_of(value)
        place = f"state_{source.key}" if source.op == "state" else f"input{number}"
        pointer = self.pointer(place)
        self.body.append(f"a{number} = tl.zeros((BM, U * {gates}), ACC)")
        for chunk in range(self.chunks):
            k = f"({chunk} * BK + kk)[None, :]"
            mask = f"rows[:, None] & ({k} < H)"
            rows = f"tl.load({pointer} + (t * B + n[:, None]) * H + {k}, mask={mask}, other=0.0)"
            if value.inputs[0] is not source:
                rows += f" * tl.load({self.pointer('mask')} + n[:, None] * H + {k}, mask={mask}, other=0.0)"
            self.body.append(f"a{number} = multiplied({rows}, w{number}_{chunk}, a{number}, PRECISION, WIDE)")
        self.let(value, f"tl.reshape(a{number}, (BM, U, {gates}))")
        if self.keeps:
            at = f"(t * B + n[:, None, None]) * {width} * H + columns{w}[None, :, :]"
            at = f"{self.pointer(f'product{number}')} + {at}"
            self.body.append(f"tl.store({at}, {self.names[value]}, mask=rows[:, None, None] & real{w}[None, :, :])")

    def tile(self, norm: Value) -> str:
        """The wide tile that a norm takes."""
        of = norm.inputs[0]
        return self.names[of] if of.op == "product" else f"{self.names[of]}[:, :, None]"

    def measure(self, number: int, norm: Value) -> None:
        """Moments over samples, and this program's part of those over features."""
        form, w, tile = self.recorded.forms[norm.key], self.wide(norm.key[1]), self.tile(norm)
        self.body.append(f"in{number} = {tile}")
        if form.measures_batch:
            self.body.append(f"bm{number}, bv{number} = over_samples(in{number}, rows, count)")
            if form.keeps:
                at = self.pointer(f"batch{number}")
                self.body.append(f"store_batch({at}, bm{number}, bv{number}, t, columns{w}, real{w}, {form.width} * H)")
        for index, name in enumerate(("bm", "bv")):
            if form.has_batch and form.given[index]:
                at = f"{self.pointer(f'given{number}')} + ({index} * T + t) * {form.width} * H + columns{w}"
                self.body.append(f"{name}{number} = tl.load({at}, mask=real{w}, other=1.0).to(ACC)")
        if form.exchanges:
            columns = 1 if form.joint else room(form.width)
            size = f"size * {form.width}" if form.joint else "size"
            place = f"place{number} = {self.place(columns)}"
            options = f"n, rows, pid, B, PROGRAMS, {columns}, {form.joint}"
            self.body += [place, f"leave_moments(place{number}, in{number}, real{w}, {size}, {options})"]

    def norm(self, norm: Value) -> None:
        """A norm's output once all sums are there."""
        number = self.recorded.numbers[norm]
        form, columns = self.recorded.forms[norm.key], 1 if self.recorded.forms[norm.key].joint else room(norm.key[1])
        if not form.exchanges:
            self.measure(number, norm)
        terms = []
        if form.has_feature:
            self.features(number, norm, columns)
            self.body.append(f"xf{number}, _ = of_features(in{number}, fm{number}, fv{number}, {form.eps!r})")
            terms.append(f"wf{number} * xf{number}")
        if form.has_batch:
            self.body.append(f"xb{number}, _ = of_batch(in{number}, bm{number}, bv{number}, {form.eps!r})")
            terms.append(f"wb{number} * xb{number}")
        affine = f"weight{number}[None, :, :] * ({' + '.join(terms)}) + bias{number}[None, :, :]"
        self.let(norm, affine)

    def features(self, number: int, norm: Value, columns: int) -> None:
        """Moments over features: all programs' parts together, or the population's."""
        form = self.recorded.forms[norm.key]
        if form.exchanges:
            times = form.width if form.joint else 1
            options = f"n, rows, B, H, U, PROGRAMS, ROOM, {columns}, {times}"
            self.body.append(f"fm{number}, fv{number} = merged_moments(place{number}, {options})")
            if form.keeps:
                place = f"{self.pointer(f'feature{number}')}, fm{number}, fv{number}, t, n, rows, B"
                self.body += ["if pid == 0:", f"    store_features({place}, {form.groups}, {columns})"]
        for index, name in enumerate(("fm", "fv")):
            if form.given[2 + index]:
                first = f"2 * T * {form.width} * H + {index} * T * {form.groups}"
                at = f"{self.pointer(f'given{number}')} + {first}"
                self.body.append(f"{name}{number} = given_features({at}, t, n, {form.groups}, {columns}).to(ACC)")

    def publish(self, phase: int) -> None:
        """Leave what the phases after this one need of these units."""
        for number, product in enumerate(self.recorded.products):
            source = source_of(product)
            if source.op != "state" and self.phases[source] == phase:
                at = f"{self.pointer(f'input{number}')} + (t * B + n[:, None]) * H + u[None, :]"
                self.body.append(f"tl.store({at}, {self.names[source]}, mask=both)")
        for number, norm in enumerate(self.recorded.norms):
            if self.recorded.forms[norm.key].exchanges and self.phases[norm.inputs[0]] == phase:
                self.measure(number, norm)

    def finish(self) -> None:
        """Store the states, which sequences that have ended keep."""
        after = self.recorded.step.after
        for name, value in after.items():
            self.body.append(f"next_{state(name)} = tl.where(rows[:, None], {self.names[value]}, {state(name)})")
        for name in after:
            self.body.append(f"{state(name)} = next_{state(name)}")
            at = f"{self.pointer(f'state_{name}')} + (t + 1) * B * H + own"
            self.body.append(f"tl.store({at}, {state(name)}, mask=all)")
        if any(source_of(product).op == "state" for product in self.recorded.products):
            self.wait()


def state(name: str) -> str:
    """The variable of a state."""
    return argument(f"s_{name}")
