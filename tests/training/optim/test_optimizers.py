"""Every optimizer of the table: chosen without torch, lowers a loss, continues from its saved state bit for bit."""

from __future__ import annotations

import importlib.util
import io
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from library.options.groups.optimizer import OptimizerOptions
from library.options.mistakes import UserError
from library.training.optim.optimizer_table import OPTIMIZERS, OptimizerRow
from library.training.optim.optimizers import ExactState, allocate_state, choose_optimizer, make_optimizer

# bitsandbytes' paged optimisers fall back to ordinary memory on a CPU, and say so
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

ROOT = Path(__file__).resolve().parents[3]
ROWS = {row.name: row for row in OPTIMIZERS}
NAMES = (
    "AdamW AdamW8bit PagedAdamW PagedAdamW8bit PagedAdamW32bit Lion Lion8bit PagedLion8bit SGDNesterov SGDNesterov8bit "
    "DAdaptation DAdaptAdamPreprint DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptAdanIP DAdaptLion DAdaptSGD Prodigy "
    "Adafactor AdamWScheduleFree SGDScheduleFree RAdamScheduleFree"
).split()
FULL_FP16_SAFE = {
    "AdamW8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "Lion8bit",
    "PagedLion8bit",
    "SGDNesterov8bit",
    "Adafactor",
}


def options(name: str = "", *args: str, **others: Any) -> OptimizerOptions:
    """Options with a rate that suits the optimiser and a problem of a few steps."""
    row = ROWS.get(name)
    rate = 1e-2
    if row is not None and row.learning_rate_free:
        rate = 1.0
    elif name == "SGDScheduleFree":
        rate = 0.3
    elif row is not None and "Lion" in name:
        rate = 1e-3
    return OptimizerOptions(optimizer_type=name, optimizer_args=args, **{"learning_rate": rate, **others})


class Toy:
    """Two small parts (one with more than the 4096 numbers from which on bitsandbytes uses 8 bits) and data to fit."""

    def __init__(self, asked: OptimizerOptions, dtype: torch.dtype = torch.float32, **more: Any) -> None:
        torch.manual_seed(0)
        self.parts = [torch.nn.Linear(64, 96).to(dtype), torch.nn.Linear(96, 8).to(dtype)]
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(32, 64, generator=generator).to(dtype)
        self.targets = torch.randn(32, 8, generator=generator).to(dtype)
        choice = choose_optimizer(asked)
        assert not choice.mistakes
        groups = [{"params": part.parameters(), "lr": asked.learning_rate} for part in self.parts]
        self.optimizer = make_optimizer(choice, groups, **more)

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        output = self.parts[1](torch.tanh(self.parts[0](self.inputs)))
        loss = (output.float() - self.targets.float()).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def weights(self) -> list[torch.Tensor]:
        return [parameter for part in self.parts for parameter in part.parameters()]


