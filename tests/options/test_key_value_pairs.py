"""Several key=value in one text, as front-ends write and shells pass them."""

from __future__ import annotations

import tomllib

import pytest

from library.options.convert_values import BadValue, convert
from library.options.parse import ADAPTERS, parse
from library.options.train_options import FLAGS

PAIR_FLAGS = [name for name, flag in FLAGS.items() if flag.pairs]


def test_the_flags() -> None:
    assert sorted(PAIR_FLAGS) == ["lr_scheduler_args", "network_args", "optimizer_args"]


@pytest.mark.parametrize("name", PAIR_FLAGS)
@pytest.mark.parametrize(
    ("raw", "pairs"),
    [
        (["a=False b=False c=False"], ["a=False", "b=False", "c=False"]),
        ("a=False b=False", ["a=False", "b=False"]),
        (["a=4,b=1"], ["a=4", "b=1"]),
        (["a=4, b=1"], ["a=4", "b=1"]),
        (["a = 4 , b = 1,"], ["a=4", "b=1"]),
        (["a=4;b=1"], ["a=4", "b=1"]),
        (["a=4 ,b=1"], ["a=4", "b=1"]),
        (["a=1 b=2", "c=3"], ["a=1", "b=2", "c=3"]),
        (["a=1,"], ["a=1"]),
        (["a=1", "a=1"], ["a=1"]),
        (["", "a=1"], ["a=1"]),
        # commas and blanks that belong to a value
        ("betas=(0.9, 0.99)", ["betas=(0.9, 0.99)"]),
        (["betas=(0.9, 0.99), eps=1e-8"], ["betas=(0.9, 0.99)", "eps=1e-8"]),
        (["betas=[0.9, 0.99] eps=1e-8"], ["betas=[0.9, 0.99]", "eps=1e-8"]),
        (["betas=0.9,0.99 eps=1e-8"], ["betas=0.9,0.99", "eps=1e-8"]),
        (["betas=0.9,0.99"], ["betas=0.9,0.99"]),
        (["betas=0.9, 0.99"], ["betas=0.9, 0.99"]),
        (["step_rules=1:10, 0.1:20, 0.01"], ["step_rules=1:10, 0.1:20, 0.01"]),
        (["down=0.5,,2 up=cosine+.5"], ["down=0.5,,2", "up=cosine+.5"]),
        (["up=0.1,0.2,,"], ["up=0.1,0.2,,"]),
        (["preset=C:/my presets/a, b.toml"], ["preset=C:/my presets/a, b.toml"]),
        (["word='a b, c=d' x=2"], ["word='a b, c=d'", "x=2"]),
        (["a="], ["a="]),
        (["a=b=c"], ["a=b=c"]),
    ],
)
def test_what_is_read(name: str, raw: object, pairs: list[str]) -> None:
    assert convert(FLAGS[name], raw)[0] == tuple(pairs)


@pytest.mark.parametrize("name", PAIR_FLAGS)
@pytest.mark.parametrize(
    ("raw", "stray", "write"),
    [
        (["weight_decay=0.1 oops"], '"oops"', '"weight_decay=0.1"'),
        (["oops weight_decay=0.1"], "oops", "key=value"),
        (["weight_decay"], "weight_decay", "key=value"),
        (["=0.1"], "=0.1", "key=value"),
        ([";"], '";"', "key=value"),
        ([" , "], '","', "key=value"),
        (["betas=0.9 0.99"], '"0.99"', '"betas=0.9,0.99"'),
        (["betas=0.9,0.99,eps=1e-8"], "several arguments", '"betas=0.9,0.99" "eps=1e-8"'),
        (["betas=0.9, 0.99 eps=1e-8"], '"0.99"', '"betas=0.9,0.99" "eps=1e-8"'),
        (["a=True false"], '"false"', '"a=True"'),
        (["a=1", "a=2"], "sets a twice", "keep one"),
        (["a=1 a=2"], "sets a twice", "keep one"),
    ],
)
def test_what_could_mean_two_things_is_refused_with_the_way_out(name: str, raw: object, stray: str, write: str) -> None:
    with pytest.raises(BadValue) as raised:
        convert(FLAGS[name], raw)
    assert stray in raised.value.fault and write in raised.value.remedy


@pytest.mark.parametrize(
    "line",
    [
        'optimizer_args = "scale_parameter=False relative_step=False warmup_init=False"',
        'optimizer_args = ["scale_parameter=False relative_step=False warmup_init=False"]',
        'optimizer_args = ["scale_parameter=False,relative_step=False,warmup_init=False"]',
    ],
)
def test_command_line_and_file_are_read_alike(line: str) -> None:
    (value,) = tomllib.loads(line).values()
    expected = ("scale_parameter=False", "relative_step=False", "warmup_init=False")
    assert convert(FLAGS["optimizer_args"], value)[0] == expected
    words = value if isinstance(value, list) else [value]
    for argv in (["--optimizer_args", *words], [f"--optimizer_args={words[0]}"]):
        assert parse(argv, ADAPTERS).options.optimizer.optimizer_args == expected
