"""Options of the adapter that train_network.py trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.flag import Script, flag

SCRIPT: Script = "train_network.py"


@dataclass(frozen=True)
class AdapterOptions:
    """Type, rank, initial weights, learning rates and metadata of the adapter."""

    network_module: str | None = flag(
        None,
        "Type of adapter: networks.lora, networks.lora_fa, networks.dylora, networks.oft, networks.loha, "
        "networks.lokr, networks.ia3, lycoris.kohya, or any module with kohya's create_network.",
        script=SCRIPT,
        metadata="ss_network_module",
    )
    network_dim: int | None = flag(
        None,
        "Rank (dim) of the adapter; not set = 4.",
        at_least=1,
        zero_is_off=True,
        script=SCRIPT,
        metadata="ss_network_dim",
    )
    network_alpha: float | None = flag(
        1,
        "Alpha: the adapter is scaled by alpha / rank; 0 = equal to the rank (no scaling).",
        at_least=0,
        script=SCRIPT,
        metadata="ss_network_alpha",
    )
    network_args: tuple[str, ...] = flag(
        (),
        "Extra adapter arguments as key=value, for example conv_dim=4 conv_alpha=1 use_dora=True.",
        pairs=True,
        script=SCRIPT,
    )
    network_dropout: float | None = flag(
        None,
        "Dropout probability between the two matrices of each adapter layer; 0 = off.",
        at_least=0,
        at_most=1,
        zero_is_off=True,
        script=SCRIPT,
        metadata="ss_network_dropout",
    )
    network_weights: Path | None = flag(None, "Adapter file to start from.", script=SCRIPT)
    dim_from_weights: bool = flag(
        False, "Take rank and alpha of each layer from the file of network_weights.", script=SCRIPT
    )
    base_weights: tuple[Path, ...] = flag(
        (), "Adapter files to merge into the base model before training.", script=SCRIPT
    )
    base_weights_multiplier: tuple[float, ...] = flag(
        (), "Strength with which each file of base_weights is merged; not set = 1.", script=SCRIPT
    )
    network_train_unet_only: bool = flag(False, "Train the adapter of the U-Net only.", script=SCRIPT)
    network_train_text_encoder_only: bool = flag(False, "Train the adapter of the text encoder only.", script=SCRIPT)
    unet_lr: float | None = flag(
        None,
        "Learning rate of the U-Net's adapter; not set = learning_rate, 0 = do not train it.",
        at_least=0,
        script=SCRIPT,
        metadata="ss_unet_lr",
    )
    text_encoder_lr: tuple[float, ...] = flag(
        (),
        "Learning rate of the text encoder's adapter, or a list with one for each text encoder; not set = "
        "learning_rate, 0 = do not train it.",
        at_least=0,
        script=SCRIPT,
    )
    scale_weight_norms: float | None = flag(
        None,
        "Scale layers with a weight norm above this value down to it after each step; 1 is usual, 0 = off.",
        at_least=0,
        zero_is_off=True,
        script=SCRIPT,
        metadata="ss_scale_weight_norms",
    )
    no_metadata: bool = flag(
        False,
        "Leave training details out of the adapter's metadata; keep only what is needed to use it.",
        script=SCRIPT,
        may_change_on_resume=True,
    )
    initial_epoch: int | None = flag(
        None,
        "Epoch to start from, counted from 1; not needed with resume.",
        at_least=1,
        zero_is_off=True,
        script=SCRIPT,
        may_change_on_resume=True,
    )
    initial_step: int | None = flag(
        None,
        "Number of optimizer steps to count as done; overrides initial_epoch, not needed with resume.",
        at_least=1,
        zero_is_off=True,
        script=SCRIPT,
        may_change_on_resume=True,
    )
    skip_until_initial_step: bool = flag(
        False,
        "Start exactly at initial_step, even in the middle of an epoch; otherwise start with the epoch it is in.",
        script=SCRIPT,
        may_change_on_resume=True,
    )
