"""Problems with verifiers: what a model is taught and tested on."""

from ottava.tasks.base import Problem, Task, get, names

__all__ = ["Problem", "Task", "get", "names"]
