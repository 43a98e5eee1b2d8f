"""What a user does with a run, done with one cell of the zoo."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scalefl.checkpoint import load_deployed
from scalefl.config import Config, load_config
from scalefl.errors import ScaleFLError
from scalefl.experiment import Experiment
from scalefl.export import export
from scalefl.params import Params
from scalefl.partition import partition
from scalefl.problem import Batch, Problem
from scalefl.run_folder import RunFolder, read_json
from scalefl.runner import run, run_rounds
from support import identical
from zoo.cells import PASSES, Cell, Result


class Wrong(AssertionError):
    """A cell neither passes nor is refused as it should be; says in which step."""


def play(cell: Cell, folder: Path) -> Result:
    """Plan, run, stop and resume, export, and run again on two workers.

    Raises:
        Wrong: anything but that, or a refusal before the first round that plan and run agree in.
    """
    with _step("config"):
        config = load_config(cell.config(folder))
    with _step("plan"):
        refused = _refusal(lambda: _planned(config))
    with _step("run"):
        summary: dict[str, Any] = {}
        whole = folder / "whole"
        again = _refusal(lambda: summary.update(run(config, whole)))
        _require(refused == again, f"plan says {refused!r}, run says {again!r}")
        if refused is not None:
            _require(not (whole / "journal.jsonl").exists(), "refused after the run had begun")
            return Result(refused, _units(config))
        _require(summary["num_clients_lost"] == 0, f"lost clients: {_lost(whole)}")
    wrong = []
    for check in (_check_training, _check_resumed, _check_export, _check_workers):
        try:
            with _step(check.__name__.removeprefix("_check_")):
                check(cell, config, whole)
        except Wrong as error:
            wrong.append(error)
    if wrong:
        raise Wrong("; ".join(map(str, wrong))) from wrong[0]
    return Result(PASSES, _units(config))


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except Wrong as error:
        raise Wrong(f"{name}: {error}") from None
    except Exception as error:
        raise Wrong(f"{name}: {type(error).__name__}: {error}") from error


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


def _refusal(do: Callable[[], None]) -> str | None:
    try:
        do()
    except ScaleFLError as error:
        return str(error)
    return None


def _planned(config: Config) -> None:
    rows = Experiment(config).plan().to_json()["rows"]
    _require(all("strong" in row["fits"] for row in rows[:1]), "the strong clients hold nothing")
    _require(bool(rows), "there is nothing to train")


def _lost(folder: Path) -> list[Any]:
    return [lost for line in RunFolder(folder).read_journal() for lost in line.get("lost", ())]


def _units(config: Config) -> int:
    try:
        experiment = Experiment(config)
        return partition(experiment.model, experiment.problem).num_units
    except ScaleFLError:
        return 0


def _of_model(params: Params, cell: Cell) -> dict[str, Tensor]:
    """The tensors of the user's own model: DepthFL deploys it among classifiers."""
    if cell.method != "depthfl":
        return dict(params)
    return {name.removeprefix("model."): t for name, t in params.items() if name.startswith("model.")}


def _check_training(cell: Cell, config: Config, folder: Path) -> None:
    """What is frozen stands still, to the bit; what has a gradient at the start has moved (of one block at least)."""
    experiment = Experiment(config)
    before = dict(experiment.initial_state().params)
    after = _of_model(load_deployed(folder / "state.safetensors")[1], cell)
    model = cell.fresh()
    own = {name: before[name] for name, _ in model.named_parameters()}
    moved = {name for name, t in own.items() if not torch.equal(after[name], t)}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    _require(not moved & frozen, f"frozen, and moved: {sorted(moved & frozen)}")
    model.load_state_dict({**model.state_dict(), **own})
    problem, batch = experiment.problem, experiment.data.examples(0)
    args, kwargs = problem.inputs(batch)
    loss, weight = problem.loss(problem.output(model.train()(*args, **kwargs)), batch)
    (loss / weight).backward()
    pulled = {n for n, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 1e-5}
    if cell.method == "scalefl-paper":  # one block a round
        _require(bool(moved & pulled), "nothing has moved")
    else:
        _require(pulled <= moved, f"never trained: {sorted(pulled - moved)}")


def _check_resumed(cell: Cell, config: Config, folder: Path) -> None:
    """Stopped after the first of two rounds, and gone on with."""
    stopped = folder.parent / "stopped"
    with contextlib.closing(run_rounds(Experiment(config), stopped)) as rounds:
        next(rounds)
    journal = (stopped / "journal.jsonl").read_text().splitlines()
    _require(len(journal) == 2, f"stopped after {len(journal) - 1} rounds")
    run(config, stopped, resume=True)
    check_same(folder, stopped)


def _check_workers(cell: Cell, config: Config, folder: Path) -> None:
    """On two processes beside this one."""
    two = folder.parent / "two"
    run(load_config(cell.config(folder.parent, workers=2)), two)
    check_same(folder, two)


def check_same(one: Path, other: Path) -> None:
    """Two runs of one config ended alike."""
    states = [load_file(folder / "state.safetensors") for folder in (one, other)]
    if not identical(*states):
        a, b = states
        _require(a.keys() == b.keys(), f"other tensors: {sorted(a.keys() ^ b.keys())}")
        gaps = {n: float((a[n].double() - b[n].double()).abs().max()) for n in a if not torch.equal(a[n], b[n])}
        most = max(gaps.values(), default=0.0)
        raise Wrong(f"other bytes in {len(gaps)} of {len(a)} tensors, by up to {most:.1g}: {[*gaps][:3]}")
    figures = [read_json(RunFolder(folder).summary)["test"] for folder in (one, other)]
    _require(figures[0] == figures[1], f"test figures differ: {figures}")


def _check_export(cell: Cell, config: Config, folder: Path) -> None:
    """Under strict names in the user's own model, with the run's own accuracy."""
    told = read_json(RunFolder(folder).summary)["test"]
    spec, _ = export(folder, folder.parent / "model.safetensors")
    content = load_file(folder.parent / "model.safetensors")
    cell.fresh().load_state_dict(_of_model(content, cell), strict=True)
    module = spec.build(1) if cell.method == "depthfl" else cell.fresh()
    module.load_state_dict(content, strict=True)
    experiment = Experiment(config)
    found = _measured(module, experiment.problem, experiment.data.test)
    for name, value in found.items():
        _require(
            value == pytest.approx(told[name], rel=1e-5),
            f"{name} is {value} in the user's model, and {told[name]} in the run",
        )


def _measured(module: nn.Module, problem: Problem, batch: Batch) -> dict[str, float]:
    args, kwargs = problem.inputs(batch)
    with torch.no_grad():
        output = problem.output(module.eval()(*args, **kwargs))
    return {name: float(value) / weight for name, (value, weight) in problem.metrics(output, batch).items()}
