"""Where clients train: what is refused, and that nothing on the way mixes devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_experiment import settings

from models import Case, built_in
from scalefl.blocks import Span, blocks_by_count
from scalefl.client import Residents, holding, make_optimizer, train_batch
from scalefl.engines.gauge import CudaGauge, device_of
from scalefl.engines.local import LocalEngine
from scalefl.errors import ConfigError
from scalefl.mentor import Mentor, MentorLoss
from scalefl.models.output import OutputSpec, light_targets
from scalefl.params import moved
from scalefl.prefix import prefix_of
from scalefl.rng import rng_state, seeded, set_rng_state
from scalefl.runner import run
from scalefl.steps import span_step
from scalefl.types import LocalWork, Means, Step

META = torch.device("meta")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def middle_block(c: Case) -> Step:
    blocks = blocks_by_count(c.model, c.problem, 3)
    cut = blocks.cut(1)
    assert cut is not None
    targets = light_targets(cut.shape, blocks.partition.shapes_after(blocks.ends[1]))
    output = OutputSpec(cut.module, cut.shape, targets, c.problem.num_classes)
    work = LocalWork(batch_size=8, clip_norm=1.0, prox=0.1)
    return span_step(blocks, Span(1, 1), output, work, coadapted_layers=1)


MEANS = [
    Means(),
    Means(micro_batch_size=4),
    Means(recompute=True),
    Means(micro_batch_size=3, recompute=True, prefix="streamed"),
    Means(prefix="chunked"),
]


@pytest.mark.parametrize("means", MEANS, ids=str)
@pytest.mark.parametrize("name", ["resnet10", "vit", "squeezenet"])
def test_a_step_stays_on_its_device(name: str, means: Means) -> None:
    """On a device without values: torch refuses to mix it with another one."""
    c = built_in(name, 0.25)
    step = replace(middle_block(c), means=means)
    resident = Residents()[c.model]
    params = {n: torch.zeros_like(t, device=META) for n, t in resident.empty(step.part).items()}
    batch = moved(c.problem.example(8), META)
    objective = MentorLoss(Mentor(), 1.0, 1.0)
    with (
        holding(resident, step, params) as (runner, trained),
        prefix_of(step, runner, batch, c.problem, META) as prefix,
    ):
        optimizer = make_optimizer(trained, step, {})
        found = train_batch(runner, optimizer, batch, c.problem, objective, step.means, prefix)
        assert {t.device for t in optimizer.momentum.values()} == {META}
    assert all(value.device == META for value, _ in found.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "expected 'cpu', 'cuda' or 'cuda:1'"),
        ("", "expected"),
        ("meta", "clients train on 'cpu' or 'cuda'"),
        ("cuda:99", r"torch sees \d+ CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.device = {name!r}: .*{message}"):
        run(settings("200%", engine={"device": name}), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(ConfigError, match=message):
        LocalEngine(None, None, device=name)  # type: ignore[arg-type]


def test_random_states_go_back() -> None:
    with seeded(3):
        torch.rand(2)
        state = rng_state()
        first = torch.rand(4)
        set_rng_state(state)
        assert torch.equal(torch.rand(4), first)


@on_cuda
def test_random_states_of_a_cuda_device_go_back() -> None:
    device = device_of("cuda")
    with seeded(3):
        torch.rand(2, device=device)
        state = rng_state()
        first = torch.rand(4, device=device)
        set_rng_state(state)
        assert torch.equal(torch.rand(4, device=device), first)


@on_cuda
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_cuda_does_what_one_on_the_cpu_does(tmp_path, workers: int) -> None:
    def loss(device: str) -> float:
        engine = {"device": device, "workers": workers}
        config = settings("200%", method={"name": "scalefl", "blocks": 2}, engine=engine)
        return float(run(config, tmp_path / device)["validation"]["loss"])

    assert loss("cuda") == pytest.approx(loss("cpu"), rel=1e-2)


@on_cuda
def test_a_cuda_cap_refuses_what_is_beyond_it() -> None:
    gauge = CudaGauge(device_of("cuda"))
    gauge.start()
    with gauge.limited(64 * 2**20):
        kept = torch.zeros(32 * 2**18, device="cuda")
        with pytest.raises(RuntimeError, match="out of memory"):
            torch.zeros(64 * 2**18, device="cuda")
        del kept
    torch.zeros(128 * 2**18, device="cuda")
    peak = gauge.added_peak_bytes()
    assert peak is not None and peak >= 128 * 2**20