def saved(toy: Toy) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """State and weights through a file as a training state writes it, read back as plain containers and tensors."""
    file = io.BytesIO()
    torch.save((ExactState(toy.optimizer).state_dict(), [part.state_dict() for part in toy.parts]), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def restored(state: tuple[dict[str, Any], list[dict[str, Any]]], *args: Any) -> Toy:
    toy = Toy(*args)
    for part, tensors in zip(toy.parts, state[1], strict=True):
        part.load_state_dict(tensors)
    ExactState(toy.optimizer).load_state_dict(state[0])
    return toy


def bits(tensors: list[torch.Tensor]) -> list[bytes]:
    return [tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def test_the_table_has_the_names_that_users_know() -> None:
    assert sorted(ROWS) == sorted(NAMES)
    assert len(ROWS) == len(OPTIMIZERS)


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_lowers_the_loss(name: str) -> None:
    """Learning rates that an optimizer estimates grow from d0, whose default of 1e-6 would take this toy many steps."""
    toy = Toy(options(name, "d0=1e-3") if ROWS[name].learning_rate_free else options(name))
    losses = [toy.step() for _ in range(21)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_continues_from_its_saved_state_bit_for_bit(name: str) -> None:
    toy = Toy(options(name))
    for _ in range(7):
        toy.step()
    other = restored(saved(toy), options(name))
    assert [toy.step() for _ in range(5)] == [other.step() for _ in range(5)]
    assert bits(toy.weights()) == bits(other.weights())


@pytest.mark.parametrize("name", ["Adafactor", "AdamW8bit", "PagedAdamW32bit", "AdamW"])
def test_half_precision_weights_keep_the_format_of_their_state(name: str) -> None:
    """torch's own load_state_dict would round fp32 state to the weights' bf16."""
    asked = options(name)
    toy = Toy(asked, torch.bfloat16)
    for _ in range(7):
        toy.step()
    other = restored(saved(toy), asked, torch.bfloat16)
    for parameter, twin in zip(toy.weights(), other.weights(), strict=True):
        for key, value in toy.optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                assert other.optimizer.state[twin][key].dtype == value.dtype, key
    assert [toy.step() for _ in range(5)] == [other.step() for _ in range(5)]
    assert bits(toy.weights()) == bits(other.weights())


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"Adafactor"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_the_state_is_what_the_plan_counts(name: str, dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.ones(256, 256, dtype=dtype))
    choice = choose_optimizer(options(name))
    optimizer = make_optimizer(choice, [{"params": [parameter], "lr": 1.0}])
    for _ in range(2):
        parameter.grad = torch.full_like(parameter, 0.01)
        optimizer.step()
    state = optimizer.state[parameter]
    tensors = [value for key, value in state.items() if isinstance(value, torch.Tensor) and "qmap" not in key]
    bytes_held = sum(tensor.nbytes for tensor in tensors)
    assert bytes_held / parameter.numel() == pytest.approx(choice.state_bytes_per_parameter(dtype.itemsize), rel=0.01)


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (320, 1280), (1280,)], ids=str)
def test_adafactors_state_depends_on_the_shapes(shape: tuple[int, ...]) -> None:
    """Most of a kernel of 3 x 3, little of a matrix: a U-Net with few kernels, as SDXL's, has a smaller state."""
    parameter = torch.nn.Parameter(torch.ones(shape))
    choice = choose_optimizer(options("Adafactor"))
    optimizer = make_optimizer(choice, [{"params": [parameter], "lr": 1.0}])
    parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    state = optimizer.state[parameter].values()
    tensors = [value for value in state if isinstance(value, torch.Tensor) and value.dim()]
    counted = choice.state_bytes_per_parameter(4, [shape]) * parameter.numel()
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(counted)


def test_adafactors_state_is_small() -> None:
    assert choose_optimizer(options("Adafactor")).state_bytes_per_parameter(4) < 3
    assert choose_optimizer(options("Adafactor", "beta1=0.9")).state_bytes_per_parameter(4) > 4


@pytest.mark.parametrize("name", NAMES)
def test_names_are_case_insensitive(name: str) -> None:
    for spelling in (name.lower(), name.upper()):
        choice = choose_optimizer(options(spelling))
        assert choice.row is ROWS[name] and not choice.mistakes


def test_the_default_is_adamw_and_old_flags_choose_theirs() -> None:
    assert choose_optimizer(options()).name == "AdamW"
    assert choose_optimizer(options(use_8bit_adam=True)).name == "AdamW8bit"
    assert choose_optimizer(options(use_lion_optimizer=True)).name == "Lion"


def test_arguments_are_read_as_python_values() -> None:
    pairs = ("betas=0.9,0.99", "weight_decay=0.1", "amsgrad = true", "foreach=None", "eps=1e-6")
    choice = choose_optimizer(options("AdamW", *pairs))
    assert not choice.mistakes
    assert choice.arguments == {
        "betas": (0.9, 0.99),
        "weight_decay": 0.1,
        "amsgrad": True,
        "foreach": None,
        "eps": 1e-6,
    }
    assert choice.full_name.startswith("torch.optim.adamw.AdamW(betas=(0.9, 0.99),weight_decay=0.1")


@pytest.mark.parametrize(
    ("name", "pair", "says"),
    [
        ("AdamW", "weight_decy=0.1", "weight_decay"),
        ("AdamW", "lr=1", "learning_rate"),
        ("AdamW", "weight_decay=low", "is not a number"),
        ("AdamW", "weight_decay=True", "is not a number"),
        ("AdamW", "weight_decay=None", "is not a number"),
        ("AdamW", "betas=0.9", "is not a list of 2 numbers"),
        ("AdamW", "betas=0.9,0.99,0.999", "is not a list of 2 numbers"),
        ("AdamW", "betas=0.9,high", "betas=0.9,0.999"),
        ("AdamW", "foreach=sometimes", "is not True or False or None"),
        ("Adafactor", "relative_step=Flase", "is not True or False"),
        ("Adafactor", "relative_step=False scale_parameter=False", "is not True or False"),
        ("DAdaptAdan", "betas=0.9,0.99", "betas=0.98,0.92,0.99"),
        ("Prodigy", "growth_rate=fast", "is not a number"),
        ("AdamWScheduleFree", "warmup_steps=0.1", "is not a whole number"),
    ],
)
def test_wrong_arguments_have_remedies(name: str, pair: str, says: str) -> None:
    (mistake,) = choose_optimizer(options(name, pair)).mistakes
    assert "optimizer_args" in mistake.what and says in str(mistake) and mistake.remedy


@pytest.mark.parametrize(
    ("name", "pair", "value"),
    [
        ("AdamW", "weight_decay=0", 0),
        ("AdamW", "betas=(0.9, 0.99)", (0.9, 0.99)),
        ("AdamW", "betas=[0.9, 0.99]", [0.9, 0.99]),
        ("AdamW", "foreach=None", None),
        ("Adafactor", "relative_step=0", 0),
        ("Adafactor", "beta1=0.9", 0.9),
        ("Prodigy", "beta3=0.9", 0.9),
        ("Prodigy", "growth_rate=inf", math.inf),
        ("AdamWScheduleFree", "warmup_steps=10.0", 10.0),
    ],
)
def test_values_of_the_right_type(name: str, pair: str, value: object) -> None:
    choice = choose_optimizer(options(name, pair))
    assert not choice.mistakes and choice.arguments[pair.partition("=")[0]] == value


def test_a_class_without_a_required_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_optimizer.py").write_text(
        "class Own:\n    def __init__(self, params, lr, rho, *, sharp: 'Optional[bool]' = None): ...\n", "utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (mistake,) = choose_optimizer(options("own_optimizer.Own", "sharp=True")).mistakes
    assert "own_optimizer.Own needs rho" in mistake.what and "--optimizer_args rho=" in mistake.remedy
    (mistake,) = choose_optimizer(options("own_optimizer.Own", "rho=1", "sharp=maybe")).mistakes
    assert "sharp=maybe is not True or False or None" in mistake.what


@pytest.mark.parametrize("row", OPTIMIZERS, ids=lambda row: row.name)
def test_arguments_of_every_optimizer_are_known_without_importing_it(row: OptimizerRow) -> None:
    choice = choose_optimizer(options(row.name, "no_such_argument=1"))
    assert any("no_such_argument" in mistake.what for mistake in choice.mistakes)


def test_a_misspelt_name_gets_the_closest_one() -> None:
    (mistake,) = choose_optimizer(options("AdamW9bit")).mistakes
    assert "AdamW9bit" in mistake.what and "AdamW8bit" in mistake.remedy
    (mistake,) = choose_optimizer(options("Zorro")).mistakes
    assert "Prodigy" in mistake.remedy


@pytest.mark.parametrize("name", [row.name for row in OPTIMIZERS if row.package])
def test_an_absent_package_is_a_mistake_with_its_install_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (mistake,) = choose_optimizer(options(name)).mistakes
    running = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    assert name in mistake.what and mistake.remedy == f"{running} -m pip install {ROWS[name].package}"
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert re.search(rf"(^|pip install ){re.escape(ROWS[name].package)}\s", pins, re.MULTILINE)


def test_any_class_can_be_named_by_its_path() -> None:
    for name in ("torch.optim.NAdam", "NAdam", "bitsandbytes.optim.Adam8bit", "dadaptation.DAdaptAdam"):
        toy = Toy(options(name, learning_rate=1e-2))
        losses = [toy.step() for _ in range(3)]
        assert type(toy.optimizer).__name__ == name.split(".")[-1]
        assert all(loss > 0 for loss in losses)


def test_a_class_under_its_own_name_has_its_own_defaults() -> None:
    assert choose_optimizer(options("SGD")).arguments == {}
    assert choose_optimizer(options("SGDNesterov")).arguments == {"momentum": 0.9, "nesterov": True}
    assert choose_optimizer(options("SGDNesterov", "momentum=0.5")).arguments["momentum"] == 0.5


def test_a_path_that_does_not_exist_is_a_mistake() -> None:
    for name, says in (
        ("no_such_package.Some", "not installed"),
        ("torch.optim.NoSuch", "NoSuch"),
        ("torch.no_such_module.Some", "no_such_module"),
        ("LBFGS", "several losses"),
    ):
        (mistake,) = choose_optimizer(options(name)).mistakes
        assert says in mistake.what


def test_a_constructor_that_refuses_is_a_user_error() -> None:
    choice = choose_optimizer(options("AdamW", "betas=2,3"))
    with pytest.raises(UserError, match="betas"):
        make_optimizer(choice, [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.1}])


