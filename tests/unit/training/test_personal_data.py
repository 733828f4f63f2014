"""What is suspected, what is not, and that no text makes the search slow."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.personal_data import IBAN_LENGTHS, Kind, kinds_in

HOLDING: list[tuple[str, set[Kind]]] = [
    ("write to ann.lee+x@mail.example.co.uk today", {"email"}),
    ("<jörg@bücher.example> or jörg@books.example.", {"email"}),
    ("call +49 30 901820 or", {"phone"}),
    ("tel:+1(555)0100200", {"phone"}),
    ("(555) 123-4567", {"phone"}),
    ("555-123-4567", {"phone"}),
    ("030 1234567", {"phone"}),
    ("0171/1234567", {"phone"}),
    ("01 23 45 67 89", {"phone"}),
    ("card 4111 1111 1111 1111 12/27", {"card"}),
    ("378282246310005", {"card"}),
    ("5555-5555-5555-4444", {"card"}),
    ("2223003122003222", {"card"}),
    ("6011111111111117", {"card"}),
    ("30569309025904", {"card"}),
    ("DE89 3704 0044 0532 0130 00 please", {"iban"}),
    ("GB82WEST12345698765432.", {"iban"}),
    ("FR1420041010050500013M02606", {"iban"}),
    ("a@b.example, 4111111111111111, NL91ABNA0417164300", {"email", "card", "iban"}),
]
FREE = [
    "",
    "meet @ noon, @home, x@y, a@b.c",
    "on 2024-05-17 at 10:30, 17.05.2024",
    "1,000,000 or 3.14159265358979 or 1 000 000",
    "192.168.100.200 and 10.0.0.1:8080",
    "550e8400-e29b-41d4-a716-446655440000",
    "4111 1111 1111 1112",
    "1234567890123456",
    "DE89 3704 0044 0532 0130 01",
    "XX89 3704 0044 0532 0130 00",
    "order 100200300, page 12",
    "0 1 2 3 4 5 6 7 8 9",
]


@pytest.mark.parametrize(("text", "kinds"), HOLDING)
def test_personal_data_is_suspected(text: str, kinds: set[Kind]) -> None:
    """By form, and by check digits where there are some."""
    assert kinds_in(text) == kinds


@pytest.mark.parametrize("text", FREE)
def test_other_numbers_and_signs_are_not(text: str) -> None:
    """Dates, amounts, addresses of machines, and numbers with a wrong check digit."""
    assert kinds_in(text) == set()


def luhn(digits: str) -> str:
    """`digits` with their check digit, reckoned in the other direction than the code does."""
    total = 0
    for index, digit in enumerate(digits):
        value = int(digit) * (2 if (len(digits) - index) % 2 else 1)
        total += value - 9 if value > 9 else value
    return digits + str(-total % 10)


@given(st.integers(0, 10**11 - 1), st.integers(1, 9), st.sampled_from(["", " ", "-"]))
def test_one_wrong_digit_is_seen(number: int, off: int, between: str) -> None:
    """Every card's number counts, and none in which one digit is another."""
    digits = luhn(f"4539{number:011}")
    grouped = between.join(digits[i : i + 4] for i in range(0, 16, 4))
    assert "card" in kinds_in(f"it is {grouped}!")
    wrong = digits[:-1] + str((int(digits[-1]) + off) % 10)
    assert "card" not in kinds_in(between.join(wrong[i : i + 4] for i in range(0, 16, 4)))


@given(st.sampled_from(sorted(IBAN_LENGTHS)), st.integers(0, 10**28), st.booleans())
def test_an_iban_of_every_country_counts(country: str, number: int, spaced: bool) -> None:
    """With the check digits that ISO 13616 gives it, in one piece or in fours."""
    account = f"{number:030}"[-(IBAN_LENGTHS[country] - 4) :]
    check = 98 - int(account + "".join(str(int(letter, 36)) for letter in country) + "00") % 97
    iban = f"{country}{check:02}{account}"
    written = " ".join(iban[i : i + 4] for i in range(0, len(iban), 4)) if spaced else iban
    assert "iban" in kinds_in(written)
    assert "iban" not in kinds_in(f"{country}{check % 97 + 1:02}{account}")


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    """Whatever the script."""
    kinds_in(text)


@pytest.mark.parametrize(
    "piece",
    ["1", "1 ", "1-", "+", "(1", "@", "a@", "a@b.", "a@a-", "AA11", "DE89 ", "0111 111-", "4111 ", "1/(", "٣"],
)
def test_no_text_makes_the_search_slow(piece: str) -> None:
    """Four times the text takes about four times as long, never sixteen: the search is linear."""
    times = []
    for size in (1 << 15, 1 << 17):
        text = piece * (size // len(piece))
        begin = time.process_time()
        kinds_in(text)
        times.append(time.process_time() - begin)
    assert times[1] < 9 * times[0] + 0.05
