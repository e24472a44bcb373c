"""One training run, top to bottom: the wiring, and the table of contents of everything that happens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from library.data.dataset import BatchLoader, TrainingDataset, explain_dead_workers
from library.objective.masking import MaskSettings
from library.objective.objective import Objective
from library.runtime.allocator import preallocate_heap
from library.runtime.processes import Processes
from library.training.conditioning import Conditioner
from library.training.inputs import fill_captions, fill_latents, image_reader, training_set
from library.training.loading import load_model, text_settings
from library.training.loop import Loop
from library.training.memory import (
    computing,
    fp16_gradients,
    image_encoder,
    loading_device,
    prepare,
    release_memory,
)
from library.training.optim.optimizers import ExactState, allocate_state, make_optimizer
from library.training.optim.schedules import make_schedule
from library.training.preview.drawing import Autocast, PromptStates, drawing, starts_of
from library.training.preview.plan import read_requests
from library.training.preview.preview import Preview
from library.training.run import LOGGER, Run, open_run, set_up_console
from library.training.saving.saver import Saver
from library.training.saving.state import RandomStates, RunState, load_state, save_state
from library.training.trainable import Trainable, parameter_groups
from library.training.training_loss import TrainingLoss
from library.training.validation.validation import validation_of
from library.training.weight_averaging import Weights

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

    from library.families.family import Model
    from library.training.plan.plan import Plan
    from library.training.recipe import Recipe


def train(plan: Plan, recipe: Recipe) -> None:
    """Carry out a plan. `recipe` has its say in what is trained. Raises UserError."""
    options, family = plan.options, plan.base_model.family
    set_up_console(options.run)
    with (
        # gradients come and go, and would leave the memory taken for them in pieces: 11 % more at the peak
        preallocate_heap(plan.costs.weights + plan.costs.optimizer if plan.machine.is_cpu else 0),
        open_run(options, plan.trackers, plan.precision.mixed_precision, plan.seed) as run,
    ):
        accelerator, device = run.accelerator, run.accelerator.device

        # the model, what is trained of it, and how it is kept in memory
        base = "fp32" if plan.adapter is None else plan.precision.base
        model = load_model(plan, loading_device(options.memory, device), base=base)
        trained = recipe.choose(model, plan, LOGGER.info)
        prepare(model, trained, plan.precision, options.memory)

        # the images: latents made beforehand or on the way, and batches in the order of the plan
        vae = image_encoder(model.vae, plan.precision, device)
        reader = image_reader(plan)
        dataset = training_set(plan, reader, fill_latents(plan, model, vae, reader))
        if options.cache.cache_latents:
            vae = None
            if trained.whole_model or plan.preview is not None:
                model.vae.to("cpu")
            else:
                model.vae = None
            release_memory(options.memory)
        loader = BatchLoader(dataset, workers=plan.workers, pin_memory=device.type == "cuda")

        # the captions: encoded beforehand or on the way
        model.backbone.to(device)
        context = Conditioner(
            family=family,
            text_encoders={
                name: computing(module, trained, name in trained.active, plan.precision, device)
                for name, module in model.text_encoders.items()
            },
            tokenize=dataset.tokenize,
            settings=text_settings(plan),
            device=device,
        )
        encoded = fill_captions(plan, dataset, context, frozen=trained.active.isdisjoint(family.text_encoders))
        prompts = prompt_states(plan, context, accelerator.autocast)
        # new prompts may come to their file, and only who asks for its memory is refused them
        is_spare = plan.preview is None or options.cache.cache_text_encoder_outputs
        if encoded and is_spare:
            prompts.forget()
            context.text_encoders = {}
            if trained.whole_model:  # their weights are written
                for module in model.text_encoders.values():
                    module.to("cpu")
            else:
                model.text_encoders = {}
            release_memory(options.memory)

        # what changes the weights, counted in optimizer steps
        optimizer = make_optimizer(plan.optimizer, parameter_groups(trained.parts), plan.precision.uses_scaler)
        wrapped, stepping = wrap(accelerator, trained, optimizer)
        context.text_encoders = {name: wrapped.get(each, each) for name, each in context.text_encoders.items()}
        if plan.resume is None:
            allocate_state(optimizer)
        schedule = make_schedule(plan.schedule, optimizer)
        weights = Weights(optimizer)
        losses = TrainingLoss(
            model=replace(model, backbone=wrapped.get(model.backbone, model.backbone)),
            context=context,
            vae=vae,
            objective=Objective.of(
                plan.base_model.objective, family.process, plan.base_model.prediction, MaskSettings.of(options.mask)
            ),
            seed=plan.seed,
            device=device,
        )

        # all that a run resumes from, where to begin, what is written when, and the training itself
        state: RunState = {
            **{part.name: part.module for part in trained.parts}, "optimizer": ExactState(optimizer),
            "schedule": schedule, "scaler": accelerator.scaler, "random": RandomStates(),
        }  # fmt: skip
        progress = plan.start if plan.resume is None else load_state(plan.resume, state)
        with tqdm(total=plan.duration.steps, initial=progress.step, desc="steps", smoothing=0) as bar:
            say = partial(say_beside, bar)
            saver = Saver(
                outputs=plan.outputs,
                epochs=plan.duration.epochs,
                write_model=trained.write,
                write_state=lambda folder, at: save_state(folder, state, at, plan.identity),
                say=say,
                weights=weights,
            )
            validation = validation_of(plan, trained, losses, context, dataset, run, weights, say)
            preview = preview_of(plan, model, trained, prompts, vae, dataset, run, weights, say)
            loop = Loop(
                accelerator=accelerator,
                trained=trained.wrapped_as(wrapped),
                optimizer=stepping,
                schedule=schedule,
                weights=weights,
                order=plan.order,
                losses=losses,
                batches=loader.batches,
                log=run.log,
                due=(saver.save_due, preview.due, validation.due),
                say=say,
                progress_bar=bar,
                steps=plan.duration.steps,
                epochs=plan.duration.epochs,
                max_grad_norm=options.optimizer.max_grad_norm,
                processes=Processes.current(),
            )
            preview.before_training(progress)
            say("running training / 学習開始")
            with (
                explain_dead_workers(),
                closing(loader),
                fp16_gradients(accelerator.scaler if plan.precision.has_fp16_gradients else None),
            ):
                progress = loop.run(progress)
            if loop.processes.is_writer:
                saver.finish(progress)


def wrap(accelerator: Accelerator, trained: Trainable, optimizer: Optimizer) -> tuple[dict[Any, Any], Any]:
    """What accelerate makes of each trained module, by the module, and of the optimizer: for one process the modules
    themselves. Files and states are written from the bare ones.

    One call for all, since sharding puts new parameters into module and optimizer together.
    """
    bare = [part.module for part in trained.parts]
    *modules, stepping = accelerator.prepare(*bare, optimizer)
    return dict(zip(bare, modules, strict=True)), stepping


def prompt_states(plan: Plan, context: Conditioner, autocast: Autocast) -> PromptStates:
    """What makes the states of prompts for images while training; those known by now are made at once, as the text
    encoder may be gone later."""
    states = PromptStates(
        family=context.family,
        tokenizer=plan.base_model.tokenizer,
        text_encoders=context.text_encoders,
        settings=context.settings,
        autocast=autocast,
    )
    if context.store is not None and plan.preview is not None:
        states.keep(read_requests(plan.preview))
    return states


def preview_of(  # noqa: PLR0913 - being redrawn
    plan: Plan,
    model: Model,
    trained: Trainable,
    prompts: PromptStates,
    vae: Any,
    dataset: TrainingDataset,
    run: Run,
    weights: Weights,
    say: Callable[[str], None],
) -> Preview:
    """Images while training, drawn with the weights that a file saved then would hold; `vae` is the one that
    computes."""
    modules = [*model.modules().values(), *(part.module for part in trained.parts)]
    return Preview(
        plan=plan.preview,
        drawing=partial(
            drawing,
            model,
            prompts,
            vae=vae,
            vae_format=plan.precision.vae,
            device=run.accelerator.device,
            starts=starts_of(plan, model, vae, dataset.images, dataset.latents),
            strength=plan.options.objective.refiner_training_strength,
            autocast=run.accelerator.autocast,
            release=partial(release_memory, plan.options.memory),
        ),
        modules=modules,
        say=say,
        log_images=run.log_images,
        weights=weights.shown,
        steps=plan.duration.steps,
        steps_per_epoch=plan.order.steps_per_epoch,
    )


def say_beside(bar: tqdm[Any], text: str) -> None:
    """A line for the user that leaves the progress bar whole, and goes to the log file if there is one."""
    with bar.external_write_mode():
        LOGGER.info(text)