def test_adamw_uses_its_fused_kernel_where_it_may() -> None:
    assert Toy(options("AdamW")).optimizer.param_groups[0]["fused"] is True
    assert not Toy(options("AdamW", "foreach=True")).optimizer.param_groups[0]["fused"]
    assert not Toy(options("AdamW"), uses_scaler=True).optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("arguments", [(), ("amsgrad=True",), ("foreach=True",)], ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_allocated_state_equals_that_of_the_first_step(arguments: tuple[str, ...], dtype: torch.dtype) -> None:
    late, early = Toy(options("AdamW", *arguments), dtype), Toy(options("AdamW", *arguments), dtype)
    allocate_state(early.optimizer)
    held = [value.data_ptr() for state in early.optimizer.state.values() for value in state.values()]
    assert [late.step() for _ in range(3)] == [early.step() for _ in range(3)]
    assert bits(late.weights()) == bits(early.weights())
    for parameter, twin in zip(late.weights(), early.weights(), strict=True):
        own, other = late.optimizer.state[parameter], early.optimizer.state[twin]
        assert own.keys() == other.keys()
        for key, value in own.items():
            assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key
    assert held == [value.data_ptr() for state in early.optimizer.state.values() for value in state.values()]


def test_the_state_of_other_optimizers_is_not_allocated() -> None:
    toy = Toy(options("Lion"))
    allocate_state(toy.optimizer)
    assert not toy.optimizer.state


def test_each_part_has_its_own_rate() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, (1e-3, 1e-4), strict=True)]
    optimizer = make_optimizer(choose_optimizer(options("AdamW")), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]


