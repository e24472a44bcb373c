"""SimpleTuner's config.json as --config_file: what each key becomes here, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.options.mistakes import Mistakes
from library.options.parse import ADAPTERS, DREAMBOOTH, Parsed, Program, parse
from library.options.simpletuner_keys import IGNORED, KEYS
from library.options.train_options import FLAGS
from library.sampling.prompts import ImageRequest, parse_line
from library.training.saving.outputs import decide_outputs

# As SimpleTuner's own example is written: dashes, and some numbers and switches as texts.
WHOLE = {
    "--resume_from_checkpoint": "latest",
    "--data_backend_config": "config/multidatabackend.json",
    "--aspect_bucket_rounding": 2,
    "--seed": 42,
    "--minimum_image_size": 0,
    "--output_dir": "output/models",
    "--lora_type": "standard",
    "--lora_rank": 16,
    "--lora_alpha": "16",
    "--max_train_steps": 10000,
    "--num_train_epochs": 0,
    "--checkpointing_steps": 500,
    "--checkpoints_total_limit": 5,
    "--hub_model_id": "simpletuner-lora",
    "--push_to_hub": "true",
    "--push_checkpoints_to_hub": False,
    "--report_to": "none",
    "--model_type": "lora",
    "--pretrained_model_name_or_path": "sdxl.safetensors",
    "--model_family": "sdxl",
    "--train_batch_size": 1,
    "--gradient_checkpointing": "true",
    "--train_text_encoder": "false",
    "--caption_dropout_probability": 0.1,
    "--resolution_type": "pixel_area",
    "--resolution": 1024,
    "--validation_seed": 7,
    "--validation_prompt": "A photo-realistic image of a cat",
    "--validation_guidance_rescale": "0.0",
    "--mixed_precision": "bf16",
    "--optimizer": "adamw_bf16",
    "--learning_rate": "1e-4",
    "--lr_scheduler": "polynomial",
    "--lr_warmup_steps": 100,
    "--use_ema": True,
    "--ema_decay": "",
    "--webhook_config": "hooks.json",
}  # fmt: skip
AS_FLAGS = (
    "--data_backend_config config/multidatabackend.json --seed 42 --output_dir output/models "
    "--network_module networks.lora --network_dim 16 --network_alpha 16 --max_train_steps 10000 "
    "--save_every_n_steps 500 --save_state --save_last_n_steps 2000 "
    "--pretrained_model_name_or_path sdxl.safetensors --train_batch_size 1 --gradient_checkpointing "
    "--network_train_unet_only --caption_dropout_rate 0.1 --resolution 1024 --mixed_precision bf16 "
    "--optimizer_type AdamW --optimizer_args weight_decay=0.01 eps=1e-6 --learning_rate 1e-4 "
    "--lr_scheduler polynomial --lr_scheduler_args lr_end=4e-7 --lr_warmup_steps 100 --use_ema "
    "--webhook_config hooks.json --resume auto"
).split() + ["--sample_prompts", "A photo-realistic image of a cat --d 7"]


def of(folder: Path, tree: object, *words: str, program: Program = ADAPTERS, name: str = "config.json") -> Parsed:
    text = tree if isinstance(tree, str) else json.dumps(tree)
    (folder / name).write_text(text, encoding="utf-8")
    return parse([f"--config_file={folder / name}", *words], program)


def values(parsed: Parsed, *names: str) -> list[object]:
    return [getattr(getattr(parsed.options, FLAGS[name].group), name) for name in names]


def told(parsed: Parsed) -> list[str]:
    """The mistakes about the file, not those about what is missing beside it."""
    return [f"{found.what} -> {found.remedy}" for found in parsed.mistakes if "is not set" not in found.what]


def test_a_whole_file_is_the_same_options_as_flags(tmp_path: Path) -> None:
    parsed, flags = of(tmp_path, WHOLE), parse(AS_FLAGS, ADAPTERS)
    assert not parsed.mistakes and not flags.mistakes
    different = [name for name in FLAGS if name != "config_file" and values(parsed, name) != values(flags, name)]
    assert not different
    assert parsed.set_by_user - flags.set_by_user == {"config_file"}


def test_what_is_ignored_is_one_note_without_what_is_off(tmp_path: Path) -> None:
    notes = " | ".join(of(tmp_path, WHOLE).notes)
    assert (
        "keys of SimpleTuner in config.json that mean nothing here, ignored: aspect_bucket_rounding, hub_model_id, "
        "push_to_hub"
    ) in notes
    assert "adamw_bf16" in notes and "networks.lora" in notes


def test_defaults_that_differ_are_told_of_a_whole_file_only(tmp_path: Path) -> None:
    (note,) = [note for note in of(tmp_path, WHOLE).notes if "defaults of this program" in note]
    assert note.endswith("SimpleTuner has max_grad_norm = 2 by value, lora_dropout = 0.1, ema_decay = 0.995")
    assert not of(tmp_path, {"learning_rate": 1e-4}).notes


@pytest.mark.parametrize("dashes", ["", "--"])
@pytest.mark.parametrize("raw", ["1e-4", 1e-4, " 0.0001 "])
def test_names_and_values_are_read_as_they_are_written(dashes: str, raw: object, tmp_path: Path) -> None:
    assert values(of(tmp_path, {f"{dashes}learning_rate": raw}), "learning_rate") == [1e-4]


@pytest.mark.parametrize("name", ["config", "config.json", "my.config.json"])
def test_the_extension_may_be_omitted(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name.removesuffix('.json')}.json").write_bytes(b'\xef\xbb\xbf{"seed": 3}')  # with a byte order mark
    parsed = parse([f"--config_file={tmp_path / name.removesuffix('.json')}"], ADAPTERS)
    assert values(parsed, "seed", "config_file") == [3, tmp_path / f"{name.removesuffix('.json')}.json"]


def test_flags_of_this_program_may_stand_in_it_and_the_command_line_overrides(tmp_path: Path) -> None:
    parsed = of(tmp_path, {"output_name": "dog", "seed": 1, "network_args": ["conv_dim=4"]}, "--seed=2")
    assert values(parsed, "output_name", "seed", "network_args") == ["dog", 2, ("conv_dim=4",)]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"seed": 0}, {"seed": None}),
        ({"seed": -1}, {"seed": None}),
        ({"num_train_epochs": 3, "max_train_steps": 0}, {"max_train_epochs": 3, "max_train_steps": 1600}),
        ({"prediction_type": "v_prediction"}, {"v_parameterization": True}),
        ({"prediction_type": "epsilon"}, {"v_parameterization": False}),
        ({"snr_gamma": 5, "rescale_betas_zero_snr": "true"}, {"min_snr_gamma": 5, "zero_terminal_snr": True}),
        ({"input_perturbation": 0.1, "input_perturbation_steps": 0}, {"ip_noise_gamma": 0.1}),
        ({"aspect_bucket_alignment": 32, "data_backend_config": "d.json"}, {"bucket_reso_steps": 32}),
        ({"noise_offset": 0.1}, {"noise_offset": None}),  # has no effect there without offset_noise
        ({"max_grad_norm": 0.5, "grad_clip_method": "norm"}, {"max_grad_norm": 0.5}),
        ({"optimizer": "bnb-adamw8bit", "optimizer_config": "eps=1e-8,weight_decay=0.1"},
         {"optimizer_type": "AdamW8bit", "optimizer_args": ("weight_decay=0.1", "eps=1e-8")}),
        ({"optimizer": "torch-adamw", "optimizer_beta1": 0.9, "optimizer_beta2": "0.99"},
         {"optimizer_type": "AdamW", "optimizer_args": ("weight_decay=0.01", "betas=0.9,0.99")}),
        ({"report_to": "tensorboard", "output_dir": "o"}, {"log_with": "tensorboard", "logging_dir": Path("o/logs")}),
        ({"report_to": "comet_ml", "logging_dir": "l"}, {"log_with": None, "logging_dir": None}),
        ({"attention_mechanism": "xformers"}, {"xformers": True}),
        ({"train_text_encoder": True, "text_encoder_lr": 1e-5}, {"text_encoder_lr": (1e-5,)}),
        ({"train_text_encoder": False, "text_encoder_lr": 1e-5},
         {"text_encoder_lr": (), "network_train_unet_only": True}),
        ({"lora_alpha": "None"}, {"network_alpha": 1}),
        ({"checkpoint_step_interval": 10, "checkpoints_total_limit": 1}, {"save_last_n_steps": 1}),
        ({"checkpoint_epoch_interval": 2, "checkpoints_total_limit": 3},
         {"save_every_n_epochs": 2, "save_last_n_epochs": 3, "save_state": True}),
        ({"checkpoint_epoch_interval": 0, "checkpointing_steps": 9, "checkpoints_total_limit": 3},
         {"save_every_n_epochs": None, "save_last_n_epochs": None, "save_last_n_steps": 18}),
        ({"checkpoint_epoch_interval": 0}, {"save_state": False}),
        ({"eval_steps_interval": 50, "eval_epoch_interval": 2, "num_eval_images": 4, "eval_loss_disable": False},
         {"validate_every_n_steps": 50, "validate_every_n_epochs": 2, "max_validation_steps": 4}),
    ],
)  # fmt: skip
def test_values_are_those_that_mean_the_same(
    tree: dict[str, object], expected: dict[str, object], tmp_path: Path
) -> None:
    parsed = of(tmp_path, tree, "--network_module=networks.lora")
    assert dict(zip(expected, values(parsed, *expected), strict=True)) == expected
    assert not told(parsed)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_as_many_checkpoints_are_kept(limit: int, tmp_path: Path) -> None:
    parsed = of(tmp_path, {"checkpointing_steps": 500, "checkpoints_total_limit": limit})
    kept = set[str]()
    outputs = decide_outputs(parsed.options.saving, "adapter", 1, Mistakes())
    for event in outputs.events(5000, 1, 5000):
        kept.add(outputs.stem(event))
        kept.discard(event.expired_model or "")
        assert len(kept) == min(limit, event.step // 500)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"model_family": "flux"}, "a model of Stable Diffusion 1, 2 or XL"),
        ({"model_type": "full"}, "this program trains an adapter, not the model itself -> run train_db.py"),
        ({"lora_type": "lycoris", "lycoris_config": "l.json"}, "from l.json as network_dim and network_alpha"),
        ({"lora_dropout": 0.1}, "set --network_dropout"),
        ({"use_dora": "true"}, "use_dora=True wd_on_output=True"),
        ({"optimizer": "optimi-lion"}, "for example Lion"),
        ({"lr_scheduler": "sine"}, "a wave as long as lr_warmup_steps"),
        ({"max_grad_norm": 2.0}, '"grad_clip_method": "norm"'),
        ({"offset_noise": True}, "set --noise_offset"),
        ({"caption_strategy": "textfile"}, "into the entries of the data_backend_config"),
        ({"resolution": 1.0, "resolution_type": "area"}, "together with resolution"),
        ({"use_soft_min_snr": 1}, "set --min_snr_gamma"),
        ({"text_encoder_4_precision": "int8-quanto"}, "remove it"),
        ({"controlnet": True}, "remove it"),
        ({"eval_loss_disable": True}, '"disabled": true to the entries of dataset_type eval'),
        ({"eval_epoch_interval": 0.5}, "eval_epoch_interval) is not a whole number"),
        ({"learning_rat": 1e-4}, "did you mean learning_rate?"),
        ({"nobody_knows": 1}, "sets what this program does not know"),
        ({"lora_rank": "x"}, "--network_dim = \"x\" (config.json: lora_rank) is not a number"),
        ({"train_batch_size": {"a": 1}}, "is not a number"),
        ({"optimizer": ["AdamW"]}, "optimizer = [\"AdamW\"] (config.json) is not one value"),
        ({"model_type": {"a": 1}}, "is not one value"),
        ({"model_type": '["lora"]'}, "model_type = \"[\"lora\"]\" (config.json) is not one value"),
        ({"optimizer": "[1]"}, "optimizer = \"[1]\" (config.json) is not one value"),
        ({"tree": {"a": 1}}, "tree (config.json) is an object, but the file is flat"),
        ({"seed": 1, "--seed": 2}, "seed is set twice in config.json"),
        ('{"seed": 1, "seed": 1}', "seed is set twice (config.json, line 1)"),
    ],
)  # fmt: skip
def test_what_would_change_the_weights_is_a_mistake_that_says_what_to_use(
    tree: object, words: str, tmp_path: Path
) -> None:
    (answer,) = told(of(tmp_path, tree))
    assert words in answer and "config.json" in answer


@pytest.mark.parametrize(
    ("tree", "flag", "note"),
    [
        ({"optimizer": "soap", "optimizer_config": "eps=1"}, "--optimizer_type=Lion", "optimizer, optimizer_config"),
        ({"lr_scheduler": "sine"}, "--lr_scheduler=cosine", "--lr_scheduler (command line) takes its place"),
        ({"max_grad_norm": 2}, "--max_grad_norm=1", "--max_grad_norm (command line) takes its place"),
        ({"lora_dropout": 0.1}, "--network_dropout=0.1", "--network_dropout (command line) takes its place"),
        ({"use_dora": True}, "--allow_unknown_keys", "ignored: use_dora"),
    ],
)
def test_a_flag_of_the_command_line_answers_it(tree: dict[str, object], flag: str, note: str, tmp_path: Path) -> None:
    parsed = of(tmp_path, tree, flag)
    assert not told(parsed) and any(note in said for said in parsed.notes)
    assert not parsed.options.optimizer.optimizer_args


def test_whole_models_have_their_own_flags(tmp_path: Path) -> None:
    tree = {"model_type": "full", "train_text_encoder": True, "text_encoder_lr": 1e-6, "lora_rank": 16}
    parsed = of(tmp_path, tree, program=DREAMBOOTH)
    assert values(parsed, "train_text_encoder", "learning_rate_te") == [True, 1e-6]
    assert not told(parsed) and any("ignored: lora_rank" in note for note in parsed.notes)
    (answer,) = told(of(tmp_path, {"model_type": "lora", "lora_rank": 4}, program=DREAMBOOTH))
    assert answer.endswith("run train_network.py")


def test_latest_is_auto(tmp_path: Path) -> None:
    """SimpleTuner goes on from the newest state, or begins if there is none."""
    tree = {"resume_from_checkpoint": "latest", "output_dir": str(tmp_path / "out")}
    assert values(of(tmp_path, tree), "resume") == [Path("auto")]
    assert values(of(tmp_path, tree, "--resume=elsewhere"), "resume") == [Path("elsewhere")]
    assert values(of(tmp_path, {**tree, "resume_from_checkpoint": "5"}), "resume") == [Path("5")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"seed": 1 // my seed\n}', "remove the comments, which JSON does not have"),
        ('# mine\n{"seed": 1}', "remove the comments, which JSON does not have"),
        ('{"seed": 1,\n}', "remove the comma before the closing bracket"),
        ('{"use_ema": True}', "in small letters"),
        ('{"output_dir": "C:\\models"}', "two backslashes or one slash"),
        ('{"output_dir": "C:\\train"}', "single backslashes: C:\\train"),  # valid, with a tab
        ("[1, 2]", "is JSON, but not one object"),
        ("3", "is JSON, but not one object"),
        ("[" * 100_000, "too deeply"),
        ('{"output_dir": "\\ud800"}', "half a character"),
    ],
)
def test_what_is_no_flat_json_is_one_mistake(text: str, words: str, tmp_path: Path) -> None:
    (mistake,) = of(tmp_path, text).mistakes
    assert words in f"{mistake.what} -> {mistake.remedy}" and "config.json" in mistake.what


def test_json_under_another_name_is_read_too(tmp_path: Path) -> None:
    assert values(of(tmp_path, {"seed": 4}, name="config.toml"), "seed") == [4]


# What SimpleTuner's guide for DreamBooth adds to config.json.
GUIDE = {
    "base_model_precision": "int8-quanto",
    "text_encoder_1_precision": "nf4-bnb",
    "scheduled_sampling_max_step_offset": 10,
    "scheduled_sampling_probability": 1.0,
    "scheduled_sampling_ramp_steps": 1000,
    "scheduled_sampling_sampler": "unipc",
    "use_ema": True,
    "data_aesthetic_score": 5.6,
}


@pytest.mark.parametrize("key", GUIDE)
def test_the_keys_of_the_guide_reach_their_flags(key: str, tmp_path: Path) -> None:
    parsed = of(tmp_path, {**GUIDE, "validation_preview": True, "validation_preview_steps": 1})
    assert values(parsed, key) == [GUIDE[key]] and parsed.origins[key] == "config.json"
    assert values(parsed, "validation_preview_steps") == [1]


# Of its documentation, and the flags that they are here.
PREVIEWS = {
    "validation_prompt": "a photo\n of sks dog", "validation_negative_prompt": "blurry, cropped", "validation_seed": 42,
    "validation_num_inference_steps": "20", "validation_guidance": 4.5, "validation_resolution": "1024x768",
    "validation_steps": 100, "validation_noise_scheduler": "euler-a", "validation_preview": True,
    "validation_preview_steps": 5,
}  # fmt: skip


def test_previews(tmp_path: Path) -> None:
    parsed = of(tmp_path, PREVIEWS)
    assert not told(parsed) and not [note for note in parsed.notes if "ignored" in note]
    (prompt,) = values(parsed, "sample_prompts")
    request = parse_line(str(prompt))
    expected = ImageRequest("a photo of sks dog", "blurry, cropped", 1024, 768, 42, 20, 4.5)
    assert request == expected
    names = ("sample_every_n_steps", "sample_sampler", "validation_preview_steps")
    assert values(parsed, *names) == [100, "euler_a", 5]


def test_previews_that_are_off_or_set_by_a_flag(tmp_path: Path) -> None:
    off = of(tmp_path, PREVIEWS | {"validation_preview": False})
    assert values(off, "validation_preview_steps") == [None]
    by_flag = of(tmp_path, PREVIEWS, "--sample_prompts=mine.txt")
    assert values(by_flag, "sample_prompts") == [Path("mine.txt")]
    assert not told(by_flag)
    square = of(tmp_path, PREVIEWS | {"validation_resolution": 512, "validation_seed": -1})
    request = parse_line(str(values(square, "sample_prompts")[0]))
    assert (request.width, request.height, request.seed) == (512, 512, None)
    assert any(
        "for --sample_prompts" in found for found in told(of(tmp_path, PREVIEWS | {"validation_prompt": "a --n b"}))
    )


def test_previews_that_a_refiner_finishes(tmp_path: Path) -> None:
    full = PREVIEWS | {"sdxl_validation_pipeline_mode": "full-pipeline"}
    named = of(tmp_path, {**full, "sdxl_validation_stage2_model": "refiner.safetensors"})
    assert values(named, "preview_refiner") == ["refiner.safetensors"] and not told(named)
    assert not any("refine" in note for note in named.notes)
    by_flag = of(tmp_path, full, "--preview_refiner=r.safetensors")
    assert values(by_flag, "preview_refiner") == ["r.safetensors"] and not told(by_flag)
    assert not any("refine" in note for note in by_flag.notes)
    unnamed = of(tmp_path, full)
    assert any("sdxl_validation_stage2_model or with --preview_refiner" in note for note in unnamed.notes)
    models = {"sdxl_validation_stage1_model": "base", "sdxl_validation_stage2_model": "refiner"}
    usual = of(tmp_path, {**PREVIEWS, **models, "sdxl_validation_pipeline_mode": "trained-stage"})
    assert values(usual, "preview_refiner") == [None]
    for parsed in (unnamed, usual):
        assert not told(parsed)
    assert any("stage1_model" in note and "stage2_model" in note for note in usual.notes)


def test_a_webhook_in_the_file_itself_is_refused_unseen(tmp_path: Path) -> None:
    hook = {"webhook_type": "discord", "webhook_url": "https://host/pass-word"}
    for written in (hook, [hook], json.dumps(hook)):
        parsed = of(tmp_path, {"webhook_config": written})
        (found,) = told(parsed)
        assert "a file of its own" in found and "pass-word" not in found
        assert values(parsed, "webhook_config") == [None]


def test_no_change_is_not_set_for_whole_models_too(tmp_path: Path) -> None:
    tree = {"base_model_precision": "no_change", "text_encoder_1_precision": "no_change"}
    assert not told(of(tmp_path, tree, program=DREAMBOOTH))


def test_every_key_leads_to_a_flag_that_exists() -> None:
    named = {flag for key in KEYS.values() for flag in (key.flag, *key.instead) if flag}
    assert named <= FLAGS.keys()
    assert IGNORED & FLAGS.keys() == {"noise_offset", "validation_seed"}  # which mean something else there
    assert not IGNORED & KEYS.keys()
    assert all(bool(key.flag) != bool(key.remedy) for key in KEYS.values())
