"""An average that is held under a limit by pauses."""

from collections.abc import Callable

from transformers.utils import logging

from .power_meters import Meter


logger = logging.get_logger(__name__)

SHORTEST_PAUSE = 1e-3  # what is less waits for the next token
# A pause that long has left behind threads that spin for a while after their work, and one counter's slow updates.
TELLING_PAUSE = 1.0


class PowerBudget:
    """What a meter may count on average since this was made.

    Args:
        meter ([`Meter`]): what is taken.
        limit (`float`): per second, in the meter's unit.
        clock (`Callable`): seconds that only rise.
    """

    def __init__(self, meter: Meter, limit: float, clock: Callable[[], float]):
        self._meter, self._limit, self._clock = meter, limit, clock
        self._before, self._start = meter.taken(), clock()
        self._out_of_reach = False

    def debt(self) -> float:
        """How many seconds too early it is for what was taken; below 0 where there is room."""
        return (self._meter.taken() - self._before) / self._limit - (self._clock() - self._start)

    def settle(self, sleep: Callable[[float], None]) -> None:
        """Sleeps until the average is at the limit; less where sleeping does not bring it there.

        Args:
            sleep (`Callable`): takes seconds.
        """
        pause = 0.0 if self._out_of_reach else self.debt()
        while pause >= SHORTEST_PAUSE:
            sleep(pause)
            # The machine at rest, or another thread of this process, takes something during a pause too.
            left = self.debt()
            if left > 0.9 * pause:
                self._give_up_after(pause)
                return
            pause = left

    def _give_up_after(self, pause: float) -> None:
        if pause >= TELLING_PAUSE:
            self._out_of_reach = True
            logger.warning_once(
                f"a limit of {self._limit:g} {self._meter.unit} a second cannot be held: nearly as much or more is "
                f"taken while generate() pauses ({self._meter.name}); it goes on without pauses, raise the limit."
            )
