"""The import name `vllm_relay` of a clone or an editable installation, whose files are in the folder `worker`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker import *  # noqa: F403 - all public names, for type checkers
    from worker import __all__ as __all__
else:
    import sys
    from importlib.machinery import SourceFileLoader
    from pathlib import Path

    _FOLDER = Path(__file__).parents[3]
    _LOADED = getattr(sys.modules.get("worker"), "__file__", None)

    if _LOADED and Path(_LOADED).resolve() == (_FOLDER / "__init__.py").resolve():
        from worker.import_names import add_alias

        add_alias("vllm_relay", "worker")
    else:
        # Load the files under this name. `worker` stays free for a module of the user's, now or later.
        __file__ = str(_FOLDER / "__init__.py")
        __path__ = __spec__.submodule_search_locations = [str(_FOLDER)]
        SourceFileLoader(__name__, __file__).exec_module(sys.modules[__name__])
