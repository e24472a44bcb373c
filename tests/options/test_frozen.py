"""Frozen names, types and defaults of flags, which users' commands and front-ends rely on."""

from __future__ import annotations

import dataclasses
import json

import pytest

from library.options.future_flags import FUTURE_FLAGS
from library.options.parse import DREAMBOOTH, FINE_TUNING, SDXL
from library.options.train_options import FLAGS, GROUPS, TrainOptions

# name, type, default (JSON), choices: the command line of kohya's scripts (sd-scripts), mid-2026
THIS_VERSION = """
bucket_no_upscale bool false
bucket_reso_steps int 64
cache_latents bool false
cache_latents_to_disk bool false
caption_extension str ".caption"
caption_extention str null
clip_skip int null
color_aug bool false
config_file str null
console_log_file str null
console_log_level str null DEBUG|INFO|WARNING|ERROR|CRITICAL
console_log_simple bool false
ddp_gradient_as_bucket_view bool false
ddp_static_graph bool false
ddp_timeout int null
debug_dataset bool false
enable_bucket bool false
flip_aug bool false
full_bf16 bool false
full_fp16 bool false
fused_backward_pass bool false
fused_optimizer_groups int null
gradient_accumulation_steps int 1
gradient_checkpointing bool false
highvram bool false
keep_tokens int 0
learning_rate float 2e-06
learning_rate_te float null
log_config bool false
log_prefix str null
log_tracker_config str null
log_tracker_name str null
log_with str null tensorboard|wandb|all
logging_dir str null
lowram bool false
lr_decay_steps int_or_float 0
lr_scheduler str "constant"
lr_scheduler_args list[str] null
lr_scheduler_min_lr_ratio float null
lr_scheduler_num_cycles int 1
lr_scheduler_power float 1
lr_scheduler_timescale int null
lr_scheduler_type str ""
lr_warmup_steps int_or_float 0
max_bucket_reso int 1024
max_data_loader_n_workers int 8
max_grad_norm float 1.0
max_nonfinite_steps int 0
max_token_length int null 150|225
max_train_epochs int null
max_train_steps int 1600
mem_eff_attn bool false
metadata_author str null
metadata_description str null
metadata_is_negative_embedding str null
metadata_license str null
metadata_merged_from str null
metadata_preprocessor str null
metadata_tags str null
metadata_thumbnail str null
metadata_title str null
metadata_trigger_phrase str null
metadata_usage_hint str null
min_bucket_reso int 256
mixed_precision str "no" no|fp16|bf16
no_half_vae bool false
no_token_padding bool false
optimizer_args list[str] null
optimizer_type str ""
output_config bool false
output_dir str null
output_name str null
pretrained_model_name_or_path str null
prior_loss_weight float 1.0
random_crop bool false
reg_data_dir str null
resolution str null
resume str null
save_every_n_epochs int null
save_every_n_steps int null
save_last_n_epochs int null
save_last_n_epochs_state int null
save_last_n_steps int null
save_last_n_steps_state int null
save_model_as str null ckpt|safetensors|diffusers|diffusers_safetensors|pt
save_n_epoch_ratio int null
save_precision str null float|fp16|bf16
save_state bool false
save_state_on_train_end bool false
sdpa bool false
seed int null
shuffle_caption bool false
stop_text_encoder_training int null
tokenizer_cache_dir str null
train_batch_size int 1
train_data_dir str null
training_comment str null
use_8bit_adam bool false
use_lion_optimizer bool false
use_safetensors bool false
v2 bool false
v_parameterization bool false
vae str null
vae_batch_size int 1
xformers bool false
# Hugging Face Hub
async_upload bool false
huggingface_path_in_repo str null
huggingface_repo_id str null
huggingface_repo_type str null
huggingface_repo_visibility str null
huggingface_token str null
resume_from_huggingface bool false
save_state_to_huggingface bool false
# data
alpha_mask bool false
cache_text_encoder_outputs bool false
cache_text_encoder_outputs_to_disk bool false
caption_dropout_every_n_epochs int 0
caption_dropout_rate float 0.0
caption_prefix str null
caption_separator str ","
caption_suffix str null
caption_tag_dropout_rate float 0.0
conditioning_data_dir str null
dataset_config Path null
dataset_repeats int 1
enable_wildcard bool false
face_crop_aug_range str null
in_json str null
keep_tokens_separator str ""
masked_loss bool false
resize_interpolation str null lanczos|nearest|bilinear|linear|bicubic|cubic|area
secondary_separator str null
skip_cache_check bool false
token_warmup_min int 1
token_warmup_step float 0
weighted_captions bool false
# objective and adapters
adaptive_noise_scale float null
base_weights list[path] null
base_weights_multiplier list[float] null
debiased_estimation_loss bool false
dim_from_weights bool false
huber_c float 0.1
huber_scale float 1.0
huber_schedule str "snr" constant|exponential|snr
initial_epoch int null
initial_step int null
ip_noise_gamma float null
ip_noise_gamma_random_strength bool false
loss_type str "l2" l1|l2|huber|smooth_l1
max_timestep int null
max_validation_steps int null
min_snr_gamma float null
min_timestep int null
multires_noise_discount float 0.3
multires_noise_iterations int null
network_alpha float 1
network_args list[str] null
network_dim int null
network_dropout float null
network_module str null
network_train_text_encoder_only bool false
network_train_unet_only bool false
network_weights str null
fp8_base bool false
fp8_base_unet bool false
no_metadata bool false
noise_offset float null
noise_offset_random_strength bool false
sample_at_first bool false
sample_every_n_epochs int null
sample_every_n_steps int null
sample_prompts str null
sample_sampler str "ddim" ddim|pndm|lms|euler|euler_a|heun|dpm_2|dpm_2_a|dpmsolver|dpmsolver++|dpmsingle|unipc|k_lms|k_euler|k_euler_a|k_dpm_2|k_dpm_2_a
scale_v_pred_loss_like_noise_pred bool false
scale_weight_norms float null
skip_until_initial_step bool false
text_encoder_lr list[float] null
unet_lr float null
v_pred_like_loss float null
validate_every_n_epochs int null
validate_every_n_steps int null
validation_seed int null
validation_split float 0.0
wandb_api_key str null
wandb_run_name str null
zero_terminal_snr bool false
# SDXL (block_lr there is the text of such a list)
block_lr list[float] null
diffusers_xformers bool false
disable_mmap_load_safetensors bool false
learning_rate_te1 float null
learning_rate_te2 float null
train_text_encoder bool false
blocks_to_swap int null
cpu_offload_checkpointing bool false
dynamo_backend str "inductor" eager|aot_eager|inductor|aot_ts_nvfuser|nvprims_nvfuser|cudagraphs|ofi|fx2trt|onnxrt|tensort|ipex|tvm
torch_compile bool false
compile bool false
compile_backend str "inductor"
compile_cache_size_limit int null
compile_dynamic str null true|false|auto
compile_fullgraph bool false
compile_mode str "default"
deepspeed bool false
fp16_master_weights_and_gradients bool false
offload_optimizer_device str null cpu|nvme
offload_optimizer_nvme_path str null
offload_param_device str null cpu|nvme
offload_param_nvme_path str null
zero3_init_flag bool false
zero3_save_16bit_model bool false
zero_stage int 2 0|1|2|3
"""  # noqa: E501
LATER_VERSIONS = """
# data
cache_info bool false
persistent_data_loader_workers bool false
dataset_class str null
# sd-scripts 0.10 and 0.11
cuda_allow_tf32 bool false
cuda_cudnn_benchmark bool false
show_timesteps str null image|console
show_timesteps_offset float null
show_timesteps_resolution str null
skip_image_resolution str null
train_inpainting bool false
leco_denoise_guidance_scale float 3.0
max_denoising_steps int 40
prompts_file str null
# other models and textual inversion
ae str null
apply_lg_attn_mask bool false
apply_t5_attn_mask bool false
block_swap_h2d_only bool false
block_swap_ring_size int 2
clip_g str null
clip_g_dropout_rate float 0.0
clip_l str null
clip_l_dropout_rate float 0.0
controlnet_model_name_or_path str null
discrete_flow_shift float 3.0
enable_scaled_pos_embed bool false
guidance_scale float 3.5
init_word str null
logit_mean float 0.0
logit_std float 1.0
mode_scale float 1.29
model_prediction_type str "sigma_scaled"
model_type str "flux"
num_vectors_per_token int 1
pos_emb_random_crop_rate float 0.0
save_clip bool false
save_t5xxl bool false
sigmoid_scale float 1.0
split_mode bool false
t5_dropout_rate float 0.0
t5xxl str null
t5xxl_device str null
t5xxl_dtype str null
t5xxl_max_token_length int null
text_encoder_batch_size int null
timestep_sampling str "sigma"
token_string str null
training_shift float 1.0
use_object_template bool false
use_style_template bool false
weighting_scheme str "uniform"
weights str null
double_blocks_to_swap int null
single_blocks_to_swap int null
qwen_image_vae_2d bool false
# SimpleTuner
scheduled_sampling_order int 2
scheduled_sampling_reflexflow bool false
scheduled_sampling_reflexflow_alpha float 1.0
scheduled_sampling_reflexflow_beta1 float 10.0
scheduled_sampling_reflexflow_beta2 float 1.0
"""
OUR_OWN = (
    *("bf16_rounding", "fused_backward_clipping", "offload_optimizer", "vram"),
    *("dry_run", "strict", "write_inference_yaml", "data_backend_config", "class_tokens", "num_repeats"),
    "loss_read_interval",
    *("data_cache_dir", "alpha_color", "caption_encoding", "mask_floor", "mask_invert", "mask_normalise"),
    *("cache_format", "multires_noise_scaling", "timestep_bias_strategy", "timestep_bias_multiplier"),
    *("timestep_bias_portion", "timestep_bias_begin", "timestep_bias_end", "debiased_v_weight", "snr_floor"),
    *("base_precision", "sample_batch_size", "text_projection", "empty_caption", "crop_conditioning"),
    *("max_image_memory", "shard_buffer", "allow_unknown_keys", "webhook_config"),
    *("evaluation_prompts", "evaluation_dino", "evaluation_clip", "evaluation_subject", "evaluation_class"),
    *("evaluation_images_per_prompt", "evaluate_every_n_steps", "evaluate_every_n_epochs"),
    *("validation_preview_steps", "preview_decoder", "preview_tae", "preview_target"),
    *("use_ema", "ema_of", "ema_decay", "ema_horizon", "ema_update_interval", "ema_warmup_steps"),
    *("base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision", "text_encoder_3_precision"),
    "quantise_probe",
    "preview_refiner",
    *("preservation", "preservation_identifier", "preservation_class"),
    *("preservation_base", "preservation_draws"),
    *("ema_device", "ema_save", "ema_validation", "posthoc_ema_snapshots"),
    *(
        f"scheduled_sampling_{name}"
        for name in (
            *("max_step_offset", "probability", "ramp_steps", "start_step", "ramp_shape", "prob_start", "prob_end"),
            *("strategy", "sampler", "target", "stride", "inference_steps"),
        )
    ),
    *("data_aesthetic_score", "refiner_training_strength", "refiner_training_invert_schedule"),
    *("keep_best", "early_stop"),
    *("gradient_checkpointing_policy", "vae_tiling"),
)

