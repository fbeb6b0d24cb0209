"""What a translation will cost, told beforehand from configurations."""

from .devices import DEVICES, Device, this_machine
from .plan import PhasePlan, Plan, plan
