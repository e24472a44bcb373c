"""LoRA and its relatives: trains an adapter, a small file beside a model that stays as it is.

    python train_network.py --config_file lora.toml
    accelerate launch train_network.py --network_module networks.lora --network_dim 8 --train_data_dir train …

`train` holds folders named `<repeats>_<identifier> <class>`, such as `10_sks dog`. `--help` lists every option,
`--dry_run` prints what a run would do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.options.parse import ADAPTERS
from library.training.command import run_recipe
from library.training.recipe import Recipe, Say

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.adapter.plan import AdapterPlan
    from library.training.optim.learning_rates import Optimization
    from library.training.plan.facts import RunFacts
    from library.training.trainable import Trainable


def network(
    model: Model, facts: RunFacts, optimization: Optimization, adapter: AdapterPlan | None, say: Say
) -> Trainable:
    """What this recipe trains: the adapter that --network_module names, in the parts of the model that it reaches."""
    from library.training.adapter.make import make_adapter

    if adapter is None:
        raise ValueError("the plan of this recipe has an adapter: --network_module is required")
    return make_adapter(model, facts, optimization, adapter, say)


RECIPE = Recipe(ADAPTERS, network)

if __name__ == "__main__":
    raise SystemExit(run_recipe(RECIPE))
