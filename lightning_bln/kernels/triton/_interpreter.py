"""Triton's interpreter with the programs of a grid at once, which wait for one another at barriers.

The interpreter runs them one after the other, so that the first would wait for ever. Here each is a thread, of which
one runs at a time; at each atomic operation it hands over to one that is drawn at random. Of a barrier that is missing
another order tells.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stuck(RuntimeError):
    """Programs that wait for what does not come, or one of which has failed."""


class Baton:
    """The right to run, which one of several threads has.

    Args:
        number: Of threads.
        seed: Of the order.
        limit: Hand-overs after which they count as stuck.
    """

    def __init__(self, number: int, seed: int, limit: int) -> None:
        self.changed, self.random = threading.Condition(), random.Random(seed)
        self.alive, self.left = list(range(number)), limit
        self.turn = self.random.randrange(number)
        self.error: BaseException | None = None

    def wait(self, me: int) -> None:
        """Wait for one's turn."""
        with self.changed:
            while self.turn != me and self.error is None:
                self.changed.wait()
            if self.error is not None:
                raise Stuck("another program has failed")

    def pass_on(self, me: int, *, ends: bool = False) -> None:
        """Let another run, and wait for the next turn unless the thread ends."""
        with self.changed:
            self.left -= 1
            if ends:
                self.alive.remove(me)
            if self.left < 0:
                self.error = Stuck("programs wait for one another")
            if self.alive:
                self.turn = self.random.choice(self.alive)
            self.changed.notify_all()
        if not ends:
            self.wait(me)

    def fail(self, error: BaseException) -> None:
        """End all."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()


@contextmanager
def cooperative(seed: int = 0, limit: int = 2_000_000) -> Iterator[None]:
    """Run the programs of each launch at once, in an order that hangs on the seed."""
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    kept = executor.__call__, builder.create_atomic_rmw, builder.create_atomic_cas
    local = threading.local()

    def hand_over() -> None:
        if getattr(local, "baton", None) is not None:
            local.baton.pass_on(local.me)
            interpreter.interpreter_builder.set_grid_idx(*local.index)

    def create_rmw(self: Any, *args: Any) -> Any:
        hand_over()
        return kept[1](self, *args)

    def create_cas(self: Any, *args: Any) -> Any:
        hand_over()
        return kept[2](self, *args)

    def launch(self: Any, *args_dev: Any, **kwargs: Any) -> None:
        known = inspect.getfullargspec(self.fn).args
        kwargs = {name: value for name, value in kwargs.items() if name in known}
        args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs)
        scope = interpreter._patch_lang(self.fn)
        try:
            args = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
            args = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in args.items()}
            grid = self.grid(args) if callable(self.grid) else self.grid
            grid = (*grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            run_all(self.fn, args, grid, Baton(grid[0] * grid[1] * grid[2], seed, limit), local)
        finally:
            scope.restore()
        self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)

    executor.__call__, builder.create_atomic_rmw, builder.create_atomic_cas = launch, create_rmw, create_cas
    try:
        yield
    finally:
        executor.__call__, builder.create_atomic_rmw, builder.create_atomic_cas = kept


def run_all(function: Any, args: dict[str, Any], grid: tuple[int, ...], baton: Baton, local: Any) -> None:
    """Run all programs of a grid as threads; raise what one has raised."""
    from triton.runtime import interpreter

    places = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
    errors: list[BaseException] = []

    def work(me: int) -> None:
        local.me, local.baton, local.index = me, baton, places[me]
        try:
            baton.wait(me)
            interpreter.interpreter_builder.set_grid_idx(*places[me])
            function(**args)
        except BaseException as error:  # raised again where the grid was launched
            errors.append(error)
            baton.fail(error)
        finally:
            baton.pass_on(me, ends=True)

    threads = [threading.Thread(target=work, args=(me,), daemon=True) for me in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
