"""Numbers on the command line are taken as they are or refused with what would be right."""

from __future__ import annotations

import argparse

import pytest

from scripts.common import finite, integer, parsed, positive


@pytest.mark.parametrize("text", ["1", "1024", " 7 "])
def test_integers_within_the_limits_are_taken(text: str) -> None:
    assert integer(1, 1024)(text) == int(text)


def test_an_open_end_is_what_fits_torch() -> None:
    assert integer(0)("9223372036854775807") == 2**63 - 1
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        integer(0)("9223372036854775808")
    assert str(caught.value) == "needs an integer >= 0 and < 2^63, got '9223372036854775808'"


@pytest.mark.parametrize("text", ["0", "1025", "x", "", "1.5", "9" * 5000, "nan"])
def test_other_integers_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        integer(1, 1024)(text)
    assert str(caught.value) == f"needs an integer in [1, 1024], got {text!r}"


def test_an_integer_below_an_open_range_is_refused() -> None:
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"^needs an integer >= 3 and < 2\^63, got '2'$"
    ):
        integer(3)("2")


def test_positive_numbers_are_taken_up_to_the_limit() -> None:
    assert positive(10.0)("10") == 10.0
    assert positive(10.0)("5e-324") == 5e-324


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e999", "", "x"])
def test_other_numbers_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        positive(1e30)(text)
    assert str(caught.value) == f"needs a number in (0, 1e+30], got {text!r}"


def test_a_number_over_the_limit_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"in \(0, 10\], got '10.1'"):
        positive(10.0)("10.1")


def test_a_bad_command_line_is_one_line_and_nothing_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser(prog="p")
    parser.add_argument("--n", type=integer(1), required=True)
    assert parsed(parser, ["--n", "3"]).n == 3
    with pytest.raises(
        ValueError, match=r"^argument --n: needs an integer >= 1 and < 2\^63, got '0'$"
    ):
        parsed(parser, ["--n", "0"])
    with pytest.raises(ValueError, match=r"^the following arguments are required: --n$"):
        parsed(parser, [])
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as stop:
        parsed(parser, ["--help"])
    assert stop.value.code == 0 and "usage: p" in capsys.readouterr().out


def test_finite_numbers_are_taken() -> None:
    assert [finite("-2.5"), finite("0"), finite("1e308")] == [-2.5, 0.0, 1e308]


@pytest.mark.parametrize("text", ["nan", "inf", "1e309", "", "five"])
def test_what_is_no_finite_number_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^needs a finite number, got '{text}'$"):
        finite(text)
