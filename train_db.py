"""DreamBooth and fine-tuning: trains all weights of the U-Net and, unless told otherwise, of the text encoder.

    python train_db.py --config_file dreambooth.toml
    accelerate launch train_db.py --pretrained_model_name_or_path model.safetensors --train_data_dir train …

`train` holds folders named `<repeats>_<identifier> <class>`, such as `10_sks dog`. `--help` lists every option,
`--dry_run` prints what a run would do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.training.command import run_recipe

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.parts import Part
    from library.training.plan.plan import Plan


def trained_parts(model: Model, plan: Plan) -> tuple[Part, ...]:
    """What this recipe trains: the whole U-Net, and the text encoder until its end has come
    (--stop_text_encoder_training)."""
    from library.training.parts import Part

    parts = [Part("unet", model.unet, plan.rates.unet)]
    if plan.rates.text_encoder is not None:
        parts.append(Part("text_encoder1", model.text_encoder, plan.rates.text_encoder, plan.rates.text_encoder_stop))
    return tuple(parts)


if __name__ == "__main__":
    raise SystemExit(run_recipe(trained_parts))
