"""Pure: when a replica that fails is left alone, and how often a request may be sent a second time."""

import math
from collections import deque
from collections.abc import Callable
from typing import Final

Clock = Callable[[], float]

WINDOW_S: Final = 10
NOBODY: Final = ("", -math.inf)


class Breaker:
    """Trips on `in_a_row` failures, or where half of at least `out_of` requests of the last 10 s failed.

    Failures of one tenant alone are none of these, nor do they end a trial: what its requests ask for may be at fault,
    and all others would be refused for it. But those are that another replica then answers. An engine that fails on
    everything fails on others too, or on its probe.

    A tripped replica rests for `rest_s`, doubled each time it trips again, at most `longest_rest_s`; then it is on
    trial: a few requests at a time, until as many have succeeded in a row.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        in_a_row: int = 5,
        out_of: int = 20,
        rest_s: float = 1.0,
        longest_rest_s: float = 4.0,
        trials: int = 3,
    ) -> None:
        self.on_trial = False
        self.trials = trials
        self._clock = clock
        self._in_a_row = in_a_row
        self._out_of = out_of
        self._first_rest_s = rest_s
        self._rest_s = rest_s
        self._longest_rest_s = longest_rest_s
        self._tripped_at = 0.0
        self._failed_in_a_row = 0
        self._good_trials = 0
        self._successes = Window(clock)
        self._failures = Window(clock)
        # the last tenant whose request failed, and the last other one; with the moment
        self._last_bad = self._other_bad = NOBODY

    def succeeded(self) -> None:
        self._failed_in_a_row = 0
        self._successes.add()
        if self.on_trial:
            self._good_trials += 1
            if self._good_trials >= self.trials:
                self.on_trial = False
                self._rest_s = self._first_rest_s

    def failed(self, tenant: str = "") -> bool:
        """Note a failure; True: the replica must rest now. One of no tenant's counts by itself."""
        now = self._clock()
        if tenant != self._last_bad[0]:
            self._other_bad = self._last_bad
        self._last_bad = (tenant, now)
        return (not tenant or self._others_failed(now)) and self._count()

    def answered_elsewhere(self) -> bool:
        """Note that another replica has answered what this one failed on; True: this one must rest now."""
        return not self._others_failed(self._clock()) and self._count()  # else it has been counted

    def _others_failed(self, now: float) -> bool:
        return now - self._other_bad[1] < WINDOW_S

    def _count(self) -> bool:
        self._failed_in_a_row += 1
        self._failures.add()
        return self.on_trial or self._failed_in_a_row >= self._in_a_row or self._half_fails()

    def trip(self) -> None:
        """The replica rests from now on."""
        if self.on_trial:
            self._rest_s = min(2 * self._rest_s, self._longest_rest_s)
        self.on_trial = False
        self._tripped_at = self._clock()

    def has_rested(self) -> bool:
        return self._clock() >= self._tripped_at + self._rest_s

    def try_again(self) -> None:
        """The replica has given a real token: it is on trial, its past forgotten."""
        self.on_trial = True
        self._good_trials = 0
        self._failed_in_a_row = 0
        self._last_bad = self._other_bad = NOBODY
        self._successes.clear()
        self._failures.clear()

    def _half_fails(self) -> bool:
        failures = self._failures.count()
        total = failures + self._successes.count()
        return total >= self._out_of and 2 * failures >= total


class RetryBudget:
    """Second tries: at most a tenth of the first ones of the last 10 s, and `floor` where that is fewer."""

    def __init__(self, clock: Clock, *, share: float = 0.1, floor: int = 3) -> None:
        self._share = share
        self._floor = floor
        self._requests = Window(clock)
        self._retries = Window(clock)
        self.taken = 0

    def request(self) -> None:
        """A first try goes out."""
        self._requests.add()

    def take(self) -> bool:
        """Whether a second try may go out; it is counted."""
        allowed = self._retries.count() + 1 <= max(self._floor, self._share * self._requests.count())
        if allowed:
            self._retries.add()
            self.taken += 1
        return allowed

    def note_free(self) -> None:
        """A second try goes out that the budget is not for."""
        self.taken += 1


class Window:
    """How often something happened in the last 10 seconds, by whole seconds."""

    __slots__ = ("_clock", "_counts", "_second_end", "_total")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counts: deque[list[int]] = deque()  # [second, count]
        self._second_end = -math.inf
        self._total = 0

    def add(self) -> None:
        now = self._clock()
        if now < self._second_end:
            self._counts[-1][1] += 1
        else:
            second = int(now)
            self._drop(second)
            self._counts.append([second, 1])
            self._second_end = second + 1.0
        self._total += 1

    def count(self) -> int:
        self._drop(int(self._clock()))
        return self._total

    def clear(self) -> None:
        self._counts.clear()
        self._second_end = -math.inf
        self._total = 0

    def _drop(self, second: int) -> None:
        while self._counts and self._counts[0][0] <= second - WINDOW_S:
            self._total -= self._counts.popleft()[1]
