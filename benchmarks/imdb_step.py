"""Time of one training step of the paper's IMDB network at batch size 25, against TensorFlow's times.

    OMP_NUM_THREADS=2 python benchmarks/imdb_step.py

Medians; the norms take turns, so that other load on the machine affects all alike. TensorFlow's times are of the
authors' code on two cores of the same kind of machine: 1254 ms per step as they ran it, 223 ms compiled into a graph.
"""

from __future__ import annotations

import argparse
import time
from statistics import median, quantiles

import torch

from lightning_bln.models import PAPER_NORMS, PaperIMDB

EAGER, GRAPH = 1254.0, 223.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    size = arguments.batch_size
    # Word frequencies by Zipf's law, since the embedding's cost depends on how many words differ.
    frequency = 1 / torch.arange(1.0, 20_001)
    batches = [
        (torch.multinomial(frequency, size * 80, True).view(size, 80), torch.arange(size) % 2) for _ in range(10)
    ]
    models = {norm: PaperIMDB(norm) for norm in PAPER_NORMS}
    optimizers = {norm: model.configure_optimizers() for norm, model in models.items()}
    times: dict[str, list[float]] = {norm: [] for norm in models}
    for number in range(arguments.rounds + 5):
        for norm, model in models.items():
            tokens, labels = batches[number % len(batches)]
            started = time.perf_counter()
            loss = model.loss(model(tokens), labels)
            optimizers[norm].zero_grad()
            loss.backward()
            optimizers[norm].step()
            times[norm].append(1e3 * (time.perf_counter() - started))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch size {size}, {arguments.rounds} rounds")
    print("| norm | ms a step (quartiles) | TensorFlow eager / ours | TensorFlow graph / ours |")
    print("| --- | --- | --- | --- |")
    for norm, values in times.items():
        middle, (low, _, high) = median(values[5:]), quantiles(values[5:], n=4)
        ratios = f"{EAGER / middle:.1f} | {GRAPH / middle:.1f}" if size == 25 else "- | -"
        print(f"| {norm} | {middle:.1f} ({low:.1f} to {high:.1f}) | {ratios} |")


if __name__ == "__main__":
    main()
