"""Made-up support tickets of six kinds, the rarest 3 %: own data as a product team has it, for `own_data.py`.

A ticket says what is wanted in one sentence of its kind. One in five also names something of another kind, which is only
background ("I know others complain that ..."), and a few carry a wrong label, as real ones do. The sentences are put
together from parts, and one way in fifteen of saying a thing stands in the test rows alone.

    python benchmarks/tickets.py tickets.csv      # 1,200 of them, columns text and label
    python benchmarks/tickets.py --test new.csv   # 1,000 others
"""

from __future__ import annotations

import argparse
import csv
import random

KINDS = {"delivery": 0.27, "billing": 0.23, "access": 0.19, "fault": 0.16, "cancel": 0.12, "privacy": 0.03}
"""Share of the tickets."""

WRONG = 0.03
"""Share of the tickets with a label at random."""

THINGS = (
    "order", "parcel", "subscription", "account", "invoice", "plan", "headset", "lamp", "printer", "app", "coffee machine",
    "gift card", "licence", "bike light", "keyboard", "team workspace",
)  # fmt: skip

OPENINGS = (
    "Hi,", "Hello,", "Hello team,", "Dear support,", "Good morning,", "Hey there,", "Second time I write:", "Please help.", "",
    "", "", "Not sure this is the right address, but", "Quick question:", "To whom it may concern,",
)  # fmt: skip

CLOSINGS = (
    "", "", "", "Thanks.", "Please look into it.", "I need an answer today.", "What can you do?", "Regards, Ana",
    "I have been a customer for years.", "Let me know.", "My account number is 48213.", "Order 77120, if it helps.",
    "Please do not send me the standard answer again.", "Can someone call me?", "Cheers, Tom",
)  # fmt: skip

WANTED: dict[str, tuple[str, ...]] = {
    "delivery": (
        "the {thing} I paid for has still not arrived", "tracking has said 'on its way' for nine days",
        "the courier left my {thing} with a neighbour I do not know", "where is the {thing}? It was promised for Monday",
        "you sent the {thing} to my old address", "the box came, but the {thing} inside is the wrong colour",
        "only half of what I bought was in the parcel", "can the {thing} be brought on Saturday instead",
        "customs has held the {thing} since last week", "how long does it take until a {thing} gets to Norway",
        "nobody rang the bell and now it is at a depot 30 km away", "I would like to change where the {thing} goes",
        "the package was opened when I got it", "the driver wrote 'refused', which nobody here did",
        "my {thing} seems to be lost somewhere between two warehouses",
    ),
    "billing": (
        "I was charged twice for the {thing}", "the amount on my statement is higher than the price I agreed to",
        "why is there a fee of 4.90 on top of the {thing}", "I need the receipt with our company's tax number",
        "the discount code was not taken off", "my card was declined although there is money on it",
        "can I pay for the {thing} by bank transfer", "the refund you promised has not reached my bank",
        "last month's total does not match what we used", "please put the {thing} on another credit card",
        "you still take 12 euros every month from me", "the price of the {thing} went up without any notice",
        "I sent the {thing} back and got only part of my money", "VAT is calculated for the wrong country",
        "we are owed a credit note for the {thing}",
    ),
    "access": (
        "I cannot log in any more", "the reset link never reaches my inbox", "it says my password is wrong, and it is not",
        "the code for the second step goes to a phone I no longer have", "my colleague needs to get into the {thing} too",
        "I am locked out after three tries", "how do I change the e-mail I sign in with", "the invitation has expired",
        "since my name changed I can no longer get into the {thing}", "it keeps asking me who I am, every single time",
        "our admin left and no one has the rights to the {thing}", "signing in with the company account ends on an empty page",
        "I forgot which address I registered the {thing} with", "my user is shown as disabled",
        "the {thing} does not accept the licence key",
    ),
    "fault": (
        "the {thing} stops after ten seconds", "the screen stays black when I open the {thing}",
        "since the update the {thing} crashes", "there is a loud noise from the {thing}", "the export gives an empty file",
        "the battery of the {thing} is flat after an hour", "pressing save does nothing at all",
        "the {thing} gets hot and smells of plastic", "search shows the same result for everything",
        "the {thing} shows error 502 all the time", "half of the buttons of the {thing} are dead",
        "everything is so slow that we cannot work", "the numbers in the report are not the ones we typed in",
        "the {thing} will not connect to anything", "it worked until yesterday, now the {thing} freezes",
    ),
    "cancel": (
        "I want to end my subscription", "please stop the {thing} at the end of the month", "we do not need the {thing} any more",
        "how do I get out of the contract", "I changed my mind and would like to return the {thing}",
        "close everything I have with you, I am moving abroad", "do not renew the {thing} in May",
        "I would like to withdraw from the purchase of the {thing}", "we are going with another company",
        "take me off the yearly plan", "my father has died and his {thing} should be ended", "the trial was enough for me, thank you",
        "I ordered the {thing} by mistake, please do not send it", "what notice do I have to give for the {thing}",
        "I no longer want to be a member",
    ),
    "privacy": (
        "which data about me do you keep", "please delete all personal information you hold",
        "why did another company get my phone number from you", "I saw someone else's {thing} and address on my page",
        "I do not agree to my {thing} history being used for advertising", "send me a copy of everything stored under my name",
        "who looked at my file on Tuesday", "stop sharing my location with your partners",
        "I take back my consent to the newsletter profile", "is the recording of our call kept, and for how long",
        "my photo is on your site and nobody asked me", "a stranger's name and card digits appeared in my {thing}",
        "please correct my date of birth in your records", "who is your data protection officer",
        "are the details from the {thing} stored outside Europe",
    ),
}  # fmt: skip