KINDS = {
    "bool": {"switch"},
    "int": {"integer"},
    "float": {"number"},
    "int_or_float": {"steps or share"},
    "str": {"text", "path", "path or URL", "width,height", "from,to"},
    "Path": {"path"},
    "list[str]": {"list"},
    "list[float]": {"numbers"},
    "list[path]": {"paths"},
}


def rows(table: str) -> dict[str, tuple[str, object, list[str]]]:
    """name -> (type, default, choices) of a frozen table."""
    found: dict[str, tuple[str, object, list[str]]] = {}
    for line in table.strip().splitlines():
        if not line.startswith("#"):
            name, kind, default, *choices = line.split(" ")
            found[name] = kind, json.loads(default), choices[0].split("|") if choices else []
    return found


KNOWN = rows(THIS_VERSION) | rows(LATER_VERSIONS)


def test_every_known_flag_is_ours_or_of_a_later_version_and_none_is_both() -> None:
    assert len(rows(THIS_VERSION)) == 211 and len(rows(LATER_VERSIONS)) == 59
    aliases = {alias for flag in FLAGS.values() for alias in flag.aliases}
    assert {*FLAGS, *aliases} == {*rows(THIS_VERSION), *OUR_OWN}
    assert set(FUTURE_FLAGS) == set(rows(LATER_VERSIONS))


