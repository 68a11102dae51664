"""The time that a whole benchmark may take, and what of it is left."""

import time
from collections.abc import Callable


class Budget:
    """Seconds from now on. Whoever starts something asks first whether what it is going to take still fits."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._started = clock()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._started

    @property
    def until(self) -> float:
        """The end on the clock; whatever runs then is to be ended."""
        return self._started + self.seconds

    def fits(self, seconds: float) -> bool:
        """Whether something that takes so long would be done in time."""
        return self.spent + seconds < self.seconds
