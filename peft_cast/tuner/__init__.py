"""What PEFT loads: the CAST tuner, laid out as PEFT's own (config, layer, model). Importing it registers
`PeftType.CAST`.
"""

from aenum import extend_enum
from peft.utils import PeftType, register_peft_method

from .config import CastConfig, KernelSpec, OutputRows
from .layer import CastLayer, Kernel, Linear, Projection


if "CAST" not in PeftType.__members__:
    extend_enum(PeftType, "CAST", "CAST")

from .model import PREFIX, CastModel


__all__ = ["CastConfig", "CastLayer", "CastModel", "Kernel", "KernelSpec", "Linear", "Projection", "OutputRows"]

register_peft_method(name="cast", config_cls=CastConfig, model_cls=CastModel, prefix=PREFIX, is_mixed_compatible=False)
