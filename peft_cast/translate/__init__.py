"""The verb, in six steps."""

from .job import Job
from .translate import translate
