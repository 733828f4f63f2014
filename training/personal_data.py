"""Finds what looks like personal data in a text, in linear time: whether it is there, never what it is.

Suspicions, for a person to look at. Numbers count only where their check digits or their form speak for it.
"""
# ruff: noqa: SIM905  (seventy quoted words are harder to read than a text that is split)

import re
from typing import Literal

Kind = Literal["email", "phone", "card", "iban"]

DOMAIN = re.compile(r"(?:[A-Za-z0-9-]{1,63}+\.)+[A-Za-z]{2,63}")
LONGEST_DOMAIN = 255
IN_LOCAL_PART = frozenset("_%+'-")
# Digits in groups. What was read is never read again (possessive, no second start within a group), so linear.
NUMBER = re.compile(r"(?<![A-Za-z0-9])\+?\(?[0-9]++(?:[ ()./-]{1,2}+[0-9]++)*+")
GROUP = re.compile(r"[0-9]+")
INTERNATIONAL = re.compile(r"\+\(?[1-9]")
FEWEST_INTERNATIONAL_DIGITS = 8
NATIONAL = re.compile(
    r"""(?:
        \([2-9][0-9]{2}\)[ ]?[0-9]{3}[ .-][0-9]{4}             # (555) 123-4567
        | [2-9][0-9]{2}([.-])[0-9]{3}\1[0-9]{4}               # 555-123-4567
        | 0[1-9](?:[ .-][0-9]{2}){4}                          # 01 23 45 67 89
        | \(?0[1-9][0-9]{1,4}\)?[ /-]{1,2}[0-9]{3,5}(?:[ -]?[0-9]{2,4}){1,2}  # 030 1234567, 0171/1234567
    )(?![0-9])""",
    re.VERBOSE,
)
# By scheme: Visa, Mastercard, American Express, Diners, Discover and JCB, UnionPay.
CARD = re.compile(
    r"""4[0-9]{12}(?:[0-9]{3}){0,2}
    | (?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}
    | 3[47][0-9]{13}
    | 3(?:0[0-5]|[68][0-9])[0-9]{11}
    | (?:35[0-9]{2}|6011|64[4-9][0-9]|65[0-9]{2})[0-9]{12}
    | 62[0-9]{14,17}
    """,
    re.VERBOSE,
)
LONGEST_CARD = 19
SHORTEST_GROUP = 3  # of a card's number as it is written; the first has four digits
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,32}")
IBAN_LENGTHS = {
    entry[:2]: int(entry[2:])
    for entry in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 "
        "FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 "
        "LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 "
        "SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"
    ).split()
}


def kinds_in(text: str) -> set[Kind]:
    """Which kinds of personal data `text` seems to hold."""
    found: set[Kind] = set()
    if _has_email(text):
        found.add("email")
    if any(_is_iban(match.group()) for match in IBAN.finditer(text)):
        found.add("iban")
    for match in NUMBER.finditer(text):
        number = match.group()
        if _holds_card(number):
            found.add("card")
        elif _is_phone(number):
            found.add("phone")
    return found


def _has_email(text: str) -> bool:
    """Looks at the character before each @ and at a bounded piece of text after it."""
    at = text.find("@", 1)
    while at >= 0:
        before = text[at - 1]
        if (before.isalnum() or before in IN_LOCAL_PART) and DOMAIN.match(text, at + 1, at + 1 + LONGEST_DOMAIN):
            return True
        at = text.find("@", at + 1)
    return False


def _is_phone(number: str) -> bool:
    if INTERNATIONAL.match(number):
        return sum(map(str.isdigit, number)) >= FEWEST_INTERNATIONAL_DIGITS
    return NATIONAL.match(number) is not None


def _holds_card(number: str) -> bool:
    """Whether some groups in a row are a card's number: its scheme, its length, its check digit."""
    groups = GROUP.findall(number)
    for first in range(len(groups)):
        digits = ""
        for group in groups[first : first + LONGEST_CARD // SHORTEST_GROUP]:
            digits += group
            if len(group) < SHORTEST_GROUP or len(digits) > LONGEST_CARD:
                break
            if CARD.fullmatch(digits) and _passes_luhn(digits):
                return True
    return False


def _passes_luhn(digits: str) -> bool:
    """ISO/IEC 7812-1: every second digit from the right doubled, the sum of all digits a multiple of ten."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 13616: the country's length, and 1 as the remainder by 97 with the first four characters at the end."""
    compact = text.replace(" ", "")
    length = IBAN_LENGTHS.get(compact[:2], 0)
    if not length or len(compact) < length:
        return False
    iban = compact[:length]
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1
