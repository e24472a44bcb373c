"""The adapter that train_network.py trains, and what of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.flag import Script, flag

SCRIPT: Script = "train_network.py"


@dataclass(frozen=True)
class AdapterOptions:
    """Kind, size, beginnings, learning rates and files of the adapter."""

    network_module: str | None = flag(
        None,
        "Kind of adapter: networks.lora, networks.lora_fa, networks.dylora, networks.oft, networks.loha, "
        "networks.lokr, networks.ia3, lycoris.kohya, or any module with kohya's create_network.",
        script=SCRIPT,
        metadata="ss_network_module",
    )
    network_dim: int | None = flag(
        None,
        "Rank of the adapter; not set = 4.",
        at_least=1,
        zero_is_off=True,
        script=SCRIPT,
        metadata="ss_network_dim",
    )
    network_alpha: float | None = flag(
        1,
        "The adapter's changes are scaled by alpha / rank; 0 = the rank, so that nothing is scaled.",
        at_least=0,
        script=SCRIPT,
        metadata="ss_network_alpha",
    )
    network_args: tuple[str, ...] = flag(
        (),
        "Further arguments of the adapter as key=value, for example conv_dim=4 conv_alpha=1 use_dora=True.",
        pairs=True,
        script=SCRIPT,
    )
    network_dropout: float | None = flag(
        None,
        "Share of the values between the two matrices of a layer that is dropped in each training step; 0 = off.",
        at_least=0,
        at_most=1,
        zero_is_off=True,
        script=SCRIPT,
        metadata="ss_network_dropout",
    )
    network_weights: Path | None = flag(None, "File of an adapter to begin with.", script=SCRIPT)
    dim_from_weights: bool = flag(
        False, "Take rank and alpha of each layer from the file of network_weights.", script=SCRIPT
    )
    base_weights: tuple[Path, ...] = flag(
        (), "Files of adapters that are merged into the model before training.", script=SCRIPT
    )
    base_weights_multiplier: tuple[float, ...] = flag(
        (), "How strongly each of base_weights is merged; 1 where nothing is said.", script=SCRIPT
    )
    network_train_unet_only: bool = flag(False, "Adapt and train the U-Net only.", script=SCRIPT)
    network_train_text_encoder_only: bool = flag(False, "Adapt and train the text encoder only.", script=SCRIPT)
    unet_lr: float | None = flag(
        None,
        "Learning rate of the U-Net's part; not set = learning_rate, 0 = it is not trained.",
        at_least=0,
        script=SCRIPT,
        metadata="ss_unet_lr",
    )
    text_encoder_lr: tuple[float, ...] = flag(
        (),
        "Learning rate of the text encoder's part; not set = learning_rate, 0 = it is not trained. A list has one for "
        "each text encoder.",
        at_least=0,
        script=SCRIPT,
    )
    scale_weight_norms: float | None = flag(
        None,
        "After each step, scale layers whose change is longer than this down to it; 1 is usual, 0 = off.",
        at_least=0,
        zero_is_off=True,
        script=SCRIPT,
        metadata="ss_scale_weight_norms",
    )
    no_metadata: bool = flag(
        False,
        "Write only what is needed to use the adapter into its metadata, nothing about the training.",
        script=SCRIPT,
        may_change_on_resume=True,
    )
    initial_epoch: int | None = flag(
        None,
        "Epoch to begin with, from 1; resume does not need it.",
        at_least=1,
        zero_is_off=True,
        script=SCRIPT,
        may_change_on_resume=True,
    )
    initial_step: int | None = flag(
        None,
        "Number of optimiser steps that count as done; beats initial_epoch. resume does not need it.",
        at_least=1,
        zero_is_off=True,
        script=SCRIPT,
        may_change_on_resume=True,
    )
    skip_until_initial_step: bool = flag(
        False,
        "Begin in the middle of an epoch, exactly at initial_step; otherwise with the epoch that it lies in.",
        script=SCRIPT,
        may_change_on_resume=True,
    )
