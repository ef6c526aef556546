"""What those that run one command together tell each other, and how they stay in step from case to case.

What they are about to measure, and how their parts of a case ended: number 0 hears all and tells all. What ranks
exchange does not go this way. Lives in the parent, so it imports no torch.
"""

from collections import deque
from collections.abc import Callable
from typing import TypeVar

import msgspec

from bench.meeting import Met, Place, meet

T = TypeVar("T")

ALARM = b"!"
GRACE_S = 10.0
"""How long a part of a case may go on after another's has failed: its ranks have something to say, too."""


class PeerFailedError(Exception):
    """Another's part of the case has failed, so this one cannot end well."""


class Peers:
    """The machines that run one command together, or the processes of a torchrun, seen from one of them.

    Alone, every answer is its own.

    Args:
        place: where it stands.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.place = place or Place()
        self.met = Met(number=self.place.number or 0, names=("",))
        self.rounds = 0
        self._heard: dict[int, deque[bytes]] = {}
        self._alarmed = False

    @property
    def number(self) -> int:
        """Which of them this is; 0 writes what they find."""
        return self.met.number

    @property
    def title(self) -> str:
        """What this one is called: `node 1 (gpu-17)`, or of a torchrun's processes `rank 1 (gpu-17)`."""
        return self.title_of(self.number)

    def title_of(self, number: int) -> str:
        """What another is called."""
        return f"{'rank' if self.place.launched else 'node'} {number} ({self.met.names[number]})"

    def meet(self, wait_s: float) -> None:
        """Find the others.

        Raises:
            UsageError: they have not all come within `wait_s`, or the endpoint cannot be reached.
        """
        self.met = meet(self.place, wait_s)
        self._heard = {number: deque() for number in self.met.links}

    def gather(self, mine: T, wait_s: float) -> list[T | None]:
        """What each has, in order, None of those that have left; they wait for each other.

        Args:
            mine: a struct; what the others have is of the same type.
            wait_s: how long one waits for another; whoever is silent for longer has left.
        """
        self.rounds += 1
        told: list[T | None] = [None] * self.place.count
        told[self.number] = mine
        others = range(1, self.place.count)
        if self.number:
            self._send(0, msgspec.json.encode(mine))
            if (answer := self._next(0, wait_s * self.place.count)) is not None:
                told = msgspec.json.decode(answer, type=list[type(mine) | None])  # type: ignore[misc]  # known when it runs
        else:
            for number in others:
                if (answer := self._next(number, wait_s)) is not None:
                    told[number] = msgspec.json.decode(answer, type=type(mine))
            for number in others:
                self._send(number, msgspec.json.encode(told))
        self._alarmed = False
        return told

    def alarm(self) -> None:
        """Tell the others at once that this one's part of the case has failed: theirs can only wait for it."""
        for number in list(self.met.links):
            self._send(number, ALARM)

    def watched(self, progress: Callable[[str, float], None]) -> Callable[[str, float], None]:
        """`progress`, which ends this one's part of a case soon after another's has failed.

        Raises:
            PeerFailedError: from what is returned.
        """
        since: list[float] = []

        def tell(phase: str, seconds: float) -> None:
            progress(phase, seconds)
            if self._is_alarmed() and not since:
                since.append(seconds)
            if since and seconds > since[0] + GRACE_S:
                raise PeerFailedError

        return tell

    def _is_alarmed(self) -> bool:
        for number in list(self.met.links):
            while number in self.met.links and self.met.links[number].poll(0):
                self._read(number)
        return self._alarmed

    def leave(self) -> None:
        """Close the connections, whatever the others do."""
        for number in list(self.met.links):
            self.met.links.pop(number).close()
        if self.met.reserved is not None:
            self.met.reserved.close()

    def _send(self, number: int, message: bytes) -> None:
        if number in self.met.links:
            try:
                self.met.links[number].send_bytes(message)
            except OSError:
                self._lose(number)

    def _next(self, number: int, wait_s: float) -> bytes | None:
        """The next message of another that is no alarm; None when it has left."""
        while not self._heard[number]:
            if number not in self.met.links:
                return None
            if self.met.links[number].poll(wait_s):
                self._read(number)
            else:
                self._lose(number)
        return self._heard[number].popleft()

    def _read(self, number: int) -> None:
        try:
            message = self.met.links[number].recv_bytes()
        except (EOFError, OSError):
            self._lose(number)
            return
        if message == ALARM:
            self._pass_on(number)
        else:
            self._heard[number].append(message)

    def _lose(self, number: int) -> None:
        self.met.links.pop(number).close()
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        """What one says to number 0 concerns the others too."""
        self._alarmed = True
        for other in [one for one in self.met.links if one != number]:
            self._send(other, ALARM)
