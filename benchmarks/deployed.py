"""Time of an LSTM in each form in which it can be deployed, beside nn.LSTM.

    python -m benchmarks.deployed

Processor time of inference by one thread, without gradients, relative to nn.LSTM: medians over rounds in which the
contenders take turns, three runs one after the other. Every contender computes what its BLN-LSTM does in ``pppp``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import infer
from benchmarks.folding import BATCHES, HIDDEN, INPUTS, RUNS, STEPS, Times, timed
from benchmarks.measure import Job, machine
from lightning_bln import BLNLSTM, export, fold, recompute_population, set_mode
from lightning_bln._files import replacing

RESULTS = Path(__file__).parent / "results" / "deployed.json"
SEEN = 100
"""Steps that the population has statistics of."""


def served(**options: Any) -> Any:
    """A BLN-LSTM whose norms are affine."""
    layer = BLNLSTM(INPUTS, HIDDEN, **options)
    recompute_population(layer, [torch.randn(SEEN, 64, INPUTS) for _ in range(2)])
    set_mode(layer, "pppp")
    return layer.eval()


def session(path: Path) -> Any:
    """An ONNX file in onnxruntime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def in_onnxruntime(layer: nn.Module, folder: Path, name: str) -> Any:
    """A layer as an ONNX file, in a function that takes an array's tensor."""
    path = folder / f"{name}.onnx"
    export(layer, path, [torch.randn(12, 4, INPUTS)])
    running = session(path)
    (given,) = (one.name for one in running.get_inputs())
    return lambda x: running.run(None, {given: x.numpy()})


def step_by_step(layer: Any, x: Tensor) -> Job:
    """All steps one after the other through a stream."""
    steps = x.unbind(0)

    def job() -> None:
        stream = layer.stream()
        for one in steps:
            stream.step(one)

    return job


def forms(folder: Path) -> dict[str, Any]:
    """Functions of a sequence by their names, nn.LSTM first."""
    plain, frozen = served(time_statistics="shared", norm_cell=False), served()
    whole = fold(frozen)
    return {
        "nn.LSTM": nn.LSTM(INPUTS, HIDDEN).eval(),
        "folded": fold(plain),
        "folded, ONNX": in_onnxruntime(plain, folder, "plain"),
        "BLN-LSTM": frozen,
        "frozen": whole,
        "frozen, script": torch.jit.script(whole),
        "frozen, ONNX": in_onnxruntime(frozen, folder, "frozen"),
    }


def measured(rounds: int) -> Times:
    """Ratios of all forms and of a stream, by sizes, of all runs."""
    found: Times = {}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        every = forms(Path(name))
        cases: dict[str, dict[str, Job]] = {}
        for batch in BATCHES:
            for steps in STEPS:
                x = torch.randn(steps, batch, INPUTS)
                jobs = {form: infer(one, x) for form, one in every.items()}
                cases[f"batch {batch}, T={steps}"] = jobs | {"stream": step_by_step(every["BLN-LSTM"], x)}
        for _ in range(RUNS):
            timed(cases, rounds, found)
    return found


def render(results: dict[str, Any]) -> str:
    """The report."""
    times: Times = results["times"]
    first, *names = next(iter(times.values()))
    lines = [
        "# An LSTM in each form in which it can be deployed",
        "",
        f"Processor time of one call as ratios to nn.LSTM's: medians of {results['rounds']} rounds, the worst of "
        f"{RUNS} runs. {INPUTS} inputs and {HIDDEN} units, float32, one thread. Folded: time_statistics='shared', "
        "norm_cell=False. BLN-LSTM, frozen and stream: the defaults, in pppp; the stream takes a step at a time.",
        "",
        results["machine"],
        "",
        f"| | {first}, µs | {' | '.join(names)} |",
        f"|{'---|' * (len(names) + 2)}",
    ]
    for case, row in times.items():
        cells = " | ".join(f"{max(row[name]):.2f}" for name in names)
        lines.append(f"| {case} | {min(row[first]):.0f} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=51, help="turns of each contender")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {"machine": f"{datetime.datetime.now():%Y-%m-%d %H:%M}; {machine()}", "rounds": options.rounds}
    results["times"] = measured(options.rounds)
    with replacing(RESULTS) as file:
        file.write(json.dumps(results, indent=1).encode())
    report = render(results)
    with replacing(RESULTS.with_suffix(".md")) as file:
        file.write(report.encode())
    print(report)


if __name__ == "__main__":
    main()
