"""Second chances for runs that could not tell, as `loadtests.sweeping` gives them: a stall is no finding."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from loadtests import gates
from loadtests.gates import Judgement, Verdict
from loadtests.recording import Run

TRIES = 6


async def judged(play: Callable[[Path], Awaitable[Run]], folder: Path) -> tuple[int, Sequence[Verdict]]:
    """The exit code and the verdicts of a run that tells something; each run has a folder of its own below `folder`.

    One that is inconclusive is played again, `TRIES` times in all. One of which times alone are red is played again
    once, for a server that stood still looks like that; what no stall changes is red at once.
    """
    has_been_red = False
    for number in range(TRIES):
        (own := folder / f"try-{number}").mkdir()
        found = await play(own)
        verdicts = gates.judge(found)
        code = gates.exit_code(verdicts, found)
        if code == gates.PASSED or (code == gates.FAILED and (has_been_red or not _by_times_alone(verdicts))):
            break
        has_been_red = has_been_red or code == gates.FAILED
    return code, verdicts


def _by_times_alone(verdicts: Sequence[Verdict]) -> bool:
    return all(one.metric not in gates.FACTS for one in verdicts if one.judgement is Judgement.FAIL)
