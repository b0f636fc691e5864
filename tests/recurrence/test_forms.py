"""Any lengths, any form of a batch and any chunks of time: the same sequences give the same outputs and gradients."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence

from lightning_bln import Recurrent, recompute_population, set_mode

lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)
cells = st.sampled_from(["lstm", "gru", "rnn", "mgu", "mingru", "coupledlstm"])
norms = st.sampled_from(["bln", "layer", "batch", None])
few = settings(max_examples=40, deadline=None)


def layer_of(cell: str, **options: Any) -> Recurrent:
    torch.manual_seed(1)
    return Recurrent(cell, 3, 4, dtype=torch.float64, **options)


def sequences_of(lengths: list[int]) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(length, 3, dtype=torch.float64, requires_grad=True) for length in lengths]


def prepared(layer: Recurrent, mode: str) -> Recurrent:
    """The layer in evaluation, its population frozen."""
    if layer.norm is not None:
        recompute_population(layer, [torch.randn(7, 6, 3, dtype=torch.float64) for _ in range(2)])
        set_mode(layer, mode)
    return layer.eval()


@few
@given(cells, norms, lengths, st.booleans(), st.booleans())
def test_a_packed_batch_in_training_is_the_references(cell, norm, lengths, bidirectional, batch_first) -> None:
    results = []
    for backend in ("auto", "reference"):
        layer = layer_of(cell, norm=norm, backend=backend, bidirectional=bidirectional, batch_first=batch_first)
        x = sequences_of(lengths)
        output, state = layer(pack_sequence(x, enforce_sorted=False))
        y, _ = pad_packed_sequence(output, batch_first=batch_first)
        last = state if isinstance(state, Tensor) else state[0]
        loss = y.square().sum() + last.sin().sum()
        grads = torch.autograd.grad(loss, [*x, *layer.parameters()], allow_unused=True)
        results.append([y, last, *(g for g in grads if g is not None), *layer.buffers()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@few
@given(cells, norms, lengths, st.sampled_from(["ppcc", "pppp"]))
def test_a_sequence_reads_none_of_the_others_in_modes_that_do_not_look_at_the_batch(cell, norm, lengths, mode) -> None:
    layer, x = prepared(layer_of(cell, norm=norm), mode), sequences_of(lengths)
    together, _ = pad_packed_sequence(layer(pack_sequence(x, enforce_sorted=False))[0])
    for index, one in enumerate(x):
        torch.testing.assert_close(together[: len(one), index], layer(one)[0])


@few
@given(cells, norms, lengths)
def test_padding_is_never_read(cell, norm, lengths) -> None:
    layer, x = layer_of(cell, norm=norm), sequences_of(lengths)
    clean = layer(pack_sequence(x, enforce_sorted=False))[0].data
    padded = pad_sequence(x, padding_value=float("nan"))
    packed = torch.nn.utils.rnn.pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False)
    torch.testing.assert_close(layer(packed)[0].data, clean)


@few
@given(cells, st.sampled_from(["bln", "layer", None]), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_chunks_of_time_with_states_carried_are_the_whole(cell, norm, chunks) -> None:
    layer = prepared(layer_of(cell, norm=norm, time_statistics="shared"), "ppcc")
    x = torch.randn(sum(chunks), 2, 3, dtype=torch.float64)
    whole, last = layer(x)
    state, outputs = None, []
    for chunk in x.split(chunks):
        output, state = layer(chunk, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole)
    torch.testing.assert_close(state, last)


@few
@given(cells, norms, st.integers(1, 5), st.integers(1, 4))
def test_batch_first_unbatched_and_strided_inputs_are_the_same_batch(cell, norm, steps, samples) -> None:
    plain = prepared(layer_of(cell, norm=norm), "ppcc")
    first = layer_of(cell, norm=norm, batch_first=True).eval()
    first.load_state_dict(plain.state_dict())
    x = torch.randn(steps, samples, 3, dtype=torch.float64)
    expected, _ = plain(x)
    torch.testing.assert_close(first(x.transpose(0, 1))[0].transpose(0, 1), expected)
    torch.testing.assert_close(plain(torch.stack([x, x], -1)[..., 0])[0], expected)
    torch.testing.assert_close(plain(x[:, 0])[0], expected[:, 0])