@pytest.mark.parametrize("name", [name for name in KNOWN if name in FLAGS])
def test_types_defaults_and_choices_of_this_version(name: str) -> None:
    kind, default, choices = KNOWN[name]
    flag = FLAGS[name]
    ours = SDXL.defaults.get(name, flag.default)
    assert flag.kind in KINDS[kind]
    assert ours == (() if kind.startswith("list") else default)
    assert type(ours) is type(default) or default is None
    if choices:
        assert [str(choice) for choice in flag.choices] == choices


@pytest.mark.parametrize("name", [name for name in KNOWN if name in FUTURE_FLAGS])
def test_types_and_defaults_of_later_versions(name: str) -> None:
    kind, default, _ = KNOWN[name]
    assert FUTURE_FLAGS[name].kind in KINDS[kind]
    assert FUTURE_FLAGS[name].default == default


def test_the_default_of_the_text_encoder_rate_and_our_own_flags() -> None:
    options = TrainOptions()
    assert options.optimizer.learning_rate_te is None
    assert not (options.run.dry_run or options.run.strict or options.saving.write_inference_yaml)


def test_programs_differ_in_training_the_text_encoder_by_default() -> None:
    """In sd-scripts, train_db.py always trains it; the other two only with --train_text_encoder."""
    assert FLAGS["train_text_encoder"].default is True and not DREAMBOOTH.defaults
    assert SDXL.defaults == FINE_TUNING.defaults == {"train_text_encoder": False}


