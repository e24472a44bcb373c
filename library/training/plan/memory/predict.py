"""Predict the memory of a run from shapes, without torch: weights by format, and what the passes of the family's
modules leave (library/footprint). Counted, not measured; tests hold it to what torch allocates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from library.footprint.ledger import Ledger
from library.footprint.module import Module
from library.footprint.tape import FULL, Tape
from library.runtime.precision import BYTES
from library.training.plan.ahead import encodes_captions_ahead
from library.training.plan.memory.assumptions import COPIES_OF_THE_LARGEST, DEVICES, STEP_COPIES, DeviceMemory
from library.training.plan.memory.prediction import Moment, Prediction
from library.training.plan.memory.tiles import TILE, count_in_tiles
from library.training.plan.memory.weights import WeightsOnDevice
from library.training.update.plan import AT_ONCE

if TYPE_CHECKING:
    from library.footprint.model import Conditions, Footprint
    from library.training.adapter.plan import AdapterPlan
    from library.training.averaging.plan import AveragesPlan
    from library.training.blocks.plan import BlocksPlan
    from library.training.optim.learning_rates import Optimization
    from library.training.plan.costs import Costs
    from library.training.plan.facts import RunFacts
    from library.training.preservation.base_plan import BasePlan

Size = tuple[int, int]
_CAPTIONS_AT_ONCE = 16  # training/inputs.py
_IDS = 8  # bytes of a token's id
_LOSS_COPIES = 8  # latents, noise, target and what the loss makes of them, each in fp32


@dataclass(frozen=True)
class RunShape:
    """What of a plan decides its memory. `draws`: the size of the images that are drawn meanwhile; None: none."""

    facts: RunFacts
    optimization: Optimization
    adapter: AdapterPlan | None
    averages: AveragesPlan
    base: BasePlan | None
    blocks: BlocksPlan
    costs: Costs
    draws: Size | None


def predict_memory(run: RunShape) -> Prediction | None:
    """The memory of a run; None if it cannot be told: one that FSDP or DeepSpeed shares out, or a third-party network
    module, whose layers are known only when it is made."""
    family = run.facts.base_model.family
    unknown = run.adapter is not None and run.adapter.layers is None
    shared_out = run.facts.sharding is not None or run.facts.zero is not None
    if family.footprint is None or unknown or shared_out:
        return None
    return _Prediction(run, family.footprint).whole()


@dataclass(frozen=True)
class _Prediction:
    run: RunShape
    passes: Footprint
    memo: dict[str, Ledger] = field(default_factory=dict)

    @cached_property
    def device(self) -> DeviceMemory:
        return DEVICES[self.run.facts.machine.kind]

    @cached_property
    def weights(self) -> WeightsOnDevice:
        return WeightsOnDevice(self.run.facts, self.run.optimization, self.run.adapter)

    def whole(self) -> Prediction:
        """All moments that may be the peak."""
        return Prediction(tuple(self.moments()), self.device.context, self.device.spare)

    def moments(self) -> Iterator[Moment]:
        """The moments of a run in order."""
        options = self.run.facts.options
        if options.cache.cache_latents:
            yield self._encoding_images()
        if self.caches_text:
            yield self._encoding_captions()
        step = self._step()
        yield self._moment("a step", step)
        yield self._moment("the update of the weights", self._update())
        if self.run.draws is not None:
            yield self._drawing(self.run.draws)

    # What is there all the time.

    @cached_property
    def caches_text(self) -> bool:
        facts = self.run.facts
        active = self.weights.active
        return encodes_captions_ahead(facts, frozen=active.isdisjoint(facts.base_model.family.text_encoders))

    @cached_property
    def kept(self) -> Mapping[str, int]:
        """Bytes that are there in every step, by title."""
        facts, costs = self.run.facts, self.run.costs
        titles = facts.base_model.family.module_titles
        on_cpu = facts.machine.is_cpu
        saves_all = on_cpu and self.run.adapter is None  # what is saved at the end stays in main memory
        keeps_text = not self.caches_text or (self.run.draws is not None and not self._text_by_flag) or saves_all
        keeps_vae = not facts.options.cache.cache_latents or saves_all
        modules = [name for name in titles if name == facts.base_model.family.backbone or keeps_text]
        parts = {f"weights of the {titles[name]}": self._on_device(name) for name in modules}
        parts["weights of the VAE"] = self.weights.bytes_of("vae") if keeps_vae else 0
        parts["weights of the adapter"] = self.weights.adapter
        parts["optimizer state"] = costs.optimizer
        ema = self.run.averages.ema
        parts["EMA"] = 0 if ema is not None and ema.on_cpu and not on_cpu else costs.average
        parts["base model to compare with"] = costs.base
        parts["workspace of libraries"] = self.device.workspace
        return parts

    def _on_device(self, module: str) -> int:
        """Bytes of a module's weights, without those that are swapped to main memory."""
        is_backbone = module == self.run.facts.base_model.family.backbone
        return self.weights.bytes_of(module) - (self.run.blocks.swapped_bytes if is_backbone else 0)

    @property
    def _text_by_flag(self) -> bool:
        return self.run.facts.options.cache.cache_text_encoder_outputs

    def _moment(self, title: str, ledger: Ledger) -> Moment:
        at_peak = ledger.at_peak
        more = {"gradients": at_peak["gradients"], "activations": at_peak["activations"]}
        return Moment(title, {name: size for name, size in {**self.kept, **more}.items() if size})

    # Moments before the first step.

    def _encoding_images(self) -> Moment:
        """The VAE alone, on a card."""
        facts = self.run.facts
        size = max((each[1] for each in self.batches), key=math.prod)
        ledger = Ledger(self.device.granularity)
        self._encode(ledger, facts.options.cache.vae_batch_size, size)
        parts = {"weights of the VAE": self.weights.bytes_of("vae"), "activations": ledger.peak}
        if facts.machine.is_cpu:
            parts = {**self._weights_alone(), "activations": ledger.peak}
        return Moment("encoding images", parts)

    def _encoding_captions(self) -> Moment:
        """The text encoders: on a card, the backbone comes after them."""
        ledger = Ledger(self.device.granularity)
        tape = Tape(ledger, mode="off")
        self._conditioning(tape, self.modules(tape), _CAPTIONS_AT_ONCE)
        parts = self._weights_alone()
        if not self.run.facts.machine.is_cpu:
            del parts[f"weights of the {self.run.facts.base_model.family.backbone_title}"]
        return Moment("encoding captions", {**parts, "activations": ledger.peak})

    def _weights_alone(self) -> dict[str, int]:
        titles = self.run.facts.base_model.family.module_titles
        parts = {f"weights of the {title}": self._on_device(name) for name, title in titles.items()}
        return {**parts, "weights of the adapter": self.weights.adapter}

    # A step.

    @cached_property
    def batches(self) -> list[tuple[int, Size]]:
        """The largest batch of each bucket: samples, and their size in pixels."""
        images = self.run.facts.images
        datasets = images.scan.datasets
        return [
            (min(datasets[number].batch_size, count), bucket)
            for (number, bucket), count in images.table.samples.items()
        ]

    def modules(self, tape: Tape) -> dict[str, Module]:
        """The modules of the model on a tape."""
        made = {name: self.weights.on_tape(name, tape) for name in self.run.facts.base_model.sizes.shapes}
        if self.run.blocks.policy == "half":  # blocks/checkpoints.py, every_second
            made[self.run.facts.base_model.family.backbone].not_again = [*self.run.blocks.sizes][1::2]
        return made

    def _tape(self, ledger: Ledger) -> Tape:
        precision = self.run.facts.precision
        return Tape(
            ledger,
            compute=None if precision.mixed_precision == "no" else BYTES[precision.mixed_precision],
            wide_norms=self.device.wide_norms,
            attention_extra=self.device.attention_extra,
            inputs_leave=self.run.blocks.to_host,
            keeps_attention=self.run.blocks.policy == "attention",
        )

    def _step(self) -> Ledger:
        """Forward and backward pass of the largest batch, with the gradients of earlier batches of the window."""
        found = [self._pass_of(*batch) for batch in dict.fromkeys(self.largest_batches())]
        return max(found, key=lambda ledger: ledger.peak)

    def largest_batches(self) -> list[tuple[int, Size]]:
        """The batches with the most pixels."""
        most = max(samples * math.prod(size) for samples, size in self.batches)
        return [each for each in self.batches if each[0] * math.prod(each[1]) == most][:1]

    def _pass_of(self, samples: int, size: Size) -> Ledger:
        facts, family = self.run.facts, self.run.facts.base_model.family
        ledger = Ledger(self.device.granularity)
        tape = self._tape(ledger)
        modules = self.modules(tape)
        held = []  # what is there from the beginning of the step to its end
        if facts.window > facts.launch.world or facts.launch.world > 1:  # of batches before, or of other processes
            held.append(ledger.allocate(self.weights.gradient_bytes, "gradients"))
            tape.held = 0 if facts.launch.world == 1 else None  # added to those that are there
        if not facts.options.cache.cache_latents:
            held.append(ledger.allocate(FULL * 3 * samples * math.prod(size)))
            self._encode(ledger, samples, size)
        rows = samples * (1 + self._further_rows())
        stride = family.latent.stride
        shape = (rows, family.latent.channels, -(-size[1] // stride), -(-size[0] // stride))
        own = [tape.new(shape, FULL) for _ in range(_LOSS_COPIES)]
        conditioning = self._conditioning(tape, modules, rows)
        if facts.preservation.of_base or facts.options.rollout.scheduled_sampling_max_step_offset:
            with tape.without_gradients():
                self.passes.predict(modules[family.backbone], own[0], conditioning)
        output = self.passes.predict(modules[family.backbone], own[0], conditioning)
        tape.autocast_ends()
        update = self.run.optimization.update
        if update.fuses:
            tape.held = self.weights.trained_values // update.groups if update.groups else AT_ONCE
            tape.update_bytes = self._update_bytes()
            if update.rounding is not None:  # a gradient in float32 takes the place of the one in bf16
                tape.update_frees, tape.update_more = True, FULL * self.weights.largest_trained
        if update.two_passes:
            tape.backward(output, measuring=True)
        tape.backward(output)
        return ledger

    def _further_rows(self) -> int:
        names = {anchor.name for anchor in self.run.facts.preservation.anchors}
        return len(names & {"class_prompt", "blank_prompt"})

    def _conditioning(self, tape: Tape, modules: Mapping[str, Module], rows: int) -> Conditions:
        """The conditioning of a batch: encoded now, with gradients if encoders are trained, or from the cache."""
        facts = self.run.facts
        tokenizer = facts.base_model.tokenizer
        chunks, length = max(1, tokenizer.limit // 75), 77
        ids = {name: tape.new((rows, chunks, length), _IDS) for name in facts.base_model.family.text_encoders}
        skipped = max(0, (facts.options.model.clip_skip or 1) - 1)
        if tape.mode == "off" or not self.caches_text:
            return self.passes.encode_text(modules, ids, skipped=skipped)
        elsewhere = Tape(Ledger(), mode="off")
        beside = {name: Module(elsewhere, module.tensors) for name, module in modules.items()}
        made = self.passes.encode_text(beside, ids, skipped=skipped)
        return {name: tape.new(tensor.shape, BYTES[facts.precision.frozen]) for name, tensor in made.items()}

    def _encode(self, ledger: Ledger, samples: int, size: Size) -> None:
        """Pixels to latents by the VAE, without gradients."""
        tape = Tape(ledger, mode="off")
        vae = self.weights.on_tape("vae", tape)
        pixels = tape.new((samples, 3, size[1], size[0]), vae.width)
        count_in_tiles(self.passes.encode_images, vae, pixels, self._tile or max(size))

    @property
    def _tile(self) -> int | None:
        """Pixels of a side of the VAE's tiles; None: it has none."""
        return TILE if self.run.facts.options.memory.vae_tiling else None

    def _update(self) -> Ledger:
        """The gradients, and what the optimizer makes besides."""
        ledger = Ledger(self.device.granularity)
        update = self.run.optimization.update
        if update.fuses:  # in the backward pass
            return ledger
        gradients = ledger.allocate(self.weights.gradient_bytes, "gradients")
        values = self.weights.trained_values
        if update.per_tensor and (update.rounding is not None or update.offloads):
            values = min(values, AT_ONCE + self.weights.largest_trained)
        ledger.allocate(self._update_bytes() * values)
        row = self.run.optimization.optimizer.row
        if row.path not in STEP_COPIES and not row.path.startswith("bitsandbytes."):
            ledger.allocate(COPIES_OF_THE_LARGEST * FULL * self.weights.largest_trained)
        del gradients
        return ledger

    def _update_bytes(self) -> int:
        """Bytes for each value that is stepped at once: copies that the optimizer makes, weights and gradients in
        float32 that are rounded afterwards, and state that comes from main memory."""
        facts, optimization = self.run.facts, self.run.optimization
        width, row, update = BYTES[facts.precision.trained], optimization.optimizer.row, optimization.update
        copies = STEP_COPIES.get(row.path, 0.0)
        if row.path == "torch.optim.adamw.AdamW" and facts.precision.uses_scaler:
            copies = 1.0  # the fused kernel would skip overflowed steps unseen
        rounded = 2 * FULL if update.rounding is not None else 0
        state, form = 0.0, update.state_format(width)
        if update.offloads:
            state = optimization.optimizer.state_bytes_per_parameter(form, self.weights.trained_shapes)
        return round(copies * width + rounded + state)

    # Between steps.

    def _drawing(self, size: Size) -> Moment:
        """An image with guidance: two rows of the backbone without gradients, then the VAE's decoder."""
        family = self.run.facts.base_model.family
        ledger = Ledger(self.device.granularity)
        tape = self._tape(ledger)
        tape.mode = "off"
        modules = self.modules(tape)
        stride = family.latent.stride
        shape = (1, family.latent.channels, size[1] // stride, size[0] // stride)
        noisy = tape.new((2, *shape[1:]), FULL)
        self.passes.predict(modules[family.backbone], noisy, self._conditioning(tape, modules, 2))
        tape.autocast_ends()
        vae = self.weights.on_tape("vae", Tape(ledger, mode="off"))
        latents = tape.new(shape, vae.width)
        count_in_tiles(self.passes.decode_latents, vae, latents, (self._tile or max(size)) // stride)
        moment = self._moment("drawing", ledger)
        return Moment("drawing", {**moment.parts, "weights of the VAE": self.weights.bytes_of("vae")})
