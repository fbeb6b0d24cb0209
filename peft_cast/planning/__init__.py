"""What a translation will cost, told beforehand from configurations."""

from .devices import DEVICES, Device, this_machine
from .plan import PhasePlan, Plan, plan


__all__ = ["DEVICES", "Device", "PhasePlan", "Plan", "plan", "this_machine"]
