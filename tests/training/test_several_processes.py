"""Two processes train as one: the same steps, samples, draws, gradients and files.

All runs of this file happen in one pair of processes (pairs.py), and are compared with runs of a single process that
has twice the accumulation, which therefore sees the same batches in each step.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train_db
import train_network
from tests.evaluation import tiny_encoders
from tests.training.pairs import Case, run_pair
from tests.training.running import Outcome, World, make_world, run

RECIPES = {"train_db": train_db.RECIPE, "train_network": train_network.RECIPE}
LORA = {"network_module": "networks.lora", "network_dim": 2}

# name -> recipe and flags of the two processes; the single one has twice their accumulation
RUNS: dict[str, tuple[str, dict[str, object]]] = {
    # an odd number of batches, so that one rank computes along; accumulation; both modules trained, one of them stopped
    "all weights": (
        "train_db",
        {
            "train_text_encoder": True, "stop_text_encoder_training": 2, "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True, "reg_data_dir": True, "prior_loss_weight": 0.5, "max_train_epochs": 2,
            "train_batch_size": 2, "enable_bucket": True, "use_ema": True, "cache_latents": True,
            "cache_latents_to_disk": True, "validation_split": 0.4, "validate_every_n_steps": 2,
            "keep_best": "validation_loss", "early_stop": "validation_loss:9",
            # plain and slow: the miniature magnifies rounding, as one with another number of threads does
            "optimizer_type": "SGDNesterov", "learning_rate": 1e-4,
        },
    ),
    # anchors that are compared with the base model, rolled samples, averages of the weights
    "anchors": (
        "train_network",
        {
            "network_module": "networks.loha", "network_dim": 2, "max_train_steps": 2, "train_batch_size": 2,
            "preservation": ["class_prompt=1", "base_prediction=1"], "preservation_class": "dog",
            "preservation_identifier": "sks dog", "reg_data_dir": True, "scheduled_sampling_probability": 0.5,
            "scheduled_sampling_max_step_offset": 1, "ddp_gradient_as_bucket_view": True, "use_ema": True,
        },
    ),
    # dropout over a quantised base model; captions encoded ahead, previews drawn, images evaluated
    "adapter": (
        "train_network",
        {
            **LORA, "max_train_steps": 3, "network_dropout": 0.3, "network_args": ["module_dropout=0.4"],
            "cache_text_encoder_outputs": True, "network_train_unet_only": True, "cache_latents": True,
            "save_every_n_steps": 2, "save_state": True, "base_model_precision": "int8", "sample_every_n_steps": 2,
            "posthoc_ema_snapshots": 1, "evaluation_prompts": True, "evaluate_every_n_steps": 3,
        },
    ),
}  # fmt: skip
RESUMED = "adapter"


def words_of(world: World, name: str, out: Path, accumulation: int) -> list[str]:
    flags = {"min_bucket_reso": 64, "bucket_reso_steps": 32} | RUNS[name][1]
    if flags.get("reg_data_dir"):
        flags["reg_data_dir"] = world.root / "reg"
    if "sample_every_n_steps" in flags:
        prompts = world.root / "prompts.txt"
        prompts.write_text("".join(f"a {word} --w 64 --h 64 --s 2 --d 1\n" for word in ("dog", "cat", "cow")), "utf-8")
        flags["sample_prompts"] = prompts
    if "evaluation_prompts" in flags:
        scenes = world.root / "scenes.txt"
        scenes.write_text("".join(f"a {{subject}}{scene} --w 64 --h 64 --s 1\n" for scene in ("", ", red")), "utf-8")
        flags |= {
            "evaluation_prompts": scenes, "evaluation_dino": world.root / "dino", "evaluation_subject": "sks dog",
            "evaluation_class": "dog",
        }  # fmt: skip
    flags["gradient_accumulation_steps"] = int(str(flags.get("gradient_accumulation_steps", 1))) * accumulation
    return world.arguments(out, **flags)


def measured(said: str) -> list[float]:
    """The values of all evaluations of a run."""
    lines = [line for line in said.splitlines() if re.search(r"(base model|step \d+): DINO", line)]
    return [float(number) for line in lines for number in re.findall(r"\d\.\d+", line)]


@dataclass(frozen=True)
class Together:
    """What two processes did."""

    world: World
    root: Path
    runs: dict[str, list[Outcome]]
    calls: dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    root = tmp_path_factory.mktemp("together")
    world = make_world(root)
    tiny_encoders.write_dinov2(world.root / "dino")
    runs = {name: Case(module, words_of(world, name, root / name, 1)) for name, (module, _) in RUNS.items()}
    state = root / RESUMED / "dog-step00000002-state"
    words = [*words_of(world, RESUMED, root / "resumed", 1), "--resume", str(state)]
    runs["resumed"] = Case(RUNS[RESUMED][0], words)
    calls = {name: Case("tests.training.rank_calls", function=name) for name in ("compare_gradients", "exchange")}
    outcomes = run_pair([*calls.values(), *runs.values()], root / "pair")
    found = dict(zip([*calls, *runs], outcomes, strict=True))
    return Together(world, root, {name: found[name] for name in runs}, {name: found[name] for name in calls})


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(
    together: Together, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    first, second = together.runs[name]
    assert first.code == second.code == 0, first.err + str(second.code)
    alone = run(words_of(together.world, name, tmp_path, 2), capsys, RECIPES[RUNS[name][0]])
    assert alone.code == 0, alone.err

    # the same steps with the same losses, and the same file within float32
    assert first.losses.keys() == alone.losses.keys()
    assert all(first.losses[step] == pytest.approx(alone.losses[step], rel=1e-5) for step in alone.losses)
    assert {path.name for path in (together.root / name).iterdir()} == {path.name for path in tmp_path.iterdir()}
    drawn = [{path.name[:13] for path in (out / "sample").glob("*")} for out in (tmp_path, together.root / name)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == (3 if "sample_every_n_steps" in RUNS[name][1] else 0)
    one, two = load_file(tmp_path / "dog.safetensors"), load_file(together.root / name / "dog.safetensors")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert (tensor - two[key]).norm() <= 1e-5 * tensor.norm() + 1e-7, key
    before = load_file(together.world.model) if RUNS[name][0] == "train_db" else {}
    if before:  # what is left is the rounding of millions of weights; gradients are compared on their own
        changed = sum(float((tensor - before[key]).square().sum()) for key, tensor in one.items()) ** 0.5
        apart = sum(float((tensor - two[key]).square().sum()) for key, tensor in one.items()) ** 0.5
        assert apart < 2e-2 * changed

    # what was measured on the way, by both, is what one measures
    tables = [*tmp_path.glob("*.csv")]
    assert len(tables) == int("validation_split" in RUNS[name][1])
    for table in tables:
        texts = [(folder / table.name).read_text(encoding="utf-8") for folder in (tmp_path, together.root / name)]
        rows = [list(csv.DictReader(text.splitlines())) for text in texts]
        assert len(rows[0]) == len(rows[1]) > 1
        for alone_row, row in zip(*rows, strict=True):
            assert float(row["loss"]) == pytest.approx(float(alone_row["loss"]), rel=1e-4)

    # images that both drew are measured as those of one: of the base model, and after the last step
    values = [measured(outcome.err) for outcome in (alone, first)]
    assert values[0] == [pytest.approx(value, abs=2e-3) for value in values[1]]
    assert bool(values[0]) is ("evaluation_prompts" in RUNS[name][1])

    # one of them speaks: it says what the batch size means
    assert second.out == second.err == "" and not second.losses
    assert "2 processes" in first.out and "not multiplied by the processes" in first.out


def test_two_processes_resume_exactly(together: Together) -> None:
    (whole, _), (resumed, other) = together.runs[RESUMED], together.runs["resumed"]
    assert resumed.code == other.code == 0, resumed.err
    assert resumed.losses == {3: whole.losses[3]}
    one, two = (load_file(together.root / name / "dog.safetensors") for name in (RESUMED, "resumed"))
    assert one.keys() == two.keys() and all(tensor.equal(two[key]) for key, tensor in one.items())


def test_gradients_are_those_of_one_process_with_all_samples(together: Together) -> None:
    """In float64, with unequal batches, accumulation, gradient checkpointing, parameters that only some batches use and
    others that none does, and a rank that computes along."""
    for outcome in together.calls["compare_gradients"]:
        for name, found in outcome.code.items():  # type: ignore[attr-defined]
            assert found["difference"] < 1e-12, name
            assert found["without"] and found["some without"], name


def test_what_ranks_tell_each_other(together: Together) -> None:
    for rank, outcome in enumerate(together.calls["exchange"]):
        assert outcome.code == [3.0, [0, 1], "from 0", [rank], ["of the second"]]  # type: ignore[comparison-overlap]
