"""Read SimpleTuner's config.json as options: flat JSON whose keys are its flags, with or without dashes.

A key becomes the flag with the same meaning. What means nothing for the trained weights is listed in one note, what
would change them is a mistake that says what to use here. Keys that SimpleTuner does not have are flags of this
program, or unknown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from library.bounded import json_of
from library.options.convert_values import ON, format_value
from library.options.flag import Script
from library.options.mistakes import Mistakes
from library.options.rules.program_flags import TRAINS
from library.options.simpletuner_keys import (
    DEFAULTS,
    IGNORED,
    IGNORED_PREFIXES,
    KEYS,
    LR_END,
    OPTIMIZERS,
    PROMPT_OPTIONS,
    Key,
)
from library.options.sources import COMMAND_LINE, RawOption
from library.options.unknown_names import ALLOW

_NOT_SET: tuple[object, ...] = (None, "", "None", [])
_OFF_WORDS = ("none", "no", "off")
_OFF = (False, 0, *_OFF_WORDS)
_FULL_PIPELINE = ("pipeline_mode", "stage1_model", "stage2_model")
_SCRIPTS: Mapping[object, Script] = {"lora": "train_network.py", "full": "train_db.py"}
_NEAREST = (("lion", "Lion"), ("schedulefree", "AdamWScheduleFree"), ("prodigy", "Prodigy"), ("8bit", "AdamW8bit"))


@dataclass(frozen=True)
class Target:
    """The program that a file is read for: its kind of training (None: any), the names of the flags on its command
    line and of all its flags, and whether keys may be left out (--allow_unknown_keys)."""

    script: Script | None
    given: frozenset[str]
    known: Collection[str]
    allow: bool


def read_simpletuner(
    tree: Mapping[str, object], name: str, target: Target, mistakes: Mistakes, notes: list[str]
) -> Iterator[RawOption]:
    """Yield the options of a parsed file; `name` is its name in messages. Mistakes and notes are added to the lists."""
    values = dict[str, object]()
    for key, raw in tree.items():
        plain = key.strip().lstrip("-")
        if plain in values and values[plain] != raw:
            mistakes.add(f"{plain} is set twice in {name}", "keep one of them")
        values[plain] = raw
    reader = _Reader({key: raw for key, raw in values.items() if raw not in _NOT_SET}, name, target, mistakes, notes)
    yield from reader.read()


def _plain(raw: object) -> object:
    """The value that a text spells: "true", "0.1" and "20" are written for true, 0.1 and 20."""
    if not isinstance(raw, str):
        return raw
    text = raw.strip()
    try:
        return json_of(text.lower())
    except ValueError:
        return text


@dataclass
class _Reader:
    """Reads the keys of one file that are set. `rest` holds those that no method has read yet."""

    values: Mapping[str, object]
    name: str
    target: Target
    mistakes: Mistakes
    notes: list[str]
    idle: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rest = dict(self.values)

    def read(self) -> Iterator[RawOption]:
        yield from self._kind_of_training()
        yield from self._text_encoder()
        yield from self._optimizer()
        yield from self._schedule()
        yield from self._clipping()
        yield from self._checkpoints()
        yield from self._resume()
        yield from self._logs()
        yield from self._attention()
        self._webhooks()
        yield from self._previews()
        yield from self._refiner()
        for key in list(self.rest):
            raw = self.rest.pop(key)
            if key in KEYS:
                yield from self._row(key, raw, KEYS[key])
            elif key in IGNORED or (key.startswith(IGNORED_PREFIXES) and key not in self.target.known):
                self._ignore(key, raw)
            elif isinstance(raw, dict):
                what = f"{key} ({self.name}) is an object, but the file is flat: one value for each key"
                self.mistakes.add(what, "write its members as keys of their own, or remove it")
            else:
                yield RawOption(key, raw, self.name)
        self._tell()

    def _row(self, key: str, raw: object, row: Key) -> Iterator[RawOption]:
        value = _plain(raw)
        if not self._has_effect(row.only_with):
            self._ignore(key, raw)
        elif row.flag:
            value = row.reads.get(value, raw) if isinstance(value, str | int) else raw
            if value is not None:
                yield self._option(row.flag, key, value)
        elif value is not False and value not in (*_OFF_WORDS, *row.neutral):
            self._refuse(key, raw, row.remedy, row.instead)

    def _has_effect(self, condition: str) -> bool:
        """Whether a condition holds: "key" must be on; "key=value" must not be set to another value."""
        governor, _, required = condition.partition("=")
        value = _plain(self.values.get(governor))
        if required:
            return value in (None, required)
        return not condition or (value is not None and value not in _OFF)

    def _option(self, flag: str, key: str, value: object) -> RawOption:
        return RawOption(flag, value, self.name if flag == key else f"{self.name}: {key}")

    def _take(self, key: str) -> object:
        """The plain value of a key, which is then read; None if it is not set, or not one value."""
        value = _plain(self.rest.pop(key, None))
        if isinstance(value, dict | list):
            self.mistakes.add(f"{self._show(key)} is not one value", "write one text, number, true or false")
            return None
        return value

    def _ignore(self, key: str, raw: object) -> None:
        if _plain(raw) not in _OFF:
            self.idle.append(key)

    def _show(self, key: str) -> str:
        return f"{key} = {format_value(self.values[key])} ({self.name})"

    def _refuse(self, key: str, raw: object, remedy: str, instead: Collection[str] = ()) -> None:
        """A mistake, unless a flag of the command line takes the key's place or unknown keys are allowed."""
        replaced = next((flag for flag in instead if flag in self.target.given), None)
        if replaced:
            self.notes.append(f"{self._show(key)} is not read: --{replaced} ({COMMAND_LINE}) takes its place")
        elif self.target.allow:
            self._ignore(key, raw)
        else:
            self.mistakes.add(f"{self._show(key)} has no counterpart here", f"{remedy}; or train without it: {ALLOW}")

    def _kind_of_training(self) -> Iterator[RawOption]:
        """model_type decides the program there."""
        kind, script = self._take("model_type"), self.target.script
        right = _SCRIPTS.get(kind)
        if kind is not None and right is None:
            self._refuse("model_type", kind, 'write "lora" or "full"')
        elif right is not None and script not in (None, right):
            what = f"{self._show('model_type')} trains {TRAINS[right]}; this program trains {TRAINS[script]}"
            self.mistakes.add(what, f"run {right}")
            self.rest = {key: raw for key, raw in self.rest.items() if not key.startswith("lora_")}
        yield from self._adapter(kind, needed=kind != "full" and right in (None, script))

    def _adapter(self, kind: object, *, needed: bool) -> Iterator[RawOption]:
        """The module of the adapter; that of PEFT has fewer layers than the one here."""
        lora, config = self._take("lora_type"), self._take("lycoris_config")
        named = "network_module" in self.target.given or "network_module" in self.values
        if not needed or named or kind is lora is None:
            return
        if lora == "lycoris":
            of = f" from {config}" if config else ""
            remedy = (
                'write "network_module": "lycoris.kohya" in its place, '
                f"linear_dim and linear_alpha{of} as network_dim and network_alpha, and the rest as network_args"
            )
            self._refuse("lora_type", lora, remedy)
        elif lora in (None, "standard"):
            key = "model_type" if lora is None else "lora_type"
            self.notes.append(
                f"{self._show(key)} is read as network_module networks.lora, which trains all layers of the "
                "transformer blocks; SimpleTuner trains those of the attention"
            )
            yield self._option("network_module", key, "networks.lora")
        else:
            self._refuse("lora_type", lora, 'write "standard", or a network_module')

    def _text_encoder(self) -> Iterator[RawOption]:
        trained, rate = self._take("train_text_encoder"), self._take("text_encoder_lr")
        adapter = self.target.script == "train_network.py"
        is_on = trained in (True, 1) or str(trained).lower() in ON
        if trained is not None and not adapter:
            yield self._option("train_text_encoder", "train_text_encoder", trained)
        elif trained is not None and not is_on:
            yield self._option("network_train_unet_only", "train_text_encoder", value=True)
        if rate is not None and (is_on or trained is None):
            yield self._option("text_encoder_lr" if adapter else "learning_rate_te", "text_encoder_lr", rate)
        elif rate is not None:
            self._ignore("text_encoder_lr", rate)

    def _optimizer(self) -> Iterator[RawOption]:
        """The optimizer with the arguments that it has there, as its defaults there differ from those here."""
        keys = [
            key for key in ("optimizer", "optimizer_config", "optimizer_beta1", "optimizer_beta2") if key in self.rest
        ]
        name, config, *betas = (self._take(key) for key in ("optimizer", "optimizer_config", "optimizer_beta1",
                                                            "optimizer_beta2"))  # fmt: skip
        if keys and "optimizer_type" in self.target.given:
            self.notes.append(
                f"{', '.join(keys)} ({self.name}): not read, --optimizer_type ({COMMAND_LINE}) takes their place"
            )
            return
        if name is not None and name not in OPTIMIZERS:
            near = next((ours for word, ours in _NEAREST if word in str(name).lower()), "AdamW")
            self._refuse("optimizer", name, f"set --optimizer_type, for example {near}, and its optimizer_args")
            return
        arguments = dict[str, str]()
        if name is not None:
            ours, defaults = OPTIMIZERS[str(name)]
            arguments.update(defaults)
            yield self._option("optimizer_type", "optimizer", ours)
        if config is not None:
            pairs = (pair.partition("=") for pair in str(self.values["optimizer_config"]).split(","))
            arguments.update({key.strip(): value.strip() for key, _, value in pairs if key.strip()})
        elif None not in betas:
            arguments["betas"] = ",".join(map(str, betas))
        if arguments:
            written = [f"{key}={value}" for key, value in arguments.items()]
            yield self._option("optimizer_args", keys[0], written)
        if name == "adamw_bf16":
            said = " ".join(f"{key}={value}" for key, value in arguments.items())
            why = "weights are float32 here, so no step is lost to rounding"
            self.notes.append(f"{self._show('optimizer')} is read as AdamW {said}: {why}")

    def _schedule(self) -> Iterator[RawOption]:
        name, end = self._take("lr_scheduler"), self._take("lr_end")
        if name in ("cosine", "cosine_with_restarts", "sine"):
            remedy = (
                "set --lr_scheduler: there it is a wave as long as lr_warmup_steps; here cosine falls once over the run"
            )
            self._refuse("lr_scheduler", name, remedy, ("lr_scheduler", "lr_scheduler_type"))
        elif name is not None:
            yield self._option("lr_scheduler", "lr_scheduler", name)
        if name == "polynomial" and not {"lr_scheduler", "lr_scheduler_args"} & self.target.given:
            written = self.values.get("lr_end", LR_END)
            yield self._option("lr_scheduler_args", "lr_end", [f"lr_end={written}"])
        elif end is not None:
            self._ignore("lr_end", end)

    def _clipping(self) -> Iterator[RawOption]:
        """Gradients are clipped value by value there, unless grad_clip_method is "norm"."""
        limit, method = self._take("max_grad_norm"), self.values.get("grad_clip_method")
        if limit is None:
            return
        if method == "norm" or limit == 0:
            yield self._option("max_grad_norm", "max_grad_norm", limit)
        elif method is None:
            remedy = 'add "grad_clip_method": "norm" to clip by the norm; SimpleTuner clips each value by default'
            self._refuse("max_grad_norm", limit, remedy, ("max_grad_norm",))

    def _checkpoints(self) -> Iterator[RawOption]:
        """A checkpoint there is the model and what a resumed run needs; the limit counts checkpoints."""
        newer, older = self._take("checkpoint_step_interval"), self._take("checkpointing_steps")
        every, limit = older if newer is None else newer, self._take("checkpoints_total_limit")
        by_epochs = _plain(self.rest.get("checkpoint_epoch_interval")) not in (None, 0)
        key = "checkpointing_steps" if newer is None else "checkpoint_step_interval"
        by_steps = every not in (None, 0)
        if by_steps:
            yield self._option("save_every_n_steps", key, every)
        if by_steps or by_epochs:
            yield self._option("save_state", key if by_steps else "checkpoint_epoch_interval", value=True)
        if isinstance(every, int) and isinstance(limit, int) and every > 0 and limit > 0:
            yield self._option("save_last_n_steps", "checkpoints_total_limit", max(1, every * (limit - 1)))
        if limit is not None and by_epochs:
            yield self._option("save_last_n_epochs", "checkpoints_total_limit", limit)

    def _resume(self) -> Iterator[RawOption]:
        """ "latest" there is the newest checkpoint in output_dir, or a new run if there is none: auto here."""
        named = self._take("resume_from_checkpoint")
        if named is None or "resume" in self.target.given:
            return
        given = self.values["resume_from_checkpoint"]
        yield self._option("resume", "resume_from_checkpoint", "auto" if named == "latest" else given)

    def _logs(self) -> Iterator[RawOption]:
        """Logs are written below output_dir there."""
        tracker, folder = self._take("report_to"), self._take("logging_dir")
        below = Path(str(self.values.get("output_dir", "")))
        if tracker in ("all", "tensorboard", "wandb"):
            yield self._option("log_with", "report_to", tracker)
        elif tracker is not None:
            self._ignore("report_to", tracker)
        if tracker in ("all", "tensorboard") or (folder is not None and tracker in (None, "wandb")):
            yield self._option("logging_dir", "logging_dir", str(below / str(folder or "logs")))
        elif folder is not None:
            self._ignore("logging_dir", folder)

    def _attention(self) -> Iterator[RawOption]:
        kind = self._take("attention_mechanism")
        if kind == "xformers":
            yield self._option("xformers", "attention_mechanism", value=True)
        elif kind not in (None, "diffusers"):
            self._ignore("attention_mechanism", kind)

    def _webhooks(self) -> None:
        """What stands in the file itself would be shown and saved with the options."""
        raw = self.values.get("webhook_config")
        if isinstance(raw, dict | list) or (isinstance(raw, str) and raw.lstrip().startswith(("{", "["))):
            del self.rest["webhook_config"]
            what = f"webhook_config ({self.name}) holds the webhook itself, and may hold a password"
            self.mistakes.add(what, "write it into a file of its own, and set webhook_config to its path")

    def _refiner(self) -> Iterator[RawOption]:
        """Previews of a base model that a refiner finishes. There it is downloaded if it is not named."""
        mode_key, base_key, refiner_key = (f"sdxl_validation_{name}" for name in _FULL_PIPELINE)
        mode, base, refiner = self._take(mode_key), self._take(base_key), self._take(refiner_key)
        is_full = mode == "full-pipeline"
        if is_full and refiner is not None:
            yield self._option("preview_refiner", refiner_key, refiner)
        elif is_full and "preview_refiner" not in {*self.target.given, *self.values}:
            remedy = f"name the refiner in {refiner_key} or with --preview_refiner"
            self.notes.append(f"{self._show(mode_key)}: no preview is refined; {remedy} (nothing is downloaded here)")
        elif refiner is not None:
            self._ignore(refiner_key, refiner)
        if mode not in (None, "trained-stage", "full-pipeline"):
            self._ignore(mode_key, mode)
        if base is not None:  # of a refiner in training, whose previews are images of the dataset
            self._ignore(base_key, base)

    def _previews(self) -> Iterator[RawOption]:
        """Pictures while an image is drawn; and one prompt, its settings in the words of kohya's prompt files."""
        if self._take("validation_preview") is True and "validation_preview_steps" not in self.rest:
            yield self._option("validation_preview_steps", "validation_preview", 1)
        prompt = self.values.get("validation_prompt")
        if not isinstance(prompt, str) or "sample_prompts" in self.target.given:
            return
        del self.rest["validation_prompt"]
        texts = {"": prompt, " --n ": str(self._take("validation_negative_prompt") or "")}
        if any("--" in text for text in texts.values()):
            self._refuse("validation_prompt", prompt, "write prompts with two dashes into a file for --sample_prompts")
            return
        line = "".join(mark + " ".join(text.split()) for mark, text in texts.items() if text)
        size = re.fullmatch(r"(\d{2,})(?:x(\d{2,}))?", str(self._take("validation_resolution") or "").lower())
        line += f" --w {size[1]} --h {size[2] or size[1]}" if size else ""
        for key, letter in PROMPT_OPTIONS.items():
            value = self._take(key)
            line += "" if value is None or str(value).startswith("-") else f" --{letter} {value}"
        yield self._option("sample_prompts", "validation_prompt", line)

    def _tell(self) -> None:
        if self.idle:
            images = "; images while training: --sample_prompts" if "validation_prompt" in self.idle else ""
            self.notes.append(
                f"keys of SimpleTuner in {self.name} that mean nothing here, ignored: {', '.join(self.idle)}{images}"
            )
        if "model_family" in self.values:  # a whole configuration, not a few keys of it
            unset = [f"{key} = {usual}" for key, usual in DEFAULTS.items() if self._uses_default(key)]
            if unset:
                self.notes.append(
                    f"not set in {self.name}, so the defaults of this program are used, where SimpleTuner has "
                    f"{', '.join(unset)}"
                )

    def _uses_default(self, key: str) -> bool:
        if key in self.values or (key == "ema_decay" and not self._has_effect("use_ema")):
            return False
        is_of_lora = key.startswith("lora_")
        return not is_of_lora or (self.values.get("model_type") == "lora" and self.values.get("lora_type") != "lycoris")
