"""memopt: one byte budget over the whole PyTorch training step, held and proven.

`memopt.compile` and `memopt.plan` load torch on first use; `import memopt` and `memopt.solvers` do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memopt.api import compile, plan
    from memopt.errors import BudgetError, CaptureError, MemoptError, PlanFileError, VerifyError

__version__ = "0.1.0"
__all__ = ["BudgetError", "CaptureError", "MemoptError", "PlanFileError", "VerifyError", "compile", "plan"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in ("compile", "plan"):
        return getattr(import_module("memopt.api"), name)
    if name in __all__:
        return getattr(import_module("memopt.errors"), name)
    raise AttributeError(f"module 'memopt' has no attribute {name!r}")