def test_options_are_frozen_and_every_field_is_one_flag_of_one_group() -> None:
    fields = [field.name for options in GROUPS.values() for field in dataclasses.fields(options)]
    assert fields == list(FLAGS) and len(set(fields)) == len(fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainOptions().run.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_has_a_sentence(name: str) -> None:
    text = FLAGS[name].help
    assert text.endswith(".") and text[0].isupper() and len(text) > 15


def test_capabilities_that_flags_need() -> None:
    """Capabilities that families declare; a flag that needs another one would be refused by all of them."""
    assert {flag.name: flag.needs for flag in FLAGS.values() if flag.needs} == {
        "scheduled_sampling_max_step_offset": "rollout",
        "text_projection": "pooled",
        "preview_refiner": "hand_over",
        "empty_caption": "pooled",
        "crop_conditioning": "size_conditioning",
        "data_aesthetic_score": "aesthetic_score",
        "no_token_padding": "unpadded",
        "refiner_training_strength": "hand_over",
        "refiner_training_invert_schedule": "hand_over",
        "learning_rate_te1": "text_encoder_rates",
        "learning_rate_te2": "text_encoder_rates",
        "block_lr": "block_lr",
        "v2": "v2",
        "min_snr_gamma": "snr",
        "clip_skip": "clip_skip",
        "v_parameterization": "v_prediction",
        "max_token_length": "chunks",
        "write_inference_yaml": "inference_yaml",
        "weighted_captions": "weighted_captions",
        "debiased_estimation_loss": "snr",
        "debiased_v_weight": "snr",
        "scale_v_pred_loss_like_noise_pred": "snr",
        "v_pred_like_loss": "snr",
        "zero_terminal_snr": "snr",
        "snr_floor": "snr",
    }


def test_flags_that_must_not_change_on_resume() -> None:
    """Saved states name these options: one more would refuse states that were saved without it, one fewer would let
    a run go on as another one."""
    assert {flag.name for flag in FLAGS.values() if not flag.may_change_on_resume} == set(
        """
        vae clip_skip max_token_length no_token_padding text_projection
        resolution train_batch_size enable_bucket bucket_no_upscale min_bucket_reso max_bucket_reso bucket_reso_steps
        resize_interpolation alpha_color color_aug flip_aug random_crop face_crop_aug_range crop_conditioning
        data_aesthetic_score shard_buffer
        caption_prefix caption_suffix caption_separator secondary_separator enable_wildcard shuffle_caption keep_tokens
        keep_tokens_separator token_warmup_min token_warmup_step caption_dropout_rate caption_dropout_every_n_epochs
        caption_tag_dropout_rate empty_caption weighted_captions
        masked_loss alpha_mask mask_floor mask_invert mask_normalise
        cache_latents cache_text_encoder_outputs
        prior_loss_weight min_snr_gamma noise_offset noise_offset_random_strength adaptive_noise_scale
        multires_noise_iterations multires_noise_discount multires_noise_scaling ip_noise_gamma
        ip_noise_gamma_random_strength loss_type huber_schedule huber_c huber_scale min_timestep max_timestep
        timestep_bias_strategy timestep_bias_multiplier timestep_bias_portion timestep_bias_begin timestep_bias_end
        debiased_estimation_loss debiased_v_weight scale_v_pred_loss_like_noise_pred v_pred_like_loss snr_floor
        refiner_training_strength refiner_training_invert_schedule
        network_module network_dim network_alpha network_args network_dropout network_weights dim_from_weights
        base_weights base_weights_multiplier network_train_unet_only network_train_text_encoder_only unet_lr
        text_encoder_lr scale_weight_norms
        scheduled_sampling_max_step_offset scheduled_sampling_probability scheduled_sampling_ramp_steps
        scheduled_sampling_start_step scheduled_sampling_ramp_shape scheduled_sampling_prob_start
        scheduled_sampling_prob_end scheduled_sampling_strategy scheduled_sampling_sampler scheduled_sampling_target
        scheduled_sampling_stride scheduled_sampling_inference_steps
        optimizer_type optimizer_args learning_rate learning_rate_te learning_rate_te1 learning_rate_te2 block_lr
        max_grad_norm train_text_encoder stop_text_encoder_training lr_scheduler lr_scheduler_args lr_scheduler_type
        lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_timescale
        lr_scheduler_min_lr_ratio
        preservation preservation_identifier preservation_class preservation_base preservation_draws
        use_ema ema_of ema_decay ema_horizon ema_update_interval ema_warmup_steps posthoc_ema_snapshots
        gradient_accumulation_steps vae_tiling no_half_vae base_precision
        base_model_precision text_encoder_1_precision text_encoder_2_precision text_encoder_3_precision
        fp8_base fp8_base_unet
        """.split()
    )


def test_neutral_values_for_flags_of_another_kind_of_training() -> None:
    assert {flag.name: flag.neutral_elsewhere for flag in FLAGS.values() if flag.neutral_elsewhere} == {
        "learning_rate_te": (0.0,),
        "learning_rate_te1": (0.0,),
        "learning_rate_te2": (0.0,),
        "train_text_encoder": (True,),
        "stop_text_encoder_training": (0, -1),
        "use_safetensors": (True,),
    }


def test_metadata_keys_are_unique() -> None:
    keys = [flag.metadata for flag in FLAGS.values() if flag.metadata]
    assert len(set(keys)) == len(keys)
