"""A training run from top to bottom: a table of contents of everything that happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.data.dataset import BatchLoader
from library.runtime.allocator import preallocate_heap
from library.runtime.signals import explain_interrupt
from library.runtime.transfers import reads_locked_memory
from library.training.after_step import Inputs, InTraining, build_after_step, build_saver, report
from library.training.averaging.weights import build_weights
from library.training.blocks.checkpoints import build_checkpoints
from library.training.blocks.compiled import compiling
from library.training.blocks.place import place
from library.training.conditioning import build_conditioner
from library.training.ending import end_stopped
from library.training.events.sinks import open_events
from library.training.gradients import build_gradients
from library.training.hub.uploads import uploading
from library.training.inputs import LatentEncoder, build_training_set, encode_captions_ahead, leave_text_encoders
from library.training.late import Late, skips_on_device
from library.training.left_out import LeftOut
from library.training.loading import load_model
from library.training.loop import Loop
from library.training.memory import (
    encoding_vae,
    fp16_gradients,
    offload_vae,
    prepare,
)
from library.training.nonfinite import NonFinite
from library.training.optim.optimizers import make_optimizer
from library.training.optim.schedules import make_schedule, try_out
from library.training.plan.summary import summary
from library.training.preservation.preservation import build_preservation
from library.training.preview.drawing import build_prompt_encoder
from library.training.quantised.probe import with_probe
from library.training.rollout import build_rollout
from library.training.run import open_run
from library.training.saving.loss_curve import begin_curve
from library.training.saving.rescue import Rescue
from library.training.saving.state import RandomStates, RunState, load_state
from library.training.saving.state_writer import StateWriter, free_memory
from library.training.saving.trained_weights import weights_of
from library.training.sharding.shards import join, shard
from library.training.sharding.zero import share_by_zero
from library.training.steps import Steps
from library.training.trainable import parameter_groups, wrap
from library.training.training_loss import build_training_loss
from library.training.update.fused import build_backward
from library.training.update.stepping import Stepping, build_stepping

if TYPE_CHECKING:
    from library.training.averaging.weights import Weights
    from library.training.plan.plan import Plan
    from library.training.recipe import Recipe
    from library.training.trainable import Trainable


Agreeing = Callable[[], AbstractContextManager[None]]
AllAlike = Callable[[str], bool]


def train(plan: Plan, recipe: Recipe, agreeing: Agreeing = nullcontext, all_alike: AllAlike | None = None) -> None:
    """Run a plan as `recipe` says. `agreeing`: see open_run; `all_alike`: see Rescue. Raises UserError."""
    facts, options, precision = plan.facts, plan.facts.options, plan.facts.precision
    began = time.monotonic()
    events = partial(open_events, plan.outputs.record, plan.trackers.webhooks, summary(plan), plan.start)
    with (
        # freed gradients would fragment the heap: 11 % more memory at the peak
        preallocate_heap(plan.costs.training - plan.costs.gradients if facts.machine.is_cpu else 0),
        open_run(options, plan.trackers, precision.mixed_precision, facts.seed, events, agreeing) as run,
        uploading(plan.uploads, run) as uploads,
        compiling(plan.blocks.compilation, run.say, twice=plan.optimization.update.two_passes),
    ):
        # Load the model and choose what to train, if the optimizer accepts its arguments.
        rates = plan.optimization.learning_rates
        try_out(plan.optimization.optimizer, plan.optimization.schedule, max((*rates.modules.values(), *rates.blocks)))
        base_format = "fp32" if plan.adapter is None else precision.base
        model = load_model(
            options, facts.base_model, run.device, run.say, base=base_format, quantisation=facts.quantisation
        )
        trainable = recipe.choose(model, facts, plan.optimization, plan.adapter, run.say)
        checkpoints = build_checkpoints(plan.blocks, model.backbone, run.device)
        prepare(model, trainable, precision, options.memory, checkpoints)
        shards = shard(trainable, model, facts.sharding, precision, run.device, run.processes)

        # Encode the images: all of them now, or batch by batch.
        encoder = LatentEncoder(model, encoding_vae(model.vae, precision, run.device), precision.vae, options.cache)
        dataset = build_training_set(facts, encoder, run.say, run.processes)
        if options.cache.cache_latents:
            encoder = replace(encoder, vae=None)
            offload_vae(model, options.memory, keep=trainable.whole_model or plan.draws)
        loader = BatchLoader(dataset, workers=plan.workers, pin_memory=reads_locked_memory(run.device))

        # Encode the captions: all of them now, or batch by batch.
        conditioner = build_conditioner(facts, model, trainable, run.device)
        encoded = encode_captions_ahead(facts, dataset, conditioner, trainable, run.say, run.processes)
        prompts = build_prompt_encoder(plan.preview, plan.evaluation, conditioner, run.accelerator.autocast)
        if encoded:
            leave_text_encoders(
                model, conditioner, prompts, options, keep=trainable.whole_model, draws=plan.preview is not None
            )

        # Build the optimizer and the learning rate schedule; from here on the backbone is on the device.
        place(model.backbone, plan.blocks, run.device, run.say)
        optimizer = make_optimizer(
            plan.optimization.optimizer, parameter_groups(trainable.parts), uses_scaler=precision.uses_scaler
        )
        zero = share_by_zero(facts.zero, trainable, optimizer, plan.optimization.update.max_grad_norm, run)
        shards = zero.shards if zero else shards
        wrapped, wrapped_optimizer = wrap(run.accelerator, trainable, optimizer) if zero is None else zero.wrapped()
        stepping = build_stepping(optimizer, plan.optimization.update, facts.seed)
        if plan.resume is None and zero is None:
            stepping.allocate()
        schedule = make_schedule(plan.optimization.schedule, optimizer)
        weights = build_weights(optimizer, plan.averages, run.device, run.say, trainable.products, stepping.exchanging)

        # The loss of a batch, with the base model as it is before the run.
        loss = build_training_loss(facts, model, wrapped, conditioner, encoder.vae)
        loss.preservation = build_preservation(facts, plan.base, loss, trainable, dataset, run)

        # Resume: load everything that a training state holds.
        random = RandomStates()
        own = zero.state() if zero else trained_state(trainable, stepping, whole=shards is not None)
        state = run_state(own, schedule, run.accelerator.scaler, random, weights)
        progress = plan.start if plan.resume is None else load_state(plan.resume, state, shards and shards.mesh)
        run.events.progress = progress

        # Train: what is due after a step, and the loop.
        states = StateWriter(
            state, plan.description, run.say, partial(free_memory, facts.machine.system_memory_bytes), shards
        )
        weights, on_writer = join(shards, run.processes, weights, state)
        loss.rollout = build_rollout(plan.rollout, loss, loss.modules(trainable), run.say)
        curve = begin_curve(plan.curve, plan.identity, progress.step, run.warn, plan.saved_identity)
        trained = InTraining(model, trainable, weights, loss)
        saver = build_saver(plan, run, trained, states, curve, uploads.release)
        after = build_after_step(plan, run, trained, Inputs(dataset, encoder, prompts), saver, progress)
        left_out = LeftOut(facts.images.number_of_files, run.processes, run.warn)
        rescue = Rescue(run.processes, on_writer(saver.save_now), random, run.warn, progress.step)
        rescue.all_alike = all_alike if shards else None
        nonfinite = NonFinite(options.run.max_nonfinite_steps, run.processes, run.warn, trainable.parts)
        steps = Steps(
            run=run,
            trainable=trainable.with_wrapped(wrapped),
            optimizer=wrapped_optimizer,
            schedule=schedule,
            weights=weights,
            left_out=left_out,
            rescue=rescue,
            nonfinite=nonfinite,
            losses=with_probe(loss, model, facts.quantisation, run.say),
            backward=zero or build_backward(run.accelerator, wrapped_optimizer, stepping, plan.optimization.update),
            gradients=zero or build_gradients(trainable.parts, run.processes, options.processes, sharded=bool(shards)),
            record=curve.add,
            measured=loss.measured,
            timesteps=lambda: loss.timesteps,
            late=Late(plan.optimization.read_interval if skips_on_device(optimizer) else 1),
        )
        loop = Loop(
            run, steps.trainable, steps, facts.order, loader.batches, after.due(on_writer), facts.duration,
            after.is_due, after.best.is_over if plan.best.stop is not None else None,
        )  # fmt: skip
        with explain_interrupt(lambda: saver.explain_interrupt(progress.step, options.saving.resume)), states.writing():
            with run.console.progress_bar(facts.duration.steps, progress.step):
                with run.console.pause():
                    after.begin(progress)
                run.say("running training / 学習開始")
                scaler = run.accelerator.scaler if precision.has_fp16_gradients else None
                with closing(loader), run.stop.heard():
                    with rescue.saving(), fp16_gradients(scaler):
                        progress = loop.train(progress)
                    if loop.stopped:
                        end_stopped(run, saver, progress, rescue.begin, options.saving.resume, on_writer)
            on_writer(saver.finish)(progress)
            if run.processes.is_writer:
                left_out.report()
                for line in nonfinite.report():
                    run.warn(line)
                report(plan, run, saver, after.best, progress, rescue.begin, began)
            run.processes.barrier()


def trained_state(trainable: Trainable, stepping: Stepping, *, whole: bool) -> RunState:
    """What a state holds of the trained modules and their optimizer. `whole`: also what is not trained of them."""
    parts = {part.name: part.module if whole else weights_of(part) for part in trainable.parts}
    return {**parts, "optimizer": stepping}


def run_state(trained: RunState, schedule: Any, scaler: Any, random: RandomStates, weights: Weights) -> RunState:
    """Everything that a resumed run needs, in the order in which it is loaded."""
    return {
        **trained,
        "schedule": schedule, "scaler": scaler, "random": random, "ema": weights.ema, "posthoc_ema": weights.posthoc,
    }  # fmt: skip
