"""With how many threads a CPU trains."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pat import ranks
from pat.families import get_family
from pat.training.preflight import threads
from pat.training.preflight.threads import (
    Threads,
    choose_threads,
    fastest,
    measure_threads,
    remember_threads,
    restored_threads,
    using,
)
from pat.training.run.run_file import RunFile
from tests.tiny_models import build


def timer(taken: dict[int, float], asked: Counter[int], late: float = 0.0) -> Any:
    """Return a clock by which each number of threads takes its time, and the very first piece of work `late` more."""

    def seconds(number: int) -> float:
        asked[number] += 1
        return taken[number] + (late if asked.total() == 1 else 0.0)

    return seconds


@pytest.mark.parametrize(
    ("taken", "number", "gain"),
    [
        ({8: 4.0, 4: 1.0, 2: 2.0, 1: 3.0}, 4, 4.0),
        ({8: 4.0, 4: 3.9, 2: 3.0, 1: 1.0}, 1, 4.0),
        ({8: 1.1, 4: 1.0, 2: 2.0, 1: 3.0}, 8, 1.0),  # a tenth is noise
        ({8: 1.0, 4: 2.0, 2: 4.0, 1: 8.0}, 8, 1.0),
        ({6: 3.0, 3: 1.0, 1: 2.0}, 3, 3.0),
    ],
)
def test_fewer_threads_are_taken_where_they_are_clearly_faster(
    taken: dict[int, float], number: int, gain: float
) -> None:
    asked = Counter[int]()
    default = max(taken)
    found = fastest(timer(taken, asked, late=100.0), default)
    assert found == Threads(number, default, pytest.approx(gain))
    assert sorted(asked, reverse=True) == list(taken)  # halved down to one
    repeated = [each for each, times in asked.items() if times > 2]
    assert len(repeated) == 2 and default in repeated and asked.total() < 20


def test_what_the_user_has_said_is_not_measured(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_work", lambda *_: pytest.fail("measured"))
    for name in threads.VARIABLES:
        with monkeypatch.context() as environment:
            environment.setenv(name, "2")
            assert measure_threads(64, 64) is None
    torch.set_num_threads(1)
    assert measure_threads(64, 64) is None


def test_a_measurement_leaves_threads_and_random_numbers_as_they_were(two_threads: None) -> None:
    state = torch.get_rng_state()
    found = measure_threads(64, 96, bf16=True)
    assert found is not None and found.number in (1, 2) and found.default == 2
    assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), state)
    with using(Threads(1, 2, 3.0)):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_a_run_in_one_process_on_a_cpu_takes_the_chosen_number(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build("llama", tied=True).config
    base: Any = SimpleNamespace(base_config=config, family=get_family(config.model_type))
    asked = list[Any]()

    def measured(*sizes: int, bf16: bool) -> Threads:
        asked.append((*sizes, bf16))
        return Threads(1, 2, 3.14)

    monkeypatch.setattr(threads, "measure_threads", measured)
    on: dict[str, Any] = {kind: SimpleNamespace(device=torch.device(kind), bf16=True) for kind in ("cpu", "meta")}
    assert choose_threads(on["meta"], base) is None
    with monkeypatch.context() as many:
        many.setattr(ranks, "num_processes", lambda: 2)
        assert choose_threads(on["cpu"], base) is None
    assert torch.get_num_threads() == 2 and not asked
    found = choose_threads(on["cpu"], base, 4)
    assert asked == [(config.hidden_size, config.intermediate_size, True)] and torch.get_num_threads() == 1
    assert found is not None and found.describe() == (
        "1 thread (3.1 times as fast as 2 on this CPU: threads wait for one another where other programs use it)"
    )
    assert "(55 times as fast as 2 on" in Threads(1, 2, 55.1).describe()
    assert Threads(2, 2, 1.0).describe() == "2 threads"


CPU: Any = SimpleNamespace(device=torch.device("cpu"), bf16=False)


def test_a_run_keeps_the_number_that_it_began_with(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = SimpleNamespace(base_config=build("llama", tied=True).config, family=get_family("llama"))
    monkeypatch.setattr(threads, "_work", lambda *_: pytest.fail("measured"))
    found = choose_threads(CPU, base, 1)
    assert torch.get_num_threads() == 1 and found is not None and found.describe() == "1 thread (as it began)"
    torch.set_num_threads(2)
    with monkeypatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "2")
        assert choose_threads(CPU, base, 1) is None and torch.get_num_threads() == 2
    monkeypatch.setattr(threads, "measure_threads", lambda *_, **__: None)
    for unusable in (0, -1, 3):
        assert choose_threads(CPU, base, unusable) is None and torch.get_num_threads() == 2


def test_another_number_than_before_is_said(two_threads: None, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFile({}, "b", "d")
    assert remember_threads(run, CPU).num_threads == 2
    assert remember_threads(run.with_threads(2), CPU).num_threads == 2 and not caplog.messages
    elsewhere: Any = SimpleNamespace(device=torch.device("meta"))
    assert remember_threads(run.with_threads(2), elsewhere).num_threads is None and not caplog.messages
    assert remember_threads(run.with_threads(4), CPU).num_threads == 2
    assert ["goes on with 2 threads after 4" in message for message in caplog.messages] == [True]
    with restored_threads():
        torch.set_num_threads(1)
    assert torch.get_num_threads() == 2
