"""Problems with verifiers: what a model is taught and tested on."""

from ottava.tasks.base import Problem, Task, Traced, get, names, traced

__all__ = ["Problem", "Task", "Traced", "get", "names", "traced"]
