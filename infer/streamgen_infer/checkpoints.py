"""Where a stream can be turned back to: snapshots at block edges, dense for what was just made and sparse before."""

from __future__ import annotations

from bisect import bisect_right

from streamgen.stream import Snapshot


class Checkpoints:
    """Snapshots of one stream within a budget of bytes.

    The newest `dense` ones are always kept: a change at the playhead turns back that far. Of the older ones every
    second is given up, again and again, when the budget is full; block 0 always stays. A block between two of them is
    reached by making the ones before it once more, which gives the same video to the bit.
    """

    def __init__(self, budget_bytes: int, dense: int) -> None:
        self.budget_bytes, self.dense = budget_bytes, dense
        self._kept: list[Snapshot] = []
        self._stride = 1

    def add(self, snapshot: Snapshot) -> None:
        """Keep one; those at its block and after it are of a past that was given up."""
        self.cut_after(snapshot.position - 1)
        self._kept.append(snapshot)
        while self.nbytes() > self.budget_bytes and self._thin():
            pass

    def before(self, block: int) -> Snapshot:
        """The nearest one from which `block` can be made."""
        place = bisect_right(self._kept, block, key=lambda kept: kept.position)
        if place == 0:
            raise ValueError(f"no snapshot at or before block {block}")
        return self._kept[place - 1]

    def cut_after(self, block: int) -> None:
        """Forget the snapshots of later blocks."""
        self._kept = [kept for kept in self._kept if kept.position <= block]

    def nbytes(self) -> int:
        return sum(kept.nbytes() for kept in self._kept)

    def blocks(self) -> list[int]:
        """The blocks that can be gone back to at once."""
        return [kept.position for kept in self._kept]

    def _thin(self) -> bool:
        """Give up old ones off the stride, doubling it when all stand on it; False when only the dense are left."""
        old = self._kept[1 : -self.dense] if self.dense else self._kept[1:]
        if not old:
            return False
        first = self._kept[0].position
        going = [kept for kept in old if (kept.position - first) % self._stride]
        if not going:
            self._stride *= 2
            going = [kept for kept in old if (kept.position - first) % self._stride] or old[:1]
        gone = {kept.position for kept in going}
        self._kept = [kept for kept in self._kept if kept.position not in gone]
        return True
