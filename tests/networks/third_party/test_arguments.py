"""What third-party modules do with their arguments, read from their source: nothing is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from networks.third_party.arguments import check_arguments, read_module_arguments

HEAD = (
    "import not_there\n\ndef create_network(multiplier, dim, alpha, vae, text_encoder, unet, extra=None, **kwargs):\n"
)
OWN = f"""{HEAD}
    rank = kwargs.get("rank", None)
    if rank is not None:
        rank = int(rank)
    scale = float(kwargs.get("scale", 1.0) or 1.0)
    flag = "flag" in kwargs and str_to_bool(kwargs["flag"])
    return Network(unet, rank, scale, flag, kwargs.pop("mode", "a"))
"""


def lycoris() -> Path:
    spec = importlib.util.find_spec("lycoris")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).with_name("kohya.py")


def mistakes(file: Path, **arguments: str) -> list[str]:
    found, _ = check_arguments("a.module", read_module_arguments(file), arguments)
    return [f"{what} -> {remedy}" for what, remedy in found]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN, encoding="utf-8")
    return file


def test_names_and_types_of_a_module_of_the_users_own(own: Path) -> None:
    assert not mistakes(own, rank="4", scale="0.5", flag="True", mode="anything", extra="x")
    for key, text, says in (
        ("rnk", "4", "did you mean rank?"),
        ("zebra", "4", "a.module reads extra, flag, mode, rank, scale"),
        ("rank", "four", "rank=four is not a whole number"),
        ("rank", "4.0", "rank=4.0 is not a whole number"),
        ("scale", "big", "scale=big is not a number"),
        ("flag", "perhaps", "flag=perhaps is not True or False"),
    ):
        (text_of_mistake,) = mistakes(own, **{key: text})
        assert says in text_of_mistake


def test_what_is_unknown_and_off_is_only_noted(own: Path) -> None:
    found, notes = check_arguments("own", read_module_arguments(own), {"zebra": "False"})
    assert not found and notes == ("--network_args zebra=False has no effect: own does not use it",)


@pytest.mark.parametrize("line", ["return other(**kwargs)", "log(kwargs)", "for key in kwargs: use(key)"])
def test_a_module_that_passes_its_arguments_on_may_know_any(line: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(f'{HEAD}    a = int(kwargs.get("a"))\n    {line}\n', encoding="utf-8")
    assert not mistakes(file, zebra="4")
    assert "a=x is not a whole number" in mistakes(file, a="x")[0]


def test_a_file_that_cannot_be_read_is_left_to_its_import(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def", encoding="utf-8")
    (tmp_path / "empty.py").write_text("", encoding="utf-8")
    assert not mistakes(tmp_path / "broken.py", a="1") and not mistakes(tmp_path / "empty.py", a="1")
    assert check_arguments("a", read_module_arguments(None), {"a": "1"}) == ([], ())


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("algo", "lorra", "has no such algo -> use lora, locon, loha, lokr"),
        ("preset", "nowhere.toml", "full, full-lin, attn-mlp"),
        ("conv_dim", "four", "is not a whole number"),
        ("conv_dimm", "4", "did you mean conv_dim?"),
        ("anchor", "0.3", "does not use anchor"),
        ("weight_decompose", "True", "did you mean dora_wd?"),  # that of LycorisNetworkKohya, never read from here
        ("use_dora", "True", "did you mean dora_wd?"),
        ("decompose", "True", "did you mean dora_wd (DoRA) or decompose_both (LoKr)?"),
        ("conv_lora_dim", "4", "does not use conv_lora_dim"),
        ("use_tucker", "Flase", "is not True or False"),
        ("dora_wd", "0", "is not True or False"),  # LyCORIS reads every word but "false" as true
    ],
)
def test_lycoris_refuses(key: str, text: str, says: str) -> None:
    (told,) = mistakes(lycoris(), **{key: text})
    assert says in told


def test_what_front_ends_send_to_lycoris_is_accepted(tmp_path: Path) -> None:
    """The arguments of kohya_ss's LyCORIS pages and of lora-scripts, with LyCORIS's older name `constrain`."""
    preset = tmp_path / "own preset.toml"
    preset.write_text("", encoding="utf-8")
    for algo in ("lora", "locon", "LoHa", "lokr", "dylora", "glora", "full", "diag-oft", "boft", "ia3"):
        assert not mistakes(
            lycoris(),
            algo=algo, preset="attn-mlp", conv_dim="8", conv_alpha="4", use_tucker="True", rank_dropout="0",
            bypass_mode="False", dora_wd="True", module_dropout="0.1", use_scalar="False", rank_dropout_scale="False",
            train_norm="True", factor="-1", decompose_both="False", full_matrix="False", constraint="0", block_size="4",
            rescaled="True", train_on_input="False", constrain="1e-3", dropout="",
        )  # fmt: skip
    assert not mistakes(lycoris(), preset=str(preset))
