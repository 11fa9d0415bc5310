"""bitmend: compress a causal language model into a memory budget and win its quality back.

Importing it imports nothing else. Once transformers' registry of quantizers has been imported, before or after, a stage's directory loads by
`AutoModelForCausalLM.from_pretrained`.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder

_REGISTRY = "transformers.quantizers.auto"


def _register() -> None:
    from .pipelines.run.quantizer import register

    register(sys.modules[_REGISTRY])


class _WhenImported:
    """A finder for `sys.meta_path`: finds the registry as it would be found without it, once, and registers when it has run."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: object) -> None:
                run(module)  # type: ignore[arg-type]
                _register()

            spec.loader.exec_module = run_and_register
        return spec


if __name__ != "bitmend":
    pass  # pytest runs this file once more, as the package that it takes the checkout's directory for
elif _REGISTRY in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenImported())
