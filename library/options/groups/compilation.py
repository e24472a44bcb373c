"""Options of compiling the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import ReadAs, flag


@dataclass(frozen=True)
class CompileOptions:
    """torch.compile, block by block."""

    may_change_on_resume: ClassVar[bool] = True

    torch_compile: bool = flag(
        False,
        "Compile the blocks of the U-Net (torch.compile): faster steps, after minutes of compiling at the start.",
    )
    dynamo_backend: str = flag(
        "inductor",
        "What compiles with torch_compile: inductor = fast kernels; cudagraphs; eager and aot_eager = for tests.",
        choices=(
            *("eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt"),
            *("onnxrt", "tensort", "ipex", "tvm"),
        ),
        read_as=(ReadAs("no", None),),
    )
    compile: bool = flag(False, "Same as torch_compile, as in newer sd-scripts, with the compile_ options below.")
    compile_backend: str = flag("inductor", "What compiles with compile, as dynamo_backend.")
    compile_mode: str = flag(
        "default",
        "Mode of inductor: reduce-overhead uses CUDA graphs, max-autotune also tries out kernels.",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    compile_dynamic: str | None = flag(
        None,
        "Whether one compilation is for all sizes (true) or one for each (false). auto or not set = true if there is"
        " more than one bucket.",
        choices=("true", "false", "auto"),
    )
    compile_fullgraph: bool = flag(False, "End with an error if a block cannot be compiled as a whole.")
    compile_cache_size_limit: int | None = flag(
        None,
        "How often each kind of block is compiled at most, for other sizes, widths and modes; then it computes"
        " uncompiled. Not set = 64.",
        at_least=1,
        zero_is_off=True,
    )
