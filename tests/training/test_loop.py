"""The one rule of accumulation, with the two real models: however a step's samples are split, it is the same step."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# Building an optimizer imports this module, and its functions have the current process group as a default argument. If
# a group exists by then, it and its threads live until the interpreter shuts down, which sometimes aborts the process.
import torch.distributed.nn.functional

from library.checkpoints.files import read_header
from library.data.batch import Batch, Unread
from library.data.buckets import build_bucket_table
from library.data.dataset import TrainingDataset
from library.data.order import BatchRequest, EpochOrder
from library.data.reading import ImageReader
from library.data.scan.image_record import ImageRecord
from library.families.clip.text_inputs import ClipTokenizers
from library.families.clip.tokenizer import ClipTokenizer
from library.families.family import AS_TRAINED, Conditioning
from library.families.registry import load_model
from library.objective.loss import Term
from library.objective.objective import Objective
from library.objective.weighting import Weighting
from library.options.datasets import BucketSettings, DatasetSpec, SubsetSpec
from library.options.mistakes import UserError
from library.runtime.processes import Processes
from library.runtime.seeds import torch_generator
from library.runtime.signals import StopRequest
from library.training.averaging.weights import Weights
from library.training.backward import WholeBackward
from library.training.conditioning import Conditioner
from library.training.left_out import LeftOut
from library.training.loop import Loop
from library.training.nonfinite import NonFinite
from library.training.plan.duration import Duration
from library.training.saving.rescue import Rescue
from library.training.saving.state import Progress, RandomStates
from library.training.steps import Steps
from library.training.trainable import Part, Trainable, parameter_groups
from library.training.training_loss import TrainingLoss
from tests import tiny
from tests.runtime.test_processes import join

# smaller images leave one pixel to the deepest level, whose normalisation then magnifies rounding a thousandfold
SIZE = (128, 128)
SAMPLES = tuple((index, 0) for index in range(7))
TOKENIZER = ClipTokenizers({"text_encoder": ClipTokenizer(49407)})


@dataclass
class FixedOrder:
    """One epoch of one window: the seven samples, in batches of `sizes`, or those at `places` one by one."""

    sizes: Sequence[int] = ()
    places: Sequence[int] = ()
    steps_per_epoch: int = 1

    def requests(self, epoch: int, skip_windows: int = 0, rank: int = 0, world: int = 1) -> Iterator[BatchRequest]:
        start = 0
        for size in self.sizes:
            last = start + size == len(SAMPLES)
            yield BatchRequest(epoch, 0, SIZE, SAMPLES[start : start + size], start, len(SAMPLES), last)
            start += size
        for place in self.places:
            last = place == self.places[-1]
            yield BatchRequest(epoch, 0, SIZE, (SAMPLES[place],), place, len(self.places), last)


class FakeConsole:
    """Counts steps, and says whether the clock of the steps stands still."""

    def __init__(self) -> None:
        self.is_paused = False
        self.steps = 0

    def count_step(self, average_loss: float) -> None:
        assert not self.is_paused
        self.steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.is_paused = True
        yield
        self.is_paused = False


def fake_run(accelerator: Any, logged: list[dict[str, float]], processes: Processes | None = None) -> Any:
    """A run that records logged values and prints nothing."""
    return SimpleNamespace(
        accelerator=accelerator,
        processes=processes or Processes(),
        log=lambda values, step: logged.append(values),
        say=lambda text: None,
        console=FakeConsole(),
        stop=StopRequest(),
    )


def left_out_of(run: Any, images: int = 100) -> LeftOut:
    """Counts only."""
    return LeftOut(images, run.processes, run.say)


def rescue_of(run: Any) -> Rescue:
    """Saves nothing."""
    return Rescue(run.processes, lambda progress: Path("state"), RandomStates(), run.say, 0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TrainingDataset:
    folder = tmp_path_factory.mktemp("images")
    spec = SubsetSpec(folder, "here")
    whole = DatasetSpec("here", BucketSettings(SIZE), (spec,))
    records = tuple(
        ImageRecord(folder, path.name, 0, 0, SIZE, f"image {index}", True, 1, index % 3 == 2)
        for index, path in enumerate(tiny.write_images(folder, 7, SIZE))
    )
    reader = ImageReader(records, build_bucket_table(records, [whole]).placements, (spec,), (whole,))
    return TrainingDataset(reader, TOKENIZER, seed=5, steps=1, prior_loss_weight=0.3)


def losses_of(model: Any, objective: Objective[Conditioning]) -> TrainingLoss:
    cpu = torch.device("cpu")
    context = Conditioner(model.family, model.text_encoders, TOKENIZER, AS_TRAINED, cpu)
    return TrainingLoss(model, context, model.vae, objective, 5, cpu)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_single_file(tmp_path_factory.mktemp("model") / "sd1.safetensors", "sd1")


def one_step(
    order: Sequence[int] | FixedOrder, dataset: TrainingDataset, model_file: Path, spoil: bool = False
) -> tuple[Any, float]:
    """Model and loss after one step of plain gradient descent, clipped, on the samples split into micro-batches."""
    from accelerate import Accelerator

    model = load_model(read_header(model_file))
    encoder = model.text_encoders["text_encoder"]
    parts = (Part("unet", model.backbone.train(), 1.0), Part("text_encoder1", encoder.train(), 0.5))
    optimizer = torch.optim.SGD(parameter_groups(parts), lr=1.0)
    accelerator = Accelerator(cpu=True)
    *_, prepared = accelerator.prepare(model.backbone, encoder, optimizer)
    objective: Objective[Conditioning] = Objective(
        model.family.process, "epsilon", 0, 1000, weightings=(Weighting("min_snr", 5.0),)
    )
    losses = losses_of(model, objective)
    seen: list[dict[str, float]] = []
    run = fake_run(accelerator, seen)

    def spoiled(batch: Batch, step: int) -> tuple[Term, ...]:
        (term,) = losses(batch, step)
        return (replace(term, losses=torch.where(batch.sample_index == 4, torch.nan, term.losses)) if spoil else term,)

    steps = Steps(
        run=run,
        trainable=Trainable(parts, frozenset({"unet", "text_encoder"})),
        optimizer=prepared,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        weights=Weights(optimizer),
        left_out=left_out_of(run),
        rescue=rescue_of(run),
        nonfinite=NonFinite(0, run.processes, run.say),
        losses=spoiled,
        backward=WholeBackward(accelerator, prepared, 0.1),
        timesteps=lambda: losses.timesteps,
    )
    loop = Loop(
        run=run,
        trainable=steps.trainable,
        steps=steps,
        order=order if isinstance(order, FixedOrder) else FixedOrder(order),  # type: ignore[arg-type]
        batches=lambda requests: ((request, dataset[request]) for request in requests),
        due=(),
        duration=Duration(1, 1, 1, len(SAMPLES), ""),
    )
    loop.train(Progress())
    return model, seen[0]["loss"]


def flat(module: torch.nn.Module) -> torch.Tensor:
    """All weights of a module in one row, float64."""
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


def test_a_step_does_not_depend_on_how_its_samples_are_split(dataset: TrainingDataset, model_file: Path) -> None:
    before = load_model(read_header(model_file))
    whole, loss = one_step([7], dataset, model_file)
    for sizes in ([1, 6], [2, 2, 2, 1]):
        split, split_loss = one_step(sizes, dataset, model_file)
        assert split_loss == pytest.approx(loss, rel=1e-6)
        for module in ("unet", "text_encoder"):
            start, one, other = (flat(model.modules()[module]) for model in (before, whole, split))
            step = (one - start).norm()
            assert step > 1e-3
            # float32 sums in another order; dividing each micro-batch by its own size is off by more than a tenth
            assert (other - one).norm() / step < 2e-5, (sizes, module)


def test_a_step_with_samples_that_cannot_be_read_is_one_of_the_others(
    dataset: TrainingDataset, model_file: Path, tmp_path: Path
) -> None:
    """Two of seven are gone, regularisation images, one of them a whole batch. The reference is a window that never had
    them."""
    records = list(dataset.images.records)
    for gone in (2, 5):
        records[gone] = replace(records[gone], folder=tmp_path)
    partly = replace(dataset, images=replace(dataset.images, records=tuple(records)), retry_delays=())
    before = load_model(read_header(model_file))
    expected, expected_loss = one_step(FixedOrder(places=[0, 1, 3, 4, 6]), dataset, model_file)
    found, loss = one_step([2, 1, 2, 2], partly, model_file)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for module in ("unet", "text_encoder"):
        start, one, other = (flat(model.modules()[module]) for model in (before, expected, found))
        step = (one - start).norm()
        assert step > 1e-3
        # float32 sums in another order
        assert (other - one).norm() / step < 2e-5, module


def test_the_loss_is_the_weighted_sum_over_the_number_of_samples(dataset: TrainingDataset, model_file: Path) -> None:
    """Written out sample by sample: (1/Z) sum of c_i w(t_i) l_i, with c = 0.3 for regularisation images."""
    model = load_model(read_header(model_file))
    objective: Objective[Conditioning] = Objective(
        model.family.process, "epsilon", 0, 1000, weightings=(Weighting("min_snr", 5.0),)
    )
    losses = losses_of(model, objective)
    total = 0.0
    model.backbone.requires_grad_(False)
    encoder = model.text_encoders["text_encoder"].requires_grad_(False)
    model.vae.requires_grad_(False)
    for index in range(7):
        batch = dataset[BatchRequest(1, 0, SIZE, (SAMPLES[index],), index, 7, index == 6)]
        draws = objective.draw((1, 4, 16, 16), losses.generators(batch, "noise"))
        alpha = model.family.process.alphas_cumprod[int(draws.timesteps[0])]
        posterior = model.vae.encode(batch.pixels).latent_dist
        noise = torch.randn(4, 16, 16, generator=losses.generators(batch, "posterior")[0])
        x0 = (posterior.mean + posterior.std * noise) * 0.18215
        noisy = math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * draws.noise
        states = encoder(batch.text_inputs["text_encoder"].ids[:, 0]).last_hidden_state
        error = (model.backbone(noisy, draws.timesteps, states).sample - draws.noise).square().mean()
        snr = alpha / (1 - alpha)
        total += (0.3 if index % 3 == 2 else 1.0) * min(snr, 5.0) / snr * float(error)
    _, loss = one_step([3, 4], dataset, model_file)
    assert loss == pytest.approx(total / 7, rel=1e-5)


def test_a_loss_that_is_not_finite_names_step_and_image(dataset: TrainingDataset, model_file: Path) -> None:
    with pytest.raises(UserError) as raised:
        one_step([4, 3], dataset, model_file, spoil=True)
    (mistake,) = raised.value.mistakes
    assert "step 1 (epoch 1)" in mistake.what and "image_04.png" in mistake.what and "image_03" not in mistake.what
    assert "--learning_rate" in mistake.remedy
    # the timestep of sample 4 is drawn by its own generator, whatever batch it is in
    generator = torch_generator(5, "noise", 4)
    process = load_model(read_header(model_file)).family.process
    timestep = int(Objective(process, "epsilon", 0, 1000).draw((1, 4, 1, 1), [generator]).timesteps)
    assert f"image_04.png (loss nan, timestep {timestep})" in mistake.what


@dataclass
class Toy:
    """One weight and batches of one sample; `term(number)` makes the terms of the micro-batch of record `number`."""

    terms: Callable[[torch.Tensor, int], tuple[Term, ...]]
    records: int = 4
    accumulation: int = 2
    steps: int = 2
    processes: Processes = Processes()
    unread: tuple[int, ...] = ()  # records that cannot be read
    limit: int = 0  # --max_nonfinite_steps

    def __post_init__(self) -> None:
        self.layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)
        self.optimizer = torch.optim.SGD([self.layer.weight], lr=0.1, momentum=0.9)
        self.logged: list[dict[str, float]] = []
        self.called: list[tuple[int, bool]] = []
        self.seen: list[int] = []
        self.said: list[str] = []

    def run(self) -> None:
        parts = (Part("toy", self.layer, 0.1),)
        order = EpochOrder(
            [0] * self.records,
            [SIZE] * self.records,
            [1] * self.records,
            batch_sizes=[1],
            accumulation=self.accumulation,
            seed=0,
        )
        accelerator = SimpleNamespace(
            autocast=nullcontext, backward=torch.Tensor.backward, optimizer_step_was_skipped=False, scaler=None
        )
        run = fake_run(accelerator, self.logged, self.processes)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        steps = Steps(
            run=run,
            trainable=Trainable(parts, frozenset()),
            optimizer=self.optimizer,
            schedule=self.schedule,
            weights=Weights(self.optimizer),
            left_out=left_out_of(run),
            rescue=rescue_of(run),
            nonfinite=NonFinite(self.limit, run.processes, self.said.append, parts),
            losses=self._losses,
            backward=WholeBackward(accelerator, self.optimizer, 0.0),
        )
        loop = Loop(
            run=run,
            trainable=steps.trainable,
            steps=steps,
            order=order,
            batches=lambda requests: ((request, self._batch(request)) for request in requests),
            due=(lambda progress, epoch_ended: self.called.append((progress.step, run.console.is_paused)),),
            duration=Duration(self.steps, 1, order.steps_per_epoch, 0, ""),
        )
        self.progress = loop.train(Progress())

    def _batch(self, request: BatchRequest) -> Any:
        ((number, _),) = request.samples
        path, is_unread = f"image_{number}.png", number in self.unread
        return SimpleNamespace(
            number=number,
            weights=torch.tensor([0.0 if is_unread else 1.0]),
            paths=(path,),
            unread=(Unread(request.first_sample, path, "it is gone"),) if is_unread else (),
        )

    def _losses(self, batch: Any, step: int) -> tuple[Term, ...]:
        self.seen.append(batch.number)
        return self.terms(self.layer.weight.view(1), batch.number)


def test_a_loss_that_is_not_finite_changes_neither_weights_nor_optimizer() -> None:
    """The second step meets it, when momentum is there to be spoiled."""
    seen: list[int] = []

    def terms(weight: torch.Tensor, number: int) -> tuple[Term, ...]:
        seen.append(number)
        if len(seen) == 3:
            good.extend([toy.layer.weight.detach().clone(), copy.deepcopy(toy.optimizer.state_dict())])
        return (Term("denoising", weight * (1.0 if len(seen) < 4 else torch.nan)),)

    good: list[Any] = []
    toy = Toy(terms)
    with pytest.raises(UserError, match=r"the loss is not finite at step 2 \(epoch 1\): image_\d.png \(loss nan\)"):
        toy.run()
    weight, state = good
    assert weight.item() == pytest.approx(0.9)  # one step of 0.1 with the gradient 1
    assert torch.equal(toy.layer.weight, weight)
    after = toy.optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert torch.equal(after["state"][0]["momentum_buffer"], state["state"][0]["momentum_buffer"])
    assert len(toy.logged) == 1


def spoiled(losses: dict[int, str]) -> Callable[[torch.Tensor, int], tuple[Term, ...]]:
    """Terms of which those of some calls, counted from 0, are not finite: the loss, or only its gradient."""
    calls = itertools.count()

    def terms(weight: torch.Tensor, number: int) -> tuple[Term, ...]:
        how = losses.get(next(calls), "")
        return (Term("denoising", (weight - weight).sqrt() if how == "gradient" else weight * float(how or 1)),)

    return terms


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(what: str) -> None:
    """It counts, but neither weights nor momentum nor schedule know of it."""
    toy = Toy(spoiled({2: what}), records=8, steps=3, limit=1)  # in the first batch of the second step
    toy.run()
    without = Toy(spoiled({}), records=8, steps=2)
    without.run()
    assert torch.equal(toy.layer.weight, without.layer.weight)
    assert toy.schedule.state_dict()["last_epoch"] == 2
    assert (toy.progress.step, toy.progress.nonfinite) == (3, 0)
    assert sum("loss" in values for values in toy.logged) == 2
    (said,) = toy.said
    named = "gradient" if what == "gradient" else "loss"
    assert said.startswith(f"the {named} is not finite at step 2 (epoch 1): image_") and "the step is skipped" in said


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run() -> None:
    apart = Toy(spoiled({0: "nan", 4: "gradient"}), records=8, steps=4, limit=1)
    apart.run()
    assert len(apart.said) == 2
    toy = Toy(spoiled({2: "nan", 4: "gradient"}), records=8, steps=4, limit=1)
    with pytest.raises(UserError, match=r"the gradient is not finite at step 3.*, as in the 1 step before"):
        toy.run()
    assert toy.layer.weight.item() == pytest.approx(0.9)


def test_saving_drawing_and_validating_are_no_time_of_a_step() -> None:
    toy = Toy(lambda weight, number: (Term("denoising", weight),))
    toy.run()
    assert {paused for _, paused in toy.called} == {True}
    assert {step for step, _ in toy.called} == {1, 2}


def test_the_drift_of_a_term_is_the_mean_of_its_members() -> None:
    """Without the weight of the term. In the first step the weight is 1, and two batches are those of records 0 to 3;
    records 0 and 1 are members, and what could not be read is none."""

    def terms(weight: torch.Tensor, number: int) -> tuple[Term, ...]:
        member = torch.tensor([number < 2])
        losses = torch.where(member, weight * (number + 1.0), 0.0)
        return (Term("denoising", weight), Term("anchor", losses, 0.5, member))

    toy = Toy(terms, accumulation=4, steps=1)
    toy.run()
    # the mean of 1 and 2; the shares of the loss are divided by all 4 samples
    assert toy.logged[0]["drift/anchor"] == 1.5 and toy.logged[0]["loss/anchor"] == 0.5 * 3 / 4
    assert toy.logged[0]["loss"] == 1 + 0.5 * 3 / 4
    toy = Toy(terms, accumulation=4, steps=1, unread=(1,))
    toy.run()
    assert toy.logged[0]["drift/anchor"] == 1.0
    toy = Toy(lambda weight, number: terms(weight, 2), accumulation=4, steps=1)
    toy.run()
    assert "drift/anchor" not in toy.logged[0] and toy.logged[0]["loss/anchor"] == 0.0


def test_a_single_term_is_logged_as_the_loss_and_several_each_by_its_name() -> None:
    """4 samples of 1 and 0.5 times the weight: (2 / 2) * 1.5 in the first step."""
    one, two = (
        Toy(lambda weight, number: (Term("denoising", weight * 1.5),)),
        Toy(lambda weight, number: (Term("denoising", weight), Term("anchor", weight * 0.5))),
    )
    one.run()
    two.run()
    assert one.logged[0] == {"loss": 1.5, "lr/toy": 0.1}
    assert two.logged[0] == {"loss": 1.5, "loss/denoising": 1.0, "loss/anchor": 0.5, "lr/toy": 0.1}
    assert torch.equal(one.layer.weight, two.layer.weight)


def test_a_window_in_which_nothing_was_read_counts_as_a_step_and_changes_nothing() -> None:
    """Four windows of one sample, of which one is gone: weight and momentum as after three steps of gradient 1."""
    toy, three = (
        Toy(lambda weight, number: (Term("denoising", weight),), records=count, accumulation=1, steps=count)
        for count in (4, 3)
    )
    toy.unread = (2,)
    toy.run()
    three.run()
    assert torch.equal(toy.layer.weight, three.layer.weight)
    momentum, expected = (one.optimizer.state_dict()["state"][0]["momentum_buffer"] for one in (toy, three))
    assert torch.equal(momentum, expected)
    assert toy.progress.step == 4 and toy.schedule.last_epoch == 3
    assert [step for step, _ in toy.called] == [1, 2, 3, 4, 4]  # also at the end of the epoch
    assert [values["loss"] for values in toy.logged if "loss" in values] == [
        values["loss"] for values in three.logged if "loss" in values
    ]


def test_a_run_whose_first_window_cannot_be_read_goes_on() -> None:
    toy = Toy(lambda weight, number: (Term("denoising", weight),), records=2, accumulation=1, steps=2, unread=(0, 1))
    toy.run()
    assert toy.progress.step == 2 and not toy.logged and toy.layer.weight.item() == 1.0


def _as_rank(rank: int, folder: Path) -> None:
    """One of two processes: of each run what it logged, which records it computed and how it ended, as a file."""
    processes = join(rank, 2, folder)
    runs = {"plain": (torch.inf, ()), "unread": (torch.inf, (1,)), "spoiled": (2, ())}
    try:
        reports = {name: _report(processes, spoiled, unread) for name, (spoiled, unread) in runs.items()}
        reports["late"] = _compare_late(processes)
    finally:
        torch.distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(reports), encoding="utf-8")


def _compare_late(processes: Processes) -> dict[str, Any]:
    """Whether reading late changes anything, where samples of one rank are not finite or cannot be read."""
    from tests.training.test_late import Small

    faults = {9: "nan", 20: "gradient", 31: "nan"}
    at_once, late = (Small(interval, faults, unread=(2,), processes=processes) for interval in (1, 4))
    names = ("error", "logged", "progress", "said", "saved")
    found = {name: getattr(late, name) == getattr(at_once, name) for name in names}
    return {**found, "state": late.state() == at_once.state(), "skipped": len(at_once.said)}


def _report(processes: Processes, spoiled: float, unread: tuple[int, ...]) -> dict[str, Any]:
    def terms(weight: torch.Tensor, number: int) -> tuple[Term, ...]:
        return (Term("denoising", weight * (torch.nan if number == spoiled else number + 1.0)),)

    toy = Toy(terms, records=3, accumulation=3, steps=1, processes=processes, unread=unread)
    error = ""
    try:
        toy.run()
    except UserError as raised:
        error = str(raised.mistakes[0])
    report = {"error": error, "seen": toy.seen, "logged": toy.logged, "called": toy.called}
    return {**report, "weight": toy.layer.weight.item()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes report of each run, which they do one after the other."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_as_rank, (folder,), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def test_two_processes_report_one_loss_and_the_first_one_writes(two_ranks: list[dict[str, Any]]) -> None:
    """Three micro-batches for two ranks: one computes a sample of the other again, which counts nothing."""
    first, second = (reports["plain"] for reports in two_ranks)
    assert sorted({*first["seen"], *second["seen"]}) == [0, 1, 2]
    assert len(first["seen"]) == len(second["seen"]) == 2 and second["seen"][1] == first["seen"][1]
    assert first["logged"][0]["loss"] == pytest.approx((1 + 2 + 3) / 3)
    assert first["called"] == second["called"] != [] and not second["logged"]
    # gradients stay each rank's own here: together they are those of the loss
    moved = [1.0 - rank["weight"] for rank in (first, second)]
    assert sum(moved) == pytest.approx(0.1 * (1 + 2 + 3) / 3, rel=1e-5)


def test_reading_late_changes_nothing_with_two_processes(two_ranks: list[dict[str, Any]]) -> None:
    for reports in two_ranks:
        assert reports["late"].pop("skipped") == 3 and all(reports["late"].values()), reports["late"]


def test_all_processes_divide_by_the_samples_that_any_of_them_read(two_ranks: list[dict[str, Any]]) -> None:
    """The sample of 2 is gone on one rank: (1 + 3) / 2, and each rank has its part of that gradient."""
    first, second = (reports["unread"] for reports in two_ranks)
    assert first["logged"][0]["loss"] == pytest.approx((1 + 3) / 2)
    moved = [1.0 - rank["weight"] for rank in (first, second)]
    assert sum(moved) == pytest.approx(0.1 * (1 + 3) / 2, rel=1e-5)


def test_a_loss_that_is_not_finite_on_one_process_stops_both_with_the_same_message(
    two_ranks: list[dict[str, Any]],
) -> None:
    first, second = (reports["spoiled"] for reports in two_ranks)
    assert first["error"] == second["error"] and "step 1 (epoch 1): image_2.png (loss nan)\n" in first["error"]
    assert first["weight"] == second["weight"] == 1.0
