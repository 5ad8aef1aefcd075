"""The package's own threads: their number, what it does not change, and where it comes from."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import numpy as np
import pytest
from caches import feed

import inferos
from inferos import KVCache, LayerSpec
from inferos.errors import ConfigError

SPEC = LayerSpec(2, 64)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = inferos.get_num_threads()
    yield
    inferos.set_num_threads(threads)


def attended(kv: str) -> list[bytes]:
    """Outputs and masses of one token and of a hundred, over a past that has several spans."""
    random = np.random.default_rng(5)
    with KVCache([SPEC], kv=kv) as cache:
        feed(cache, 3000, 1)
        cache.begin(100)
        cache.append(0, *random.standard_normal((2, 100, 2, 64), dtype=np.float32))
        results = []
        for tokens in (1, 100):
            q = random.standard_normal((tokens, 6, 64), dtype=np.float32)
            results += [array.tobytes() for array in cache.attend(0, q, mass=True)]
        return results


def child(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs `program`."""
    paths = os.pathsep.join(path for path in sys.path if path)
    own = {name: value for name, value in os.environ.items() if name != "INFEROS_THREADS"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**own, "PYTHONPATH": paths, **environment},
    )


@pytest.mark.parametrize("kv", ["f16", "int8", "k8v4", "int4"])
def test_results_do_not_depend_on_the_number_of_threads(kv: str) -> None:
    results = []
    for threads in (1, 2, 4, 33):
        inferos.set_num_threads(threads)
        results.append(attended(kv))
    assert all(result == results[0] for result in results)


def test_the_number_that_was_set_is_the_number_in_use() -> None:
    for threads in (3, 1, 1024):
        inferos.set_num_threads(threads)
        assert inferos.get_num_threads() == threads


@pytest.mark.parametrize("threads", [0, -1, 1025, 1 << 70, True, 2.0, "2", None])
def test_a_number_out_of_range_or_none_is_refused_and_changes_nothing(threads: object) -> None:
    inferos.set_num_threads(3)
    with pytest.raises(ConfigError, match=r"set_num_threads: .* is not a whole number within 1\.\.1024"):
        inferos.set_num_threads(threads)  # type: ignore[arg-type]
    assert inferos.get_num_threads() == 3


SHOW = "import inferos; print(inferos.get_num_threads())"


def test_the_environment_says_how_many() -> None:
    assert child(SHOW, INFEROS_THREADS="7").stdout == "7\n"


@pytest.mark.parametrize("value", ["0", "1025", "-2", "two", "2x", " 2", "1e3", "99999999999999999999"])
def test_an_environment_that_names_no_number_is_refused_at_import(value: str) -> None:
    run = child("import inferos.kv", INFEROS_THREADS=value)
    assert run.returncode == 1
    assert "ConfigError: INFEROS_THREADS: " in run.stderr
    assert "within 1..1024" in run.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
@pytest.mark.parametrize("environment", [{}, {"INFEROS_THREADS": ""}])
def test_without_a_word_there_are_as_many_as_the_process_may_use_cores(environment: dict[str, str]) -> None:
    assert child(SHOW, **environment).stdout == f"{len(os.sched_getaffinity(0))}\n"
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});" + SHOW
    assert child(one, **environment).stdout == "1\n"


# The start of programs: `attend()` gives an output as bytes.
ATTEND = """
    import os, sys, threading
    import numpy as np
    import inferos
    inferos.set_num_threads(4)
    cache = inferos.KVCache([inferos.LayerSpec(4, 64)])
    cache.begin(2000)
    cache.append(0, *np.random.default_rng(0).standard_normal((2, 2000, 4, 64), dtype=np.float32))
    cache.commit()
    def attend():
        return cache.attend(0, np.ones((1, 4, 64), np.float32)).tobytes()
"""


counts_threads = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads cannot be counted here")


@counts_threads
def test_workers_start_with_the_first_call_that_has_work_for_them() -> None:
    run = child(
        ATTEND.replace("set_num_threads(4)", "set_num_threads(1)")
        + """
    def count():
        return len(os.listdir("/proc/self/task"))
    before = count()
    attend()
    alone = count()
    inferos.set_num_threads(4)
    idle = count()
    attend()
    four = count()
    attend()
    print(alone - before, idle - before, four - before, count() - before)
    """
    )
    assert (run.stdout, run.stderr) == ("0 0 3 3\n", "")


@counts_threads
def test_inside_a_session_they_have_nothing_to_do() -> None:
    run = child(
        """
    import os
    import inferos
    with inferos.load("reference", threads=1) as model:
        before = len(os.listdir("/proc/self/task"))
        text = "".join(token.text for token in model.generate("The cat sat on the mat. " * 20, max_tokens=4))
        print(len(text) > 0, len(os.listdir("/proc/self/task")) - before)
    """,
        INFEROS_THREADS="7",
    )
    assert (run.stdout, run.stderr) == ("True 0\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "while another thread attends"])
def test_a_forked_child_attends_with_workers_of_its_own(busy: bool) -> None:
    run = child(
        ATTEND
        + f"""
    want = attend()
    stop = threading.Event()
    def others(other):
        while not stop.is_set():
            other.attend(0, np.ones((1, 4, 64), np.float32))
    workers = [threading.Thread(target=others, args=(cache.fork(),)) for _ in range({2 if busy else 0})]
    for worker in workers:
        worker.start()
    import warnings
    warnings.simplefilter("ignore")  # newer Pythons warn of forks in a process that has threads
    codes = []
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if attend() == want == attend() else 3)
        codes.append(os.waitpid(pid, 0)[1])
    stop.set()
    for worker in workers:
        worker.join()
    print(set(codes), attend() == want)
    """
    )
    assert (run.stdout, run.stderr) == ("{0} True\n", "")


def test_the_interpreter_ends_while_a_thread_attends() -> None:
    run = child(
        ATTEND
        + """
    started = threading.Event()
    def for_ever():
        while True:
            attend()
            started.set()
    threading.Thread(target=for_ever, daemon=True).start()
    started.wait()
    print("done")
    """
    )
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr
