"""The benchmarks of the kernels: cases are right, a wrong variant is refused, and what is counted is what runs."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels import sass
from benchmarks.kernels.__main__ import main, run_case
from benchmarks.kernels.case import Case, Inputs, Outputs, check, miniature
from benchmarks.kernels.cases import OPS, cases
from benchmarks.kernels.results import Result, goals, tables
from benchmarks.kernels.timing import Quartiles, Timing, host_clock, input_sets, quartiles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def first_case(op: str) -> Case:
    return cases(miniature, (op,))[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU --check takes the full sizes")
@pytest.mark.slow
def test_all_variants_of_all_cases_agree_and_the_runner_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--check"])
    told = capsys.readouterr().out
    assert all(f"{op} [" in told for op in OPS)
    assert "nothing was timed" in told
    assert "us" not in told.split()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time on")
def test_without_a_gpu_nothing_is_timed_and_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no timings: there is no GPU here"):
        main([])


@pytest.mark.parametrize("op", OPS)
def test_a_result_that_is_five_percent_off_is_noticed(op: str) -> None:
    case = first_case(op)
    inputs, operator = case.make(CPU, 0), case.variants["triton"]
    # of grpo_loss, approx_kl and ratio_deviation are below what float32, in which it is compared, can tell
    unseen = (2, 3) if op == "grpo_loss" else ()
    for index in range(len(operator.run(inputs))):

        def wrong(given: Inputs, index: int = index) -> Outputs:
            return tuple(1.05 * one if i == index else one for i, one in enumerate(operator.run(given)))

        if index not in unseen:
            with pytest.raises(AssertionError, match=f"result {index} of triton"):
                check(replace(case, variants={"triton": replace(operator, run=wrong)}), inputs)


def test_noise_of_another_spread_is_noticed_though_no_value_can_be_compared() -> None:
    case = first_case("philox_normal")
    eager = case.variants["eager"]
    wide = replace(eager, run=lambda inputs: tuple(1.1 * one for one in eager.run(inputs)))
    check(case, case.make(CPU, 0))
    with pytest.raises(AssertionError, match="result 0 of eager has another spread"):
        check(replace(case, variants={"eager": wide}), case.make(CPU, 0))


def test_a_case_that_fails_its_check_is_refused_and_not_timed() -> None:
    case = first_case("ode_step")
    wrong = replace(case.variants["eager"], run=lambda inputs: (inputs["x"],))
    result = run_case(replace(case, variants={**case.variants, "eager": wrong}), CPU, host_clock, rounds=2)
    assert not result.timings
    assert result.refused.startswith("AssertionError: result 0 of eager")
    assert "Refused, so not timed: ode_step" in goals([result])[-1]
    assert "refused" in tables([result], large_copy=1.0)


def test_input_sets_outgrow_the_cache_and_differ() -> None:
    case = replace(first_case("ode_step"), read_bytes=600, written_bytes=400)
    sets = input_sets(case, CPU, working_set=4500)
    assert len(sets) == 5
    assert not torch.equal(sets[0]["x"], sets[1]["x"])


def test_quartiles_by_hand() -> None:
    assert quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == Quartiles(median=3.0, lower=2.0, upper=4.0)


def timing(called: float, replayed: float | None) -> Timing:
    one = None if replayed is None else Quartiles(replayed, replayed, replayed)
    return Timing(Quartiles(called, called, called), one, "", 0)


def test_shares_and_speed_ups_by_hand() -> None:
    case = replace(first_case("sde_step"), limit="memory", read_bytes=6000, written_bytes=2000)
    times = {"triton": timing(9.0, 2.0), "eager": timing(27.0, 10.0), "copy": timing(1.0, 1.7)}
    result = Result(case, times | {"eager_labels": timing(18.0, None)})
    assert result.bytes_per_second == 8000 / 2.0
    assert result.of_copy == 1.7 / 2.0
    assert result.times_faster_than("eager") == 5.0
    # a variant that waits is compared as it is called
    assert result.times_faster_than("eager_labels") == 2.0
    memory, steps = goals([result])
    assert "2000000.0 [2000000.0, 2000000.0] |" in tables([result], large_copy=1.0)
    unreplayed = replace(result, timings=times | {"triton": timing(9.0, None)})
    assert "9000000.0 [9000000.0, 9000000.0] called |" in tables([unreplayed], large_copy=1.0)
    assert "0 of 1 cases.  Not sde_step" in memory
    assert memory.endswith(": 85%.")
    assert steps.endswith("1 of 1 cases, 5.0x to 5.0x.")


LISTING = """
        /*0000*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR4][R6.64] ;
        /*0020*/                   LDG.E R3, desc[UR4][R4.64+0x4] ;
        /*0030*/                   LDG.E R3, desc[UR4][R4.64+0x8] ;
        /*0040*/                   DADD R2, R2, R4 ;
        /*0050*/              @!P1 BRA 0x70 ;
        /*0060*/                   CALL.REL.NOINC 0xb0 ;
        /*0070*/               @P2 STG.E.64 desc[UR4][R6.64], R8 ;
        /*0080*/               @P0 BRA 0x20 ;
        /*0090*/                   NOP ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   MUFU.RSQ R3, R4 ;
        /*00c0*/                   RET.REL.NODEC R2 0x0 ;
        /*00d0*/                   BRA 0xd0;
"""
# one scalar before the loop and one in each of eight passes, of which the listing has two in its body
TRITON_CODE = """
    %a = tt.load %p : !tt.ptr<f32> loc(#loc1)
    %x = tt.load %q, %m : tensor<512x!tt.ptr<f32>, #blocked> loc(#loc2)
    scf.for %j = %c0_i32 to %c8_i32 step %c1_i32  : i32 {
      %b = tt.load %r : !tt.ptr<i64> loc(#loc3)
      tt.store %o, %y, %m : tensor<512x!tt.ptr<bf16>, #blocked> loc(#loc4)
    } loc(#loc5)
"""


def count(monkeypatch: pytest.MonkeyPatch, triton_code: str) -> sass.Sass:
    usage = "REG:40 STACK:0 SHARED:1024 LOCAL:0"
    monkeypatch.setattr(sass, "_dump", lambda what, path: LISTING if what == "-sass" else usage)
    metadata = SimpleNamespace(num_warps=4, shared=32)
    return sass.Sass(SimpleNamespace(metadata=metadata, asm={"cubin": b"", "ttgir": triton_code}))


def test_machine_code_is_counted_with_its_loop_and_without_its_subroutine(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = count(monkeypatch, TRITON_CODE)
    assert counted.is_counted
    assert (counted.registers, counted.num_threads, counted.shared_bytes, counted.num_spills) == (40, 128, 32, 0)
    # 2 before the loop, 4 times 7 in it, EXIT
    assert counted.num_run() == 2 + 4 * 7 + 1
    assert (counted.num_float64, counted.num_special) == (4, 0)
    # the nine scalars are dropped
    assert counted.loads.counts == {16: 1}
    assert counted.stores.counts == {8: 4}
    assert str(counted.stores) == "4 x 8"


def test_a_loop_that_loads_tiles_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = count(monkeypatch, TRITON_CODE.replace("!tt.ptr<i64>", "tensor<512x!tt.ptr<i64>, #blocked>"))
    assert not counted.is_counted
