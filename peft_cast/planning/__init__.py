"""What a translation will cost, told beforehand from configurations."""

from typing import TYPE_CHECKING

from ..utils.importing import lazily


if TYPE_CHECKING:
    from .data_sheets import DEVICES, Device
    from .devices import this_machine
    from .plan import PhasePlan, Plan, plan

lazily(__name__)
