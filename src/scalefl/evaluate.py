"""Measure a deployed model on data that no client trains on."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from scalefl.client import Residents
from scalefl.data.partitioners import largest_remainder
from scalefl.effects import effects
from scalefl.hsic import Form, inner_product, normalised_kernel
from scalefl.models.spec import ModelSpec
from scalefl.params import Params, moved
from scalefl.partition import Cut
from scalefl.parts import Part
from scalefl.problem import Batch, Problem, num_rows, take, without_padding
from scalefl.rng import generator

EVALUATION_BATCH = 128
PERMUTATIONS = 8
"""Over which the plane's baseline is averaged: one alone is off by about .02 on 20 samples, and .005 on 256."""


def evaluate(
    residents: Residents, model: ModelSpec, params: Params, problem: Problem, examples: Batch
) -> dict[str, float]:
    """The problem's metrics over `examples`, the model in eval mode."""
    (found,) = evaluate_groups(residents, model, params, problem, examples, [torch.arange(num_rows(examples))])
    return found


def evaluate_groups(
    residents: Residents,
    model: ModelSpec,
    params: Params,
    problem: Problem,
    examples: Batch,
    groups: Sequence[Tensor],
) -> list[dict[str, float]]:
    """The problem's metrics over each of several groups of examples, the model in eval mode and run once over all.

    A metric that has no weight in a group is left out there.

    Args:
        groups: rows of `examples`, [N_g] each; a row may be in several.
    """
    sums: list[dict[str, list[float]]] = [{} for _ in groups]
    part = _whole(model, problem, params)
    with residents[model].holding(part, moved(params, residents.device)) as (runner, _), torch.no_grad():
        for start, batch in _slices(examples, residents.device):
            logits, count = runner(batch, problem).logits, num_rows(batch)
            for rows, group_sums in zip(groups, sums, strict=True):
                own = rows[(rows >= start) & (rows < start + count)].to(residents.device) - start
                if not len(own):
                    continue
                is_all = len(own) == count
                found = problem.metrics(logits if is_all else logits[own], batch if is_all else take(batch, own))
                for name, (value, weight) in found.items():
                    entry = group_sums.setdefault(name, [0.0, 0.0])
                    entry[0] += float(value)
                    entry[1] += float(weight)
    return [{name: value / weight for name, (value, weight) in found.items() if weight} for found in sums]


def _whole(model: ModelSpec, problem: Problem, params: Params) -> Part:
    """The whole model, in eval mode."""
    does = effects(model, problem)
    return Part(
        model,
        None,
        None,
        None,
        None,
        active=(),
        held=tuple(params),
        written=tuple(sorted(does.touched)),
        copies_inputs=does.writes_inputs,
    )


def accuracy_over_clients(of_label: Tensor, counts: Tensor) -> dict[str, float]:
    """How accuracy differs between clients: each expects that of its labels, in its own proportions.

    Args:
        of_label: [K]; labels with NaN do not count.
        counts: how many examples of each label each client has, [N, K].
    """
    counts = torch.where(of_label.isnan(), 0, counts).double()
    held = counts.sum(1)
    accuracies = (counts[held > 0] / held[held > 0, None]) @ of_label.nan_to_num()
    if not len(accuracies):
        return {}
    quantiles = torch.quantile(accuracies, torch.tensor([0.1, 0.5], dtype=torch.float64)).tolist()
    return dict(zip(("accuracy_p10", "accuracy_median"), quantiles, strict=True))


def nhsic_plane(
    residents: Residents,
    model: ModelSpec,
    params: Params,
    problem: Problem,
    probe: Batch,
    cuts: Sequence[Cut],
    source: str | None,
    *,
    seed: int,
    form: Form = "cka",
) -> list[dict[str, float | str]]:
    """nHSIC(X; Z) and nHSIC(Y; Z) at each cut, for the paper's diagnosis (ScaleFL, section 3).

    Beside each value stands its baseline, the mean of the same with the samples of X or Y permuted: what the
    biased estimator gives where nothing is shared. And the number of samples: values for different numbers of
    samples do not compare.

    Args:
        probe: the same samples in every call.
        cuts: where Z is read.
        source: the module whose output stands for X (token models).
        seed: of the permutations.
    """
    part = replace(_whole(model, problem, params), source=source)
    probe = moved(probe, residents.device)
    with residents[model].holding(part, moved(params, residents.device)) as (runner, _), torch.no_grad():
        seen = [runner.features(batch, problem, tuple(cuts)) for _, batch in _slices(probe, residents.device)]
        if seen[0][0] is None:  # nothing that could be compared with stands for the input
            return []
        mask = problem.mask(probe)

        def kernel(pieces: Iterable[Tensor]) -> Tensor:
            return normalised_kernel(without_padding(torch.cat(list(pieces)), mask), form)

        kernels_z = [kernel(zs[i] for _, zs in seen) for i in range(len(cuts))]
        kernel_x = kernel(x for x, _ in seen if x is not None)
        kernel_y = normalised_kernel(problem.y_features(probe).float(), form)
    draw = generator(seed, "permutation")
    orders = [torch.randperm(num_rows(probe), generator=draw) for _ in range(PERMUTATIONS)]

    def permuted(kernel: Tensor, kernel_z: Tensor) -> float:
        return statistics.fmean(float(inner_product(kernel[order][:, order], kernel_z)) for order in orders)

    return [
        {
            "cut": cut.module,
            "num_samples": num_rows(probe),
            "x": float(inner_product(kernel_x, k)),
            "y": float(inner_product(kernel_y, k)),
            "x_permuted": permuted(kernel_x, k),
            "y_permuted": permuted(kernel_y, k),
        }
        for cut, k in zip(cuts, kernels_z, strict=True)
    ]


def _slices(examples: Batch, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """Pieces of the examples, and the row with which each begins."""
    for start in range(0, num_rows(examples), EVALUATION_BATCH):
        yield (
            start,
            moved({name: column[start : start + EVALUATION_BATCH] for name, column in examples.items()}, device),
        )


def stratified_rows(labels: Tensor, count: int, seed: int) -> Tensor:
    """`count` rows (or all) with each label's share as in `labels`, sorted."""
    shares = torch.bincount(labels).double() / len(labels)
    return rows_by_distribution(labels, shares, seed, count)


def rows_by_distribution(labels: Tensor, shares: Tensor, seed: int, count: int | None = None) -> Tensor:
    """Rows drawn without replacement so that labels have the given shares, sorted.

    Args:
        labels: [N].
        shares: [K]; those of labels that no row has are left out.
        seed: of the draw.
        count: how many rows, at most; None: as many as the rarest label allows.
    """
    available = torch.bincount(labels, minlength=len(shares)).double()
    wanted = (shares > 0) & (available > 0)
    shares = torch.where(wanted, shares, 0.0)
    shares = shares / shares.sum().clamp(min=1e-12)
    possible = float((available[wanted] / shares[wanted]).min()) if bool(wanted.any()) else 0.0
    total = possible if count is None else min(possible, float(count))
    count = int(total + 1e-9)
    take = largest_remainder(shares.numpy(), count).tolist() if count else [0] * len(shares)
    draw = generator(seed, "rows")
    rows = []
    for label, number in enumerate(take):
        own = (labels == label).nonzero().flatten()
        rows.append(own[torch.randperm(len(own), generator=draw)[:number]])
    return torch.cat(rows).sort().values