BACKGROUND = (
    "Last month I wrote because {other}; that is solved. Now {wanted}.", "{Wanted}. And no, this is not about the time when {other}.",
    "I know others complain that {other}. With me it is something else: {wanted}.", "{Wanted}. Your bot thought that {other}, which is wrong.",
    "First I believed that {other}, but that was my own mistake; {wanted}.", "{Wanted}. (The form made me choose '{other}'.)",
    "Your colleague answered as if I had said '{other}'. What I said is: {wanted}.",
)  # fmt: skip


def tickets(rows: int, seed: int, *, test: bool = False) -> list[tuple[str, str]]:
    """Texts and their labels.

    Args:
        rows: how many; the kinds keep their shares.
        seed: the same seed, the same tickets.
        test: with the ways of saying things that no training row has.
    """
    draw = random.Random(2 * seed + test)
    kinds = [kind for kind, share in KINDS.items() for _ in range(round(share * rows))]
    kinds = (kinds + [next(iter(KINDS))] * rows)[:rows]
    draw.shuffle(kinds)
    return [(_ticket(kind, draw, test), draw.choice(list(KINDS)) if draw.random() < WRONG else kind) for kind in kinds]


def _ticket(kind: str, draw: random.Random, test: bool) -> str:
    wanted = _said(kind, draw, test)
    body = f"{_capital(wanted)}."
    if draw.random() < 0.2:
        other = _said(draw.choice([name for name in KINDS if name != kind]), draw, test)
        body = draw.choice(BACKGROUND).format(wanted=wanted, Wanted=_capital(wanted), other=other)
    return " ".join(part for part in (draw.choice(OPENINGS), body, draw.choice(CLOSINGS)) if part)


def _said(kind: str, draw: random.Random, test: bool) -> str:
    ways = [way for number, way in enumerate(WANTED[kind]) if test or number % 15 < 14]
    return draw.choice(ways).format(thing=draw.choice(THINGS))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write made-up tickets.")
    parser.add_argument("file")
    parser.add_argument("--test", action="store_true", help="1,000 others, with words that the 1,200 do not have")
    asked = parser.parse_args()
    with open(asked.file, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(tickets(1000 if asked.test else 1200, seed=0, test=asked.test))


if __name__ == "__main__":
    main()
