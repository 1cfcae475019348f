"""What the wrappers share: where a kernel can run, how many rows a program takes, checks of arguments.

Letters of every file here: B batch, F frames, S tokens of a frame (attention: key tokens), T tokens, N heads, K head
width, D = N K model width. A "row" is one token's vector.
"""

from typing import Any

import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET was set when triton was first imported: kernels run in numpy, on CPU tensors."""

# A program of the interpreter costs 5 ms whatever its size; one of a GPU should fit its registers.
_TILE = 1 << 16 if INTERPRETED else 1 << 12


def check_place(*tensors: Tensor) -> None:
    """ValueError unless all tensors are on one device on which kernels run."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(f"tensors on {', '.join(sorted(map(str, devices)))}: a kernel needs all on one device")
    (device,) = devices
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"tensors on {device}: Triton kernels need a CUDA device (or TRITON_INTERPRET=1, for tests)")


def check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    """ValueError unless the tensor has this shape."""
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} is {list(tensor.shape)}: must be {list(wanted)}")


def power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def rows_for(width: int, rows: int) -> int:
    """Rows of `width` elements (padded to a power of two) that one program takes, of so many there are."""
    return max(1, min(_TILE // width, power_of_2(rows)))


def warps_for(elements: int) -> int:
    """Warps of a program over a tile of so many elements: 16 or more a thread, 16 bytes a load in bf16."""
    return max(1, min(8, elements // 512))


def dense_rows(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


if INTERPRETED:

    def loop_end(value: Any) -> int:
        """A loaded number as the end of a `range`: the interpreter's own conversion fails from numpy 2.4 on."""
        return int(value.handle.data.item())

else:

    @triton.jit
    def loop_end(value):  # type: ignore[no-untyped-def]
        """A loaded number as the end of a `range`."""
        return value
