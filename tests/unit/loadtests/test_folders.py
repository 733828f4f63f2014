"""Temporary folders of load tests, and what is left of those that were killed."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loadtests.folders import PREFIX, own_folder

KEEPS_ONE = (
    "import sys, time; from pathlib import Path; from loadtests.folders import own_folder\n"
    "with own_folder(Path(sys.argv[1])) as folder:\n"
    "    (folder / 'key').write_text('secret'); print(folder, flush=True); time.sleep(600)"
)


def keeper(root: Path) -> tuple["subprocess.Popen[str]", Path]:
    """A process with a folder of its own, and the folder."""
    process = subprocess.Popen([sys.executable, "-c", KEEPS_ONE, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_load_test_left_goes_at_the_next_start(tmp_path: Path) -> None:
    """Not before, and neither what another one is using, nor what only has such a name."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    root = tmp_path / "root"
    root.mkdir()
    link, file, other = root / f"{PREFIX}link", root / f"{PREFIX}file", root / "tailor-loadtest-other"
    link.symlink_to(elsewhere)
    file.touch()
    other.mkdir()
    killed, left = keeper(root)
    running, used = keeper(root)
    with killed, running:
        killed.kill()
        killed.wait()
        assert (left / "key").exists()
        with own_folder(root) as own:
            assert sorted(root.iterdir()) == sorted([link, file, other, used, own])
            assert (used / "key").exists()
        assert sorted(root.iterdir()) == sorted([link, file, other, used])
        running.kill()
    assert (elsewhere / "file").exists()


def test_nobody_takes_away_a_folder_that_is_being_made(tmp_path: Path) -> None:
    """However many start at once."""

    def use(number: int) -> bool:
        kept = True
        for _ in range(100):
            with own_folder(tmp_path) as folder:
                (folder / "own").write_text(str(number))
                kept = kept and (folder / "own").read_text() == str(number)
        return kept

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(use, range(8))) == [True] * 8
    assert list(tmp_path.iterdir()) == []
