"""The import name `worker` of an installed wheel, whose files are in the folder `vllm_relay`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_relay import *  # noqa: F403 - all public names, for type checkers
    from vllm_relay import __all__ as __all__
else:
    import vllm_relay  # noqa: F401 - before it has a second name
    from vllm_relay.import_names import add_alias

    add_alias("worker", "vllm_relay")