def test_adafactor_sets_its_own_rate_by_default() -> None:
    own = choose_optimizer(options("Adafactor", learning_rate=1e-4))
    assert own.relative_step and own.arguments["relative_step"] is True and len(own.notes) == 1
    assert "learning rate" in own.notes[0]

    fixed = choose_optimizer(options("Adafactor", "relative_step=False", "scale_parameter=False", learning_rate=1e-4))
    assert not fixed.relative_step
    assert any("max_grad_norm" in note for note in fixed.notes) and any(
        "constant_with_warmup" in n for n in fixed.notes
    )
    group = make_optimizer(fixed, [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1e-4}]).param_groups[0]
    assert group["lr"] == 1e-4

    forced = choose_optimizer(options("Adafactor", "relative_step=False", "warmup_init=True"))
    assert forced.relative_step and any("warmup_init" in note for note in forced.notes)


@pytest.mark.parametrize("name", [row.name for row in OPTIMIZERS if row.learning_rate_free])
def test_rates_of_learning_rate_free_optimizers(name: str) -> None:
    assert not choose_optimizer(options(name, learning_rate=1.0)).notes
    assert any("about 1" in note for note in choose_optimizer(options(name, learning_rate=1e-5)).notes)
    assert not choose_optimizer(options(name, learning_rate=1.0, learning_rate_te=1.0)).mistakes
    assert not choose_optimizer(options(name, learning_rate=1.0, learning_rate_te=0.0)).mistakes
    (mistake,) = choose_optimizer(options(name, learning_rate=1.0, learning_rate_te=0.5)).mistakes
    assert "learning_rate_te" in mistake.what
    untrained = options(name, learning_rate=1.0, learning_rate_te=0.5, stop_text_encoder_training=0)
    assert not choose_optimizer(untrained).mistakes


@pytest.mark.parametrize("name", NAMES)
def test_full_fp16_needs_precise_state_or_a_large_eps(name: str) -> None:
    mistakes = choose_optimizer(options(name), full_fp16=True).mistakes
    assert bool(mistakes) == (name not in FULL_FP16_SAFE)
    if mistakes:
        assert "full_fp16" in mistakes[0].what and "8bit" in mistakes[0].remedy
    assert not choose_optimizer(options(name)).mistakes


def test_the_eps_that_full_fp16_needs() -> None:
    assert not choose_optimizer(options("AdamW", "eps=1e-4"), full_fp16=True).mistakes
    assert choose_optimizer(options("AdamW", "eps=9e-5"), full_fp16=True).mistakes
    assert choose_optimizer(options("Lion", "eps=1e-4"), full_fp16=True).mistakes


def test_choosing_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from library.options.groups.optimizer import OptimizerOptions\n"
        "from library.training.optim.optimizers import OPTIMIZERS, choose_optimizer\n"
        "from library.training.optim.schedules import choose_schedule\n"
        "for name in [row.name for row in OPTIMIZERS] + ['NAdam', 'bitsandbytes.optim.Adam8bit', 'Nope']:\n"
        "    options = OptimizerOptions(optimizer_type=name, optimizer_args=('a=1',), lr_scheduler_type='StepLR')\n"
        "    choose_schedule(options, 100, choose_optimizer(options, full_fp16=True))\n"
        "sys.exit(bool({'torch', 'numpy', 'transformers', 'bitsandbytes'} & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
