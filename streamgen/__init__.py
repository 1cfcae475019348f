"""streamgen: text to video that starts at once, never ends and never stalls.

Where to start reading: geometry.py, flow.py, transformer.py, cache/kv.py, then rollout.py, the
heart. This module stays light: torch is imported by the first use of `StreamPipeline`, so that
`streamgen --help` does not wait for it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamgen.pipeline import StreamPipeline

__version__ = "0.1.0"

__all__ = ["StreamPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "StreamPipeline":
        from streamgen.pipeline import StreamPipeline

        return StreamPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
